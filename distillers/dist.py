"""DIST: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022."""

import torch
import torch.nn.functional as F
from torch import nn


def pearson_distance(x, y, eps=1e-8):
    """1 − Pearson's correlation of the rows, mean over them: (N, M) and (N, M) -> scalar, in float32."""
    x, y = x.float(), y.float()
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return 1 - ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + eps)).mean()


def dist_losses(student_logits, teacher_logits, temperature):
    """(inter, intra): distance of each image's probabilities over the classes, and of each class's over the batch
    (section 4), each times T²: logits (B, K) twice -> two scalars."""
    s, t = ((z.float() / temperature).softmax(1) for z in (student_logits, teacher_logits))
    return pearson_distance(s, t) * temperature**2, pearson_distance(s.T, t.T) * temperature**2


class DIST(nn.Module):
    """ce_weight · CE + inter_weight · inter + intra_weight · intra (T = 4 on CIFAR, 1 on ImageNet).

    label_smoothing: of CE.
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce", "inter", "intra": scalars}), weighted.
    Raises ValueError for a temperature that is not positive, a negative weight, a label_smoothing outside 0 to 1.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, inter_weight: float = 2.0,
                 intra_weight: float = 2.0, temperature: float = 4.0, label_smoothing: float = 0.0):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if min(ce_weight, inter_weight, intra_weight) < 0:
            raise ValueError(f"ce_weight, inter_weight, intra_weight: {ce_weight}, {inter_weight}, {intra_weight}: "
                             "one is negative")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.inter_weight, self.intra_weight = ce_weight, inter_weight, intra_weight
        self.temperature = temperature

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
        inter, intra = dist_losses(logits, teacher_logits, self.temperature)
        return logits, {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "inter": self.inter_weight * inter,
            "intra": self.intra_weight * intra,
        }
