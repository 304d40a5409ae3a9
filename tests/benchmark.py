"""Images a second of each part of training, for a pair of networks, and as a ratio to the bare bound.

    python tests/benchmark.py resnet56 resnet20 [--batch 64] [--precision bf16] [--seconds 5] [--compile] [--eager]
    python tests/benchmark.py images [--seconds 5]

The bound of a distiller: the teacher's forward, and the student's forward and backward, on tensors already in memory,
in the same precision; of ce, the student's alone. Its whole step adds the data pipeline, the losses and connectors, the
backward through them, the optimizers and the table of the log. Bound and step are measured in turns, so that a machine
that changes its pace does so for both. Sizes of DPK's modules are those of yaml/dpk_<pair>.yaml where it exists.
On a GPU both are CUDA graphs, as in train_cifar.py, unless --eager is given; --compile is compile=true.

`images` is the input pipeline of train_imagenet.py: JPEGs a second that one worker decodes, crops and augments, beside
Pillow and torchvision doing the same, and by how much the pixels of a crop differ from theirs.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))

from distillers import DISTILLERS, dpk
from models import MODELS
from train_cifar import Settings, read_settings
from utils.data import Loader, load_data
from utils.engine import assemble, build_autocast, pick_device
from utils.images import MEAN, STD, Images, Tree, random_resized_crop
from utils.log import Table
from utils.optim import set_learning_rates
from utils.step import forward_backward, warm_up


def seconds_per_call(functions, budget, device):
    """{name: median seconds}, the functions called in turns for `budget` seconds each after two calls to warm up."""
    times = {name: [] for name in functions}
    deadline = time.monotonic() + budget * len(functions)
    while time.monotonic() < deadline or min(map(len, times.values())) < 5:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def dpk_settings(teacher, student):
    """The settings of the YAML file that pairs these networks with DPK, or DPK's defaults."""
    for path in sorted(Path(__file__).parents[1].glob("yaml/dpk_*.yaml")):
        cfg = read_settings(path)
        if (cfg.teacher.name, cfg.student.name) == (teacher, student):
            return cfg
    return Settings(distiller={"name": "dpk"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", choices=[*MODELS, "images"])
    parser.add_argument("student", choices=list(MODELS), nargs="?")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each figure")
    parser.add_argument("--compile", action="store_true", help="torch.compile, in the whole steps")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--distillers", nargs="*", default=list(DISTILLERS), choices=list(DISTILLERS))
    args = parser.parse_args()
    if args.teacher == "images":
        return benchmark_images(args.seconds)
    if args.student is None:
        parser.error("two networks, or images")

    cfg = Settings(batch_size=args.batch, precision=args.precision)
    device = pick_device(cfg)
    autocast = build_autocast(args.precision, device)
    data = load_data("synthetic", samples=50 * args.batch)
    loader = Loader(data.train, args.batch, mean=data.mean, std=data.std, train=True, device=device)
    images, targets = loader.batch(0, 0)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    graph = device.type == "cuda" and not args.eager
    print(f"{args.teacher} -> {args.student}, batch {args.batch}, {args.precision}, {name}, torch {torch.__version__}"
          + ", CUDA graphs" * graph + ", compiled" * args.compile)

    def network(name):
        return MODELS[name]().to(device, memory_format=torch.channels_last)

    def show(what, seconds, bound=None):
        ratio = f"{bound / seconds:8.2f} of its bound" if bound else ""
        print(f"{what:<28} {args.batch / seconds:10.0f} images/s {1000 * seconds:9.2f} ms {ratio}", flush=True)

    student, teacher = network(args.student), network(args.teacher).eval()

    @torch.no_grad()
    def teacher_forward():
        with autocast():
            teacher(images)

    def student_step():
        with autocast():
            logits = student(images)
        F.cross_entropy(logits.float(), targets).backward()
        student.zero_grad()

    def both():
        teacher_forward()
        student_step()

    def captured(function):
        """The same as a CUDA graph, where whole steps are."""
        if not graph:
            return function
        warm_up(function)
        captured_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured_graph):
            function()
        return captured_graph.replay

    bound_of_ce, bound = captured(student_step), captured(both)
    parts = seconds_per_call({"data pipeline": lambda: loader.batch(0, 1), "teacher forward": teacher_forward,
                              "student step": student_step}, args.seconds, device)
    for what, seconds in parts.items():
        show(what, seconds)

    for name in args.distillers:
        cfg = dpk_settings(args.teacher, args.student) if name == "dpk" else Settings(distiller={"name": name})
        cfg = dataclasses.replace(cfg, batch_size=args.batch, precision=args.precision, compile=args.compile)
        run = assemble(cfg, network(args.student), network(args.teacher), loader, None, device, 1, graph=graph)
        run.distiller.train()
        set_learning_rates(run.optimizers, cfg.optimizer, cfg.connectors, 0, cfg.epochs)
        table = Table(1, device)
        if graph:
            run.graph.prepare(run, loader.choose(0, 1))

        def step(run=run, table=table):
            torch.manual_seed(0)
            indices = loader.choose(0, 1)
            if run.graph is None or not run.graph(indices, table, 0):
                forward_backward(run, *loader.load(indices), table, 0)
            for optimizer in run.optimizers.values():
                run.scaler.step(optimizer)
                optimizer.zero_grad()
            run.scaler.update()

        times = seconds_per_call({"bound": bound_of_ce if name == "ce" else bound, "step": step}, args.seconds, device)
        show(f"{name}, whole step", times["step"], times["bound"])
        if name == "dpk" and not graph:
            show_parts_of_dpk(run.distiller, images, autocast, args, device, show)


def show_parts_of_dpk(distiller, images, autocast, args, device, show):
    """Forward and backward of each part of each stage, alone, with half of the tokens given."""
    with torch.no_grad(), autocast():
        teacher_maps = distiller.teacher(images, return_features=True)[1]["maps"]
        student_maps = distiller.student(images, return_features=True)[1]["maps"]
    for (s, t, _), stage in zip(distiller.plan, distiller.stages):
        H, W = teacher_maps[t].shape[2:]
        student_map = F.interpolate(student_maps[s], (H, W), mode="bilinear", align_corners=True)
        order = torch.rand(len(images), H * W // stage.patch**2, device=device).argsort(1)
        given, visible = order.tensor_split(2, 1)
        hybrid = torch.randn(*order.shape, stage.stitch.out_features, device=device)

        def backward(function):
            with autocast():
                output = function()
            output.float().sum().backward()
            stage.zero_grad()  # noqa: B023, called at once

        functions = {
            "cka": lambda: dpk.minibatch_cka(student_map, teacher_maps[t]),  # noqa: B023
            "student encoder": lambda: backward(lambda: stage.student_encoder(student_map, visible)),  # noqa: B023
            "teacher encoder": lambda: backward(lambda: stage.teacher_encoder(teacher_maps[t], given)),  # noqa: B023
            "decoder": lambda: backward(lambda: stage.decoder(hybrid)),  # noqa: B023
        }
        for part, seconds in seconds_per_call(functions, args.seconds / 2, device).items():
            show(f"  {H}x{W}: {part}", seconds)


def benchmark_images(seconds):
    """One worker on files of ImageNet's usual size, and on large ones."""
    torch.set_num_threads(1)
    print(f"one worker, torch {torch.__version__}, crops of 224×224")
    for size in (500, 375), (1600, 1200):
        with tempfile.TemporaryDirectory() as root:
            write_jpegs(Path(root, "train", "class"), *size)
            benchmark_tree(Tree(root, "train"), f"{size[0]}×{size[1]}", seconds)


def write_jpegs(folder, width, height, n=16):
    """n JPEGs of smooth random colours with some noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 255, (height // 20, width // 20, 3), np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        pixels = pixels + rng.normal(0, 5, (height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)


def benchmark_tree(tree, label, seconds):
    images = Images(tree, 224, train=True)
    strong = Images(tree, 224, train=True, randaugment=27, color_jitter=0.4, random_erasing=0.25)
    crop, flip = v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()
    end = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    plain = v2.Compose([crop, flip, *end])
    plain_strong = v2.Compose([crop, flip, v2.RandAugment(2, 27), v2.ColorJitter(0.4, 0.4, 0.4), *end,
                               v2.RandomErasing(0.25)])

    def rgb(i):
        return tree.open(i)[0].convert("RGB")

    functions = {
        "crop and flip": lambda i: images[0, i],
        "the same by Pillow + torchvision": lambda i: plain(rgb(i)),
        "RandAugment, jitter, erasing too": lambda i: strong[0, i],
        "these by Pillow + torchvision": lambda i: plain_strong(rgb(i)),
        "decoding alone, by Pillow": rgb,
    }
    times = seconds_per_call({name: lambda function=function: [function(i) for i in range(len(tree))]
                              for name, function in functions.items()}, seconds, torch.device("cpu"))
    names = list(times)
    for i, name in enumerate(names):
        ratio = f"{times[names[i + 1]] / times[name]:8.2f} times theirs" if i in (0, 2) else ""
        print(f"{label}: {name:<34} {len(tree) / times[name]:8.0f} images/s {ratio}", flush=True)
    differences = []
    for i in range(len(tree)):
        torch.manual_seed(i)
        own = random_resized_crop(tree.open(i)[0], 224)
        torch.manual_seed(i)
        differences.append((own.float() - v2.functional.pil_to_tensor(crop(rgb(i))).float()).abs())
    differences = torch.stack(differences)
    print(f"{label}: pixels of a crop differ by {differences.mean():.2f} of 255 on average, {differences.max():.0f} at "
          "most")


if __name__ == "__main__":
    main()
