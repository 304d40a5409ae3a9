"""A tree of image files, decoded, cropped and augmented by worker processes; ImageNet for instance.

Workers hand over uint8; the device normalizes. What is drawn for an image follows from (seed, epoch, index) alone:
neither the number of workers nor a restart in mid-epoch changes it.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import zlib
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import v2

from utils.data import STATISTICS, normalize, to_rgb
from utils.errors import InputError, one_line

MEAN, STD = STATISTICS["folder"]
UNREADABLE = 0.001  # a larger share of the images stops the run


class Tree:
    """The files of one split, `<root>/<split>/<class>/*`: len(), classes, name(i), open(i) -> (PIL image, label).

    fingerprint: a number that other names of files would change.
    """

    def __init__(self, root, split):
        folder = Path(root, split)
        try:
            listing = ImageFolder(folder)
        except OSError as error:  # no such folder, no class in it, a class without images
            raise InputError("data.root", f"{folder}: {one_line(error)}") from None
        self.classes = listing.classes
        # As two arrays: a list of a million tuples would be copied to every worker as its reference counts change.
        self.paths = np.array([os.fsencode(os.path.relpath(path, folder)) for path, _ in listing.samples])
        self.labels, self.folder = np.array(listing.targets), str(folder)
        self.fingerprint = zlib.crc32(self.paths)

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        return os.path.join(self.folder, os.fsdecode(self.paths[i].item()))

    def open(self, i):
        return Image.open(self.name(i)), int(self.labels[i])


class Fake:
    """Noise in the place of images, for dry runs: 1,000 classes."""

    def __init__(self, split, samples, size):
        self.classes = [str(label) for label in range(1000)]
        self.fingerprint = samples
        self.images = FakeData(samples, (3, size, size), 1000, random_offset=0 if split == "train" else 10**9)

    def __len__(self):
        return len(self.images)

    def name(self, i):
        return f"fake image {i}"

    def open(self, i):
        image, label = self.images[i]
        return image, int(label)


def random_resized_crop(image, size):
    """RandomResizedCrop(size) of torchvision with its defaults: a file just opened by Pillow -> uint8 (3, size, size).

    PyTorch resizes bytes in half of Pillow's time, to within one of 255. A JPEG is decoded at a half, a quarter or an
    eighth of its size where the crop leaves `size` pixels even so: tests/benchmark.py images prints what that saves,
    and by how much the pixels differ.
    """
    crop = v2.RandomResizedCrop(size).make_params([image])
    left, top, width, height = (crop[key] for key in ("left", "top", "width", "height"))
    full, factor = image.width, min(width, height) / size
    if factor < 2:
        pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)  # (3, H, W)
        region = pixels[:, top : top + height, left : left + width]
        return torch.nn.functional.interpolate(region[None], (size, size), mode="bilinear", antialias=True)[0]
    image.draft("RGB", (int(image.width / factor), int(image.height / factor)))  # at least so large; JPEG alone
    scale = round(full / image.width)  # 1, 2, 4 or 8: the last row and column may stand for fewer pixels
    box = [edge / scale for edge in (left, top, left + width, top + height)]  # a fraction of a pixel counts here
    return v2.functional.pil_to_tensor(to_rgb(image).resize((size, size), Image.Resampling.BILINEAR, box))


class Images(torch.utils.data.Dataset):
    """Images of a split as uint8 (size, size, 3), with labels; item (epoch, index) -> (image, label, index, problems).

    train: random crop and flip, then `randaugment` (two operations of that magnitude, 0 to 30), `color_jitter` (of
    brightness, contrast and saturation) and `random_erasing` (probability; with the mean colour), where not 0.
    Otherwise the shorter side is resized to size · 256 / 224 and the centre cut out.
    An unreadable file is in `problems`, [(path, reason)]. In training another image stands in for it, whose index comes
    with it; in validation the image is None.
    """

    def __init__(self, source, size, *, train, seed=0, randaugment=0, color_jitter=0.0, random_erasing=0.0):
        self.source, self.size, self.train, self.seed = source, size, train, seed
        steps = [v2.RandomHorizontalFlip()]
        if randaugment or color_jitter:  # faster on Pillow's images than on tensors
            steps.append(v2.ToPILImage())
            if randaugment:
                steps.append(v2.RandAugment(2, randaugment))
            if color_jitter:
                steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
            steps.append(v2.PILToTensor())
        if random_erasing:
            steps.append(v2.RandomErasing(random_erasing, value=[round(255 * mean) for mean in MEAN]))
        self.augment = v2.Compose(steps)
        self.centre = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()])

    def __len__(self):
        return len(self.source)

    def read(self, index):
        """-> uint8 (size, size, 3), label. Raises what Pillow raises for a damaged file, ValueError for 16 bits."""
        image, label = self.source.open(index)
        with image:
            if self.train:
                image = self.augment(random_resized_crop(image, self.size))
            else:
                image = self.centre(to_rgb(image))
        return image.permute(1, 2, 0), label

    def __getitem__(self, item):
        epoch, index = item
        problems = []
        before = torch.get_rng_state()
        for attempt in range(100 if self.train else 1):
            i = (index + 7919 * attempt) % len(self)  # far enough not to be of the same broken folder
            seed = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]
            torch.default_generator.manual_seed(int(seed))  # torch.manual_seed visits every device: 0.2 ms an image
            try:
                return *self.read(i), i, problems
            except Exception as error:  # noqa: BLE001 - Pillow raises OSError, SyntaxError, struct.error, ...
                problems.append((self.source.name(i), one_line(error)))
            finally:
                torch.set_rng_state(before)
        return None, 0, 0, problems


def collate(items):
    """[(image, label, index, problems)] -> images uint8 (B, S, S, 3), labels int64 (B,), indices int64 (B,), problems;
    without the unreadable."""
    images = [image for image, _, _, _ in items if image is not None]
    numbers = [(label, index) for image, label, index, _ in items if image is not None]
    labels, indices = torch.tensor(numbers, dtype=torch.int64).view(-1, 2).T.contiguous()
    problems = [problem for _, _, _, some in items for problem in some]
    return torch.stack(images) if images else torch.empty(0), labels, indices, problems


# A signal to the whole job, as SLURM, torchrun and Ctrl-C in a terminal send it, is for the process that started the
# workers: it still wants batches, to end its step and to save. So they ignore it, and leave when that process does.


@contextlib.contextmanager
def sigterm_blocked():
    """with …: processes started meanwhile, a server of forks among them, are born with SIGTERM blocked."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # started inside the block it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(_):
    """In a worker: ignore the signals, and leave when the process that started it is gone.

    (DataLoader's own watch is of the parent, which may be a server of forks.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


@atexit.register
def end_workers():
    """Kill them at exit: they ignore the SIGTERM that multiprocessing would send before waiting for them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would report them as failed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def worker_context(world):
    """How worker processes start. Beside a process group's threads a fork may hang: one of them can hold a lock of
    Python's that the new process then waits for. So several processes fork theirs from a small server without threads.
    """
    if world == 1 or "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision"])  # imported once and not by each worker
    return context


