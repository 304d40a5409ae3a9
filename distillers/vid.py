"""VID: Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019."""

import torch
import torch.nn.functional as F
from torch import nn


def kd_loss(student_logits, teacher_logits, temperature):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch; logits (B, K), in float32."""
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


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


class VIDStage(nn.Module):
    """−log q(teacher's map | student's map), q a Gaussian of learned mean and one learned variance a channel.

    (student_map (B, C_s, H, W), teacher_map (B, C_t, H', W')) -> scalar, mean over all values, without the constant.
    The larger map is first pooled to the size of the smaller. The mean is three 1×1 convolutions with ReLU between.
    """

    def __init__(self, student_channels, teacher_channels, init_variance=5.0, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.mean = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False), nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False), nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        # variance = softplus(α) + eps, which is init_variance for this α
        variance = torch.full((teacher_channels,), init_variance - eps)
        self.alpha = nn.Parameter(variance + (-(-variance).expm1()).log())  # log(exp(v) − 1), for large v as well

    def forward(self, student_map, teacher_map):
        size = min(student_map.shape[2:], teacher_map.shape[2:])
        student_map, teacher_map = (m if m.shape[2:] == size else F.adaptive_avg_pool2d(m, size)
                                    for m in (student_map, teacher_map))
        variance = F.softplus(self.alpha) + self.eps  # (C_t,)
        error = (self.mean(student_map).float() - teacher_map.float()).square().mean((0, 2, 3))
        return 0.5 * (error / variance + variance.log()).mean()


class VID(nn.Module):
    """ce_weight · CE + vid_weight · Σ VID over all maps but the stem's, last with last and so on [+ kd_weight · KL].

    init_variance: of q, at the start. kd_weight, temperature: of KD's term beside it, the field's "+ KD"; 0: without.
    label_smoothing: of CE. image_size: side in pixels of the image on which the channels of the maps are read.
    student, teacher: network(images, return_features=True) -> (logits, {"maps": [(B, C, H, W), …]}), the stem's first.
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce": scalar, "vid": scalar}), weighted; and "kd",
    if it has a weight.
    Raises ValueError for a negative weight, a temperature that is not positive, an init_variance of 0.0001 or less, a
    label_smoothing outside 0 to 1, and networks of a single map.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, vid_weight: float = 1.0,
                 init_variance: float = 5.0, kd_weight: float = 0.0, temperature: float = 4.0,
                 label_smoothing: float = 0.0, image_size: int = 32):
        super().__init__()
        if min(ce_weight, vid_weight, kd_weight) < 0:
            raise ValueError(f"ce_weight, vid_weight, kd_weight: {ce_weight}, {vid_weight}, {kd_weight}: "
                             "one is negative")
        if init_variance <= 1e-4:
            raise ValueError(f"init_variance: {init_variance} is not above 0.0001")
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.vid_weight = ce_weight, vid_weight
        self.kd_weight, self.temperature = kd_weight, temperature
        shapes = zip(map_shapes(student, image_size)[:0:-1], map_shapes(teacher, image_size)[:0:-1])  # from the last on
        self.stages = nn.ModuleList(VIDStage(s[0], t[0], init_variance) for s, t in shapes)
        if not self.stages:
            raise ValueError("maps: a network has none but the first, which is taken for the stem's")

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
        stages = zip(self.stages, features["maps"][:0:-1], teacher_features["maps"][:0:-1])
        losses = {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "vid": self.vid_weight * sum(stage(*pair) for stage, *pair in stages),
        }
        if self.kd_weight:
            losses["kd"] = self.kd_weight * kd_loss(logits, teacher_logits, self.temperature)
        return logits, losses
