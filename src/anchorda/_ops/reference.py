"""The memory-bound operators in plain torch: the truth that every faster path has to equal.

Each operator walks over its input in blocks of pixels, and through a block in parts of its
channels, that fit a cache: nothing of the size of the features is materialized. What is multiplied
out, ``‖x‖² − 2·a·x + ‖a‖²``, is computed in float64: it loses half its digits where a feature lies
near an anchor, which float32 (let alone TF32) cannot afford and float64 can. Differences ``x − a``
lose nothing and stay in float32. Results leave in float32, or in float64 where the input was
float64.

Shapes follow the library's contract: features ``(N, D, *)``, label maps ``(N, *)``. An anchor row
that is not finite belongs to an unseen class. Nothing here is differentiable by itself; the
gradients are operators of their own.
"""

import itertools
import math
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

# Elements of a part: 3.75 MB in float64 stay near a core's cache, and leave enough pixels to a
# block for its matrix products to be fast; a GPU wants fewer, larger steps.
_BLOCK_ELEMENTS_CPU = 15 * 2**15
_BLOCK_ELEMENTS_GPU = 2**21
_PART_CHANNELS = 128

Block = tuple[slice, ...]
_EVERY = slice(None)


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64 (Apple's does not)."""
    return device.type != "mps"


def result_dtype(features: Tensor) -> torch.dtype:
    """The dtype of what is returned for such features: float64 for float64, else float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sums (C, D) float64 and counts (C,) int64 of the finite features of each class."""
    scratch = _Scratch(features.device)
    looks = features.device.type == "cpu"  # at values: elsewhere the host would wait for them
    classes = torch.arange(num_classes, device=features.device)[:, None]
    shape = (num_classes, features.shape[1])
    sums = torch.zeros(shape, dtype=_block_dtype(features), device=features.device)
    counts = torch.zeros(num_classes, dtype=torch.int64, device=features.device)
    for block in _blocks(features, num_classes):
        members = _flat(labels, block) == classes
        if looks:
            of_block = _sums_of_members(features, block, members, scratch)
        # A NaN times a weight of zero is a NaN: sums that are finite tell that all features are.
        if not looks or not bool(of_block.isfinite().all()):
            members &= _finite(features, block, scratch)
            of_block = _sums_of_members(features, block, members, scratch, clean=True)
        sums += of_block
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
    grad, scratch = torch.empty_like(features), _Scratch(features.device)
    num_classes = grad_sums.shape[1]
    for i in range(features.shape[0]):
        image = features[i : i + 1]
        for block in _blocks(image):
            y = _flat(labels[i : i + 1], block)
            summed = (y >= 0) & (y < num_classes) & _finite(image, block, scratch)
            y = y.clamp(0, num_classes - 1)
            for channels in _channels(image):
                columns = _columns(grad_sums[i], y, image, channels, scratch)
                _write(grad[i : i + 1], block, channels, _kept(columns, summed))
    return grad


def anchor_distances(features: Tensor, anchors: Tensor) -> Tensor:
    """Euclidean distances (N, C, *): infinite to unseen classes, else NaN for non-finite pixels."""
    points, squares = _points(anchors, _block_dtype(features))
    scratch = _Scratch(features.device)
    shape = (features.shape[0], anchors.shape[0], *features.shape[2:])
    distances = torch.empty(shape, dtype=result_dtype(features), device=features.device)
    for block in _blocks(features, anchors.shape[0]):
        of_pixels = _block_distances(features, block, points, squares, scratch)
        _write(distances, block, _EVERY, of_pixels.masked_fill_(squares == math.inf, math.inf))
    return distances


def anchor_distances_backward(
    grad_distances: Tensor, distances: Tensor, features: Tensor, anchors: Tensor
) -> Tensor:
    """Sum over the classes of ``grad · (x − a) / ‖x − a‖``, 0 where x = a."""
    points, _ = _points(anchors, _block_dtype(features))
    grad, scratch = torch.empty_like(features), _Scratch(features.device)
    for block in _blocks(features, anchors.shape[0]):
        g, d = _matrix(grad_distances, block), _matrix(distances, block)
        _write_distance_gradient(grad, features, block, points, g, d, scratch)
    return grad


def nearest_anchors(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest class (N, *) int32, and the distances to it and to the runner-up.

    Of equally near classes the first wins; equal is what the returned dtype cannot tell apart.
    Where nothing can win (a feature that is not finite, or farther than that dtype reaches, or no
    class seen) the class is −1 and both distances are infinite; with one class seen the second is.
    """
    points, squares = _points(anchors, _block_dtype(features))
    scratch = _Scratch(features.device)
    num_classes = anchors.shape[0]
    ranks = torch.arange(num_classes, 0, -1, device=features.device)[:, None]
    ranks = ranks.to(torch.uint8 if num_classes < 256 else torch.int32)
    shape = (features.shape[0], *features.shape[2:])
    labels = torch.empty(shape, dtype=torch.int32, device=features.device)
    nearest = torch.empty(shape, dtype=result_dtype(features), device=features.device)
    second = torch.empty_like(nearest)
    for block in _blocks(features, num_classes):
        distances = _block_distances(features, block, points, squares, scratch)
        # Anchors in one place may differ in the last bit of the product, but not after rounding.
        candidates = scratch("candidates", nearest.dtype, *distances.shape).copy_(distances)
        first = candidates.amin(dim=0)
        # Not argmin, which may return any of several equal minima.
        winner = num_classes - torch.mul(candidates == first, ranks).amax(dim=0).long()
        candidates.scatter_(0, winner.clamp(max=num_classes - 1)[None], math.inf)
        block_shape = labels[block].shape
        labels[block] = winner.reshape(block_shape)
        nearest[block] = first.reshape(block_shape)
        second[block] = candidates.amin(dim=0).reshape(block_shape)
    nothing = ~(nearest < math.inf)  # a NaN, too
    labels.masked_fill_(nothing, -1)
    nearest.masked_fill_(nothing, math.inf)
    return labels, nearest, second.masked_fill_(nothing, math.inf)


def pixel_losses(features: Tensor, labels: Tensor, anchors: Tensor, distance: str) -> Tensor:
    """The distance (N, *) of each pixel to the anchor of its label, 0 for negative labels."""
    points, _ = _points(anchors, torch.promote_types(result_dtype(features), anchors.dtype))
    scratch = _Scratch(features.device)
    shape = (features.shape[0], *features.shape[2:])
    losses = torch.empty(shape, dtype=result_dtype(features), device=features.device)
    for block in _blocks(features):
        y = _flat(labels, block)
        total = torch.zeros_like(y, dtype=points.dtype)
        for channels in _channels(features):
            offsets = _offsets(features, block, channels, points, y, scratch)
            if distance == "smooth_l1":
                size = offsets.abs_()
                bounded = size.clamp(max=1)
                total += (size - bounded / 2).mul_(bounded).sum(dim=0) / features.shape[1]
            else:
                total += offsets.mul_(offsets).sum(dim=0)
        if distance == "euclidean":
            total.sqrt_()
        losses[block] = torch.where(y >= 0, total, 0.0).reshape(losses[block].shape)
    return losses


def pixel_losses_backward(
    grad_losses: Tensor,
    losses: Tensor,
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    distance: str,
) -> Tensor:
    """The gradient of `pixel_losses`; the Euclidean one is 0 where x = a."""
    points, _ = _points(anchors, torch.promote_types(result_dtype(features), anchors.dtype))
    grad, scratch = torch.empty_like(features), _Scratch(features.device)
    for block in _blocks(features):
        y, scale = _flat(labels, block), grad_losses[block].reshape(-1)
        if distance == "euclidean":
            norms = losses[block].reshape(-1)
            scale = scale / torch.where(norms == 0, 1.0, norms)
        elif distance == "squared":
            scale = 2 * scale
        else:
            scale = scale / features.shape[1]
        for channels in _channels(features):
            slopes = _offsets(features, block, channels, points, y, scratch)
            if distance == "smooth_l1":
                slopes.clamp_(-1, 1)
            _write(grad, block, channels, _kept(slopes.mul_(scale), y >= 0))
    return grad


def contrastive_losses(
    features: Tensor, labels: Tensor, anchors: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (N, *) of the softmax over −distance / temperature, 0 for negative labels.

    With it the distances (N, C, *), which the gradient needs: as those of `anchor_distances`, but
    NaN to all classes where a feature is not finite.
    """
    points, squares = _points(anchors, _block_dtype(features))
    scratch = _Scratch(features.device)
    shape = (features.shape[0], anchors.shape[0], *features.shape[2:])
    distances = torch.empty(shape, dtype=result_dtype(features), device=features.device)
    losses = distances.new_empty(labels.shape)
    for block in _blocks(features, anchors.shape[0]):
        y = _flat(labels, block)
        of_pixels = _block_distances(features, block, points, squares, scratch)
        _write(distances, block, _EVERY, of_pixels)
        logits = of_pixels.div_(-temperature)
        own = logits.gather(0, y.clamp(min=0)[None]).squeeze(0)
        total = torch.where(y >= 0, logits.logsumexp(dim=0) - own, 0.0)
        losses[block] = total.reshape(losses[block].shape)
    return losses, distances


def contrastive_losses_backward(
    grad_losses: Tensor,
    distances: Tensor,
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    temperature: float,
) -> Tensor:
    """The gradient of `contrastive_losses`, ``(1[k = y] − softmax) / temperature`` by distance."""
    points, _ = _points(anchors, _block_dtype(features))
    grad, scratch = torch.empty_like(features), _Scratch(features.device)
    for block in _blocks(features, anchors.shape[0]):
        y, d = _flat(labels, block), _matrix(distances, block)
        share = (d / -temperature).softmax(dim=0)
        share.scatter_add_(0, y.clamp(min=0)[None], share.new_full((1, len(y)), -1.0))
        of_losses = torch.where(y >= 0, grad_losses[block].reshape(-1) / -temperature, 0.0)
        g = _kept(share.mul_(of_losses), y >= 0)
        _write_distance_gradient(grad, features, block, points, g, d, scratch)
    return grad


@final
class _Scratch:
    """Memory that the blocks of one call share: fresh pages cost as much as the arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """A tensor of any content, valid until the next one of that name."""
        size, held = math.prod(shape), self._held.get(name)
        if held is None or len(held) < size:
            held = self._held[name] = torch.empty(size, dtype=dtype, device=self._device)
        return held[:size].view(shape)


def _block_dtype(features: Tensor) -> torch.dtype:
    """The dtype that sums and products are computed in."""
    return torch.float64 if has_float64(features.device) else torch.float32


def _blocks(features: Tensor, num_classes: int = 1) -> Iterator[Block]:
    """Slices that cut a label map (N, *) into blocks of few enough pixels.

    Few enough for a part of their features, and for as many values per class, to fit the limit.
    """
    limit = _BLOCK_ELEMENTS_CPU if features.device.type == "cpu" else _BLOCK_ELEMENTS_GPU
    images, channels, *spatial = features.shape
    pixels = max(1, limit // max(1, min(channels, _most_channels(features)), num_classes))
    ranges: list[list[slice]] = []
    for size in reversed((images, *spatial)):
        step = min(pixels, max(1, size))
        pixels //= step
        ranges.insert(0, [slice(start, start + step) for start in range(0, size, step)])
    yield from itertools.product(*ranges)


def _channels(features: Tensor) -> Iterator[slice]:
    """Slices that cut the channels into parts of about one length."""
    channels = features.shape[1]
    count = max(1, math.ceil(channels / _most_channels(features)))
    for i in range(count):
        yield slice(i * channels // count, (i + 1) * channels // count)


def _most_channels(features: Tensor) -> int:
    """Of a part; rows are read fast if they are long."""
    return 4 * _PART_CHANNELS if _has_rows(features) else _PART_CHANNELS


def _view(maps: Tensor, block: Block, channels: slice) -> Tensor:
    """A part of maps (N, K, *), channels first."""
    return maps[(block[0], channels, *block[1:])].movedim(1, 0)


def _write(maps: Tensor, block: Block, channels: slice, values: Tensor) -> None:
    part = _view(maps, block, channels)
    part.copy_(values.reshape(part.shape))


def _has_rows(maps: Tensor) -> bool:
    """Whether the channels of a pixel are neighbors in memory, rather than the pixels."""
    return maps.stride(1) == 1


def _parts(features: Tensor, block: Block, scratch: _Scratch) -> Iterator[tuple[slice, Tensor]]:
    """The parts of a block: channels, and a copy (channels, pixels) to be written over.

    In float64, and in the memory layout of the features.
    """
    dtype = _block_dtype(features)
    for channels in _channels(features):
        part = _view(features, block, channels)
        size = part.shape[0], math.prod(part.shape[1:])
        if _has_rows(features):
            part = part.movedim(0, -1)
            yield channels, scratch("part", dtype, *part.shape).copy_(part).view(size[::-1]).T
        else:
            yield channels, scratch("part", dtype, *part.shape).copy_(part).view(size)


def _matrix(maps: Tensor, block: Block) -> Tensor:
    """A block of maps (N, C, *) as a matrix (C, pixels) in the dtype of the computation."""
    part = _view(maps, block, _EVERY)
    return part.reshape(part.shape[0], math.prod(part.shape[1:])).to(_block_dtype(maps))


def _flat(labels: Tensor, block: Block) -> Tensor:
    return labels[block].reshape(-1).to(torch.int64)


def _points(anchors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Anchors (C, D), 0 where unseen, and their squared norms (C, 1), infinite where unseen."""
    seen = anchors.isfinite().all(dim=1, keepdim=True)
    points = torch.where(seen, anchors, 0.0).to(dtype)
    return points, torch.where(seen, points.square().sum(dim=1, keepdim=True), math.inf)


def _sums_of_members(
    features: Tensor, block: Block, members: Tensor, scratch: _Scratch, *, clean: bool = False
) -> Tensor:
    """The sums (C, D) of the features of a block over their classes; clean, with 0 for a NaN."""
    weights = members.to(_block_dtype(features))
    sums = weights.new_zeros(len(members), features.shape[1])
    for channels, x in _parts(features, block, scratch):
        if clean:
            x.nan_to_num_(0.0, 0.0, 0.0)
        # In place, a product is left alone by autocast.
        sums[:, channels].addmm_(weights, x.T)
    return sums


def _finite(features: Tensor, block: Block, scratch: _Scratch) -> Tensor:
    """Which pixels of a block are finite throughout."""
    # 0 times anything finite is 0, else NaN.
    sums = [x.mul_(0).sum(dim=0) for _, x in _parts(features, block, scratch)]
    return torch.stack(sums).sum(dim=0) == 0


def _block_distances(
    features: Tensor, block: Block, points: Tensor, squares: Tensor, scratch: _Scratch
) -> Tensor:
    """‖x − a‖ (C, pixels) of a block: NaN for a non-finite feature, else infinite if unseen."""
    pixels = math.prod(_view(features, block, _EVERY).shape[1:])
    distances = scratch("distances", points.dtype, len(points), pixels).copy_(squares)
    norms = squares.new_zeros(pixels)
    for channels, x in _parts(features, block, scratch):
        distances.addmm_(points[:, channels], x, alpha=-2)
        norms += x.mul_(x).sum(dim=0)
    norms = torch.where(norms.isfinite(), norms, math.nan)
    return distances.add_(norms).clamp_(min=0).sqrt_()


def _write_distance_gradient(
    grad: Tensor,
    features: Tensor,
    block: Block,
    points: Tensor,
    grad_distances: Tensor,
    distances: Tensor,
    scratch: _Scratch,
) -> None:
    """The gradient of a block's features from that of its distances (C, pixels)."""
    weights = grad_distances.div(distances).masked_fill_(distances == 0, 0.0)
    total = weights.sum(dim=0)
    has_gradient = (grad_distances != 0).any(dim=0)
    for channels, x in _parts(features, block, scratch):
        x.mul_(total).addmm_(points.T[channels], weights, alpha=-1)
        _write(grad, block, channels, _kept(x, has_gradient))


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    """Values (K, pixels) where the mask (pixels,) is true; elsewhere 0, whatever they were.

    By their bits, as a NaN times zero is a NaN, and a choice of values is slow.
    """
    bits = torch.int64 if x.dtype == torch.float64 else torch.int32
    x.view(bits).bitwise_and_(torch.where(mask, -1, 0).to(bits))
    return x


def _columns(
    values: Tensor, y: Tensor, features: Tensor, channels: slice, scratch: _Scratch
) -> Tensor:
    """Of values (C, D) the row of each label, as a matrix (channels, pixels).

    In the memory layout of the features.
    """
    count = channels.stop - channels.start
    if _has_rows(features):
        rows = scratch("rows", values.dtype, len(y), count)
        return torch.index_select(values[:, channels], 0, y, out=rows).T
    columns = scratch("columns", values.dtype, count, len(y))
    table = values.T[channels].contiguous()
    return torch.gather(table, 1, y.expand(count, -1), out=columns)


def _offsets(
    features: Tensor, block: Block, channels: slice, points: Tensor, y: Tensor, scratch: _Scratch
) -> Tensor:
    """Offsets x − a_y (channels, pixels) of a part; anything where the label is negative."""
    part = _view(features, block, channels)
    own = _columns(points, y.clamp(min=0), features, channels, scratch)
    return torch.sub(part.reshape(own.shape), own, out=own)
