import pytest
import torch

from distillers import DISTILLERS
from distillers.at import AT, at_loss, attention_map
from distillers.nst import nst_loss
from models import MODELS


def reference(s, t):
    """The definition, an image at a time, in float64; maps of one size."""
    total = 0.0
    for a, b in zip(s.double(), t.double()):
        a, b = (x.square().sum(0).flatten() for x in (a, b))
        total += (a / a.norm() - b / b.norm()).square().sum().item()
    return total / (len(s) * s.shape[2] * s.shape[3])


def test_against_the_definition():
    torch.manual_seed(0)
    s, t = torch.randn(5, 3, 4, 4), torch.randn(5, 7, 4, 4)
    assert at_loss(s, t).item() == pytest.approx(reference(s, t), rel=1e-5)
    assert at_loss(s, -2 * s).item() == pytest.approx(0, abs=1e-12)  # signs and scale do not matter
    assert at_loss(s[:, [2, 0, 1]], s).item() == pytest.approx(0, abs=1e-12)  # nor the order of the channels
    large = torch.randn(5, 7, 8, 8)
    pooled = large.view(5, 7, 4, 2, 4, 2).mean((3, 5))
    assert at_loss(s, large).item() == pytest.approx(reference(s, pooled), rel=1e-5)
    assert at_loss(large, s).item() == pytest.approx(reference(pooled, s), rel=1e-5)
    assert torch.isfinite(at_loss(torch.zeros(2, 3, 4, 4), t[:2]))
    large = 300 * s.half()
    assert torch.equal(attention_map(large), attention_map(large.float()))
    assert at_loss(300 * s.half(), 300 * t.half()).item() == pytest.approx(reference(s, t), rel=1e-2)  # 300² overflows


def test_sum_over_the_stages():
    torch.manual_seed(0)
    distiller = AT(MODELS["resnet8"](), MODELS["resnet14"](), at_weight=10.0).eval()
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    losses = distiller(images, targets)[1]
    s, t = (network(images, return_features=True)[1]["maps"] for network in (distiller.student, distiller.teacher))
    assert losses["at"].item() == pytest.approx(10 * sum(reference(s[i], t[i]) for i in (1, 2, 3)), rel=1e-4)
    with pytest.raises(ValueError, match="at_weight"):
        AT(MODELS["resnet8"](), MODELS["resnet14"](), at_weight=-1.0)


@pytest.mark.parametrize(("method", "function"), [("at", at_loss), ("nst", nst_loss)])
def test_last_with_last_where_one_network_has_more_maps(method, function):
    torch.manual_seed(0)
    distiller = DISTILLERS[method](MODELS["plaincnn2"](), MODELS["resnet8"](), **{f"{method}_weight": 1.0}).eval()
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    s, t = (network(images, return_features=True)[1]["maps"] for network in (distiller.student, distiller.teacher))
    assert (len(s), len(t)) == (3, 4)
    expected = function(s[1], t[2]) + function(s[2], t[3])
    assert distiller(images, targets)[1][method].item() == pytest.approx(expected.item(), rel=1e-5)
