import dataclasses
import warnings

import pytest
import torch
from torch.optim import SGD, lr_scheduler

from distillers import DISTILLERS
from models import MODELS
from utils import checkpoint
from utils.errors import InputError
from utils.optim import (
    ConnectorSettings,
    OptimizerSettings,
    build_optimizers,
    check_optimizers,
    learning_rate,
    set_learning_rates,
)

STAGE = {"student": 3, "teacher": 3, "encoder": [8, 1, 2], "decoder": [8, 1, 2]}
ARGUMENTS = {"dpk": {"stages": [STAGE]}, "crd": {"num_samples": 8, "negatives": 16}}
every_distiller = pytest.mark.parametrize("name", DISTILLERS)
every_optimizer = pytest.mark.parametrize("optimizer", ["student", "adamw"])


def build(name):
    torch.manual_seed(0)
    teacher = None if name == "ce" else MODELS["resnet14"](num_classes=10)
    return DISTILLERS[name](MODELS["resnet8"](num_classes=10), teacher, **ARGUMENTS.get(name, {}))


def step(distiller, optimizers):
    index = (torch.arange(4),) if getattr(distiller, "needs_index", False) else ()
    logits, losses = distiller(torch.randn(4, 3, 32, 32), torch.arange(4), *index)
    sum(losses.values()).backward()
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()


def scheduled(scheduler, lr, epochs, **options):
    """The learning rates of one of torch's schedulers, which step by recurrence."""
    optimizer = SGD([torch.zeros(1)], lr)
    scheduler = scheduler(optimizer, **options)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return rates


# Learning rates


def test_steps_come_exactly_at_the_milestones():
    common = {"lr": 0.05, "epochs": 240, "milestones": [150, 180, 210], "gamma": 0.1}
    rates = [learning_rate(epoch, **common) for epoch in range(240)]
    expected = scheduled(lr_scheduler.MultiStepLR, 0.05, 240, milestones=[150, 180, 210], gamma=0.1)
    assert rates == pytest.approx(expected, rel=1e-12)
    for epoch, rate in {0: 5e-2, 149: 5e-2, 150: 5e-3, 179: 5e-3, 180: 5e-4, 209: 5e-4, 210: 5e-5, 239: 5e-5}.items():
        assert rates[epoch] == pytest.approx(rate, rel=1e-12)


def test_steps_without_milestones_out_of_order_and_twice_at_one():
    assert learning_rate(99, lr=0.1, epochs=100) == 0.1
    assert learning_rate(5, lr=1.0, epochs=9, milestones=[6, 5, 2], gamma=0.5) == 0.25
    assert learning_rate(5, lr=1.0, epochs=9, milestones=[5, 5], gamma=0.5) == 0.25
    assert learning_rate(0, lr=1.0, epochs=9, milestones=[0], gamma=0.5) == 0.5


def test_the_cosine_goes_from_lr_to_min_lr():
    common = {"lr": 0.2, "epochs": 10, "schedule": "cosine", "min_lr": 0.02}
    rates = [learning_rate(epoch, **common) for epoch in range(11)]
    assert rates == pytest.approx(scheduled(lr_scheduler.CosineAnnealingLR, 0.2, 11, T_max=10, eta_min=0.02))
    assert rates[0] == 0.2 and rates[5] == pytest.approx(0.11) and rates[10] == pytest.approx(0.02)
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(10, lr=0.2, epochs=10, schedule="cosine") == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_the_warm_up_is_linear_and_ends_at_lr(schedule):
    common = {"lr": 0.6, "epochs": 12, "schedule": schedule, "warmup_epochs": 5, "min_lr": 0.06}
    rates = [learning_rate(epoch, **common) for epoch in range(12)]
    assert rates[:6] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    if schedule == "cosine":
        expected = scheduled(lr_scheduler.CosineAnnealingLR, 0.6, 7, T_max=7, eta_min=0.06)
        assert rates[5:] == pytest.approx(expected)
        assert learning_rate(12, **common) == pytest.approx(0.06)
    else:
        assert set(rates[5:]) == {0.6}


