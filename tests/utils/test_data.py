import hashlib
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets
from torchvision.models import ResNet18_Weights
from torchvision.transforms import functional as TF

from utils.data import STATISTICS, Loader, Split, crop_flip, load_data, normalize, random_crop_flip
from utils.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def random_images(n, height=32, width=32):
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8)


def numbered(n):
    """A split whose image i holds the number i in its first two channels, so that a batch says what is in it."""
    images = torch.zeros(n, 4, 4, 3, dtype=torch.uint8)
    images[..., 0], images[..., 1] = (torch.arange(n) % 256)[:, None, None], (torch.arange(n) // 256)[:, None, None]
    return Split(images, torch.arange(n))


def loader(n, batch_size, train=True, **options):
    return Loader(numbered(n), batch_size, mean=(0.0,) * 3, std=(1.0,) * 3, train=train, **options)


def visited(loader, epoch, step):
    """The numbers of the images in a batch, which are its labels and its indices too."""
    images, labels = loader.batch(epoch, step)
    numbers = (images[:, :2, 0, 0] * 255).round().long() @ torch.tensor([1, 256])
    assert torch.equal(numbers, labels) and torch.equal(loader.indices, labels)
    return labels.tolist()


def fails(key, *words, **arguments):
    """load_data(**arguments) must end in one line of text about `key` that holds all the words."""
    with pytest.raises(InputError) as caught:
        load_data(**arguments)
    assert caught.value.key == key and "\n" not in str(caught.value)
    for word in words:
        assert str(word) in caught.value.message, caught.value.message


# Augmentation


@pytest.mark.parametrize(("height", "width"), [(32, 32), (12, 20)])
def test_crop_flip_normalize_equals_torchvision(height, width):
    torch.manual_seed(0)
    image = random_images(1, height, width)
    top, left, flip = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2)).T
    ours = normalize(crop_flip(image.expand(162, -1, -1, -1), top, left, flip.bool(), 4), MEAN, STD)
    assert ours.shape == (162, 3, height, width) and ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=torch.channels_last)
    padded = TF.pad(image[0].permute(2, 0, 1), 4)
    for k in range(162):
        theirs = TF.crop(padded, int(top[k]), int(left[k]), height, width)
        theirs = TF.hflip(theirs) if flip[k] else theirs
        theirs = TF.normalize(TF.convert_image_dtype(theirs), MEAN, STD)
        torch.testing.assert_close(ours[k], theirs, rtol=0, atol=1e-6)


def test_crop_flip_keeps_the_images_of_a_batch_apart():
    images = random_images(20)
    top, left, flip = torch.randint(0, 9, (20,)), torch.randint(0, 9, (20,)), torch.rand(20) < 0.5
    alone = [crop_flip(images[i : i + 1], top[i : i + 1], left[i : i + 1], flip[i : i + 1], 4) for i in range(20)]
    assert torch.equal(crop_flip(images, top, left, flip, 4), torch.cat(alone))


def test_random_crop_flip_draws_all_outcomes_alike_and_independently():
    torch.manual_seed(0)
    # Every pixel of this image is unique, so that the one at (8, 8) tells the outcome.
    image = torch.zeros(1, 17, 17, 3, dtype=torch.uint8)
    image[..., 0], image[..., 1] = torch.arange(1, 18)[:, None], torch.arange(1, 18)
    crops = random_crop_flip(image.expand(40000, -1, -1, -1), 4)
    top, left = crops[:, 8, 8, 0].long() - 5, crops[:, 8, 8, 1].long() - 5
    flip = (crops[:, 8, 9, 1] < crops[:, 8, 8, 1]).long()
    outcome = (top * 9 + left) * 2 + flip

    def chi_square(counts):
        expected = counts.sum() / len(counts)
        return float(((counts - expected) ** 2 / expected).sum())

    # 161 degrees of freedom: mean 161, standard deviation 18.
    assert chi_square(outcome.bincount(minlength=162).double()) < 161 + 5 * 18
    # Neighbouring rows, in one number of 9 x 9: 80 degrees of freedom, standard deviation 12.6.
    for draws in (top, left):
        pairs = (draws[:-1] * 9 + draws[1:]).bincount(minlength=81).double()
        assert chi_square(pairs) < 80 + 5 * 12.6
    assert chi_square((flip[:-1] * 2 + flip[1:]).bincount(minlength=4).double()) < 3 + 5 * 2.5


