"""Distil on CIFAR-100 (or CIFAR-10, a folder of images, synthetic images) from one YAML file.

    python train_cifar.py --cfg yaml/dpk_res32x4_res8x4.yaml [key.sub=value ...]
    torchrun --nproc_per_node=2 train_cifar.py --cfg yaml/dpk_res32x4_res8x4.yaml
    python train_cifar.py --cfg yaml/dpk_res56_res20.yaml --eval checkpoints/resnet56.pth

The same command again goes on where a run was stopped or killed.
"""

import argparse
import dataclasses
import functools
import inspect
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.parallel import DistributedDataParallel

from distillers import DISTILLERS
from models import MODELS
from utils import checkpoint, distributed
from utils.config import check_arguments, help_text, load_config, section, setting
from utils.data import Loader, load_data
from utils.errors import InputError
from utils.log import Table, one_line, progress, read_log, tensorboard_writer
from utils.malloc import keep_freed_memory
from utils.optim import build_optimizers, set_learning_rates
from utils.state import load_state, open_log, restore, save_state
from utils.stopping import Stopped, Stopper

# ---------------------------------------------------------------------------------------------------------- settings


@dataclass
class DataSettings:
    name: str = setting("cifar100", "data set", choices=["cifar100", "cifar10", "folder", "synthetic"])
    root: str = setting("data", "folder of <name>.npz, or where to download it; folder: of train/ and val/")
    size: int = setting(32, "side of the images in pixels, for folder and synthetic", low=32)
    samples: int = setting(10000, "training images of the synthetic set", low=100)


@dataclass
class StudentSettings:
    name: str = setting("resnet20", "the network to train", choices=list(MODELS))


@dataclass
class TeacherSettings:
    name: str | None = setting(None, "the teacher's network; none for distiller.name=ce", choices=[None, *MODELS])
    checkpoint: str = setting("", "file of the teacher's weights, ours or published")
    cfg: str = setting("", "the YAML file that trains this teacher")
    train: bool = setting(False, "train the teacher first, by teacher.cfg, where teacher.checkpoint is missing")
    accuracy: float | None = setting(None, "its top-1; the run stops if the file is more than 0.5 below")


@dataclass
class OptimizerSettings:
    lr: float = setting(0.05, "SGD's learning rate, for the batch_size beside it", above=0)
    momentum: float = setting(0.9, "SGD's momentum", low=0)
    nesterov: bool = setting(False, "Nesterov's momentum")
    weight_decay: float = setting(5e-4, "weight decay of the student", low=0)
    schedule: str = setting("step", "learning rate over the epochs", choices=["step", "cosine"])
    milestones: list[int] = setting([150, 180, 210], "step: epochs at which it is multiplied by gamma", low=0)
    gamma: float = setting(0.1, "step: the factor", above=0)
    warmup_epochs: int = setting(0, "epochs of linear warm-up", low=0)


@dataclass
class ConnectorSettings:
    """The distiller's own modules: regressors, projectors, DPK's transformers."""
    optimizer: str = setting("sgd", "sgd: in the student's optimizer, at its lr, as a group of its own; "
                             "adamw: an optimizer of their own, cosine", choices=["sgd", "adamw"])
    weight_decay: float = setting(5e-4, "weight decay of the connectors", low=0)
    lr: float = setting(1e-4, "adamw: learning rate", above=0)
    betas: list[float] = setting([0.9, 0.95], "adamw: betas", low=0)
    warmup_epochs: int = setting(20, "adamw: epochs of linear warm-up", low=0)
    min_lr: float = setting(1e-5, "adamw: learning rate at the end of the cosine", low=0)


