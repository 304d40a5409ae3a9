"""CRD: Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def kd_loss(student_logits, teacher_logits, temperature):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch; logits (B, K), in float32."""
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def contrast_loss(scores, num_samples):
    """−log h(positive) − Σ log(1 − h(negative)), mean over the batch (section 3.1): (B, 1 + K) -> scalar.

    scores: e^(g·g' / τ) / Z, the positive pair first; h = score / (score + K / num_samples). In float32.
    """
    noise = (scores.shape[1] - 1) / num_samples
    positive, negative = scores[:, :1], scores[:, 1:]
    positive = (positive / (positive + noise + 1e-7)).log()
    negative = (noise / (negative + noise + 1e-7)).log()
    return -(positive.sum() + negative.sum()) / len(scores)


def draw_negatives(labels, targets, count):
    """Indices of images of other classes than each target: labels (N,), targets (B,) -> (B, count).

    Uniform, with replacement; the authors draw without, for the same expected loss. Images whose class is not known yet
    (label −1) count as others; at least one image has to be of another class.
    """
    order, targets = labels.argsort(), targets.contiguous()
    ordered = labels[order]
    first, end = (torch.searchsorted(ordered, targets, right=right).unsqueeze(1) for right in (False, True))
    others = len(labels) - (end - first)  # (B, 1)
    draw = (torch.rand(len(targets), count, device=labels.device) * others).long().minimum(others - 1)
    return order[draw + (draw >= first) * (end - first)]  # past the block of the target's own class


def gather(tensor):
    """(B, …) of every process, one after the other, without gradient; of one process, the same."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class Memory(nn.Module):
    """The embeddings of all training images of both networks, as they were when last seen.

    forward(student (B, D), teacher (B, D), targets (B,), index (B,)) -> scalar, and in train mode the banks are brought
    up to date. The embeddings have length 1; index: which training image each is. Under torch.distributed all processes
    update the banks with the images of all of them, so that these stay the same everywhere.
    """

    def __init__(self, num_samples, dim, negatives, temperature, momentum):
        super().__init__()
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        bound = (3 / dim) ** 0.5
        self.register_buffer("student_bank", torch.empty(num_samples, dim).uniform_(-bound, bound))
        self.register_buffer("teacher_bank", torch.empty(num_samples, dim).uniform_(-bound, bound))
        self.register_buffer("labels", torch.full((num_samples,), -1))  # as far as they are known
        self.register_buffer("Z", torch.zeros(2))  # the constants of the student's and the teacher's scores

    def scores(self, anchors, bank, chosen, which):
        """e^(g·g' / τ) / Z of anchors (B, D) and the bank's rows `chosen` (B, 1 + K) -> (B, 1 + K).

        One product with the whole bank, of which these are picked: gathering (B, 1 + K, D) moves far more memory.
        """
        scores = (anchors @ bank.T.to(anchors.dtype)).gather(1, chosen).div(self.temperature).exp()
        Z = scores.detach().mean() * len(bank)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(Z)
            Z = Z / dist.get_world_size()
        Z = torch.where(self.Z[which] == 0, Z, self.Z[which])  # set once, by the first batch
        if self.training:
            self.Z[which] = Z
        return scores / Z

    @torch.no_grad()
    def update(self, bank, embedded, index):
        moved = self.momentum * bank[index] + (1 - self.momentum) * embedded
        bank[index] = F.normalize(moved).to(bank.dtype)

    def forward(self, student, teacher, targets, index):
        with torch.autocast(student.device.type, enabled=False):
            chosen = torch.cat([index[:, None], draw_negatives(self.labels, targets, self.negatives)], 1)
            loss = sum(contrast_loss(self.scores(anchors, bank.clone(), chosen, which), len(bank))  # updated below
                       for which, (anchors, bank) in enumerate(((student, self.teacher_bank),
                                                                (teacher, self.student_bank))))
        if self.training:
            everyone = gather(index)
            self.labels[everyone] = gather(targets)
            self.update(self.student_bank, gather(student.detach()), everyone)
            self.update(self.teacher_bank, gather(teacher.detach()), everyone)
        return loss


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


class CRD(nn.Module):
    """ce_weight · CE + crd_weight · CRD on the pooled features, each through a learned linear layer to `dim`
    [+ kd_weight · KL].

    negatives, temperature, momentum: K, τ and the momentum of the banks. num_samples: how many training images there
    are. kd_weight, kd_temperature: of KD's term beside it, the field's "+ KD"; 0: without.
    label_smoothing: of CE. image_size: side in pixels of the image on which the width of the features is read.
    student, teacher: network(images, return_features=True) -> (logits, {"pooled": (B, C)}).
    forward(images (B, 3, H, W), targets (B,), index (B,)) -> (logits (B, K), {"ce": scalar, "crd": scalar}), weighted;
    and "kd", if it has a weight. index: which training image each is, from 0 to num_samples − 1.
    Raises ValueError for a negative weight, a number below 1, a temperature or momentum out of range, a kd_temperature
    that is not positive, a label_smoothing outside 0 to 1.
    """

    needs_index = True

    def __init__(self, student, teacher, *, ce_weight: float = 1.0, crd_weight: float = 0.8, dim: int = 128,
                 negatives: int = 16384, temperature: float = 0.07, momentum: float = 0.5, num_samples: int = 50000,
                 kd_weight: float = 0.0, kd_temperature: float = 4.0, label_smoothing: float = 0.0,
                 image_size: int = 32):
        super().__init__()
        if min(ce_weight, crd_weight, kd_weight) < 0:
            raise ValueError(f"ce_weight, crd_weight, kd_weight: {ce_weight}, {crd_weight}, {kd_weight}: "
                             "one is negative")
        if min(dim, negatives, num_samples) < 1:
            raise ValueError(f"dim, negatives, num_samples: {dim}, {negatives}, {num_samples}: one is below 1")
        if temperature <= 0 or not 0 <= momentum < 1:
            raise ValueError(f"temperature, momentum: {temperature}, {momentum}: temperature must be positive, "
                             "momentum at least 0 and below 1")
        if kd_temperature <= 0:
            raise ValueError(f"kd_temperature: {kd_temperature} is not positive")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.crd_weight = ce_weight, crd_weight
        self.kd_weight, self.kd_temperature = kd_weight, kd_temperature
        self.student_embed = nn.Linear(pooled_width(student, image_size), dim)
        self.teacher_embed = nn.Linear(pooled_width(teacher, image_size), dim)
        self.memory = Memory(num_samples, dim, negatives, temperature, momentum)

    def _apply(self, *args, **kwargs):  # .to(), .cuda() and the like take the teacher along
        self.teacher._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def train(self, mode=True):  # not the teacher, whatever deepcopy or somebody else has made of it
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images, targets, index):
        with torch.no_grad():
            teacher_logits, teacher_features = self.teacher(images, return_features=True)
        logits, features = self.student(images, return_features=True)
        embedded = [F.normalize(embed(f["pooled"]).float()) for embed, f in
                    ((self.student_embed, features), (self.teacher_embed, teacher_features))]
        losses = {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "crd": self.crd_weight * self.memory(*embedded, targets, index),
        }
        if self.kd_weight:
            losses["kd"] = self.kd_weight * kd_loss(logits, teacher_logits, self.kd_temperature)
        return logits, losses
