import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distillers.dpk import (
    DPK,
    STAGE,
    Attention,
    Block,
    DPKStage,
    cka_of_terms,
    minibatch_cka,
    patchify,
    prior_ratio,
    scheduled_ratio,
    select,
    sinusoid_positions,
    unbiased_hsic,
)
from models import MODELS

SMALL = {"encoder": (16, 1, 2), "decoder": (16, 1, 2)}


def maps(B=8, cs=6, ct=10, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, cs, size, size, generator=generator), torch.randn(B, ct, size, size, generator=generator)


def cka_by_u_statistic(x, y):
    """CKA from the definition of the unbiased estimator: sums over tuples of distinct indices, in float64."""
    x, y = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (x, y))
    n = len(x)

    def hsic(K, L):
        pairs = triples = quadruples = 0.0
        for i in range(n):
            for j in range(n):
                if i == j:
                    continue
                pairs += K[i, j] * L[i, j]
                for q in range(n):
                    if q in (i, j):
                        continue
                    triples += K[i, j] * L[i, q]
                    for r in range(n):
                        if r not in (i, j, q):
                            quadruples += K[i, j] * L[q, r]
        return (pairs / (n * (n - 1)) - 2 * triples / (n * (n - 1) * (n - 2))
                + quadruples / (n * (n - 1) * (n - 2) * (n - 3)))

    K, L = x @ x.T, y @ y.T
    return hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L))


# ------------------------------------------------------------------------------------------------------------- CKA


def related(n=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 4, 4, generator=generator).relu()
    return x, (x @ torch.randn(4, 5, generator=generator)).relu() + 0.1 * torch.randn(n, 3, 4, 5, generator=generator)


@pytest.mark.parametrize("n", [4, 9])
def test_cka_is_the_u_statistic(n):
    x, y = related(n)
    assert minibatch_cka(x, y).item() == pytest.approx(cka_by_u_statistic(x, y), abs=1e-5)


def test_hsic_follows_the_equation_on_gram_matrices_with_a_mean():
    x, y = (a.double().flatten(1) + 3 for a in related())
    K, L = (x @ x.T).fill_diagonal_(0), (y @ y.T).fill_diagonal_(0)
    n, one = len(K), torch.ones(len(K), 1, dtype=torch.float64)
    expected = (torch.trace(K @ L) + (one.T @ K @ one) * (one.T @ L @ one) / ((n - 1) * (n - 2))
                - 2 / (n - 2) * one.T @ K @ L @ one) / (n * (n - 3))
    assert unbiased_hsic(K, L).item() == pytest.approx(expected.item(), rel=1e-8)


def test_cka_does_not_change_with_rotation_scale_and_shift():
    x, y = related()
    rotation = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(2)))[0]
    rotated = (x.flatten(1) @ rotation) * 1e3 + 50
    assert minibatch_cka(rotated, y * 1e-3).item() == pytest.approx(minibatch_cka(x, y).item(), abs=1e-4)
    assert minibatch_cka(x, rotated).item() == pytest.approx(1, abs=1e-4)


def test_cka_of_unrelated_features_has_mean_zero():
    values = [minibatch_cka(*maps(B=16, seed=seed)).item() for seed in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values))
    assert np.std(values) < 0.2


def test_cka_where_it_is_undefined_and_in_half_precision():
    x, y = related()
    with pytest.warns(UserWarning, match="fewer than 4 images"):
        assert minibatch_cka(x[:3], y[:3]).isnan()
    assert minibatch_cka(torch.zeros(8, 4), torch.randn(8, 4)).isnan()
    with torch.autocast("cpu", torch.bfloat16):
        assert minibatch_cka(x, y).dtype == torch.float32
        assert minibatch_cka(x, y).item() == pytest.approx(cka_by_u_statistic(x, y), abs=1e-5)
    big = (100 * x).half()  # its Gram matrix is beyond float16
    assert minibatch_cka(big, y.half()).item() == pytest.approx(cka_by_u_statistic(x, y), abs=1e-2)
    assert not minibatch_cka(x.clone().requires_grad_(), y).requires_grad
    for scale in 1e-6, 1e6:  # HSIC(K, K) · HSIC(L, L) is below and beyond float32
        assert minibatch_cka(scale * x, scale * y).item() == pytest.approx(minibatch_cka(x, y).item(), abs=1e-5)
    assert cka_of_terms(torch.tensor([0.5, -1.0, -1.0])).isnan()