@dataclass
class Settings:
    name: str = setting("", "name of the run, kept in <runs>/<name>; empty: that of the YAML file")
    runs: str = setting("runs", "folder of all runs")
    seed: int = setting(0, "seed of weights, order, crops and token positions", low=0)
    data: DataSettings = section(DataSettings)
    val_split: int = setting(0, "hold this many training images out, and report on them instead of the test set", low=0)
    student: StudentSettings = section(StudentSettings)
    teacher: TeacherSettings = section(TeacherSettings)
    distiller: dict = setting({"name": "ce"}, "the distiller's name and its hyper-parameters, listed below")
    epochs: int = setting(240, "passes over the training set", low=1)
    batch_size: int = setting(64, "images a step, over all processes", low=1)
    optimizer: OptimizerSettings = section(OptimizerSettings)
    connectors: ConnectorSettings = section(ConnectorSettings)
    precision: str = setting("bf16", "autocast; evaluation by --eval is in fp32", choices=["bf16", "fp16", "fp32"])
    channels_last: bool = setting(True, "memory format of the convolutions")
    compile: bool = setting(False, "torch.compile student and teacher")
    device: str = setting("auto", "auto: CUDA where there is one", choices=["auto", "cuda", "cpu"])
    stop_after: float = setting(0.0, "save and leave after this many seconds; 0: never", low=0)
    log_every: int = setting(50, "steps between two looks at the losses on the device", low=1)
    tensorboard: bool = setting(False, "write TensorBoard files too, where it is installed")
    baseline: str = setting("", "YAML file of a run to set beside this one at the end, trained if need be")


# Two runs that differ in these alone are the same run.
NOT_PART_OF_A_RUN = {"runs", "device", "stop_after", "log_every", "tensorboard", "baseline", "data.root", "compile",
                     "teacher.cfg", "teacher.train", "teacher.accuracy"}

# ------------------------------------------------------------------------------------------------------------ set-up


def read_settings(path, overrides=()):
    """Settings from a YAML file and overrides, all checked that can be before there are data."""
    cfg = load_config(Settings, path, overrides)
    cfg.name = cfg.name or Path(path).stem
    name = cfg.distiller.get("name")
    if not isinstance(name, str) or name not in DISTILLERS:
        raise InputError("distiller.name", f"unknown distiller {name!r}; valid: {', '.join(DISTILLERS)}")
    check_arguments(DISTILLERS[name].__init__, {k: v for k, v in cfg.distiller.items() if k != "name"}, "distiller.")
    if name != "ce" and not (cfg.teacher.name and cfg.teacher.checkpoint):
        raise InputError("teacher", f"{name} needs teacher.name and teacher.checkpoint; networks: {', '.join(MODELS)}")
    with torch.device("meta"):  # shapes without numbers: stages, heads and weights are checked at once
        build_distiller(cfg, MODELS[cfg.student.name](), MODELS[cfg.teacher.name]() if cfg.teacher.name else None)
    return cfg


