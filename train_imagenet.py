"""Distil on ImageNet, or any tree of image files, from one YAML file, on one GPU or many.

    torchrun --nproc_per_node=8 train_imagenet.py --cfg yaml/imagenet/dpk_r34_r18.yaml data.root=/data/imagenet
    python train_imagenet.py --cfg yaml/imagenet/ce_r18.yaml data.name=fake epochs=1 name=dry_run
    python train_imagenet.py --cfg yaml/imagenet/dpk_r34_r18.yaml --eval IMAGENET1K_V1

The same command again goes on where a run was stopped, or where it was last saved before it was killed.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision

from distillers import DISTILLERS, NO_SETTINGS
from models import IMAGENET_MODELS
from utils import checkpoint, distributed, engine
from utils.config import help_text, load_config, section, setting
from utils.errors import InputError, one_line
from utils.images import Fake, ImageLoader, Images, Tree
from utils.optim import ConnectorSettings, OptimizerSettings, check_optimizers

# ---------------------------------------------------------------------------------------------------------- settings


@dataclass
class DataSettings:
    name: str = setting("folder", "data set; fake: noise, for dry runs", choices=["folder", "fake"])
    root: str = setting("data/imagenet", "folder of train/<class>/ and val/<class>/")
    size: int = setting(224, "side of the images in pixels", low=32)
    randaugment: int = setting(0, "magnitude of RandAugment, up to 30 (timm's m9 is 27); 0: crop and flip", low=0,
                               high=30)
    color_jitter: float = setting(0.0, "of brightness, contrast and saturation", low=0)
    random_erasing: float = setting(0.0, "probability", low=0, high=1)
    samples: int = setting(5000, "fake: training images, and a fifth of it to report on", low=5)
    workers: int = setting(8, "processes that read images, for each GPU; as many again for those of val", low=0)


@dataclass
class StudentSettings:
    name: str = setting("resnet18", "the network to train: mobilenetv1, or torchvision's name",
                        choices=list(IMAGENET_MODELS))
    weights: str = setting("", "where it starts: IMAGENET1K_V1 and the like (torchvision's), or a file; empty: anew")


@dataclass
class TeacherSettings:
    name: str | None = setting(None, "the teacher's network; none for distiller.name=ce",
                               choices=[None, *IMAGENET_MODELS])
    weights: str = setting("", "IMAGENET1K_V1 and the like (torchvision's), or a file")
    accuracy: float | None = setting(None, "its top-1; the run stops if the weights are more than 0.5 below")


@dataclass
class ImageNetOptimizerSettings(OptimizerSettings):
    lr: float = setting(0.1, "learning rate, for the batch_size beside it", above=0)
    weight_decay: float = setting(1e-4, "weight decay of the student", low=0)
    milestones: list[int] = setting([30, 60, 90], "step: epochs at which it is multiplied by gamma", low=0)


@dataclass
class Settings:
    name: str = setting("", "name of the run, kept in <runs>/<name>; empty: that of the YAML file")
    runs: str = setting("runs", "folder of all runs; several nodes have to share it")
    seed: int = setting(0, "seed of weights, order, augmentation and token positions", low=0)
    data: DataSettings = section(DataSettings)
    student: StudentSettings = section(StudentSettings)
    teacher: TeacherSettings = section(TeacherSettings)
    distiller: dict = setting({"name": "ce"}, "the distiller's name and its hyper-parameters, listed below")
    epochs: int = setting(100, "passes over the training set", low=1)
    batch_size: int = setting(256, "images a step, over all processes and accumulated batches", low=1)
    accumulate: int = setting(1, "batches of each process that a step adds up", low=1)
    optimizer: ImageNetOptimizerSettings = section(ImageNetOptimizerSettings)
    connectors: ConnectorSettings = section(ConnectorSettings)
    precision: str = setting("bf16", "autocast; evaluation by --eval is in fp32", choices=["bf16", "fp16", "fp32"])
    channels_last: bool = setting(True, "memory format of the convolutions")
    compile: bool = setting(False, "torch.compile student, teacher and DPK's transformer blocks")
    device: str = setting("auto", "auto: CUDA where there is one", choices=["auto", "cuda", "cpu"])
    timeout: float = setting(600.0, "seconds after which processes that wait for a stalled one give up", above=0,
                             high=10**6)
    stop_after: float = setting(0.0, "save and leave after this many seconds; 0: never", low=0)
    log_every: int = setting(50, "steps between two looks at the losses on the device", low=1)
    save_every: int = setting(1000, "save after so many steps of an epoch too; 0: at its end alone", low=0)
    tensorboard: bool = setting(False, "write TensorBoard files too, where it is installed")


# Settings in which a run may differ when it goes on.
NOT_PART_OF_A_RUN = {"runs", "device", "timeout", "stop_after", "log_every", "save_every", "tensorboard", "data.root",
                     "data.workers", "compile", "teacher.accuracy"}

# ------------------------------------------------------------------------------------------------------------ set-up


def read_settings(path, overrides=()):
    """Settings from a YAML file and overrides, all checked that can be without networks and data."""
    cfg = load_config(Settings, path, overrides)
    cfg.name = cfg.name or Path(path).stem
    engine.check_distiller(cfg)
    check_optimizers(cfg.optimizer, cfg.connectors)
    if cfg.distiller["name"] != "ce" and not (cfg.teacher.name and cfg.teacher.weights):
        raise InputError("teacher", f"{cfg.distiller['name']} needs teacher.name and teacher.weights; networks: "
                         f"{', '.join(IMAGENET_MODELS)}")
    return cfg


def published_weights(name):
    """Names of torchvision's weights of a network."""
    return [] if name == "mobilenetv1" else list(torchvision.models.get_model_weights(name).__members__)


