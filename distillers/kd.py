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


def standardize(logits):
    """Each row with mean 0 and standard deviation 1: (B, K) -> (B, K), in float32.

    Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024.
    """
    logits = logits.float()
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


class KD(nn.Module):
    """ce_weight · CE + kd_weight · KL; the defaults are the protocol of RepDistiller and mdistiller.

    logit_standardization: standardize both logits of KL first; its authors' weights are then 0.1 and 9, and T = 2.
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce": scalar, "kd": scalar}), weighted.
    label_smoothing: of CE alone.
    Raises ValueError for a temperature that is not positive, a negative weight, a label_smoothing outside 0 to 1.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 0.1, kd_weight: float = 0.9, temperature: float = 4.0,
                 logit_standardization: bool = False, label_smoothing: float = 0.0):
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
        self.logit_standardization = logit_standardization

    def _apply(self, *args, **kwargs):  # .to(), .cuda() and the like take the teacher along
        self.teacher._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def train(self, mode=True):  # not the teacher, whatever deepcopy or somebody else has made of it
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images, targets):
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        logits = self.student(images)
        pair = logits, teacher_logits
        if self.logit_standardization:
            pair = [standardize(z) for z in pair]
        return logits, {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "kd": self.kd_weight * kd_loss(*pair, self.temperature),
        }
