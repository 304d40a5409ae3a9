"""CC: Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, as RepDistiller compares it."""

import torch
import torch.nn.functional as F
from torch import nn


def kd_loss(student_logits, teacher_logits, temperature):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch; logits (B, K), in float32."""
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def cc_loss(student, teacher):
    """Σ |s_i − t_i| · |s_(i+1) − t_(i+1)|, mean over neighbours in the batch: (B, D) and (B, D) -> scalar, in float32.

    The paper compares B × B matrices of a Gaussian kernel. The figures that the field quotes were obtained with this
    form instead, RepDistiller's, to which the weight and the learned embedding of the teacher belong as well.
    Raises ValueError where the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"two shapes: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    delta = (student.float() - teacher.float()).abs()
    return (delta[:-1] * delta[1:]).sum() / max(len(delta) - 1, 1)  # 0 for an image without a neighbour


@torch.no_grad()
def pooled_width(model, image_size):
    """C of the network's pooled feature (B, C), from a blank image in eval mode: BatchNorm statistics stay."""
    parameter = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    model.eval()
    image = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    width = model(image, return_features=True)[1]["pooled"].shape[1]
    for module, mode in modes.items():
        module.train(mode)
    return width


class CC(nn.Module):
    """ce_weight · CE + cc_weight · CC on the pooled features, each through a learned linear layer to `dim`
    [+ kd_weight · KL].

    kd_weight, temperature: of KD's term beside it, the field's "+ KD"; 0: without.
    label_smoothing: of CE. image_size: side in pixels of the image on which the width of the features is read.
    student, teacher: network(images, return_features=True) -> (logits, {"pooled": (B, C)}).
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce": scalar, "cc": scalar}), weighted; and "kd",
    if it has a weight.
    Raises ValueError for a negative weight, a temperature that is not positive, a dim below 1, a label_smoothing
    outside 0 to 1.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, cc_weight: float = 0.02, dim: int = 128,
                 kd_weight: float = 0.0, temperature: float = 4.0, label_smoothing: float = 0.0, image_size: int = 32):
        super().__init__()
        if min(ce_weight, cc_weight, kd_weight) < 0:
            raise ValueError(f"ce_weight, cc_weight, kd_weight: {ce_weight}, {cc_weight}, {kd_weight}: one is negative")
        if dim < 1:
            raise ValueError(f"dim: {dim} is below 1")
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.cc_weight = ce_weight, cc_weight
        self.kd_weight, self.temperature = kd_weight, temperature
        self.student_embed = nn.Linear(pooled_width(student, image_size), dim)
        self.teacher_embed = nn.Linear(pooled_width(teacher, image_size), dim)

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
        embedded = self.student_embed(features["pooled"]), self.teacher_embed(teacher_features["pooled"])
        losses = {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "cc": self.cc_weight * cc_loss(*embedded),
        }
        if self.kd_weight:
            losses["kd"] = self.kd_weight * kd_loss(logits, teacher_logits, self.temperature)
        return logits, losses
