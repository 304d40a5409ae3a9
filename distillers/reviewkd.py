"""ReviewKD: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021."""

import torch
import torch.nn.functional as F
from torch import nn


def kd_loss(student_logits, teacher_logits, temperature):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch; logits (B, K), in float32."""
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def hcl_loss(student_map, teacher_map):
    """Hierarchical context loss: (B, C, H, W) twice -> scalar, in float32.

    MSE of the maps, and of these pooled to 4×4, 2×2 and 1×1 where that is smaller, with weights 1, ½, ¼, ⅛, divided by
    the sum of the weights. Raises ValueError where the shapes differ.
    """
    if student_map.shape != teacher_map.shape:  # mse_loss would broadcast
        raise ValueError(f"two shapes: student {tuple(student_map.shape)}, teacher {tuple(teacher_map.shape)}")
    s, t = student_map.float(), teacher_map.float()
    loss, weight, total = F.mse_loss(s, t), 1.0, 1.0
    for side in (4, 2, 1):
        if side < s.shape[2]:
            weight /= 2
            loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(s, side), F.adaptive_avg_pool2d(t, side))
            total += weight
    return loss / total


class ABF(nn.Module):
    """Attention based fusion: one stage of the student with what comes from the deeper ones.

    (x (B, C_in, H, W), deeper (B, mid, h, w) or None, size) -> (map (B, C_out, *size), what goes on (B, mid, *size)).
    """

    def __init__(self, in_channels, mid_channels, out_channels, fuse):
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(in_channels, mid_channels, 1, bias=False), nn.BatchNorm2d(mid_channels))
        self.expand = nn.Sequential(nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False),
                                    nn.BatchNorm2d(out_channels))
        self.attention = nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid()) if fuse else None
        for conv in self.reduce[0], self.expand[0]:
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, x, deeper, size):
        x = self.reduce(x)
        if self.attention is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            mine, theirs = self.attention(torch.cat([x, deeper], 1)).split(1, dim=1)  # (B, 1, H, W) each
            x = x * mine + deeper * theirs
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.expand(x), x


def levels(features, preacts):
    """The maps but the stem's, before the ReLU if `preacts` and it has them, and the pooled feature as a 1×1 map."""
    maps = (features.get("preacts") if preacts else None) or features["maps"]
    return [*maps[1:], features["pooled"][:, :, None, None]]


@torch.no_grad()
def level_channels(model, preacts, image_size):
    """[C, …] of the levels, from a blank image in eval mode: BatchNorm statistics stay as they are."""
    parameter = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    model.eval()
    image = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    channels = [level.shape[1] for level in levels(model(image, return_features=True)[1], preacts)]
    for module, mode in modes.items():
        module.train(mode)
    return channels


class ReviewKD(nn.Module):
    """ce_weight · CE + warm-up · review_weight · Σ HCL over the levels, the deepest ones with each other
    [+ kd_weight · KL].

    teacher_preacts, student_preacts: the network's maps are taken before the ReLU, where it has `preacts`. The defaults
    are those of the authors' CIFAR code; theirs for ImageNet returns a ResNet's maps before a ReLU that works in place,
    so its figures were obtained after the ReLU (MobileNetV1's before it), and yaml/imagenet/ follows that.
    The teacher stays in eval mode; the authors' on CIFAR was in train mode, that of the field's reruns in eval mode.
    warmup_epochs: the second term grows linearly from 0 at epoch 0 (call set_epoch; without it there is no warm-up), as
    in the authors' CIFAR code; theirs for ImageNet has none. mid_channels: width of what goes from level to level;
    None: that of the student's deepest level, at most 512.
    kd_weight, temperature: of KD's term beside it, the field's "+ KD"; 0: without.
    label_smoothing: of CE. image_size: side in pixels of the image on which the channels are read.
    student, teacher: network(images, return_features=True) -> (logits, {"maps": [(B, C, H, W), …], the stem's first,
    "preacts": the same before the ReLU, if it has them, "pooled": (B, C)}).
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce": scalar, "review": scalar}), weighted; and
    "kd", if it has a weight.
    In train mode a batch has two images or more, for the BatchNorm of the pooled level.
    Raises ValueError for a negative weight, a temperature that is not positive, mid_channels below 1, a label_smoothing
    outside 0 to 1, and networks of a single map.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, review_weight: float = 1.0,
                 warmup_epochs: int = 20, mid_channels: int | None = None, teacher_preacts: bool = True,
                 student_preacts: bool = False, kd_weight: float = 0.0, temperature: float = 4.0,
                 label_smoothing: float = 0.0, image_size: int = 32):
        super().__init__()
        if min(ce_weight, review_weight, kd_weight, warmup_epochs) < 0:
            raise ValueError("ce_weight, review_weight, kd_weight, warmup_epochs: "
                             f"{ce_weight}, {review_weight}, {kd_weight}, {warmup_epochs}: one is negative")
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if mid_channels is not None and mid_channels < 1:
            raise ValueError(f"mid_channels: {mid_channels} is below 1")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.review_weight = ce_weight, review_weight
        self.kd_weight, self.temperature = kd_weight, temperature
        self.warmup_epochs, self.warmup = warmup_epochs, 1.0
        self.teacher_preacts, self.student_preacts = teacher_preacts, student_preacts
        students = level_channels(student, student_preacts, image_size)
        teachers = level_channels(teacher, teacher_preacts, image_size)
        self.depth = min(len(students), len(teachers))
        if self.depth == 1:  # the pooled feature
            raise ValueError("maps: a network has none but the first, which is taken for the stem's")
        students, teachers = students[-self.depth:], teachers[-self.depth:]
        mid = mid_channels or min(512, students[-1])
        self.fusions = nn.ModuleList(ABF(s, mid, t, fuse=i + 1 < self.depth)
                                     for i, (s, t) in enumerate(zip(students, teachers)))

    def _apply(self, *args, **kwargs):  # .to(), .cuda() and the like take the teacher along
        self.teacher._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def train(self, mode=True):  # not the teacher, whatever deepcopy or somebody else has made of it
        super().train(mode)
        self.teacher.eval()
        return self

    def set_epoch(self, epoch):
        """For the warm-up: call before each epoch, from 0."""
        self.warmup = min(epoch / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0

    def forward(self, images, targets):
        with torch.no_grad():
            teacher_logits, teacher_features = self.teacher(images, return_features=True)
        logits, features = self.student(images, return_features=True)
        stages = zip(self.fusions, levels(features, self.student_preacts)[-self.depth:],
                     levels(teacher_features, self.teacher_preacts)[-self.depth:])
        review, deeper = 0, None
        for fusion, student_map, teacher_map in reversed(list(stages)):  # the deepest first
            reviewed, deeper = fusion(student_map, deeper, teacher_map.shape[2:])
            review = review + hcl_loss(reviewed, teacher_map)
        losses = {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "review": self.warmup * self.review_weight * review,
        }
        if self.kd_weight:
            losses["kd"] = self.kd_weight * kd_loss(logits, teacher_logits, self.temperature)
        return logits, losses
