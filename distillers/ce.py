"""Cross-entropy alone: the student without a teacher, by the same path as every distiller."""

import torch.nn.functional as F
from torch import nn


class CE(nn.Module):
    """Train `student` on the labels; a teacher is neither needed nor used.

    label_smoothing: the share of the target that is spread over all classes (Szegedy et al., CVPR 2016).
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce": scalar}).
    Raises ValueError for a label_smoothing outside 0 to 1.
    """

    def __init__(self, student, teacher=None, *, label_smoothing: float = 0.0):
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing

    def forward(self, images, targets):
        logits = self.student(images)
        return logits, {"ce": F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)}
