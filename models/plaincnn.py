"""Plain CNNs of depth 2 to 10 with BatchNorm, skip connections and ReLU: the small networks of the capacity-gap study.

The design is ours, after the description in the DPK authors' rebuttal; there are no published weights.
"""

import torch.nn.functional as F
from torch import nn


class ConvBlock(nn.Module):
    """A 3×3 convolution and BatchNorm, with a skip where the shape is kept: x -> output before the ReLU."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.skip = stride == 1 and in_channels == channels

    def forward(self, x):
        out = self.bn(self.conv(x))
        return x + out if self.skip else out


class PlainCNN(nn.Module):
    """A 3×3 stem, depth / 2 convolutions at half the size, depth / 2 at a quarter of it, and a linear layer.

    All depths have the same three maps, so that any of them teaches any other stage by stage.

    forward(x (B, 3, H, W)) -> logits (B, num_classes); H, W ≥ 32, and in what follows H = W = 32.
    With return_features, (logits, features): `maps`, after the ReLU, of the stem (16, 32×32) and the stages (32,
    16×16), (64, 8×8); `preacts`, the same before the ReLU; `pooled` (B, 64).
    """

    def __init__(self, depth, num_classes):
        super().__init__()
        self.stem = nn.ModuleList([ConvBlock(3, 16, 1)])
        self.stage1 = self._stage(16, 32, depth // 2)
        self.stage2 = self._stage(32, 64, depth // 2)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels, channels, depth):
        return nn.ModuleList(ConvBlock(channels if i else in_channels, channels, 1 if i else 2) for i in range(depth))

    def forward(self, x, return_features=False):
        maps, preacts = [], []
        for stage in self.stem, self.stage1, self.stage2:
            for block in stage:
                preact = block(x)
                x = F.relu(preact)
            maps.append(x)
            preacts.append(preact)
        pooled = x.mean((2, 3))
        logits = self.fc(pooled)
        return (logits, {"maps": maps, "preacts": preacts, "pooled": pooled}) if return_features else logits


def plaincnn2(num_classes=100):
    return PlainCNN(2, num_classes)


def plaincnn4(num_classes=100):
    return PlainCNN(4, num_classes)


def plaincnn6(num_classes=100):
    return PlainCNN(6, num_classes)


def plaincnn8(num_classes=100):
    return PlainCNN(8, num_classes)


def plaincnn10(num_classes=100):
    return PlainCNN(10, num_classes)
