import pytest
import torch

from distillers.ofd import OFD, margin, partial_l2, read_preacts
from models import IMAGENET_MODELS, MODELS


def test_the_margin_is_the_mean_of_what_is_negative():
    mean, std = torch.tensor([0.0, 1.0, -2.0, 10.0]), torch.tensor([1.0, -2.0, 0.5, 1.0])
    x = mean.double() + std.abs().double() * torch.randn(10**6, 4, generator=torch.Generator().manual_seed(0)).double()
    for i in range(3):
        assert margin(mean, std)[i].item() == pytest.approx(x[:, i][x[:, i] < 0].mean().item(), abs=5e-3)
    assert margin(mean, std)[3] == -3.0  # hardly ever negative
    rare, rarer = margin(torch.tensor([3.08, 3.1]), torch.ones(2))  # negative in 0.00104 and in 0.00097 of all cases
    assert -0.4 < rare < -0.2 and rarer == -3.0
    assert margin(torch.zeros(2), torch.zeros(2)).isfinite().all()


def test_partial_l2_value_by_value():
    m = torch.tensor([-1.0])
    cases = {(2.0, 1.0): 1.0, (0.0, 1.0): 1.0,  # a positive target: the square
             (-0.2, -0.5): 0.3**2, (-0.8, -0.5): 0.0,  # above the margin: only what is too large
             (0.5, -3.0): 1.5**2, (-2.0, -3.0): 0.0}  # below the margin: as if it were the margin
    for (s, t), expected in cases.items():
        s, t = (torch.full((2, 1, 3, 3), value) for value in (s, t))
        # a sum over the positions, a mean over the images
        assert partial_l2(s, t, m).item() == pytest.approx(9 * expected, abs=1e-6)
    assert partial_l2(s.half() * 3e4, t.half() * 3e4, m).isfinite()


@pytest.mark.parametrize("name, expected", [
    ("resnet14", ["layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2"]),
    ("resnet32x4", ["layer1.4.bn2", "layer2.4.bn2", "layer3.4.bn2"]),
    ("resnet50", ["layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"]),
    ("wrn_16_2", ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]),
    ("vgg13", ["block1.4", "block2.4", "block3.4", "block4.4"]),
    ("plaincnn6", ["stage1.2.bn", "stage2.2.bn"]),
    ("shufflenetv2", [None, None, None]),  # each is two halves
    ("resnext50_32x4d", ["body.layer1.2.bn3", "body.layer2.3.bn3", "body.layer3.5.bn3", "body.layer4.2.bn3"]),
])
def test_the_batchnorm_before_each_relu(name, expected):
    model = (IMAGENET_MODELS | MODELS)[name](num_classes=10).train()
    names = {module: key for key, module in model.named_modules()} | {None: None}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = read_preacts(model, 32)
    assert [names[bn] for _, bn in found] == expected
    assert all(bn is None or shape[0] == bn.num_features for shape, bn in found)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_batchnorm_before_a_map_that_comes_after_a_relu():
    """Where the network gives no `preacts`; with the ReLU in place as without."""
    class Maps(torch.nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.network = IMAGENET_MODELS["resnext50_32x4d"](num_classes=10)
            for module in self.modules():
                if isinstance(module, torch.nn.ReLU):
                    module.inplace = inplace

        def forward(self, images, return_features=False):
            logits, features = self.network(images, return_features=True)
            return logits, {"maps": features["maps"]}

    for model in Maps(inplace=False), Maps(inplace=True):
        names = {module: key for key, module in model.named_modules()}
        found = [names[bn] for _, bn in read_preacts(model, 32)]
        assert found == [f"network.body.layer{i}.{last}.bn3" for i, last in ((1, 2), (2, 3), (3, 5), (4, 2))]


def test_maps_of_other_sizes_and_widths():
    """A student of 16, 48 and 160 channels on 8×8, 4×4 and 2×2, a teacher of 64, 128 and 256 on maps 4 times as large.

    The last three of the student's four stages, then.
    """
    torch.manual_seed(0)
    distiller = OFD(MODELS["mobilenetv2"](), MODELS["resnet8x4"](), ofd_weight=0.1).eval()
    for (conv, bn), (mine, theirs) in zip(distiller.connectors, ((16, 64), (48, 128), (160, 256))):
        assert conv.weight.shape == (theirs, mine, 1, 1) and conv.bias is None and bn.num_features == theirs
        assert conv.weight.std().item() == pytest.approx((2 / theirs) ** 0.5, rel=0.1)
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    s, t = (network(images, return_features=True)[1] for network in (distiller.student, distiller.teacher))
    expected = 0
    for i, (mine, theirs) in enumerate(zip(s["maps"][-3:], t["preacts"][-3:])):
        B, C, H, W = theirs.shape
        theirs = theirs.reshape(B, C, H // 4, 4, W // 4, 4).mean((3, 5))
        loss = partial_l2(distiller.connectors[i](mine), theirs, getattr(distiller, f"margin{i}"))
        expected = expected + (0.25, 0.5, 1.0)[i] * loss
    assert distiller(images, targets)[1]["ofd"].item() == pytest.approx(0.1 * expected.item(), rel=1e-5)


def test_weights_of_the_stages():
    torch.manual_seed(0)
    distiller = OFD(MODELS["resnet8"](), MODELS["resnet14"](), ofd_weight=0.1).eval()
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    s, t = (network(images, return_features=True)[1]["preacts"] for network in (distiller.student, distiller.teacher))
    bns = [getattr(distiller.teacher, f"layer{i}")[-1].bn2 for i in (1, 2, 3)]
    expected = sum(partial_l2(distiller.connectors[i](s[i + 1]), t[i + 1], margin(bns[i].bias, bns[i].weight)) * weight
                   for i, weight in enumerate((0.25, 0.5, 1.0)))
    assert distiller(images, targets)[1]["ofd"].item() == pytest.approx(0.1 * expected.item(), rel=1e-5)
    assert not distiller.train().teacher.training
    with pytest.raises(ValueError, match="ofd_weight"):
        OFD(MODELS["resnet8"](), MODELS["resnet14"](), ofd_weight=-1.0)


def test_the_margins_under_syncbatchnorm_and_under_one_without_weights():
    teacher = MODELS["resnet14"]()
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight)
    expected = OFD(MODELS["resnet8"](), teacher).margin2.clone()
    assert expected.any()
    synced = OFD(MODELS["resnet8"](), torch.nn.SyncBatchNorm.convert_sync_batchnorm(teacher))
    assert torch.equal(synced.margin2, expected)
    teacher.layer3[-1].bn2 = torch.nn.BatchNorm2d(64, affine=False)
    assert OFD(MODELS["resnet8"](), teacher).margin2.isfinite().all()


def test_without_batchnorm_the_margin_is_zero():
    teacher = MODELS["resnet14"]()
    for module in list(teacher.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(module, name, torch.nn.Identity())
    distiller = OFD(MODELS["resnet8"](), teacher)
    for i, width in enumerate((16, 32, 64)):
        assert torch.equal(getattr(distiller, f"margin{i}"), torch.zeros(width))
    assert distiller(torch.randn(4, 3, 32, 32), torch.arange(4))[1]["ofd"].isfinite()
