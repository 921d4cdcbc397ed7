"""The memory-bound operators in plain torch: the truth that every faster path has to equal.

Each operator computes its result block by block (see `blocks`): nothing of the size of the features
is materialized. What is multiplied out, ``‖x‖² − 2·a·x + ‖a‖²``, is computed in float64: it loses
half its digits where a feature lies near an anchor, which float32 (let alone TF32) cannot afford
and float64 can. Differences ``x − a`` lose nothing and stay in float32. Results are returned in
float32, or in float64 where the input was float64.

Shapes follow the library's contract: features ``(N, D, *)``, label maps ``(N, *)``, anchors
``(C, D)`` or ``(C, M, D)``. A row of anchors that is not finite is absent; a class whose rows are
all absent is unseen. Of several anchors of a class the nearest counts. Inside of a block features
are ``x (T, D, p)``: T images or one, and some of their pixels.

Nothing here is differentiable by itself: gradients are operators of their own. And nothing looks at
a value, for which the host would wait.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import (
    Scratch,
    for_each_block,
    has_rows,
    matrices,
    new_gradient,
    parts,
    pixels_of_part,
    scalars,
    views_of_blocks,
)

# Classes, up to which sums are products with one-hot labels, the same bits on every run.
_CLASSES_OF_PRODUCT = 256


class Anchors(NamedTuple):
    """Anchors as the rows of one matrix, class by class."""

    points: Tensor
    """(C·M, D), 0 where absent."""
    squares: Tensor
    """(C·M, 1): squared norms, infinite where absent."""
    per_class: int
    """M."""


def anchor_rows(anchors: Tensor, dtype: torch.dtype) -> Anchors:
    """Return anchors (C, D) or (C, M, D) as rows in a dtype."""
    rows = anchors.flatten(0, -2)
    present = rows.isfinite().all(dim=1, keepdim=True)
    points = torch.where(present, rows, 0.0).to(dtype)
    squares = torch.where(present, points.square().sum(dim=1, keepdim=True), math.inf)
    return Anchors(points, squares, anchors.shape[1] if anchors.dim() == 3 else 1)


def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return sums (C, D) float64 and counts (C,) int64 of the finite features of each class."""
    maps, dtype, device = matrices(features), wide_dtype(features), features.device
    # The last row is of no class.
    sums = torch.zeros(num_classes + 1, features.shape[1], dtype=dtype, device=device)
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=device)
    classes = torch.arange(num_classes + 1, device=device)[:, None]
    per_pixel = num_classes if num_classes <= _CLASSES_OF_PRODUCT else 1
    part, scratch = pixels_of_part(maps, dtype, per_pixel), Scratch(device)
    for x, y in views_of_blocks(part, maps, scalars(labels)):
        y = y.to(torch.int64)
        y = torch.where((y >= 0) & (y < num_classes) & is_finite(x, scratch), y, num_classes)
        counts.scatter_add_(0, y.flatten(), torch.ones_like(y).flatten())
        # A NaN times a weight of zero is a NaN.
        x = scratch.like(x, "x", dtype).copy_(x).nan_to_num_(0.0, 0.0, 0.0)
        if num_classes > _CLASSES_OF_PRODUCT:
            sums.index_add_(0, y.flatten(), x.mT.flatten(0, 1))
            continue
        of_images = scratch("sums", dtype, len(x), *sums.shape).zero_()
        # In place, a product is left alone by autocast.
        sums += of_images.baddbmm_((y == classes).to(dtype), x.mT).sum(dim=0)
    return sums[:-1], counts[:-1]