def pick_device(cfg):
    """The torch.device of the setting."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device", "cuda is not available here; valid: auto, cpu")
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    if device.type == "cpu":
        keep_freed_memory()
    return device


def build_network(name, num_classes, cfg, device):
    model = MODELS[name](num_classes=num_classes)
    return model.to(device, memory_format=torch.channels_last if cfg.channels_last else torch.contiguous_format)


def load_teacher(cfg, num_classes, device):
    """The teacher with its weights; where the file is missing, trained first or one line that says how."""
    path = Path(cfg.teacher.checkpoint)
    if not path.exists():
        command = f"python train_cifar.py --cfg {cfg.teacher.cfg or 'yaml/ce_' + cfg.teacher.name + '.yaml'}"
        if not cfg.teacher.train:
            raise InputError("teacher.checkpoint", f"{path} is missing; train it: {command} "
                             "(or set teacher.train=true; or name a published file)")
        if not cfg.teacher.cfg:
            raise InputError("teacher.cfg", "needed to train the teacher; valid: a YAML file, see yaml/")
        trained = companion_run(cfg, cfg.teacher.cfg)
        if distributed.is_main() and trained != path:
            checkpoint.write(path, trained.read_bytes())
        distributed.barrier()
    teacher = build_network(cfg.teacher.name, num_classes, cfg, device)
    return checkpoint.load_network(teacher, path, cfg.teacher.name, "teacher.checkpoint")


def companion_run(cfg, path):
    """Train by another YAML file on the data and the device of this run (or find it finished); its student.pth."""
    try:
        other = dataclasses.replace(read_settings(path), data=cfg.data, val_split=cfg.val_split, runs=cfg.runs,
                                    device=cfg.device, stop_after=cfg.stop_after)
        train(other)
    except InputError as error:
        raise InputError("teacher.cfg" if path == cfg.teacher.cfg else "baseline", f"{path}: {error}") from None
    return Path(other.runs, other.name, "student.pth")


def build_loaders(cfg, data, rank, world, device):
    """Loaders of the training images and of those to report on."""
    common = {"mean": data.mean, "std": data.std, "rank": rank, "world": world, "device": device,
              "channels_last": cfg.channels_last}
    padding = data.train.images.shape[1] // 8  # 4 pixels for 32
    return (Loader(data.train, cfg.batch_size, train=True, padding=padding, seed=cfg.seed, **common),
            Loader(data.test, 500, train=False, **common))


def build_autocast(precision, device):
    """A factory of autocast contexts; for fp32 of such that change nothing."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    return functools.partial(torch.autocast, device.type, dtype, enabled=precision != "fp32")


def build_distiller(cfg, student, teacher):
    """The distiller of the settings around two networks; what its constructor refuses is bad input."""
    arguments = {key: value for key, value in cfg.distiller.items() if key != "name"}
    distiller = DISTILLERS[cfg.distiller["name"]]
    if "image_size" in inspect.signature(distiller).parameters:
        arguments.setdefault("image_size", cfg.data.size)
    try:
        return distiller(student, teacher, **arguments)
    except ValueError as error:
        raise InputError("distiller", str(error)) from None


def set_up(cfg, rank, world, device):
    """All that a run works with, from its settings alone."""
    if rank > 0:  # rank 0 downloads, if need be
        distributed.barrier()
    data = load_data(**dataclasses.asdict(cfg.data), val_split=cfg.val_split)
    if rank == 0:
        distributed.barrier()
    run = SimpleNamespace(device=device, autocast=build_autocast(cfg.precision, device))
    run.train_loader, run.test_loader = build_loaders(cfg, data, rank, world, device)
    torch.manual_seed(cfg.seed)
    run.student = build_network(cfg.student.name, len(data.classes), cfg, device)
    run.teacher = load_teacher(cfg, len(data.classes), device) if cfg.distiller["name"] != "ce" else None
    torch.manual_seed(cfg.seed + 1)  # the connectors', whatever was drawn to train a teacher
    run.distiller = build_distiller(cfg, run.student, run.teacher).to(device)
    run.optimizers = build_optimizers(run.distiller, cfg.optimizer, cfg.connectors)
    run.scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    for model in (run.student, run.teacher) if cfg.compile else ():
        if model is not None:
            model.compile()
    run.model = DistributedDataParallel(run.distiller) if world > 1 else run.distiller
    return run


# --------------------------------------------------------------------------------------------------------- one epoch


def train_one_epoch(cfg, run, epoch, first_step, table, stop):
    """Steps `first_step` to the end of `epoch`, or to a stop; returns the number of steps done, rows in `table`."""
    run.model.train()
    metrics = getattr(run.distiller, "metrics", {})
    done, steps = first_step, len(run.train_loader)
    for step in progress(range(first_step, steps), f"epoch {epoch + 1}/{cfg.epochs}"):
        # Crops, flips and token positions follow from (seed, epoch, step, rank): a resumed run draws the same.
        torch.manual_seed((((cfg.seed * 10**5 + epoch) * 10**6 + step) * 10**4 + run.train_loader.rank) % 2**63)
        images, targets = run.train_loader.batch(epoch, step)
        with run.autocast():
            logits, losses = run.model(images, targets)
        run.scaler.scale(sum(losses.values())).backward()
        for optimizer in run.optimizers.values():
            run.scaler.step(optimizer)
            optimizer.zero_grad()
        run.scaler.update()
        table.write(step, losses, metrics, (logits.argmax(1) == targets).sum(), len(targets))
        done, stopping = step + 1, stop(step, last=step + 1 == steps)
        if stopping or done % cfg.log_every == 0 or done == steps:
            table.check(done, epoch)
        if stopping:
            break
    return done


