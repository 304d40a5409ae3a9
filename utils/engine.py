"""What both scripts do with a run: put it together, train an epoch, evaluate, go on from where it was left."""

import contextlib
import dataclasses
import functools
import inspect
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.parallel import DistributedDataParallel

from distillers import DISTILLERS, NO_SETTINGS, with_defaults
from distillers.dpk import Block
from utils import checkpoint, distributed
from utils.config import check_arguments, flatten
from utils.errors import Busy, InputError, one_line
from utils.log import Table, epoch_line, progress, read_log, tensorboard_writer
from utils.malloc import keep_freed_memory
from utils.optim import build_optimizers, set_learning_rates
from utils.state import load_state, lock, open_log, restore, save_state
from utils.step import GraphedStep, WaitsForDevice, forward_backward
from utils.stopping import SIGNALLED, Stopped, Stopper

# ------------------------------------------------------------------------------------------------------------ set-up


def check_distiller(cfg):
    """Raise InputError unless `cfg.distiller` names a distiller and arguments of it; its defaults are added."""
    name = cfg.distiller.get("name")
    if not isinstance(name, str) or name not in DISTILLERS:
        raise InputError("distiller.name", f"unknown distiller {name!r}; valid: {', '.join(DISTILLERS)}")
    arguments = {key: value for key, value in cfg.distiller.items() if key != "name"}
    check_arguments(DISTILLERS[name].__init__, arguments, "distiller.", hidden=NO_SETTINGS)
    cfg.distiller = with_defaults(cfg.distiller)  # a run says all that it was, and cannot go on with other defaults


def pick_device(cfg):
    """The torch.device of the setting; sets what all of the program does on it."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device", "cuda is not available here; valid: auto, cpu")
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # but for the last batch, all have the same shape
    torch.backends.cudnn.allow_tf32 = False  # fp32 is what it says; bf16 is the fast one
    # cuDNN's attention is planned anew for each number of tokens, and DPK's changes from step to step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def warn_of_emulation(precision, device):
    """A line on stderr where bf16 is emulated, and slow: a GPU older than Ampere, an x86 CPU without AVX-512 BF16."""
    if precision != "bf16":
        return
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        print("precision: this GPU only emulates bf16; precision=fp16 is meant for it", file=sys.stderr)
    cpu = torch.cpu.get_capabilities()
    if device.type == "cpu" and cpu["architecture"] == "x86_64" and not cpu.get("avx512_bf16"):
        print("precision: this CPU only emulates bf16; precision=fp32 is several times faster", file=sys.stderr)


def warn_of_settings(cfg):
    """Lines on stderr for settings that are valid but hardly meant: of a longer run, or DPK's modules under SGD."""
    if cfg.distiller["name"] == "dpk" and cfg.connectors.optimizer == "student":
        print(f"connectors.optimizer: DPK's transformers share the student's optimizer, lr {cfg.optimizer.lr}; its "
              "authors use an AdamW of their own: connectors.optimizer=adamw", file=sys.stderr)
    late = [milestone for milestone in cfg.optimizer.milestones if milestone >= cfg.epochs]
    if cfg.optimizer.schedule == "step" and late:
        print(f"optimizer.milestones: {', '.join(map(str, late))} never reached in a run of {cfg.epochs} epochs",
              file=sys.stderr)
    warm_ups = {"optimizer.warmup_epochs": cfg.optimizer.warmup_epochs,
                "distiller.warmup_epochs": cfg.distiller.get("warmup_epochs", 0)}
    if cfg.connectors.optimizer == "adamw":
        warm_ups["connectors.warmup_epochs"] = cfg.connectors.warmup_epochs
    for key, epochs in warm_ups.items():
        if epochs >= cfg.epochs:
            print(f"{key}: {epochs} epochs of warm-up do not end within the run's {cfg.epochs}", file=sys.stderr)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build_autocast(precision, device):
    """A function that makes autocast contexts; with fp32 they change nothing."""
    return functools.partial(torch.autocast, device.type, DTYPES[precision], enabled=precision != "fp32")


