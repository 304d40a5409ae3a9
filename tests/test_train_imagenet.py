"""The ImageNet script on real trees of small JPEGs: whole runs, several processes, faults."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image
from torch import nn

import train_imagenet
from models import IMAGENET_MODELS
from utils import checkpoint, engine, stopping

ROOT = Path(__file__).parents[1]
SMALL = {"encoder": [8, 1, 2], "decoder": [8, 1, 2]}
DISTILLERS = {
    "ce": {"name": "ce", "label_smoothing": 0.1},
    "kd": {"name": "kd"},
    "fitnet": {"name": "fitnet", "student_stage": 3, "teacher_stage": 3, "hint_weight": 1.0},
    "ickd": {"name": "ickd"},
    "dpk": {"name": "dpk", "stages": [{"student": 3, "teacher": 3, **SMALL}, {"student": 4, "teacher": 4, **SMALL}]},
    "crd": {"name": "crd", "negatives": 64},
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_HOME": "/nonexistent"}


@pytest.fixture(autouse=True)
def one_thread_and_own_signals():
    threads, handlers = torch.get_num_threads(), {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """96 + 7 JPEGs in 4 classes."""
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, n in ("train", 96), ("val", 7):
        for i in range(n):
            folder = root / split / f"n{i % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (6, 8, 3), np.uint8) // 2 + np.uint8(30 * (i % 4))
            Image.fromarray(pixels).resize((64, 48)).save(folder / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "resnet18.pth"
    checkpoint.save(path, {"model": IMAGENET_MODELS["resnet18"](num_classes=4).state_dict()})
    return path


@pytest.fixture
def config(tmp_path, tree, teacher):
    """A function that writes a small YAML file, changed as asked, and returns its path."""

    def write(method="dpk", name="run.yaml", **changes):
        settings = {
            "runs": str(tmp_path / "runs"),
            "data": {"root": str(tree), "size": 32, "workers": 1},
            "student": {"name": "shufflenet_v2_x0_5"},
            "teacher": {"name": "resnet18", "weights": str(teacher)},
            "distiller": DISTILLERS[method],
            "epochs": 2, "batch_size": 16, "log_every": 2, "save_every": 2, "precision": "fp32", "device": "cpu",
            "optimizer": {"lr": 0.01, "milestones": []},
            "connectors": {"optimizer": "adamw" if method == "dpk" else "student", "warmup_epochs": 0},
        } | changes
        (tmp_path / name).write_text(yaml.safe_dump(settings))
        return str(tmp_path / name)

    return write


def main(*arguments):
    return train_imagenet.main(["--cfg", *map(str, arguments)])


def start(*arguments, prefix=(sys.executable,), **options):
    options["env"] = ENVIRONMENT | options.get("env", {})
    return subprocess.Popen([*prefix, str(ROOT / "train_imagenet.py"), "--cfg", *map(str, arguments)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def start_two(path, port, first=(), second=()):
    """Two processes of one group, each with overrides of its own."""
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [start(path, *overrides, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank, overrides in enumerate((first, second))]


def torchrun(processes, port, *arguments):
    return (sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}",
            *arguments)


def finish(process, check=0, timeout=240):
    out, err = process.communicate(timeout=timeout)
    assert check is None or process.returncode == check, out + err
    return out, err


def log(folder):
    """A run's log without what differs from one machine and hour to the next."""
    clocks = {"seconds", "images_per_s", "data_wait"}
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines[1:]]


