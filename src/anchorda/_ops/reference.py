"""The memory-bound operators in plain torch: the truth that every faster path has to equal.

Each operator walks over its input in blocks of tiles (see `tiles`): nothing of the size of the
features is materialized. What is multiplied out, ``‖x‖² − 2·a·x + ‖a‖²``, is computed in float64:
it loses half its digits where a feature lies near an anchor, which float32 (let alone TF32) cannot
afford and float64 can. Differences ``x − a`` lose nothing and stay in float32. Results leave in
float32, or in float64 where the input was float64.

Shapes follow the library's contract: features ``(N, D, *)``, label maps ``(N, *)``, anchors
``(C, D)`` or ``(C, M, D)``. A row of anchors that is not finite is absent; a class whose rows are
all absent is unseen. Of several anchors of a class the nearest counts. Nothing here is
differentiable by itself, the gradients are operators of their own; and nothing looks at a value,
for which the host would wait.
"""

import math

import torch
from torch import Tensor

from .tiles import (
    Block,
    Scratch,
    blocks,
    get,
    has_rows,
    matrices,
    new_gradient,
    put,
    scalars,
    take,
)


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64 (Apple's does not)."""
    return device.type != "mps"


def result_dtype(features: Tensor) -> torch.dtype:
    """The dtype of what is returned for such features: float64 for float64, else float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sums (C, D) float64 and counts (C,) int64 of the finite features of each class."""
    maps, targets = matrices(features), scalars(labels)
    dtype, scratch = _wide_dtype(features), Scratch(features.device)
    classes = torch.arange(num_classes, device=features.device)[:, None]
    sums = torch.zeros(num_classes, features.shape[1], dtype=dtype, device=features.device)
    counts = torch.zeros(num_classes, dtype=torch.int64, device=features.device)
    for block in blocks(maps, dtype, num_classes):
        members = (labels_at(targets, block) == classes) & _finite(maps, block, scratch)
        # A NaN times a weight of zero is a NaN.
        x = take(maps, block, dtype, scratch).nan_to_num_(0.0, 0.0, 0.0)
        of_tiles = scratch("sums", dtype, len(x), *sums.shape).zero_()
        # In place, a product is left alone by autocast.
        sums += of_tiles.baddbmm_(members.to(dtype), x.mT).sum(dim=0)
        counts += members.sum(dim=(0, 2))
    return sums, counts


def image_sums_backward(grad_sums: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Each pixel that was summed receives the gradient of its sum in (N, C, D)."""
    grad, scratch = new_gradient(features), Scratch(features.device)
    num_classes = grad_sums.shape[1]
    for i in range(features.shape[0]):
        maps, targets = matrices(features[i : i + 1]), scalars(labels[i : i + 1])
        for block in blocks(maps, _wide_dtype(features)):
            y = labels_at(targets, block)
            summed = (y >= 0) & (y < num_classes) & _finite(maps, block, scratch)
            of_pixels = _rows_of(grad_sums[i], y.clamp(0, num_classes - 1), maps, scratch)
            put(matrices(grad[i : i + 1]), block, kept(of_pixels, summed))
    return grad


def anchor_distances(features: Tensor, anchors: Tensor) -> Tensor:
    """Euclidean distances (N, C, *): infinite to unseen classes, else NaN for non-finite pixels."""
    points, squares = _points(anchors, _wide_dtype(features))
    maps, scratch = matrices(features), Scratch(features.device)
    shape = (features.shape[0], anchors.shape[0], *features.shape[2:])
    distances = torch.empty(shape, dtype=result_dtype(features), device=features.device)
    unseen = nearest_of_class((squares == math.inf).to(points.dtype)[None], anchors) == 1
    for block in blocks(maps, points.dtype, len(points)):
        of_tiles = _block_distances(maps, block, points, squares, scratch)
        of_tiles = nearest_of_class(of_tiles, anchors)
        put(matrices(distances), block, of_tiles.masked_fill_(unseen, math.inf))
    return distances


def anchor_distances_backward(
    grad_distances: Tensor, distances: Tensor, features: Tensor, anchors: Tensor
) -> Tensor:
    """Sum over the classes of ``grad · (x − a) / ‖x − a‖``, 0 where x = a."""
    points, squares = _points(anchors, _wide_dtype(features))
    grad, maps, scratch = new_gradient(features), matrices(features), Scratch(features.device)
    of_distances, distances = matrices(grad_distances), matrices(distances)
    for block in blocks(maps, points.dtype, 4 * len(points), one_tile=not has_rows(maps)):
        d = get(distances, block).to(points.dtype)
        g = get(of_distances, block).to(points.dtype)
        if anchors.dim() == 3:
            d = _block_distances(maps, block, points, squares, scratch)
            g = _to_nearest_of_class(g, d, anchors)
        x = take(maps, block, points.dtype, scratch)
        put(matrices(grad), block, distance_gradient(x, points, g, d))
    return grad


def nearest_anchors(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest class (N, *) int32, and the distances to it and to the runner-up.

    Of equally near classes the first wins; equal is what the returned dtype cannot tell apart.
    Where nothing can win (a feature that is not finite, or farther than that dtype reaches, or no
    class seen) the class is −1 and both distances are infinite; with one class seen the second is.
    """
    points, squares = _points(anchors, _wide_dtype(features))
    maps, scratch = matrices(features), Scratch(features.device)
    labels, nearest, second = new_nearest(features)
    for block in blocks(maps, points.dtype, len(points)):
        distances = _block_distances(maps, block, points, squares, scratch)
        distances = nearest_of_class(distances, anchors)
        # Anchors in one place may differ in the last bit of the product, but not after rounding.
        candidates = scratch("candidates", nearest.dtype, *distances.shape).copy_(distances)
        for result, tiles in zip((labels, nearest, second), two_least(candidates), strict=True):
            put(scalars(result), block, tiles)
    nothing = ~(nearest < math.inf)  # a NaN, too
    labels.masked_fill_(nothing, -1)
    nearest.masked_fill_(nothing, math.inf)
    return labels, nearest, second.masked_fill_(nothing, math.inf)


def pixel_losses(features: Tensor, labels: Tensor, anchors: Tensor, distance: str) -> Tensor:
    """The distance (N, *) of each pixel to the nearest anchor of its label, 0 if it is negative."""
    points, squares = _points(anchors, torch.promote_types(result_dtype(features), anchors.dtype))
    maps, targets, scratch = matrices(features), scalars(labels), Scratch(features.device)
    losses = torch.empty(labels.shape, dtype=result_dtype(features), device=features.device)
    for block in blocks(maps, points.dtype):
        y = labels_at(targets, block)
        _, total = _own_anchor(maps, block, anchors, points, squares, y, distance, scratch)
        put(scalars(losses), block, torch.where(y >= 0, total, 0.0))
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
    points, squares = _points(anchors, torch.promote_types(result_dtype(features), anchors.dtype))
    grad, maps, scratch = new_gradient(features), matrices(features), Scratch(features.device)
    of_losses, losses, targets = scalars(grad_losses), scalars(losses), scalars(labels)
    for block in blocks(maps, points.dtype, one_tile=True):
        y, scale = labels_at(targets, block), get(of_losses, block)
        row = y
        if anchors.dim() == 3:
            row, _ = _own_anchor(maps, block, anchors, points, squares, y, distance, scratch)
        if distance == "euclidean":
            norms = get(losses, block)
            scale = scale / torch.where(norms == 0, 1.0, norms)
        elif distance == "squared":
            scale = 2 * scale
        else:
            scale = scale / maps.shape[1]
        slopes = _offsets(maps, block, points, row, scratch)
        if distance == "smooth_l1":
            slopes.clamp_(-1, 1)
        put(matrices(grad), block, kept(slopes.mul_(scale), y >= 0))
    return grad


def contrastive_losses(
    features: Tensor, labels: Tensor, anchors: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (N, *) of the softmax over −distance / temperature, 0 for negative labels.

    With it the distances (N, C, *), which the gradient needs: as those of `anchor_distances`, but
    NaN to all classes where a feature is not finite.
    """
    points, squares = _points(anchors, _wide_dtype(features))
    maps, targets, scratch = matrices(features), scalars(labels), Scratch(features.device)
    shape = (features.shape[0], anchors.shape[0], *features.shape[2:])
    distances = torch.empty(shape, dtype=result_dtype(features), device=features.device)
    losses = distances.new_empty(labels.shape)
    for block in blocks(maps, points.dtype, len(points)):
        of_tiles = _block_distances(maps, block, points, squares, scratch)
        of_tiles = nearest_of_class(of_tiles, anchors)
        put(matrices(distances), block, of_tiles)
        y = labels_at(targets, block)
        put(scalars(losses), block, cross_entropy(of_tiles, y, temperature))
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
    points, squares = _points(anchors, _wide_dtype(features))
    grad, maps, scratch = new_gradient(features), matrices(features), Scratch(features.device)
    distances, targets, of_losses = matrices(distances), scalars(labels), scalars(grad_losses)
    for block in blocks(maps, points.dtype, 4 * len(points), one_tile=not has_rows(maps)):
        d, y = get(distances, block).to(points.dtype), labels_at(targets, block)
        share = softmax_gradient(d, y.clamp(min=0), temperature)
        g = kept(share.mul_(get(of_losses, block) / -temperature), y >= 0)
        if anchors.dim() == 3:
            d = _block_distances(maps, block, points, squares, scratch)
            g = _to_nearest_of_class(g, d, anchors)
        x = take(maps, block, points.dtype, scratch)
        put(matrices(grad), block, distance_gradient(x, points, g, d))
    return grad


def new_nearest(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the results of `nearest_anchors`."""
    shape = (features.shape[0], *features.shape[2:])
    labels = torch.empty(shape, dtype=torch.int32, device=features.device)
    nearest = torch.empty(shape, dtype=result_dtype(features), device=features.device)
    return labels, nearest, torch.empty_like(nearest)


def labels_at(targets: Tensor, block: Block) -> Tensor:
    """The labels (T, 1, p) int64 of a block."""
    return get(targets, block).to(torch.int64)


def two_least(candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of tiles (T, C, p) the first class with the least value, that value, and the next.

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


def nearest_of_class(distances: Tensor, anchors: Tensor) -> Tensor:
    """Of tiles (T, C·M, p) the least of each class (T, C, p): themselves if M = 1."""
    if anchors.dim() == 2:
        return distances
    return distances.view(len(distances), *anchors.shape[:2], distances.shape[2]).amin(dim=2)


def cross_entropy(distances: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Cross-entropy (T, 1, p) of tiles (T, C, p), 0 for negative labels. Writes over distances."""
    # From the least distance, so that no exponential overflows, and a loss near 0 stays precise.
    least, own = distances.amin(dim=1, keepdim=True), distances.gather(1, y.clamp(min=0))
    others = distances.sub_(least).div_(-temperature).exp_().sum(dim=1, keepdim=True)
    return torch.where(y >= 0, (own - least).div_(temperature).add_(others.log_()), 0.0)


def softmax_gradient(distances: Tensor, y: Tensor, temperature: float) -> Tensor:
    """The softmax (T, C, p) over −distance / temperature, less 1 at the label."""
    share = (distances.amin(dim=1, keepdim=True) - distances).div_(temperature).exp_()
    share.div_(share.sum(dim=1, keepdim=True))
    return share.scatter_add_(1, y, share.new_full((1, 1, 1), -1.0).expand_as(y))


def distance_gradient(x: Tensor, points: Tensor, grad: Tensor, distances: Tensor) -> Tensor:
    """The gradient of tiles x (T, D, p) from that of their distances (T, C, p), written over x."""
    weights = grad.div(distances).masked_fill_(distances == 0, 0.0)
    has_gradient = (grad != 0).any(dim=1, keepdim=True)
    return kept(weighted_offsets(x, points, weights), has_gradient)


def weighted_offsets(x: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """The sums over the classes of w · (x − a), written over tiles x (T, D, p)."""
    x.mul_(weights.sum(dim=1, keepdim=True))
    if has_rows(x):
        x.mT.baddbmm_(weights.mT, points.expand(len(x), *points.shape), alpha=-1)
        return x
    # By groups of channels, as all else that is done to a tile is divided among threads.
    groups = math.gcd(x.shape[1], 8)
    of_groups = points.T.reshape(groups, x.shape[1] // groups, len(points))
    for tile, of_tile in zip(x, weights, strict=True):
        grouped = tile.view(groups, x.shape[1] // groups, x.shape[2])
        grouped.baddbmm_(of_groups, of_tile.expand(groups, *of_tile.shape), alpha=-1)
    return x


def kept(x: Tensor, mask: Tensor) -> Tensor:
    """Values (T, K, p) where the mask (T, 1, p) is true; elsewhere 0, whatever they were.

    By their bits, as a NaN times zero is a NaN, and a choice of values is slow.
    """
    bits = torch.int64 if x.dtype == torch.float64 else torch.int32
    x.view(bits).bitwise_and_(torch.where(mask, -1, 0).to(bits))
    return x


def _wide_dtype(features: Tensor) -> torch.dtype:
    """The dtype that sums and products are computed in."""
    return torch.float64 if has_float64(features.device) else torch.float32


def _points(anchors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Anchors (C·M, D), 0 where absent, and their squared norms (C·M, 1), infinite where absent."""
    rows = anchors.flatten(0, -2)
    present = rows.isfinite().all(dim=1, keepdim=True)
    points = torch.where(present, rows, 0.0).to(dtype)
    return points, torch.where(present, points.square().sum(dim=1, keepdim=True), math.inf)


def _to_nearest_of_class(grad: Tensor, distances: Tensor, anchors: Tensor) -> Tensor:
    """Gradients (T, C, p) as those of all anchors (T, C·M, p): of each class its first nearest."""
    of_class = distances.unflatten(1, anchors.shape[:2])
    nearest = of_class.argmin(dim=2, keepdim=True)
    grads = torch.zeros_like(of_class).scatter_(2, nearest, grad.unsqueeze(2))
    return grads.flatten(1, 2)


def _own_anchor(
    maps: Tensor,
    block: Block,
    anchors: Tensor,
    points: Tensor,
    squares: Tensor,
    y: Tensor,
    distance: str,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """Of the anchors of each label the row (T, 1, p) of the nearest, and the distance to it."""
    of_class = anchors.shape[1] if anchors.dim() == 3 else 1
    first = y.clamp(min=0) * of_class
    row, least = first, torch.empty(0)
    for m in range(of_class):
        offsets = _offsets(maps, block, points, first + m, scratch)
        if distance == "smooth_l1":
            size = offsets.abs_()
            bounded = size.clamp(max=1)
            total = (size - bounded / 2).mul_(bounded).sum(dim=1, keepdim=True) / maps.shape[1]
        else:
            total = offsets.mul_(offsets).sum(dim=1, keepdim=True)
        if distance == "euclidean":
            total.sqrt_()
        if of_class > 1:
            total.masked_fill_((squares == math.inf).flatten()[first + m], math.inf)
        if m > 0:
            nearer = ~(total >= least)  # a NaN, too
            row, total = torch.where(nearer, first + m, row), torch.where(nearer, total, least)
        least = total
    return row, least


def _finite(maps: Tensor, block: Block, scratch: Scratch) -> Tensor:
    """Which pixels (T, 1, p) of a block are finite throughout."""
    # 0 times anything finite is 0, else NaN.
    x = take(maps, block, _wide_dtype(maps), scratch)
    return x.mul_(0).sum(dim=1, keepdim=True) == 0


def _block_distances(
    maps: Tensor, block: Block, points: Tensor, squares: Tensor, scratch: Scratch
) -> Tensor:
    """‖x − a‖ (T, C, p) of a block: NaN for a non-finite feature, else infinite if unseen."""
    x = take(maps, block, points.dtype, scratch)
    distances = scratch("distances", x.dtype, len(x), len(points), x.shape[2]).copy_(squares)
    distances.baddbmm_(points.expand(len(x), *points.shape), x, alpha=-2)
    norms = x.mul_(x).sum(dim=1, keepdim=True)
    norms = torch.where(norms.isfinite(), norms, math.nan)
    return distances.add_(norms).clamp_(min=0).sqrt_()


def _rows_of(values: Tensor, y: Tensor, maps: Tensor, scratch: Scratch) -> Tensor:
    """Of values (C, D) the row of each label, as tiles (T, D, p) in the layout of the maps."""
    tiles, pixels, channels = len(y), y.shape[2], values.shape[1]
    if has_rows(maps):
        rows = scratch("rows", values.dtype, tiles * pixels, channels)
        torch.index_select(values, 0, y.flatten(), out=rows)
        return rows.view(tiles, pixels, channels).mT
    columns = scratch("columns", values.dtype, tiles, channels, pixels)
    table = values.T.contiguous().expand(tiles, -1, -1)
    return torch.gather(table, 2, y.expand_as(columns), out=columns)


def _offsets(maps: Tensor, block: Block, points: Tensor, y: Tensor, scratch: Scratch) -> Tensor:
    """Offsets x − a_y (T, D, p) of a block; anything where the label is negative."""
    own = _rows_of(points, y.clamp(min=0), maps, scratch)
    return torch.sub(get(maps, block), own, out=own)