def build_distiller(cfg, student, teacher, **known):
    """The distiller of the settings around two networks; what its constructor refuses is bad input.

    known: what the script gives, as num_samples=50000, to a distiller that has such an argument.
    """
    arguments = {key: value for key, value in cfg.distiller.items() if key != "name"}
    distiller = DISTILLERS[cfg.distiller["name"]]
    for key, value in ({"image_size": cfg.data.size} | known).items():
        if key in inspect.signature(distiller).parameters:
            arguments[key] = value
    try:
        built = distiller(student, teacher, **arguments)
    except ValueError as error:
        key, _, message = str(error).partition(": ")
        if key in inspect.signature(distiller).parameters:
            raise InputError(f"distiller.{key}", message) from None
        raise InputError("distiller", str(error)) from None
    if teacher in built.modules():
        raise InputError("distiller", f"{cfg.distiller['name']} holds the teacher as a module: train() would move its "
                         "BatchNorm, checkpoints would contain it; distillers/kd.py shows how to hold it")
    return built


def cast_frozen(network, dtype):
    """Weights of a network that is not trained, once in the dtype to which autocast would cast them in every step."""
    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.to(dtype)


def assemble(cfg, student, teacher, train_loader, test_loader, device, world, *, teacher_file="", accumulate=1,
             classes=(), graph=False):
    """All that a run works with, around networks on the device.

    classes: their names, in the order of the labels.
    graph: run a step as one CUDA graph (one process, accumulate=1, a train_loader that can choose and load).
    """
    run = SimpleNamespace(student=student, teacher=teacher, teacher_file=teacher_file, train_loader=train_loader,
                          test_loader=test_loader, classes=list(classes), device=device, accumulate=accumulate,
                          autocast=build_autocast(cfg.precision, device))
    fingerprints = [loader.fingerprint for loader in (train_loader, test_loader) if loader is not None]
    run.images_checksum = zlib.crc32(repr((run.classes, fingerprints)).encode())  # of classes and images
    if not distributed.is_the_same(run.images_checksum, device):
        raise InputError("data.root", "not all processes see the same images; valid: the same files on each node")
    run.teacher_checksum = 0
    for value in teacher.state_dict().values() if teacher is not None else ():
        run.teacher_checksum = zlib.crc32(value.cpu().contiguous().numpy(), run.teacher_checksum)
    if not distributed.is_the_same(run.teacher_checksum, device):
        raise InputError("teacher", f"not all processes see the same {teacher_file}; valid: one file on all nodes")
    if len(run.classes) == 1:
        raise InputError("data.root", f"there is one class, {run.classes[0]}; valid: two or more")
    if cfg.batch_size // (world * accumulate) < 2:
        raise InputError("batch_size", f"{cfg.batch_size} is one image for each process and batch, and BatchNorm and "
                         f"losses between images need two; valid: {2 * world * accumulate} or more")
    torch.manual_seed((cfg.seed + 1) % 2**63)  # the connectors', whatever was drawn to train or load a teacher
    memory_format = torch.channels_last if cfg.channels_last else torch.contiguous_format
    run.distiller = build_distiller(cfg, student, teacher, num_samples=train_loader.num_samples, masked=graph)
    run.distiller.to(device, memory_format=memory_format)
    if teacher is not None:
        cast_frozen(teacher, DTYPES[cfg.precision])
    run.optimizers = build_optimizers(run.distiller, cfg.optimizer, cfg.connectors)
    run.scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    blocks = [module for module in run.distiller.modules() if isinstance(module, Block)]  # of one shape: compiled once
    for module in (student, teacher, *blocks) if cfg.compile else ():
        if module is not None:
            module.compile()
    run.model = run.distiller
    run.graph = GraphedStep(device) if graph else None
    if world > 1:
        run.model = DistributedDataParallel(run.distiller, gradient_as_bucket_view=True)
        # Not rank 0's buffers to all in every step: `evaluate` does so with BatchNorm's, and CRD's banks are the same
        # everywhere as it is. (The argument is deprecated from torch 2.14 on, the attribute is not.)
        run.model.broadcast_buffers = False
    return run


# --------------------------------------------------------------------------------------------------------- one epoch


def weights_failure(run, epoch, step):
    """What to say of weights and buffers that are not all finite, or "": before they are saved."""
    finite = [value.isfinite().all() for value in run.distiller.state_dict().values() if value.is_floating_point()]
    return "" if torch.stack(finite).all() else f"the weights are not finite after epoch {epoch + 1}, step {step}"


def prepare_graph(run, epoch):
    """The run's GraphedStep, ready for the epoch; None where there is none, or the distiller's step cannot be one."""
    if run.graph is not None:
        try:
            run.graph.prepare(run, run.train_loader.choose(epoch, 0))
        except WaitsForDevice as error:
            print(f"cuda_graph: this distiller's step cannot be captured as one ({error}); going on without",
                  file=sys.stderr)
            run.graph = None
    return run.graph