def same_weights(a, b):
    a, b = (checkpoint.load(Path(folder) / "student.pth", "test")["model"] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def wait_for(condition, process, seconds=120):
    """Until condition() holds, while the process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method", DISTILLERS)
def test_a_run_leaves_plain_results(config, tmp_path, method, capsys):
    path = config(method)
    assert main(path) == 0
    assert "16 images a step = 1 process × 1 × 16; 6 steps an epoch, 2 epochs" in capsys.readouterr().out
    folder = tmp_path / "runs/run"
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][1:]
    losses = {"ce": [], "kd": ["kd"], "fitnet": ["hint"], "ickd": ["icc", "kd"], "crd": ["crd"],
              "dpk": ["kd", "dpk_3", "dpk_4", "cka_3", "ratio_4"]}[method]
    for entry in entries:
        assert {"top1", "top5", "lr", "images_per_s", "seconds", "ce", *losses} <= set(entry)
        assert 0 <= entry["data_wait"] <= 1 and "unreadable" not in entry
    student = checkpoint.load(folder / "student.pth", "test")["model"]
    IMAGENET_MODELS["shufflenet_v2_x0_5"](num_classes=4).load_state_dict(student)
    assert main(path) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(path, "--eval", folder / "student.pth") == 0
    assert f"shufflenet_v2_x0_5, top-1 {entries[-1]['top1']:.2f}" in capsys.readouterr().out


def test_fake_data_half_precision_and_adamw(config, tmp_path, teacher):
    for precision in "bf16", "fp16":
        path = config("ickd", name=f"{precision}.yaml", data={"name": "fake", "samples": 40, "size": 32, "workers": 0},
                      teacher={"name": "mobilenetv1", "weights": str(tmp_path / "mobilenetv1.pth")},
                      optimizer={"name": "adamw", "lr": 2e-4, "warmup_epochs": 1, "schedule": "cosine"}, epochs=1,
                      precision=precision, accumulate=2)
        checkpoint.save(tmp_path / "mobilenetv1.pth", IMAGENET_MODELS["mobilenetv1"]().state_dict())
        assert main(path) == 0
        assert all(value is not None for value in log(tmp_path / "runs" / precision)[-1].values())


def test_the_student_starts_from_weights(config, tmp_path, teacher):
    path = config("kd", student={"name": "resnet18", "weights": str(teacher)}, optimizer={"lr": 1e-9}, epochs=1)
    assert main(path) == 0
    student = checkpoint.load(tmp_path / "runs/run/student.pth", "test")["model"]
    begun = checkpoint.load(teacher, "test")["model"]
    torch.testing.assert_close(student["conv1.weight"], begun["conv1.weight"])


class Plain(nn.Module):
    """A network without BatchNorm, for which batches can be split without a difference."""

    def __init__(self, num_classes=4, image_size=32):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(8, num_classes)

    def forward(self, x, return_features=False):
        x = self.conv(x).relu()
        logits = self.fc(x.mean((2, 3)))
        return (logits, {"maps": [x]}) if return_features else logits


@pytest.mark.parametrize("method", ["ce", "kd"])
def test_accumulated_batches_are_one_large_batch(config, tmp_path, method, monkeypatch):
    monkeypatch.setitem(IMAGENET_MODELS, "shufflenet_v2_x0_5", Plain)
    path = config(method, optimizer={"lr": 0.1})
    for parts in 1, 2, 4:
        assert main(path, f"accumulate={parts}", f"name=parts{parts}") == 0
    files = [tmp_path / f"runs/parts{parts}/student.pth" for parts in (1, 2, 4)]
    one, *others = (checkpoint.load(file, "test")["model"] for file in files)
    for other in others:
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-6)
    assert log(tmp_path / "runs/parts4")[-1]["ce"] == pytest.approx(log(tmp_path / "runs/parts1")[-1]["ce"], rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- faults


def test_killed_in_mid_epoch_with_workers_and_resumed_without_is_the_same_run(config, tmp_path):
    path = config(epochs=3)
    assert main(path, "name=whole", "save_every=0", "data.workers=0") == 0
    for at in (0, 2), (1, 4):
        process = start(path, "name=killed")

        def saved(at=at):
            file = tmp_path / "runs/killed/latest.pth"
            if file.exists():
                state = checkpoint.load(file, "test")
                return (state["epoch"], state["step"]) >= at

        wait_for(saved, process)
        process.kill()
        process.communicate()
    assert main(path, "name=killed", "data.workers=0") == 0
    assert log(tmp_path / "runs/killed") == log(tmp_path / "runs/whole")
    assert same_weights(tmp_path / "runs/killed", tmp_path / "runs/whole")


def children(process, rank):
    """The worker of that rank among torchrun's children."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == process.pid \
                    and f"\0RANK={rank}\0".encode() in (folder / "environ").read_bytes():
                return int(folder.name)
        except OSError:  # gone in the meantime
            continue
    raise AssertionError(f"no worker {rank}")


def test_a_killed_worker_is_restarted_and_its_log_is_that_of_an_undisturbed_run(config, tmp_path):
    path = config(epochs=3)
    finish(start(path, "name=whole", prefix=torchrun(2, 29551)))
    process = start(path, "name=killed", prefix=torchrun(2, 29552, "--max-restarts=3"))
    wait_for((tmp_path / "runs/killed/latest.pth").exists, process)
    os.kill(children(process, 1), signal.SIGKILL)
    out, err = finish(process)
    assert "going on at epoch" in out
    assert log(tmp_path / "runs/killed") == log(tmp_path / "runs/whole")
    assert same_weights(tmp_path / "runs/killed", tmp_path / "runs/whole")
    # the ratio, and with it the number of tokens, is that of all processes; a step's images are counted once
    assert log(tmp_path / "runs/whole")[-1]["train_top1"] * 96 / 100 % 1 == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("during", ["training", "evaluation"])
def test_sigterm_saves_and_exits_with_0(config, tmp_path, during):
    if during == "training":
        path = config(epochs=100, save_every=0)
    else:  # an evaluation that takes its time: 6,000 images after each step
        path = config("ce", epochs=100, data={"name": "fake", "samples": 16, "size": 32, "workers": 0}, teacher={})
    process = start(path, "name=stopped")
    wait_for((tmp_path / "runs/stopped/log.jsonl").exists, process)
    time.sleep(0.5)
    before = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = finish(process)
    assert time.monotonic() - before < 20 and "saved at epoch" in out and err == ""
    state = checkpoint.load(tmp_path / "runs/stopped/latest.pth", "test")
    assert (state["epoch"], state["step"]) > (0, 0)
    out, err = finish(start(path, "name=stopped", "stop_after=0.1"))
    assert f"going on at epoch {state['epoch'] + 1}, step {state['step'] + 1}" in out


def test_a_signal_during_evaluation_loses_nothing(config, tmp_path, monkeypatch):
    path = config("kd", epochs=1)
    real = engine.evaluate

    def interrupted(model, loader, autocast):
        if (tmp_path / "runs/run/latest.pth").exists():
            stopping.SIGNALLED.append(0.0)
        return real(model, loader, autocast)

    monkeypatch.setattr(engine, "evaluate", interrupted)
    assert main(path) == 0
    state = checkpoint.load(tmp_path / "runs/run/latest.pth", "test")
    assert (state["epoch"], state["step"]) == (0, 6) and log(tmp_path / "runs/run") == []
    monkeypatch.undo()
    assert main(path) == 0 and main(path, "name=whole") == 0
    assert log(tmp_path / "runs/run") == log(tmp_path / "runs/whole")


def test_sigterm_to_two_processes_saves_once(config, tmp_path):
    path = config(epochs=100, save_every=0)
    process = start(path, "name=stopped", prefix=torchrun(2, 29553))
    wait_for((tmp_path / "runs/stopped/log.jsonl").exists, process)
    time.sleep(1)
    workers = [children(process, rank) for rank in (0, 1)]
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
    out, err = finish(process)  # 0: both workers left with 0
    assert out.count("saved at epoch") == 1
    rows = checkpoint.load(tmp_path / "runs/stopped/latest.pth", "test")
    assert rows["table"]["rows"][: rows["step"], -1].tolist() == [16] * rows["step"]


SIGNALLED = '''
import multiprocessing, os, subprocess, sys, time
sys.path.insert(0, sys.argv.pop(1))
import train_imagenet
from distillers import DISTILLERS
real, calls, (method, then) = DISTILLERS["ce"].forward, [], os.environ["CASE"].split()
def slow(self, images, targets):
    calls.append(0)
    if len(calls) == 17:  # the first batch of the third step; the sender is another process, as it is in life
        subprocess.run([sys.executable, "-c", f"import os; os.killpg({os.getpgid(0)}, 15)"])
        if then == "fail":
            raise RuntimeError("unforeseen")
        time.sleep(8)
    return real(self, images, targets)
DISTILLERS["ce"].forward = slow
if __name__ == "__main__":  # not in the worker processes that read the images
    multiprocessing.set_start_method(method)
    sys.exit(train_imagenet.main())
'''


@pytest.mark.parametrize("then", ["save", "fail"])
@pytest.mark.parametrize("processes, method", [(1, "fork"), (1, "forkserver"), (2, "fork")])
def test_sigterm_to_whole_groups_is_not_for_the_workers(config, tmp_path, processes, method, then):
    """As torchrun and SLURM send it, the workers, and the server that they are forked from, have it too.

    The step goes on for 8 seconds and wants more batches than lie ready. An error instead ends the program.
    """
    (tmp_path / "slow.py").write_text(SIGNALLED)
    path = config("ce", teacher={}, epochs=100, save_every=0, batch_size=16 * processes, accumulate=8)
    prefix = torchrun(2, 29560) if processes == 2 else (sys.executable,)
    command = [*prefix, str(tmp_path / "slow.py"), str(ROOT), "--cfg", path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=ENVIRONMENT | {"CASE": f"{method} {then}"}, start_new_session=True)
    out, err = finish(process, 0 if then == "save" else 1)  # which waits for the workers too: they hold the pipes
    assert ("RuntimeError: unforeseen" in err) == (then == "fail") and "DataLoader worker" not in err, err
    if then == "save":
        assert out.count("saved at epoch 1, step 3") == 1
        assert checkpoint.load(tmp_path / "runs/run/latest.pth", "test")["step"] == 3


def test_a_stalled_process_ends_the_job_by_a_timeout(config, tmp_path):
    path = config(epochs=1000, timeout=5.0)
    both = start_two(path, 29554)
    wait_for((tmp_path / "runs/run/latest.pth").exists, both[0])
    both[1].send_signal(signal.SIGSTOP)
    before = time.monotonic()
    both[0].communicate(timeout=60)
    assert both[0].returncode != 0 and time.monotonic() - before < 30
    both[1].kill()
    both[1].communicate()


def test_a_loss_that_is_not_finite_on_one_process_ends_all_of_them(config, tmp_path):
    path = config("kd", epochs=50)
    code = '''
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import train_imagenet
from distillers import DISTILLERS
real, calls = DISTILLERS["kd"].forward, []
def poisoned(self, images, targets):
    logits, losses = real(self, images, targets)
    calls.append(0)
    if os.environ["RANK"] == "1" and len(calls) == 9:
        losses["kd"] = losses["kd"] * float("nan")
    return logits, losses
DISTILLERS["kd"].forward = poisoned
if __name__ == "__main__":  # not in the worker processes that read the images
    sys.exit(train_imagenet.main())
'''
    (tmp_path / "poisoned.py").write_text(code)
    command = [*torchrun(2, 29555), str(tmp_path / "poisoned.py"), str(ROOT), "--cfg", path]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert result.returncode == 1 and "loss 'kd' is not finite at epoch 2, step 3" in result.stderr
    state = checkpoint.load(tmp_path / "runs/run/latest.pth", "test")
    assert (state["epoch"], state["step"]) == (1, 2)
    assert all(value.isfinite().all() for value in state["distiller"].values())


def test_few_unreadable_images_are_named_counted_and_left_out(config, tmp_path, tree, monkeypatch, capsys):
    shutil.copytree(tree, tmp_path / "tree")
    path = config("kd", data={"root": str(tmp_path / "tree"), "size": 32, "workers": 0}, epochs=1, save_every=0)
    train, val = tmp_path / "tree/train/n0/4.jpg", tmp_path / "tree/val/n1/1.jpg"
    whole = train.read_bytes(), val.read_bytes()
    for file, kept, method in (train, whole[0][:-300], "kd"), (val, b"", "kd"), (val, b"", "ce"):  # 1 of 96, 1 of 7
        train.write_bytes(whole[0])
        val.write_bytes(whole[1])
        file.write_bytes(kept)
        distiller = f"distiller={{name: {method}}}"
        assert main(path, distiller, f"name={file.stem}_{method}") == 2
        error = capsys.readouterr().err
        assert f"{file.parent.name}/{file.name}: " in error.splitlines()[0]
        assert "more than 0.1 %" in error.splitlines()[-1] and "Traceback" not in error
    train.write_bytes(whole[0][:-300])
    monkeypatch.setattr("utils.images.UNREADABLE", 0.2)
    assert main(path) == 0
    error = capsys.readouterr().err
    assert "n0/4.jpg: " in error and "n1/1.jpg: " in error
    assert main(path, "--eval", tmp_path / "runs/run/student.pth") == 0
    assert "on 6 images" in capsys.readouterr().out
    [entry] = log(tmp_path / "runs/run")
    assert entry["unreadable"] == 2 and entry["top1"] in [pytest.approx(100 * n / 6) for n in range(7)]


def test_the_settings_of_augmentation_and_the_seed_reach_the_images(config):
    settings = {"root": "unused", "name": "fake", "size": 32, "workers": 0}
    path = config("kd", data=settings | {"randaugment": 9, "color_jitter": 0.4, "random_erasing": 0.1}, seed=7)
    cfg = train_imagenet.read_settings(path)
    images = train_imagenet.load_images(cfg, "train")
    names = [type(step).__name__ for step in images.augment.transforms]
    assert {"RandAugment", "ColorJitter", "RandomErasing"} <= set(names) and images.seed == 7
    plain = train_imagenet.load_images(train_imagenet.read_settings(config("kd", data=settings)), "train")
    assert not {"RandAugment", "ColorJitter", "RandomErasing"} & {
        type(step).__name__ for step in plain.augment.transforms}


def test_a_seed_reaches_the_student_and_the_order_of_images(config):
    def drawn(seed):
        cfg = train_imagenet.read_settings(config("kd"), [f"seed={seed}"])
        run = train_imagenet.set_up(cfg, 0, 1, torch.device("cpu"))
        return next(run.student.parameters()), torch.tensor(list(run.train_loader.order))

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(a.equal(b) for a, b in zip(first, again)) and not any(a.equal(b) for a, b in zip(first, other))


# -------------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("processes", [2, 3])
def test_every_validation_image_counts_once(config, tmp_path, processes, capsys):
    path = config("kd", epochs=1, batch_size=18)
    finish(start(path, prefix=torchrun(processes, 29556 + processes)))
    [entry] = log(tmp_path / "runs/run")
    assert entry["top1"] in [pytest.approx(100 * n / 7) for n in range(8)]
    assert main(path, "--eval", tmp_path / "runs/run/student.pth") == 0
    assert f"top-1 {entry['top1']:.2f}" in capsys.readouterr().out


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """DDP over two gloo processes, half a batch each, against the whole batch; BatchNorm in eval mode.

    DPK's ratio is the one of both processes, from HSIC terms averaged over them (Nguyen et al., eq. 2).
    """
    code = '''
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from distillers import DISTILLERS, dpk
from models import IMAGENET_MODELS
dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, real = dist.get_rank(), torch.rand
small = {"encoder": [16, 2, 4], "decoder": [16, 2, 4]}
arguments = {"fitnet": {"student_stage": 3, "teacher_stage": 3}, "ickd": {"projector_kernel": 3},
             "dpk": {"stages": [{"student": i, "teacher": i, **small} for i in (3, 4)], "min_ratio": 0.1}}
images, targets = torch.randn(12, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(12)
rows = slice(rank, None, 2)

def positions(rows):  # of the tokens, the same for an image wherever it is
    torch.rand = lambda B, N, device: real(12, N, generator=torch.Generator().manual_seed(1))[rows]

for name in "ce", "kd", "fitnet", "ickd", "dpk":
    torch.manual_seed(0)
    networks = IMAGENET_MODELS["shufflenet_v2_x0_5"](num_classes=12), IMAGENET_MODELS["resnet18"](num_classes=12)
    distiller = DISTILLERS[name](*networks, **arguments.get(name, {})).eval()
    positions(rows)
    model = DistributedDataParallel(distiller)
    sum(model(images[rows], targets[rows])[1].values()).backward()
    both = [p.grad.clone() for p in distiller.parameters()]
    distiller.zero_grad()
    if name == "dpk":
        with torch.no_grad():
            maps = [network(images, return_features=True)[1]["maps"] for network in networks]
        for i, stage in zip((3, 4), distiller.stages):
            student, teacher = stage.match(maps[0][i], maps[1][i]), maps[1][i]
            halves = [dpk.hsic_terms(student[half::2], teacher[half::2]) for half in (0, 1)]
            kl, kk, ll = (halves[0] + halves[1]) / 2
            assert abs(stage.cka - (kl / (kk * ll).sqrt()).item()) < 1e-5, (stage.cka, halves)
            everyone = [None, None]
            dist.all_gather_object(everyone, stage.cka)
            assert everyone[0] == everyone[1] and 0.1 < stage.cka < 0.9, everyone
            stage.ratio = distiller.metrics[f"ratio_{i}"]
    positions(slice(None))
    sum(distiller(images, targets)[1].values()).backward()
    whole = torch.stack([a.norm() for a in both]).norm()
    for (key, b), a in zip(distiller.named_parameters(), both):
        assert (a - b.grad).norm() <= 1e-5 * a.norm() + 1e-6 * whole, (name, key, (a - b.grad).norm(), a.norm(), whole)
del model  # it holds the group, whose threads must end before the interpreter does
dist.destroy_process_group()
'''
    (tmp_path / "two.py").write_text(code)
    result = subprocess.run([*torchrun(2, 29561), str(tmp_path / "two.py"), str(ROOT)], capture_output=True, text=True,
                            env=ENVIRONMENT, timeout=240)
    assert result.returncode == 0, result.stderr


def test_two_nodes(config, tmp_path):
    """Two network namespaces joined by a cable, torchrun in each, by its rendezvous."""
    names, commands = [f"dpk{os.getpid()}a", f"dpk{os.getpid()}b"], []
    try:
        probe = [subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode for name in names]
    except FileNotFoundError:
        probe = [1]
    try:
        if any(probe):
            pytest.skip("no network namespaces here")
        cable = ["ip", "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns",
                 names[1]]
        subprocess.run(cable, check=True)
        for i, name in enumerate(names):
            for command in f"addr add 10.77.0.{i + 1}/24 dev cable", "link set cable up", "link set lo up":
                subprocess.run(["ip", "-n", name, *command.split()], check=True)
        path = config(epochs=1)
        for i, name in enumerate(names):
            prefix = ("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                      "--nproc_per_node=1", f"--node_rank={i}", "--rdzv_id=1", "--rdzv_backend=c10d",
                      "--rdzv_endpoint=10.77.0.1:29562", f"--local_addr=10.77.0.{i + 1}",
                      f"--rdzv_conf=is_host={1 - i}")
            commands.append(start(path, prefix=prefix, env={"GLOO_SOCKET_IFNAME": "cable"}))
        for process in commands:
            finish(process)
        [entry] = log(tmp_path / "runs/run")
        header = json.loads((tmp_path / "runs/run/log.jsonl").read_text().splitlines()[0])
        assert header["processes"] == 2 and entry["train_top1"] * 96 / 100 % 1 == pytest.approx(0, abs=1e-6)
    finally:
        for process in commands:
            process.kill()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("override, words", [
    ("student.name=resnet19", ["student.name", "mobilenetv1", "resnet18"]),
    ("student.weights=IMAGENET1K_V9", ["student.weights", "IMAGENET1K_V1", "a file"]),
    ("teacher.weights=nowhere.pth", ["teacher.weights", "'nowhere.pth' is neither a file nor", "a file"]),
    ("teacher.weights=IMAGENET1K_V1", ["teacher.weights", "could not be downloaded", "resnet18-f37072fd.pth"]),
    ("teacher.name=resnet34", ["teacher.weights", "does not fit resnet34"]),
    ("teacher.accuracy=90", ["teacher.accuracy", "more than 0.5 below 90"]),
    ("student.name=alexnet", ["data.size", "alexnet does not take 32 pixels"]),
    ("data.root=/nowhere", ["data.root", "/nowhere/train"]),
    ("data.name=imagenet", ["data.name", "folder, fake"]),
    ("data.randaugment=31", ["data.randaugment: 31", "at most 30"]),
    ("data.random_erasing=1.5", ["data.random_erasing: 1.5", "at most 1"]),
    ("batch_size=1", ["batch_size: 1", "valid: 2 or more"]),
    ("batch_size=15", ["batch_size", "15"]),
    ("batch_size=200", ["batch_size", "96 training images are too few"]),
    ("accumulate=0", ["accumulate", "at least 1"]),
    ("optimizer.name=lamb", ["optimizer.name", "sgd, adamw"]),
    ("optimizer.betas=[1.0, 0.9]", ["optimizer.betas", "below 1"]),
    ("distiller.stages=[{student: 7}]", ["the student has no map 7", "4 of 1024×1×1"]),
    ("distiller.label_smoothing=2", ["label_smoothing", "between 0 and 1"]),
    ("timeout=0", ["timeout", "more than 0"]),
    ("device=cuda", ["device", "cuda is not available"]),
])
def test_bad_settings_get_one_line(config, capsys, monkeypatch, override, words):
    if override == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    path = config(epochs=1, **({"accumulate": 2} if override == "batch_size=15" else {}))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nonexistent")
    assert main(path, override) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error


def test_a_size_that_a_network_is_not_even_built_for(config, capsys):
    assert main(config(epochs=1), "student.name=vit_b_16", "data.size=40") == 2
    assert "data.size: vit_b_16 does not take 40 pixels" in capsys.readouterr().err


def test_a_gpu_that_refuses_is_no_wrong_size(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        train_imagenet.build_network("resnet18", "", "abcdefghij", train_imagenet.Settings(), "cpu", "student.weights")


@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>", b"Forbidden"])
def test_a_damaged_download(config, tmp_path, monkeypatch, capsys, content):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/shufflenetv2_x0.5-f707e7126e.pth").write_bytes(content)
    assert main(config("ce", epochs=1), "student.weights=IMAGENET1K_V1") == 2
    error = capsys.readouterr().err
    assert "student.weights: IMAGENET1K_V1 could not be downloaded or read" in error and error.count("\n") == 1
    assert f"into {tmp_path}/checkpoints" in error


class Spy:
    """Pickled, what touches a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_download_is_not_executed(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save({"spy": Spy(tmp_path / "executed")}, tmp_path / "checkpoints/shufflenetv2_x0.5-f707e7126e.pth")
    assert main(config("ce", epochs=1), "student.weights=IMAGENET1K_V1") == 2
    assert "could not be downloaded or read" in capsys.readouterr().err and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("student, weights, there", [
    ("shufflenet_v2_x0_5", "IMAGENET1K_V1", None),  # the teacher's of this name are there, and not what was asked for
    ("mobilenetv1", "IMAGENET1K_V1", "resnet18"),  # torchvision has none of this network
])
def test_eval_of_torchvisions_weights_is_of_the_students_network(config, monkeypatch, capsys, student, weights, there):
    def downloaded(url, check_hash, **kwargs):
        if "resnet18" not in url or not check_hash:
            raise OSError("no network")
        return torchvision.models.resnet18().state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", downloaded)
    monkeypatch.setattr(train_imagenet.checkpoint, "fill_network", lambda *arguments: None)
    assert main(config("kd"), f"student.name={student}", "--eval", weights) == (0 if there else 2)
    out, error = capsys.readouterr()
    assert f"{weights}: {there}, top-1" in out if there else "could not be downloaded or read (no network" in error


def test_an_empty_eval_does_not_train(config, tmp_path, capsys):
    assert main(config(epochs=1), "--eval", "") == 2
    assert "--eval: is empty" in capsys.readouterr().err and not (tmp_path / "runs/run/latest.pth").exists()


def test_train_and_val_with_other_classes(config, tmp_path, tree, capsys):
    shutil.copytree(tree, tmp_path / "tree")
    (tmp_path / "tree/val/n3").rename(tmp_path / "tree/val/dog")
    assert main(config(), f"data.root={tmp_path / 'tree'}") == 2
    assert "do not hold the same class folders: dog, n3" in capsys.readouterr().err


def test_processes_that_do_not_share_a_folder(config, tmp_path):
    path = config(epochs=1)
    assert main(path, "stop_after=0.1", f"runs={tmp_path / 'a'}") == 0
    both = start_two(path, 29563, [f"runs={tmp_path / 'a'}"], [f"runs={tmp_path / 'b'}"])
    errors = [finish(process, check=2)[1] for process in both]
    assert "a folder that all nodes share" in errors[0]
    assert not (tmp_path / "b").exists()  # rank 0 alone writes


@pytest.mark.parametrize("missing", ["train/n3/95.jpg", "*/n3"])
def test_processes_that_see_other_images(config, tmp_path, tree, missing):
    shutil.copytree(tree, tmp_path / "tree")
    for path in (tmp_path / "tree").glob(missing):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    both = start_two(config("ce", epochs=1), 29564, [f"data.root={tree}"], [f"data.root={tmp_path / 'tree'}"])
    errors = [finish(process, check=2)[1] for process in both]
    assert "data.root: not all processes see the same images" in errors[0]
    assert not (tmp_path / "runs/run/latest.pth").exists()


def test_processes_with_other_teachers(config, tmp_path, teacher):
    content = torch.load(teacher, weights_only=True)
    weights = content.get("model", content)
    weights["fc.bias"] = weights["fc.bias"] + 1
    torch.save(content, tmp_path / "other.pth")
    both = start_two(config("kd", epochs=1), 29565, [f"teacher.weights={teacher}"],
                     [f"teacher.weights={tmp_path / 'other.pth'}"])
    errors = [finish(process, check=2)[1] for process in both]
    assert f"teacher: not all processes see the same {teacher}" in errors[0]
    assert not (tmp_path / "runs/run/latest.pth").exists()


def test_a_run_does_not_go_on_with_other_images(config, tmp_path, tree, capsys):
    """Of as many classes, and as many images of each: their names alone differ."""
    path = config("kd", epochs=1)
    assert main(path, "stop_after=0.1") == 0
    shutil.copytree(tree, tmp_path / "moved")
    shutil.copytree(tree, tmp_path / "other")
    (tmp_path / "other/train/n3/95.jpg").rename(tmp_path / "other/train/n3/97.jpg")
    before = (tmp_path / "runs/run/latest.pth").read_bytes()
    assert main(path, f"data.root={tmp_path / 'other'}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: data.root: other images or classes than ") and error.count("\n") == 1
    assert (tmp_path / "runs/run/latest.pth").read_bytes() == before
    assert main(path, f"data.root={tmp_path / 'moved'}") == 0  # the same ones, elsewhere


def test_a_teacher_that_saw_other_data_is_said_to_have(config, tmp_path, tree, capsys):
    assert main(config("ce", epochs=1, save_every=0), "student.name=resnet18", "name=teacher") == 0
    file = tmp_path / "runs/teacher/student.pth"
    assert checkpoint.load(file, "test")["classes"] == ["n0", "n1", "n2", "n3"]
    path = config("kd", epochs=1, save_every=0, teacher={"name": "resnet18", "weights": str(file)})
    assert main(path, "data.random_erasing=0.1") == 0 and not capsys.readouterr().err  # not of the images
    shutil.copytree(tree, tmp_path / "tree")
    for split in "train", "val":
        (tmp_path / "tree" / split / "n0").rename(tmp_path / "tree" / split / "dog")
    assert main(path, "data.size=48", "name=larger") == 0
    assert capsys.readouterr().err == f"teacher.weights: {file} was trained with data.size=32, here it is 48\n"
    for key, argument in ("teacher.weights", "name=other"), ("--eval", f"--eval={file}"):
        assert main(path, f"data.root={tmp_path / 'tree'}", argument) == 2
        error = capsys.readouterr().err
        assert f"{key}: " in error and f"{file} was trained on other classes: n0 there is dog here" in error
    assert main(path, f"data.root={tmp_path / 'tree'}", "student.name=resnet18", f"student.weights={file}",
                "distiller={name: ce}", "name=tuned") == 0 and not capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- what the project ships


def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as leaving:
        train_imagenet.main(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for word in "milestones=[30, 60, 90]", "accumulate=1", "timeout=600", "label_smoothing=0.0", "optimizer.lr=0.1":
        assert word in text


@pytest.mark.parametrize("path", sorted(ROOT.glob("yaml/imagenet/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_builds(path):
    cfg = train_imagenet.read_settings(path)
    method, *rest = path.stem.removesuffix("_authors").split("_")
    short = {"resnet18": "r18", "resnet34": "r34", "resnet50": "r50", "resnet101": "r101", "resnet152": "r152"}
    names = [cfg.student.name] if method == "ce" else [cfg.teacher.name, cfg.student.name]
    assert cfg.distiller["name"] == method and [short.get(name, name) for name in names] == rest
    assert f"train_imagenet.py --cfg yaml/imagenet/{path.stem}.yaml" in path.read_text()
    assert (cfg.epochs, cfg.batch_size) == (100, 256) or path.stem.startswith("dpk") and "authors" in path.stem
    assert cfg.student.weights == ("IMAGENET1K_V1" if path.stem.endswith("r34_r18_authors") else "")
    if method == "dpk":  # the sizes fit the maps, and the teachers are large: shapes without numbers
        with torch.device("meta"):
            networks = [IMAGENET_MODELS[name]() for name in reversed(names)]
            distiller = engine.build_distiller(cfg, *networks)
        counts = [sum(p.numel() for p in stage.parameters()) for stage in distiller.stages]
        if rest == ["r34", "r18"]:
            assert counts == [12_896_512, 51_483_136]
        assert [stage.min_ratio for stage in distiller.stages] == [0.1, 0.1]
