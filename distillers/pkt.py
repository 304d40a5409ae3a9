"""PKT: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018."""

import torch
import torch.nn.functional as F
from torch import nn


def kd_loss(student_logits, teacher_logits, temperature):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch; logits (B, K), in float32."""
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def neighbours(feature, eps=1e-7):
    """The probability that image j is a neighbour of image i, with the cosine kernel: (B, C) -> (B, B), in float32.

    The kernel is (cosine + 1) / 2, each row then divided by its sum. j = i takes part, as in the authors' code.
    """
    with torch.autocast(feature.device.type, enabled=False):
        x = feature.float()
        x = x / (x.norm(dim=1, keepdim=True) + eps)
        kernel = (x @ x.T + 1) / 2
        return kernel / kernel.sum(1, keepdim=True)


def pkt_loss(student, teacher, eps=1e-7):
    """KL(teacher's ‖ student's neighbours), (B, C) and (B, C') -> scalar.

    A mean over all B² pairs, where the paper has their sum: the weight of 30,000 belongs to the mean, which falls about
    as 1 / B, and to B = 64 images of one process.
    """
    p, q = neighbours(teacher), neighbours(student)
    return (p * ((p + eps) / (q + eps)).log()).mean()


class PKT(nn.Module):
    """ce_weight · CE + pkt_weight · PKT on the pooled features [+ kd_weight · KL].

    kd_weight, temperature: of KD's term beside it, the field's "+ KD"; 0: without.
    label_smoothing: of CE.
    student, teacher: network(images, return_features=True) -> (logits, {"pooled": (B, C)}).
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce": scalar, "pkt": scalar}), weighted; and "kd",
    if it has a weight.
    Raises ValueError for a negative weight, a temperature that is not positive, a label_smoothing outside 0 to 1.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, pkt_weight: float = 30000.0,
                 kd_weight: float = 0.0, temperature: float = 4.0, label_smoothing: float = 0.0):
        super().__init__()
        if min(ce_weight, pkt_weight, kd_weight) < 0:
            raise ValueError(f"ce_weight, pkt_weight, kd_weight: {ce_weight}, {pkt_weight}, {kd_weight}: "
                             "one is negative")
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.pkt_weight = ce_weight, pkt_weight
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
            "pkt": self.pkt_weight * pkt_loss(features["pooled"], teacher_features["pooled"]),
        }
        if self.kd_weight:
            losses["kd"] = self.kd_weight * kd_loss(logits, teacher_logits, self.temperature)
        return logits, losses
