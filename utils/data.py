"""Data sets as uint8 tensors on the training device, augmented there in a few vectorised operations.

CIFAR-100 is 150 MB and one gather crops a batch: there is nothing left for worker processes to do.
"""

import os
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import InputError, one_line
from utils.synthetic import make_synthetic

STATISTICS = {  # mean and standard deviation of a pixel in [0, 1], for R, G and B
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
    "synthetic": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}


class Split(NamedTuple):
    images: Tensor  # uint8 (N, H, W, 3)
    labels: Tensor  # int64 (N,)


class Data(NamedTuple):
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple
    std: tuple


def load_data(name, root="data", *, size=32, samples=10000, val_split=0):
    """-> Data, on the CPU. name: "cifar10", "cifar100", "folder" or "synthetic".

    cifar10/100: `<root>/<name>.npz`; where it is missing, the original is downloaded and the .npz written.
    folder: `<root>/{train,val}/<class>/*`, every image resized to size x size and held in memory.
    synthetic: `samples` training and samples // 5 test images of size x size, made in memory.
    val_split: so many training images, the same ones for every seed, take the place of the test set.
    Raises InputError for another size of CIFAR, a val_split of all images, and data that is missing or damaged.
    """
    if size != 32 and "cifar" in name:
        raise InputError("data.size", f"{size} is not 32, the size of {name}")
    if name == "folder":
        train, test, classes = load_folder(Path(root), size)
    elif name == "synthetic":
        *splits, classes = make_synthetic(samples, size)
        train, test = (Split(*map(torch.from_numpy, split)) for split in splits)
    else:
        train, test, classes = load_cifar(name, Path(root))
    if val_split >= len(train.labels):
        raise InputError("val_split", f"{val_split} is not between 0 and {len(train.labels) - 1}")
    if val_split:
        # RandomState's stream is frozen by numpy's promise: the same images on every machine and version.
        order = torch.from_numpy(np.random.RandomState(0).permutation(len(train.labels)))
        held, rest = order[:val_split], order[val_split:]
        train, test = (Split(train.images[part], train.labels[part]) for part in (rest, held))
    return Data(train, test, tuple(classes), *STATISTICS[name])


def load_cifar(name, root):
    """-> train Split, test Split, class names, from `<root>/<name>.npz`."""
    path = root / f"{name}.npz"
    if not path.exists():
        try:
            download_cifar(name, root, path)
        except (OSError, RuntimeError) as error:  # no network, a bad checksum, a full or read-only disk
            reason = f"{name} could not be downloaded ({one_line(error)}); put it at {path} instead"
            raise InputError("data.root", reason) from None
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a .npz file, or damaged")
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        check_cifar(arrays, num_classes=int(name.removeprefix("cifar")))
    except Exception as error:  # noqa: BLE001 - a damaged file raises BadZipFile, zlib.error, EOFError, ...
        raise InputError("data.root", f"{path}: {one_line(error)}") from None
    train, test = (
        Split(torch.from_numpy(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"]))
        for split in ("train", "test")
    )
    return train, test, arrays["classes"].tolist()


def download_cifar(name, root, path):
    from torchvision import datasets  # here, because reading the .npz does not need it

    original = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    arrays = {}
    for split in ("train", "test"):
        source = original(root, train=split == "train", download=True)
        arrays |= {f"{split}_images": source.data, f"{split}_labels": np.array(source.targets, np.int64)}
    partial = path.with_suffix(f".partial{os.getpid()}")  # then renamed: a killed run leaves no half of a .npz
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays, classes=np.array(source.classes))
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # on a disk that is full already
        raise


def check_cifar(arrays, num_classes):
    """Raises ValueError that says what is wrong with the arrays of a .npz."""
    for split in ("train", "test"):
        for key, dtype, shape in ((f"{split}_images", "uint8", (32, 32, 3)), (f"{split}_labels", "int64", ())):
            if key not in arrays:
                raise ValueError(f"has no array {key!r}")
            array = arrays[key]
            if array.dtype != dtype or not array.size or array.shape[1:] != shape:
                wanted = f"{dtype} {('N', *shape)}".replace("'", "")
                raise ValueError(f"{key} is {array.dtype} {array.shape}, wanted {wanted}")
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} {split}_images, {len(labels)} {split}_labels")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"{split}_labels lie in {labels.min()} .. {labels.max()}, wanted 0 .. {num_classes - 1}")
    if "classes" not in arrays or arrays["classes"].shape != (num_classes,) or arrays["classes"].dtype.kind != "U":
        raise ValueError(f"classes is not an array of {num_classes} names")