def image_sums_backward(grad_sums: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of features: each summed pixel receives that of its sum (N, C, D)."""
    grad, num_classes = new_gradient(features), grad_sums.shape[1]
    part = pixels_of_part(features, wide_dtype(features))

    def compute(scratch: Scratch, x: Tensor, y: Tensor, out: Tensor, of_image: Tensor) -> None:
        for x_, y_, out_ in parts(part, x, y.to(torch.int64), out):
            summed = (y_ >= 0) & (y_ < num_classes) & is_finite(x_, scratch)
            rows = rows_of(of_image, y_.clamp(0, num_classes - 1), x_, scratch)
            out_.copy_(zero_unless(summed, rows))

    for i in range(features.shape[0]):
        image = slice(i, i + 1)
        maps, targets, out = (
            matrices(features[image]),
            scalars(labels[image]),
            matrices(grad[image]),
        )
        for_each_block(partial(compute, of_image=grad_sums[i]), maps, targets, out, part=part)
    return grad


def anchor_distances(features: Tensor, anchors: Tensor) -> Tensor:
    """Return distances (N, C, *): infinite to unseen classes, else NaN for non-finite pixels."""
    rows, maps = anchor_rows(anchors, wide_dtype(features)), matrices(features)
    distances = new_map(features, anchors.shape[0])
    unseen = (
        nearest_of_class((rows.squares == math.inf).to(rows.points.dtype)[None], rows.per_class)
        == 1
    )

    def compute(scratch: Scratch, x: Tensor, out: Tensor) -> None:
        for x_, out_ in parts(part, x, out):
            of_part = nearest_of_class(distances_of(x_, rows, scratch), rows.per_class)
            out_.copy_(of_part.masked_fill_(unseen, math.inf))

    part = pixels_of_part(maps, rows.points.dtype, len(rows.points))
    for_each_block(compute, maps, matrices(distances), part=part)
    return distances


def anchor_distances_backward(
    grad_distances: Tensor, distances: Tensor, features: Tensor, anchors: Tensor
) -> Tensor:
    """Return the sum over the classes of ``grad · (x − a) / ‖x − a‖``, 0 where x = a."""
    rows, maps = anchor_rows(anchors, wide_dtype(features)), matrices(features)
    grad, dtype = new_gradient(features), rows.points.dtype

    def compute(scratch: Scratch, x: Tensor, g: Tensor, d: Tensor, out: Tensor) -> None:
        for x_, g_, d_, out_ in parts(part, x, g, d, out):
            out_.copy_(_distance_gradient(x_, rows, g_.to(dtype), d_.to(dtype), scratch))

    part = pixels_of_part(maps, dtype, 4 * len(rows.points))
    tensors = maps, matrices(grad_distances), matrices(distances), matrices(grad)
    for_each_block(compute, *tensors, part=part)
    return grad


def nearest_anchors(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest class (N, *) int32, and the distances to it and to the runner-up.

    Of equally near classes the first wins; equal is what the returned dtype cannot tell apart.
    Where nothing can win (a feature that is not finite, or farther than that dtype reaches, or no
    class seen) the class is −1 and both distances are infinite; with one class seen the second is.
    """
    rows, maps = anchor_rows(anchors, wide_dtype(features)), matrices(features)
    results = new_nearest(features)

    def compute(scratch: Scratch, x: Tensor, *outs: Tensor) -> None:
        for x_, *outs_ in parts(part, x, *outs):
            of_part = nearest_of_class(distances_of(x_, rows, scratch), rows.per_class)
            # Anchors in one place may differ in the last bit of the product, but not rounded.
            rounded = scratch("rounded", outs[1].dtype, *of_part.shape).copy_(of_part)
            for out, values in zip(outs_, two_least(rounded), strict=True):
                out.copy_(values)
        labels, nearest, second = outs
        nothing = ~(nearest < math.inf)  # a NaN, too
        labels.masked_fill_(nothing, -1)
        nearest.masked_fill_(nothing, math.inf)
        second.masked_fill_(nothing, math.inf)

    part = pixels_of_part(maps, rows.points.dtype, len(rows.points))
    for_each_block(compute, maps, *map(scalars, results), part=part)
    return results


def labels_of(
    classes: Tensor,
    nearest: Tensor,
    second: Tensor,
    min_margin: Tensor,
    relative: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Return labels int64 and margins float32 from the results of `nearest_anchors`."""
    margins = second - nearest
    if relative:
        margins = torch.where(second > 0, 1 - nearest / second, 0.0)
    return active_labels(classes, margins, min_margin, ignore_index)


def active_labels(
    classes: Tensor, scores: Tensor, minimum: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return labels where the score of a class (−1 for none) exceeds its minimum; and scores."""
    classes = classes.long()
    labeled = classes >= 0
    scores = torch.where(labeled, scores, 0.0).float()
    of_class = minimum[classes.clamp(min=0)] if minimum.ndim == 1 else minimum
    return torch.where(labeled & (scores > of_class), classes, ignore_index), scores


def pixel_losses(features: Tensor, labels: Tensor, anchors: Tensor, distance: str) -> Tensor:
    """Return the distance (N, *) to the nearest anchor of the label, 0 for negative labels."""
    rows = anchor_rows(anchors, torch.promote_types(result_dtype(features), anchors.dtype))
    losses = new_map(features)
    maps, part = matrices(features), pixels_of_part(features, rows.points.dtype)

    def compute(scratch: Scratch, x: Tensor, y: Tensor, out: Tensor) -> None:
        first = y.to(torch.int64).clamp(min=0).mul_(rows.per_class)
        for x_, first_, out_ in parts(part, x, first, out):
            out_.copy_(_nearest_own(x_, first_, rows, distance, scratch)[1])
        out.masked_fill_(y < 0, 0.0)

    for_each_block(compute, maps, scalars(labels), scalars(losses), part=part)
    return losses


def pixel_losses_backward(
    grad_losses: Tensor,
    losses: Tensor,
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    distance: str,
) -> Tensor:
    """Return the gradient of `pixel_losses`; the Euclidean one is 0 where x = a."""
    rows = anchor_rows(anchors, torch.promote_types(result_dtype(features), anchors.dtype))
    grad, maps = new_gradient(features), matrices(features)
    part = pixels_of_part(maps, rows.points.dtype)

    def compute(
        scratch: Scratch, x: Tensor, y: Tensor, loss: Tensor, scale: Tensor, out: Tensor
    ) -> None:
        own = y.to(torch.int64).clamp(min=0).mul_(rows.per_class)
        if distance == "euclidean":
            scale = scale / torch.where(loss == 0, 1.0, loss)
        else:
            scale = 2 * scale if distance == "squared" else scale / maps.shape[1]
        for x_, own_, active_, scale_, out_ in parts(part, x, own, y >= 0, scale, out):
            if rows.per_class > 1:
                own_, _ = _nearest_own(x_, own_, rows, distance, scratch)
            slopes = offsets_from(rows.points, own_, x_, scratch)
            if distance == "smooth_l1":
                slopes.clamp_(-1, 1)
            out_.copy_(zero_unless(active_, slopes.mul_(scale_)))

    tensors = maps, scalars(labels), scalars(losses), scalars(grad_losses), matrices(grad)
    for_each_block(compute, *tensors, part=part)
    return grad


def contrastive_losses(
    features: Tensor, labels: Tensor, anchors: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy (N, *) of −distance / temperature, 0 for negative labels.

    With it the distances (N, C, *), which the gradient needs: as those of `anchor_distances`, but
    NaN to all classes where a feature is not finite.
    """
    rows, maps = anchor_rows(anchors, wide_dtype(features)), matrices(features)
    losses, distances = new_map(features), new_map(features, anchors.shape[0])

    def compute(scratch: Scratch, x: Tensor, y: Tensor, loss: Tensor, out: Tensor) -> None:
        for x_, y_, loss_, out_ in parts(part, x, y.to(torch.int64), loss, out):
            of_part = nearest_of_class(distances_of(x_, rows, scratch), rows.per_class)
            out_.copy_(of_part)
            loss_.copy_(cross_entropy(of_part, y_, temperature))

    part = pixels_of_part(maps, rows.points.dtype, len(rows.points))
    tensors = maps, scalars(labels), scalars(losses), matrices(distances)
    for_each_block(compute, *tensors, part=part)
    return losses, distances


def contrastive_losses_backward(
    grad_losses: Tensor,
    distances: Tensor,
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    temperature: float,
) -> Tensor:
    """Return the gradient of `contrastive_losses`: ``(1[k = y] − softmax) / temperature``."""
    rows, maps = anchor_rows(anchors, wide_dtype(features)), matrices(features)
    grad, dtype = new_gradient(features), rows.points.dtype

    def compute(
        scratch: Scratch, x: Tensor, y: Tensor, scale: Tensor, d: Tensor, out: Tensor
    ) -> None:
        tensors = x, y.to(torch.int64), scale / -temperature, d, out
        for x_, y_, scale_, d_, out_ in parts(part, *tensors):
            wide = d_.to(dtype)
            share = softmax_gradient(wide, y_.clamp(min=0), temperature)
            g = zero_unless(y_ >= 0, share.mul_(scale_))
            out_.copy_(_distance_gradient(x_, rows, g, wide, scratch))

    part = pixels_of_part(maps, dtype, 4 * len(rows.points))
    tensors = maps, scalars(labels), scalars(grad_losses), matrices(distances), matrices(grad)
    for_each_block(compute, *tensors, part=part)
    return grad


def has_float64(device: torch.device) -> bool:
    """Return True unless the device (MPS) has no float64."""
    return device.type != "mps"


def result_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype of results: float32, or float64 of float64 features."""
    return torch.promote_types(features.dtype, torch.float32)


def wide_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype that sums and products are computed in."""
    return torch.float64 if has_float64(features.device) else torch.float32


def new_map(features: Tensor, *channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate a map (N, *) or, with K channels, (N, K, *); by default in the dtype of results."""
    shape = (features.shape[0], *channels, *features.shape[2:])
    return features.new_empty(shape, dtype=dtype or result_dtype(features))


def new_nearest(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results of `nearest_anchors`."""
    return new_map(features, dtype=torch.int32), new_map(features), new_map(features)


def distances_of(x: Tensor, rows: Anchors, scratch: Scratch) -> Tensor:
    """Return ‖x − a‖ (T, C·M, p): NaN for a non-finite feature, else infinite if absent."""
    points, squares, _ = rows
    x = scratch.like(x, "x", points.dtype).copy_(x)
    distances = scratch("distances", x.dtype, len(x), len(points), x.shape[2]).copy_(squares)
    distances.baddbmm_(points.expand(len(x), *points.shape), x, alpha=-2)
    norms = x.mul_(x).sum(dim=1, keepdim=True)
    norms = torch.where(norms.isfinite(), norms, math.nan)
    return distances.add_(norms).clamp_(min=0).sqrt_()


def nearest_of_class(distances: Tensor, per_class: int) -> Tensor:
    """Return the smallest of each class (T, C, p) among distances (T, C·M, p)."""
    if per_class == 1:
        return distances
    tiles, anchors, pixels = distances.shape
    return distances.view(tiles, anchors // per_class, per_class, pixels).amin(dim=2)


def two_least(candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first class with the smallest value of (T, C, p), that value, and the second.

    The class is C where a value is NaN. Writes over its argument.
    """
    num_classes = candidates.shape[1]
    ranks = torch.arange(num_classes, 0, -1, device=candidates.device)[:, None]
    ranks = ranks.to(torch.uint8 if num_classes < 256 else torch.int32)
    least = candidates.amin(dim=1, keepdim=True)
    # Not argmin, which may return any of several equal minima.
    rank = torch.mul(candidates == least, ranks).amax(dim=1, keepdim=True)
    winner = num_classes - rank.to(torch.int64)
    candidates.scatter_(1, winner.clamp(max=num_classes - 1), math.inf)
    return winner, least, candidates.amin(dim=1, keepdim=True)


def cross_entropy(distances: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy (T, 1, p), 0 for negative labels. Overwrites distances."""
    # From the least distance, so that no exponential overflows, and a loss near 0 stays precise.
    least, own = distances.amin(dim=1, keepdim=True), distances.gather(1, y.clamp(min=0))
    others = distances.sub_(least).div_(-temperature).exp_().sum(dim=1, keepdim=True)
    return torch.where(y >= 0, (own - least).div_(temperature).add_(others.log_()), 0.0)


def softmax_gradient(distances: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Return the softmax (T, C, p) over −distance / temperature, less 1 at the label."""
    share = (distances.amin(dim=1, keepdim=True) - distances).div_(temperature).exp_()
    share.div_(share.sum(dim=1, keepdim=True))
    return share.scatter_add_(1, y, share.new_full((1, 1, 1), -1.0).expand_as(y))


def _distance_gradient(
    x: Tensor, rows: Anchors, grad: Tensor, distances: Tensor, scratch: Scratch
) -> Tensor:
    """Return the gradient of x (T, D, p) from that of its distances (T, C, p)."""
    if rows.per_class > 1:
        # Of each class it is that of one anchor, the nearest.
        distances = distances_of(x, rows, scratch)
        of_class = distances.view(len(x), -1, rows.per_class, x.shape[2])
        nearest = of_class.argmin(dim=2, keepdim=True)
        grads = torch.zeros_like(of_class).scatter_(2, nearest, grad.unsqueeze(2))
        grad = grads.flatten(1, 2)
    weights = grad.div(distances).masked_fill_(distances == 0, 0.0)
    has_gradient = (grad != 0).any(dim=1, keepdim=True)
    x = scratch.like(x, "x", rows.points.dtype).copy_(x)
    return zero_unless(has_gradient, weighted_offsets(x, rows.points, weights))


def weighted_offsets(x: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Return the sums over the anchors of w · (x − a), written over x (T, D, p)."""
    x.mul_(weights.sum(dim=1, keepdim=True))
    if has_rows(x):
        x.mT.baddbmm_(weights.mT, points.expand(len(x), *points.shape), alpha=-1)
        return x
    return x.baddbmm_(points.T.expand(len(x), -1, -1), weights, alpha=-1)


def zero_unless(mask: Tensor, x: Tensor) -> Tensor:
    """Write 0 over values x (T, K, p) where the mask (T, 1, p) is false, whatever they were.

    By their bits, as a NaN times zero is a NaN, and a choice of values is slow.
    """
    bits = torch.int64 if x.dtype == torch.float64 else torch.int32
    x.view(bits).bitwise_and_(torch.where(mask, -1, 0).to(bits))
    return x


def is_finite(x: Tensor, scratch: Scratch) -> Tensor:
    """Return for each pixel (T, 1, p) of x (T, D, p) if it is finite throughout."""
    # 0 times anything finite is 0, else NaN.
    zeros = scratch.like(x, "x", wide_dtype(x)).copy_(x).mul_(0)
    return zeros.sum(dim=1, keepdim=True) == 0


def rows_of(values: Tensor, index: Tensor, like: Tensor, scratch: Scratch) -> Tensor:
    """Return the rows of values (R, D) at an index (T, 1, p), as (T, D, p) in a layout."""
    out = scratch.like(like, "rows", values.dtype)
    if has_rows(out):
        torch.index_select(values, 0, index.flatten(), out=out.mT.view(-1, values.shape[1]))
        return out
    table = values.T.contiguous()
    if len(out) == 1:
        return torch.index_select(table, 1, index.flatten(), out=out[0])[None]
    return torch.gather(table.expand(len(out), -1, -1), 2, index.expand_as(out), out=out)


def offsets_from(points: Tensor, index: Tensor, x: Tensor, scratch: Scratch) -> Tensor:
    """Return offsets (T, D, p) of x from the rows of points (R, D) at an index (T, 1, p)."""
    own = rows_of(points, index, x, scratch)
    return torch.sub(x, own, out=own)


def _nearest_own(
    x: Tensor, first: Tensor, rows: Anchors, distance: str, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Return row and distance of the nearest of M anchors from row ``first (T, 1, p)`` on."""
    row, least = first, torch.full_like(x[:, :1], math.inf, dtype=rows.points.dtype)
    absent = (rows.squares == math.inf).flatten()
    for m in range(rows.per_class):
        offsets = offsets_from(rows.points, first + m, x, scratch)
        if distance == "smooth_l1":
            size = offsets.abs_()
            bounded = size.clamp(max=1)
            total = (size - bounded / 2).mul_(bounded).sum(dim=1, keepdim=True) / x.shape[1]
        else:
            total = offsets.mul_(offsets).sum(dim=1, keepdim=True)
        if distance == "euclidean":
            total.sqrt_()
        if rows.per_class == 1:
            return row, total
        total.masked_fill_(absent[first + m], math.inf)
        nearer = ~(total >= least)  # a NaN, too
        row, least = torch.where(nearer, first + m, row), torch.where(nearer, total, least)
    return row, least
