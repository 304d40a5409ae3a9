"""DPK: Zong et al., "Better Teacher Better Student: Dynamic Prior Knowledge for Knowledge Distillation", ICLR 2023.

One stage, in the order of this file: measure the gap between the student's map and the teacher's (CKA); turn it into
the share π of the teacher's tokens that is given as prior knowledge; encode the teacher's tokens at random positions
and the student's at the others; stitch both to one hybrid feature; decode all of it; compare with the teacher's map.
"""

import functools
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def kd_loss(student_logits, teacher_logits, temperature):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch; logits (B, K), in float32."""
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


# 1. The gap

def unbiased_hsic(K, L):
    """HSIC₁ of two Gram matrices (n, n) with zero diagonals, n ≥ 4 (Nguyen, Raghu and Kornblith, ICLR 2021, eq. 3)."""
    n = len(K)
    trace = (K * L).sum()  # tr(KL), both being symmetric
    product = K.sum() * L.sum() / ((n - 1) * (n - 2))  # (1ᵀK1)(1ᵀL1) / ((n−1)(n−2))
    cross = 2 * (K.sum(0) @ L.sum(0)) / (n - 2)  # 2 · 1ᵀKL1 / (n−2)
    return (trace + product - cross) / (n * (n - 3))


@torch.no_grad()
def hsic_terms(x, y):
    """HSIC₁(K, L), HSIC₁(K, K), HSIC₁(L, L) of a mini-batch, x (B, …) and y (B, …) -> (3,), in float32.

    NaN, and a warning, for fewer than 4 images.
    """
    if len(x) < 4:
        warnings.warn("CKA is not defined for fewer than 4 images: a dynamic ratio is the fallback_ratio", stacklevel=3)
        return torch.full((3,), torch.nan, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        grams = []
        for features in x, y:
            features = features.float().flatten(1)  # (B, CHW)
            # HSIC₁ is the same with and without the mean; without, its large terms need not cancel.
            features = features - features.mean(0)
            grams.append((features @ features.T).fill_diagonal_(0))
        K, L = grams
        return torch.stack([unbiased_hsic(K, L), unbiased_hsic(K, K), unbiased_hsic(L, L)])


def cka_of_terms(terms):
    """CKA = HSIC₁(K, L) / √(HSIC₁(K, K) · HSIC₁(L, L)) of terms (…, 3) -> (…).

    Under torch.distributed each term is first averaged over the processes, their batches being the mini-batches of the
    estimator (Nguyen et al., eq. 2): all get one CKA, give the same number of tokens, and take as long as each other.
    """
    if dist.is_available() and dist.is_initialized():
        terms = terms.clone()
        dist.all_reduce(terms)
        terms = terms / dist.get_world_size()
    kl, kk, ll = terms.unbind(-1)
    return kl / (kk.sqrt() * ll.sqrt())  # not of the product, which may be beyond float32


def minibatch_cka(x, y):
    """Linear CKA of one mini-batch with unbiased HSIC: x (B, …), y (B, …) -> scalar, without gradient, in float32.

    NaN for fewer than 4 images; not defined either for a map that is the same for all images, then NaN, infinite or
    near 0. Several processes must all call it.
    """
    return cka_of_terms(hsic_terms(x, y))


# 2. The ratio of prior knowledge

def prior_ratio(cka, floor=0.15, fallback=0.9):
    """π = 1 − CKA, at least `floor`; `fallback` where CKA says nothing (NaN, ≤ 0.1, ≥ 1).

    A float gives a float; a tensor (…) gives a tensor (…), on its device.
    """
    if isinstance(cka, torch.Tensor):
        return torch.where((cka > 0.1) & (cka < 1), (1 - cka).clamp(min=floor), fallback)
    return max(1 - cka, floor) if 0.1 < cka < 1 else fallback


def scheduled_ratio(schedule, progress, start, end):
    """Ablation: π from `start` to `end` as training goes from 0 to 1, "linear" or "exponential"."""
    progress = min(progress, 1.0)
    return start + (end - start) * progress if schedule == "linear" else start * (end / start) ** progress


# 3. Two encoders

def patchify(feature_map, patch):
    """(B, C, H, W) -> (B, N, p²C): N = HW / p² tokens in row-major order, each a p × p patch."""
    B, C, H, W = feature_map.shape
    x = feature_map.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch * C)


@functools.cache
def sinusoid_positions(n, dim, device=None):
    """(n, dim) fixed 1-D table (Vaswani et al., 2017, section 3.5): sine in the even columns, cosine in the odd."""
    position = torch.arange(n, dtype=torch.float32, device=device).unsqueeze(1)
    column = torch.arange(dim, dtype=torch.float32, device=device)
    angle = position / 10000 ** (2 * (column // 2) / dim)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos())


def select(tokens, positions):
    """Pick tokens (B, N, D) at positions (B, n), each sample its own -> (B, n, D)."""
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


class Attention(nn.Module):
    """Multi-head self-attention with a bias on queries and values and none on keys: (B, n, D) -> (B, n, D).

    mask: bool, broadcast to (B, heads, n, n); no query sees a key where it is False. None: all see all.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        B, n, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(B, n, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, n, D / heads) each
        if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
            # PyTorch's fused kernel for CPUs is several times slower in half precision
            with torch.autocast("cpu", enabled=False):
                x = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).to(v.dtype)
        else:
            x = F.scaled_dot_product_attention(q, k, v, mask)
        return self.proj(x.transpose(1, 2).reshape(B, n, D))


