import numpy as np
import pytest
import torch
from torch import nn

from distillers.fitnet import FitNet, hint_loss, map_shapes, regressor
from models import MODELS


def test_hint_loss_is_the_mean_square_in_float32():
    a, b = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    expected = ((a.double().numpy() - b.double().numpy()) ** 2).mean()
    assert hint_loss(a, b).item() == pytest.approx(expected, rel=1e-5)
    assert hint_loss(a, a).item() == 0
    assert hint_loss(1000 * a.half(), -1000 * a.half()).item() == pytest.approx(
        4e6 * (a.half().float() ** 2).mean().item(), rel=1e-2)  # beyond float16's 65504
    assert hint_loss(a.repeat(2, 1, 1, 1), b.repeat(2, 1, 1, 1)).item() == pytest.approx(expected, rel=1e-5)


def test_hint_loss_refuses_what_would_broadcast():
    with pytest.raises(ValueError, match=r"\(3, 1, 5, 5\).*\(3, 4, 5, 5\)"):
        hint_loss(torch.randn(3, 1, 5, 5), torch.randn(3, 4, 5, 5))


@pytest.mark.parametrize("student, teacher, kernel", [
    ((16, 8, 8), (32, 8, 8), (1, 1)), ((16, 16, 16), (32, 8, 8), (3, 3)), ((16, 4, 4), (32, 8, 8), (4, 4)),
    ((16, 10, 10), (32, 8, 8), (3, 3)),
])
def test_regressor_reaches_the_teachers_shape(student, teacher, kernel):
    module = regressor(student, teacher)
    assert module[0].kernel_size == kernel and module[0].bias is not None  # as RepDistiller's
    assert len(module) == 3 and isinstance(module[1], nn.BatchNorm2d) and isinstance(module[2], nn.ReLU)
    assert module(torch.randn(2, *student)).shape == (2, *teacher)


def test_regressor_says_where_it_cannot():
    with pytest.raises(ValueError, match=r"\(16, 3, 3\).*\(32, 8, 8\)"):
        regressor((16, 3, 3), (32, 8, 8))


def test_map_shapes_moves_nothing():
    model = MODELS["resnet8"]()
    model.layer1.eval()  # a part that the caller froze on purpose
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert map_shapes(model, 32) == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_hint_is_that_of_the_stages_named():
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    networks = MODELS["resnet8"](), MODELS["wrn_16_1"]()
    distiller = FitNet(*networks, hint_weight=7.0, student_stage=3, teacher_stage=2).eval()
    _, losses = distiller(images, targets)
    student = distiller.student(images, return_features=True)[1]["maps"][3]  # 64, 8×8: up to 32, 16×16
    teacher = distiller.teacher(images, return_features=True)[1]["maps"][2]
    regressed = distiller.regressor(student).detach().double().numpy()
    expected = 7 * np.square(regressed - teacher.double().numpy()).mean()
    assert losses["hint"].item() == pytest.approx(expected, rel=1e-4)


def test_a_stage_that_a_network_lacks():
    for name in "student_stage", "teacher_stage":
        with pytest.raises(ValueError, match=f"{name}.*no map 7; valid: 0 of 16×32×32, .*, 3 of 64×8×8"):
            FitNet(MODELS["resnet8"](), MODELS["resnet8"](), **{name: 7})


def test_defaults_are_the_protocol_of_the_field():
    distiller = FitNet(MODELS["resnet8"](), MODELS["resnet8"]())
    assert (distiller.ce_weight, distiller.hint_weight) == (1.0, 100.0)
    assert distiller.regressor[0].in_channels == 32  # the 16×16 stage
