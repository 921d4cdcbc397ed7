"""The memory-bound operators in plain torch: the truth that every faster path has to equal.

Each operator walks over its input in blocks of pixels that fit a cache, so that nothing of the
size of the features is materialized, and computes a block in float64: ``‖x‖² − 2·a·x + ‖a‖²``
loses half its digits where a feature lies near an anchor, which float32 (let alone TF32) cannot
afford and float64 can. Results leave in float32, or in float64 where the input was float64.

Shapes follow the library's contract: features ``(N, D, *)``, label maps ``(N, *)``. An anchor row
that is not finite belongs to an unseen class. Nothing here is differentiable by itself; the
gradients are operators of their own.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one block: 4 MB in float64 stays near a core's cache; a GPU wants fewer, larger steps.
_BLOCK_ELEMENTS_CPU = 2**19
_BLOCK_ELEMENTS_GPU = 2**21

Block = tuple[slice, ...]


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64 (Apple's does not)."""
    return device.type != "mps"


def result_dtype(features: Tensor) -> torch.dtype:
    """The dtype of what is returned for such features: float64 for float64, else float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sums (C, D) float64 and counts (C,) int64 of the finite features of each class."""
    dtype = _block_dtype(features)
    classes = torch.arange(num_classes, device=features.device)[:, None]
    sums = torch.zeros(num_classes, features.shape[1], dtype=dtype, device=features.device)
    counts = torch.zeros(num_classes, dtype=torch.int64, device=features.device)
    for block in _blocks(features, num_classes):
        x, y = _pixels(features, block), _flat(labels, block)
        finite = _finite(x)
        members = (y == classes) & finite
        # A NaN times its zero membership would still be NaN: take it out of the product.
        sums += members.to(dtype) @ torch.where(finite, x, 0.0).T
        counts += members.sum(dim=1)
    return sums, counts


def image_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The class sums of each image alone: (N, C, D) and counts (N, C) int64."""
    n, d = features.shape[:2]
    sums = torch.empty(n, num_classes, d, dtype=result_dtype(features), device=features.device)
    counts = torch.empty(n, num_classes, dtype=torch.int64, device=features.device)
    for i in range(n):
        sums[i], counts[i] = class_sums(features[i : i + 1], labels[i : i + 1], num_classes)
    return sums, counts


def image_sums_backward(grad_sums: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Each pixel that was summed receives the gradient of its image's sum of its class."""
    grad = torch.empty_like(features)
    num_classes = grad_sums.shape[1]
    for i in range(features.shape[0]):
        image = slice(i, i + 1)
        of_class = grad_sums[i].T
        for block in _blocks(features[image]):
            x, y = _pixels(features[image], block), _flat(labels[image], block)
            summed = (y >= 0) & (y < num_classes) & _finite(x)
            columns = torch.where(summed, of_class[:, y.clamp(0, num_classes - 1)], 0.0)
            _write_pixels(grad[image], block, columns)
    return grad


def anchor_distances(features: Tensor, anchors: Tensor) -> Tensor:
    """Euclidean distances (N, C, *): infinite to unseen classes, else NaN for non-finite pixels."""
    points, seen = _points(features, anchors)
    shape = (features.shape[0], anchors.shape[0], *features.shape[2:])
    distances = torch.empty(shape, dtype=result_dtype(features), device=features.device)
    for block in _blocks(features, anchors.shape[0]):
        x = _pixels(features, block)
        of_pixels = torch.where(_finite(x), _distances(x, points), math.nan)
        _write_pixels(distances, block, of_pixels.masked_fill(~seen, math.inf))
    return distances


def anchor_distances_backward(
    grad_distances: Tensor, distances: Tensor, features: Tensor, anchors: Tensor
) -> Tensor:
    """Sum over the classes of ``grad · (x − a) / ‖x − a‖``, 0 where x = a."""
    points, _ = _points(features, anchors)
    grad = torch.empty_like(features)
    for block in _blocks(features, anchors.shape[0]):
        x = _pixels(features, block)
        g, d = _pixels(grad_distances, block), _pixels(distances, block)
        weights = torch.where((g == 0) | (d == 0), 0.0, g / d)
        of_pixels = x * weights.sum(dim=0) - points.T @ weights
        # Where no gradient comes in none goes out, whatever the feature holds (no 0·NaN).
        _write_pixels(grad, block, torch.where((g == 0).all(dim=0), 0.0, of_pixels))
    return grad


