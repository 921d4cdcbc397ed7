"""Operators that a CPU computes faster than `reference` does, with results equal to its.

Labels and the contrastive loss come from float32 products of features and anchors about the
anchors' mean. These are not precise near an anchor, and cannot choose between two anchors that are
about as near. Such pixels are computed once more by the reference: they alone where a block has
few, else the whole block. The values decide; here the host may look at them.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .blocks import (
    Scratch,
    for_each_block,
    has_rows,
    matrices,
    new_gradient,
    parts,
    pixels_of_part,
    scalars,
    share_if_many,
    views_of_blocks,
)

# Of the pixels of a block, how many may be computed once more by themselves.
_FEW = 1 / 32
# The part of ‖x‖² that the squared distance to the nearest anchor must not be less than: what is
# subtracted from ‖x‖² costs about as many bits as this has.
_PART_OF_SCORES = 1 / 3
_PART_OF_LOSSES = 1 / 16
# Channels that a product adds up before it adds to others: long sums lose more to rounding.
_CHANNELS = 64
# Sums of a class: neighbors, mostly of one class, need not wait for each other.
_LANES = 4
# Strips of pixels with sums of their own, at most, and the share of the memory of the features that
# all sums take, at most. They are the same for any number of threads, and so is the result.
_STRIPS = 8
_SHARE_OF_SUMS = 1 / 32


def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """See `reference.class_sums`."""
    maps, targets = matrices(features), scalars(labels)
    rows, channels = has_rows(maps), maps.shape[1]
    lanes = 1 if rows else _LANES
    bins = (num_classes + 1) * lanes  # The last class is none.
    strips = int(_SHARE_OF_SUMS * features.numel() / (bins * channels + 1))
    pixels = math.ceil(labels.numel() / min(max(strips, 1), _STRIPS))
    blocks = list(views_of_blocks(max(pixels, 1), maps, targets))
    shape = (bins, channels) if rows else (channels, bins)
    sums = features.new_zeros(len(blocks), *shape, dtype=torch.float64)
    counts = labels.new_zeros(len(blocks), bins, dtype=torch.int64)
    part = pixels_of_part(maps, torch.float64)

    def work(strips: Iterator[tuple[Tensor, Tensor, tuple[Tensor, ...]]]) -> None:
        scratch = Scratch(features.device)
        for of_strip, counts_of_strip, (x, y) in strips:
            y = y.to(torch.int64)
            y = torch.where((y >= 0) & (y < num_classes), y, num_classes).mul_(lanes)
            y.add_(torch.arange(y.shape[2], device=y.device) % lanes)
            counts_of_strip.copy_(y.flatten().bincount(minlength=bins))
            for x_, y_ in parts(part, x, y):
                images, _, pixels = x_.shape
                index = y_.flatten()
                if rows:
                    wide = scratch("x", torch.float64, images, pixels, channels).copy_(x_.mT)
                    of_strip.index_add_(0, index, wide.flatten(0, 1))
                else:
                    wide = scratch("x", torch.float64, channels, images, pixels)
                    wide.copy_(x_.transpose(0, 1))
                    of_strip.scatter_add_(1, index.expand(channels, -1), wide.flatten(1))

    share_if_many(work, list(zip(sums, counts, blocks, strict=True)), features)
    of_all = sums[0] if len(sums) == 1 else sums.sum(dim=0)
    of_classes = of_all[:-1]
    if not rows:
        of_classes = of_all.view(channels, num_classes + 1, lanes)[:, :-1].sum(dim=2).T.contiguous()
    if not bool(of_classes.sum().isfinite()):  # nor are all features
        return reference.class_sums(features, labels, num_classes)
    return of_classes, counts.sum(dim=0).view(-1, lanes).sum(dim=1)[:-1]


def nearest_anchors(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.nearest_anchors`."""
    about, maps = _about_mean(anchors), matrices(features)
    results = reference.new_nearest(features)
    # Of a difference of squared distances, in parts of ‖x‖² + ‖a‖²: what adding up rounds at most.
    rounding = (2 * features.shape[1] + 32) * 2.0**-24

    def compute(scratch: Scratch, x: Tensor, *outs: Tensor) -> None:
        squared, norms = _squared_distances(x, about, scratch)
        winner, first, second = reference.two_least(squared)
        scale = norms + about.extent
        least = norms.mul_(_PART_OF_SCORES)
        sure = (second - first > rounding * scale) & (first >= least) & _in_range(scale)
        for out, values in zip(outs, (winner, first.sqrt_(), second.sqrt_()), strict=True):
            out.copy_(values)
        doubts = sure.logical_not_()
        for chosen in _chosen(doubts):
            again = reference.nearest_anchors(_at(x, chosen), anchors)
            for out, values in zip(outs, again, strict=True):
                _write(out, chosen, values.unsqueeze(1))

    part = pixels_of_part(maps, torch.float32)
    for_each_block(compute, maps, *map(scalars, results), part=part)
    return results


