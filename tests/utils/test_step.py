import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from distillers import DISTILLERS
from distillers.dpk import Block
from models import MODELS
from train_cifar import Settings
from utils import distributed, engine
from utils.data import Loader, Split, load_data
from utils.errors import InputError
from utils.log import Table
from utils.optim import ConnectorSettings
from utils.step import forward_backward

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
    settings = {"precision": "fp32", "distiller": {"name": name} | ARGUMENTS.get(name, {})} | settings
    cfg = Settings(batch_size=16, **settings)
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
    assert len(captures) == (2 if name in ("dkd", "reviewkd") else 1)  # they warm up: a weight would be stale
    assert rows[:, -1].tolist() == [16, 16, 16, 12] * 2
    # DPK's masks round otherwise than its dropped tokens.
    torch.testing.assert_close(rows[:4], expected[:4], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rows, expected, rtol=0.05, atol=1e-3)
    ours, theirs = graphed.distiller.state_dict(), plain.distiller.state_dict()
    for key, value in ours.items():  # BatchNorm's statistics and CRD's banks too: capturing leaves no trace
        torch.testing.assert_close(value, theirs[key], rtol=1e-2, atol=1e-3, msg=key)


@pytest.mark.parametrize("values", [[0.5, 1.0], [(0.5, 2), (1.0, 2)], [[0.5], [1.0]], ["half", "whole"]])
def test_a_graph_is_captured_again_where_set_epoch_changed_something(values, graphs_on_a_cpu):
    cfg, run = build_run("kd", graph=True)
    captures = graphs_on_a_cpu(run)
    run.distiller.set_epoch = lambda epoch: setattr(run.distiller, "weight", values[min(epoch, 1)])
    train(cfg, run, epochs=3)
    assert len(captures) == 2


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
    said = capsys.readouterr().err
    assert "cuda_graph: this distiller's step cannot be captured as one (called a synchronizing CUDA" in said
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


def test_a_fault_of_the_step_itself_is_not_the_graphs(graphs_on_a_cpu, monkeypatch):
    cfg, run = build_run("kd", graph=True)
    graphs_on_a_cpu(run)
    run.student.fc = torch.nn.Linear(7, 7)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(cfg, run)


@pytest.mark.parametrize("call", [1, 3, 4])  # the first and the last to warm up, the capture
@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
], ids=["allocator", "cublas", "driver"])
def test_a_full_gpu_is_no_fault_of_the_graph(graphs_on_a_cpu, monkeypatch, call, error):
    cfg, run = build_run("kd", graph=True)
    graphs_on_a_cpu(run)
    calls = itertools.count(1)

    def body(run):
        if next(calls) == call:
            raise error

    monkeypatch.setattr(run.graph, "_body", body)
    with pytest.raises(type(error)) as caught:
        train(cfg, run)
    assert caught.value is error


def test_a_full_gpu_behind_a_capture_that_cannot_end(graphs_on_a_cpu, monkeypatch):
    cfg, run = build_run("kd", graph=True)
    graphs_on_a_cpu(run)

    def graph(captured):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(RuntimeError, match="a previous error during capture"):
        train(cfg, run)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "plaincnn2", "mobilenetv2", "shufflenetv1",
                                  "shufflenetv2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_cast_once_answers_as_one_cast_in_every_step(name, dtype):
    torch.manual_seed(0)
    teacher = MODELS[name]().eval()
    images, answers = torch.randn(4, 3, 32, 32), []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", dtype):
            logits, features = teacher(images, return_features=True)
        answers.append([logits, *features["maps"], features["pooled"]])
        engine.cast_frozen(teacher, dtype)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*answers))
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32, dtype}


def test_only_the_teacher_is_cast_and_only_under_autocast():
    for precision, dtype in ("fp32", torch.float32), ("bf16", torch.bfloat16):
        run = build_run("dpk", graph=False, precision=precision)[1]
        assert run.teacher.fc.weight.dtype == dtype
        assert {parameter.dtype for parameter in run.distiller.parameters()} == {torch.float32}


def test_a_graph_for_cuda_and_one_process_alone():
    assert build_run("kd", graph=False)[1].graph is None
    assert build_run("kd", graph=True)[1].graph is not None
    assert not build_run("dpk", graph=False)[1].distiller.masked
    assert build_run("dpk", graph=True)[1].distiller.masked