# --------------------------------------------------------------------------------------------------- ratio, tokens


def test_prior_ratio_and_its_guards():
    assert prior_ratio(0.4) == pytest.approx(0.6)
    assert prior_ratio(0.99) == 0.15
    assert prior_ratio(0.95, floor=0.10) == 0.10
    for cka in math.nan, -0.5, 0.0, 0.1, 1.0, 1.2, math.inf:
        assert prior_ratio(cka) == 0.9
        assert prior_ratio(cka, fallback=0.8) == 0.8


def test_scheduled_ratio_ends_where_it_should():
    for schedule in "linear", "exponential":
        assert scheduled_ratio(schedule, 0, 0.8, 0.2) == pytest.approx(0.8)
        assert scheduled_ratio(schedule, 1, 0.8, 0.2) == pytest.approx(0.2)
        assert scheduled_ratio(schedule, 9, 0.8, 0.2) == pytest.approx(0.2)
    assert scheduled_ratio("linear", 0.5, 0.8, 0.2) == pytest.approx(0.5)
    assert scheduled_ratio("exponential", 0.5, 0.8, 0.2) == pytest.approx(0.4)


def test_prior_ratio_of_tensors_is_that_of_floats():
    ckas = [math.nan, math.inf, *np.linspace(-0.2, 1.2, 57).tolist()]
    ratios = prior_ratio(torch.tensor(ckas, dtype=torch.float64), floor=0.2, fallback=0.8)
    assert ratios.tolist() == [prior_ratio(cka, floor=0.2, fallback=0.8) for cka in ckas]


def test_patchify_is_unfold():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(patchify(x, 1), x.flatten(2).transpose(1, 2))
    unfolded = F.unfold(x, 2, stride=2).view(2, 3, 4, 6).permute(0, 3, 2, 1).reshape(2, 6, 12)  # (p², C) per token
    assert torch.equal(patchify(x, 2), unfolded)


def test_sinusoid_positions():
    table = sinusoid_positions(5, 6)
    for position in range(5):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize("n", [0, 1, 51, 256])
def test_attention_in_half_precision_on_a_cpu_is_that_in_float32(n):
    torch.manual_seed(0)
    attention = Attention(48, 8)
    torch.nn.init.normal_(attention.q_bias), torch.nn.init.normal_(attention.v_bias)
    x = torch.randn(4, n, 48)
    results = []
    for half in True, False:
        leaf = x.clone().requires_grad_()
        attention.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = attention(leaf)
        assert y.dtype == (torch.bfloat16 if half else torch.float32)
        y.float().square().sum().backward()
        results.append([y.float(), leaf.grad, attention.qkv.weight.grad.clone(), attention.q_bias.grad.clone()])
    # Of a single token q has no gradient; the fused kernel leaves the rounding of the largest one there.
    rounding = 1e-7 * max(full.norm() for full in results[1])
    for half, full in zip(*results):
        assert (half - full).norm() <= 0.02 * full.norm() + rounding  # bfloat16 has 8 bits: 0.004 a rounding


