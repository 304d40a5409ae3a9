"""AT: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, activation-based."""

import torch
import torch.nn.functional as F
from torch import nn


def kd_loss(student_logits, teacher_logits, temperature):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch; logits (B, K), in float32."""
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def attention_map(feature_map):
    """Where the network looks: squares averaged over the channels, each row of length 1, (B, C, H, W) -> (B, H·W).

    Section 3.1 has their sum, the same once it is normalised. In float32.
    """
    return F.normalize(feature_map.float().square().mean(1).flatten(1))


def at_loss(student_map, teacher_map):
    """Mean squared difference of two attention maps: (B, C, H, W) and (B, C', H', W') -> scalar.

    The larger map is first pooled to the size of the smaller. The paper's eq. 2 has the norm of the difference; its
    square, as a mean over the batch and the positions, is what the weight of 1000 and the published figures belong to.
    """
    size = min(student_map.shape[2:], teacher_map.shape[2:])
    student_map, teacher_map = (m if m.shape[2:] == size else F.adaptive_avg_pool2d(m.float(), size)
                                for m in (student_map, teacher_map))
    return (attention_map(student_map) - attention_map(teacher_map)).square().mean()


class AT(nn.Module):
    """ce_weight · CE + at_weight · Σ AT over all maps but the stem's, last with last and so on [+ kd_weight · KL].

    kd_weight, temperature: of KD's term beside it, the field's "+ KD"; 0: without.
    label_smoothing: of CE.
    student, teacher: network(images, return_features=True) -> (logits, {"maps": [(B, C, H, W), …]}), the stem's first.
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce": scalar, "at": scalar}), weighted; and "kd",
    if it has a weight.
    Raises ValueError for a negative weight, a temperature that is not positive, a label_smoothing outside 0 to 1, and
    networks of a single map.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, at_weight: float = 1000.0,
                 kd_weight: float = 0.0, temperature: float = 4.0, label_smoothing: float = 0.0):
        super().__init__()
        if min(ce_weight, at_weight, kd_weight) < 0:
            raise ValueError(f"ce_weight, at_weight, kd_weight: {ce_weight}, {at_weight}, {kd_weight}: one is negative")
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.at_weight = ce_weight, at_weight
        self.kd_weight, self.temperature = kd_weight, temperature

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
        maps, teacher_maps = features["maps"], teacher_features["maps"]
        if min(len(maps), len(teacher_maps)) < 2:
            raise ValueError("maps: a network has none but the first, which is taken for the stem's")
        stages = zip(maps[:0:-1], teacher_maps[:0:-1])  # from the last to the second
        losses = {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "at": self.at_weight * sum(at_loss(*pair) for pair in stages),
        }
        if self.kd_weight:
            losses["kd"] = self.kd_weight * kd_loss(logits, teacher_logits, self.temperature)
        return logits, losses
