"""ResNets for CIFAR: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.

Tensor names and feature maps as in RepDistiller and mdistiller, whose published teachers load unchanged.
"""

import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: (B, C, H, W) -> (B, C', H / stride, W / stride), before the last ReLU."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return out + (x if self.downsample is None else self.downsample(x))


class ResNet(nn.Module):
    """A CIFAR ResNet of 6n + 2 layers; `widths` are those of the stem and of the three stages.

    forward(x (B, 3, H, W)) -> logits (B, num_classes); H, W ≥ 32, and in what follows H = W = 32.
    With return_features, (logits, features): `maps`, after the ReLU, of the stem (32×32) and the stages (32×32, 16×16,
    8×8); `preacts`, the same before the ReLU; `pooled` (B, C), the global average of the last map.
    """

    def __init__(self, depth, widths, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = self._stage(widths[0], widths[1], (depth - 2) // 6, stride=1)
        self.layer2 = self._stage(widths[1], widths[2], (depth - 2) // 6, stride=2)
        self.layer3 = self._stage(widths[2], widths[3], (depth - 2) // 6, stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels, channels, blocks, stride):
        return nn.ModuleList(BasicBlock(channels if i else in_channels, channels, 1 if i else stride)
                             for i in range(blocks))

    def forward(self, x, return_features=False):
        preact = self.bn1(self.conv1(x))
        x = F.relu(preact)
        maps, preacts = [x], [preact]
        for stage in self.layer1, self.layer2, self.layer3:
            for block in stage:
                preact = block(x)
                x = F.relu(preact)
            maps.append(x)
            preacts.append(preact)
        pooled = x.mean((2, 3))
        logits = self.fc(pooled)
        return (logits, {"maps": maps, "preacts": preacts, "pooled": pooled}) if return_features else logits


def resnet8(num_classes=100):
    return ResNet(8, (16, 16, 32, 64), num_classes)


def resnet14(num_classes=100):
    return ResNet(14, (16, 16, 32, 64), num_classes)


def resnet20(num_classes=100):
    return ResNet(20, (16, 16, 32, 64), num_classes)


def resnet32(num_classes=100):
    return ResNet(32, (16, 16, 32, 64), num_classes)


def resnet44(num_classes=100):
    return ResNet(44, (16, 16, 32, 64), num_classes)


def resnet56(num_classes=100):
    return ResNet(56, (16, 16, 32, 64), num_classes)


def resnet110(num_classes=100):
    return ResNet(110, (16, 16, 32, 64), num_classes)


def resnet8x4(num_classes=100):
    return ResNet(8, (32, 64, 128, 256), num_classes)


def resnet32x4(num_classes=100):
    return ResNet(32, (32, 64, 128, 256), num_classes)
