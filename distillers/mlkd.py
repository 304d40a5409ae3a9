"""MLKD: Jin, Wang and Lin, "Multi-Level Logit Distillation", CVPR 2023."""

import torch
import torch.nn.functional as F
from torch import nn


def kd_loss(student_logits, teacher_logits, temperature):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch; logits (B, K), in float32."""
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def batch_loss(student, teacher):
    """‖S Sᵀ − T Tᵀ‖² / B, how alike the images are: probabilities (B, K), in float32 -> scalar."""
    return (student @ student.T - teacher @ teacher.T).square().sum() / len(student)


def class_loss(student, teacher):
    """‖Sᵀ S − Tᵀ T‖² / K, how alike the classes are: probabilities (B, K), in float32 -> scalar."""
    return (student.T @ student - teacher.T @ teacher).square().sum() / student.shape[1]


def share_below_median(values):
    """The share of values (N,) that are not above their median: half of them, and more where several are equal."""
    return (values <= values.quantile(0.5)).float().mean()


class MLKD(nn.Module):
    """ce_weight · CE + kd_weight · Σ over the temperatures of (KL + batch + class).

    The authors' code means to leave out the half of the images, or classes, of which the teacher is most sure, but
    applies the mask after the mean, where it only scales the loss by about a half. The published figures were obtained
    in this way, so we do the same. They also had a second, strongly augmented view of each image with CE and an
    unmasked KL of its own, and up to 480 epochs at other learning rates; here the one view that every method gets takes
    both parts, hence a ce_weight of twice 0.1.
    As in that code, "batch" grows with B and "class" with B², B being the images of one process.
    label_smoothing: of CE.
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce", "kd", "batch", "class": scalars}), weighted.
    Raises ValueError for no temperature or one that is not positive, a negative weight, a label_smoothing outside 0
    to 1.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 0.2, kd_weight: float = 0.9,
                 temperatures: list | tuple = (2.0, 3.0, 4.0, 5.0, 6.0), label_smoothing: float = 0.0):
        super().__init__()
        if not temperatures or any(type(t) not in (int, float) or t <= 0 for t in temperatures):
            raise ValueError(f"temperatures: {temperatures} is not a list of positive numbers")
        if min(ce_weight, kd_weight) < 0:
            raise ValueError(f"ce_weight, kd_weight: {ce_weight}, {kd_weight}: one is negative")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.kd_weight, self.temperatures = ce_weight, kd_weight, temperatures

    def _apply(self, *args, **kwargs):  # .to(), .cuda() and the like take the teacher along
        self.teacher._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def train(self, mode=True):  # not the teacher, whatever deepcopy or somebody else has made of it
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images, targets):
        with torch.no_grad():
            teacher_logits = self.teacher(images).float()
            confidence = teacher_logits.softmax(1)
            of_images, of_classes = share_below_median(confidence.amax(1)), share_below_median(confidence.sum(0))
        logits = self.student(images)
        kd = batch = classes = 0
        with torch.autocast(images.device.type, enabled=False):
            for T in self.temperatures:
                student, teacher = (logits.float() / T).softmax(1), (teacher_logits / T).softmax(1)
                kd = kd + (of_images + 1) * kd_loss(logits, teacher_logits, T)
                batch = batch + of_images * batch_loss(student, teacher)
                classes = classes + of_classes * class_loss(student, teacher)
        return logits, {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "kd": self.kd_weight * kd,
            "batch": self.kd_weight * batch,
            "class": self.kd_weight * classes,
        }