@torch.no_grad()
def evaluate(model, loader, autocast):
    """(top-1, top-5) in per cent over the whole split: counts summed over all processes, then divided."""
    model.eval()
    distributed.broadcast_buffers(model)  # each process has BatchNorm statistics of its own; rank 0's are saved
    counts = torch.zeros(3, dtype=torch.int64, device=loader.device)  # right at the first guess, in five, of how many
    for step in range(len(loader)):
        images, targets = loader.batch(0, step)
        with autocast():
            logits = model(images)
        right = logits.topk(min(5, logits.shape[1])).indices == targets.unsqueeze(1)  # (B, 5)
        counts[0] += right[:, 0].sum()
        counts[1] += right.sum()
        counts[2] += len(targets)
    first, five, total = distributed.sum_over_processes(counts).tolist()
    return 100 * first / total, 100 * five / total


# ----------------------------------------------------------------------------------------------------------- one run


def check_teacher(cfg, run, say):
    """Print the teacher's accuracy; stop where it is not what the settings promise."""
    top1, _ = evaluate(run.teacher, run.test_loader, run.autocast)
    say(f"teacher {cfg.teacher.name} from {cfg.teacher.checkpoint}: top-1 {top1:.2f}")
    if cfg.teacher.accuracy is not None and top1 < cfg.teacher.accuracy - 0.5:
        raise InputError("teacher.accuracy", f"{cfg.teacher.checkpoint} has top-1 {top1:.2f}, more than 0.5 below "
                         f"{cfg.teacher.accuracy}: another file, other data, or another normalisation?")


