import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

from distillers.vid import VID, VIDStage
from models import MODELS


def test_against_the_density_of_a_gaussian():
    torch.manual_seed(0)
    stage = VIDStage(3, 5, init_variance=2.0)
    torch.nn.init.normal_(stage.alpha, mean=2.0)  # so that the two terms do not cancel
    s, t = torch.randn(4, 3, 4, 4), torch.randn(4, 5, 4, 4)
    variance = (1 + stage.alpha.exp()).log() + 1e-5
    density = Normal(stage.mean(s), variance.sqrt().view(1, 5, 1, 1)).log_prob(t)
    expected = -(density + 0.5 * math.log(2 * math.pi)).mean()  # without the constant
    assert stage(s, t).item() == pytest.approx(expected.item(), rel=1e-5)
    large = torch.randn(4, 5, 8, 8)
    pooled = large.view(4, 5, 4, 2, 4, 2).mean((3, 5))
    assert stage(s, large).item() == pytest.approx(stage(s, pooled).item(), rel=1e-5)


def test_the_regressor_is_three_convolutions_without_bias():
    torch.manual_seed(0)
    stage, s = VIDStage(3, 5), torch.randn(4, 3, 4, 4)
    a, b, c = stage.mean.parameters()
    assert (a.shape, b.shape, c.shape) == ((5, 3, 1, 1), (5, 5, 1, 1), (5, 5, 1, 1))
    torch.testing.assert_close(stage.mean(s), F.conv2d(F.conv2d(F.conv2d(s, a).relu(), b).relu(), c))


def test_the_variance_starts_where_it_is_asked_to_and_is_trained():
    for variance in 5.0, 0.01, 1000.0:  # exp(1000) overflows
        stage = VIDStage(3, 5, init_variance=variance)
        assert torch.allclose(F.softplus(stage.alpha) + 1e-5, torch.full((5,), variance), rtol=1e-4)
    for stage in VID(MODELS["resnet8"](), MODELS["resnet14"](), init_variance=2.0).stages:
        assert torch.allclose(F.softplus(stage.alpha) + 1e-5, torch.tensor(2.0))
    distiller = VID(MODELS["resnet8"](), MODELS["resnet14"]())
    assert len(distiller.stages) == 3
    before = [stage.alpha.detach().clone() for stage in distiller.stages]
    optimizer = torch.optim.SGD(distiller.parameters(), 0.1)
    sum(distiller(torch.randn(4, 3, 32, 32), torch.arange(4))[1].values()).backward()
    optimizer.step()
    assert all(not torch.equal(a, stage.alpha) for a, stage in zip(before, distiller.stages))
    assert {f"stages.{i}.alpha" for i in range(3)} <= set(distiller.state_dict())


def test_sum_over_the_stages():
    torch.manual_seed(0)
    distiller = VID(MODELS["resnet8"](), MODELS["resnet8x4"](), vid_weight=3.0).eval()
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    s, t = (network(images, return_features=True)[1]["maps"] for network in (distiller.student, distiller.teacher))
    expected = 3 * sum(stage(s[-1 - i], t[-1 - i]) for i, stage in enumerate(distiller.stages))
    assert distiller(images, targets)[1]["vid"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("arguments", [{"init_variance": 0.0}, {"vid_weight": -1.0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        VID(MODELS["plaincnn2"](), MODELS["plaincnn2"](), **arguments)
