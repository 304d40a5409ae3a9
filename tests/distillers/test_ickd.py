import numpy as np
import pytest
import torch
from torch import nn

from distillers.ickd import ICKD, channel_correlation, icc_loss, kd_loss
from models import MODELS


def icc_in_float64(student, teacher):
    """The loss from the paper's words, an image and a row at a time."""
    total, (B, C) = 0.0, student.shape[:2]
    for s, t in zip(student.double().numpy(), teacher.double().numpy()):
        rows = []
        for x in s, t:
            gram = np.array([[np.sum(x[i] * x[j]) for j in range(C)] for i in range(C)])
            rows.append(np.array([row / np.linalg.norm(row) for row in gram]))
        total += np.sum((rows[0] - rows[1]) ** 2) / C
    return total / B


def maps(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, 4, 4, generator=generator), torch.randn(3, 5, 4, 4, generator=generator)


def test_icc_loss_is_the_papers():
    student, teacher = maps()
    assert icc_loss(student, teacher).item() == pytest.approx(icc_in_float64(student, teacher), rel=1e-5)
    larger = torch.randn(3, 5, 8, 8)  # the sizes need not agree
    assert icc_loss(student, larger).item() == pytest.approx(icc_in_float64(student, larger), rel=1e-5)


def test_what_it_does_not_see_and_its_zero():
    student, teacher = maps()
    loss = icc_loss(student, teacher).item()
    assert icc_loss(student, student).item() == 0
    assert icc_loss(1e-2 * student, 1e3 * teacher).item() == pytest.approx(loss, rel=1e-4)  # scale
    shuffled = student.flatten(2)[:, :, torch.randperm(16)].view_as(student)
    assert icc_loss(shuffled, teacher).item() == pytest.approx(loss, rel=1e-4)  # where a feature is
    doubled = icc_loss(student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1))
    assert doubled.item() == pytest.approx(loss, rel=1e-5)  # how many images there are


def test_rows_have_length_one_also_in_half_precision():
    big = 500 * torch.rand(2, 64, 8, 8).half()  # its Gram matrix is beyond float16
    with torch.autocast("cpu", torch.bfloat16):
        correlation = channel_correlation(big)
    assert correlation.dtype == torch.float32
    assert torch.allclose(correlation.norm(dim=2), torch.ones(2, 64), atol=1e-4)
    assert torch.allclose(correlation, channel_correlation(big.float()), atol=1e-6)


def test_zero_maps_and_dead_channels_give_no_nan():
    student, teacher = maps()
    student[0] = 0
    student[1, 2] = 0
    student.requires_grad_()
    loss = icc_loss(student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_channels_are_checked():
    with pytest.raises(ValueError, match=r"\(3, 4, 4, 4\).*\(3, 5, 4, 4\)"):
        icc_loss(torch.randn(3, 4, 4, 4), torch.randn(3, 5, 4, 4))


def test_only_the_last_map_and_only_the_students_is_projected():
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    distiller = ICKD(MODELS["plaincnn2"](), MODELS["wrn_16_2"](), icc_weight=3.0, kd_weight=0.0).eval()
    assert isinstance(distiller.projector[0], nn.Conv2d) and distiller.projector[0].bias is None
    assert distiller.projector[0].weight.shape == (128, 64, 1, 1) and isinstance(distiller.projector[1], nn.BatchNorm2d)
    _, losses = distiller(images, targets)
    student = distiller.projector(distiller.student(images, return_features=True)[1]["maps"][-1]).detach()
    teacher = distiller.teacher(images, return_features=True)[1]["maps"][-1]
    assert losses["icc"].item() == pytest.approx(3 * icc_in_float64(student, teacher), rel=1e-3)
    assert losses["kd"].item() == 0  # without KL
    wide = ICKD(MODELS["plaincnn2"](), MODELS["plaincnn2"](), projector_kernel=3)
    assert wide.projector[0].weight.shape == (64, 64, 3, 3) and set(wide(images, targets)[1]) == {"ce", "kd", "icc"}


def kl_in_float64(student, teacher, T):
    """From the teacher to the student, times T²."""
    q, p = ((z.double() / T).softmax(1) for z in (student, teacher))
    return T**2 * (p * (p / q).log()).sum(1).mean().item()


def test_its_copy_of_kd():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(5, 7, generator=generator) for _ in range(2))
    assert kd_loss(student, teacher, 4.0).item() == pytest.approx(kl_in_float64(student, teacher, 4.0), rel=1e-5)
    torch.manual_seed(0)
    distiller = ICKD(MODELS["plaincnn2"](), MODELS["plaincnn4"](), kd_weight=3.0, temperature=2.0).eval()
    with torch.no_grad():
        distiller.teacher.fc.weight *= 20  # a teacher that is sure, for which the two directions differ
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    logits, losses = distiller(images, targets)
    expected = 3 * kl_in_float64(logits, distiller.teacher(images), 2.0)
    assert losses["kd"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("arguments", [{"temperature": 0.0}, {"projector_kernel": 2}, {"icc_weight": -1.0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ICKD(MODELS["plaincnn2"](), MODELS["plaincnn2"](), **arguments)
