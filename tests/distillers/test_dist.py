import numpy as np
import pytest
import torch

from distillers.dist import DIST, dist_losses
from models import MODELS


def reference(student, teacher, T):
    """By numpy's correlation coefficients; the authors' eps of 1e-8 counts where hardly anything varies."""
    def correlation(a, b):
        norms = np.linalg.norm(a - a.mean()) * np.linalg.norm(b - b.mean())
        return np.corrcoef(a, b)[0, 1] * norms / (norms + 1e-8)

    s, t = ((z.double() / T).softmax(1).numpy() for z in (student, teacher))
    inter, intra = (np.mean([1 - correlation(a, b) for a, b in zip(x, y)]) for x, y in ((s, t), (s.T, t.T)))
    return inter * T**2, intra * T**2


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_against_numpy(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 9), torch.randn(6, 9)
    losses = [loss.item() for loss in dist_losses(student, teacher, temperature)]
    assert losses == pytest.approx(reference(student, teacher, temperature), rel=1e-3)
    assert sum(dist_losses(student, student + 3, temperature)).item() == pytest.approx(0, abs=1e-3)


def test_constant_probabilities_have_finite_gradients():
    student = torch.zeros(4, 5, requires_grad=True)
    losses = dist_losses(student.half(), torch.zeros(4, 5), 4.0)
    sum(losses).backward()
    assert student.grad.isfinite().all() and all(loss.dtype == torch.float32 for loss in losses)


def test_weights():
    torch.manual_seed(0)
    distiller = DIST(MODELS["resnet8"](), MODELS["resnet14"](), inter_weight=2.0, intra_weight=3.0).eval()
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    losses = distiller(images, targets)[1]
    expected = reference(*(network(images).detach() for network in (distiller.student, distiller.teacher)), 4.0)
    assert losses["inter"].item() == pytest.approx(2 * expected[0], rel=2e-2)
    assert losses["intra"].item() == pytest.approx(3 * expected[1], rel=2e-2)
    with pytest.raises(ValueError, match="temperature"):
        DIST(MODELS["resnet8"](), MODELS["resnet14"](), temperature=0.0)
