"""Wide ResNets: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016.

Tensor names and feature maps as in RepDistiller and mdistiller, whose published teachers load unchanged.
"""

import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """BatchNorm, ReLU, convolution, twice, and a shortcut: x -> (the sum, the first BatchNorm's output)."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut = None  # noqa: N815, the name in the published files
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x):
        preact = self.bn1(x)
        out = F.relu(preact)
        # Where the width changes, the shortcut too starts after the ReLU; elsewhere it is x itself.
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = F.relu(self.bn2(self.conv1(out)))
        return self.conv2(out) + shortcut, preact


class NetworkBlock(nn.Module):
    """One stage, under the name `layer` that the published files give it."""

    def __init__(self, in_channels, channels, blocks, stride):
        super().__init__()
        self.layer = nn.ModuleList(BasicBlock(channels if i else in_channels, channels, 1 if i else stride)
                                   for i in range(blocks))

    def forward(self, x):
        """x -> (the last block's sum, the first BatchNorm's output)."""
        x, preact = self.layer[0](x)
        for block in self.layer[1:]:
            x, _ = block(x)
        return x, preact


class WideResNet(nn.Module):
    """A Wide ResNet of 6n + 4 layers, `width` times as wide as 16, 32, 64.

    forward(x (B, 3, H, W)) -> logits (B, num_classes); H, W ≥ 32, and in what follows H = W = 32.
    With return_features, (logits, features): `maps`, the first convolution (16, 32×32) and the raw sums of the three
    stages (32×32, 16×16, 8×8), before any BatchNorm; `preacts`, each of these after the BatchNorm that comes next, and
    before its ReLU; `pooled` (B, 64 · width).
    """

    def __init__(self, depth, width, num_classes):
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = NetworkBlock(16, 16 * width, blocks, stride=1)
        self.block2 = NetworkBlock(16 * width, 32 * width, blocks, stride=2)
        self.block3 = NetworkBlock(32 * width, 64 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # N(0, 2 / (k² · channels out))
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x, return_features=False):
        x = self.conv1(x)
        maps, preacts = [x], []
        for stage in self.block1, self.block2, self.block3:
            x, preact = stage(x)  # preact belongs to the stage's input, so it completes the pair of the map before
            maps.append(x)
            preacts.append(preact)
        preacts.append(self.bn1(x))
        pooled = F.relu(preacts[-1]).mean((2, 3))
        logits = self.fc(pooled)
        return (logits, {"maps": maps, "preacts": preacts, "pooled": pooled}) if return_features else logits


def wrn_16_1(num_classes=100):
    return WideResNet(16, 1, num_classes)


def wrn_16_2(num_classes=100):
    return WideResNet(16, 2, num_classes)


def wrn_40_1(num_classes=100):
    return WideResNet(40, 1, num_classes)


def wrn_40_2(num_classes=100):
    return WideResNet(40, 2, num_classes)
