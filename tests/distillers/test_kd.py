import math

import numpy as np
import pytest
import torch

from distillers.kd import KD, kd_loss, standardize
from models import MODELS


def logits(seed=0, shape=(5, 7)):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator), 3 * torch.randn(*shape, generator=generator)


def kl_in_float64(student, teacher, temperature):
    def softmax(x):
        x = np.exp(np.asarray(x, np.float64) / temperature)
        return x / x.sum(1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    return temperature**2 * (p * np.log(p / q)).sum(1).mean()


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_kd_loss_is_kl_from_teacher_to_student(temperature):
    student, teacher = logits()
    loss = kd_loss(student, teacher, temperature).item()
    assert loss == pytest.approx(kl_in_float64(student, teacher, temperature), rel=1e-5)
    assert loss != pytest.approx(kl_in_float64(teacher, student, temperature), rel=1e-2)  # not the other way round


def test_closed_form_of_two_classes():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])  # ½, ½ and ¾, ¼
    assert kd_loss(student, teacher, 1.0).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_zero_for_equal_logits_up_to_a_constant_and_a_mean_over_the_batch():
    student, teacher = logits()
    assert kd_loss(student, student + 5, 4.0).item() == pytest.approx(0, abs=1e-6)
    doubled = kd_loss(student.repeat(2, 1), teacher.repeat(2, 1), 4.0)
    assert doubled.item() == pytest.approx(kd_loss(student, teacher, 4.0).item())


def test_survives_logits_of_any_size_and_half_precision():
    student, teacher = logits()
    for dtype in torch.float16, torch.bfloat16:
        loss = kd_loss((100 * student).to(dtype), (100 * teacher).to(dtype), 1.0)
        assert loss.dtype == torch.float32 and loss.isfinite()
    assert kd_loss(torch.tensor([[0.0, 1e4]]), torch.tensor([[1e4, 0.0]]), 1.0).item() == pytest.approx(1e4)


def test_gradient_is_that_of_the_paper():
    """Section 2.1 of the paper: ∂/∂z = (q − p) / T of the loss without T², so T (q − p) / B of ours."""
    student, teacher = logits()
    student.requires_grad_()
    kd_loss(student, teacher, 4.0).backward()
    expected = 4.0 * ((student / 4).softmax(1) - (teacher / 4).softmax(1)) / len(student)
    assert torch.allclose(student.grad, expected, atol=1e-5)


def test_losses_are_weighted():
    student, teacher = MODELS["plaincnn2"]().eval(), MODELS["plaincnn4"]()
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    logits, losses = KD(student, teacher, ce_weight=2.0, kd_weight=3.0, temperature=2.0)(images, targets)
    assert losses["ce"].item() == pytest.approx(2 * torch.nn.functional.cross_entropy(logits, targets).item())
    assert losses["kd"].item() == pytest.approx(3 * kl_in_float64(logits.detach(), teacher(images), 2.0), rel=1e-3)


def test_defaults_are_the_protocol_of_the_field():
    distiller = KD(MODELS["plaincnn2"](), MODELS["plaincnn2"]())
    assert (distiller.ce_weight, distiller.kd_weight, distiller.temperature) == (0.1, 0.9, 4.0)


@pytest.mark.parametrize("arguments", [{"temperature": 0.0}, {"temperature": -1.0}, {"kd_weight": -1.0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        KD(MODELS["plaincnn2"](), MODELS["plaincnn2"](), **arguments)


def test_standardised_logits_do_not_depend_on_scale_or_shift():
    student, teacher = logits()
    z = standardize(student.half())
    assert z.dtype == torch.float32 and torch.allclose(z.mean(1), torch.zeros(5), atol=1e-6)
    assert torch.allclose(z.std(1), torch.ones(5), atol=1e-5)
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    torch.manual_seed(0)
    distiller = KD(MODELS["plaincnn2"](), MODELS["plaincnn4"](), logit_standardization=True, temperature=2.0).eval()
    pair = [standardize(network(images)) for network in (distiller.student, distiller.teacher)]
    expected = 0.9 * kl_in_float64(*(z.detach() for z in pair), 2.0)
    assert distiller(images, targets)[1]["kd"].item() == pytest.approx(expected, rel=1e-4)


def test_gradient_through_standardisation():
    """∂/∂z is that of the paper; from there to the logits by hand, past their mean and their deviation."""
    torch.manual_seed(0)
    distiller = KD(MODELS["plaincnn2"](), MODELS["plaincnn4"](), logit_standardization=True, temperature=2.0).eval()
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    own, losses = distiller(images, targets)
    (grad,) = torch.autograd.grad(losses["kd"], own)
    z, prior = (standardize(x.detach()).double() for x in (own, distiller.teacher(images)))
    of_z = 0.9 * 2.0 * ((z / 2).softmax(1) - (prior / 2).softmax(1)) / 4
    of_own = of_z - of_z.mean(1, keepdim=True) - z * (of_z * z).sum(1, keepdim=True) / 99  # K − 1
    torch.testing.assert_close(grad.double(), of_own / own.double().std(1, keepdim=True), rtol=1e-3, atol=1e-6)