def test_a_block_is_pytorchs_pre_norm_layer():
    torch.manual_seed(0)
    block, theirs = Block(48, 8), torch.nn.TransformerEncoderLayer(
        48, 8, 4 * 48, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    bias = torch.cat([block.attn.q_bias, torch.zeros(48), block.attn.v_bias])  # none on the keys
    theirs.load_state_dict({
        "self_attn.in_proj_weight": block.attn.qkv.weight, "self_attn.in_proj_bias": bias,
        "self_attn.out_proj.weight": block.attn.proj.weight, "self_attn.out_proj.bias": block.attn.proj.bias,
        "linear1.weight": block.mlp[0].weight, "linear1.bias": block.mlp[0].bias,
        "linear2.weight": block.mlp[2].weight, "linear2.bias": block.mlp[2].bias,
        **{f"{norm}.{name}": p for norm in ("norm1", "norm2") for name, p in getattr(block, norm).named_parameters()}})
    x = 0.01 * torch.randn(4, 10, 48)  # small, so that the norms' eps matters
    assert torch.allclose(block(x), theirs(x), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- a stage


def test_parameter_counts_of_the_paper():
    def count(channels, encoder, decoder):
        return sum(p.numel() for p in DPKStage(channels, channels, encoder=encoder, decoder=decoder).parameters())

    assert count(512, (512, 6, 8), (512, 4, 8)) == 51_483_136
    assert count(256, (256, 6, 8), (256, 4, 8)) == 12_896_512


def reference(stage, student_map, teacher_map, order, given):
    """The stage once more, a sample and a token at a time, from the description of the method alone."""
    outputs = []
    for b in range(len(student_map)):
        hybrid = [None] * order.shape[1]
        for encoder, feature, positions in ((stage.teacher_encoder, teacher_map[b], order[b, :given]),
                                            (stage.student_encoder, student_map[b], order[b, given:])):
            weight, bias = encoder.embed.weight.flatten(1), encoder.embed.bias
            table = sinusoid_positions(order.shape[1], weight.shape[0])
            tokens = [feature.flatten(1)[:, n] @ weight.T + bias + table[n] for n in positions.tolist()]
            encoded = encoder.norm(encoder.blocks(torch.stack(tokens).unsqueeze(0)))[0]
            for n, token in zip(positions.tolist(), encoded):
                hybrid[n] = token @ stage.stitch.weight.T
        table = sinusoid_positions(len(hybrid), stage.stitch.weight.shape[0])
        outputs.append(stage.decoder((torch.stack(hybrid) + table).unsqueeze(0))[0])
    prediction = torch.stack(outputs)  # (B, N, C_t)
    return ((prediction - teacher_map.flatten(2).transpose(1, 2)) ** 2).mean()


@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_stage_puts_every_token_at_its_position(ratio):
    stage, (student_map, teacher_map) = DPKStage(6, 10, ratio=ratio, **SMALL), maps()
    torch.manual_seed(3)
    loss, returned = stage(student_map, teacher_map)
    torch.manual_seed(3)
    order = torch.rand(8, 16).argsort(1)
    assert returned == ratio
    expected = reference(stage, student_map, teacher_map, order, int(16 * ratio))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_positions_are_random_per_sample_and_of_exact_count(monkeypatch):
    stage, (student_map, teacher_map) = DPKStage(6, 10, ratio=0.3, **SMALL), maps()
    seen = {}
    for name in "student_encoder", "teacher_encoder":
        getattr(stage, name).register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[1]))
    for _ in range(200):
        stage(student_map, teacher_map)
    given, visible = torch.cat(seen["teacher_encoder"]), torch.cat(seen["student_encoder"])
    assert given.shape == (1600, 4) and visible.shape == (1600, 12)  # int(16 · 0.3) = 4
    assert torch.equal(torch.cat([given, visible], 1).sort(1).values, torch.arange(16).expand(1600, 16))
    assert not torch.equal(given[0], given[1])
    counts = given.flatten().bincount(minlength=16).float()  # 400 each, standard deviation 17
    assert (counts - 400).abs().max() < 90


