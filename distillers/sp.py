"""SP: Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019."""

import torch
import torch.nn.functional as F
from torch import nn


def similarity(feature_map):
    """How alike the images of a batch are (section 3): (B, …) -> (B, B), each row of length 1.

    In float32, since the Gram matrix overflows in half precision. The row of an empty map stays zero.
    """
    with torch.autocast(feature_map.device.type, enabled=False):
        x = feature_map.float().flatten(1)  # (B, CHW)
        return F.normalize(x @ x.T)


def sp_loss(student_map, teacher_map):
    """‖G_student − G_teacher‖² / B²: (B, …) and (B, …) of any shapes -> scalar."""
    return (similarity(student_map) - similarity(teacher_map)).square().mean()


class SP(nn.Module):
    """ce_weight · CE + sp_weight · SP on the last map.

    label_smoothing: of CE.
    student, teacher: network(images, return_features=True) -> (logits, {"maps": [(B, C, H, W), …]}), the stem's first.
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce": scalar, "sp": scalar}), weighted.
    Raises ValueError for a negative weight, a label_smoothing outside 0 to 1.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, sp_weight: float = 3000.0,
                 label_smoothing: float = 0.0):
        super().__init__()
        if min(ce_weight, sp_weight) < 0:
            raise ValueError(f"ce_weight, sp_weight: {ce_weight}, {sp_weight}: one is negative")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.sp_weight = ce_weight, sp_weight

    def _apply(self, *args, **kwargs):  # .to(), .cuda() and the like take the teacher along
        self.teacher._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def train(self, mode=True):  # not the teacher, whatever deepcopy or somebody else has made of it
        self.teacher.eval()
        return super().train(mode)

    def forward(self, images, targets):
        with torch.no_grad():
            _, teacher_features = self.teacher(images, return_features=True)
        logits, features = self.student(images, return_features=True)
        return logits, {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "sp": self.sp_weight * sp_loss(features["maps"][-1], teacher_features["maps"][-1]),
        }