def test_a_warm_up_as_long_as_the_run_or_longer():
    for warmup_epochs in 3, 9:
        rates = [learning_rate(epoch, lr=1.0, epochs=3, schedule="cosine", warmup_epochs=warmup_epochs)
                 for epoch in range(4)]
        assert rates[:3] == pytest.approx([(epoch + 1) / (warmup_epochs + 1) for epoch in range(3)])
        assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_the_rate_is_a_float_of_python(schedule):
    for epoch in range(0, 240, 10):
        rate = learning_rate(epoch, lr=0.05, epochs=240, schedule=schedule, milestones=[150], warmup_epochs=20)
        assert type(rate) is float


# Optimizers


@every_distiller
@every_optimizer
def test_every_parameter_is_in_exactly_one_group(name, optimizer):
    distiller = build(name)
    student = OptimizerSettings(weight_decay=0.01, momentum=0.8, nesterov=True)
    connectors = ConnectorSettings(optimizer, weight_decay=0.02, lr=0.003, betas=[0.7, 0.8])
    optimizers = build_optimizers(distiller, student, connectors)
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in distiller.parameters())
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in distiller.student.parameters()}
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])

    own = len(list(distiller.parameters())) > len(list(distiller.student.parameters()))
    assert own == (name in ("fitnet", "ickd", "dpk", "vid", "cc", "ofd", "crd", "reviewkd"))
    assert [group["weight_decay"] for group in groups] == [0.01, 0.02][:1 + own]
    assert list(optimizers) == ["student", "connectors"][:1 + (own and optimizer == "adamw")]
    for group in optimizers["student"].param_groups:
        assert (group["lr"], group["momentum"], group["nesterov"]) == (0.05, 0.8, True)
    if "connectors" in optimizers:
        assert type(optimizers["connectors"]) is torch.optim.AdamW
        assert (groups[-1]["lr"], groups[-1]["betas"], groups[-1]["amsgrad"]) == (0.003, (0.7, 0.8), False)


@every_distiller
@every_optimizer
def test_a_step_changes_every_parameter_and_not_the_teacher(name, optimizer):
    distiller = build(name)
    optimizers = build_optimizers(distiller, OptimizerSettings(), ConnectorSettings(optimizer))
    before = {key: parameter.clone() for key, parameter in distiller.named_parameters()}
    teacher = {} if name == "ce" else {key: t.clone() for key, t in distiller.teacher.state_dict().items()}
    step(distiller, optimizers)
    assert [key for key, parameter in distiller.named_parameters() if torch.equal(parameter, before[key])] == []
    assert all(torch.equal(distiller.teacher.state_dict()[key], tensor) for key, tensor in teacher.items())


def test_the_connectors_weight_decay_is_theirs_alone():
    distiller = build("ickd")
    optimizers = build_optimizers(distiller, OptimizerSettings(lr=0.5, weight_decay=0.2),
                                  ConnectorSettings("student", weight_decay=0.0))
    before = {key: parameter.clone() for key, parameter in distiller.named_parameters()}
    for parameter in distiller.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers["student"].step()
    for key, parameter in distiller.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[key] * (0.9 if key.startswith("student.") else 1.0))


@every_optimizer
def test_learning_rates_are_set_and_returned(optimizer):
    student = OptimizerSettings(lr=0.05, milestones=[3], gamma=0.1, warmup_epochs=1)
    connectors = ConnectorSettings(optimizer, lr=0.01, warmup_epochs=2, min_lr=0.001)
    optimizers = build_optimizers(build("fitnet"), student, connectors)
    for epoch, lr in enumerate([0.025, 0.05, 0.05, 0.005]):
        rates = set_learning_rates(optimizers, student, connectors, epoch, 4)
        cosine = learning_rate(epoch, lr=0.01, epochs=4, schedule="cosine", warmup_epochs=2, min_lr=0.001)
        expected = {"lr": lr} | ({"lr_connectors": cosine} if optimizer == "adamw" else {})
        assert rates == pytest.approx(expected) and list(rates) == list(expected)
        assert all(type(rate) is float for rate in rates.values())
        assert [group["lr"] for group in optimizers["student"].param_groups] == \
            [rates["lr"]] * (2 if optimizer == "student" else 1)
        if optimizer == "adamw":
            assert [group["lr"] for group in optimizers["connectors"].param_groups] == [rates["lr_connectors"]]


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_the_students_learning_rate_follows_all_of_its_settings(schedule):
    student = OptimizerSettings(lr=0.2, schedule=schedule, milestones=[2], gamma=0.5, warmup_epochs=1)
    expected = {"step": [0.1, 0.2, 0.1, 0.1], "cosine": [0.1, 0.2, 0.15, 0.05]}[schedule]
    rates = [set_learning_rates({"student": SGD([torch.zeros(1)], 1.0)}, student, ConnectorSettings(), epoch, 4)["lr"]
             for epoch in range(4)]
    assert rates == pytest.approx(expected)


