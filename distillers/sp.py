"""SP: Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019."""

import torch
import torch.nn.functional as F
from torch import nn


def kd_loss(student_logits, teacher_logits, temperature):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch; logits (B, K), in float32."""
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def similarity(feature_map):
    """How alike the images of a batch are (section 3): (B, …) -> (B, B), each row of length 1.

    In float32, since the Gram matrix overflows in half precision. The row of an empty map stays zero.
    """
    with torch.autocast(feature_map.device.type, enabled=False):
        x = feature_map.float().flatten(1)  # (B, CHW)
        return F.normalize(x @ x.T)


def sp_loss(student_map, teacher_map):
    """‖G_student − G_teacher‖² / B²: (B, …) and (B, …) of any shapes -> scalar.

    It falls about as 1 / B, B being the images of one process: the weight of 3000 belongs to 64.
    """
    return (similarity(student_map) - similarity(teacher_map)).square().mean()


class SP(nn.Module):
    """ce_weight · CE + sp_weight · SP on the last map [+ kd_weight · KL].

    kd_weight, temperature: of KD's term beside it, the field's "+ KD"; 0: without.
    label_smoothing: of CE.
    student, teacher: network(images, return_features=True) -> (logits, {"maps": [(B, C, H, W), …]}), the stem's first.
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce": scalar, "sp": scalar}), weighted; and "kd",
    if it has a weight.
    Raises ValueError for a negative weight, a temperature that is not positive, a label_smoothing outside 0 to 1.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, sp_weight: float = 3000.0,
                 kd_weight: float = 0.0, temperature: float = 4.0, label_smoothing: float = 0.0):
        super().__init__()
        if min(ce_weight, sp_weight, kd_weight) < 0:
            raise ValueError(f"ce_weight, sp_weight, kd_weight: {ce_weight}, {sp_weight}, {kd_weight}: one is negative")
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.sp_weight = ce_weight, sp_weight
        self.kd_weight, self.temperature = kd_weight, temperature

    def _apply(self, *args, **kwargs):  # .to(), .cuda() and the like take the teacher along
        self.teacher._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def train(self, mode=True):  # not the teacher, whatever deepcopy or somebody else has made of it
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images, targets):
        with torch.no_grad():
            teacher_logits, teacher_features = self.teacher(images, return_features=True)
        logits, features = self.student(images, return_features=True)
        losses = {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "sp": self.sp_weight * sp_loss(features["maps"][-1], teacher_features["maps"][-1]),
        }
        if self.kd_weight:
            losses["kd"] = self.kd_weight * kd_loss(logits, teacher_logits, self.temperature)
        return logits, losses
