"""RKD: Park et al., "Relational Knowledge Distillation", CVPR 2019."""

import torch
import torch.nn.functional as F
from torch import nn


def kd_loss(student_logits, teacher_logits, temperature):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch; logits (B, K), in float32."""
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def distances(feature, eps=1e-12):
    """Euclidean distances of the images of a batch, divided by the mean of the positive ones (section 3.2.1).

    (B, C) -> (B, B), in float32, zero on the diagonal; 1 elsewhere where no two images differ.
    """
    with torch.autocast(feature.device.type, enabled=False):
        x = feature.float()
        square = x.square().sum(1)
        d = (square[:, None] + square - 2 * x @ x.T).clamp(min=eps).sqrt()  # the clamp keeps the root's gradient finite
        d = d * (1 - torch.eye(len(x), device=x.device))
        return d / (d.sum() / (d > 0).sum().clamp(min=1)).clamp(min=eps)


def angles(feature):
    """Cosine of the angle at image i between images j and k (section 3.2.2): (B, C) -> (B, B, B), in float32."""
    with torch.autocast(feature.device.type, enabled=False):
        x = feature.float()
        edges = F.normalize(x[None] - x[:, None], dim=2)  # (B, B, C)
        return edges @ edges.transpose(1, 2)


class RKD(nn.Module):
    """ce_weight · CE + distance_weight · Huber(distances) + angle_weight · Huber(angles), of the pooled features
    [+ kd_weight · KL].

    kd_weight, temperature: of KD's term beside it, the field's "+ KD"; 0: without.
    label_smoothing: of CE.
    student, teacher: network(images, return_features=True) -> (logits, {"pooled": (B, C)}).
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce", "distance", "angle": scalars}), weighted; and
    "kd", if it has a weight.
    Raises ValueError for a negative weight, a temperature that is not positive, a label_smoothing outside 0 to 1.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, distance_weight: float = 25.0,
                 angle_weight: float = 50.0, kd_weight: float = 0.0, temperature: float = 4.0,
                 label_smoothing: float = 0.0):
        super().__init__()
        if min(ce_weight, distance_weight, angle_weight, kd_weight) < 0:
            raise ValueError("ce_weight, distance_weight, angle_weight, kd_weight: "
                             f"{ce_weight}, {distance_weight}, {angle_weight}, {kd_weight}: one is negative")
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.distance_weight, self.angle_weight = ce_weight, distance_weight, angle_weight
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
        pooled, teacher_pooled = features["pooled"], teacher_features["pooled"]
        losses = {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "distance": self.distance_weight * F.smooth_l1_loss(distances(pooled), distances(teacher_pooled)),
            "angle": self.angle_weight * F.smooth_l1_loss(angles(pooled), angles(teacher_pooled)),
        }
        if self.kd_weight:
            losses["kd"] = self.kd_weight * kd_loss(logits, teacher_logits, self.temperature)
        return logits, losses
