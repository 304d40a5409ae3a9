"""DKD: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022."""

import torch
import torch.nn.functional as F
from torch import nn


def standardize(logits):
    """Each row with mean 0 and standard deviation 1: (B, K) -> (B, K), in float32 (Sun et al., CVPR 2024)."""
    logits = logits.float()
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


def decouple(logits, targets, temperature):
    """(B, K), (B,) -> log [p_target, 1 − p_target] (B, 2), and log p̂ of the others among themselves (B, K − 1)."""
    logits = logits.float() / temperature
    target = targets.unsqueeze(1)
    rest = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    rest = rest + (rest >= target)  # all classes but the target; a mask would make the host wait for the device
    one, others = logits.gather(1, target), logits.gather(1, rest)  # (B, 1), (B, K − 1)
    binary = torch.cat([one, others.logsumexp(1, keepdim=True)], 1).log_softmax(1)
    return binary, others.log_softmax(1)


def dkd_losses(student_logits, teacher_logits, targets, temperature):
    """(TCKD, NCKD) of eq. 7, each times T², mean over the batch, in float32: logits (B, K), targets (B,).

    KL = TCKD + (1 − p_target of the teacher) · NCKD, sample by sample (eq. 6): DKD gives NCKD a weight of its own.
    """
    pairs = zip(decouple(student_logits, targets, temperature), decouple(teacher_logits, targets, temperature))
    return tuple(F.kl_div(s, t, reduction="batchmean", log_target=True) * temperature**2 for s, t in pairs)


class DKD(nn.Module):
    """ce_weight · CE + warm-up · (alpha · TCKD + beta · NCKD).

    warmup_epochs: the second term grows linearly, and is whole in the last of these (call set_epoch, from 0; without it
    there is no warm-up). The authors count epochs from 1, so that the first has its share as well.
    logit_standardization: standardize both logits of the second term first; T is then that paper's base temperature,
    2 for most pairs, and Sun et al. multiply alpha and beta by 9 unless told otherwise, by up to 18 in their logs.
    label_smoothing: of CE.
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce", "tckd", "nckd": scalars}), weighted.
    Raises ValueError for a temperature that is not positive, a negative weight, a label_smoothing outside 0 to 1.
    """

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, alpha: float = 1.0, beta: float = 8.0,
                 temperature: float = 4.0, warmup_epochs: int = 20, logit_standardization: bool = False,
                 label_smoothing: float = 0.0):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if min(ce_weight, alpha, beta, warmup_epochs) < 0:
            raise ValueError(f"ce_weight, alpha, beta, warmup_epochs: {ce_weight}, {alpha}, {beta}, {warmup_epochs}: "
                             "one is negative")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.alpha, self.beta, self.temperature = ce_weight, alpha, beta, temperature
        self.warmup_epochs, self.warmup, self.logit_standardization = warmup_epochs, 1.0, logit_standardization

    def _apply(self, *args, **kwargs):  # .to(), .cuda() and the like take the teacher along
        self.teacher._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def train(self, mode=True):  # not the teacher, whatever deepcopy or somebody else has made of it
        super().train(mode)
        self.teacher.eval()
        return self

    def set_epoch(self, epoch):
        """For the warm-up: call before each epoch, from 0."""
        self.warmup = min((epoch + 1) / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0

    def forward(self, images, targets):
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        logits = self.student(images)
        pair = logits, teacher_logits
        if self.logit_standardization:
            pair = [standardize(z) for z in pair]
        tckd, nckd = dkd_losses(*pair, targets, self.temperature)
        return logits, {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "tckd": self.warmup * self.alpha * tckd,
            "nckd": self.warmup * self.beta * nckd,
        }