class Block(nn.Module):
    """Pre-norm transformer block: (B, n, D) -> (B, n, D); mask: of its attention."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, mask=None):
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Embed a map, add positions, keep the tokens at `positions`, and encode these alone.

    forward(map (B, C, H, W), positions (B, n)) -> (B, n, dim). positions may also be a mask, bool (B, N): the result is
    then (B, N, dim), valid where the mask is True and to be ignored elsewhere.
    """

    def __init__(self, channels, patch, dim, depth, heads):
        super().__init__()
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)  # the channel projector as well
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, feature_map, positions):
        x = self.embed(feature_map).flatten(2).transpose(1, 2)  # (B, N, dim)
        x = x + sinusoid_positions(x.shape[1], x.shape[2], x.device).to(self.embed.weight.dtype)
        mask = None
        if positions.dtype == torch.bool:  # where a sample has none, let them all see each other: softmax needs one
            mask = (positions | ~positions.any(1, keepdim=True))[:, None, None]  # (B, 1, 1, N), of the keys
        else:
            x = select(x, positions)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


# 4. to 6. One stage: stitching, decoder, loss

class DPKStage(nn.Module):
    """DPK on one pair of maps of any networks: (student_map, teacher_map, cka=None) -> (loss, prior_ratio).

    student_map: (B, C_s, H, W), resized to the teacher's where the sizes differ; teacher_map: (B, C_t, H', W'), no
    gradient; H' and W' multiples of `patch`. loss: mean squared error over all positions, unweighted scalar with
    gradient to the student and to this module; prior_ratio: π as a float. `cka` holds the last CKA, a float, measured
    here unless it is given, as a float or a scalar tensor.

    encoder, decoder: (dim, depth, heads). ratio: None for π = 1 − CKA ("dynamic"), or a fixed share of 0 to 1.
    min_ratio, fallback_ratio, min_tokens: the guards of the dynamic ratio (CIFAR: 0.15, 0.9, 2; ImageNet: 0.10, 0.8,
    4). One token at least stays the student's, even where the map has no more than min_tokens.
    teacher_tokens=False: ablation, the teacher's positions stay empty.
    masked=True: tokens are hidden from attention rather than dropped. The loss is the same and the work more, but no
    shape depends on CKA and nothing waits for the device, as a CUDA graph needs. `cka` is then a tensor, and so is a π
    that follows from it.
    Raises ValueError for heads that do not divide a dim, a ratio outside 0 to 1, and maps that do not fit.
    """

    def __init__(self, student_channels, teacher_channels, *, encoder=(128, 6, 8), decoder=(128, 4, 8), patch=1,
                 ratio=None, min_ratio=0.15, fallback_ratio=0.9, min_tokens=2, teacher_tokens=True, masked=False):
        super().__init__()
        for name, sizes in ("encoder", encoder), ("decoder", decoder):
            if [type(size) for size in sizes] != [int] * 3 or min(sizes) < 1 or sizes[0] % sizes[2]:
                raise ValueError(f"{name}: {list(sizes)} must be [dim, depth, heads]: positive integers, "
                                 "dim a multiple of heads")
        for name, share in ("ratio", ratio), ("min_ratio", min_ratio), ("fallback_ratio", fallback_ratio):
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name}: {share} is not between 0 and 1")
        if patch < 1 or min_tokens < 0:
            raise ValueError(f"patch, min_tokens: {patch}, {min_tokens}: patch is at least 1, min_tokens at least 0")
        self.channels = student_channels, teacher_channels
        self.patch, self.ratio, self.cka, self.masked = patch, ratio, torch.nan, masked
        self.min_ratio, self.fallback_ratio, self.min_tokens = min_ratio, fallback_ratio, min_tokens
        self.student_encoder = Encoder(student_channels, patch, *encoder)
        # Without its tokens the teacher's encoder would be a dead module: no gradient, and an error under DDP.
        self.teacher_encoder = Encoder(teacher_channels, patch, *encoder) if teacher_tokens else None
        dim, depth, heads = decoder
        self.stitch = nn.Linear(encoder[0], dim, bias=False)  # shared by both streams
        self.decoder = nn.Sequential(
            *(Block(dim, heads) for _ in range(depth)),
            nn.LayerNorm(dim, eps=1e-6),
            nn.Linear(dim, patch * patch * teacher_channels),
        )
        self.apply(self._init)

    @staticmethod
    def _init(module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def match(self, student_map, teacher_map):
        """Check the shapes; the student's map at the teacher's size."""
        channels = student_map.shape[1], teacher_map.shape[1]
        H, W = teacher_map.shape[2:]
        if channels != self.channels or len(student_map) != len(teacher_map):
            raise ValueError(f"built for {self.channels} channels of student and teacher; got a student's map of "
                             f"{tuple(student_map.shape)} and a teacher's of {tuple(teacher_map.shape)}")
        if H % self.patch or W % self.patch:
            raise ValueError(f"patch: {self.patch} does not divide the teacher's map of {H}×{W}")
        if student_map.shape[2:] != (H, W):
            student_map = F.interpolate(student_map, (H, W), mode="bilinear", align_corners=True)
        return student_map

    def _ratio(self, num_tokens):
        """π and the number of the teacher's tokens, the same for the whole batch."""
        if self.ratio is not None:
            return self.ratio, int(num_tokens * self.ratio)
        ratio = prior_ratio(self.cka, self.min_ratio, self.fallback_ratio)
        if isinstance(ratio, torch.Tensor):
            return ratio, (num_tokens * ratio).floor().clamp(self.min_tokens, num_tokens - 1)
        return ratio, min(max(int(num_tokens * ratio), self.min_tokens), num_tokens - 1)

    def forward(self, student_map, teacher_map, cka=None):
        teacher_map = teacher_map.detach()
        student_map = self.match(student_map, teacher_map)
        if cka is None:  # fresh in every step
            cka = minibatch_cka(student_map, teacher_map)
        if isinstance(cka, torch.Tensor):  # Python's floats are float64
            cka = cka.double() if self.masked else cka.item()
        self.cka = cka
        target = patchify(teacher_map, self.patch)  # (B, N, p²C_t)
        B, N, _ = target.shape
        ratio, num_given = self._ratio(N)

        order = torch.rand(B, N, device=target.device).argsort(1)  # a random permutation of the positions per sample
        place = order.argsort(1)  # its inverse: where each position stands in it
        if self.masked:
            given = place < num_given  # (B, N), the teacher's positions
            visible = ~given  # the student's
        else:
            given, visible = order[:, :num_given], order[:, num_given:]  # (B, given), (B, N − given)

        own = self.stitch(self.student_encoder(student_map, visible))  # (B, N − given, D)
        if self.teacher_encoder is None:
            prior = own.new_zeros(B, given.shape[1], own.shape[2])
        else:
            prior = self.stitch(self.teacher_encoder(teacher_map, given))  # (B, given, D)
        if self.masked:  # both (B, N, D)
            hybrid = torch.where(given.unsqueeze(-1), prior, own)
        else:
            hybrid = select(torch.cat([prior, own], 1), place)  # every token back at its position
        hybrid = hybrid + sinusoid_positions(N, hybrid.shape[2], hybrid.device).to(self.stitch.weight.dtype)

        loss = F.mse_loss(self.decoder(hybrid).float(), target.float())  # over all N tokens
        return loss, ratio


# The distiller

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


STAGE = {"student": -1, "teacher": -1, "weight": 1.0, "patch": 1, "encoder": (128, 6, 8), "decoder": (128, 4, 8)}


def check_stage(stage):
    """The dict `stage` where its keys and the types of its values are those of STAGE; else ValueError."""
    if not isinstance(stage, dict):
        raise ValueError(f"stages: {stage!r} is not a mapping of {', '.join(STAGE)}")
    for key, value in stage.items():
        if key not in STAGE:
            nearest = min(STAGE, key=lambda name: len(set(name) ^ set(str(key))))  # by the letters that differ
            raise ValueError(f"stages: unknown key {key!r}; nearest: {nearest}; valid: {', '.join(STAGE)}")
        if key == "weight":
            valid = type(value) in (int, float) and 0 <= value < torch.inf
        else:
            valid = isinstance(value, (list, tuple)) if key in ("encoder", "decoder") else type(value) is int
        if not valid:
            raise ValueError(f"stages: {key}: {value!r} is not valid; for instance {STAGE[key]}")
    return stage


class DPK(nn.Module):
    """ce_weight · CE + kd_weight · KL + feature_weight · Σ weight · MSE of each stage.

    The weights are by default those of the authors' code for CIFAR-100; those of their published runs are unknown.

    stages: one dict a stage: `student` and `teacher`, which of the networks' `maps` (what their stages pass on: after a
    ReLU in most; a MobileNetV2's linear bottlenecks have none, nor have a WRN's sums, which the authors' code takes
    after the next BatchNorm); `weight`; `patch`, the side of a token; `encoder` and `decoder`, [dim, depth, heads].
    None: the last two maps, the second-last with weight 0.6.
    ratio: "dynamic" (π = 1 − CKA), a fixed share, or "linear" or "exponential" from ratio_start to ratio_end over
    schedule_epochs (then call set_epoch). min_ratio, fallback_ratio, min_tokens, teacher_tokens: see DPKStage.
    label_smoothing: of CE. image_size: side in pixels of the images, for the shapes of the maps.
    masked: see DPKStage; train_cifar.py sets it where it runs a step as one CUDA graph.
    student, teacher: network(images, return_features=True) -> (logits, {"maps": [(B, C, H, W), …]}), the stem's first.
    forward(images (B, 3, H, W), targets (B,)) -> (logits (B, K), {"ce", "kd", "dpk_<teacher's map>": scalars}),
    weighted; `metrics` then holds CKA and π of each stage, as floats, or where `masked` as tensors.
    Raises ValueError, which names the argument, for a value out of range, an unknown ratio or key of a stage, and
    stages that do not fit the networks.
    """

    def __init__(self, student, teacher, *, stages: list | None = None, ce_weight: float = 1.0, kd_weight: float = 1.0,
                 temperature: float = 1.0, feature_weight: float = 0.3, ratio: float | str = "dynamic",
                 min_ratio: float = 0.15, fallback_ratio: float = 0.9, min_tokens: int = 2,
                 ratio_start: float = 0.9, ratio_end: float = 0.15, schedule_epochs: int | None = None,
                 teacher_tokens: bool = True, label_smoothing: float = 0.0, image_size: int = 32,
                 masked: bool = False):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        if min(ce_weight, kd_weight, feature_weight) < 0:
            raise ValueError(f"ce_weight, kd_weight, feature_weight: {ce_weight}, {kd_weight}, {feature_weight}: "
                             "one is negative")
        if isinstance(ratio, str) and ratio not in ("dynamic", "linear", "exponential"):
            raise ValueError(f"ratio: {ratio!r}; valid: dynamic, linear, exponential, or a number from 0 to 1")
        if ratio in ("linear", "exponential") and not (schedule_epochs and schedule_epochs > 0):
            raise ValueError(f"schedule_epochs: {schedule_epochs}; at least 1 is needed for ratio: {ratio}")
        if not (0 < ratio_start <= 1 and 0 < ratio_end <= 1):
            raise ValueError(f"ratio_start, ratio_end: {ratio_start}, {ratio_end} are not above 0 and up to 1")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: {label_smoothing} is not between 0 and 1")
        self.student, self.label_smoothing = student, label_smoothing
        # Past nn.Module's registration: train(), parameters(), state_dict() and DDP never see the teacher.
        object.__setattr__(self, "teacher", teacher.eval().requires_grad_(False))
        self.ce_weight, self.kd_weight, self.temperature = ce_weight, kd_weight, temperature
        self.feature_weight, self.masked, self.metrics = feature_weight, masked, {}
        self.schedule = (ratio, schedule_epochs, ratio_start, ratio_end)

        shapes = {"student": map_shapes(student, image_size), "teacher": map_shapes(teacher, image_size)}
        self.plan, self.stages = [], nn.ModuleList()
        if stages is not None and not stages:
            raise ValueError("stages: an empty list; leave it out for the last two maps")
        for stage in stages or ({"student": -2, "teacher": -2, "weight": 0.6}, {}):
            stage = STAGE | check_stage(stage)
            for name, maps in shapes.items():
                if stage[name] not in range(-len(maps), len(maps)):
                    sizes = ", ".join(f"{i} of {C}×{H}×{W}" for i, (C, H, W) in enumerate(maps))
                    raise ValueError(f"stages: the {name} has no map {stage[name]}; valid: {sizes}")
                stage[name] %= len(maps)
            if stage["teacher"] in [t for _, t, _ in self.plan]:  # losses and metrics carry its number
                raise ValueError(f"stages: the teacher's map {stage['teacher']} is in two of them; valid: one each")
            H, W = shapes["teacher"][stage["teacher"]][1:]
            if stage["patch"] > 0 and (H % stage["patch"] or W % stage["patch"]):
                raise ValueError(f"stages: patch: {stage['patch']} does not divide the teacher's map "
                                 f"{stage['teacher']}, {H}×{W} for images of image_size {image_size}")
            self.plan.append((stage["student"], stage["teacher"], stage["weight"]))
            self.stages.append(DPKStage(
                shapes["student"][stage["student"]][0], shapes["teacher"][stage["teacher"]][0],
                encoder=stage["encoder"], decoder=stage["decoder"], patch=stage["patch"],
                ratio=None if isinstance(ratio, str) else ratio, min_ratio=min_ratio, fallback_ratio=fallback_ratio,
                min_tokens=min_tokens, teacher_tokens=teacher_tokens, masked=masked))
        self.set_epoch(0)

    def _apply(self, *args, **kwargs):  # .to(), .cuda() and the like take the teacher along
        self.teacher._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def train(self, mode=True):  # not the teacher, whatever deepcopy or somebody else has made of it
        super().train(mode)
        self.teacher.eval()
        return self

    def set_epoch(self, epoch):
        """For the scheduled ratios: call before each epoch, from 0."""
        ratio, epochs, start, end = self.schedule
        if ratio in ("linear", "exponential"):
            for stage in self.stages:
                stage.ratio = scheduled_ratio(ratio, epoch / epochs, start, end)

    def forward(self, images, targets):
        with torch.no_grad():
            teacher_logits, teacher_features = self.teacher(images, return_features=True)
        logits, features = self.student(images, return_features=True)
        losses = {
            "ce": self.ce_weight * F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing),
            "kd": self.kd_weight * kd_loss(logits, teacher_logits, self.temperature),
        }
        pairs = [(stage.match(features["maps"][s], teacher_features["maps"][t]), teacher_features["maps"][t])
                 for (s, t, _), stage in zip(self.plan, self.stages)]
        # The CKA of all stages, fresh in every step: unless masked, the one wait for the device and other processes.
        ckas = cka_of_terms(torch.stack([hsic_terms(*pair) for pair in pairs]))
        ckas = ckas.unbind() if self.masked else ckas.tolist()
        for (_, t, weight), stage, pair, cka in zip(self.plan, self.stages, pairs, ckas):
            loss, ratio = stage(*pair, cka)
            losses[f"dpk_{t}"] = self.feature_weight * weight * loss
            self.metrics |= {f"cka_{t}": cka, f"ratio_{t}": ratio}
        return logits, losses
