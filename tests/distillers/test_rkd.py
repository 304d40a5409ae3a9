import itertools

import pytest
import torch
import torch.nn.functional as F

from distillers.rkd import RKD, angles, distances
from models import MODELS


def reference(x):
    """Distances over their mean, and cosines at i between j and k, a triplet at a time, in float64."""
    x, n = x.double(), len(x)
    d = torch.tensor([[(a - b).norm().item() for b in x] for a in x])
    cosines = torch.zeros(n, n, n)
    for i, j, k in itertools.product(range(n), repeat=3):
        if i not in (j, k):
            cosines[i, j, k] = F.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0)
    return d / d[d > 0].mean(), cosines


def test_against_the_definition():
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    for own, expected in zip((distances(x), angles(x)), reference(x)):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    turned = 5 * x @ torch.linalg.qr(torch.randn(4, 4))[0] + 3  # a similarity transform changes neither
    torch.testing.assert_close(distances(turned), distances(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(angles(turned), angles(x), rtol=1e-4, atol=1e-4)


def test_images_that_are_the_same_have_finite_gradients():
    x = torch.zeros(4, 3, requires_grad=True)
    (distances(x).sum() + angles(x).sum()).backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(distances(x), 1 - torch.eye(4))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    x[3] = x[1]  # two that are the same among others
    x.requires_grad_()
    assert distances(x)[1, 3] < 1e-2 and not angles(x)[1, 3].any()
    assert distances(x).sum().item() == pytest.approx(5 * 4)  # the two count in the mean, as in the authors' code
    torch.testing.assert_close(angles(x), reference(x.detach())[1].float(), rtol=1e-4, atol=1e-5)
    (distances(x).square().sum() + angles(x).sum()).backward()
    assert x.grad.isfinite().all() and x.grad.any()
    assert distances(200 * torch.randn(4, 512).half()).isfinite().all()  # the squares overflow half precision


def test_one_image_has_no_relations():
    x = torch.randn(1, 3, requires_grad=True)
    for relations in distances(x), angles(x):
        assert not relations.any() and relations.isfinite().all()
        relations.sum().backward()
        assert not x.grad.any()


def test_huber_on_the_pooled_features(network_of):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, dim, generator=generator) for dim in (2, 3))
    student[0] *= 5
    distiller = RKD(network_of(student.clone()), network_of(teacher.clone()), distance_weight=2.0, angle_weight=3.0)
    losses = distiller(torch.zeros(6, 3, 4, 4), torch.tensor([0, 1, 0, 1, 0, 1]))[1]
    for name, weight, a, b in zip(("distance", "angle"), (2, 3), reference(student), reference(teacher)):
        gap = (a - b).abs()
        assert (gap > 1).any() and ((gap > 0.1) & (gap < 1)).any()  # both parts of the loss
        huber = torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean().item()
        assert losses[name].item() == pytest.approx(weight * huber, rel=1e-4)
    with pytest.raises(ValueError, match="angle_weight"):
        RKD(MODELS["resnet8"](), MODELS["resnet14"](), angle_weight=-1.0)
