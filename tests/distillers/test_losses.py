"""What holds for the losses of several distillers, in one table."""

import pytest
import torch
import torch.nn.functional as F

from distillers.at import at_loss
from distillers.cc import cc_loss
from distillers.dist import dist_losses
from distillers.dkd import dkd_losses
from distillers.nst import nst_loss
from distillers.ofd import partial_l2
from distillers.pkt import pkt_loss
from distillers.reviewkd import hcl_loss
from distillers.rkd import angles, distances
from distillers.sp import sp_loss
from distillers.vid import VIDStage

CLASSES = torch.tensor([0, 6, 3, 3, 1, 2])


def dkd_loss(s, t):
    return sum(dkd_losses(s, t, CLASSES.repeat(len(s) // 6), 4.0))


def ofd_loss(s, t):
    return partial_l2(s, t, torch.tensor([-1.0, -0.5, -2.0]))


def rkd_loss(s, t):
    return F.smooth_l1_loss(distances(s), distances(t)) + F.smooth_l1_loss(angles(s), angles(t))


def vid_loss(s, t):
    stage = VIDStage(3, 3)
    stage.mean = torch.nn.Identity()  # the regressor is in the precision of autocast, and meant to be
    return stage(s, t)


MAP, LARGER, OTHER, LOGITS = (6, 3, 4, 4), (6, 5, 8, 8), (6, 9), (6, 7)
UNCHANGED_BY_REPETITION = {  # name: loss, shapes of the student's and of the teacher's
    "at": (at_loss, MAP, LARGER),
    "nst": (nst_loss, MAP, LARGER),
    "vid": (vid_loss, MAP, MAP),
    "ofd": (ofd_loss, MAP, MAP),
    "reviewkd": (hcl_loss, MAP, MAP),
    "dkd": (dkd_loss, LOGITS, LOGITS),
    "dist": (lambda s, t: sum(dist_losses(s, t, 30.0)), LOGITS, LOGITS),  # sure, but not of everything
}
CHANGED_BY_REPETITION = {
    "sp": (sp_loss, MAP, LARGER),
    "pkt": (pkt_loss, LOGITS, OTHER),
    "rkd": (rkd_loss, LOGITS, OTHER),
    "cc": (cc_loss, LOGITS, LOGITS),
}
LOSSES = UNCHANGED_BY_REPETITION | CHANGED_BY_REPETITION


def draw(name, scale=1.0):
    loss, *shapes = LOSSES[name]
    generator = torch.Generator().manual_seed(0)
    return loss, *(scale * torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_image_among_others_has_a_finite_gradient(name):
    for empty in "student", "both":
        loss, s, t = draw(name)
        s[2] = 0
        if empty == "both":
            t[2] = 0
        value = loss(s.requires_grad_(), t)
        value.backward()
        assert value.isfinite() and s.grad.isfinite().all() and s.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_the_loss(name):
    """A detach too many leaves the value as it is."""
    loss, s, t = draw(name)
    v = torch.randn(s.shape, generator=torch.Generator().manual_seed(1))
    [gradient] = torch.autograd.grad(loss(s.requires_grad_(), t), s)
    slope = (loss(s + 3e-3 * v, t) - loss(s - 3e-3 * v, t)) / 6e-3
    assert slope.item() == pytest.approx((gradient * v).sum().item(), rel=1e-2)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computed_in_float32_under_autocast(name, dtype):
    """Features of size 500, whose squares, and more so their Gram matrices, are beyond float16's 65504."""
    loss, *pair = draw(name, scale=500.0)
    pair = [x.to(dtype) for x in pair]
    expected = loss(*(x.float() for x in pair))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*pair)
    assert value.dtype == torch.float32 and expected > 0
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)  # bfloat16 alone is 4e-3 off


@pytest.mark.parametrize("name", UNCHANGED_BY_REPETITION)
def test_a_mean_over_the_images(name):
    loss, s, t = draw(name)
    twice = loss(*(x.repeat(2, *[1] * (x.dim() - 1)) for x in (s, t)))
    assert twice.item() == pytest.approx(loss(s, t).item(), rel=1e-5)
