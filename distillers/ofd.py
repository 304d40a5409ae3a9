"""OFD: Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019."""

import torch
import torch.nn.functional as F
from torch import nn


def kd_loss(student_logits, teacher_logits, temperature):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch; logits (B, K), in float32."""
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def margin(mean, std):
    """E[x | x < 0] of each channel, x ~ N(mean, std²), the paper's margin: (C,), (C,) -> (C,), negative.

    −3 std where hardly any of x is negative, as in the authors' code.
    """
    mean, std = mean.double(), std.double().abs().clamp(min=1e-12)
    ratio = mean / std
    below = 0.5 * torch.erfc(ratio / 2**0.5)  # P(x < 0)
    density = (-0.5 * ratio.square()).exp() / (2 * torch.pi) ** 0.5
    return torch.where(below > 0.001, mean - std * density / below.clamp(min=1e-300), -3 * std).float()


def partial_l2(student, teacher, margin):
    """Distance before the ReLU (partial L2), sum over all positions, mean over the batch: (B, C, H, W) twice -> scalar.

    The teacher's values are first raised to the margin (C,). Where the target is not positive, the student is
    only asked to be below it. In float32.
    """
    student = student.float()
    target = teacher.float().maximum(margin.view(1, -1, 1, 1))
    wrong = (student > target) | (target > 0)
    return ((student - target).square() * wrong).sum((1, 2, 3)).mean()


def previous(steps):
    """The steps of autograd's graph whose results these take."""
    return [before for step in steps if step is not None for before, _ in step.next_functions if before is not None]


@torch.enable_grad()
def read_preacts(model, image_size):
    """The network's pre-activations without the stem's on a blank image, and for each the BatchNorm that makes it.

    [((C, H, W), BatchNorm or None), …], in eval mode: statistics stay as they are. Of a residual sum it is the main
    path's. A network without `preacts` gives its `maps`, after a ReLU then.
    """
    parameter = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    model.eval()
    side_path = "downsample", "shortcut", "convShortcut", "proj."
    outputs = []  # (BatchNorm, what it puts out, the step of autograd's graph that does)
    handles = [module.register_forward_hook(lambda module, _, out: outputs.append((module, out, out.grad_fn)))
               for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
               and module.affine and not any(part in name for part in side_path)]
    image = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    features = model(image.requires_grad_().clone(), return_features=True)[1]  # no leaf: a network may write into it
    preacts = features.get("preacts") or features["maps"]
    for handle in handles:
        handle.remove()
    for module, mode in modes.items():
        module.train(mode)
    found = []
    for preact in preacts[1:]:
        same = [module for module, out, _ in outputs if out is preact]
        before = previous([preact.grad_fn])  # a sum's parts, or before a ReLU the sum; then its parts
        parts = [module for step in before + previous(before) for module, out, made in outputs
                 if made is step and out.shape == preact.shape]
        found.append((tuple(preact.shape[1:]), (same + parts + [None])[0]))
    return found


class OFD(nn.Module):
    """ce_weight · CE + ofd_weight · Σ partial L2 / 2^(n − i) over the stages i = 1 … n, the last ones with each other
    [+ kd_weight · KL].

    The student's pre-activations go through a 1×1 convolution and BatchNorm each, the teacher's are pooled to their
    size. The margins are read off the teacher's BatchNorms, 0 where there is none. The teacher stays in eval mode.
    The authors and mdistiller keep it in train mode, where BatchNorm uses the batch's statistics; the authors found
    that better. ofd_weight: the authors' for CIFAR; theirs for ImageNet is 0.0001.
    kd_weight, temperature: of KD's term beside it, the field's "+ KD"; 0: without.
    label_smoothing: of CE. image_size: side in pixels of the image on which the shapes are read.
    student, teacher: network(images, return_features=True) -> (logits, {"preacts": [(B, C, H, W), …]}), the stem's
    first; "maps" are taken where there are none.
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce": scalar, "ofd": scalar}), weighted; and "kd",
    if it has a weight.
    Raises ValueError for a negative weight, a temperature that is not positive, a label_smoothing outside 0 to 1, and
    networks of a single map.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, ofd_weight: float = 0.001,
                 kd_weight: float = 0.0, temperature: float = 4.0, label_smoothing: float = 0.0, image_size: int = 32):
        super().__init__()
        if min(ce_weight, ofd_weight, kd_weight) < 0:
            raise ValueError(f"ce_weight, ofd_weight, kd_weight: {ce_weight}, {ofd_weight}, {kd_weight}: "
                             "one is negative")
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.ofd_weight = ce_weight, ofd_weight
        self.kd_weight, self.temperature = kd_weight, temperature
        students, teachers = read_preacts(student, image_size), read_preacts(teacher, image_size)
        self.depth = min(len(students), len(teachers))
        if not self.depth:
            raise ValueError("preacts: a network has none but the first, which is taken for the stem's")
        self.connectors = nn.ModuleList()
        for i, ((s, _), (t, bn)) in enumerate(zip(students[-self.depth:], teachers[-self.depth:])):
            conv = nn.Conv2d(s[0], t[0], 1, bias=False)
            nn.init.normal_(conv.weight, std=(2 / t[0]) ** 0.5)
            self.connectors.append(nn.Sequential(conv, nn.BatchNorm2d(t[0])))
            # weight and bias of a BatchNorm are the deviation and the mean of what it puts out
            value = torch.zeros(t[0]) if bn is None else margin(bn.bias.detach(), bn.weight.detach())
            self.register_buffer(f"margin{i}", value)

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
        pairs = zip(*((f.get("preacts") or f["maps"])[-self.depth:] for f in (features, teacher_features)))
        total = 0
        for i, (s, t) in enumerate(pairs):
            t = F.adaptive_avg_pool2d(t, s.shape[2:])
            loss = partial_l2(self.connectors[i](s), t, getattr(self, f"margin{i}"))
            total = total + loss / 2 ** (self.depth - 1 - i)
        losses = {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "ofd": self.ofd_weight * total,
        }
        if self.kd_weight:
            losses["kd"] = self.kd_weight * kd_loss(logits, teacher_logits, self.temperature)
        return logits, losses