def load_folder(root, size):
    from torchvision.datasets import ImageFolder

    listings = []
    for folder in (root / "train", root / "val"):
        try:
            listings.append(ImageFolder(folder))
        except OSError as error:  # no such folder, no class in it, a class without images
            raise InputError("data.root", f"{folder}: {one_line(error)}") from None
    train, val = listings
    if train.classes != val.classes:
        odd = ", ".join(sorted(set(train.classes) ^ set(val.classes))[:5])
        raise InputError("data.root", f"{root}: train and val do not hold the same class folders: {odd}")
    # Mixed, as CIFAR's are: who looks at a few batches sees all classes.
    order = np.random.RandomState(0).permutation(len(val.samples))
    return read_images(train.samples, size), read_images([val.samples[i] for i in order], size), train.classes


def to_rgb(image):
    """A Pillow image in RGB. Raises ValueError for one of 16 or 32 bits, that Pillow would cut off at 255."""
    if image.mode[0] in "IF":
        raise ValueError(f"{image.mode}, more than 8 bits a pixel")
    return image.convert("RGB")


def read_images(samples, size):
    """[(path, label)] * N -> Split of size x size images (bilinear; Pillow's averages when it shrinks)."""
    from PIL import Image

    images = np.empty((len(samples), size, size, 3), np.uint8)
    for i, (path, _) in enumerate(samples):
        try:
            with Image.open(path) as image:
                images[i] = to_rgb(image).resize((size, size), Image.Resampling.BILINEAR)
        except Exception as error:  # noqa: BLE001 - Pillow raises OSError, SyntaxError, struct.error, ...
            raise InputError("data.root", f"{path}: cannot be read ({one_line(error)})") from None
    return Split(torch.from_numpy(images), torch.tensor([label for _, label in samples]))


def crop_flip(images, top, left, flip, padding):
    """Zero-pad, cut the original size out at (top, left), mirror where flip says so.

    images uint8 (B, H, W, 3); top, left int64 (B,) in 0 .. 2·padding; flip bool (B,). -> uint8 (B, H, W, 3)
    """
    b, h, w, _ = images.shape
    x = torch.arange(w, device=images.device)
    rows = top[:, None] + torch.arange(h, device=images.device)  # (B, H), in the padded image
    columns = left[:, None] + torch.where(flip[:, None], w - 1 - x, x)  # (B, W); a flip reads backwards
    rows = rows + (h + 2 * padding) * torch.arange(b, device=images.device)[:, None]  # of all images as one column
    pixels = rows[:, :, None] * (w + 2 * padding) + columns[:, None]  # (B, H, W)
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    # Whole pixels by index_select: 3 times as fast as images[b, y, x].
    return padded.reshape(-1, 3).index_select(0, pixels.flatten()).view(b, h, w, 3)


def random_crop_flip(images, padding):
    """RandomCrop(size, padding) and RandomHorizontalFlip, drawn for each image from torch's global generator.

    images uint8 (B, H, W, 3) -> the same.
    """
    top, left = torch.randint(0, 2 * padding + 1, (2, len(images)), device=images.device)
    flip = torch.rand(len(images), device=images.device) < 0.5
    return crop_flip(images, top, left, flip, padding)


