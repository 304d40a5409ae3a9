import pytest
import torch

from distillers.cc import CC, cc_loss
from models import MODELS


def test_against_the_definition():
    torch.manual_seed(0)
    s, t = torch.randn(5, 7), torch.randn(5, 7)
    expected = sum(abs(s[i, d] - t[i, d]) * abs(s[i + 1, d] - t[i + 1, d]) for i in range(4) for d in range(7)) / 4
    assert cc_loss(s, t).item() == pytest.approx(expected.item(), rel=1e-5)
    assert cc_loss(s, s).item() == 0
    assert cc_loss(s[:1], t[:1]).item() == 0  # no neighbour: not the mean of nothing
    assert cc_loss(s, t) == cc_loss(t, s)
    with pytest.raises(ValueError, match=r"\(5, 7\).*\(5, 1\)"):
        cc_loss(s, t[:, :1])  # would broadcast


def test_both_networks_are_embedded_and_both_embeddings_learn():
    torch.manual_seed(0)
    distiller = CC(MODELS["resnet8"](), MODELS["resnet8x4"](), cc_weight=2.0, dim=16).eval()
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    losses = distiller(images, targets)[1]
    s, t = (network(images, return_features=True)[1]["pooled"] for network in (distiller.student, distiller.teacher))
    expected = 2 * cc_loss(distiller.student_embed(s), distiller.teacher_embed(t))
    assert losses["cc"].item() == pytest.approx(expected.item(), rel=1e-5)
    losses["cc"].backward()
    assert distiller.teacher_embed.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="dim: 0"):
        CC(MODELS["resnet8"](), MODELS["resnet14"](), dim=0)