def build_network(name, weights, classes, cfg, device, key):
    """Network `name` for the classes, on the device, with weights from torchvision or a file where `weights` is not
    empty.
    """
    size = cfg.data.size
    try:
        model = IMAGENET_MODELS[name](num_classes=len(classes), image_size=size).eval()
        with torch.no_grad():  # on the CPU, where nothing but the size can be wrong
            model(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError("data.size", f"{name} does not take {size} pixels: {one_line(error)}") from None
    if weights in published_weights(name):
        published = torchvision.models.get_model_weights(name)[weights]
        try:  # torchvision's own loading, which renames what old files call differently, would execute what they hold
            published.get_state_dict(progress=False, check_hash=True, weights_only=True)
            content = torchvision.models.get_model(name, weights=weights, progress=False).state_dict()
        except Exception as error:  # noqa: BLE001 - no network, a full disk, a damaged file raises ValueError, EOFError, ...
            raise InputError(key, f"{weights} could not be downloaded or read ({one_line(error)}); put {published.url} "
                             f"into {torch.hub.get_dir()}/checkpoints, or name a file") from None
        checkpoint.fill_network(model, content, weights, name, key)
    elif Path(weights).is_file():
        content = checkpoint.load(weights, key)
        checkpoint.fill_network(model, content, weights, name, key)
        if key != "student.weights":  # a student may come from anywhere
            engine.check_data(cfg, key, weights, content, classes)
    elif weights:
        raise InputError(key, f"{weights!r} is neither a file nor of torchvision's {name}; valid: "
                         f"{', '.join([*published_weights(name), 'a file'])}")
    model.to(device, memory_format=torch.channels_last if cfg.channels_last else torch.contiguous_format)
    return model.train()


def load_images(cfg, split):
    """The images of a split, "train" or "val"."""
    data, train = cfg.data, split == "train"
    if data.name == "fake":
        source = Fake(split, data.samples if train else data.samples // 5, data.size)
    else:
        source = Tree(data.root, split)
    return Images(source, data.size, train=train, seed=cfg.seed, randaugment=data.randaugment,
                  color_jitter=data.color_jitter, random_erasing=data.random_erasing)


def set_up(cfg, rank, world, device):
    """All that a run works with, from its settings alone."""
    train, val = load_images(cfg, "train"), load_images(cfg, "val")
    if train.source.classes != val.source.classes:
        odd = ", ".join(sorted(set(train.source.classes) ^ set(val.source.classes))[:5])
        raise InputError("data.root", f"{cfg.data.root}: train and val do not hold the same class folders: {odd}")
    common = {"rank": rank, "world": world, "workers": cfg.data.workers, "device": device,
              "channels_last": cfg.channels_last}
    train_loader = ImageLoader(train, cfg.batch_size, train=True, seed=cfg.seed, accumulate=cfg.accumulate, **common)
    test_loader = ImageLoader(val, train_loader.order.batch, train=False, **common)
    torch.manual_seed(cfg.seed % 2**63)
    classes = train.source.classes
    with distributed.one_of_each_node_first():  # it downloads, if need be
        student = build_network(cfg.student.name, cfg.student.weights, classes, cfg, device, "student.weights")
        teacher = (build_network(cfg.teacher.name, cfg.teacher.weights, classes, cfg, device, "teacher.weights")
                   if cfg.distiller["name"] != "ce" else None)
    return engine.assemble(cfg, student, teacher, train_loader, test_loader, device, world,
                           teacher_file=cfg.teacher.weights, accumulate=cfg.accumulate, classes=classes)


# ------------------------------------------------------------------------------------------------------ the command


def evaluate_file(cfg, weights):
    """Print the accuracy, in float32, of weights of the student's or the teacher's network."""
    if not distributed.is_main():  # one process is enough
        return
    if not weights:
        raise InputError("--eval", "is empty; valid: a file, or the name of torchvision's weights")
    device = engine.pick_device(cfg)
    images, reasons = load_images(cfg, "val"), []
    names = list(dict.fromkeys(filter(None, (cfg.student.name, cfg.teacher.name))))
    if not Path(weights).is_file():  # the same name may be of both: the student's, then
        names = [name for name in names if weights in published_weights(name)][:1] or names
    for name in names:
        try:
            model = build_network(name, weights, images.source.classes, cfg, device, "--eval")
        except InputError as error:
            reasons.append(error.message)
            continue
        loader = ImageLoader(images, 128, train=False, workers=cfg.data.workers, device=device,
                             channels_last=cfg.channels_last)
        top1, top5 = engine.evaluate(model, loader, engine.build_autocast("fp32", device))
        total = len(images) - loader.unreadable
        print(f"{weights}: {name}, top-1 {top1:.2f}, top-5 {top5:.2f} on {total} images, float32")
        return
    raise InputError("--eval", "; ".join(dict.fromkeys(reasons)))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, epilog=help_text(Settings, DISTILLERS, NO_SETTINGS),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="the YAML file of the run")
    parser.add_argument("--eval", metavar="WEIGHTS", help="evaluate this file, or torchvision's weights, instead")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings in place of the file's")
    args = parser.parse_intermixed_args(argv)

    def action():
        cfg = read_settings(args.cfg, args.overrides)
        if args.eval is not None:  # an unset shell variable is not to train
            evaluate_file(cfg, args.eval)
        else:
            engine.train(cfg, set_up, NOT_PART_OF_A_RUN, cfg.timeout)

    return engine.exit_code(args.cfg, action)


if __name__ == "__main__":
    sys.exit(main())