def contrastive_losses(
    features: Tensor, labels: Tensor, anchors: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """See `reference.contrastive_losses`; distances of pixels without a label may be imprecise."""
    about, maps = _about_mean(anchors), matrices(features)
    losses, distances = reference.new_map(features), reference.new_map(features, len(anchors))

    def compute(scratch: Scratch, x: Tensor, y: Tensor, loss: Tensor, out: Tensor) -> None:
        y = y.to(torch.int64)
        squared, norms = _squared_distances(x, about, scratch)
        first = squared.amin(dim=1, keepdim=True)
        doubts = (y >= 0) & ~_is_precise(first, norms)
        out.copy_(squared.sqrt_())
        loss.copy_(reference.cross_entropy(squared, y, temperature))
        for chosen in _chosen(doubts):
            x_, y_ = _at(x, chosen), _at(y, chosen)[:, 0]
            again = reference.contrastive_losses(x_, y_, anchors, temperature)
            _write(loss, chosen, again[0].unsqueeze(1))
            _write(out, chosen, again[1])

    part = pixels_of_part(maps, torch.float32)
    for_each_block(compute, maps, scalars(labels), scalars(losses), matrices(distances), part=part)
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
    about, maps, grad = _about_mean(anchors), matrices(features), new_gradient(features)

    def compute(
        scratch: Scratch, x: Tensor, y: Tensor, scale: Tensor, d: Tensor, out: Tensor
    ) -> None:
        y, active = y.to(torch.int64), y >= 0
        nearest = d.amin(dim=1, keepdim=True).square_()
        # ‖x‖ is at most the distance to an anchor and the norm of that.
        doubts = active & ~_is_precise(nearest, about.extent)
        # Where all are in range, 0 times whatever comes of a pixel without a label is 0.
        all_in_range = bool(_in_range(nearest).all())
        weights = reference.softmax_gradient(d, y.clamp(min=0), temperature)
        weights.mul_(torch.where(active, scale / -temperature, 0.0)).div_(d)
        for x_, weights_, active_, out_ in parts(part, x, weights, active, out):
            in_place = out_.dtype == torch.float32
            offsets = out_ if in_place else scratch.like(x_, "x", torch.float32)
            offsets = reference.weighted_offsets(
                _offsets(x_, about.center, offsets), about.points, weights_
            )
            if not all_in_range:
                offsets = reference.zero_unless(active_, offsets)
            if not in_place:
                out_.copy_(offsets)
        for chosen in _chosen(doubts):
            scale_, d_, x_, y_ = (_at(tensor, chosen) for tensor in (scale, d, x, y))
            again = reference.contrastive_losses_backward(
                scale_[:, 0], d_, x_, y_[:, 0], anchors, temperature
            )
            _write(out, chosen, again)

    part = pixels_of_part(maps, torch.float32)
    tensors = maps, scalars(labels), scalars(grad_losses), matrices(distances), matrices(grad)
    for_each_block(compute, *tensors, part=part)
    return grad


class _Anchors(NamedTuple):
    """Anchors about the mean of those that are present, in float32."""

    center: Tensor
    """(D, 1)"""
    points: Tensor
    """(C·M, D), 0 where absent"""
    squares: Tensor
    """(C·M, 1): squared norms, infinite where absent"""
    extent: float
    """The largest squared norm."""
    per_class: int
    """M"""


def _about_mean(anchors: Tensor) -> _Anchors:
    """Return anchors (C, D) or (C, M, D) about their mean, which is NaN if no class is seen."""
    per_class = anchors.shape[1] if anchors.dim() == 3 else 1
    anchors = anchors.flatten(0, -2)
    present = anchors.isfinite().all(dim=1, keepdim=True)
    wide = torch.where(present, anchors, 0.0).to(torch.float64)
    center = (wide.sum(dim=0) / present.sum()).to(torch.float32)
    points = torch.where(present, wide - center, 0.0)
    squares = points.square().sum(dim=1, keepdim=True)
    extent = float(squares.max())
    squares = torch.where(present, squares, math.inf).to(torch.float32)
    return _Anchors(center[:, None], points.to(torch.float32), squares, extent, per_class)


def _squared_distances(x: Tensor, about: _Anchors, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Return ‖x − a‖² (T, C, p) to each class and ‖x‖² (T, 1, p), both about the mean."""
    tiles, _, pixels = x.shape
    squared = scratch("squared", torch.float32, tiles, len(about.points), pixels)
    squared.copy_(about.squares)
    norms = scratch("norms", torch.float32, tiles, 1, pixels)
    groups = about.points.split(_CHANNELS, 1)
    part = pixels_of_part(x, torch.float32)
    for x_, squared_, norms_ in parts(part, x, squared, norms):
        offsets = _offsets(x_, about.center, scratch.like(x_, "x", torch.float32))
        for group, points in zip(offsets.split(_CHANNELS, 1), groups, strict=True):
            squared_.baddbmm_(points.expand(len(x_), -1, -1), group, alpha=-2)
        torch.sum(offsets.mul_(offsets), 1, keepdim=True, out=norms_)
    return reference.nearest_of_class(squared.add_(norms), about.per_class), norms


def _offsets(x: Tensor, center: Tensor, out: Tensor) -> Tensor:
    """Return offsets (T, D, p) of x from a center (D, 1), written to ``out``."""
    if x.dtype == out.dtype:
        return torch.sub(x, center, out=out)
    return out.copy_(x).sub_(center)  # where torch would convert them to new memory first


def _is_precise(squared: Tensor, norms: Tensor | float) -> Tensor:
    """Return where squared distances to the nearest anchor are precise, by squared norms."""
    return (squared >= _PART_OF_LOSSES * norms) & _in_range(squared)


def _in_range(squares: Tensor) -> Tensor:
    """Return where float32 holds such squares and what is left of them; not if they are NaN."""
    return (squares > 1e-30) & (squares < 1e30)


def _chosen(doubts: Tensor) -> Iterator[Tensor | None]:
    """Yield the pixels (T, p) to recompute: none, those of doubts (T, 1, p), or None for all."""
    count = int(doubts.count_nonzero())
    if count > _FEW * doubts.numel():
        yield None
    elif count > 0:
        yield doubts[:, 0]


def _at(x: Tensor, chosen: Tensor | None) -> Tensor:
    """Return the rows (k, K) of x (T, K, p) at the chosen pixels (T, p), or all of it."""
    return x if chosen is None else x.movedim(1, -1)[chosen]


def _write(out: Tensor, chosen: Tensor | None, values: Tensor) -> None:
    """Write values to the chosen pixels of out (T, K, p), or to all."""
    if chosen is None:
        out.copy_(values)
    else:
        out.movedim(1, -1)[chosen] = values.flatten(1).to(out.dtype)
