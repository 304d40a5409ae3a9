import pytest
import torch

from distillers.reviewkd import ABF, ReviewKD, hcl_loss
from models import MODELS


def window_means(x, side):
    B, C, H, W = x.shape
    return x.reshape(B, C, side, H // side, side, W // side).mean((3, 5))


def test_hcl_against_the_definition():
    torch.manual_seed(0)
    for size, sides in (8, (4, 2, 1)), (4, (2, 1)), (2, (1,)), (1, ()):
        s, t = torch.randn(3, 5, size, size), torch.randn(3, 5, size, size)
        terms = [(s - t).square().mean()] + [(window_means(s, n) - window_means(t, n)).square().mean() for n in sides]
        weights = [0.5**i for i in range(len(terms))]
        expected = sum(w * term for w, term in zip(weights, terms)) / sum(weights)
        assert hcl_loss(s, t).item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"\(3, 1, 1, 1\)"):
        hcl_loss(s[:, :1], t)
    assert hcl_loss(300 * s.half(), t.half()).isfinite()


def test_a_convolution_and_a_batchnorm_on_the_way_in_and_out():
    """No ReLU: the teacher's maps before the ReLU have negative values."""
    fusion = ABF(64, 32, 48, fuse=True)
    for layers, shape in (fusion.reduce, (32, 64, 1, 1)), (fusion.expand, (48, 32, 3, 3)):
        assert [type(layer) for layer in layers] == [torch.nn.Conv2d, torch.nn.BatchNorm2d]
        assert layers[0].weight.shape == shape and layers[0].bias is None
        bound = (3 / layers[0].weight[0].numel()) ** 0.5  # Kaiming's for a slope of 1; Conv2d's own is 1/√3 of it
        assert 0.9 * bound < layers[0].weight.abs().max() <= bound


def test_fusion_step_by_step():
    torch.manual_seed(0)
    fusion = ABF(3, 6, 5, fuse=True).eval()
    x, deeper = torch.randn(2, 3, 4, 4), torch.randn(2, 6, 2, 2)
    own = fusion.reduce(x)
    up = deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
    a = torch.sigmoid(torch.einsum("oc,bchw->bohw", fusion.attention[0].weight[:, :, 0, 0], torch.cat([own, up], 1))
                      + fusion.attention[0].bias.view(1, 2, 1, 1))
    fused = (own * a[:, :1] + up * a[:, 1:]).repeat_interleave(2, 2).repeat_interleave(2, 3)
    out, goes_on = fusion(x, deeper, torch.Size((8, 8)))
    torch.testing.assert_close(goes_on, fused)
    torch.testing.assert_close(out, fusion.expand(fused))


@pytest.mark.parametrize("kind, teachers_kind", [("maps", "preacts"), ("preacts", "preacts"), ("preacts", "maps")])
def test_from_the_deepest_level_to_the_shallowest(kind, teachers_kind):
    torch.manual_seed(0)
    distiller = ReviewKD(MODELS["resnet8"](), MODELS["resnet8x4"](), review_weight=2.0, warmup_epochs=20,
                         student_preacts=kind == "preacts", teacher_preacts=teachers_kind == "preacts").eval()
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    s, t = (network(images, return_features=True)[1] for network in (distiller.student, distiller.teacher))
    students = [*s[kind][1:], s["pooled"].view(4, 64, 1, 1)]
    teachers = [*t[teachers_kind][1:], t["pooled"].view(4, 256, 1, 1)]
    assert len(distiller.fusions) == 4 and distiller.fusions[3].attention is None
    deeper, total = None, 0
    for i in 3, 2, 1, 0:
        out, deeper = distiller.fusions[i](students[i], deeper, teachers[i].shape[2:])
        total = total + hcl_loss(out, teachers[i])
    for epoch, share in (None, 1.0), (0, 0.0), (5, 0.25), (20, 1.0), (100, 1.0):
        if epoch is not None:
            distiller.set_epoch(epoch)
        review = distiller(images, targets)[1]["review"].item()
        assert review == pytest.approx(share * 2 * total.item(), rel=1e-5)


def test_networks_of_different_depth_meet_at_the_deepest_level():
    distiller = ReviewKD(MODELS["vgg8"](), MODELS["resnet8x4"]())
    assert distiller.depth == 4 and distiller.fusions[3].expand[0].out_channels == 256


@pytest.mark.parametrize("student, arguments, width", [
    ("resnet8", {}, 64), ("mobilenetv2", {}, 512), ("mobilenetv2", {"mid_channels": 24}, 24)])
def test_the_width_between_the_levels_is_that_of_the_deepest_and_at_most_512(student, arguments, width):
    distiller = ReviewKD(MODELS[student](), MODELS["resnet8x4"](), **arguments)
    assert {fusion.reduce[0].out_channels for fusion in distiller.fusions} == {width}
    assert distiller.fusions[-1].reduce[0].in_channels == {"resnet8": 64, "mobilenetv2": 1280}[student]


@pytest.mark.parametrize("arguments", [{"review_weight": -1.0}, {"warmup_epochs": -1}, {"mid_channels": 0}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ReviewKD(MODELS["plaincnn2"](), MODELS["plaincnn2"](), **arguments)
