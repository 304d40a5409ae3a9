"""Synthetic images: 100 classes of shapes, colours and textures, made in memory, the same on every machine."""

import numpy as np

SHAPES = ("disc", "square", "triangle", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "magenta")
RGB = ((210, 50, 50), (50, 190, 60), (60, 80, 220), (215, 200, 50), (200, 60, 200))
TEXTURES = ("plain", "banded", "striped", "checked")


def make_synthetic(samples, size):
    """-> (images, labels) of `samples` training images, the same of samples // 5 test images, the 100 classes' names.

    images uint8 (n, size, size, 3), labels int64 (n,), numpy.
    """
    classes = [f"{colour} {texture} {shape}" for shape in SHAPES for colour in COLOURS for texture in TEXTURES]
    splits = []
    for seed, n in enumerate((samples, samples // 5)):
        rng = np.random.default_rng(seed)
        labels = np.arange(n) % len(classes)
        chunks = [render(labels[i : i + 250], size, rng) for i in range(0, n, 250)]  # small enough for the cache
        splits.append((np.concatenate(chunks), labels))
    return *splits, classes


def render(labels, size, rng):
    """labels (B,) -> uint8 (B, size, size, 3): a shape over a background and a distractor, half hidden, in noise.

    Only sums, products, quotients and comparisons, which round the same on every machine: no sin, exp or normal().
    """
    n = np.arange(len(labels))

    def uniform(low, high, *shape):  # (B, *shape)
        return low + (high - low) * rng.random((len(n), *shape), dtype=np.float32)

    x = ((np.arange(size) + 0.5) / size).astype(np.float32)  # the image is the unit square
    y = x[:, None]
    image = uniform(0, 255, 1, 1, 3) + (x + y - 1)[..., None] * uniform(-120, 120, 1, 1, 3)
    blob = (x - uniform(0, 1, 1, 1)) ** 2 + (y - uniform(0, 1, 1, 1)) ** 2 < uniform(0.08, 0.22, 1, 1) ** 2
    image = np.where(blob[..., None], uniform(0, 255, 1, 1, 3), image)

    radius = uniform(0.2, 0.36, 1, 1)
    u, v = (x - uniform(0.32, 0.68, 1, 1)) / radius, (y - uniform(0.32, 0.68, 1, 1)) / radius  # (B, 1, W), (B, H, 1)
    squared, longer, shorter = u * u + v * v, np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))  # distances
    triangle = (v < 0.8) & (2 * abs(u) < v + 1)
    cross, ring = (longer < 1) & (shorter < 0.35), (squared < 1) & (squared > 0.3)
    shapes = (squared < 1, longer < 0.85, triangle, cross, ring)
    rows, columns = (1.3 * v + uniform(0, 1, 1, 1)) % 1 < 0.5, (1.3 * u + uniform(0, 1, 1, 1)) % 1 < 0.5
    textures = np.broadcast_arrays(False, rows, columns, rows ^ columns)  # where the colour is dark
    mask = np.stack(shapes)[labels // 20, n][..., None]
    dark = np.stack(textures)[labels % 4, n][..., None]
    colour = np.float32(RGB)[labels // 4 % 5, None, None] + uniform(-80, 80, 1, 1, 3)
    image = np.where(mask, np.where(dark, 0.4 * colour, colour), image)

    across = abs(x - uniform(0.2, 0.8, 1, 1)) < uniform(0.02, 0.16, 1, 1)
    down = abs(y - uniform(0.2, 0.8, 1, 1)) < uniform(0.02, 0.16, 1, 1)
    image = np.where((across & down)[..., None], uniform(0, 255, 1, 1, 3), image)
    image = image * uniform(0.6, 1.2, 1, 1, 1) + uniform(-60, 60, size, size, 3)
    return image.clip(0, 255).astype(np.uint8)
