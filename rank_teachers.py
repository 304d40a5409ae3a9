"""Which of these teachers for this student? By DPK's third claim the most accurate; this orders them so, with prices.

    python rank_teachers.py --student resnet20 checkpoints/resnet56.pth runs/*/student.pth [key.sub=value ...]

For each file: top-1 on the test set, parameters, images a second of the forward pass, and CKA to the student stage by
stage, the last with the last, of a student with fresh weights and of one after a probe: an epoch of DPK, whose top-1
stands beside it. The most accurate teacher comes first; of those that the test set cannot tell apart, the fastest.
In our runs of 10 epochs the least accurate of four teachers has the best students (README, Results).
"""

import argparse
import dataclasses
import io
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from distillers.dpk import cka_of_terms, hsic_terms
from models import MODELS
from train_cifar import Settings, build_loaders, build_network
from utils import checkpoint, engine
from utils.config import load_config, yaml_value
from utils.data import load_data
from utils.errors import InputError
from utils.log import Table, progress, write_log
from utils.optim import ConnectorSettings, check_optimizers
from utils.step import forward_backward

CFG = Path(__file__).parent / "yaml" / "ce_resnet20.yaml"  # the protocol of the probe, but for its one epoch
SIZE = [64, 2, 4]  # [dim, depth, heads] of the probe's modules
USED = ["data", "val_split", "student", "seed", "batch_size", "optimizer", "precision", "channels_last", "device"]
UNUSED = ["optimizer.schedule", "optimizer.milestones", "optimizer.gamma", "optimizer.warmup_epochs"]  # in one epoch
FORMATS = [".png", ".pdf", ".svg"]


def identify(path, num_classes):
    """(name of the network, content) of a file, by the names and shapes of its tensors; else InputError."""
    content = checkpoint.load(path, "CHECKPOINT")

    def shapes(tensors):
        return {key: tuple(t.shape) for key, t in tensors.items() if not key.endswith("num_batches_tracked")}

    found = shapes(checkpoint.network_weights(content))
    said = content.get("network")  # ours say: another network may have the same tensors
    for name in sorted(MODELS, key=lambda name: name != said):
        with torch.device("meta"):
            fits = shapes(MODELS[name](num_classes=num_classes).state_dict()) == found
        if fits:  # and are finite: all files are looked at before the first is examined
            checkpoint.fill_network(MODELS[name](num_classes=num_classes), content, path, name, "CHECKPOINT")
            return name, content
    raise InputError("CHECKPOINT", f"{path} fits no network with {num_classes} classes; valid: {', '.join(MODELS)}")


def stage_pairs(student_maps, teacher_maps):
    """[(student's index, teacher's index), …] of the maps but the stems', the last with the last."""
    depth = min(len(student_maps), len(teacher_maps)) - 1
    return [(len(student_maps) - i, len(teacher_maps) - i) for i in range(depth, 0, -1)]


@torch.no_grad()
def measure_cka(student, teacher, loader, autocast):
    """[CKA of each stage] on the first four batches, in eval mode: the HSIC terms averaged over them, then divided."""
    student.eval()
    total = 0
    for step in range(min(4, len(loader))):
        images, _ = loader.batch(0, step)
        if step and len(images) < 4:  # CKA needs four: the rest of a split
            break
        with autocast():
            maps = [network(images, return_features=True)[1]["maps"] for network in (student, teacher)]
        terms = []
        for s, t in stage_pairs(*maps):
            a, b = maps[0][s], maps[1][t]
            terms.append(hsic_terms(F.interpolate(a.float(), b.shape[2:], mode="bilinear", align_corners=True), b))
        total = total + torch.stack(terms)
    return [round(cka, 4) for cka in cka_of_terms(total).tolist()]