def train_one_epoch(cfg, run, epoch, first_step, table, clock, stop, save):
    """Steps `first_step` to the end of `epoch`, or to a stop; returns the number of steps done.

    A step is `run.accumulate` batches of each process. Rows go to `table`; clock["waited"] counts the seconds spent
    waiting for data. Every cfg.save_every steps save(step) is called.
    Raises FloatingPointError for a loss, or weights to be saved, that are not finite, InputError where too much of the
    data cannot be read.
    """
    run.model.train()
    loader, graph = run.train_loader, prepare_graph(run, epoch)
    done, steps, failure = first_step, len(run.train_loader), ""
    batches = loader.epoch(epoch, first_step if graph is None else steps - 1)  # a graph leaves the last, smaller one
    for step in progress(range(first_step, steps), f"epoch {epoch + 1}/{cfg.epochs}"):
        # Crops, flips and token positions follow from (seed, epoch, step, rank): a resumed run draws the same.
        torch.manual_seed((((cfg.seed * 10**5 + epoch) * 10**6 + step) * 10**4 + loader.rank) % 2**63)
        graphed = graph is not None and graph(loader.choose(epoch, step), table, step)
        for part in range(0 if graphed else run.accumulate):
            start = time.perf_counter()
            images, targets = next(batches)
            clock["waited"] += time.perf_counter() - start
            # DDP averages the gradients of all processes with the last batch of a step, once.
            alone = run.model is not run.distiller and part + 1 < run.accumulate
            with run.model.no_sync() if alone else contextlib.nullcontext():
                forward_backward(run, images, targets, table, step, run.accumulate)
        for optimizer in run.optimizers.values():
            run.scaler.step(optimizer)
            optimizer.zero_grad()
        run.scaler.update()
        done = step + 1
        save_now = cfg.save_every and done % cfg.save_every == 0
        now = done == steps or save_now
        if now or done % cfg.log_every == 0:
            failure = failure or table.failure(done, epoch) or (weights_failure(run, epoch, done) if now else "")
        stopping = stop(now, failed=bool(failure), count=loader.unreadable)
        if stopping:  # nobody saves before all have looked at their losses
            failure = failure or table.failure(done, epoch) or weights_failure(run, epoch, done)
            stop(now=True, failed=bool(failure), count=loader.unreadable)
        if stop.any_failed:
            raise FloatingPointError(failure or "a loss of another process is not finite")
        if stop.total:
            loader.check(stop.total)
        if stopping:
            break
        if save_now and done < steps:
            save(done)
    return done


@torch.no_grad()
def evaluate(model, loader, autocast):
    """(top-1, top-5) in per cent over the whole split: counts summed over all processes, then divided.

    Raises Stopped where one of the processes was asked to stop, InputError where too much of the data cannot be read.
    """
    model.eval()
    loader.unreadable = 0
    distributed.broadcast_buffers(model)  # each process has BatchNorm statistics of its own; rank 0's are saved
    # top-1 right, top-5 right, images, processes asked to stop, unreadable files
    counts = torch.zeros(5, dtype=torch.int64, device=loader.device)
    for images, targets in loader.epoch(0):
        with autocast():
            logits = model(images)
        right = logits.topk(min(5, logits.shape[1])).indices == targets.unsqueeze(1)  # (B, 5)
        counts[0] += right[:, 0].sum()
        counts[1] += right.sum()
        counts[2] += len(targets)
        if SIGNALLED:  # a time limit can wait for the next step
            counts[3] += 1
            break
    counts[4] = loader.unreadable
    first, five, total, stopped, loader.unreadable = distributed.sum_over_processes(counts).tolist()
    if stopped:
        raise Stopped("stopped while evaluating")
    if loader.unreadable:
        loader.check(loader.unreadable)
    return 100 * first / max(total, 1), 100 * five / max(total, 1)


# ----------------------------------------------------------------------------------------------------------- one run


def data_settings(cfg):
    """-> {"data.name": ..., ..., "val_split": ...}: which images, as far as the script's Settings have such keys."""
    flat = flatten(dataclasses.asdict(cfg))
    return {key: value for key, value in flat.items() if key.startswith("data.") or key == "val_split"}


