"""ShuffleNet for CIFAR: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network", CVPR 2018.

Tensor names and feature maps as in RepDistiller and mdistiller.
"""

import torch
import torch.nn.functional as F
from torch import nn


def channel_shuffle(x, groups):
    """(B, g · c, H, W) -> the same, the channels read as (c, g) where they were (g, c)."""
    B, C, H, W = x.shape
    return x.reshape(B, groups, C // groups, H, W).transpose(1, 2).reshape(B, C, H, W)


class Bottleneck(nn.Module):
    """Grouped 1×1, shuffle, depthwise 3×3, grouped 1×1; beside it the input, added, or at stride 2 pooled and appended.

    (B, C, H, W) -> the sum or the concatenation, before the last ReLU.
    """

    def __init__(self, in_channels, channels, stride, groups):
        super().__init__()
        width = channels // 4
        self.stride = stride
        self.first_groups = 1 if in_channels == 24 else groups  # none on the few channels of the stem
        self.conv1 = nn.Conv2d(in_channels, width, 1, groups=self.first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x):
        out = channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.first_groups)
        out = F.relu(self.bn2(self.conv2(out)))  # this ReLU is the field's; the paper has none here
        out = self.bn3(self.conv3(out))
        return torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], 1) if self.stride == 2 else out + x


class ShuffleNetV1(nn.Module):
    """ShuffleNet with 3 groups and a 1×1 stem.

    forward(x (B, 3, H, W)) -> logits (B, num_classes); H, W ≥ 32, and in what follows H = W = 32.
    With return_features, (logits, features): `maps`, after the ReLU, of the stem (24, 32×32) and the stages (240,
    16×16), (480, 8×8), (960, 4×4); `preacts`, the same before the ReLU; `pooled` (B, 960).
    """

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = self._stage(24, 240, 4)
        self.layer2 = self._stage(240, 480, 8)
        self.layer3 = self._stage(480, 960, 4)
        self.linear = nn.Linear(960, num_classes)

    @staticmethod
    def _stage(in_channels, channels, blocks):
        # the first block's own channels and the input's, appended, make the stage's
        return nn.ModuleList([Bottleneck(in_channels, channels - in_channels, 2, groups=3),
                              *(Bottleneck(channels, channels, 1, groups=3) for _ in range(blocks - 1))])

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
        logits = self.linear(pooled)
        return (logits, {"maps": maps, "preacts": preacts, "pooled": pooled}) if return_features else logits


def shufflenetv1(num_classes=100):
    return ShuffleNetV1(num_classes)
