"""Distil on CIFAR-100 (or CIFAR-10, a folder of images, synthetic images) from one YAML file.

    python train_cifar.py --cfg yaml/dpk_res32x4_res8x4.yaml [key.sub=value ...]
    torchrun --nproc_per_node=2 train_cifar.py --cfg yaml/dpk_res32x4_res8x4.yaml
    python train_cifar.py --cfg yaml/dpk_res56_res20.yaml --eval checkpoints/resnet56.pth

The same command again goes on where a run was stopped, or where it was last saved before it was killed.
"""

import argparse
import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from distillers import DISTILLERS, NO_SETTINGS
from models import MODELS
from utils import checkpoint, distributed, engine
from utils.config import help_text, load_config, section, setting
from utils.data import Loader, load_data
from utils.errors import InputError
from utils.log import read_log
from utils.optim import ConnectorSettings, OptimizerSettings, check_optimizers
from utils.state import differences, load_state

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
    compile: bool = setting(False, "torch.compile student, teacher and DPK's transformer blocks")
    cuda_graph: bool = setting(True, "CUDA, one process: a step as one CUDA graph, many times as fast at small batches")
    device: str = setting("auto", "auto: CUDA where there is one", choices=["auto", "cuda", "cpu"])
    stop_after: float = setting(0.0, "save and leave after this many seconds; 0: never", low=0)
    log_every: int = setting(50, "steps between two looks at the losses on the device", low=1)
    save_every: int = setting(0, "save after so many steps of an epoch too; 0: at its end alone", low=0)
    tensorboard: bool = setting(False, "write TensorBoard files too, where it is installed")
    baseline: str = setting("", "YAML file of a run to set beside this one at the end, trained if need be")


# Settings in which a run may differ when it goes on.
NOT_PART_OF_A_RUN = {"runs", "device", "stop_after", "log_every", "save_every", "tensorboard", "baseline", "data.root",
                     "compile", "cuda_graph", "teacher.cfg", "teacher.train", "teacher.accuracy"}

# ------------------------------------------------------------------------------------------------------------ set-up


def read_settings(path, overrides=()):
    """Settings from a YAML file and overrides, all checked that can be before there are data."""
    cfg = load_config(Settings, path, overrides)
    cfg.name = cfg.name or Path(path).stem
    engine.check_distiller(cfg)
    check_optimizers(cfg.optimizer, cfg.connectors)
    if cfg.distiller["name"] != "ce" and not (cfg.teacher.name and cfg.teacher.checkpoint):
        raise InputError("teacher", f"{cfg.distiller['name']} needs teacher.name and teacher.checkpoint; networks: "
                         f"{', '.join(MODELS)}")
    with torch.device("meta"):  # shapes without numbers: stages, heads and weights are checked at once
        teacher = MODELS[cfg.teacher.name](num_classes=100) if cfg.teacher.name else None
        engine.build_distiller(cfg, MODELS[cfg.student.name](num_classes=100), teacher)
    return cfg


def build_network(name, num_classes, cfg, device):
    model = MODELS[name](num_classes=num_classes)
    return model.to(device, memory_format=torch.channels_last if cfg.channels_last else torch.contiguous_format)


def check_teacher_file(cfg):
    """Raise InputError where the teacher's file is missing and not to be trained, or not by its YAML file."""
    path = Path(cfg.teacher.checkpoint)
    if cfg.distiller["name"] == "ce" or path.exists():
        return
    if not cfg.teacher.train:
        raise InputError("teacher.checkpoint", f"{path} is missing; name another file, or train it first: "
                         f"teacher.train=true teacher.cfg={cfg.teacher.cfg or 'FILE'}")
    if not cfg.teacher.cfg:
        raise InputError("teacher.cfg", "needed to train the teacher; valid: a YAML file, see yaml/")
    with companion(cfg, "teacher.cfg", cfg.teacher.cfg) as other:
        if other.student.name != cfg.teacher.name:
            raise InputError("student.name", f"it trains {other.student.name}, but teacher.name is {cfg.teacher.name}")


def load_teacher(cfg, classes, device):
    """The teacher with its weights; where the file is missing, trained first or one line that says how."""
    check_teacher_file(cfg)
    path = Path(cfg.teacher.checkpoint)
    if not path.exists():
        with companion(cfg, "teacher.cfg", cfg.teacher.cfg) as other:
            train(other)
        trained = Path(other.runs, other.name, "student.pth")
        if distributed.is_main() and trained != path:
            checkpoint.write(path, trained.read_bytes(), "teacher.checkpoint")
        distributed.barrier()
    content = checkpoint.load(path, "teacher.checkpoint")
    teacher = build_network(cfg.teacher.name, len(classes), cfg, device)
    checkpoint.fill_network(teacher, content, path, cfg.teacher.name, "teacher.checkpoint")
    engine.check_data(cfg, "teacher.checkpoint", path, content, classes)
    return teacher