def check_data(cfg, key, path, content, classes):
    """Raise InputError on `key` where a file was trained on other classes; lines on stderr where it was on other data,
    or may have seen the images held out.
    """
    here, there, theirs = data_settings(cfg), content.get("data"), content.get("classes")  # our files have them
    for a, b in zip(theirs, classes) if isinstance(theirs, list) else ():
        if a != b:
            raise InputError(key, f"{path} was trained on other classes: {a} there is {b} here")
    if not distributed.is_main():
        return
    for name in ("data.name", "data.size", "data.samples", "val_split") if isinstance(there, dict) else ():
        if name in here and here[name] != there.get(name, here[name]):
            print(f"{key}: {path} was trained with {name}={there[name]}, here it is {here[name]}", file=sys.stderr)
    if here.get("val_split") and not isinstance(there, dict):
        print(f"{key}: {path} does not say on what it was trained; if on the {cfg.val_split} images held out too, it "
              "is better on them than on the test set", file=sys.stderr)


def check_teacher(cfg, run, say):
    """Print the teacher's accuracy; stop where it is not what the settings promise."""
    top1, _ = evaluate(run.teacher, run.test_loader, run.autocast)
    say(f"teacher {cfg.teacher.name} from {run.teacher_file}: top-1 {top1:.2f} in {cfg.precision}")
    if cfg.teacher.accuracy is not None and top1 < cfg.teacher.accuracy - 0.5:
        raise InputError("teacher.accuracy", f"{run.teacher_file} has top-1 {top1:.2f}, more than 0.5 below "
                         f"{cfg.teacher.accuracy}: another file, other data, or another normalisation? "
                         "teacher.accuracy=null goes on without this check")