def test_encoders_process_the_selected_tokens_only():
    stage, (student_map, teacher_map) = DPKStage(6, 10, ratio=0.25, **SMALL), maps()
    lengths = []
    for encoder in stage.teacher_encoder, stage.student_encoder:
        encoder.blocks[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    stage(student_map, teacher_map)
    assert sorted(lengths) == [4, 12]


def test_student_gets_gradient_through_its_own_tokens_only():
    stage, (student_map, teacher_map) = DPKStage(6, 10, ratio=0.5, **SMALL), maps()
    student_map.requires_grad_()
    teacher_map.requires_grad_()
    torch.manual_seed(3)
    loss, _ = stage(student_map, teacher_map)
    loss.backward()
    torch.manual_seed(3)
    given = torch.rand(8, 16).argsort(1)[:, :8]
    touched = student_map.grad.abs().sum(1).flatten(1) > 0  # (B, N)
    assert not touched.gather(1, given).any()
    assert touched.sum() == 8 * 8
    assert teacher_map.grad is None


def test_everything_given_and_nothing_given():
    student_map, teacher_map = maps()
    other = torch.randn_like(student_map)
    for ratio in 1.0, 0.0:
        stage = DPKStage(6, 10, ratio=ratio, **SMALL)
        leaf = student_map.clone().requires_grad_()
        torch.manual_seed(0)
        loss, _ = stage(leaf, teacher_map)
        loss.backward()
        torch.manual_seed(0)
        changed = stage(other, teacher_map)[0].item() != loss.item()
        assert changed == (ratio == 0)  # with everything given the student is not seen
        assert (leaf.grad.abs().sum() > 0).item() == (ratio == 0)
        # every parameter stays in the graph (DDP); the encoder that saw nothing has gradients of zero
        idle = stage.student_encoder if ratio else stage.teacher_encoder
        assert all(p.grad is not None for p in stage.parameters())
        assert all(p.grad.abs().sum() == 0 for p in idle.parameters())


def test_dynamic_ratio_follows_cka_and_guards():
    stage = DPKStage(6, 6, **SMALL)
    x = torch.randn(16, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    loss, ratio = stage(x + 0.8 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), x)
    assert ratio == pytest.approx(1 - stage.cka) and 0.2 < ratio < 0.9
    assert stage(x, x * 2)[1] in (0.15, 0.9)  # CKA 1 up to rounding: the floor, or the guard at 1
    assert stage(torch.zeros_like(x), x)[1] == 0.9
    assert stage(torch.zeros_like(x), torch.zeros_like(x))[0].isfinite()
    few = DPKStage(6, 6, min_ratio=0.0, min_tokens=4, **SMALL)
    lengths = []
    few.teacher_encoder.register_forward_pre_hook(lambda module, args: lengths.append(args[1].shape[1]))
    few(x + 1e-3 * torch.randn_like(x), x)
    assert lengths == [4]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2)])
def test_the_student_keeps_a_token_of_the_smallest_map(size, masked):
    torch.manual_seed(0)
    stage = DPKStage(6, 6, min_tokens=4, masked=masked, **SMALL)
    student_map = torch.randn(8, 6, *size, requires_grad=True)
    loss, _ = stage(student_map, torch.randn(8, 6, *size))
    loss.backward()
    assert ((student_map.grad != 0).any(1).flatten(1).sum(1) == 1).all()  # one position of each image
    assert all(p.grad is not None for p in stage.parameters())


def test_all_of_it_in_bfloat16():
    stage, (student_map, teacher_map) = DPKStage(6, 10, **SMALL).bfloat16(), maps()
    loss, _ = stage(student_map.bfloat16(), teacher_map.bfloat16())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in stage.parameters())


def test_without_teacher_tokens_the_loss_does_not_see_them_as_input():
    stage, (student_map, teacher_map) = DPKStage(6, 10, ratio=0.25, teacher_tokens=False, **SMALL), maps()
    assert stage.teacher_encoder is None
    predictions = []
    stage.decoder.register_forward_hook(lambda module, args, output: predictions.append(output))
    for teacher in teacher_map, torch.randn_like(teacher_map):
        torch.manual_seed(0)
        loss, _ = stage(student_map, teacher)
    assert torch.equal(*predictions)
    loss.backward()
    assert all(p.grad is not None for p in stage.parameters())


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("arguments", [
    {}, {"ratio": 0.3}, {"ratio": 0.0}, {"ratio": 1.0}, {"teacher_tokens": False}, {"min_ratio": 0.0, "min_tokens": 16},
    {"patch": 2, "min_ratio": 0.6}, {"encoder": (16, 3, 2), "decoder": (16, 2, 2)}])