def nearest_anchors(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest class (N, *) int64, and the distances to it and to the runner-up.

    Of equally near classes the first wins; equal is what the returned dtype cannot tell apart.
    Where nothing can win (a feature that is not finite, or farther than that dtype reaches, or no
    class seen) the class is −1 and both distances are infinite; with one class seen the second is.
    """
    points, seen = _points(features, anchors)
    num_classes = anchors.shape[0]
    classes = torch.arange(num_classes, device=features.device)[:, None]
    shape = (features.shape[0], *features.shape[2:])
    labels = torch.empty(shape, dtype=torch.int64, device=features.device)
    nearest = torch.empty(shape, dtype=result_dtype(features), device=features.device)
    second = torch.empty_like(nearest)
    for block in _blocks(features, num_classes):
        x = _pixels(features, block)
        candidates = torch.where(_finite(x) & seen, _distances(x, points), math.inf)
        # Anchors in one place may differ in the last bit of the product, but not after rounding.
        candidates = candidates.to(nearest.dtype)
        first = candidates.amin(dim=0)
        # Not argmin, which may return any of several equal minima.
        winner = torch.where(candidates == first, classes, num_classes).amin(dim=0)
        runner_up = torch.where(classes == winner, math.inf, candidates).amin(dim=0)
        block_shape = labels[block].shape
        labels[block] = torch.where(first < math.inf, winner, -1).reshape(block_shape)
        nearest[block] = first.reshape(block_shape)
        second[block] = runner_up.reshape(block_shape)
    return labels, nearest, second


def pixel_losses(features: Tensor, labels: Tensor, anchors: Tensor, distance: str) -> Tensor:
    """The distance (N, *) of each pixel to the anchor of its label, 0 for negative labels."""
    points, _ = _points(features, anchors)
    shape = (features.shape[0], *features.shape[2:])
    losses = torch.empty(shape, dtype=result_dtype(features), device=features.device)
    for block in _blocks(features):
        offsets, active = _offsets(features, labels, points, block)
        if distance == "euclidean":
            of_pixels = offsets.square().sum(dim=0).sqrt()
        elif distance == "squared":
            of_pixels = offsets.square().sum(dim=0)
        else:
            size = offsets.abs()
            huber = torch.where(size < 1, 0.5 * size.square(), size - 0.5)
            of_pixels = huber.mean(dim=0)
        losses[block] = torch.where(active, of_pixels, 0.0).reshape(losses[block].shape)
    return losses


def pixel_losses_backward(
    grad_losses: Tensor, features: Tensor, labels: Tensor, anchors: Tensor, distance: str
) -> Tensor:
    """The gradient of `pixel_losses`; the Euclidean one is 0 where x = a."""
    points, _ = _points(features, anchors)
    grad = torch.empty_like(features)
    for block in _blocks(features):
        offsets, active = _offsets(features, labels, points, block)
        if distance == "euclidean":
            norms = offsets.square().sum(dim=0).sqrt()
            slopes = offsets / torch.where(norms == 0, 1.0, norms)
        elif distance == "squared":
            slopes = 2 * offsets
        else:
            slopes = offsets.clamp(-1, 1) / features.shape[1]
        scaled = slopes * grad_losses[block].reshape(-1)
        _write_pixels(grad, block, torch.where(active, scaled, 0.0))
    return grad


def _block_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if has_float64(features.device) else torch.float32


def _blocks(features: Tensor, num_classes: int = 1) -> Iterator[Block]:
    """Slices that cut a label map (N, *) into blocks of few enough pixels.

    Few enough for as many features, and for as many values per class, to fit the limit.
    """
    limit = _BLOCK_ELEMENTS_CPU if features.device.type == "cpu" else _BLOCK_ELEMENTS_GPU
    images, channels, *spatial = features.shape
    pixels = max(1, limit // max(1, channels, num_classes))
    ranges: list[list[slice]] = []
    for size in reversed((images, *spatial)):
        step = min(pixels, max(1, size))
        pixels //= step
        ranges.insert(0, [slice(start, start + step) for start in range(0, size, step)])
    yield from itertools.product(*ranges)


def _pixels(maps: Tensor, block: Block) -> Tensor:
    """The block of maps (N, K, *) as a matrix (K, pixels) in the dtype of the computation."""
    part = maps[(block[0], slice(None), *block[1:])].movedim(1, 0)
    return part.reshape(maps.shape[1], math.prod(part.shape[1:])).to(_block_dtype(maps))


def _write_pixels(maps: Tensor, block: Block, values: Tensor) -> None:
    part = maps[(block[0], slice(None), *block[1:])].movedim(1, 0)
    part.copy_(values.reshape(part.shape))


def _flat(labels: Tensor, block: Block) -> Tensor:
    return labels[block].reshape(-1).to(torch.int64)


def _finite(x: Tensor) -> Tensor:
    """Which pixels of a block (D, pixels) are finite throughout."""
    return (x * 0).sum(dim=0) == 0  # 0 times anything finite is 0, else NaN


def _points(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors in the dtype of the computation, 0 where unseen, and the mask (C, 1) of the seen."""
    seen = anchors.isfinite().all(dim=1, keepdim=True)
    return torch.where(seen, anchors, 0.0).to(_block_dtype(features)), seen


def _distances(x: Tensor, points: Tensor) -> Tensor:
    squared = torch.addmm(points.square().sum(dim=1, keepdim=True), points, x, alpha=-2)
    return (squared + x.square().sum(dim=0)).clamp(min=0).sqrt()


def _offsets(
    features: Tensor, labels: Tensor, points: Tensor, block: Block
) -> tuple[Tensor, Tensor]:
    """The offsets x − a_y (D, pixels), and which pixels have a label."""
    y = _flat(labels, block)
    return _pixels(features, block) - points.T[:, y.clamp(min=0)], y >= 0
