"""RKD: Park et al., "Relational Knowledge Distillation", CVPR 2019."""

import torch
import torch.nn.functional as F
from torch import nn


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
    """ce_weight · CE + distance_weight · Huber(distances) + angle_weight · Huber(angles) on the pooled features.

    label_smoothing: of CE.
    student, teacher: network(images, return_features=True) -> (logits, {"pooled": (B, C)}).
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce", "distance", "angle": scalars}), weighted.
    Raises ValueError for a negative weight, a label_smoothing outside 0 to 1.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, distance_weight: float = 25.0,
                 angle_weight: float = 50.0, label_smoothing: float = 0.0):
        super().__init__()
        if min(ce_weight, distance_weight, angle_weight) < 0:
            raise ValueError(f"ce_weight, distance_weight, angle_weight: {ce_weight}, {distance_weight}, "
                             f"{angle_weight}: one is negative")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.distance_weight, self.angle_weight = ce_weight, distance_weight, angle_weight

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
        pooled, teacher_pooled = features["pooled"], teacher_features["pooled"]
        return logits, {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "distance": self.distance_weight * F.smooth_l1_loss(distances(pooled), distances(teacher_pooled)),
            "angle": self.angle_weight * F.smooth_l1_loss(angles(pooled), angles(teacher_pooled)),
        }