def test_masked_tokens_are_dropped_tokens(arguments, precision):
    """The same loss, ratio and gradients; in float64 up to rounding, in bfloat16 within a few per cent."""
    student_map, teacher_map = (a.double() for a in maps())
    student_map = student_map + 2 * teacher_map[:, :6]
    results = []
    for masked in False, True:
        torch.manual_seed(0)
        stage = DPKStage(6, 10, **(SMALL | arguments), masked=masked).double()
        leaf = student_map.clone().requires_grad_()
        torch.manual_seed(1)
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
            loss, ratio = stage(leaf, teacher_map)
        loss.backward()
        results.append([loss.detach(), leaf.grad, *(p.grad for p in stage.parameters())])
        assert float(ratio) == pytest.approx(arguments.get("ratio", prior_ratio(float(stage.cka), stage.min_ratio)))
    assert "ratio" in arguments or 0.3 < float(stage.cka) < 0.8
    for dropped, hidden in zip(*results):
        assert hidden.isfinite().all()
        tolerance = 1e-4 if precision == torch.float64 else 0.05  # F.mse_loss is in float32
        assert (hidden - dropped).norm() <= tolerance * dropped.norm() + 1e-6


def test_sizes_differ_and_patches():
    stage = DPKStage(6, 10, patch=2, ratio=0.5, **SMALL)
    student_map, teacher_map = torch.randn(8, 6, 3, 3), torch.randn(8, 10, 8, 8)
    assert stage(student_map, teacher_map)[0].isfinite()
    resized = F.interpolate(student_map, (8, 8), mode="bilinear", align_corners=True)
    torch.manual_seed(0)
    a = stage(student_map, teacher_map)[0]
    torch.manual_seed(0)
    assert torch.equal(a, stage(resized, teacher_map)[0])
    with pytest.raises(ValueError, match="patch: 2 does not divide"):
        stage(student_map, torch.randn(8, 10, 7, 7))


def test_shapes_are_checked_and_both_named():
    stage = DPKStage(6, 10, **SMALL)
    with pytest.raises(ValueError, match=r"\(8, 5, 4, 4\).*\(8, 10, 4, 4\)"):
        stage(torch.randn(8, 5, 4, 4), torch.randn(8, 10, 4, 4))
    with pytest.raises(ValueError, match="multiple of heads"):
        DPKStage(6, 10, encoder=(30, 1, 4))
    with pytest.raises(ValueError, match="ratio: 1.5"):
        DPKStage(6, 10, ratio=1.5)


def test_initialisation():
    stage = DPKStage(64, 64)
    linear = stage.decoder[0].mlp[0]
    bound = math.sqrt(6 / (linear.in_features + linear.out_features))
    assert linear.weight.abs().max() <= bound
    assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not linear.bias.any() and not stage.decoder[0].attn.q_bias.any()


def test_a_stage_can_learn_to_copy_what_is_given():
    torch.manual_seed(0)
    stage = DPKStage(4, 4, ratio=1.0, encoder=(32, 1, 4), decoder=(32, 1, 4))
    optimizer = torch.optim.AdamW(stage.parameters(), 3e-3)
    teacher_map = torch.randn(32, 4, 4, 4)
    for _ in range(150):
        loss, _ = stage(torch.zeros_like(teacher_map), teacher_map)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2  # the variance of the target is 1


# ------------------------------------------------------------------------------------------------------ the distiller


def build(**arguments):
    torch.manual_seed(0)
    stages = [{"student": 2, "teacher": 2, "weight": 0.6, **SMALL}, {"student": 3, "teacher": 3, **SMALL}]
    return DPK(MODELS["resnet8"](), MODELS["resnet14"](), **({"stages": stages} | arguments))


def test_losses_are_weighted_and_each_stage_has_its_own_cka():
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8)
    distiller = build(ce_weight=2.0, kd_weight=3.0, feature_weight=0.5, temperature=2.0)
    torch.manual_seed(1)
    logits, losses = distiller(images, targets)
    assert list(losses) == ["ce", "kd", "dpk_2", "dpk_3"]
    teacher_logits, teacher_features = distiller.teacher(images, return_features=True)
    _, features = distiller.student(images, return_features=True)
    assert losses["ce"].item() == pytest.approx(2 * F.cross_entropy(logits, targets).item())
    p = (teacher_logits / 2).softmax(1)
    kl = (p * (p.log() - (logits / 2).log_softmax(1))).sum(1).mean() * 4
    assert losses["kd"].item() == pytest.approx(3 * kl.item(), rel=1e-4)
    torch.manual_seed(1)
    for i, weight in (2, 0.6), (3, 1.0):
        loss, ratio = distiller.stages[i - 2](features["maps"][i], teacher_features["maps"][i])
        assert losses[f"dpk_{i}"].item() == pytest.approx(0.5 * weight * loss.item(), rel=1e-4)
        assert distiller.metrics[f"ratio_{i}"] == pytest.approx(ratio, abs=1e-4)
        cka = minibatch_cka(features["maps"][i], teacher_features["maps"][i]).item()
        assert distiller.metrics[f"cka_{i}"] == pytest.approx(cka, abs=1e-4)


