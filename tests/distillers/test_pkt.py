import math

import pytest
import torch

from distillers.pkt import PKT, neighbours, pkt_loss
from models import MODELS


def reference(s, t):
    """Kullback-Leibler divergence of the neighbours, pair by pair, in float64, as a mean over the pairs."""
    n, tables = len(s), []
    for x in s.double(), t.double():
        k = [[(torch.dot(a, b) / (a.norm() * b.norm())).item() / 2 + 0.5 for b in x] for a in x]
        tables.append([[v / sum(row) for v in row] for row in k])
    return sum(tables[1][i][j] * math.log(tables[1][i][j] / tables[0][i][j]) for i in range(n) for j in range(n)) / n**2


def test_against_the_definition():
    torch.manual_seed(0)
    s, t = torch.randn(6, 5), torch.randn(6, 9)
    assert pkt_loss(s, t).item() == pytest.approx(reference(s, t), rel=1e-4)
    assert pkt_loss(s, 3 * s).item() == pytest.approx(0, abs=1e-8)
    assert torch.allclose(neighbours(s).sum(1), torch.ones(6))
    assert pkt_loss(s, t) > 0 and pkt_loss(t, s) != pkt_loss(s, t)
    zero = torch.zeros(4, 5, requires_grad=True)
    loss = pkt_loss(zero, t[:4])
    loss.backward()
    assert loss.isfinite() and zero.grad.isfinite().all()
    assert pkt_loss(1000 * s.half(), 1000 * t.half()).item() == pytest.approx(reference(s, t), rel=2e-2)


def test_on_the_pooled_features(network_of):
    torch.manual_seed(0)
    s, t = torch.randn(4, 5), torch.randn(4, 9)
    losses = PKT(network_of(s), network_of(t), pkt_weight=100.0)(torch.randn(4, 3, 32, 32), torch.arange(4))[1]
    assert losses["pkt"].item() == pytest.approx(100 * reference(s, t), rel=1e-4)
    assert losses["pkt"].item() != pytest.approx(100 * reference(t, s), rel=1e-2)  # not the other way round
    with pytest.raises(ValueError, match="pkt_weight"):
        PKT(MODELS["resnet8"](), MODELS["resnet14"](), pkt_weight=-1.0)
