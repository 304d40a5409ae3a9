import contextlib
from types import SimpleNamespace

import pytest
import torch

from distillers import DISTILLERS
from distillers.dpk import Block
from models import MODELS
from train_cifar import Settings
from utils import engine
from utils.data import Loader, Split, load_data
from utils.errors import InputError
from utils.log import Table

STAGE = {"encoder": [8, 1, 2], "decoder": [8, 1, 2]}
ARGUMENTS = {"dpk": {"stages": [STAGE]}, "crd": {"negatives": 64}}


@pytest.fixture
def graphs_on_a_cpu(monkeypatch):
    """CUDA graphs for a run: a replay does the work again and leaves it in the tensors of the capture."""
    def install(run):
        parameters, captures = list(run.distiller.parameters()), []

        class Graph:
            def replay(self):
                run.graph._body(run)
                for gradient, parameter in zip(self.gradients, parameters):
                    gradient.copy_(parameter.grad)
                    parameter.grad = None

        @contextlib.contextmanager
        def graph(captured):
            yield
            captured.gradients = [parameter.grad for parameter in parameters]
            captures.append(captured)

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, replacement in (("Stream", lambda: stream), ("current_stream", lambda: stream),
                                  ("stream", lambda stream: contextlib.nullcontext()), ("graph", graph),
                                  ("set_sync_debug_mode", lambda mode: None), ("CUDAGraph", Graph)):
            monkeypatch.setattr(torch.cuda, name, replacement)
        return captures

    return install


def build_run(name, graph, device="cpu", **settings):
    """A run of batches of 16, 16, 16 and 12 synthetic images."""
    cfg = Settings(batch_size=16, precision="fp32", distiller={"name": name} | ARGUMENTS.get(name, {}), **settings)
    cfg.optimizer.lr = 0.01  # training makes more of rounding from step to step, and at 0.05 soon much more
    data = load_data("synthetic", samples=100)
    few = Split(data.train.images[:60], data.train.labels[:60])
    loaders = [Loader(split, 16, mean=data.mean, std=data.std, train=train, device=device)
               for split, train in ((few, True), (data.test, False))]
    torch.manual_seed(0)
    student, teacher = (MODELS[network]().to(device, memory_format=torch.channels_last)
                        for network in ("resnet8", "resnet14"))
    return cfg, engine.assemble(cfg, student, teacher, *loaders, torch.device(device), 1, graph=graph)


def never_stop(*args, **kwargs):
    return False


never_stop.any_failed, never_stop.total = False, 0


def train(cfg, run, epochs=2, first_step=0):
    """The rows of all steps."""
    rows = []
    for epoch in range(epochs):
        if hasattr(run.distiller, "set_epoch"):
            run.distiller.set_epoch(epoch)
        engine.set_learning_rates(run.optimizers, cfg.optimizer, cfg.connectors, epoch, epochs)
        table = Table(4, run.device)
        assert engine.train_one_epoch(cfg, run, epoch, first_step, table, {"waited": 0.0}, never_stop, None) == 4
        rows.append(table.rows)
    return torch.cat(rows)


@pytest.mark.parametrize("name", DISTILLERS)
def test_a_graph_and_its_last_smaller_batch_train_as_without(name, graphs_on_a_cpu):
    cfg, plain = build_run(name, graph=False)
    _, graphed = build_run(name, graph=True)
    captures = graphs_on_a_cpu(graphed)
    expected, rows = train(cfg, plain), train(cfg, graphed)
    assert len(captures) == (2 if hasattr(graphed.distiller, "set_epoch") else 1)  # else its numbers would be stale
    assert rows[:, -1].tolist() == [16, 16, 16, 12] * 2
    # DPK's masks round otherwise than its dropped tokens.
    torch.testing.assert_close(rows[:4], expected[:4], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rows, expected, rtol=0.05, atol=1e-3)
    ours, theirs = graphed.distiller.state_dict(), plain.distiller.state_dict()
    for key, value in ours.items():  # BatchNorm's statistics and CRD's banks too: capturing leaves no trace
        torch.testing.assert_close(value, theirs[key], rtol=1e-2, atol=1e-3, msg=key)


def test_capturing_leaves_no_gradients_for_a_resumed_run_whose_first_batch_is_the_smaller(graphs_on_a_cpu):
    cfg, plain = build_run("kd", graph=False)
    _, graphed = build_run("kd", graph=True)
    assert not graphs_on_a_cpu(graphed)
    assert torch.equal(train(cfg, plain, 2, first_step=3), train(cfg, graphed, 2, first_step=3))
    ours, theirs = graphed.distiller.state_dict(), plain.distiller.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


class Wait(torch.autograd.Function):
    """Waits for the device in the backward pass."""

    @staticmethod
    def forward(ctx, x, mode):
        ctx.mode = mode
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.mode[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")
        return gradient, None


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_that_waits_for_the_device_goes_on_without_a_graph(backward, graphs_on_a_cpu, monkeypatch, capsys):
    cfg, plain = build_run("kd", graph=False)
    _, waiting = build_run("kd", graph=True)
    graphs_on_a_cpu(waiting)
    mode, network = [], waiting.student.forward

    def forward(images):
        logits = network(images)
        if mode[-1:] == ["error"] and not backward:
            raise RuntimeError("called a synchronizing CUDA operation")
        return Wait.apply(logits, mode) if backward else logits

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)
    waiting.student.forward = forward
    assert torch.equal(train(cfg, plain), train(cfg, waiting))
    assert waiting.graph is None and mode[-1] == "default"
    assert "cuda_graph: a step of this distiller cannot be one (called a synchronizing CUDA" in capsys.readouterr().err
    ours, theirs = waiting.distiller.state_dict(), plain.distiller.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_capture_that_fails_ends_the_run_with_a_line(graphs_on_a_cpu, monkeypatch):
    cfg, run = build_run("kd", graph=True)
    graphs_on_a_cpu(run)

    @contextlib.contextmanager
    def graph(captured):
        yield
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(InputError, match="cuda_graph: operation not permitted when stream is capturing; valid: false"):
        train(cfg, run)


def test_a_graph_for_cuda_and_one_process_alone():
    assert build_run("kd", graph=False)[1].graph is None
    assert build_run("kd", graph=True)[1].graph is not None
    assert not build_run("dpk", graph=False)[1].distiller.masked
    assert build_run("dpk", graph=True)[1].distiller.masked


@pytest.mark.parametrize("graph", [False, True])
def test_compile_takes_networks_and_transformer_blocks_each_as_one_graph(graph, monkeypatch):
    torch.compiler.reset()
    compile, compiled = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: (
        compiled.append(module), compile(module, backend="eager", fullgraph=True)))
    rows = []
    for settings in {}, {"compile": True}:
        cfg, run = build_run("dpk", graph=graph, **settings)
        run.graph = None  # what it sets besides, masks, stays
        rows.append(train(cfg, run, epochs=1))
    assert compiled == [run.student, run.teacher, *(m for m in run.distiller.modules() if isinstance(m, Block))]
    assert len(compiled) == 5
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-4)
    assert not any("_orig_mod" in key for key in run.distiller.state_dict())
