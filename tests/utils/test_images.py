"""Decoding, cropping, order and what becomes of files that cannot be read."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from utils import images as module
from utils.data import normalize
from utils.errors import InputError
from utils.images import MEAN, STD, Fake, ImageLoader, Images, Tree, random_resized_crop


def picture(width, height, seed=0):
    """A smooth image with some noise, as photographs are."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (height // 50 + 2, width // 50 + 2, 3), np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """11 + 7 images of 2 classes in a real tree of folders, green and red."""
    root = tmp_path_factory.mktemp("tree")
    for split, n in ("train", 11), ("val", 7):
        for i in range(n):
            folder = root / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.zeros((50, 60 + i, 3), np.uint8)
            pixels[..., 1 - i % 2] = np.linspace(150, 250, 60 + i)
            Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=95)
    return root


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_crop_is_torchvisions(tmp_path, kind):
    picture(500, 375).save(tmp_path / "a", kind)
    for seed in range(10):
        torch.manual_seed(seed)
        own = random_resized_crop(Image.open(tmp_path / "a"), 224)
        torch.manual_seed(seed)
        theirs = v2.functional.pil_to_tensor(v2.RandomResizedCrop(224)(Image.open(tmp_path / "a").convert("RGB")))
        difference = (own.float() - theirs.float()).abs()
        assert own.dtype == torch.uint8 and own.shape == (3, 224, 224)
        assert difference.max() <= 1 and difference.mean() < 0.1  # of 255, by rounding


@pytest.mark.parametrize("width, height", [(1600, 1200), (1601, 1203)])
def test_a_large_jpeg_is_decoded_smaller_and_stays_close(tmp_path, width, height):
    picture(width, height).save(tmp_path / "a.jpg", quality=95)
    for seed in range(5):
        torch.manual_seed(seed)
        image = Image.open(tmp_path / "a.jpg")
        own = random_resized_crop(image, 128)
        torch.manual_seed(seed)
        crop = v2.RandomResizedCrop(128).make_params([Image.open(tmp_path / "a.jpg")])
        assert (image.size < (width, height)) == (min(crop["width"], crop["height"]) >= 256)
        torch.manual_seed(seed)
        theirs = v2.functional.pil_to_tensor(v2.RandomResizedCrop(128)(Image.open(tmp_path / "a.jpg").convert("RGB")))
        assert (own.float() - theirs.float()).abs().mean() < 1.0  # of 255


def test_validation_is_torchvisions_resize_and_centre_crop(root):
    images = Images(Tree(root, "val"), 32, train=False)
    expected = v2.Compose([v2.Resize(37), v2.CenterCrop(32), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                           v2.Normalize(MEAN, STD)])
    for i in range(7):
        image, label, index, problems = images[0, i]
        with Image.open(images.source.name(i)) as original:
            own = normalize(image[None], MEAN, STD)[0]
            torch.testing.assert_close(own, expected(original.convert("RGB")), rtol=1e-5, atol=1e-5)
        assert problems == [] and index == i and label == (0 if image[16, 16, 1] > 100 else 1)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_images_of_other_modes_become_rgb(tmp_path, mode):
    (tmp_path / "train/a").mkdir(parents=True)
    picture(100, 80).convert(mode).save(tmp_path / "train/a/0.jpg")
    for size in 8, 64:
        for train in True, False:
            image, _, _, problems = Images(Tree(tmp_path, "train"), size, train=train)[0, 0]
            assert image.shape == (size, size, 3) and problems == []


@pytest.mark.parametrize("arguments", [{}, {"randaugment": 27, "color_jitter": 0.4, "random_erasing": 0.5}])
def test_what_is_drawn_follows_from_seed_epoch_and_index(root, arguments):
    images = [Images(Tree(root, "train"), 32, train=True, seed=seed, **arguments) for seed in (0, 0, 1)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    items = [images[0][0, i][0] for i in range(11)]
    torch.manual_seed(7)
    assert all(torch.equal(item, images[1][0, i][0]) for i, item in enumerate(items))
    assert not all(torch.equal(item, images[2][0, i][0]) for i, item in enumerate(items))
    assert not all(torch.equal(item, images[0][1, i][0]) for i, item in enumerate(items))
    assert all(item.shape == (32, 32, 3) and item.dtype == torch.uint8 for item in items)
    torch.set_rng_state(state)
    images[0][0, 3]
    assert torch.equal(state, torch.get_rng_state())  # the training loop's own stream is left alone


def test_no_two_seeds_epochs_or_images_draw_the_same(monkeypatch):
    monkeypatch.setattr(module, "random_resized_crop", lambda image, size: torch.randint(256, (3, 8, 8)).byte())
    images = [Images(Fake("train", 4, 8), 8, train=True, seed=seed) for seed in range(3)]
    drawn = {split[epoch, i][0].numpy().tobytes() for split in images for epoch in range(3) for i in range(4)}
    assert len(drawn) == 36


def augmented(monkeypatch, crop, **arguments):
    """What twenty images become whose crop, uint8 (3, S, S), is this one."""
    monkeypatch.setattr(module, "random_resized_crop", lambda image, size: crop)
    images = Images(Fake("train", 20, 8), crop.shape[1], train=True, **arguments)
    return [images[0, i][0].permute(2, 0, 1) for i in range(20)]


def test_half_of_the_crops_are_mirrored_from_left_to_right(monkeypatch):
    crop = torch.arange(12).view(3, 2, 2).byte()
    images = augmented(monkeypatch, crop)
    plain, mirrored = (sum(torch.equal(image, other) for image in images) for other in (crop, crop.flip(2)))
    assert plain + mirrored == 20 and 4 < mirrored < 16


def test_random_erasing_leaves_the_mean_colour(monkeypatch):
    for image in augmented(monkeypatch, torch.zeros(3, 32, 32, dtype=torch.uint8), random_erasing=1.0):
        assert image.flatten(1).T.unique(dim=0).tolist() == [[0, 0, 0], [124, 116, 104]]


def test_the_strength_of_randaugment_and_color_jitter():
    images = Images(Fake("train", 1, 8), 8, train=True, randaugment=27, color_jitter=0.4)
    steps = {type(step): step for step in images.augment.transforms}
    assert (steps[v2.RandAugment].num_ops, steps[v2.RandAugment].magnitude) == (2, 27)
    jitter = steps[v2.ColorJitter]
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.6, 1.4) and jitter.hue is None


def batches(root, split="train", **arguments):
    images = Images(Tree(root, split), 32, train=split == "train")
    return ImageLoader(images, arguments.pop("batch_size", 4), train=split == "train", **arguments)


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_processes_and_accumulated_batches_together_see_the_batch_of_one(root, world, accumulate):
    whole = batches(root)
    parts = [batches(root, rank=rank, world=world, accumulate=accumulate) for rank in range(world)]
    assert len(whole) == len(parts[0]) == 2
    for loader in [whole, *parts]:
        loader.order.epoch = 3
    expected = [sorted(index for _, index in batch) for batch in whole.order]
    orders = [list(part.order) for part in parts]
    for step in range(2):
        seen = [index for order in orders
                for batch in order[step * accumulate : (step + 1) * accumulate] for _, index in batch]
        assert sorted(seen) == expected[step]
    whole.order.epoch = 4
    assert [sorted(index for _, index in batch) for batch in whole.order] != expected


def test_a_seed_does_not_repeat_the_epochs_of_another(root):
    orders = set()
    for seed in range(3):
        order = batches(root, seed=seed).order
        for order.epoch in range(3):
            orders.add(tuple(index for batch in order for _, index in batch))
    assert len(orders) == 9


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_validation_sees_every_image_once(root, world):
    seen = []
    for rank in range(world):
        loader = batches(root, "val", batch_size=2, rank=rank, world=world)
        seen += [index for batch in loader.order for _, index in batch]
        assert sum(len(labels) for _, labels in loader.epoch(0)) == len(range(rank, 7, world))
    assert sorted(seen) == list(range(7))


def test_workers_and_a_start_in_mid_epoch_change_nothing(root):
    plain = list(batches(root).epoch(1))
    assert len(plain) == 2 and plain[0][0].shape == (4, 3, 32, 32) and plain[0][0].dtype == torch.float32
    workers = batches(root, workers=2)
    for _ in range(2):  # the workers stay for the next epoch
        list(workers.epoch(0))
        for (a, labels), (b, others) in zip(plain, workers.epoch(1), strict=True):
            assert torch.equal(a, b) and torch.equal(labels, others)
    [(last, _)] = workers.epoch(1, first_step=1)
    assert torch.equal(last, plain[1][0])


def test_a_start_in_mid_epoch_leaves_out_whole_steps(root):
    loader = batches(root, accumulate=2)
    whole, rest = list(loader.epoch(1)), list(loader.epoch(1, first_step=1))
    assert len(whole) == 4 and len(rest) == 2
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole[2:], rest))


def test_workers_of_several_processes_are_not_forked_beside_the_threads_of_their_group(root):
    """A fork while a thread of gloo drops a tensor hung, one time in a hundred."""
    loader = batches(root, "val", rank=1, world=2, workers=1)
    for (a, labels), (b, others) in zip(batches(root, "val", rank=1, world=2).epoch(0), loader.epoch(0), strict=True):
        assert torch.equal(a, b) and torch.equal(labels, others)
    assert loader.loader.multiprocessing_context.get_start_method() == "forkserver"


def test_memory_format(root):
    assert next(batches(root).epoch(0))[0].is_contiguous(memory_format=torch.channels_last)
    assert next(batches(root, channels_last=False).epoch(0))[0].is_contiguous()


def test_16_bits_are_not_taken_for_white(root, tmp_path, capsys):
    shutil.copytree(root, tmp_path / "tree")
    Image.fromarray(np.full((40, 40), 30000, np.uint16)).save(tmp_path / "tree/val/class1/3.jpg", "png")
    labels = torch.cat([some for _, some in batches(tmp_path / "tree", "val").epoch(0)])
    assert len(labels) == 6 and "3.jpg: I;16, more than 8 bits a pixel" in capsys.readouterr().err


def broken_at(loader, path):
    return loader.images.source.paths.tolist().index(path.split("/", 1)[1].encode())


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_unreadable_image_is_named_and_left_out(root, tmp_path, capsys, monkeypatch, content):
    shutil.copytree(root, tmp_path / "tree")
    whole = (tmp_path / "tree/train/class0/4.jpg").read_bytes()
    for split, path in ("train", "train/class0/4.jpg"), ("val", "val/class1/3.jpg"):
        (tmp_path / "tree" / path).write_bytes(whole[:600] if content is None else content)  # None: cut off
        loader = batches(tmp_path / "tree", split)
        labels = []
        for _, some in loader.epoch(0):
            labels += some
            indices = loader.indices.tolist()  # a stand-in's own
            assert [loader.images.source.open(i)[1] for i in indices] == some.tolist()
            assert broken_at(loader, path) not in indices
        assert len(labels) == (8 if split == "train" else 6)  # another stands in for it, or it is not counted
        visited = sum(index == broken_at(loader, path) for batch in loader.order for _, index in batch)
        assert loader.unreadable == visited and (split == "train" or visited == 1)
        error = capsys.readouterr().err
        assert error.count("\n") == visited and (not visited or path in error)
    with pytest.raises(InputError, match="1 of 7 images could not be read, more than 0.1 %"):
        loader.check(1)
    monkeypatch.setattr(module, "UNREADABLE", 0.15)
    loader.check(1)


def test_unreadable_images_are_counted_over_all_batches(root, tmp_path):
    shutil.copytree(root, tmp_path / "tree")
    for path in "class0/0.jpg", "class1/1.jpg":  # of the first batch and of the second
        (tmp_path / "tree/val" / path).write_bytes(b"")
    loader = batches(tmp_path / "tree", "val")
    assert sum(len(labels) for _, labels in loader.epoch(0)) == 5 and loader.unreadable == 2


def test_a_tree_without_a_readable_image_ends(tmp_path, capsys):
    (tmp_path / "train/a").mkdir(parents=True)
    for i in range(4):
        (tmp_path / f"train/a/{i}.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="of 4 images could not be read"):
        list(batches(tmp_path).epoch(0))
    assert "train/a/0.jpg" in capsys.readouterr().err


def test_bad_input():
    fake = Images(Fake("train", 10, 32), 32, train=True)
    with pytest.raises(InputError, match="batch_size: 9 is not a multiple of 2 processes x 2"):
        ImageLoader(fake, 9, train=True, world=2, accumulate=2)
    with pytest.raises(InputError, match="batch_size: 10 training images are too few for 12"):
        ImageLoader(fake, 12, train=True)
    with pytest.raises(InputError, match="data.root: .*nowhere"):
        Tree("/nowhere", "train")


def test_fake_images_are_repeatable_and_not_those_of_the_other_split():
    train, again, val = (Fake(split, n, 16) for split, n in (("train", 50), ("train", 50), ("val", 10)))
    assert np.array_equal(np.asarray(train.open(3)[0]), np.asarray(again.open(3)[0]))
    pixels, others = ({np.asarray(split.open(i)[0]).tobytes() for i in range(len(split))} for split in (train, val))
    assert len(pixels) == 50 and len(others) == 10 and not pixels & others
    assert len(train.classes) == 1000 and 0 <= train.open(3)[1] < 1000
