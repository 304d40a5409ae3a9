"""MobileNetV1: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision", 2017.

The field's ImageNet student under a ResNet-50: 4,231,976 parameters with 1,000 classes, tensors named `model.{i}.{j}`
and `fc` as in its published files.
"""

import torch.nn.functional as F
from torch import nn

# channels and stride of the depthwise separable blocks
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


def conv_bn(in_channels, channels, stride):
    """3×3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())


def depthwise_separable(in_channels, channels, stride):
    """3×3 convolution of each channel, BatchNorm, ReLU; 1×1 convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels), nn.ReLU(),
        nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())


class MobileNetV1(nn.Module):
    """A stem and 13 depthwise separable blocks.

    forward(x (B, 3, H, W)) -> logits (B, num_classes); H, W ≥ 32, and in what follows H = W = 224.
    With return_features, (logits, features): `maps`, after the ReLU, of the last block at each size (112×112, 56×56,
    28×28, 14×14, 7×7); `preacts`, the same before the ReLU; `pooled` (B, 1024), the global average of the last map.
    """

    def __init__(self, num_classes=1000):
        super().__init__()
        blocks, channels = [conv_bn(3, 32, 2)], 32
        for width, stride in BLOCKS:
            blocks.append(depthwise_separable(channels, width, stride))
            channels = width
        self.model = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        # The last block of each size: those before a stride of 2, and the very last.
        self.stages = [i for i, (_, stride) in enumerate(BLOCKS) if stride == 2] + [len(BLOCKS)]

    def forward(self, x, return_features=False):
        maps, preacts = [], []
        for i, block in enumerate(self.model):
            preact = block[:-1](x)
            x = F.relu(preact)
            if i in self.stages:
                maps.append(x)
                preacts.append(preact)
        pooled = x.mean((2, 3))
        logits = self.fc(pooled)
        return (logits, {"maps": maps, "preacts": preacts, "pooled": pooled}) if return_features else logits


def mobilenetv1(num_classes=1000, image_size=None):  # any size will do
    return MobileNetV1(num_classes)