class Order:
    """The batches of one process as lists of (epoch, index), for a DataLoader; set epoch and first, then iterate."""

    def __init__(self, n, batch, *, train, seed, rank, world, accumulate):
        self.n, self.batch, self.train, self.seed = n, batch, train, seed
        self.rank, self.world, self.accumulate, self.epoch, self.first = rank, world, accumulate, 0, 0

    def __len__(self):
        if self.train:
            return self.n // (self.batch * self.world * self.accumulate) * self.accumulate
        return -(-len(range(self.rank, self.n, self.world)) // self.batch)  # rounded up

    def __iter__(self):
        order = np.arange(self.n)
        if self.train:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n)
        # Together the processes see exactly the batch that one process would.
        mine = order[self.rank :: self.world]
        for i in range(self.first, len(self)):
            yield [(self.epoch, int(index)) for index in mine[i * self.batch : (i + 1) * self.batch]]


class ImageLoader:
    """Batches of one process from worker processes, on the device; the last incomplete step of training is left out.

    batch_size: images a step, over all `world` processes and `accumulate` batches. train=False: images rank, rank +
    world, …, batch_size of them at a time; over all processes every image exactly once.
    len(): steps, in training of `accumulate` batches each. unreadable: how many files could not be read this epoch.
    indices: int64 (B,) of the last batch among the images, on the device. num_samples: how many images there are.
    fingerprint: of their source.
    Raises InputError when batch_size is not a multiple of world · accumulate, or training has no step at all; in
    training also where no image of a batch can be read.
    """

    def __init__(self, images, batch_size, *, train, seed=0, rank=0, world=1, accumulate=1, workers=0, device="cpu",
                 channels_last=True):
        parts = world * accumulate if train else 1
        if batch_size % parts:
            raise InputError("batch_size", f"{batch_size} is not a multiple of {world} processes x {accumulate}")
        self.images, self.rank, self.device, self.channels_last = images, rank, torch.device(device), channels_last
        self.accumulate, self.unreadable = accumulate, 0
        self.num_samples, self.indices, self.fingerprint = len(images), None, images.source.fingerprint
        self.order = Order(len(images), batch_size // parts, train=train, seed=seed, rank=rank, world=world,
                           accumulate=accumulate)
        if train and len(images) < batch_size:
            raise InputError("batch_size", f"{len(images)} training images are too few for {batch_size}")
        self.mean, self.std = (torch.tensor(value, device=self.device) for value in (MEAN, STD))
        self.loader = DataLoader(images, batch_sampler=self.order, num_workers=workers, collate_fn=collate,
                                 pin_memory=self.device.type == "cuda", persistent_workers=workers > 0,
                                 worker_init_fn=init_worker,
                                 multiprocessing_context=worker_context(world) if workers else None,
                                 generator=torch.Generator())  # or it draws from the stream of the training loop

    def __len__(self):
        return len(self.order) // self.accumulate

    def epoch(self, epoch, first_step=0):
        """Yield images float32 (B, 3, S, S) and labels (B,) of an epoch's batches, from a step on."""
        self.order.epoch, self.order.first = epoch, first_step * self.accumulate
        with sigterm_blocked() if self.loader.num_workers else contextlib.nullcontext():
            batches = iter(self.loader)
        for images, labels, indices, problems in batches:
            for path, reason in problems:
                print(f"left out: {path}: {reason}", file=sys.stderr, flush=True)
            self.unreadable += len(problems)
            if not len(labels) and self.order.train:  # a hundred in a row: nearly all are
                self.check(self.unreadable)
            if len(labels):
                images, labels, self.indices = (tensor.to(self.device, non_blocking=True)
                                                for tensor in (images, labels, indices))
                images = normalize(images, self.mean, self.std)
                yield images if self.channels_last else images.contiguous(), labels

    def check(self, unreadable):
        """Raise InputError where so many files, of all processes, are too many."""
        if unreadable > UNREADABLE * len(self.images):
            raise InputError("data.root", f"{unreadable} of {len(self.images)} images could not be read, more than "
                             f"{100 * UNREADABLE} %; the lines above name them")