def test_the_last_two_stages_by_default():
    def defaults(module):
        return {key: parameter.default for key, parameter in inspect.signature(module).parameters.items()}

    distiller = build(stages=None)
    assert distiller.plan == [(2, 2, 0.6), (3, 3, 1.0)]
    of_a_stage = defaults(DPKStage)
    assert {key: of_a_stage[key] for key in ("encoder", "decoder", "patch")}.items() <= STAGE.items()
    for key in "min_ratio", "fallback_ratio", "min_tokens", "teacher_tokens":
        assert of_a_stage[key] == defaults(DPK)[key]


def test_masked_metrics_are_tensors_and_the_same():
    images, targets, results = torch.randn(8, 3, 32, 32), torch.arange(8), []
    for masked in False, True:
        distiller = build(masked=masked)
        torch.manual_seed(1)
        _, losses = distiller(images, targets)
        results.append({key: torch.as_tensor(value).item() for key, value in (losses | distiller.metrics).items()})
        assert isinstance(distiller.metrics["cka_2"], torch.Tensor if masked else float)
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_ablations_are_arguments():
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8)
    assert len(build(stages=[{"student": 3, "teacher": 3, **SMALL}]).stages) == 1
    patched = build(stages=[{"student": 2, "teacher": 2, "patch": 2, **SMALL}, {**SMALL}])
    assert [stage.patch for stage in patched.stages] == [2, 1]
    assert patched(images, targets)[1]["dpk_2"].isfinite()
    distiller = build(ratio=0.5)
    distiller(images, targets)
    assert distiller.metrics["ratio_2"] == distiller.metrics["ratio_3"] == 0.5
    distiller = build(ratio="linear", schedule_epochs=10, ratio_start=0.8, ratio_end=0.2)
    for epoch, ratio in (0, 0.8), (5, 0.5), (10, 0.2):
        distiller.set_epoch(epoch)
        distiller(images, targets)
        assert distiller.metrics["ratio_2"] == pytest.approx(ratio)
    assert not any("teacher_encoder" in name for name, _ in build(teacher_tokens=False).named_parameters())


@pytest.mark.parametrize("arguments, message", [
    ({"stages": [{"student": 9}]}, "the student has no map 9; valid: 0 of 16×32×32, 1 of .*, 3 of 64×8×8"),
    ({"stages": [{"decodr": [8, 1, 1]}]}, "nearest: decoder"),
    ({"stages": [{"encoder": [30, 1, 4]}]}, "multiple of heads"),
    ({"stages": [{"encoder": 64}]}, "stages: encoder: 64"),
    ({"stages": [{"student": 2, "teacher": 3}, {"teacher": -1}]}, "stages: the teacher's map 3 is in two"),
    ({"stages": [{"weight": "big"}]}, "stages: weight: 'big'"),
    ({"ratio": "cosine"}, "valid: dynamic"),
    ({"ratio": 2.0}, "ratio: 2.0"),
    ({"ratio": "linear"}, "schedule_epochs"),
    ({"ratio": "linear", "schedule_epochs": -2}, "schedule_epochs: -2"),
    ({"stages": [{"student": 2, "teacher": 2, "patch": 3}]}, "patch: 3 does not divide the teacher's map 2, 16×16"),
    ({"temperature": 0.0}, "temperature"),
])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_select():
    tokens = torch.arange(24.0).view(2, 4, 3)
    positions = torch.tensor([[3, 0], [1, 2]])
    assert torch.equal(select(tokens, positions), torch.stack([tokens[0, [3, 0]], tokens[1, [1, 2]]]))