def test_a_batch_leaves_scaled_gradients_and_a_row_of_the_table():
    weight, autocast = torch.ones(3, requires_grad=True), []

    def model(images, targets):
        autocast.append(torch.is_autocast_enabled("cpu"))
        return torch.eye(3)[[0, 1, 2, 2]], {"ce": weight.sum(), "kd": 2 * weight.sum()}

    run = SimpleNamespace(model=model, distiller=model, autocast=engine.build_autocast("bf16", torch.device("cpu")),
                          scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    table = Table(1, "cpu")
    forward_backward(run, None, torch.tensor([0, 1, 2, 0]), table, 0, accumulate=4)
    assert weight.grad.tolist() == [8 * 3 / 4] * 3 and autocast == [True]
    assert table.means() == {"ce": 3, "kd": 6, "train_top1": 75} and table.images() == 4


def test_seeds_epochs_steps_and_ranks_draw_each_their_own_and_a_resumed_run_the_same(monkeypatch):
    seeds = []

    def draw(run, images, targets, table, row, accumulate):
        seeds.append(torch.initial_seed())
        table.write(row, {"ce": 0.0}, {}, 0, len(images))

    monkeypatch.setattr(engine, "forward_backward", draw)
    cfg, run = build_run("ce", graph=False)
    for cfg.seed in 0, 1:
        for run.train_loader.rank in 0, 1:
            train(cfg, run)
    assert len(seeds) == len(set(seeds)) == 32
    train(cfg, run, first_step=2)
    assert seeds[32:] == seeds[26:28] + seeds[30:32]


@pytest.mark.parametrize("accumulate, expected", [(1, [True]), (3, [False, False, True])])
def test_processes_exchange_gradients_once_a_step_with_its_last_batch(accumulate, expected, monkeypatch):
    alone, exchanged = [], []

    @contextlib.contextmanager
    def no_sync():
        alone.append(True)
        yield
        alone.pop()

    def note(run, images, targets, table, row, accumulate):
        exchanged.append(not alone)
        table.write(row, {"ce": 0.0}, {}, 0, 1)

    monkeypatch.setattr(engine, "forward_backward", note)
    cfg, run = build_run("ce", graph=False)
    run.model, run.accumulate = SimpleNamespace(train=lambda: None, no_sync=no_sync), accumulate
    run.train_loader.epoch = lambda epoch, first_step: itertools.repeat((None, None))
    train(cfg, run, epochs=1)
    assert exchanged == expected * 4


def test_a_process_without_images_to_report_on_sees_the_same_ones():
    cfg, run = build_run("ce", graph=False)
    one, seen = Split(run.test_loader.images[:1], run.test_loader.labels[:1]), []
    for rank in 0, 1:
        test_loader = Loader(one, 16, mean=(0.5,) * 3, std=(0.25,) * 3, train=False, rank=rank, world=2)
        assert len(test_loader) == 1 - rank
        its = engine.assemble(cfg, run.student, None, run.train_loader, test_loader, run.device, 1)
        seen.append(its.images_checksum)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_parameter_of_both_optimizers_is_trained(precision):
    cfg, run = build_run("dpk", graph=False, precision=precision,
                         connectors=ConnectorSettings(optimizer="adamw", warmup_epochs=0))
    assert len(run.optimizers) == 2
    before = {name: parameter.clone() for name, parameter in run.distiller.named_parameters()}
    train(cfg, run, epochs=1)
    assert not [name for name, parameter in run.distiller.named_parameters() if parameter.equal(before[name])]


def test_connectors_follow_from_the_seed_alone():
    cfg, run = build_run("fitnet", graph=False)

    def connector(cfg, drawn):
        torch.manual_seed(drawn)
        again = engine.assemble(cfg, run.student, run.teacher, run.train_loader, run.test_loader, run.device, 1)
        return next(again.distiller.regressor.parameters())

    other = Settings(distiller={"name": "fitnet"}, precision="fp32", seed=1)
    assert connector(cfg, 5).equal(connector(cfg, 6)) and not connector(cfg, 5).equal(connector(other, 5))


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16),
                                              ("fp32", torch.float32)])
def test_products_have_the_precision_of_the_settings(precision, dtype):
    with engine.build_autocast(precision, torch.device("cpu"))():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_fp32_is_not_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    engine.pick_device(Settings(device="cpu"))
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


class Given(torch.nn.Module):
    """A network whose images are its logits."""

    def forward(self, logits):
        self.asked = self.training, torch.is_autocast_enabled("cpu")
        return logits


class Batches:
    """Batches of four images and of one, six classes, the first the most likely; a file that cannot be read."""
    device, unreadable = "cpu", 0

    def epoch(self, epoch):
        self.unreadable += 1
        for targets in [0, 1, 4, 5], [0]:
            yield torch.arange(6.0, 0.0, -1.0).expand(len(targets), 6), torch.tensor(targets)

    def check(self, unreadable):
        pass


def test_an_evaluation_is_over_images_in_eval_mode_with_rank_0s_buffers(monkeypatch):
    model, loader, given = Given(), Batches(), []
    monkeypatch.setattr(distributed, "broadcast_buffers", given.append)
    for _ in range(2):
        assert engine.evaluate(model, loader, engine.build_autocast("bf16", torch.device("cpu"))) == (40, 80)
        assert model.asked == (False, True) and loader.unreadable == 1
    assert given == [model, model]


@pytest.mark.parametrize("accuracy, refused", [(None, False), (60.0, False), (70.5, False), (70.6, True)])
def test_a_teacher_may_be_half_a_point_below_its_accuracy(accuracy, refused, monkeypatch):
    monkeypatch.setattr(engine, "evaluate", lambda model, *rest: (70.0 if model == "teacher" else 0.0, 90.0))
    cfg, run = Settings(), SimpleNamespace(teacher="teacher", student="student", teacher_file="t.pth", test_loader=None,
                                           autocast=None)
    cfg.teacher.accuracy = accuracy
    with pytest.raises(InputError, match="teacher.accuracy: t.pth") if refused else contextlib.nullcontext():
        engine.check_teacher(cfg, run, print)


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