def train(cfg, set_up, ignored, timeout=None):
    """Train until the run is finished, from where it was left; returns the log's last line, on rank 0.

    set_up(cfg, rank, world, device) -> an `assemble`d run. `ignored`: settings in which a resumed run may differ.
    timeout: seconds after which a process that waits for another gives up; None: PyTorch's.
    Raises InputError for bad input, Stopped when asked to stop, FloatingPointError for a loss that is not finite.
    """
    folder = Path(cfg.runs, cfg.name)
    rank, world, device = distributed.start(pick_device(cfg), timeout)
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    try:
        # Before the state is read, which another may be saving; until this function ends, for it holds the open file.
        locked = lock(folder / ".lock") if rank == 0 else True
        if not locked:
            raise Busy("name", f"another process is at {folder}; wait for it, or give another name=...")
        state, log = load_state(cfg, folder, ignored), read_log(folder / "log.jsonl")
    except InputError:
        distributed.is_the_same(-2 - rank, device)  # a number of nobody below: the others end there as well
        raise
    finished = bool(state and (folder / "student.pth").exists() and log[1:] and log[-1]["epoch"] == cfg.epochs)
    where = (state["epoch"] * 10**9 + state["step"]) * 2 + finished if state else -1  # all three in one number
    if not distributed.is_the_same(where, device):
        raise InputError("runs", f"not all processes see the same {folder}; valid: a folder that all nodes share")
    if finished:
        last = log[-1]
        say(f"{folder} is finished: epoch {last['epoch']}, top-1 {last['top1']:.2f}; student in {folder}/student.pth")
        return last

    if rank == 0:
        warn_of_emulation(cfg.precision, device)
        warn_of_settings(cfg)
    run = set_up(cfg, rank, world, device)
    if state and state.get("images", run.images_checksum) != run.images_checksum:  # older files do not say
        raise InputError("data.root", f"other images or classes than {folder}/latest.pth was trained on; to start "
                         "another run give another name=..., to go on with that one bring them back")
    if state and state.get("teacher", run.teacher_checksum) != run.teacher_checksum:
        raise InputError("teacher", f"{run.teacher_file} holds other weights than {folder}/latest.pth was trained "
                         "under; to start another run give another name=..., to go on with that one bring them back")
    stop = Stopper(cfg.stop_after, timeout)
    size = cfg.batch_size // (world * run.accumulate)
    say(f"{folder}: {cfg.batch_size} images a step = {world} {'processes' if world > 1 else 'process'} × "
        f"{run.accumulate} × {size}; {len(run.train_loader)} steps an epoch, {cfg.epochs} epochs")
    if run.teacher is not None and not state:  # once, and not at each restart
        check_teacher(cfg, run, say)
    epoch, step, best, saved_table = 0, 0, 0.0, None
    clock = {"seconds": 0.0, "waited": 0.0, "unreadable": 0}  # of this epoch, as saved
    if state:
        epoch, step, best, clock, saved_table = (state[k] for k in ("epoch", "step", "best", "clock", "table"))
        try:
            restore(run, state)
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            raise InputError("name", f"{folder}/latest.pth does not fit ({one_line(error)}): of "
                             "another version of the code? To start another run give another name=...") from None
        say(f"{folder}: going on at epoch {epoch + 1}, step {step + 1}")
    if rank == 0:
        open_log(cfg, folder, state, world, device)
    state = None  # as large as all weights and optimizers
    writer = tensorboard_writer(folder) if cfg.tensorboard and rank == 0 else None

    def save(step):  # where the loop below stands
        unreadable = torch.tensor(run.train_loader.unreadable, device=device)
        clock["unreadable"] = distributed.sum_over_processes(unreadable).item()
        clock["seconds"] = time.monotonic() - start
        save_state(cfg, run, folder, table, epoch=epoch, step=step, best=best, clock=clock)

    while epoch < cfg.epochs:
        start = time.monotonic() - clock["seconds"]
        if hasattr(run.distiller, "set_epoch"):
            run.distiller.set_epoch(epoch)
        rates = set_learning_rates(run.optimizers, cfg.optimizer, cfg.connectors, epoch, cfg.epochs)
        table = Table(len(run.train_loader), device, saved_table)
        if rank > 0:
            table.clear()  # the sums of all processes so far are rank 0's
        run.train_loader.unreadable = clock["unreadable"] if rank == 0 else 0

        try:
            step = train_one_epoch(cfg, run, epoch, step, table, clock, stop, save)
        except FloatingPointError as error:
            saved = "; latest.pth there is as of the last good save" if (folder / "latest.pth").exists() else ""
            raise FloatingPointError(f"{folder}: {error}{saved}") from None
        save(step)
        if stop.asked:
            raise Stopped(f"{folder}: saved at epoch {epoch + 1}, step {step}; the same command goes on from there")
        try:
            top1, top5 = evaluate(run.student, run.test_loader, run.autocast)
        except Stopped:
            raise Stopped(f"{folder}: saved at epoch {epoch + 1}, before its evaluation; the same command goes on from "
                          "there") from None
        best = max(best, top1)
        entry = {"epoch": epoch + 1, "top1": top1, "top5": top5, "best_top1": best} | rates | table.means()
        entry |= {"images_per_s": table.images() / clock["seconds"], "data_wait": clock["waited"] / clock["seconds"]}
        unreadable = clock["unreadable"] + run.test_loader.unreadable
        entry |= {"unreadable": unreadable} if unreadable else {}
        entry |= {"seconds": time.monotonic() - start}
        say(epoch_line(entry, cfg.epochs))
        if rank == 0:
            checkpoint.append(folder / "log.jsonl", entry)
        for key, value in entry.items() if writer else ():
            writer.add_scalar(key, float("nan") if value is None else value, epoch + 1)
        epoch, step, saved_table, clock = epoch + 1, 0, None, {"seconds": 0.0, "waited": 0.0, "unreadable": 0}

    last = {}
    if rank == 0:
        last = read_log(folder / "log.jsonl")[-1]
        data = {key: value for key, value in data_settings(cfg).items() if key not in ignored}
        checkpoint.save(folder / "student.pth", {"model": run.student.state_dict(), "epoch": epoch,
                                                 "accuracy": last["top1"], "network": cfg.student.name, "data": data,
                                                 "classes": run.classes})
        say(f"{folder}: finished, top-1 {last['top1']:.2f}; student in {folder}/student.pth")
    distributed.barrier()
    return last


def exit_code(path, action):
    """0 after action(); a line on stderr and 2 for bad input or a file that the system refuses, 3 where another process
    is at the run, 1 for a loss that is not finite, 130 for Ctrl-C where there is nothing to save.
    """
    SIGNALLED.clear()
    code = 0
    try:
        action()
    except InputError as error:
        if distributed.is_main_of_node():  # what is wrong may be so on one node alone
            print(f"error: {path}: {error}", file=sys.stderr)
        code = 3 if isinstance(error, Busy) else 2
    except OSError as error:
        if error.filename is None:  # not of a file, so not of the input
            raise
        print(f"error: {path}: {error.filename}: {error.strerror}", file=sys.stderr)
        code = 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except Stopped as stopped:
        if distributed.is_main():
            print(stopped)
    except KeyboardInterrupt:  # with a Stopper it would be a Stopped
        if distributed.is_main():
            print("stopped", file=sys.stderr)
        code = 130
    distributed.finish(together=code < 2)  # bad input may be one process's alone; an unforeseen error ends it at once
    return code
