"""Cross-entropy alone: the student without a teacher, by the same path as every distiller."""

import torch.nn.functional as F
from torch import nn


class CE(nn.Module):
    """Train `student` on the labels; a teacher is neither needed nor used.

    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce": scalar}).
    """

    def __init__(self, student, teacher=None):
        super().__init__()
        self.student = student

    def forward(self, images, targets):
        logits = self.student(images)
        return logits, {"ce": F.cross_entropy(logits.float(), targets)}
