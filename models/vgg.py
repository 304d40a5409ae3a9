"""VGG with BatchNorm for CIFAR: Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015.

Tensor names and feature maps as in RepDistiller and mdistiller, whose published teachers load unchanged.
"""

import torch.nn.functional as F
from torch import nn


class VGG(nn.Module):
    """Five blocks of 3×3 convolutions (with a bias, and BatchNorm), as many in each as `depths` says.

    forward(x (B, 3, H, W)) -> logits (B, num_classes); H, W ≥ 32, and in what follows H = W = 32.
    With return_features, (logits, features): `maps`, each block after its last ReLU and before pooling: (64, 32×32),
    (128, 16×16), (256, 8×8), (512, 4×4), (512, 4×4); `preacts`, the same before the ReLU; `pooled` (B, 512).
    The last two blocks share a size: a fourth pooling is for images of 64 pixels alone.
    """

    def __init__(self, depths, num_classes):
        super().__init__()
        widths = (3, 64, 128, 256, 512, 512)
        self.block0, self.block1, self.block2, self.block3, self.block4 = (
            self._block(widths[i], widths[i + 1], depth) for i, depth in enumerate(depths))
        self.classifier = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # N(0, 2 / (k² · channels out))
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    @staticmethod
    def _block(in_channels, channels, depth):
        layers = []
        for i in range(depth):
            layers += [nn.Conv2d(channels if i else in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels),
                       nn.ReLU()]
        return nn.Sequential(*layers[:-1])  # the last ReLU is in forward, so that what comes before it can be had

    def forward(self, x, return_features=False):
        pooled_before = {1, 2, 3, 4} if x.shape[2] == 64 else {1, 2, 3}
        maps, preacts = [], []
        for i, block in enumerate((self.block0, self.block1, self.block2, self.block3, self.block4)):
            preact = block(F.max_pool2d(x, 2) if i in pooled_before else x)
            x = F.relu(preact)
            maps.append(x)
            preacts.append(preact)
        pooled = x.mean((2, 3))
        logits = self.classifier(pooled)
        return (logits, {"maps": maps, "preacts": preacts, "pooled": pooled}) if return_features else logits


def vgg8(num_classes=100):
    return VGG((1, 1, 1, 1, 1), num_classes)


def vgg11(num_classes=100):
    return VGG((1, 1, 2, 2, 2), num_classes)


def vgg13(num_classes=100):
    return VGG((2, 2, 2, 2, 2), num_classes)


def vgg16(num_classes=100):
    return VGG((2, 2, 3, 3, 3), num_classes)


def vgg19(num_classes=100):
    return VGG((2, 2, 4, 4, 4), num_classes)
