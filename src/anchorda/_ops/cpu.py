"""The operators where a CPU has a faster way than `reference`, and equal to it.

Labels and the contrastive loss come from float32 products of the features and the anchors about the
anchors' mean, as far as those are precise enough. They are not where a pixel is near an anchor, nor
can they choose between two anchors that are about as near: such pixels are left to the reference if
they are few. If they are many, the nearest distances are computed from offsets, and what offsets do
not help is computed by the reference throughout. The values decide; here the host may look at them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .tiles import (
    Block,
    Scratch,
    blocks,
    get,
    has_rows,
    matrices,
    new_gradient,
    place,
    put,
    room,
    scalars,
    take,
)

# Elements of the features, below which plain float64 is as fast.
_MANY = 2**19
# The part of all pixels that the reference computes once more, at most.
_FEW = 1 / 32
# The part of ‖x‖² that the squared distance to the nearest anchor must not be less than: what is
# subtracted from ‖x‖² costs about as many bits as this has.
_PART_OF_SCORES = 1 / 3
_PART_OF_LOSSES = 1 / 16
# Channels that a product adds up before it adds to others: long sums lose more to rounding.
_CHANNELS = 64
# Accumulators of a class in a tile: neighbors, mostly of one class, need not wait for each other.
_LANES = 4


def adds(features: Tensor) -> bool:
    """Whether the class sums of such features are computed here."""
    return features.device.type == "cpu" and features.dtype != torch.float64


def multiplies(features: Tensor) -> bool:
    """Whether the others are: not where a user lets float32 be multiplied in less.

    Nor where so few features are that their arithmetic costs less than the calls for it.
    """
    if not adds(features) or features.numel() < _MANY:
        return False
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set by the newer interface, for which this one does not answer
        return False


def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """See `reference.class_sums`."""
    targets = labels.to(torch.int64)
    targets = torch.where((targets >= 0) & (targets < num_classes), targets, num_classes)
    add = _add_by_product if has_rows(features) else _add_by_class
    sums = add(matrices(features), scalars(targets), num_classes)
    if not bool(sums.isfinite().all()):  # nor are all features
        return reference.class_sums(features, labels, num_classes)
    return sums, targets.flatten().bincount(minlength=num_classes + 1)[:-1]


def nearest_anchors(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.nearest_anchors`."""
    results, near, doubts = _nearest_in_float32(features, anchors)
    labels, nearest, second = results
    few = _FEW * labels.numel()
    if int(near.count_nonzero()) > few:
        targets = torch.where(near, labels, -1)
        nearest += reference.pixel_losses(features, targets, anchors, "euclidean")
    else:
        doubts |= near
    count = int(doubts.count_nonzero())
    if count > few:
        return reference.nearest_anchors(features, anchors)
    if count > 0:
        again = reference.nearest_anchors(_at(features, doubts), anchors)
        for result, values in zip((labels, nearest, second), again, strict=True):
            result[doubts] = values
    return labels, nearest, second


