"""MobileNetV2 at half width for CIFAR: Sandler et al., "Inverted Residuals and Linear Bottlenecks", CVPR 2018.

Tensor names and feature maps as in RepDistiller and mdistiller.
"""

from torch import nn


def conv_bn_relu(in_channels, channels, kernel, stride=1, groups=1):
    return [nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(channels), nn.ReLU()]


class InvertedResidual(nn.Module):
    """Expand 1×1, depthwise 3×3, project 1×1 without a ReLU; a shortcut where the shape is kept."""

    def __init__(self, in_channels, channels, stride, expansion):
        super().__init__()
        hidden = in_channels * expansion
        self.shortcut = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            *conv_bn_relu(in_channels, hidden, 1),
            *conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 0.5 and expansion 6, with the first stride of the paper's seven stages left out.

    forward(x (B, 3, H, W)) -> logits (B, num_classes); H, W ≥ 32, and in what follows H = W = 32.
    With return_features, (logits, features): `maps`, the stem (16, 16×16), after its ReLU, and the linear bottlenecks,
    which no ReLU follows, of blocks 1 (12, 16×16), 2 (16, 8×8), 4 (48, 4×4) and 6 (160, 2×2); `pooled` (B, 1280).
    There are no `preacts`.
    """

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Sequential(*conv_bn_relu(3, 16, 3, stride=2))
        self.blocks = nn.ModuleList()
        in_channels = 16
        # (expansion, channels, blocks, stride); block 0 has its expansion convolution too, of factor 1
        for expansion, channels, n, stride in ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2),
                                               (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)):
            stage = [InvertedResidual(channels if i else in_channels, channels, 1 if i else stride, expansion)
                     for i in range(n)]
            self.blocks.append(nn.Sequential(*stage))
            in_channels = channels
        self.conv2 = nn.Sequential(*conv_bn_relu(160, 1280, 1))
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # N(0, 2 / (k² · channels out)), also where groups make fan_out smaller
                k, _ = module.kernel_size
                nn.init.normal_(module.weight, std=(2 / (k * k * module.out_channels)) ** 0.5)
        nn.init.normal_(self.classifier[0].weight, std=0.01)
        nn.init.zeros_(self.classifier[0].bias)

    def forward(self, x, return_features=False):
        x = self.conv1(x)
        maps = [x]
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in (1, 2, 4, 6):
                maps.append(x)
        pooled = self.conv2(x).mean((2, 3))
        logits = self.classifier(pooled)
        return (logits, {"maps": maps, "pooled": pooled}) if return_features else logits


def mobilenetv2(num_classes=100):
    return MobileNetV2(num_classes)
