import pytest
import torch

from distillers.sp import SP, sp_loss
from models import MODELS


def reference(s, t):
    grams = []
    for x in s.double(), t.double():
        g = [[(a * b).sum() for b in x] for a in x]
        grams.append([[v / sum(w * w for w in row).sqrt() for v in row] for row in g])
    n = len(s)
    return sum((grams[0][i][j] - grams[1][i][j]) ** 2 for i in range(n) for j in range(n)).item() / n**2


def test_against_the_definition():
    torch.manual_seed(0)
    s, t = torch.randn(5, 3, 4, 4), torch.randn(5, 7, 2, 2)
    assert sp_loss(s, t).item() == pytest.approx(reference(s, t), rel=1e-5)
    assert sp_loss(s, 3 * s).item() == pytest.approx(0, abs=1e-12)
    turned = torch.linalg.qr(torch.randn(48, 48))[0]
    assert sp_loss((s.flatten(1) @ turned), s).item() == pytest.approx(0, abs=1e-9)  # a rotation keeps similarities
    assert sp_loss(torch.zeros(4, 3, 2, 2), t[:4]).isfinite()
    large = 100 * torch.rand(4, 64, 8, 8)
    assert sp_loss(large.half(), -large.half()).item() == pytest.approx(0, abs=1e-9)  # the Gram matrix overflows half


def test_the_last_map():
    torch.manual_seed(0)
    distiller = SP(MODELS["resnet8"](), MODELS["resnet14"](), sp_weight=2.0).eval()
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    s, t = (network(images, return_features=True)[1]["maps"] for network in (distiller.student, distiller.teacher))
    assert distiller(images, targets)[1]["sp"].item() == pytest.approx(2 * reference(s[-1], t[-1]), rel=1e-3)
    with pytest.raises(ValueError, match="sp_weight"):
        SP(MODELS["resnet8"](), MODELS["resnet14"](), sp_weight=-1.0)