def contrastive_losses(
    features: Tensor, labels: Tensor, anchors: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """See `reference.contrastive_losses`; distances of pixels without a label may be imprecise."""
    about, maps, scratch = _about_mean(anchors), matrices(features), Scratch(features.device)
    shape = (features.shape[0], anchors.shape[0], *features.shape[2:])
    distances = features.new_empty(shape, dtype=torch.float32)
    losses, targets = distances.new_empty(labels.shape), scalars(labels)
    few = _FEW * losses.numel()
    for block in blocks(maps, torch.float32, len(about.points)):
        y = reference.labels_at(targets, block)
        squared, norms = _squared_distances(maps, block, about, scratch)
        squared = reference.nearest_of_class(squared, anchors)
        first = squared.amin(dim=1, keepdim=True)
        sure = _is_precise(first, norms) | (y < 0)
        few -= int(sure.logical_not().count_nonzero())
        if few < 0:
            return reference.contrastive_losses(features, labels, anchors, temperature)
        put(matrices(distances), block, squared.sqrt_())
        of_pixels = reference.cross_entropy(squared, y, temperature)
        put(scalars(losses), block, torch.where(sure, of_pixels, math.nan))
    doubts = losses.isnan()
    if bool(doubts.any()):
        losses[doubts], distances.movedim(1, -1)[doubts] = reference.contrastive_losses(
            _at(features, doubts), labels[doubts], anchors, temperature
        )
    return losses, distances


def contrastive_losses_backward(
    grad_losses: Tensor,
    distances: Tensor,
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    temperature: float,
) -> Tensor:
    """See `reference.contrastive_losses_backward`."""
    if anchors.dim() == 3:  # which anchor of a class is the nearest may be in doubt
        return reference.contrastive_losses_backward(
            grad_losses, distances, features, labels, anchors, temperature
        )
    about, scratch = _about_mean(anchors), Scratch(features.device)
    nearest = distances.amin(dim=1).square_()
    # ‖x‖ is at most the distance to an anchor and the norm of that.
    doubts = (labels >= 0) & ~_is_precise(nearest, about.extent)
    # Where all are in range, 0 times whatever comes of a pixel without a label is 0.
    all_in_range = bool(_in_range(nearest).all())
    del nearest
    if int(doubts.count_nonzero()) > _FEW * doubts.numel():
        return reference.contrastive_losses_backward(
            grad_losses, distances, features, labels, anchors, temperature
        )
    grad = new_gradient(features)
    maps, of_classes, of_grad = matrices(features), matrices(distances), matrices(grad)
    targets, rates = scalars(labels), scalars(grad_losses)
    for block in blocks(maps, torch.float32, 4 * anchors.shape[0], one_tile=not has_rows(maps)):
        y, d = reference.labels_at(targets, block), get(of_classes, block)
        weights = reference.softmax_gradient(d, y.clamp(min=0), temperature)
        weights.mul_(torch.where(y >= 0, get(rates, block) / -temperature, 0.0)).div_(d)
        x = place(of_grad, block, torch.float32, scratch)
        x = _offsets(maps, block, about.center, x)
        x = reference.weighted_offsets(x, about.points, weights)
        if not all_in_range:
            x = reference.kept(x, y >= 0)
        put(of_grad, block, x)
    if bool(doubts.any()):
        grad.movedim(1, -1)[doubts] = reference.contrastive_losses_backward(
            *(grad_losses[doubts], _at(distances, doubts), _at(features, doubts)),
            *(labels[doubts], anchors, temperature),
        ).to(grad.dtype)
    return grad


class _Anchors(NamedTuple):
    """Anchors about the mean of those that are seen, in float32."""

    center: Tensor
    """(D, 1)"""
    points: Tensor
    """(C·M, D), 0 where absent"""
    squares: Tensor
    """(C·M, 1): squared norms, infinite where absent"""
    extent: float
    """The largest squared norm."""


def _about_mean(anchors: Tensor) -> _Anchors:
    """Anchors (C, D) or (C, M, D) about their mean, which is NaN if no class is seen."""
    anchors = anchors.flatten(0, -2)
    seen = anchors.isfinite().all(dim=1, keepdim=True)
    wide = torch.where(seen, anchors, 0.0).to(torch.float64)
    center = (wide.sum(dim=0) / seen.sum()).to(torch.float32)
    points = torch.where(seen, wide - center, 0.0)
    squares = points.square().sum(dim=1, keepdim=True)
    extent = float(squares.max())
    squares = torch.where(seen, squares, math.inf).to(torch.float32)
    return _Anchors(center[:, None], points.to(torch.float32), squares, extent)


def _nearest_in_float32(
    features: Tensor, anchors: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """The results; where the nearest distance is imprecise, and 0; and where others are."""
    about, maps, scratch = _about_mean(anchors), matrices(features), Scratch(features.device)
    labels, nearest, second = reference.new_nearest(features)
    near, doubts = (torch.empty_like(labels, dtype=torch.bool) for _ in range(2))
    # Of a difference of squared distances, in parts of ‖x‖² + ‖a‖²: what adding up rounds at most.
    rounding = (2 * features.shape[1] + 32) * 2.0**-24
    for block in blocks(maps, torch.float32, len(about.points)):
        squared, norms = _squared_distances(maps, block, about, scratch)
        squared = reference.nearest_of_class(squared, anchors)
        winner, first, next_ = reference.two_least(squared)
        scale = norms + about.extent
        least = norms.mul_(_PART_OF_SCORES)
        is_near = first < least
        sure = (next_ - first > rounding * scale) & (next_ >= least) & _in_range(scale)
        put(scalars(labels), block, winner)
        put(scalars(nearest), block, torch.where(is_near, 0.0, first))
        put(scalars(second), block, next_)
        put(scalars(near), block, is_near)
        put(scalars(doubts), block, ~sure)
    return (labels, nearest.sqrt_(), second.sqrt_()), near, doubts


def _squared_distances(
    maps: Tensor, block: Block, about: _Anchors, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """‖x − a‖² (T, C, p) and ‖x‖² (T, 1, p) about the mean."""
    x = _offsets(maps, block, about.center, room(maps, block, torch.float32, scratch))
    squared = scratch("squared", x.dtype, len(x), len(about.points), x.shape[2])
    squared.copy_(about.squares)
    for part, points in zip(x.split(_CHANNELS, 1), about.points.split(_CHANNELS, 1), strict=True):
        squared.baddbmm_(points.expand(len(x), -1, -1), part, alpha=-2)
    norms = x.mul_(x).sum(dim=1, keepdim=True)
    return squared.add_(norms), norms


def _offsets(maps: Tensor, block: Block, center: Tensor, out: Tensor) -> Tensor:
    """Offsets (T, D, p) of a block from a center (D, 1), written to `out`."""
    tiles = get(maps, block)
    if tiles.dtype == out.dtype:
        return torch.sub(tiles, center, out=out)
    return out.copy_(tiles).sub_(center)  # where torch would convert them to new memory first


def _is_precise(squared: Tensor, norms: Tensor | float) -> Tensor:
    """Whether squared distances to the nearest anchor are, at such squared norms about the mean."""
    return (squared >= _PART_OF_LOSSES * norms) & _in_range(squared)


def _in_range(squares: Tensor) -> Tensor:
    """Whether float32 holds such squares, and what is left of them; not if they are NaN."""
    return (squares > 1e-30) & (squares < 1e30)


def _at(maps: Tensor, chosen: Tensor) -> Tensor:
    """The rows (P, K) of maps (N, K, *) at the chosen pixels (N, *)."""
    return maps.movedim(1, -1)[chosen]


def _add_by_class(maps: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """The sums (C, D) of features, added one by one. Class C is of those that are in none."""
    bins = (num_classes + 1) * _LANES
    walk, sums = _walk(maps, bins, (maps.shape[1], bins))
    scratch = Scratch(maps.device)
    for block in walk:
        x = take(maps, block, torch.float64, scratch)
        places = get(targets, block) * _LANES + torch.arange(x.shape[2], device=x.device) % _LANES
        sums[: len(x)].scatter_add_(2, places.expand_as(x), x)
    of_classes = sums.sum(dim=0).view(-1, num_classes + 1, _LANES).sum(dim=2)
    return of_classes.T[:num_classes].contiguous()


def _add_by_product(maps: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """The same as a product, which is faster where a pixel's channels are neighbors."""
    walk, sums = _walk(maps, num_classes, (num_classes, maps.shape[1]))
    classes, scratch = torch.arange(num_classes, device=maps.device)[:, None], Scratch(maps.device)
    for block in walk:
        x = take(maps, block, torch.float64, scratch)
        members = (get(targets, block) == classes).to(torch.float64)
        sums[: len(x)].baddbmm_(members, x.mT)
    return sums.sum(dim=0)


def _walk(maps: Tensor, per_pixel: int, shape: tuple[int, int]) -> tuple[list[Block], Tensor]:
    """Blocks, and zeros of a shape for each tile of the largest."""
    walk = list(blocks(maps, torch.float64, per_pixel))
    most = max((len(get(maps, block)) for block in walk), default=0)
    return walk, maps.new_zeros(most, *shape, dtype=torch.float64)
