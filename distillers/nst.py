"""NST: Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017."""

import torch
import torch.nn.functional as F
from torch import nn


def kd_loss(student_logits, teacher_logits, temperature):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch; logits (B, K), in float32."""
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def polynomial_kernel(x, y):
    """Mean of (x_i · y_j)² over the channels i of x and j of y: (B, C, N), (B, C', N) -> (B,) (d = 2, c = 0)."""
    return (x @ y.transpose(1, 2)).square().mean((1, 2))


def nst_loss(student_map, teacher_map):
    """Squared maximum mean discrepancy of the channels' positions: (B, C, H, W), (B, C', H', W') -> scalar.

    In float32. Each channel has length 1; the larger map is first pooled to the size of the smaller.
    """
    size = min(student_map.shape[2:], teacher_map.shape[2:])
    with torch.autocast(student_map.device.type, enabled=False):
        s, t = (m if m.shape[2:] == size else F.adaptive_avg_pool2d(m.float(), size)
                for m in (student_map, teacher_map))
        s, t = (F.normalize(m.float().flatten(2), dim=2) for m in (s, t))
        return (polynomial_kernel(t, t) + polynomial_kernel(s, s) - 2 * polynomial_kernel(s, t)).mean()


class NST(nn.Module):
    """ce_weight · CE + nst_weight · Σ NST over all maps but the stem's, last with last and so on [+ kd_weight · KL].

    kd_weight, temperature: of KD's term beside it, the field's "+ KD"; 0: without.
    label_smoothing: of CE.
    student, teacher: network(images, return_features=True) -> (logits, {"maps": [(B, C, H, W), …]}), the stem's first.
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce": scalar, "nst": scalar}), weighted; and "kd",
    if it has a weight.
    Raises ValueError for a negative weight, a temperature that is not positive, a label_smoothing outside 0 to 1, and
    networks of a single map.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, nst_weight: float = 50.0,
                 kd_weight: float = 0.0, temperature: float = 4.0, label_smoothing: float = 0.0):
        super().__init__()
        if min(ce_weight, nst_weight, kd_weight) < 0:
            raise ValueError(f"ce_weight, nst_weight, kd_weight: {ce_weight}, {nst_weight}, {kd_weight}: "
                             "one is negative")
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.nst_weight = ce_weight, nst_weight
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
            "nst": self.nst_weight * sum(nst_loss(*pair) for pair in stages),
        }
        if self.kd_weight:
            losses["kd"] = self.kd_weight * kd_loss(logits, teacher_logits, self.temperature)
        return logits, losses
