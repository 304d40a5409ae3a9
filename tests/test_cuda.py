"""On a GPU, where there is one: the numbers of the CPU and of a CUDA graph, and no step that waits for the device."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from distillers import DISTILLERS
from models import MODELS
from train_cifar import Settings
from utils import engine
from utils.data import Loader, load_data
from utils.engine import pick_device
from utils.log import Table
from utils.optim import set_learning_rates
from utils.step import forward_backward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
ROOT = Path(__file__).parents[1]
SMALL = {"encoder": (8, 1, 2), "decoder": (8, 1, 2)}
ARGUMENTS = {"dpk": {"stages": [{"student": -2, "teacher": -2, **SMALL}, SMALL]},
             "crd": {"num_samples": 1000, "negatives": 64, "kd_weight": 1.0},
             **dict.fromkeys(["fitnet", "at", "sp", "pkt", "rkd", "vid", "cc", "nst", "ofd", "reviewkd"],
                             {"kd_weight": 1.0})}


def build(name, device):
    torch.manual_seed(0)
    distiller = DISTILLERS[name](MODELS["resnet8"](), MODELS["resnet14"](), **ARGUMENTS.get(name, {})).train()
    return distiller.to(device, memory_format=torch.channels_last)


def losses_and_gradients(name, device, monkeypatch):
    distiller = build(name, device)
    if name == "crd":  # else all -1, and sorting draws their order
        distiller.memory.labels.copy_(torch.arange(1000))
    generator = torch.Generator().manual_seed(1)
    images, targets = torch.randn(16, 3, 32, 32, generator=generator), torch.arange(16)
    index = (3 * torch.arange(16, device=device),) if getattr(distiller, "needs_index", False) else ()
    rand = torch.rand
    with monkeypatch.context() as patch:  # token positions and negatives, the same on both
        patch.setattr(torch, "rand", lambda *size, device=None: rand(*size, generator=generator).to(device))
        _, losses = distiller(images.to(device, memory_format=torch.channels_last), targets.to(device), *index)
    sum(losses.values()).backward()
    return ({key: value.item() for key, value in losses.items()},
            {key: value.grad.cpu() for key, value in distiller.named_parameters()})


@pytest.mark.parametrize("name", DISTILLERS)
def test_losses_and_gradients_are_those_of_the_cpu(name, monkeypatch):
    pick_device(Settings())  # float32 without TF32
    losses, gradients = losses_and_gradients(name, "cpu", monkeypatch)
    on_gpu, gradients_on_gpu = losses_and_gradients(name, "cuda", monkeypatch)
    assert on_gpu == pytest.approx(losses, rel=1e-3)
    rounding = 1e-5 * torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for key, gradient in gradients.items():
        assert (gradients_on_gpu[key] - gradient).norm() <= 0.01 * gradient.norm() + rounding, key


def build_run(name, graph, precision, batch_size, samples):
    cfg = Settings(batch_size=batch_size, precision=precision, distiller={"name": name} | ARGUMENTS.get(name, {}))
    device = pick_device(cfg)
    data = load_data("synthetic", samples=samples)
    train, test = (Loader(split, batch_size, mean=data.mean, std=data.std, train=split is data.train, device=device)
                   for split in (data.train, data.test))
    torch.manual_seed(0)
    networks = [MODELS[name]().to(device, memory_format=torch.channels_last) for name in ("resnet8", "resnet14")]
    run = engine.assemble(cfg, *networks, train, test, device, 1, graph=graph)
    set_learning_rates(run.optimizers, cfg.optimizer, cfg.connectors, 0, cfg.epochs)
    run.distiller.train()
    return run


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", DISTILLERS)
def test_a_step_does_not_wait_for_the_device(name, precision):
    """But for DPK's CKA, once, and for GradScaler, which looks for infinities once an optimizer."""
    run, table = build_run(name, False, precision, batch_size=64, samples=1000), Table(4, "cuda")

    def step(i):
        torch.manual_seed(i)
        forward_backward(run, *run.train_loader.batch(0, i), table, i)
        for optimizer in run.optimizers.values():
            run.scaler.step(optimizer)
            optimizer.zero_grad()
        run.scaler.update()

    step(0)
    step(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    assert len(waits) <= (name == "dpk") + (precision == "fp16") * len(run.optimizers), waits


def rows_and_weights(name, graph, precision, steps=4):
    """Of steps with 32, 32, 32 and 4 images, on weights that do not move."""
    run = build_run(name, graph, precision, batch_size=32, samples=100)
    train, table, gradients = run.train_loader, Table(steps, run.device), []
    captured = engine.prepare_graph(run, 0)
    assert (captured is not None) == graph
    for step in range(steps):
        torch.manual_seed(step)
        indices = train.choose(0, step)
        if not graph or not captured(indices, table, step):
            forward_backward(run, *train.load(indices), table, step)
        gradients.append([parameter.grad.clone() for parameter in run.distiller.parameters()])
        for optimizer in run.optimizers.values():
            optimizer.zero_grad()
    return table, gradients, {key: value.clone() for key, value in run.distiller.named_buffers()}


@pytest.mark.parametrize("precision, tolerance", [("fp32", 0.01), ("bf16", 0.1), ("fp16", 0.05)])
@pytest.mark.parametrize("name", DISTILLERS)
def test_a_graph_does_what_its_step_does(name, precision, tolerance):
    table, gradients, buffers = rows_and_weights(name, False, precision)
    table_of_graph, gradients_of_graph, buffers_of_graph = rows_and_weights(name, True, precision)
    assert table.names == table_of_graph.names
    torch.testing.assert_close(table_of_graph.rows, table.rows, rtol=tolerance, atol=tolerance)
    assert not torch.equal(table.rows[0], table.rows[1])
    for step, (graphed, plain) in enumerate(zip(gradients_of_graph, gradients)):
        graphed, plain = (torch.cat([gradient.flatten() for gradient in which]) for which in (graphed, plain))
        if plain.isfinite().all():
            assert (graphed - plain).norm() <= 2 * tolerance * plain.norm(), step
        else:  # fp16 at GradScaler's first scale, which it then lowers
            assert precision == "fp16" and not graphed.isfinite().all(), step
    for key, value in buffers.items():
        torch.testing.assert_close(buffers_of_graph[key], value, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize("name, overrides", [
    ("ce", ""), ("kd", "cuda_graph: false"), ("kd", "compile: true"), ("kd", "precision: fp16"),
    ("dpk", "cuda_graph: false"), ("dpk", ""), ("dpk", "compile: true")])
def test_a_run_stops_and_goes_on(name, overrides, tmp_path):
    """On a GPU the sums of two runs differ in their order: the same losses within a few per cent, not bit by bit."""
    torch.save({"model": MODELS["resnet14"]().state_dict()}, tmp_path / "teacher.pth")
    stages = "[{student: -1, teacher: -1, encoder: [8, 1, 2], decoder: [8, 1, 2]}]"
    (tmp_path / "run.yaml").write_text(
        "data: {name: synthetic, samples: 1000}\nstudent: {name: resnet8}\nepochs: 2\nbatch_size: 32\n"
        f"{overrides}\n"
        + (f"teacher: {{name: resnet14, checkpoint: {tmp_path}/teacher.pth}}\n" if name != "ce" else "")
        + f"distiller: {{name: {name}{', stages: ' + stages if name == 'dpk' else ''}}}\n")

    def run(*overrides):
        command = [sys.executable, "train_cifar.py", "--cfg", str(tmp_path / "run.yaml"), f"runs={tmp_path}/runs",
                   "device=cuda", *overrides]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "cuda_graph:" not in done.stderr
        return done.stdout

    run("name=whole")
    assert "goes on from there" in run("name=parts", "stop_after=0.1")
    run("name=parts")
    whole, parts = ([json.loads(line) for line in (tmp_path / "runs" / run_name / "log.jsonl").read_text().splitlines()]
                    for run_name in ("whole", "parts"))
    assert "NVIDIA" in whole[0]["hardware"] or torch.cuda.get_device_name() in whole[0]["hardware"]
    assert len(whole) == len(parts) == 3
    assert whole[1]["ce"] == pytest.approx(parts[1]["ce"], rel=0.1)
