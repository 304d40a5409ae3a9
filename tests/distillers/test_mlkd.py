import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distillers.mlkd import MLKD, batch_loss, class_loss, share_below_median
from models import MODELS


def test_against_the_definitions():
    torch.manual_seed(0)
    s, t = torch.randn(6, 9).softmax(1), torch.randn(6, 9).softmax(1)
    a, b = s.double().numpy(), t.double().numpy()
    of_batch = sum((a[i] @ a[j] - b[i] @ b[j]) ** 2 for i in range(6) for j in range(6)) / 6
    of_classes = sum((a[:, i] @ a[:, j] - b[:, i] @ b[:, j]) ** 2 for i in range(9) for j in range(9)) / 9
    assert batch_loss(s, t).item() == pytest.approx(of_batch, rel=1e-4)
    assert class_loss(s, t).item() == pytest.approx(of_classes, rel=1e-4)
    assert batch_loss(s, s).item() == class_loss(s, s).item() == 0


def test_the_share_is_that_of_numpys_median():
    for values in torch.rand(64), torch.rand(9), torch.ones(5), torch.tensor([0.1, 0.2, 0.2, 0.2, 0.9, 1.0]):
        assert share_below_median(values).item() == pytest.approx((values.numpy() <= np.median(values)).mean())


def test_sum_over_temperatures_and_both_parts():
    """The loss of the authors' code with both views the same."""
    torch.manual_seed(0)
    temperatures = [2.0, 4.0]
    distiller = MLKD(MODELS["resnet8"](), MODELS["resnet14"](), kd_weight=0.5, temperatures=temperatures).eval()
    with torch.no_grad():  # logits that are far apart
        distiller.student.fc.weight *= 10
        distiller.teacher.fc.weight *= 20
    images, targets = torch.randn(7, 3, 32, 32), torch.arange(7)
    with torch.autocast("cpu", torch.bfloat16):  # that of the networks: the losses are in float32
        losses = distiller(images, targets)[1]
        student, teacher = (network(images).double() for network in (distiller.student, distiller.teacher))
    sure = teacher.softmax(1)
    share = (sure.amax(1) <= sure.amax(1).median()).double().mean()  # 4 of 7
    of_classes = (sure.sum(0) <= sure.sum(0).quantile(0.5)).double().mean()
    kd = batch = classes = 0.0
    for T in temperatures:
        s, t = (student / T).softmax(1), (teacher / T).softmax(1)
        kd += (1 + share) * T**2 * (t * (t / s).log()).sum(1).mean()
        batch += share * batch_loss(s, t)
        classes += of_classes * class_loss(s, t)
    assert of_classes == 0.5  # 50 of 100: another share than that of the images
    for name, expected in ("kd", kd), ("batch", batch), ("class", classes):
        assert losses[name].item() == pytest.approx(0.5 * expected.item(), rel=1e-4)
    assert losses["ce"].item() == pytest.approx(0.2 * F.cross_entropy(student, targets).item(), rel=1e-4)


@pytest.mark.parametrize("arguments", [{"temperatures": []}, {"temperatures": [0.0]}, {"kd_weight": -1.0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        MLKD(MODELS["plaincnn2"](), MODELS["plaincnn2"](), **arguments)
