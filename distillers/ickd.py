"""ICKD-C: Liu et al., "Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge Distillation",
ICCV 2021."""

import torch
import torch.nn.functional as F
from torch import nn


def kd_loss(student_logits, teacher_logits, temperature):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch; logits (B, K), in float32."""
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def channel_correlation(feature_map):
    """Inter-channel correlation of each image (section 3.1): (B, C, H, W) -> (B, C, C), each row of length 1.

    In float32, since the Gram matrix overflows in half precision. The row of a dead channel stays zero.
    """
    with torch.autocast(feature_map.device.type, enabled=False):
        x = feature_map.float().flatten(2)  # (B, C, HW)
        return F.normalize(x @ x.transpose(1, 2), dim=2, eps=1e-6)


def icc_loss(student_map, teacher_map):
    """‖ICC(student) − ICC(teacher)‖² / C, mean over the batch: (B, C, H, W) and (B, C, H', W') -> scalar.

    The paper divides by C², its ImageNet code by B once more; this is the form of its CIFAR-100 code, behind the
    published figures. Raises ValueError where the channels differ: a projector belongs before this.
    """
    if student_map.shape[:2] != teacher_map.shape[:2]:
        raise ValueError(f"batch and channels differ: student {tuple(student_map.shape)}, "
                         f"teacher {tuple(teacher_map.shape)}")
    difference = channel_correlation(student_map) - channel_correlation(teacher_map)
    return difference.square().sum((1, 2)).mean() / student_map.shape[1]


@torch.no_grad()
def map_shapes(model, image_size):
    """[(C, H, W), …] of the network's maps, from a blank image in eval mode: BatchNorm statistics stay as they are."""
    parameter = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    model.eval()
    image = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    maps = model(image, return_features=True)[1]["maps"]
    for module, mode in modes.items():
        module.train(mode)
    return [tuple(m.shape[1:]) for m in maps]


class ICKD(nn.Module):
    """ce_weight · CE + kd_weight · KL + icc_weight · ICC on the last map before pooling.

    The projector (convolution without bias, BatchNorm) takes the student's map to the teacher's channels; the
    teacher's map is not projected. projector_kernel: 1 on CIFAR, 3 on ImageNet. "Without KL" is kd_weight = 0.
    label_smoothing: of CE. image_size: side in pixels of the image on which the shapes of the maps are read.
    student, teacher: network(images, return_features=True) -> (logits, {"maps": [(B, C, H, W), …]}), the stem's first.
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce", "icc", "kd": scalars}), weighted.
    Raises ValueError for a temperature that is not positive, a negative weight, an even kernel, a label_smoothing
    outside 0 to 1.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, kd_weight: float = 1.0, icc_weight: float = 2.5,
                 temperature: float = 4.0, projector_kernel: int = 1, label_smoothing: float = 0.0,
                 image_size: int = 32):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if min(ce_weight, kd_weight, icc_weight) < 0:
            raise ValueError(f"ce_weight, kd_weight, icc_weight: {ce_weight}, {kd_weight}, {icc_weight}: "
                             "one is negative")
        if projector_kernel < 1 or projector_kernel % 2 == 0:
            raise ValueError(f"projector_kernel: {projector_kernel} is not a positive odd number")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.kd_weight, self.icc_weight = ce_weight, kd_weight, icc_weight
        self.temperature = temperature
        student_channels = map_shapes(student, image_size)[-1][0]
        teacher_channels = map_shapes(teacher, image_size)[-1][0]
        self.projector = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, projector_kernel, padding=projector_kernel // 2, bias=False),
            nn.BatchNorm2d(teacher_channels),
        )

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
        projected = self.projector(features["maps"][-1])
        return logits, {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "icc": self.icc_weight * icc_loss(projected, teacher_features["maps"][-1]),
            "kd": self.kd_weight * kd_loss(logits, teacher_logits, self.temperature),
        }
