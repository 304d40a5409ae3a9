import pytest
import torch

from distillers.nst import NST, nst_loss
from models import MODELS


def reference(s, t):
    """Squared MMD with the kernel (x·y)², a pair of channels at a time, in float64; maps of one size."""
    total = 0.0
    for a, b in zip(s.double().flatten(2), t.double().flatten(2)):
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)

        def kernel(x, y):
            return sum(torch.dot(i, j).item() ** 2 for i in x for j in y) / (len(x) * len(y))

        total += kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    return total / len(s)


def test_against_the_definition():
    torch.manual_seed(0)
    s, t = torch.randn(3, 4, 4, 4), torch.randn(3, 6, 4, 4)
    assert nst_loss(s, t).item() == pytest.approx(reference(s, t), rel=1e-4)
    assert nst_loss(s, -2 * s[:, [3, 1, 0, 2]]).item() == pytest.approx(0, abs=1e-6)  # scale, sign, order of channels
    large = torch.randn(3, 6, 8, 8)
    pooled = large.view(3, 6, 4, 2, 4, 2).mean((3, 5))
    assert nst_loss(s, large).item() == pytest.approx(reference(s, pooled), rel=1e-4)
    assert nst_loss(large, s).item() == pytest.approx(reference(pooled, s), rel=1e-4)
    dead = s.clone()
    dead[:, 0] = 0
    assert nst_loss(dead, t).isfinite()
    assert nst_loss(300 * s.half(), 300 * t.half()).item() == pytest.approx(reference(s, t), rel=1e-2)


def test_sum_over_the_stages():
    torch.manual_seed(0)
    distiller = NST(MODELS["resnet8"](), MODELS["resnet14"](), nst_weight=5.0).eval()
    images, targets = torch.randn(2, 3, 32, 32), torch.arange(2)
    s, t = (network(images, return_features=True)[1]["maps"] for network in (distiller.student, distiller.teacher))
    expected = 5 * sum(nst_loss(s[i], t[i]) for i in (1, 2, 3)).item()
    assert distiller(images, targets)[1]["nst"].item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="nst_weight"):
        NST(MODELS["resnet8"](), MODELS["resnet14"](), nst_weight=-1.0)
