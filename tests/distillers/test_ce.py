import torch

from distillers.ce import CE
from models import MODELS


def test_cross_entropy_needs_no_teacher():
    student = MODELS["plaincnn2"]().eval()
    images, targets = torch.randn(6, 3, 32, 32), torch.arange(6)
    logits, losses = CE(student)(images, targets)
    expected = -torch.log(torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True))[range(6), targets].mean()
    assert list(losses) == ["ce"] and torch.allclose(losses["ce"], expected, atol=1e-5)
    assert torch.equal(logits, student(images))
