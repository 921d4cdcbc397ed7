"""Inputs of the golden numbers: the same on every platform and NumPy version."""

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def make_inputs(
    seed: int,
    n: int,
    d: int,
    h: int,
    w: int,
    num_classes: int = 19,
    anchors: Array | None = None,
) -> tuple[Array, Array, Array, Array, Array]:
    """Return features around anchors, labels of which 10 % are ignored (250), and logits.

    Returns ``anchors (C, D)`` float64, ``features (N, D, H, W)`` float32, ``logits (N, C, H, W)``
    float32, ``classes (N, H, W)`` int64 (the class that each feature was drawn from) and ``labels
    (N, H, W)`` int64. ``h`` and ``w`` are multiples of 8. ``anchors`` draws a second domain around
    the same anchors.
    """
    rng = np.random.RandomState(seed)
    drawn = np.abs(rng.standard_normal((num_classes, d))) * 0.6
    anchors = drawn if anchors is None else anchors
    blocks = rng.randint(0, num_classes, size=(n, h // 8, w // 8))
    classes = np.repeat(np.repeat(blocks, 8, 1), 8, 2)
    scale = rng.uniform(0.3, 1.2, size=(n, 1, h, w))
    features = anchors[classes].transpose(0, 3, 1, 2) * scale
    features = features + 0.35 * rng.standard_normal((n, d, h, w))
    features = np.maximum(features, 0).astype(np.float32)
    logits = (2.2 * rng.standard_normal((n, num_classes, h, w))).astype(np.float32)
    bump = rng.uniform(0, 8, size=(n, h, w)).astype(np.float32)
    for c in range(num_classes):
        logits[:, c] += bump * (classes == c)
    labels = classes.copy()
    labels[rng.uniform(size=labels.shape) < 0.1] = 250
    return anchors, features, logits, classes, labels


def deterministic_tensor(name: str, shape: tuple[int, ...]) -> Array:
    """Return a tensor of the network of ``deeplab_resnet101_forward.npz`` by its name."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) % 2**32)
    if name.endswith("running_var"):
        return np.asarray(rng.uniform(0.5, 1.5, shape), np.float32)
    if name.endswith("running_mean"):
        return np.asarray(0.1 * rng.standard_normal(shape), np.float32)
    if len(shape) == 1:
        is_weight = name.endswith("weight")
        drawn = rng.uniform(0.5, 1.5, shape) if is_weight else 0.1 * rng.standard_normal(shape)
        return np.asarray(drawn, np.float32)
    scale = np.sqrt(1.0 / np.prod(shape[1:]))
    return np.asarray(rng.standard_normal(shape) * scale, np.float32)
