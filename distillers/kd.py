"""Knowledge distillation: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015."""

import torch
import torch.nn.functional as F
from torch import nn


def kd_loss(student_logits, teacher_logits, temperature):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch (section 2 of the paper).

    Both logits are (B, K); computed in float32. T² keeps the size of the gradient independent of T.
    """
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


class KD(nn.Module):
    """ce_weight · CE + kd_weight · KL; the defaults are the protocol of RepDistiller and mdistiller.

    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce": scalar, "kd": scalar}), weighted.
    label_smoothing: of CE alone.
    Raises ValueError for a temperature that is not positive, a negative weight, a label_smoothing outside 0 to 1.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 0.1, kd_weight: float = 0.9, temperature: float = 4.0,
                 label_smoothing: float = 0.0):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if min(ce_weight, kd_weight) < 0:
            raise ValueError(f"ce_weight, kd_weight: {ce_weight}, {kd_weight}: one is negative")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.kd_weight, self.temperature = ce_weight, kd_weight, temperature

    def _apply(self, *args, **kwargs):  # .to(), .cuda() and the like take the teacher along
        self.teacher._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def forward(self, images, targets):
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        logits = self.student(images)
        return logits, {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "kd": self.kd_weight * kd_loss(logits, teacher_logits, self.temperature),
        }
