"""ShuffleNetV2 for CIFAR: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design",
ECCV 2018. Tensor names and feature maps as in RepDistiller and mdistiller.
"""

import torch
import torch.nn.functional as F
from torch import nn


def channel_shuffle(x):
    """(B, 2c, H, W) -> the same, the channels of both halves in turn."""
    B, C, H, W = x.shape
    return x.reshape(B, 2, C // 2, H, W).transpose(1, 2).reshape(B, C, H, W)


class BasicBlock(nn.Module):
    """Half of the channels pass by, half go through 1×1, depthwise 3×3, 1×1; then both are shuffled.

    (B, C, H, W) -> (output, preact), both (B, C, H, W); preact: both halves before the last ReLU and the shuffle.
    """

    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x):
        kept, x = x.chunk(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = self.bn3(self.conv3(x))
        return channel_shuffle(torch.cat([kept, F.relu(x)], 1)), torch.cat([kept, x], 1)


class DownBlock(nn.Module):
    """Both halves go through convolutions of stride 2: (B, C, H, W) -> (B, C', H / 2, W / 2)."""

    def __init__(self, in_channels, channels):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, stride=2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x):
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return channel_shuffle(torch.cat([left, right], 1))


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 of size 1 with a 1×1 stem.

    forward(x (B, 3, H, W)) -> logits (B, num_classes); H, W ≥ 32, and in what follows H = W = 32.
    With return_features, (logits, features): `maps`, the stem (24, 32×32) and the stages after the channel shuffle,
    (116, 16×16), (232, 8×8), (464, 4×4); `preacts`, the same before the last ReLU, and so before the shuffle; `pooled`
    (B, 1024), after one more 1×1 convolution.
    """

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = self._stage(24, 116, 3)
        self.layer2 = self._stage(116, 232, 7)
        self.layer3 = self._stage(232, 464, 3)
        self.conv2 = nn.Conv2d(464, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    @staticmethod
    def _stage(in_channels, channels, blocks):
        return nn.ModuleList([DownBlock(in_channels, channels), *(BasicBlock(channels) for _ in range(blocks))])

    def forward(self, x, return_features=False):
        preact = self.bn1(self.conv1(x))
        x = F.relu(preact)
        maps, preacts = [x], [preact]
        for stage in self.layer1, self.layer2, self.layer3:
            x = stage[0](x)
            for block in stage[1:]:
                x, preact = block(x)
            maps.append(x)
            preacts.append(preact)
        pooled = F.relu(self.bn2(self.conv2(x))).mean((2, 3))
        logits = self.linear(pooled)
        return (logits, {"maps": maps, "preacts": preacts, "pooled": pooled}) if return_features else logits


def shufflenetv2(num_classes=100):
    return ShuffleNetV2(num_classes)