@torch.no_grad()
def forward_speed(model, loader, autocast):
    """Images a second of the forward pass, batches of the loader's size: the median of seven, after two."""
    images, _ = loader.batch(0, 0)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        with autocast():
            model(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return len(images) / statistics.median(times[2:])


def patch_for(side):
    """The side of a token that divides a square map of `side` into 8 × 8 tokens, or the next more that can be."""
    return max(patch for patch in range(1, max(side // 8, 1) + 1) if side % patch == 0)


def probe(cfg, student, teacher, loader, device, steps):
    """Train the student for an epoch of DPK on its last two stages, or for so many steps.

    Raises FloatingPointError for a loss that is not finite.
    """
    image = loader.batch(0, 0)[0][:1]
    with torch.no_grad():
        maps = [network.eval()(image, return_features=True)[1]["maps"] for network in (student, teacher)]
    pairs = stage_pairs(*maps)[-2:]
    stages = [{"student": s, "teacher": t, "weight": weight, "encoder": SIZE, "decoder": SIZE,
               "patch": patch_for(maps[1][t].shape[2])}
              for (s, t), weight in zip(pairs, (0.6, 1.0)[-len(pairs):])]
    cfg = dataclasses.replace(cfg, distiller={"name": "dpk", "stages": stages},
                              connectors=ConnectorSettings(optimizer="adamw", lr=1e-3))
    run, table = engine.assemble(cfg, student, teacher, loader, None, device, 1), Table(len(loader), device)
    run.distiller.train()
    steps = min(steps or len(loader), len(loader))
    for step in progress(range(steps), "probe"):
        torch.manual_seed((cfg.seed * 10**6 + step) % 2**63)
        forward_backward(run, *loader.batch(0, step), table, step)
        for optimizer in run.optimizers.values():
            run.scaler.step(optimizer)
            optimizer.zero_grad()
        run.scaler.update()
    if failure := table.failure(steps, 0):
        raise FloatingPointError(f"probe: {failure}")


def examine(cfg, path, name, content, data, device, steps):
    """What is known of one teacher, as a dict; its network and the file's content as `identify` gave them."""
    teacher = checkpoint.fill_network(build_network(name, len(data.classes), cfg, device), content, path, name,
                                      "CHECKPOINT").eval()
    torch.manual_seed(cfg.seed % 2**63)
    student = build_network(cfg.student.name, len(data.classes), cfg, device)
    train_loader, test_loader = build_loaders(cfg, data, 0, 1, device)
    autocast = engine.build_autocast(cfg.precision, device)
    entry = {"teacher": name, "checkpoint": str(path), "student": cfg.student.name,
             "top1": engine.evaluate(teacher, test_loader, autocast)[0],
             "parameters": sum(p.numel() for p in teacher.parameters()),
             "images_per_s": round(forward_speed(teacher, train_loader, autocast), 1),
             "cka_before": measure_cka(student, teacher, test_loader, autocast)}
    try:
        probe(cfg, student, teacher, train_loader, device, steps)
    except FloatingPointError as error:
        raise FloatingPointError(f"{path}: {error}") from None
    return entry | {"cka_after": measure_cka(student, teacher, test_loader, autocast),
                    "probe_top1": engine.evaluate(student, test_loader, autocast)[0]}


def rank(entries, images):
    """The entries in order, each with `rank` and `reason`; images: how many the accuracies were measured on.

    Two accuracies are not told apart within the standard error of their difference.
    """
    left, ranked = list(entries), []
    while left:
        best = max(left, key=lambda entry: entry["top1"])
        share = best["top1"] / 100
        error = 100 * (2 * share * (1 - share) / images) ** 0.5
        tied = [entry for entry in left if best["top1"] - entry["top1"] <= error]
        first = max(tied, key=lambda entry: entry["images_per_s"])
        if first is not best:
            reason = (f"{best['top1'] - first['top1']:.2f} below {best['teacher']}, within the error of {error:.2f}, "
                      f"and {first['images_per_s'] / best['images_per_s']:.1f} times as fast")
        elif not ranked:
            reason = "the most accurate" if len(tied) == 1 else f"the fastest of {len(tied)} within {error:.2f}"
        elif first["top1"] >= ranked[0]["top1"]:
            reason = f"{first['top1'] - ranked[0]['top1']:.2f} above the first, within the error, but slower"
        else:
            reason = f"{ranked[0]['top1'] - first['top1']:.2f} less accurate than the first"
        left.remove(first)
        ranked.append(first | {"rank": len(ranked) + 1, "reason": reason})
    return ranked


def table(ranked):
    """The ranking as lines of text."""
    def ckas(entry):
        return ", ".join(f"{a:.2f} to {b:.2f}" for a, b in zip(entry["cka_before"], entry["cka_after"]))

    rows = [("", "teacher", "top-1", "parameters", "images/s", "CKA by stage, before to after probe", "probe", "why")]
    rows += [(str(e["rank"]), e["teacher"], f"{e['top1']:.2f}", f"{e['parameters']:,}", f"{e['images_per_s']:.0f}",
              ckas(e), f"{e['probe_top1']:.2f}", e["reason"]) for e in ranked]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def draw(ranked, path):
    """CKA of the last stage over the teachers' accuracy, before and after the probe, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path}: not drawn, matplotlib is not installed", file=sys.stderr)
        return
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for key, label in ("cka_before", "fresh student"), ("cka_after", "after the probe"):
        axes.scatter([e["top1"] for e in ranked], [e[key][-1] for e in ranked], label=label)
    for e in ranked:
        axes.annotate(e["teacher"], (e["top1"], e["cka_after"][-1]))
    axes.set(xlabel="teacher's top-1 in per cent", ylabel="CKA to the student, last stage")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:], dpi=100, bbox_inches="tight")
    checkpoint.write(path, buffer.getbuffer(), "--figure")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="resnet20", help="the student's network")
    parser.add_argument("--data", default="data", help="folder of the data set (data.root)")
    parser.add_argument("--steps", type=int, default=0, help="steps of the probe; 0: an epoch")
    parser.add_argument("--out", metavar="FILE", help="write the ranking there too, a JSON line a teacher")
    parser.add_argument("--figure", metavar="FILE", help="draw the ranking there")
    parser.add_argument("arguments", nargs="+", metavar="CHECKPOINT or key.sub=value",
                        help="the teachers' files, and settings of train_cifar.py, as data.name=cifar10 or device=cpu")
    args = parser.parse_intermixed_args(argv)

    def action():
        overrides = [a for a in args.arguments if "=" in a and not Path(a).exists()]
        paths = [a for a in args.arguments if a not in overrides]
        own = [f"student.name={yaml_value(args.student)}", f"data.root={yaml_value(args.data)}"]
        cfg = load_config(Settings, CFG, [*own, *overrides])
        check_optimizers(cfg.optimizer, cfg.connectors)
        for override in overrides:
            key = override.partition("=")[0]
            if key.partition(".")[0] not in USED:
                raise InputError(override, f"has no effect here; valid: {', '.join(USED)}")
            if key in UNUSED:
                raise InputError(override, "has no effect on a probe of one epoch; leave it out")
        if not paths:
            raise InputError("CHECKPOINT", "none was given")
        if args.steps < 0:
            raise InputError("--steps", f"{args.steps} is negative")
        for key, file in ("--out", args.out), ("--figure", args.figure):
            if file and (Path(file).is_dir() or not os.access(Path(file).parent, os.W_OK)):
                raise InputError(key, f"{file} is a folder, or its folder does not exist or cannot be written to")
        if args.figure and Path(args.figure).suffix.lower() not in FORMATS:
            raise InputError("--figure", f"{args.figure}: valid: {', '.join(FORMATS)}")
        device = engine.pick_device(cfg)
        engine.warn_of_emulation(cfg.precision, device)
        data = load_data(**dataclasses.asdict(cfg.data), val_split=cfg.val_split)
        found = {path: identify(path, len(data.classes)) for path in paths}
        for path in found:
            engine.check_data(cfg, "CHECKPOINT", path, found[path][1], data.classes)
        entries = [examine(cfg, path, *found[path], data, device, args.steps) for path in found]
        names = [entry["teacher"] for entry in entries]
        for entry in entries:
            if names.count(entry["teacher"]) > 1:
                entry["teacher"] += f" ({entry['checkpoint']})"
        ranked = rank(entries, len(data.test.labels))
        print(table(ranked))
        if args.out:
            write_log(args.out, ranked, "--out")
        if args.figure:
            draw(ranked, args.figure)

    return engine.exit_code("rank_teachers.py", action)


if __name__ == "__main__":
    sys.exit(main())
