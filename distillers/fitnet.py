"""FitNet: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, in one stage as RepDistiller compares it."""

import torch
import torch.nn.functional as F
from torch import nn


def kd_loss(student_logits, teacher_logits, temperature):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch; logits (B, K), in float32."""
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def hint_loss(student_map, teacher_map):
    """Mean squared error of two maps of one shape (B, C, H, W), in float32; else ValueError.

    Eq. 3 of the paper has half of the sum: the weight of 100 belongs to the mean.
    """
    if student_map.shape != teacher_map.shape:  # mse_loss would broadcast
        raise ValueError(f"hints of two shapes: student {tuple(student_map.shape)}, teacher {tuple(teacher_map.shape)}")
    return F.mse_loss(student_map.float(), teacher_map.float())


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


def regressor(student_shape, teacher_shape):
    """Convolution, BatchNorm, ReLU from one (C, H, W) to the other: 1×1 at equal size, strided by 2 down or up.

    Raises ValueError where the student's map is neither as large as the teacher's, nor half, nor larger.
    """
    (cs, hs, ws), (ct, ht, wt) = student_shape, teacher_shape
    if (hs, ws) == (2 * ht, 2 * wt):
        conv = nn.Conv2d(cs, ct, 3, stride=2, padding=1)
    elif (2 * hs, 2 * ws) == (ht, wt):
        conv = nn.ConvTranspose2d(cs, ct, 4, stride=2, padding=1)
    elif hs >= ht and ws >= wt:
        conv = nn.Conv2d(cs, ct, (1 + hs - ht, 1 + ws - wt))
    else:
        raise ValueError(f"no regressor leads from the student's map {student_shape} to the teacher's {teacher_shape}")
    return nn.Sequential(conv, nn.BatchNorm2d(ct), nn.ReLU())


class FitNet(nn.Module):
    """ce_weight · CE + hint_weight · MSE(regressor(student's map), teacher's map) [+ kd_weight · KL].

    student_stage, teacher_stage: which of the networks' `maps` (2: the 16×16 stage of a CIFAR ResNet).
    kd_weight, temperature: of KD's term beside it, the field's "+ KD"; 0: without.
    label_smoothing: of CE. image_size: side in pixels of the image on which the shapes of the maps are read.
    student, teacher: network(images, return_features=True) -> (logits, {"maps": [(B, C, H, W), …]}), the stem's first.
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce": scalar, "hint": scalar}), weighted; and
    "kd", if it has a weight.
    Raises ValueError for a negative weight, a temperature that is not positive, a label_smoothing outside 0 to 1, a
    stage that a network lacks, and for maps that no regressor joins.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, hint_weight: float = 100.0,
                 student_stage: int = 2, teacher_stage: int = 2, kd_weight: float = 0.0, temperature: float = 4.0,
                 label_smoothing: float = 0.0, image_size: int = 32):
        super().__init__()
        if min(ce_weight, hint_weight, kd_weight) < 0:
            raise ValueError(f"ce_weight, hint_weight, kd_weight: {ce_weight}, {hint_weight}, {kd_weight}: "
                             "one is negative")
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.hint_weight = ce_weight, hint_weight
        self.kd_weight, self.temperature = kd_weight, temperature
        self.student_stage, self.teacher_stage = student_stage, teacher_stage
        shapes = []
        for name, model, stage in ("student", student, student_stage), ("teacher", teacher, teacher_stage):
            maps = map_shapes(model, image_size)
            if not -len(maps) <= stage < len(maps):
                sizes = ", ".join(f"{i} of {C}×{H}×{W}" for i, (C, H, W) in enumerate(maps))
                raise ValueError(f"{name}_stage: the {name} has no map {stage}; valid: {sizes}")
            shapes.append(maps[stage])
        self.regressor = regressor(*shapes)

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
        hint = self.regressor(features["maps"][self.student_stage])
        losses = {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "hint": self.hint_weight * hint_loss(hint, teacher_features["maps"][self.teacher_stage]),
        }
        if self.kd_weight:
            losses["kd"] = self.kd_weight * kd_loss(logits, teacher_logits, self.temperature)
        return logits, losses