def test_the_students_adamw_has_its_settings():
    student = OptimizerSettings("adamw", lr=0.003, betas=[0.7, 0.8], weight_decay=0.01)
    [optimizer] = build_optimizers(build("fitnet"), student, ConnectorSettings(weight_decay=0.02)).values()
    assert type(optimizer) is torch.optim.AdamW
    assert [(group["lr"], group["betas"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.003, (0.7, 0.8), 0.01), (0.003, (0.7, 0.8), 0.02)]


@every_distiller
@every_optimizer
def test_saved_optimizers_load_as_weights_alone_and_go_on_as_if_never_saved(name, optimizer, tmp_path):
    student, connectors = OptimizerSettings(), ConnectorSettings(optimizer, warmup_epochs=0)
    results = []
    for resumed in False, True:
        distiller = build(name)
        optimizers = build_optimizers(distiller, student, connectors)
        for epoch in range(2):
            if resumed and epoch == 1:
                path = tmp_path / "latest.pth"
                checkpoint.save(path, {
                    "config": dataclasses.asdict(connectors), "distiller": distiller.state_dict(),
                    "optimizers": {key: value.state_dict() for key, value in optimizers.items()}})
                state = torch.load(path, weights_only=True)  # nothing allowed beyond tensors and Python's own
                distiller = build(name)
                distiller.load_state_dict(state["distiller"])
                optimizers = build_optimizers(distiller, student, connectors)
                for key, value in optimizers.items():
                    value.load_state_dict(state["optimizers"][key])
            set_learning_rates(optimizers, student, connectors, epoch, 2)
            torch.manual_seed(epoch)
            step(distiller, optimizers)
        results.append(distiller.state_dict())
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_first_step_that_overflows_leaves_no_trace(momentum):
    """GradScaler skips it. PyTorch's fused SGD has then made its momentum and never written it."""
    distiller = build("fitnet")
    optimizer = build_optimizers(distiller, OptimizerSettings(momentum=momentum), ConnectorSettings())["student"]
    weights, scaler = [p.detach().clone() for p in distiller.parameters()], torch.amp.GradScaler("cpu")
    junk = [torch.full_like(p, 1e30) for p in weights]
    del junk  # what the allocator hands out next
    for value in torch.inf, 1.0:
        scaler.scale(torch.zeros(()))
        for p in distiller.parameters():
            p.grad = torch.full_like(p, value) * scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        for p, before in zip(distiller.parameters(), weights):
            group = next(group for group in optimizer.param_groups if any(p is q for q in group["params"]))
            moved = group["lr"] * (1 + group["weight_decay"] * before) if value == 1 else torch.zeros_like(before)
            assert torch.allclose(p, before - moved, atol=1e-6)


@pytest.mark.parametrize(("student", "connectors", "key"), [
    (OptimizerSettings(nesterov=True, momentum=0.0), ConnectorSettings(), "optimizer.nesterov"),
    *((OptimizerSettings(), ConnectorSettings("adamw", betas=betas), "connectors.betas")
      for betas in ([], [0.9], [0.9, 0.95, 0.99], [0.9, 1.0], [1.5, 0.5])),
])
def test_settings_that_the_optimizers_refuse_are_named(student, connectors, key):
    with pytest.raises(InputError, match="valid") as caught:
        check_optimizers(student, connectors)
    assert caught.value.key == key
