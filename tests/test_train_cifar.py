"""The program itself: whole runs, in this process where nothing is killed, else by subprocess."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import train_cifar
from models import MODELS
from utils import checkpoint, engine, stopping

ROOT = Path(__file__).parents[1]
SMALL = {"encoder": [8, 1, 2], "decoder": [8, 1, 2]}
DISTILLERS = {
    "ce": {"name": "ce"},
    "kd": {"name": "kd"},
    "fitnet": {"name": "fitnet", "student_stage": 1, "teacher_stage": 1},
    "ickd": {"name": "ickd"},
    "dpk": {"name": "dpk", "stages": [{"student": 2, "teacher": 2, **SMALL}]},
    "crd": {"name": "crd", "negatives": 64},
} | {name: {"name": name} for name in ("at", "sp", "pkt", "rkd", "vid", "cc", "nst", "ofd", "reviewkd", "dkd", "dist",
                                       "mlkd")}


@pytest.fixture(autouse=True)
def one_thread_and_own_signals():
    threads, handlers = torch.get_num_threads(), {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def config(tmp_path):
    """A function that writes a small YAML file, changed as asked, and returns its path."""
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "teacher.pth", {"model": MODELS["plaincnn4"]().state_dict()})

    def write(method="dpk", name="run.yaml", **changes):
        settings = {
            "runs": str(tmp_path / "runs"),
            "data": {"name": "synthetic", "samples": 300},
            "student": {"name": "plaincnn2"},
            "teacher": {"name": "plaincnn4", "checkpoint": str(tmp_path / "teacher.pth")},
            "distiller": DISTILLERS[method],
            "epochs": 2, "batch_size": 64, "log_every": 2, "precision": "fp32",
            "optimizer": {"milestones": []},
            "connectors": {"optimizer": "adamw" if method == "dpk" else "student", "warmup_epochs": 0},
        } | changes
        (tmp_path / name).write_text(yaml.safe_dump(settings))
        return str(tmp_path / name)

    return write


def run(*arguments, check=0, **options):
    """train_cifar.py as a process of its own."""
    result = subprocess.run([sys.executable, str(ROOT / "train_cifar.py"), "--cfg", *map(str, arguments)],
                            capture_output=True, text=True, cwd=options.pop("cwd", ROOT), timeout=240,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, **options)
    assert result.returncode == check, result.stdout + result.stderr
    return result


def run_two(port, script, *arguments, check=0):
    """A script in two processes of torchrun's; check=None: it may end as it will."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    result = subprocess.run([*command, *map(str, (script, *arguments))], capture_output=True, text=True, cwd=ROOT,
                            timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert check is None or result.returncode == check, result.stdout + result.stderr
    return result