def train(cfg):
    """Train until the run is finished, from where it was left; returns the log's last line.

    Raises InputError for bad input, Stopped when asked to stop, FloatingPointError for a loss that is not finite.
    """
    folder = Path(cfg.runs, cfg.name)
    rank, world, device = distributed.start(pick_device(cfg))
    stop = Stopper(cfg.stop_after, cfg.log_every, device)
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    state = load_state(cfg, folder, NOT_PART_OF_A_RUN)
    if state and state["epoch"] == cfg.epochs and (folder / "student.pth").exists():
        last = read_log(folder / "log.jsonl")[-1]
        say(f"{folder} is finished: epoch {last['epoch']}, top-1 {last['top1']:.2f}; student in {folder}/student.pth")
        return last

    run = set_up(cfg, rank, world, device)
    if run.teacher is not None:
        check_teacher(cfg, run, say)
    epoch, step, best, seconds, saved_table = 0, 0, 0.0, 0.0, None
    if state:
        epoch, step, best, seconds, saved_table = (state[k] for k in ("epoch", "step", "best", "seconds", "table"))
        restore(run, state)
        say(f"{folder}: going on at epoch {epoch + 1}, step {step + 1}")
    if rank == 0:
        open_log(cfg, folder, state, world, device)
    writer = tensorboard_writer(folder) if cfg.tensorboard and rank == 0 else None

    while epoch < cfg.epochs:
        clock = time.monotonic() - seconds
        if hasattr(run.distiller, "set_epoch"):
            run.distiller.set_epoch(epoch)
        rates = set_learning_rates(run.optimizers, cfg.optimizer, cfg.connectors, epoch, cfg.epochs)
        table = Table(len(run.train_loader), device, saved_table)
        if saved_table and rank > 0:
            table.rows.zero_()  # the sums of all processes so far are rank 0's
        try:
            step = train_one_epoch(cfg, run, epoch, step, table, stop)
        except FloatingPointError as error:
            raise FloatingPointError(f"{folder}: {error}; latest.pth there is as of the last good save") from None
        seconds = time.monotonic() - clock
        if stop.asked:
            save_state(cfg, run, folder, table, epoch=epoch, step=step, best=best, seconds=seconds)
            raise Stopped(f"{folder}: saved at epoch {epoch + 1}, step {step}; the same command goes on from there")
        distributed.sum_over_processes(table.rows)
        speed = table.rows[:, -1].sum().item() / seconds
        top1, top5 = evaluate(run.student, run.test_loader, run.autocast)
        epoch, step, best, saved_table, seconds = epoch + 1, 0, max(best, top1), None, 0.0
        entry = {"epoch": epoch, "top1": top1, "top5": top5, "best_top1": best} | rates | table.means()
        entry |= {"images_per_s": speed, "seconds": time.monotonic() - clock}
        say(one_line(entry, cfg.epochs))
        if rank == 0:
            checkpoint.append(folder / "log.jsonl", entry)
        for key, value in entry.items() if writer else ():
            writer.add_scalar(key, float("nan") if value is None else value, epoch)
        save_state(cfg, run, folder, epoch=epoch, step=0, best=best, seconds=0.0)

    last = {}
    if rank == 0:
        last = read_log(folder / "log.jsonl")[-1]
        checkpoint.save(folder / "student.pth", {"model": run.student.state_dict(), "epoch": epoch,
                                                 "accuracy": last["top1"]})
        say(f"{folder}: finished, top-1 {last['top1']:.2f}; student in {folder}/student.pth")
    distributed.barrier()
    return last


# ------------------------------------------------------------------------------------------------------ the command


def compare(cfg, last):
    """Train the baseline (or find it finished) and print both, top-1 of the last epoch."""
    folder = companion_run(cfg, cfg.baseline).parent
    if distributed.is_main():
        alone = read_log(folder / "log.jsonl")[-1]
        for name, entry in (folder.name, alone), (cfg.name, last):
            print(f"{name:<24} top-1 {entry['top1']:6.2f}")
        print(f"{'difference':<24}       {last['top1'] - alone['top1']:+6.2f}")


def evaluate_file(cfg, path):
    """Print the accuracy, in float32, of a file of the student's or the teacher's network."""
    device = pick_device(cfg)
    data = load_data(**dataclasses.asdict(cfg.data), val_split=cfg.val_split)
    reasons = []
    for name in dict.fromkeys(filter(None, (cfg.student.name, cfg.teacher.name))):
        model = build_network(name, len(data.classes), cfg, device)
        try:
            checkpoint.load_network(model, path, name, "--eval")
        except InputError as error:
            reasons.append(error)
            continue
        loader = build_loaders(cfg, data, 0, 1, device)[1]
        top1, top5 = evaluate(model, loader, build_autocast("fp32", device))
        print(f"{path}: {name}, top-1 {top1:.2f}, top-5 {top5:.2f} on {len(data.test.labels)} images, float32")
        return
    raise InputError("--eval", "; ".join(error.message for error in reasons))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=help_text(Settings, DISTILLERS),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="the YAML file of the run")
    parser.add_argument("--eval", metavar="CHECKPOINT", help="evaluate this file of the student or the teacher instead")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings in place of the file's")
    args = parser.parse_args(argv)
    try:
        cfg = read_settings(args.cfg, args.overrides)
        if args.eval:
            evaluate_file(cfg, args.eval)
        else:
            last = train(cfg)
            if cfg.baseline:
                compare(cfg, last)
    except InputError as error:
        if distributed.is_main():
            print(f"error: {args.cfg}: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        if distributed.is_main():
            print(stopped)
    finally:
        distributed.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