@contextlib.contextmanager
def companion(cfg, key, path):
    """with companion(...) as other: the settings of another YAML file, with this run's data, device and precision.

    An InputError, of that file or in the block, is one on `key`.
    """
    try:
        other = dataclasses.replace(read_settings(path), data=cfg.data, val_split=cfg.val_split, runs=cfg.runs,
                                    device=cfg.device, precision=cfg.precision, compile=cfg.compile,
                                    cuda_graph=cfg.cuda_graph, stop_after=cfg.stop_after)
        if other.name == cfg.name:
            raise InputError("name", f"{other.name} is also the name of this run; give this run another name=...")
        yield other
    except InputError as error:
        raise type(error)(key, f"{path}: {error}") from None


def build_loaders(cfg, data, rank, world, device):
    """Loaders of the training images and of those to report on."""
    common = {"mean": data.mean, "std": data.std, "rank": rank, "world": world, "device": device,
              "channels_last": cfg.channels_last}
    test_batch = max(500 * 32**2 // data.test.images.shape[1] ** 2, 64)  # few if they are large
    return (Loader(data.train, cfg.batch_size, train=True, seed=cfg.seed, **common),
            Loader(data.test, test_batch, train=False, **common))


def set_up(cfg, rank, world, device):
    """All that a run works with, from its settings alone."""
    with distributed.one_of_each_node_first():  # it downloads, if need be
        data = load_data(**dataclasses.asdict(cfg.data), val_split=cfg.val_split)
    train_loader, test_loader = build_loaders(cfg, data, rank, world, device)
    torch.manual_seed(cfg.seed % 2**63)
    student = build_network(cfg.student.name, len(data.classes), cfg, device)
    teacher = load_teacher(cfg, data.classes, device) if cfg.distiller["name"] != "ce" else None
    return engine.assemble(cfg, student, teacher, train_loader, test_loader, device, world,
                           teacher_file=cfg.teacher.checkpoint, classes=data.classes,
                           graph=cfg.cuda_graph and device.type == "cuda" and world == 1)


def train(cfg):
    """Train until the run is finished, from where it was left; returns the log's last line, on rank 0."""
    return engine.train(cfg, set_up, NOT_PART_OF_A_RUN)


# ------------------------------------------------------------------------------------------------------ the command


def check_baseline(cfg, other):
    """Raise InputError where the baseline's folder holds another run, or its teacher will be missing."""
    folder = Path(other.runs, other.name)
    load_state(other, folder, NOT_PART_OF_A_RUN)
    ours = cfg.teacher.checkpoint if cfg.distiller["name"] != "ce" else None  # it will be there by then
    if not (folder / "student.pth").exists() and other.teacher.checkpoint != ours:
        check_teacher_file(other)


def compare(cfg, last):
    """Train the baseline (or find it finished) and print both, top-1 of the last epoch."""
    with companion(cfg, "baseline", cfg.baseline) as other:
        train(other)
    if distributed.is_main():
        alone = read_log(Path(other.runs, other.name, "log.jsonl"))[-1]
        for name, entry in (other.name, alone), (cfg.name, last):
            print(f"{name:<24} top-1 {entry['top1']:6.2f}")
        print(f"{'difference':<24}       {last['top1'] - alone['top1']:+6.2f}")
        ignored = NOT_PART_OF_A_RUN | {"name"}
        for key, first, second in differences(dataclasses.asdict(other), dataclasses.asdict(cfg), ignored):
            if key.split(".")[0] not in ("teacher", "distiller", "connectors"):
                print(f"not of the method alone: {key} is {first} in the first, {second} in the second")


def evaluate_file(cfg, path):
    """Print the accuracy, in float32, of a file of the student's or the teacher's network."""
    if not distributed.is_main():  # one process is enough
        return
    device = engine.pick_device(cfg)
    content, reasons = checkpoint.load(path, "--eval"), []
    data = load_data(**dataclasses.asdict(cfg.data), val_split=cfg.val_split)
    for name in dict.fromkeys(filter(None, (cfg.student.name, cfg.teacher.name))):
        model = build_network(name, len(data.classes), cfg, device)
        try:
            checkpoint.fill_network(model, content, path, name, "--eval")
        except InputError as error:
            reasons.append(error)
            continue
        engine.check_data(cfg, "--eval", path, content, data.classes)
        loader = build_loaders(cfg, data, 0, 1, device)[1]
        top1, top5 = engine.evaluate(model, loader, engine.build_autocast("fp32", device))
        print(f"{path}: {name}, top-1 {top1:.2f}, top-5 {top5:.2f} on {len(data.test.labels)} images, float32")
        return
    raise InputError("--eval", "; ".join(error.message for error in reasons))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=help_text(Settings, DISTILLERS, NO_SETTINGS),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="the YAML file of the run")
    parser.add_argument("--eval", metavar="CHECKPOINT", help="evaluate this file of the student or the teacher instead")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings in place of the file's")
    args = parser.parse_intermixed_args(argv)

    def action():
        cfg = read_settings(args.cfg, args.overrides)
        if args.eval is not None:  # an unset shell variable is not to train
            return evaluate_file(cfg, args.eval)
        if cfg.baseline:  # what is wrong with its settings or its folder is said before anything is trained
            with companion(cfg, "baseline", cfg.baseline) as other:
                check_baseline(cfg, other)
        last = train(cfg)
        if cfg.baseline:
            compare(cfg, last)

    return engine.exit_code(args.cfg, action)


if __name__ == "__main__":
    sys.exit(main())