def start(*arguments):
    return subprocess.Popen([sys.executable, str(ROOT / "train_cifar.py"), "--cfg", *map(str, arguments)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def log(folder):
    """A run's log without what differs from one machine and hour to the next."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    clocks = {"seconds", "images_per_s", "data_wait"}
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines[1:]]


def same_weights(a, b):
    a, b = (checkpoint.load(path, "test")["model"] for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method", DISTILLERS)
def test_a_run_leaves_plain_results(config, tmp_path, method, capsys):
    assert train_cifar.main(["--cfg", config(method)]) == 0
    folder = tmp_path / "runs" / "run"
    header, *epochs = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    assert {"run", "torch", "torchvision", "numpy", "python", "git", "hardware", "command", "processes"} <= set(header)
    assert [entry["epoch"] for entry in epochs] == [1, 2]
    losses = {"kd": ["kd"], "fitnet": ["hint"], "ickd": ["icc", "kd"], "rkd": ["distance", "angle"],
              "dkd": ["tckd", "nckd"], "dist": ["inter", "intra"], "mlkd": ["kd", "batch", "class"],
              "reviewkd": ["review"], "dpk": ["kd", "dpk_2", "cka_2", "ratio_2"]}.get(method, [method])
    for entry in epochs:
        assert {"top1", "top5", "lr", "images_per_s", "seconds", "train_top1", "ce", *losses} <= set(entry)
        assert 0 <= entry["top1"] <= entry["top5"] <= 100
    assert ("lr_connectors" in epochs[0]) == (method == "dpk")
    assert yaml.safe_load((folder / "config.yaml").read_text())["optimizer"]["lr"] == 0.05
    student = checkpoint.load(folder / "student.pth", "test")
    assert student["accuracy"] == epochs[-1]["top1"]
    MODELS["plaincnn2"]().load_state_dict(student["model"])
    state = checkpoint.load(folder / "latest.pth", "test")
    assert not any("teacher." in key for key in state["distiller"])  # DPK's teacher_encoder is no teacher
    connectors = {"fitnet": "regressor", "ickd": "projector", "dpk": "stages", "vid": "stages", "ofd": "connectors",
                  "cc": "teacher_embed", "crd": "memory.student_bank", "reviewkd": "fusions"}.get(method, "student")
    assert any(key.startswith(connectors) for key in state["distiller"])
    capsys.readouterr()
    assert train_cifar.main(["--cfg", config(method)]) == 0  # the same command again
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_and_memory_format(config, tmp_path, precision):
    path = config(precision=precision, channels_last=False, epochs=1, name=f"{precision}.yaml")
    assert train_cifar.main(["--cfg", path]) == 0
    entry = log(tmp_path / "runs" / precision)[-1]
    assert all(value is not None for value in entry.values())
    scale = checkpoint.load(tmp_path / "runs" / precision / "latest.pth", "test")["scaler"]
    assert bool(scale) == (precision == "fp16")


@pytest.mark.parametrize("cpu, precision, said", [
    ({"architecture": "x86_64", "avx2": True}, "bf16", True),
    ({"architecture": "x86_64", "avx2": True}, "fp32", False),
    ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False}, "bf16", True),
    ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": True}, "bf16", False),
    ({"architecture": "aarch64"}, "bf16", False)])
def test_bf16_is_said_to_be_slow_where_it_is_emulated(config, monkeypatch, capsys, cpu, precision, said):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    path = config("ce", precision=precision, epochs=1, device="cpu", data={"name": "synthetic", "samples": 100})
    assert train_cifar.main(["--cfg", path]) == 0
    error = capsys.readouterr().err
    assert ("precision=fp32 is several times faster" in error) == said and error.count("\n") == said


def test_a_finished_run_without_its_checkpoint_is_not_trained_again(config, tmp_path, capsys):
    path = config(epochs=1)
    assert train_cifar.main(["--cfg", path]) == 0
    student = next(tmp_path.rglob("student.pth"))
    (student.parent / "latest.pth").unlink()
    kept = student.read_bytes(), (student.parent / "log.jsonl").read_bytes()
    assert train_cifar.main(["--cfg", path, "optimizer.lr=0.5"]) == 2
    error = capsys.readouterr().err
    assert "name" in error and "latest.pth" in error and error.count("\n") == 1
    assert kept == (student.read_bytes(), (student.parent / "log.jsonl").read_bytes())
    student.unlink()  # the log alone is a result too
    assert train_cifar.main(["--cfg", path, "optimizer.lr=0.5"]) == 2
    assert kept[1] == (student.parent / "log.jsonl").read_bytes()


def test_two_processes_do_not_share_a_run(config, tmp_path):
    path = config(epochs=1000)
    first = start(path)
    while "epoch 1/" not in (line := first.stdout.readline()):
        assert line, "ended before its first epoch"
    refused = run(path, check=3).stderr
    assert refused.startswith(f"error: {path}: name: another process is at") and refused.count("\n") == 1
    first.terminate()
    assert first.wait(60) == 0  # and it has saved
    lines = log(tmp_path / "runs" / "run")
    assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))


def test_killed_at_any_instant_and_resumed_is_the_same_run(config, tmp_path):
    path = config(epochs=3)
    run(path, "name=whole")
    killed, rng = 0, np.random.default_rng(0)
    for _ in range(6):
        process = start(path, "name=killed")
        wait = rng.uniform(0.2, 1.5)
        while process.poll() is None and not (tmp_path / "runs/killed").exists():
            time.sleep(0.01)
        time.sleep(wait)
        if process.poll() is None:
            process.kill()
            killed += 1
        process.communicate()
    run(path, "name=killed")
    assert killed >= 2
    assert log(tmp_path / "runs/killed") == log(tmp_path / "runs/whole")
    assert same_weights(tmp_path / "runs/killed/student.pth", tmp_path / "runs/whole/student.pth")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_in_mid_epoch_and_leaves_cleanly(config, tmp_path, number):
    path = config(epochs=2, data={"name": "synthetic", "samples": 3000})
    process = start(path, "name=stopped")
    while not (tmp_path / "runs/stopped/log.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.4)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "the same command goes on" in output and "Traceback" not in output
    state = checkpoint.load(tmp_path / "runs/stopped/latest.pth", "test")
    assert state["epoch"] == 0 and 0 < state["step"] < 47  # in the middle of the first epoch
    assert f"step {state['step'] + 1}" in run(path, "name=stopped").stdout
    run(path, "name=whole")
    assert log(tmp_path / "runs/stopped") == log(tmp_path / "runs/whole")
    assert same_weights(tmp_path / "runs/stopped/student.pth", tmp_path / "runs/whole/student.pth")


def test_stop_after_leaves_by_itself_and_log_ahead_of_checkpoint_is_cut_back(config, tmp_path):
    path = config()
    folder = tmp_path / "runs/run"
    assert "saved at epoch 1, step 1" in run(path, "stop_after=0.1").stdout
    with open(folder / "log.jsonl", "a") as file:  # as if killed between the log's line and the checkpoint
        file.write('{"epoch": 1, "top1": 99.0}\n{"epoch": 2, "to')
    (folder / "latest.pth.partial").write_bytes(b"half a checkpoint")
    run(path)
    run(path, "name=whole")
    assert log(folder) == log(tmp_path / "runs/whole")


def test_stopped_after_the_last_step_of_an_epoch(config, tmp_path, monkeypatch):
    path = config(epochs=1)

    def at_the_last_step(self, now=False, **_):  # 300 images: four batches of 64 and one of 44
        self.asked = now
        return self.asked

    monkeypatch.setattr(stopping.Stopper, "__call__", at_the_last_step)
    assert train_cifar.main(["--cfg", path]) == 0
    assert checkpoint.load(tmp_path / "runs/run/latest.pth", "test")["step"] == 5
    monkeypatch.undo()
    assert train_cifar.main(["--cfg", path]) == 0
    assert train_cifar.main(["--cfg", path, "name=whole"]) == 0
    assert log(tmp_path / "runs/run") == log(tmp_path / "runs/whole")


def test_epochs_rates_and_the_best_go_on_after_a_stop(config, tmp_path, monkeypatch):
    tops, epochs, scalars = iter([1.0, 30.0, None, 20.0, 25.0]), [], []  # the first is the teacher's

    def evaluate(*args):
        if (top1 := next(tops)) is None:
            raise stopping.Stopped
        return top1, 50.0

    monkeypatch.setattr(engine, "evaluate", evaluate)
    monkeypatch.setattr(engine, "tensorboard_writer", lambda folder: SimpleNamespace(
        add_scalar=lambda *scalar: scalars.append(scalar)))
    monkeypatch.setattr(train_cifar.DISTILLERS["dkd"], "set_epoch", lambda self, epoch: epochs.append(epoch))
    path = config("dkd", epochs=3, optimizer={"milestones": [1, 2]}, tensorboard=True)
    for entries in 1, 3:
        assert train_cifar.main(["--cfg", path]) == 0
        assert len(log(tmp_path / "runs/run")) == entries
    entries = log(tmp_path / "runs/run")
    assert [(entry["top1"], entry["best_top1"]) for entry in entries] == [(30, 30), (20, 30), (25, 30)]
    assert [entry["lr"] for entry in entries] == pytest.approx([0.05, 0.005, 0.0005])
    assert epochs == [0, 1, 1, 2]
    assert [scalar for scalar in scalars if scalar[0] == "top1"] == [("top1", 30, 1), ("top1", 20, 2), ("top1", 25, 3)]
    assert checkpoint.load(tmp_path / "runs/run/student.pth", "test")["accuracy"] == 25


def test_the_time_of_an_epoch_counts_what_was_before_a_stop(config, tmp_path):
    path, file = config("ce", teacher={}), tmp_path / "runs/run/latest.pth"
    assert train_cifar.main(["--cfg", path, "stop_after=0.0001"]) == 0
    state = checkpoint.load(file, "test")
    state["clock"]["seconds"] += 1000
    checkpoint.save(file, state)
    assert train_cifar.main(["--cfg", path]) == 0
    first, second = map(json.loads, (tmp_path / "runs/run/log.jsonl").read_text().splitlines()[1:])
    assert first["seconds"] > 1000 > second["seconds"] and first["images_per_s"] < 300 / 1000 < second["images_per_s"]


def test_a_non_finite_loss_stops_with_its_name_and_keeps_the_checkpoint(config, tmp_path, monkeypatch, capsys):
    path = config("kd", epochs=3)
    real, calls = train_cifar.DISTILLERS["kd"].forward, []

    def poisoned(self, images, targets):
        logits, losses = real(self, images, targets)
        calls.append(0)
        if len(calls) == 8:  # the third step of the second epoch of five
            losses["kd"] = losses["kd"] * float("nan")
        return logits, losses

    monkeypatch.setattr(train_cifar.DISTILLERS["kd"], "forward", poisoned)
    assert train_cifar.main(["--cfg", path]) == 1
    error = capsys.readouterr().err
    assert "'kd'" in error and "epoch 2, step 3" in error and error.count("\n") == 1
    state = checkpoint.load(tmp_path / "runs/run/latest.pth", "test")
    assert (state["epoch"], state["step"]) == (0, 5)
    assert all(value.isfinite().all() for value in state["distiller"].values())
    monkeypatch.undo()
    assert train_cifar.main(["--cfg", path]) == 0


def test_a_stop_does_not_save_what_is_not_finite(config, tmp_path, monkeypatch, capsys):
    real, calls = train_cifar.DISTILLERS["kd"].forward, []

    def poisoned(self, images, targets):
        logits, losses = real(self, images, targets)
        calls.append(0)
        if len(calls) == 7:  # the second step of the second epoch, where nobody looks at the losses
            losses["kd"] = losses["kd"] * float("nan")
            stopping.SIGNALLED.append(time.monotonic())
        return logits, losses

    monkeypatch.setattr(train_cifar.DISTILLERS["kd"], "forward", poisoned)
    assert train_cifar.main(["--cfg", config("kd", log_every=1000)]) == 1
    assert "'kd'" in (error := capsys.readouterr().err) and "epoch 2, step 2" in error
    state = checkpoint.load(tmp_path / "runs/run/latest.pth", "test")
    assert (state["epoch"], state["step"]) == (0, 5)


def test_weights_that_are_not_finite_are_not_saved(config, tmp_path, capsys):
    assert train_cifar.main(["--cfg", config("ce", teacher={}, save_every=1, optimizer={"lr": 1e45})]) == 1
    error = capsys.readouterr().err
    assert "the weights are not finite after epoch 1, step 1" in error and "latest.pth" not in error
    assert not (tmp_path / "runs/run/latest.pth").exists()


def test_a_distiller_that_registers_its_teacher_is_refused(config, capsys, monkeypatch):
    class Holds(train_cifar.DISTILLERS["kd"]):
        def __init__(self, student, teacher):
            super().__init__(student, teacher)
            self.held = teacher

    monkeypatch.setitem(train_cifar.DISTILLERS, "kd", Holds)
    assert train_cifar.main(["--cfg", config("kd")]) == 2
    assert "kd holds the teacher as a module" in capsys.readouterr().err


def test_the_lock_comes_before_the_state_that_another_process_may_be_saving(config, tmp_path, capsys):
    path = config("kd", epochs=1)
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/latest.pth").write_text("half written")
    code = f"""
import pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
from utils.state import lock
file = lock(pathlib.Path({str(tmp_path / "runs/run/.lock")!r}))
print("locked", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        assert train_cifar.main(["--cfg", path]) == 3
        assert "another process is at" in capsys.readouterr().err
        student = config("kd", name="student.yaml", teacher={
            "name": "plaincnn2", "checkpoint": str(tmp_path / "none.pth"), "cfg": str(path), "train": True})
        assert train_cifar.main(["--cfg", student]) == 3
        other.kill()
    assert "teacher.cfg" in (error := capsys.readouterr().err) and "another process is at" in error


def test_a_state_that_does_not_fit_is_one_line(config, tmp_path, capsys):
    path, latest = config("ce", teacher={}, epochs=1), tmp_path / "runs/run/latest.pth"
    assert train_cifar.main(["--cfg", path, "stop_after=0.0001"]) == 0

    load_data = train_cifar.load_data

    def ten_classes(*args, **kwargs):
        return load_data(*args, **kwargs)._replace(classes=[str(i) for i in range(10)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_cifar, "load_data", ten_classes)
        assert train_cifar.main(["--cfg", path]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "data.root: other images or classes than" in error
        state = checkpoint.load(latest, "test")
        del state["images"]  # an old file, which does not say
        checkpoint.save(latest, state)
        assert train_cifar.main(["--cfg", path]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "latest.pth does not fit" in error and "size mismatch" in error


def test_a_run_does_not_go_on_under_another_teacher(config, tmp_path, capsys):
    """As after its file was trained anew."""
    path, file = config("kd", epochs=1), tmp_path / "teacher.pth"
    assert train_cifar.main(["--cfg", path, "stop_after=0.0001"]) == 0
    first = file.read_bytes()
    checkpoint.save(file, {"model": MODELS["plaincnn4"]().state_dict()})
    capsys.readouterr()
    assert train_cifar.main(["--cfg", path]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"teacher: {file} holds other weights than" in error
    file.write_bytes(first)
    assert train_cifar.main(["--cfg", path]) == 0


def test_bad_optimizers_are_found_before_the_teacher_is_trained(config, tmp_path, capsys):
    path = config("kd", teacher={"name": "plaincnn4", "checkpoint": str(tmp_path / "none.pth"), "train": True,
                                 "cfg": config("ce", name="teacher.yaml", student={"name": "plaincnn4"}, teacher={})})
    assert train_cifar.main(["--cfg", path, "connectors.betas=[0.9,1.5]"]) == 2
    assert "connectors.betas" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_seed_may_be_any_number_and_a_lost_log_is_no_error(config, tmp_path):
    path = config("kd", epochs=1, seed=2**64)
    assert train_cifar.main(["--cfg", path]) == 0
    entries = log(tmp_path / "runs/run")
    (tmp_path / "runs/run/log.jsonl").unlink()
    assert train_cifar.main(["--cfg", path]) == 0
    assert log(tmp_path / "runs/run") == entries  # the last epoch is evaluated anew


def test_a_seed_reaches_the_student_the_connectors_and_the_order_of_images(config):
    def drawn(seed):
        cfg = train_cifar.read_settings(config("dpk"), [f"seed={seed}"])
        run = train_cifar.set_up(cfg, 0, 1, torch.device("cpu"))
        return next(run.student.parameters()), next(run.distiller.stages.parameters()), run.train_loader.choose(0, 0)

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(a.equal(b) for a, b in zip(first, again)) and not any(a.equal(b) for a, b in zip(first, other))


def test_crd_has_a_row_for_each_training_image(config):
    run = train_cifar.set_up(train_cifar.read_settings(config("crd")), 0, 1, torch.device("cpu"))
    assert len(run.distiller.memory.student_bank) == len(run.train_loader.labels) == 300


def test_each_process_has_its_own_images(config):
    cfg = train_cifar.read_settings(config("kd"))
    data = train_cifar.load_data("synthetic", samples=300)
    [whole, (train, test)] = [[torch.cat(parts) for parts in zip(*(
        [loader.choose(0, 0) for loader in train_cifar.build_loaders(cfg, data, rank, world, "cpu")]
        for rank in range(world)))] for world in (1, 2)]
    assert sorted(train.tolist()) == sorted(whole[0].tolist()) and len(train) == 64
    assert sorted(test.tolist()) == sorted(whole[1].tolist()) == list(range(60))


def test_validation_split_reports_on_held_out_training_images(config, tmp_path):
    assert train_cifar.main(["--cfg", config("kd"), "val_split=100", "epochs=1"]) == 0
    top1 = log(tmp_path / "runs/run")[-1]["top1"]
    assert top1 == round(top1)  # of 100 images; the test set has 60


def test_two_processes_are_one_run(config, tmp_path):
    path = config(epochs=1, device="cpu")

    def two(*arguments):
        return run_two(29541, ROOT / "train_cifar.py", "--cfg", path, *arguments).stdout

    two("name=two", "val_split=7")  # 7 images on 2 processes
    assert log(tmp_path / "runs/two")[-1]["top1"] in [pytest.approx(100 * n / 7) for n in range(8)]
    assert train_cifar.main(["--cfg", path, "--eval", str(tmp_path / "runs/two/student.pth"), "val_split=7"]) == 0
    assert "saved at epoch 1, step 2" in two("name=stopped", "stop_after=0.1")  # all agree, where log_every divides
    rows = checkpoint.load(tmp_path / "runs/stopped/latest.pth", "test")["table"]["rows"]
    assert rows[:3, -1].tolist() == [64, 64, 0]  # the images of both processes, none twice
    assert "is finished" not in two("name=stopped")
    assert "is finished" in two("name=stopped")
    (tmp_path / "runs/file").touch()  # rank 0 alone finds that it cannot write there
    result = run_two(29541, ROOT / "train_cifar.py", "--cfg", path, "name=file", check=None)
    assert f"cannot write {tmp_path}/runs/file/.lock" in result.stderr and result.returncode
    assert "Connection" not in result.stderr and result.stderr.count("error: ") == 1


def test_crds_banks_are_the_same_on_both_processes_and_not_sent_around(config, tmp_path):
    (tmp_path / "banks.py").write_text(f"""
import sys
import torch.distributed as dist
sys.path.insert(0, {str(ROOT)!r})
import train_cifar
from utils import engine
one_epoch = engine.train_one_epoch

def train_one_epoch(cfg, run, *arguments):
    before, steps = run.distiller.memory.student_bank.clone(), one_epoch(cfg, run, *arguments)
    both = [None, None]
    dist.all_gather_object(both, dict(run.distiller.memory.state_dict()))
    assert not run.model.will_sync_module_buffers() and not before.equal(run.distiller.memory.student_bank)
    assert all(both[0][key].equal(both[1][key]) for key in both[0])
    return steps

engine.train_one_epoch = train_one_epoch
sys.exit(train_cifar.main(sys.argv[1:]))
""")
    run_two(29544, tmp_path / "banks.py", "--cfg", config("crd", device="cpu"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are listed in /proc, on Linux")
def test_no_thread_of_the_process_groups_is_left_at_the_end(config, tmp_path):
    """One that still holds tensors aborts the program while the interpreter ends, now and then."""
    (tmp_path / "ends.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_cifar
code = train_cifar.main(sys.argv[1:])
threads = [open(f"/proc/self/task/{{thread}}/comm").read() for thread in os.listdir("/proc/self/task")]
assert code == 0 and not [name for name in threads if "gloo" in name], (code, threads)
""")
    for arguments in [], ["name=stopped", "stop_after=0.1"]:
        run_two(29543, tmp_path / "ends.py", "--cfg", config(epochs=1, device="cpu"), *arguments)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """DDP over two gloo processes, half a batch each, against the whole batch; BatchNorm in eval mode.

    Losses that compare the images of a batch with each other compare those of one process: their gradient is the mean
    over the halves.
    """
    code = '''
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from distillers import DISTILLERS
from models import MODELS
dist.init_process_group("gloo")
torch.set_num_threads(1)
relational = {"sp", "pkt", "rkd", "cc", "dist", "mlkd"}
for name in [name for name in DISTILLERS if name not in ("crd", "dpk")]:
    torch.manual_seed(0)
    distiller = DISTILLERS[name](MODELS["plaincnn2"](), MODELS["plaincnn4"]()).eval()
    images, targets = torch.randn(8, 3, 32, 32), torch.arange(8)
    for rows in [slice(0, None, 2), slice(1, None, 2)] if name in relational else [slice(None)]:
        sum(distiller(images[rows], targets[rows])[1].values()).backward()
    whole = [p.grad / (2 if name in relational else 1) for p in distiller.parameters()]
    distiller.zero_grad()
    rank, model = dist.get_rank(), DistributedDataParallel(distiller)
    sum(model(images[rank::2], targets[rank::2])[1].values()).backward()
    size = torch.stack([a.norm() for a in whole]).norm()
    for a, b in zip(whole, distiller.parameters()):
        assert (a - b.grad).norm() <= 1e-5 * a.norm() + 1e-6 * size, (name, (a - b.grad).norm(), a.norm(), size)
del model  # it holds the group, whose threads must end before the interpreter does
dist.destroy_process_group()
'''
    (tmp_path / "two.py").write_text(code)
    run_two(29542, tmp_path / "two.py", ROOT)


# ----------------------------------------------------------------------------------------------------------- teachers


def test_a_missing_teacher_is_one_line_or_is_trained(config, tmp_path, capsys):
    teacher = config("ce", name="teacher.yaml", epochs=1, student={"name": "plaincnn4"}, teacher={})
    missing = {"name": "plaincnn4", "checkpoint": str(tmp_path / "runs/teacher/student.pth"), "cfg": teacher}
    path = config("kd", teacher=missing, epochs=1, precision="bf16", val_split=100)
    assert train_cifar.main(["--cfg", path]) == 2
    assert f"is missing; name another file, or train it first: teacher.train=true teacher.cfg={teacher}\n" in (
        capsys.readouterr().err)
    assert train_cifar.main(["--cfg", path, "teacher.train=true", "stop_after=0.1"]) == 0
    assert f"{tmp_path}/runs/teacher: saved at epoch 1, step 1" in capsys.readouterr().out
    assert train_cifar.main(["--cfg", path, "teacher.train=true"]) == 0
    assert checkpoint.load(missing["checkpoint"], "test")["data"]["val_split"] == 100  # as the student
    assert "precision: bf16" in (tmp_path / "runs/teacher/config.yaml").read_text()
    capsys.readouterr()
    assert train_cifar.main(["--cfg", path, "teacher.train=true", "name=second"]) == 0
    assert "teacher: finished" not in capsys.readouterr().out  # cached
    elsewhere = str(tmp_path / "elsewhere.pth")
    assert train_cifar.main(["--cfg", path, "teacher.train=true", "name=third", f"teacher.checkpoint={elsewhere}"]) == 0
    assert same_weights(elsewhere, missing["checkpoint"])


def test_two_processes_train_a_teacher_a_student_and_its_baseline(config, tmp_path):
    alone = config("ce", name="alone.yaml", epochs=1, teacher={})
    teacher = config("ce", name="teacher.yaml", epochs=1, student={"name": "plaincnn4"}, teacher={})
    path = config("kd", epochs=1, device="cpu", baseline=alone, teacher={
        "name": "plaincnn4", "checkpoint": str(tmp_path / "new.pth"), "cfg": teacher, "train": True})
    result = run_two(29545, ROOT / "train_cifar.py", "--cfg", path)
    assert result.stdout.count("difference") == 1
    assert same_weights(tmp_path / "new.pth", tmp_path / "runs/teacher/student.pth")
    for name in "teacher", "run", "alone":
        assert result.stdout.count(f"{tmp_path}/runs/{name}: finished") == 1
        assert json.loads((tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()[0])["processes"] == 2


def test_ctrl_c_before_there_is_anything_to_save(config, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_cifar, "load_data", interrupted)
    assert train_cifar.main(["--cfg", config("ce")]) == 130 and capsys.readouterr().err == "stopped\n"


def test_a_teacher_of_ours_that_saw_other_data_is_said_to_have(config, tmp_path, capsys):
    teacher = config("ce", name="teacher.yaml", epochs=1, student={"name": "plaincnn4"}, teacher={})
    file = tmp_path / "runs/teacher/student.pth"
    path = config("kd", teacher={"name": "plaincnn4", "checkpoint": str(file), "cfg": teacher, "train": True}, epochs=1)
    assert train_cifar.main(["--cfg", path]) == 0 and not capsys.readouterr().err
    assert checkpoint.load(file, "test")["data"] == {"data.name": "synthetic", "data.size": 32, "data.samples": 300,
                                                     "val_split": 0}
    assert train_cifar.main(["--cfg", path, "name=held_out", "val_split=100"]) == 0
    warning = f"{file} was trained with val_split=0, here it is 100\n"
    assert capsys.readouterr().err == f"teacher.checkpoint: {warning}"
    assert train_cifar.main(["--cfg", path, "val_split=100", "--eval", str(file)]) == 0
    assert capsys.readouterr().err == f"--eval: {warning}"
    names = checkpoint.load(file, "test")["classes"]
    checkpoint.save(file, checkpoint.load(file, "test") | {"classes": [*names[:-1], "dog"]})
    for key, argument in ("teacher.checkpoint", "name=renamed"), ("--eval", f"--eval={file}"):
        assert train_cifar.main(["--cfg", path, argument]) == 2
        assert f"{key}: {file} was trained on other classes: dog there is {names[-1]} here" in capsys.readouterr().err
    checkpoint.save(file, checkpoint.load(file, "test") | {"data": "of another project", "classes": 100})
    assert train_cifar.main(["--cfg", path, "name=foreign"]) == 0 and not capsys.readouterr().err
    assert train_cifar.main(["--cfg", path, "name=foreign_held_out", "val_split=100"]) == 0
    assert f"{file} does not say on what it was trained" in capsys.readouterr().err


def test_a_baseline_of_other_data_is_refused_first_and_one_of_another_length_named_last(config, tmp_path, monkeypatch,
                                                                                        capsys):
    alone = config("ce", name="alone.yaml", epochs=1, teacher={})
    path = config("kd", epochs=1, baseline=alone)
    accuracies = iter([50.0, 40.0, 30.5])  # the teacher, its student, and the student alone
    with monkeypatch.context() as patch:
        patch.setattr(engine, "evaluate", lambda *_: (next(accuracies), 60.0))
        assert train_cifar.main(["--cfg", path]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split() for line in out[-3:]] == [
        ["alone", "top-1", "30.50"], ["run", "top-1", "40.00"], ["difference", "+9.50"]]
    assert train_cifar.main(["--cfg", path, "name=longer", "epochs=2", "seed=1"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "not of the method alone: epochs is 1 in the first, 2 in the second",
        "not of the method alone: seed is 0 in the first, 1 in the second"]
    error = refused(capsys, path, "name=fewer", "data.samples=200")
    assert "baseline" in error and "alone.yaml" in error and "data.samples" in error
    error = refused(capsys, path, "name=alone")
    assert "baseline" in error and "name: alone is also the name of this run" in error
    (tmp_path / "runs/alone/latest.pth").unlink()
    assert "no latest.pth to go on from" in refused(capsys, path, "name=fewer")
    assert not (tmp_path / "runs/fewer").exists()


def test_a_baseline_whose_own_teacher_is_missing_is_refused_before_the_run(config, tmp_path, capsys):
    gone, file = tmp_path / "gone.pth", tmp_path / "teacher.pth"
    gone.write_bytes(file.read_bytes())
    other = config("fitnet", name="other.yaml", epochs=1, teacher={"name": "plaincnn4", "checkpoint": str(gone)})
    path = config("kd", epochs=1, baseline=other)
    assert train_cifar.main(["--cfg", path]) == 0
    gone.unlink()
    assert train_cifar.main(["--cfg", path, "name=second"]) == 0  # the baseline is finished and needs it no more
    shutil.rmtree(tmp_path / "runs/other")
    capsys.readouterr()
    error = refused(capsys, path, "name=third")
    assert "baseline" in error and f"other.yaml: teacher.checkpoint: {gone} is missing" in error
    assert not (tmp_path / "runs/third").exists()
    assert "is missing" in refused(capsys, path, "name=third", "distiller={name: ce}", f"teacher.checkpoint={gone}")
    teacher = config("ce", name="t.yaml", epochs=1, student={"name": "plaincnn4"}, teacher={})
    assert train_cifar.main(["--cfg", path, "name=third", f"teacher.checkpoint={gone}", "teacher.train=true",
                             f"teacher.cfg={teacher}"]) == 0  # the same file, which this run makes


def test_teachers_accuracy_is_printed_and_checked(config, capsys):
    assert train_cifar.main(["--cfg", config("kd", epochs=1), "teacher.accuracy=50"]) == 2
    captured = capsys.readouterr()
    assert "top-1 " in captured.out and "more than 0.5 below 50" in captured.err
    assert train_cifar.main(["--cfg", config("kd", epochs=1), "teacher.accuracy=0.4"]) == 0


def test_eval_of_student_and_teacher_and_of_neither(config, tmp_path, capsys):
    path = config("kd", epochs=1)
    assert train_cifar.main(["--cfg", path]) == 0
    files = {"teacher.pth": "plaincnn4", "runs/run/student.pth": "plaincnn2", "runs/run/latest.pth": "plaincnn2"}
    for file, name in files.items():
        capsys.readouterr()
        assert train_cifar.main(["--cfg", path, "--eval", str(tmp_path / file)]) == 0
        assert f"{name}, top-1" in capsys.readouterr().out
    expected = log(tmp_path / "runs/run")[-1]["top1"]
    assert train_cifar.main(["--cfg", path, "--eval", str(tmp_path / "runs/run/student.pth")]) == 0
    assert f"top-1 {expected:.2f}" in capsys.readouterr().out
    checkpoint.save(tmp_path / "other.pth", MODELS["resnet8"]().state_dict())
    assert train_cifar.main(["--cfg", path, "--eval", str(tmp_path / "other.pth")]) == 2
    error = capsys.readouterr().err
    assert "plaincnn2" in error and "plaincnn4" in error
    assert train_cifar.main(["--cfg", path, "--eval", ""]) == 2  # as from a shell variable that is not set
    assert "--eval:  is missing" in capsys.readouterr().err


def test_a_file_that_the_system_refuses_gets_one_line(capsys):
    def fail(*reason):
        raise OSError(*reason)

    assert engine.exit_code("a.yaml", lambda: fail(13, "Permission denied", "/a/closed/folder/t.pth")) == 2
    assert capsys.readouterr().err == "error: a.yaml: /a/closed/folder/t.pth: Permission denied\n"
    with pytest.raises(OSError, match="no file"):  # what is not of a file keeps its traceback
        engine.exit_code("a.yaml", lambda: fail("no file"))


def test_a_path_that_is_too_long_gets_one_line(config, capsys):
    assert "File name too long" in refused(capsys, config("kd", epochs=1), f"teacher.checkpoint={'a' * 300}")


def test_under_torchrun_one_process_evaluates(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert train_cifar.main(["--cfg", config("kd", epochs=1), "--eval", str(tmp_path / "teacher.pth")]) == 0
    assert not capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, *arguments):
    """The one line that a bad input gets."""
    assert train_cifar.main(["--cfg", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {arguments[0]}: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("override, words", [
    ("optimizer.lr=-0.1", ["optimizer.lr", "-0.1", "more than 0"]),
    ("optimizer.lr=fast", ["optimizer.lr", "'fast'", "float"]),
    ("optimizer.learning_rate=0.1", ["optimizer.learning_rate", "nearest"]),
    ("optimiser.lr=0.1", ["optimiser", "nearest: optimizer"]),
    ("epochs=0", ["epochs", "at least 1"]),
    ("epochs=2.5", ["epochs", "int"]),
    ("batch_size=true", ["batch_size", "int"]),
    ("precision=fp8", ["precision", "bf16, fp16, fp32"]),
    ("student.name=resnet21", ["student.name", "resnet20"]),
    ("teacher.name=resnet21", ["teacher.name", "resnet20"]),
    ("distiller.name=kdd", ["distiller.name", "ce, kd, fitnet, at,"]),
    ("distiller.temprature=4", ["distiller.temprature", "nearest: temperature"]),
    ("distiller.temperature=0", ["distiller.temperature: 0"]),
    ("distiller.kd_weight=-1", ["distiller", "negative"]),
    ("distiller.stages=[{student: 7}]", ["the student has no map 7", "2 of 64×8×8"]),
    ("distiller.stages=[{studnt: 1}]", ["nearest: student"]),
    ("distiller.stages=[{encoder: [30, 1, 4]}]", ["multiple of heads"]),
    ("distiller.stages=3", ["distiller.stages"]),
    ("distiller.stages=[3]", ["stages: 3"]),
    ("distiller.stages=[]", ["stages", "empty"]),
    ("distiller.stages=[{student: 1.5}]", ["student: 1.5"]),
    ("distiller.stages=[{weight: -1}]", ["weight: -1"]),
    ("distiller.stages=[{patch: 0}]", ["patch"]),
    ("distiller.stages=[{student: 1, teacher: 1, patch: 3}]", ["patch: 3", "16×16 for images of image_size 32"]),
    ("distiller.image_size=0", ["distiller.image_size: unknown key", "min_ratio"]),
    ("distiller.masked=true", ["distiller.masked: unknown key", "min_ratio"]),
    ("distiller={name: crd, num_samples: 9}", ["distiller.num_samples: unknown key", "negatives"]),
    ("distiller.name=[1]", ["distiller.name", "ce, kd, fitnet, at,"]),
    ("data.name=imagenet", ["data.name", "cifar100"]),
    ("data=cifar100", ["data", "section"]),
    ("nonsense", ["nonsense", "key.sub=value"]),
    ("=3", ["key.sub=value"]),
    ("val_split=300", ["val_split"]),
    ("val_split=299", ["data: 1 training images", "at least 4"]),
    ("batch_size=1", ["batch_size: 1", "valid: 2 or more"]),
    ("epochs=.inf", ["epochs: inf", "valid: int, finite"]),
    ("device=tpu", ["device", "cuda, cpu"]),
    ("teacher.checkpoint=nowhere.pth", ["teacher.checkpoint", "nowhere.pth", "is missing"]),
    ("runs=/proc/nowhere", ["runs", "cannot write"]),
])
def test_bad_settings_get_one_line(config, capsys, override, words):
    error = refused(capsys, config(epochs=1), override)
    for word in words:
        assert word in error


@pytest.mark.parametrize("text, words", [
    (None, ["cannot read"]), ("", ["mapping"]), ("- 1\n- 2", ["mapping"]), ("just text", ["mapping"]),
    ("a: [1", ["not YAML"]), ("a:\n\t- b: 1", ["not YAML"]),
])
def test_bad_yaml_files_get_one_line(tmp_path, capsys, text, words):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    error = refused(capsys, path)
    for word in words:
        assert word in error


def test_settings_of_a_longer_run_are_said_to_be(config, capsys):
    connectors = {"optimizer": "adamw", "warmup_epochs": 20}
    path = config("dpk", epochs=1, optimizer={"milestones": [150, 180]}, connectors=connectors)
    assert train_cifar.main(["--cfg", path]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "optimizer.milestones: 150, 180 never reached in a run of 1 epochs",
        "connectors.warmup_epochs: 20 epochs of warm-up do not end within the run's 1"]
    path = config("dkd", name="dkd.yaml", epochs=1)
    assert train_cifar.main(["--cfg", path, "name=second"]) == 0
    assert capsys.readouterr().err == "distiller.warmup_epochs: 20 epochs of warm-up do not end within the run's 1\n"
    path = config("dpk", name="sgd.yaml", epochs=1, connectors={"warmup_epochs": 20})
    assert train_cifar.main(["--cfg", path, "name=third"]) == 0
    assert capsys.readouterr().err.startswith("connectors.optimizer: DPK's transformers share the student's")


def test_a_run_says_and_keeps_the_distillers_defaults(config, tmp_path, capsys, monkeypatch):
    path = config("kd", epochs=1)
    assert train_cifar.main(["--cfg", path]) == 0
    folder = tmp_path / "runs/run"
    assert yaml.safe_load((folder / "config.yaml").read_text())["distiller"] == {
        "name": "kd", "ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0, "logit_standardization": False,
        "label_smoothing": 0.0}
    state = checkpoint.load(folder / "latest.pth", "test")
    state["config"]["distiller"] = {"name": "kd"}  # as files of earlier versions have it
    checkpoint.save(folder / "latest.pth", state)
    assert train_cifar.main(["--cfg", path]) == 0
    monkeypatch.setitem(train_cifar.DISTILLERS["kd"].__init__.__kwdefaults__, "temperature", 2.0)
    assert train_cifar.main(["--cfg", path]) == 0  # what it had before nobody knows
    checkpoint.save(folder / "latest.pth", state | {"config": state["config"] | {"distiller": {
        "name": "kd", "temperature": 4.0}}})
    assert "distiller.temperature: 2.0 now, 4.0 in" in refused(capsys, path)


def test_a_network_is_built_with_its_number_of_classes(config, monkeypatch):
    build = MODELS["plaincnn2"]
    monkeypatch.setitem(MODELS, "plaincnn2", lambda num_classes: build(num_classes=num_classes))  # no default
    assert train_cifar.main(["--cfg", config("kd", epochs=1)]) == 0


def test_numbers_without_a_dot_are_numbers(config, tmp_path):
    path = Path(config("ce", epochs=1, optimizer={}))
    path.write_text(path.read_text().replace("optimizer: {}", "optimizer: {lr: 5e-2, weight_decay: 5e-4}"))
    assert train_cifar.read_settings(path, ["optimizer.gamma=1e-1"]).optimizer == \
        train_cifar.OptimizerSettings(lr=0.05, weight_decay=0.0005, gamma=0.1)


def test_bad_teacher_files_get_one_line(config, tmp_path, capsys):
    file = tmp_path / "bad.pth"
    whole = (tmp_path / "x").with_name("teacher.pth")
    path = config("kd", epochs=1)
    file.write_bytes(whole.read_bytes()[:5000])
    assert "bad.pth" in refused(capsys, path, f"teacher.checkpoint={file}")
    checkpoint.save(file, MODELS["resnet8"]().state_dict())
    assert "plaincnn4" in refused(capsys, path, f"teacher.checkpoint={file}")
    checkpoint.save(file, MODELS["plaincnn4"](num_classes=10).state_dict())
    assert "(10, 64) in the file, (100, 64) here" in refused(capsys, path, f"teacher.checkpoint={file}")


def test_a_teacher_is_not_trained_by_the_file_of_another_network(config, tmp_path, capsys):
    other = config("ce", name="other.yaml", epochs=1, student={"name": "plaincnn2"}, teacher={})
    path = config("kd", teacher={"name": "plaincnn4", "checkpoint": str(tmp_path / "no.pth"), "cfg": other})
    error = refused(capsys, path, "teacher.train=true")
    assert "teacher.cfg" in error and "student.name: it trains plaincnn2, but teacher.name is plaincnn4" in error
    assert not (tmp_path / "no.pth").exists() and not (tmp_path / "runs/other").exists()
    assert "teacher.train=true teacher.cfg=FILE" in refused(capsys, path, "teacher.cfg=")


def test_images_of_one_class(config, tmp_path, capsys):
    for split in "train", "val":
        (tmp_path / "tree" / split / "cat").mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (32, 32)).save(tmp_path / "tree" / split / f"cat/{i}.png")
    data = {"name": "folder", "root": str(tmp_path / "tree")}
    assert "data.root: there is one class, cat; valid: two or more" in refused(capsys, config("ce", data=data))


def test_a_bad_companion_file_is_named(config, tmp_path, capsys):
    (tmp_path / "teacher.yaml").write_text("epoch: 3")
    path = config("kd", teacher={"name": "plaincnn4", "checkpoint": "no.pth", "cfg": str(tmp_path / "teacher.yaml")})
    error = refused(capsys, path, "teacher.train=true")
    assert "teacher.yaml" in error and "nearest: epochs" in error


def test_a_corrupt_or_foreign_latest_is_kept_and_named(config, tmp_path, capsys):
    path = config("kd", epochs=1)
    assert train_cifar.main(["--cfg", path]) == 0
    latest = tmp_path / "runs/run/latest.pth"
    error = refused(capsys, path, "optimizer.lr=0.1")
    assert "optimizer.lr" in error and "0.05" in error and "name=" in error
    content = latest.read_bytes()[:-500]
    latest.write_bytes(content)
    error = refused(capsys, path)
    assert "corrupt" in error and "move the folder away" in error and latest.read_bytes() == content


def test_a_folder_without_images_and_one_with_two_classes(config, tmp_path, capsys):
    from PIL import Image

    images = tmp_path / "images"
    settings = ["data.name=folder", f"data.root={images}"]
    path = config("ce", epochs=1, batch_size=4)
    assert str(images) in refused(capsys, path, *settings)
    for split in "train", "val":
        for label in "cat", "dog":
            (images / split / label).mkdir(parents=True)
    assert str(images) in refused(capsys, path, *settings)
    rng = np.random.default_rng(0)
    for split, n in ("train", 6), ("val", 3):
        for label in "cat", "dog":
            for i in range(n):
                picture = Image.fromarray(rng.integers(0, 255, (50, 40, 3), np.uint8))
                picture.save(images / split / label / f"{i}.png")
    assert train_cifar.main(["--cfg", path, *settings]) == 0
    assert log(tmp_path / "runs/run")[-1]["top5"] == 100  # of two classes
    for number, file in enumerate(["train/cat/0.png", "val/dog/0.png"]):  # one image fewer
        assert train_cifar.main(["--cfg", path, *settings, f"name=fewer{number}", "stop_after=0.0001"]) == 0
        (images / file).unlink()
        assert "other images or classes than" in refused(capsys, path, *settings, f"name=fewer{number}")


def test_a_full_disk_is_one_line_and_loses_nothing(config, tmp_path):
    path = config("kd", epochs=2)
    run(path, "stop_after=0.1")
    before = (tmp_path / "runs/run/latest.pth").read_bytes()

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    error = run(path, check=2, preexec_fn=small_files).stderr
    assert error.count("\n") == 1 and "cannot write" in error and "latest.pth" in error
    assert (tmp_path / "runs/run/latest.pth").read_bytes() == before
    assert not list((tmp_path / "runs/run").glob("*.partial"))
    run(path)


def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as leaving:
        train_cifar.main(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for word in "milestones=[150, 180, 210]", "val_split=0", "stop_after=0", "icc_weight=2.5", "fallback_ratio=0.9":
        assert word in text
    assert not any(f"distiller.{key}=" in text for key in engine.NO_SETTINGS)


# ----------------------------------------------------------------------------------------------- what the project ships


def test_the_shipped_teacher_fits_its_yaml():
    cfg = train_cifar.read_settings(ROOT / "yaml/kd_res56_res20.yaml")
    path = ROOT / cfg.teacher.checkpoint
    content = checkpoint.load(path, "test")
    model = checkpoint.fill_network(MODELS["resnet56"](), content, path, "resnet56", "test")
    assert content["accuracy"] == cfg.teacher.accuracy
    assert all(value.dtype == torch.float32 for value in model.parameters())


def test_the_quickstart(tmp_path):
    result = subprocess.run(
        [sys.executable, "train_cifar.py", "--cfg", "yaml/quickstart.yaml", f"runs={tmp_path}",
         f"teacher.checkpoint={tmp_path}/quickstart_teacher/student.pth"],
        capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "difference" in result.stdout.splitlines()[-1]
    teacher, alone, distilled = (log(tmp_path / name)[-1]["top1"] for name in
                                 ("quickstart_teacher", "quickstart_student", "quickstart"))
    assert teacher > 15 and distilled > 10 and distilled > alone > 3  # of 100 classes