def normalize(images, mean, std):
    """uint8 (B, H, W, 3) -> (images / 255 - mean) / std, float32 (B, 3, H, W) in channels_last memory.

    mean, std: 3 floats or float32 (3,), of pixels in [0, 1].
    """
    mean, std = (torch.as_tensor(value, dtype=torch.float32, device=images.device) for value in (mean, std))
    b, h, w, _ = images.shape
    # Whole rows of W·3 values: a broadcast over the last 3 alone cannot be vectorised and takes 10x the time.
    scale, shift = (1 / (255 * std)).repeat(w), (-mean / std).repeat(w)
    return torch.addcmul(shift, images.reshape(b, h, w * 3).float(), scale).view(b, h, w, 3).permute(0, 3, 1, 2)


class Loader:
    """The batches of one process: a pure function of (epoch, step) and, for crops and flips, of the global generator.

    train=True: each epoch visits the split in an order drawn from (seed, epoch). batch_size counts the images of a
    step over all `world` processes, and process `rank` takes every world-th of them: together they see exactly
    the batch that one process would. The last batch is smaller, a multiple of world; with fewer than 4 images a
    process (CKA needs 4) it is left out.
    train=False: images rank, rank + world, ... as they are, at most batch_size at a time. Over all processes every
    image comes exactly once, so a process may have fewer steps than another, or none.
    indices: int64 (B,) of the last batch in the split, on the device. num_samples: images of the split. fingerprint: a
    number that other labels, or another order of them, would change.
    Raises InputError when training has a batch_size that is no multiple of world, or no batch at all.
    """

    def __init__(self, split, batch_size, *, mean, std, train, seed=0, rank=0, world=1,
                 channels_last=True, device="cpu"):
        if train and batch_size % world:
            raise InputError("batch_size", f"{batch_size} is not a multiple of {world} processes")
        self.fingerprint = zlib.crc32(split.labels.numpy())
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        # On the device now: copying them there in every step would make the host wait for the device.
        self.mean, self.std = (torch.tensor(value, device=device) for value in (mean, std))
        self.batch_size, self.train, self.seed = batch_size, train, seed
        self.num_samples, self.indices, self.unreadable = len(self.labels), None, 0
        self.rank, self.world, self.channels_last, self.device, self.drawn = rank, world, channels_last, device, None
        self.order = torch.arange(rank, len(self.labels), world, device=device)  # train: replaced in each epoch
        if train:
            full, last = divmod(len(self.labels), batch_size)
            self.steps = full + (last // world >= 4)
            if not self.steps:
                raise InputError("data", f"{len(self.labels)} training images, without those of val_split; valid: "
                                 f"at least 4 a process, {4 * world}")
        else:
            self.steps = -(-len(self.order) // batch_size)  # rounded up

    def __len__(self):
        return self.steps

    def epoch(self, epoch, first_step=0):
        """The batches of an epoch from `first_step` on, each made when it is asked for."""
        for step in range(first_step, self.steps):
            yield self.batch(epoch, step)

    def choose(self, epoch, step):
        """Which images are this process's in a step: indices int64 (B,), on the device. IndexError past the last."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        if self.train and epoch != self.drawn:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.labels))
            self.order, self.drawn = torch.from_numpy(order).to(self.labels.device), epoch
        indices = self.order[step * self.batch_size : (step + 1) * self.batch_size]
        return indices[: len(indices) // self.world * self.world][self.rank :: self.world] if self.train else indices

    def load(self, indices):
        """indices (B,) -> images float32 (B, 3, H, W), labels int64 (B,), on the device; crops and flips are drawn."""
        self.indices = indices
        # index_select: on a CPU 4 times as fast as images[indices].
        images, labels = self.images.index_select(0, indices), self.labels[indices]
        if self.train:
            images = random_crop_flip(images, images.shape[1] // 8)  # padded by 4 pixels if of 32
        images = normalize(images, self.mean, self.std)
        return images if self.channels_last else images.contiguous(), labels

    def batch(self, epoch, step):
        """-> images float32 (B, 3, H, W), labels int64 (B,), on the device. Raises IndexError past the last step."""
        return self.load(self.choose(epoch, step))
