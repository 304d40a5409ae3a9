"""ResNet-50 with a CIFAR stem: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.

The field's second ResNet file: four stages, other tensor names (`shortcut`, `linear`) than the 6n + 2 family.
"""

import torch.nn.functional as F
from torch import nn


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 and a shortcut: (B, C, H, W) -> (B, 4 · width, H / stride, W / stride), before the last ReLU."""

    def __init__(self, in_channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, 4 * width, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return self.bn3(self.conv3(out)) + self.shortcut(x)


class ResNet50(nn.Module):
    """ResNet-50 for images of 32 pixels: a 3×3 stem of stride 1 and no first pooling.

    forward(x (B, 3, H, W)) -> logits (B, num_classes); H, W ≥ 32, and in what follows H = W = 32.
    With return_features, (logits, features): `maps`, after the ReLU, of the stem (64, 32×32) and the stages (256,
    32×32), (512, 16×16), (1024, 8×8), (2048, 4×4); `preacts`, the same before the ReLU; `pooled` (B, 2048).
    """

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = self._stage(64, 64, 3, stride=1)
        self.layer2 = self._stage(256, 128, 4, stride=2)
        self.layer3 = self._stage(512, 256, 6, stride=2)
        self.layer4 = self._stage(1024, 512, 3, stride=2)
        self.linear = nn.Linear(2048, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels, width, blocks, stride):
        return nn.ModuleList(Bottleneck(4 * width if i else in_channels, width, 1 if i else stride)
                             for i in range(blocks))

    def forward(self, x, return_features=False):
        preact = self.bn1(self.conv1(x))
        x = F.relu(preact)
        maps, preacts = [x], [preact]
        for stage in self.layer1, self.layer2, self.layer3, self.layer4:
            for block in stage:
                preact = block(x)
                x = F.relu(preact)
            maps.append(x)
            preacts.append(preact)
        pooled = x.mean((2, 3))
        logits = self.linear(pooled)
        return (logits, {"maps": maps, "preacts": preacts, "pooled": pooled}) if return_features else logits


def resnet50(num_classes=100):
    return ResNet50(num_classes)
