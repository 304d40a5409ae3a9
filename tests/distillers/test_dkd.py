import math

import pytest
import torch

from distillers.dkd import DKD, dkd_losses, standardize
from distillers.kd import kd_loss
from models import MODELS


def logits(B=5, K=7, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(B, K, generator=generator) for _ in range(2))


def reference(student, teacher, targets, T):
    """TCKD and NCKD from probabilities, a sample at a time, in float64."""
    tckd = nckd = 0.0
    for s, t, c in zip(student.double(), teacher.double(), targets):
        q, p = (s / T).softmax(0), (t / T).softmax(0)
        others = [k for k in range(len(s)) if k != c]
        tckd += p[c] * (p[c] / q[c]).log() + (1 - p[c]) * ((1 - p[c]) / (1 - q[c])).log()
        q, p = q[others] / q[others].sum(), p[others] / p[others].sum()
        nckd += (p * (p / q).log()).sum()
    return tckd.item() * T**2 / len(student), nckd.item() * T**2 / len(student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_against_the_definition(temperature):
    student, teacher = logits()
    targets = torch.tensor([0, 6, 3, 3, 1])
    losses = [loss.item() for loss in dkd_losses(student, teacher, targets, temperature)]
    assert losses == pytest.approx(reference(student, teacher, targets, temperature), rel=1e-4)
    assert sum(dkd_losses(student, student + 5, targets, temperature)).item() == pytest.approx(0, abs=1e-5)


def test_kd_is_tckd_and_what_the_teacher_does_not_give_the_target_of_nckd():
    """Equation 6, sample by sample."""
    student, teacher = logits()
    for s, t, c in zip(student, teacher, (0, 6, 3, 3, 1)):
        s, t, c = s[None], t[None], torch.tensor([c])
        tckd, nckd = dkd_losses(s, t, c, 4.0)
        rest = 1 - (t / 4).softmax(1)[0, c]
        assert kd_loss(s, t, 4.0).item() == pytest.approx((tckd + rest * nckd).item(), rel=1e-4)


def test_survives_sure_networks_and_half_precision():
    targets = torch.arange(5)
    for scale in 100.0, 1e4:  # the public code takes the logarithm of a probability that is zero by then
        student, teacher = (x.clone().requires_grad_() for x in logits(scale=scale))
        sum(dkd_losses(student, teacher.detach(), targets, 1.0)).backward()
        assert student.grad.isfinite().all()
    student, teacher = logits()
    assert all(loss.dtype == torch.float32 for loss in dkd_losses(student.half(), teacher.half(), targets, 4.0))


def test_weights_warmup_and_standardisation():
    torch.manual_seed(0)
    distiller = DKD(MODELS["resnet8"](), MODELS["resnet14"](), alpha=2.0, beta=3.0, warmup_epochs=10).eval()
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    pair = [network(images) for network in (distiller.student, distiller.teacher)]
    expected = reference(*pair, targets, 4.0)
    for epoch, share in (None, 1.0), (0, 0.1), (4, 0.5), (9, 1.0), (200, 1.0):
        if epoch is not None:
            distiller.set_epoch(epoch)
        losses = distiller(images, targets)[1]
        assert losses["tckd"].item() == pytest.approx(share * 2 * expected[0], rel=1e-3, abs=1e-6)
        assert losses["nckd"].item() == pytest.approx(share * 3 * expected[1], rel=1e-3, abs=1e-6)
    distiller.logit_standardization = True
    expected = reference(*(standardize(z) for z in pair), targets, 4.0)
    assert distiller(images, targets)[1]["nckd"].item() == pytest.approx(3 * expected[1], rel=1e-3)
    z = standardize(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    assert torch.allclose(z, torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), atol=1e-5)
    assert not math.isnan(z.sum())


def test_gradient_of_both_parts_through_standardisation():
    torch.manual_seed(0)
    distiller = DKD(MODELS["resnet8"](), MODELS["resnet14"](), alpha=2.0, beta=3.0, temperature=2.0,
                    logit_standardization=True).eval()
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    logits, losses = distiller(images, targets)
    z, prior = (standardize(x.detach().double()) for x in (logits, distiller.teacher(images)))
    q, p, rows = (z / 2).softmax(1), (prior / 2).softmax(1), range(4)
    q_target, p_target = q[rows, targets, None], p[rows, targets, None]
    q[rows, targets], p[rows, targets] = 0, 0
    q, p = q / (1 - q_target), p / (1 - p_target)  # of the other classes among themselves
    of_tckd = -q
    of_tckd[rows, targets] = 1
    for name, of_z in ("tckd", 2 * (q_target - p_target) * of_tckd), ("nckd", 3 * (q - p)):
        of_z = 2.0 * of_z / 4  # T, and the mean over the batch
        of_logits = of_z - of_z.mean(1, keepdim=True) - z * (of_z * z).sum(1, keepdim=True) / 99  # K − 1
        of_logits = of_logits / logits.double().std(1, keepdim=True)
        (grad,) = torch.autograd.grad(losses[name], logits, retain_graph=True)
        torch.testing.assert_close(grad.double(), of_logits, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("arguments", [{"temperature": 0.0}, {"beta": -1.0}, {"warmup_epochs": -1}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        DKD(MODELS["plaincnn2"](), MODELS["plaincnn2"](), **arguments)