# Loader


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own():
    train = loader(300, 32)
    first, second = ([i for step in range(len(train)) for i in visited(train, e, step)] for e in (0, 1))
    assert len(train) == 10 and sorted(first) == sorted(second) == list(range(300))
    assert first != second and first != list(range(300))
    other_seed = loader(300, 32, seed=1)
    assert visited(other_seed, 0, 0) != first[:32]
    assert visited(train, 0, 3) == first[96:128]  # back in an earlier epoch, any step first: no hidden state


def test_a_seed_does_not_repeat_the_epochs_of_another():
    orders = {tuple(visited(loader(300, 32, seed=seed), epoch, 0)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_see_the_batch_of_one(world):
    one, many = loader(100, 24), [loader(100, 24, rank=rank, world=world) for rank in range(world)]
    for step in range(len(one) - 1):
        parts = [visited(process, 5, step) for process in many]
        assert sorted(chain(*parts)) == sorted(visited(one, 5, step))
        assert [len(part) for part in parts] == [24 // world] * world


@pytest.mark.parametrize(
    ("n", "batch_size", "world", "sizes"),  # of the batches on each process
    [
        (128, 64, 1, [64, 64]),
        (68, 64, 1, [64, 4]),
        (67, 64, 1, [64]),
        (71, 64, 2, [32]),
        (72, 64, 2, [32, 4]),
        (75, 64, 2, [32, 5]),
        (5, 64, 1, [5]),
    ],
)
def test_the_last_batch(n, batch_size, world, sizes):
    for rank in range(world):
        train = loader(n, batch_size, rank=rank, world=world)
        assert [len(visited(train, 0, step)) for step in range(len(train))] == sizes
        with pytest.raises(IndexError):
            train.batch(0, len(sizes))


@pytest.mark.parametrize(("n", "batch_size", "world"), [(64, 63, 2), (3, 64, 1), (7, 64, 2)])
def test_a_batch_size_that_cannot_be(n, batch_size, world):
    with pytest.raises(InputError) as caught:
        loader(n, batch_size, world=world)
    assert caught.value.key == ("batch_size" if n == 64 else "data")


@pytest.mark.parametrize("n", [7, 2, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_evaluation_visits_every_image_exactly_once(n, world, batch_size):
    seen = []
    for rank in range(world):
        test = loader(n, batch_size, train=False, rank=rank, world=world)
        batches = [visited(test, 0, step) for step in range(len(test))]
        assert all(0 < len(batch) <= batch_size for batch in batches)
        seen += chain(*batches)
    assert sorted(seen) == list(range(n))


def test_a_batch_is_a_function_of_epoch_step_and_the_global_seed():
    data = load_data("synthetic", samples=300)
    drawn = []
    for _ in range(2):  # the second time as after a restart: a new loader that goes straight to the step
        train = Loader(data.train, 64, mean=data.mean, std=data.std, train=True, seed=3)
        torch.manual_seed(7)
        drawn.append(train.batch(2, 1))
    (images, labels), (again, labels_again) = drawn
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert images.shape == (64, 3, 32, 32) and labels.dtype == torch.int64
    assert not torch.equal(train.batch(2, 1)[0], images)  # the global generator has moved on: other crops


@pytest.mark.parametrize("size, padding", [(32, 4), (64, 8)])
def test_images_are_padded_by_an_eighth(size, padding, monkeypatch):
    used = []
    monkeypatch.setattr("utils.data.random_crop_flip", lambda images, padding: used.append(padding) or images)
    split = Split(random_images(8, size, size), torch.arange(8))
    Loader(split, 8, mean=MEAN, std=STD, train=True).batch(0, 0)
    assert used == [padding]


def test_evaluation_does_not_augment():
    split = Split(random_images(10), torch.arange(10))
    test = Loader(split, 64, mean=MEAN, std=STD, train=False)
    images, labels = test.batch(0, 0)
    assert torch.equal(images, normalize(split.images, MEAN, STD)) and torch.equal(labels, split.labels)
    assert torch.equal(test.batch(1, 0)[0], images)


def test_memory_format():
    split = Split(random_images(4), torch.arange(4))
    for channels_last, memory_format in (True, torch.channels_last), (False, torch.contiguous_format):
        test = Loader(split, 4, mean=MEAN, std=STD, train=False, channels_last=channels_last)
        assert test.batch(0, 0)[0].is_contiguous(memory_format=memory_format)


# load_data: names and val_split


def test_pixels_are_normalized_as_for_published_weights():
    imagenet = ResNet18_Weights.IMAGENET1K_V1.transforms()
    assert STATISTICS["folder"] == (tuple(imagenet.mean), tuple(imagenet.std))
    assert STATISTICS["cifar10"] == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert STATISTICS["cifar100"] == (MEAN, STD)


def test_cifar_has_one_size():
    fails("data.size", "64 is not 32", name="cifar100", size=64)


def test_val_split_takes_the_place_of_the_test_set():
    whole, held = load_data("synthetic", samples=500), load_data("synthetic", samples=500, val_split=60)
    assert len(held.train.labels) == 440 and len(held.test.labels) == 60
    rows = {image.numpy().tobytes(): i for i, image in enumerate(whole.train.images)}
    train, test = ([rows[image.numpy().tobytes()] for image in split.images] for split in (held.train, held.test))
    assert sorted(train + test) == list(range(500))  # disjoint, all from the training set
    assert torch.equal(held.test.labels, whole.train.labels[test])
    torch.manual_seed(1)
    assert torch.equal(load_data("synthetic", samples=500, val_split=60).test.images, held.test.images)
    assert test[:5] == np.random.RandomState(0).permutation(500)[:5].tolist() == [90, 254, 283, 445, 461]


@pytest.mark.parametrize("val_split", [100, 101])
def test_val_split_out_of_range(val_split):
    fails("val_split", val_split, name="synthetic", samples=100, val_split=val_split)


# CIFAR


def cifar_arrays(num_classes, n=6):
    rng = np.random.default_rng(0)
    arrays = {"classes": np.array([f"class{i}" for i in range(num_classes)])}
    for split in ("train", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.array([0, num_classes - 1, *rng.integers(0, num_classes, n - 2)])
    return arrays


@pytest.mark.parametrize(("name", "num_classes"), [("cifar10", 10), ("cifar100", 100)])
def test_a_download_is_written_as_npz_and_not_repeated(name, num_classes, tmp_path, monkeypatch):
    arrays, downloads = cifar_arrays(num_classes), []

    def original(root, train, download):
        assert download and Path(root) == tmp_path
        downloads.append(train)
        split = "train" if train else "test"
        labels = arrays[f"{split}_labels"].tolist()
        return SimpleNamespace(data=arrays[f"{split}_images"], targets=labels, classes=arrays["classes"].tolist())

    monkeypatch.setattr(datasets, name.upper(), original)
    for _ in range(2):
        data = load_data(name, tmp_path)
        for split in ("train", "test"):
            assert np.array_equal(getattr(data, split).images.numpy(), arrays[f"{split}_images"])
            assert np.array_equal(getattr(data, split).labels.numpy(), arrays[f"{split}_labels"])
        assert data.classes == tuple(arrays["classes"])
        assert data.train.images.dtype == torch.uint8 and data.train.labels.dtype == torch.int64
    assert sorted(downloads) == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.npz"]
    assert (data.mean == MEAN) == (name == "cifar100")


@pytest.mark.parametrize("error", [OSError("<urlopen error\nno route to host>"), RuntimeError("File not found.")])
def test_a_failed_download_names_the_npz_that_would_do(error, tmp_path, monkeypatch):
    def original(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "CIFAR100", original)
    fails("data.root", tmp_path / "cifar100.npz", "could not be downloaded", name="cifar100", root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_npz_that_was_not_written_to_its_end_has_not_its_name(tmp_path, monkeypatch):
    arrays = cifar_arrays(10)
    monkeypatch.setattr(datasets, "CIFAR10", lambda *args, **kwargs: SimpleNamespace(
        data=arrays["train_images"], targets=arrays["train_labels"].tolist(), classes=arrays["classes"].tolist()))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    fails("data.root", "No space left on device", name="cifar10", root=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"test_images": None}, ["no array 'test_images'"]),
        ({"train_images": np.zeros((6, 3, 32, 32), np.uint8)}, ["train_images", "(6, 3, 32, 32)", "(N, 32, 32, 3)"]),
        ({"train_images": np.zeros((6, 32, 32, 3), np.float32)}, ["train_images", "float32", "uint8"]),
        ({"train_images": np.zeros((0, 32, 32, 3), np.uint8)}, ["train_images", "(0, 32, 32, 3)"]),
        ({"train_images": np.uint8(3)}, ["train_images", "()"]),
        ({"test_labels": np.zeros(6, np.int32)}, ["test_labels", "int32", "int64"]),
        ({"test_labels": np.zeros((6, 1), np.int64)}, ["test_labels", "(6, 1)"]),
        ({"test_labels": np.zeros(5, np.int64)}, ["6 test_images, 5 test_labels"]),
        ({"train_labels": np.full(6, 100)}, ["train_labels", "100", "0 .. 99"]),
        ({"train_labels": np.full(6, -1)}, ["train_labels", "-1"]),
        ({"classes": None}, ["not an array of 100 names"]),
        ({"classes": np.arange(100)}, ["not an array of 100 names"]),
        ({"classes": np.array(["cat"] * 10)}, ["classes", "100"]),
        ({"classes": np.array(["cat"] * 100, object)}, ["pickle"]),
    ],
)
def test_a_wrong_npz(change, words, tmp_path):
    arrays = {key: value for key, value in (cifar_arrays(100) | change).items() if value is not None}
    np.savez(tmp_path / "cifar100.npz", **arrays)
    fails("data.root", tmp_path / "cifar100.npz", *words, name="cifar100", root=tmp_path)


def test_a_damaged_npz(tmp_path):
    path = tmp_path / "cifar100.npz"
    np.savez_compressed(path, **cifar_arrays(100))
    whole = path.read_bytes()
    hole = whole[:5000] + bytes(500) + whole[5500:]
    for damaged in (b"", b"<html>not found</html>", whole[:200], whole[:-100], hole):
        path.write_bytes(damaged)
        fails("data.root", path, name="cifar100", root=tmp_path)
    path.write_bytes(b"<html>not found</html>")  # numpy's advice would be to load it unsafely
    fails("data.root", "not a .npz file, or damaged", name="cifar100", root=tmp_path)
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    fails("data.root", path, name="cifar100", root=tmp_path)


def test_the_real_cifar100(tmp_path):
    unpack = ROOT.parent / "shared" / "cifar100" / "unpack.py"
    if not unpack.exists():
        pytest.skip(f"{unpack} is not here")
    subprocess.run([sys.executable, unpack, tmp_path], check=True, stdout=subprocess.DEVNULL)
    data = load_data("cifar100", tmp_path, val_split=5000)
    assert len(data.train.labels) == 45000 and len(data.test.labels) == 5000
    assert data.classes[:2] == ("apple", "aquarium_fish") and len(data.classes) == 100
    # The published statistics are those of these pixels; a tenth of the images is enough to tell.
    normalized = normalize(data.test.images, data.mean, data.std)
    assert normalized.mean((0, 2, 3)).abs().max() < 0.03 and (normalized.std((0, 2, 3)) - 1).abs().max() < 0.03


# A folder of images


@pytest.fixture
def folder(tmp_path):
    """Two classes; four images to train on and two to test on, of several sizes, formats and modes."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 2), ("val", 1)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (40 + 9 * i, 70 - 9 * i, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).convert(("RGB", "L")[i])
                image.save(tmp_path / split / name / f"{i}.{('png', 'jpg')[i]}")
    return tmp_path


def test_folder(folder):
    (folder / "train" / "cat" / "notes.txt").write_text("not an image")
    data = load_data("folder", folder, size=24)
    assert data.classes == ("cat", "dog") and data.mean == (0.485, 0.456, 0.406)
    assert data.train.images.shape == (4, 24, 24, 3) and data.test.images.shape == (2, 24, 24, 3)
    assert data.train.images.dtype == torch.uint8 and data.train.labels.dtype == torch.int64
    assert data.train.labels.tolist() == [0, 0, 1, 1] and sorted(data.test.labels.tolist()) == [0, 1]
    # Against torch's own antialiased resize, which rounds a little differently.
    original = torch.from_numpy(np.array(Image.open(folder / "val" / "dog" / "0.png"))).permute(2, 0, 1)
    expected = F.interpolate(original[None].float(), (24, 24), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    dog = data.test.labels.tolist().index(1)
    assert (data.test.images[dog].float() - expected).abs().max() <= 1
    assert len(load_data("folder", folder, val_split=3).train.labels) == 1


def test_the_test_images_of_a_folder_are_mixed(folder):
    for name in "cat", "dog":
        for i in range(20):
            shade = 100 * (name == "dog") + i
            Image.new("RGB", (32, 32), (shade, 0, 0)).save(folder / "val" / name / f"more{i:02}.png")
    test = load_data("folder", folder, size=32).test
    assert len(test.labels) == 42 and 3 < test.labels[:21].sum() < 18
    flat = test.images[:, 0, 0, 1] == 0
    assert torch.equal(test.labels[flat], (test.images[flat, 0, 0, 0] >= 100).long())  # each with its own label


def test_folder_with_an_image_of_16_bits(folder):
    Image.fromarray(np.full((40, 40), 30000, np.uint16)).save(folder / "val/dog/0.png")
    fails("data.root", folder / "val/dog/0.png", "I;16, more than 8 bits a pixel", name="folder", root=folder)


def test_folder_missing(folder):
    fails("data.root", folder / "nowhere" / "train", name="folder", root=folder / "nowhere")
    (folder / "val").rename(folder / "valid")
    fails("data.root", folder / "val", name="folder", root=folder)


def test_folder_without_classes(folder):
    (folder / "bare" / "train").mkdir(parents=True)
    fails("data.root", folder / "bare" / "train", name="folder", root=folder / "bare")


def test_folder_with_an_empty_class(folder):
    (folder / "train" / "emu").mkdir()
    fails("data.root", folder / "train", "emu", name="folder", root=folder)


def test_folder_with_other_classes_in_val(folder):
    (folder / "val" / "dog").rename(folder / "val" / "emu")
    fails("data.root", folder, "dog, emu", name="folder", root=folder)


@pytest.mark.parametrize("damage", [b"", b"text", "truncated"])
def test_folder_with_a_damaged_image(folder, damage):
    path = folder / "train" / "dog" / "0.png"
    path.write_bytes(path.read_bytes()[:2000] if damage == "truncated" else damage)
    fails("data.root", path, name="folder", root=folder)


# Synthetic


def digest(samples=1000, size=32):
    data = load_data("synthetic", samples=samples, size=size)
    arrays = [array.numpy().tobytes() for split in (data.train, data.test) for array in split]
    return hashlib.sha256(b"".join(arrays)).hexdigest()


def test_synthetic_is_the_same_in_every_process():
    torch.manual_seed(1)
    np.random.seed(1)
    code = "from tests.utils.test_data import digest; print(digest())"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert digest() == digest() == other.stdout.strip()


def test_synthetic_is_the_same_on_every_machine():
    """A new digest means new images: every figure measured on them has to be measured again."""
    assert digest(100) == "b23aaf50d832a76050ef5c77acf594222d1251f624767a5a4949c9444fa623cd"


def test_synthetic_is_balanced():
    data = load_data("synthetic", samples=1500, size=16)
    assert data.train.images.shape == (1500, 16, 16, 3) and data.test.images.shape == (300, 16, 16, 3)
    assert set(data.train.labels.bincount().tolist()) == {15} and set(data.test.labels.bincount().tolist()) == {3}
    assert len(set(data.classes)) == 100
    train, test = ({image.numpy().tobytes() for image in split.images} for split in (data.train, data.test))
    assert len(train) == 1500 and not train & test


def test_synthetic_can_be_learned():
    """A linear probe on random convolutions: ten times better than chance on images that it has not seen."""
    data = load_data("synthetic")
    torch.manual_seed(0)
    filters = torch.randn(256, 3, 6, 6)
    filters -= filters.mean((2, 3), keepdim=True)

    def features(split):  # (N, 256): how strongly each filter responds anywhere
        images = normalize(split.images, data.mean, data.std)
        return torch.cat([F.conv2d(part, filters, stride=2).amax((2, 3)) for part in images.split(500)])

    x, test = features(data.train), features(data.test)
    x, test = ((part - x.mean(0)) / x.std(0) for part in (x, test))
    targets = F.one_hot(data.train.labels, 100).float()
    weights = torch.linalg.solve(x.T @ x + 100 * torch.eye(x.shape[1]), x.T @ targets)
    accuracy = ((test @ weights).argmax(1) == data.test.labels).float().mean().item()
    assert accuracy > 0.1, accuracy
