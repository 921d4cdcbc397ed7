"""Operators of `reference` in Triton, for CUDA: features are read once, only results written.

The same signatures and, but for rounding, the same results as there, for the inputs that `choice`
sends here. The arithmetic is float32, which ``‖x‖²`` must not overflow. Products run on tensor
cores in parts of TF32 that together are about as precise. Where a feature is so near to an anchor
that ``‖x‖² − 2·a·x + ‖a‖²`` would lose half its digits, the distances of its tile are computed anew
from the differences. Sums over pixels are added up in float64, in an order that depends on the
shape and the GPU alone.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_DISTANCES = {"euclidean": 0, "squared": 1, "smooth_l1": 2}


def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """See `reference.class_sums`."""
    (maps,) = _as_one_image(_maps(features))
    n, channels, per_image = maps.shape
    blocks, device = sums_blocks(num_classes), features.device
    parts = triton.cdiv(channels, blocks["BLOCK_CHANNELS"])
    tiles = n * triton.cdiv(per_image, blocks["BLOCK_PIXELS"])
    # So many strips of tiles that every processor has some.
    length = triton.cdiv(tiles, max(1, 4 * _processors(device) // parts))
    strips = triton.cdiv(tiles, length)
    sums = torch.empty(strips, num_classes, channels, dtype=torch.float64, device=device)
    counts = torch.empty(strips, num_classes, dtype=torch.int64, device=device)
    # Set where sums are not finite: only then do the second and third kernel do anything.
    found = torch.zeros(1, dtype=torch.int32, device=device)
    labels = _flat(labels)
    clean = torch.empty_like(labels)
    results = (found, sums, counts, length, tiles, num_classes)
    size = (per_image, channels, *maps.stride())
    with _current(device):
        _sums_kernel[(strips, parts)](maps, labels, *results, *size, CLEANED=False, **blocks)
        _clean_kernel[(n * triton.cdiv(per_image, 64),)](
            maps, labels, found, clean, *size, BLOCK_PIXELS=64, BLOCK_CHANNELS=32
        )
        _sums_kernel[(strips, parts)](maps, clean, *results, *size, CLEANED=True, **blocks)
    return sums.sum(dim=0), counts.sum(dim=0)


def nearest_anchors(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.nearest_anchors`."""
    (maps,) = _as_one_image(_maps(features))
    n, channels, per_image = maps.shape
    points, seen = _points(anchors)
    squares = torch.where(seen, points.double().square().sum(dim=1).float(), torch.inf)
    shape = (features.shape[0], *features.shape[2:])
    labels = torch.empty(shape, dtype=torch.int32, device=features.device)
    nearest = torch.empty(shape, dtype=torch.float32, device=features.device)
    second = torch.empty_like(nearest)
    blocks = nearest_blocks(len(points))
    with _current(features.device):
        _nearest_kernel[(n * triton.cdiv(per_image, blocks["BLOCK_PIXELS"]),)](
            *(maps, points, squares, labels, nearest, second, len(points), _of_class(anchors)),
            *(per_image, channels, *maps.stride()),
            **blocks,
        )
    return labels, nearest, second


def pixel_losses(features: Tensor, labels: Tensor, anchors: Tensor, distance: str) -> Tensor:
    """See `reference.pixel_losses`."""
    (maps,) = _as_one_image(_maps(features))
    n, channels, per_image = maps.shape
    points, seen = _points(anchors)
    losses = torch.empty(labels.shape, dtype=torch.float32, device=features.device)
    with _current(features.device):
        _losses_kernel[(n * triton.cdiv(per_image, 64),)](
            *(maps, _flat(labels), points, seen, losses, per_image, channels, *maps.stride()),
            DISTANCE=_DISTANCES[distance],
            OF_CLASS=_of_class(anchors),
            BLOCK_PIXELS=64,
            BLOCK_CHANNELS=32,
        )
    return losses


def pixel_losses_backward(
    grad_losses: Tensor,
    losses: Tensor,
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    distance: str,
) -> Tensor:
    """See `reference.pixel_losses_backward`."""
    grad = torch.empty_like(features)
    maps, grad_maps = _as_one_image(_maps(features), _maps(grad))
    n, channels, per_image = maps.shape
    points, seen = _points(anchors)
    of_pixels = (grad_losses.reshape(-1).contiguous(), losses.reshape(-1).contiguous())
    with _current(features.device):
        _losses_backward_kernel[(n * triton.cdiv(per_image, 64),)](
            *(*of_pixels, maps, _flat(labels), points, seen, grad_maps),
            *(per_image, channels, *maps.stride(), *grad_maps.stride()),
            DISTANCE=_DISTANCES[distance],
            OF_CLASS=_of_class(anchors),
            BLOCK_PIXELS=64,
            BLOCK_CHANNELS=32,
        )
    return grad


def nearest_blocks(num_classes: int) -> dict[str, int]:
    """Return the tile sizes of `nearest_anchors` that fit registers and shared memory."""
    classes = _power_of_two(num_classes)
    pixels = 128 if classes <= 32 else 64 if classes <= 128 else 32
    return {
        "BLOCK_PIXELS": pixels,
        "BLOCK_CHANNELS": 32 if classes <= 128 else 16,
        "BLOCK_CLASSES": classes,
        "num_warps": 4,
    }


def sums_blocks(num_classes: int) -> dict[str, int]:
    """Return the tile sizes of `class_sums`: the sums of so many channels fit the registers."""
    classes = _power_of_two(num_classes)
    return {
        "BLOCK_PIXELS": 64,
        "BLOCK_CHANNELS": 64 if classes <= 64 else 32,
        "BLOCK_CLASSES": classes,
        "num_warps": 4 if classes <= 64 else 8,
    }


def _maps(features: Tensor) -> Tensor:
    """Return a view (N, D, P) of features; raise a RuntimeError if there is none."""
    return features.view(*features.shape[:2], -1)


def _as_one_image(*maps: Tensor) -> tuple[Tensor, ...]:
    """Return views (N, D, P) as (1, D, N·P) if the stride between images permits that."""
    n, channels, per_image = maps[0].shape
    if n > 1 and per_image > 1 and any(m.stride(0) != per_image * m.stride(2) for m in maps):
        return maps
    steps = [m.stride(2) if per_image > 1 else m.stride(0) for m in maps]
    size = (1, channels, n * per_image)
    return tuple(
        m.as_strided(size, (0, m.stride(1), step)) for m, step in zip(maps, steps, strict=True)
    )


def _flat(labels: Tensor) -> Tensor:
    """Return labels (P,) int64, contiguous in memory."""
    return labels.reshape(-1).long().contiguous()


def _points(anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Return anchors (C·M, D) float32, 0 where absent, and which are present (C·M,)."""
    anchors = anchors.flatten(0, -2)
    seen = anchors.isfinite().all(dim=1)
    return torch.where(seen[:, None], anchors, 0.0).float().contiguous(), seen


def _of_class(anchors: Tensor) -> int:
    """Return M of anchors (C, D) or (C, M, D)."""
    return anchors.shape[1] if anchors.dim() == 3 else 1


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which the GPU of a tensor is current, as Triton launches on that one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _power_of_two(num_classes: int) -> int:
    return max(16, 1 << (num_classes - 1).bit_length())


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _tile(tile, per_image, BLOCK_PIXELS: tl.constexpr):
    """The image of a tile (int64) and its pixels there: no tile has pixels of two images."""
    tiles = tl.cdiv(per_image, BLOCK_PIXELS)
    pixel = tile % tiles * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    return (tile // tiles).to(tl.int64), pixel


@triton.jit
def _nearest_kernel(
    features,
    points,
    squares,
    labels,
    nearest,
    second,
    classes,
    of_class,
    per_image,
    channels,
    stride_image,
    stride_channel,
    stride_pixel,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    image, pixel = _tile(tl.program_id(0), per_image, BLOCK_PIXELS)
    inside = pixel < per_image
    start = features + image * stride_image + pixel.to(tl.int64) * stride_pixel
    c = tl.arange(0, BLOCK_CLASSES)
    known = c < classes
    of_anchors = tl.load(squares + c, mask=known, other=float("inf"))

    products = tl.zeros((BLOCK_PIXELS, BLOCK_CLASSES), tl.float32)
    # Summed over the channels after the loop: once, not in every turn.
    of_elements = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    for first_channel in range(0, channels, BLOCK_CHANNELS):
        d = first_channel + tl.arange(0, BLOCK_CHANNELS)
        there = d < channels
        x = tl.load(
            start[:, None] + d.to(tl.int64)[None, :] * stride_channel,
            mask=inside[:, None] & there[None, :],
            other=0.0,
        ).to(tl.float32)
        a = tl.load(
            points + c[None, :] * channels + d[:, None],
            mask=known[None, :] & there[:, None],
            other=0.0,
        )
        products = tl.dot(x, a, products, input_precision="tf32x3")
        of_elements += x * x
    of_features = tl.sum(of_elements, axis=1)
    # False for a NaN, too.
    finite = of_features < float("inf")
    possible = finite[:, None] & (of_anchors < float("inf"))[None, :]
    distances = of_features[:, None] - 2 * products + of_anchors[None, :]
    distances = tl.where(possible, tl.maximum(distances, 0.0), float("inf"))

    # From here on, sixteen times nearer than its length, a feature is too near for the products.
    near = inside & (tl.min(distances, axis=1) * 256 < of_features)
    if tl.max(near.to(tl.int32), axis=0) > 0:
        exact = tl.zeros((BLOCK_PIXELS, BLOCK_CLASSES), tl.float32)
        x_of_channel = start
        a_of_channel = points + c * channels
        for first_channel in range(0, channels, 8):
            channel = first_channel + tl.zeros((1,), tl.int32)
            for i in tl.static_range(8):  # so that eight loads are under way at a time
                there = channel + i < channels
                x = tl.load(x_of_channel, mask=inside & there, other=0.0).to(tl.float32)
                a = tl.load(a_of_channel, mask=known & there, other=0.0)
                offset = x[:, None] - a[None, :]
                exact += offset * offset
                x_of_channel += stride_channel
                a_of_channel += 1
        distances = tl.where(possible, exact, float("inf"))

    distances = tl.sqrt_rn(distances)
    least = tl.min(distances, axis=1)
    # The first of equally near ones.
    label = c // of_class
    winner = tl.min(tl.where(distances == least[:, None], label[None, :], BLOCK_CLASSES), axis=1)
    others = tl.where(label[None, :] == winner[:, None], float("inf"), distances)
    winner = tl.where(least < float("inf"), winner, -1)
    index = image * per_image + pixel
    tl.store(labels + index, winner, mask=inside)
    tl.store(nearest + index, least, mask=inside)
    tl.store(second + index, tl.min(others, axis=1), mask=inside)


@triton.jit
def _sums_kernel(
    features,
    labels,
    found,
    sums,
    counts,
    length,
    tiles,
    classes,
    per_image,
    channels,
    stride_image,
    stride_channel,
    stride_pixel,
    CLEANED: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """The sums of one strip of tiles, for some of the channels."""
    if CLEANED:
        if tl.load(found) == 0:
            return
    strip, part = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK_CLASSES)
    d = part * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    there = d < channels
    total = tl.zeros((BLOCK_CLASSES, BLOCK_CHANNELS), tl.float64)
    seen = tl.zeros((BLOCK_CLASSES, BLOCK_PIXELS), tl.int32)
    for tile in range(strip * length, tl.minimum(strip * length + length, tiles)):
        image, pixel = _tile(tile, per_image, BLOCK_PIXELS)
        inside = pixel < per_image
        start = features + image * stride_image + pixel.to(tl.int64) * stride_pixel
        y = tl.load(labels + image * per_image + pixel, mask=inside, other=-1)
        x = tl.load(
            start[:, None] + d.to(tl.int64)[None, :] * stride_channel,
            mask=inside[:, None] & there[None, :],
            other=0.0,
        ).to(tl.float32)
        if CLEANED:
            x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
        members = c[:, None] == y[None, :]
        # A one is exact in TF32, and a float32 is the sum of two: its upper bits, and the rest.
        ones = members.to(tl.float32)
        upper = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        product = tl.dot(ones, x - upper, input_precision="tf32")
        product = tl.dot(ones, upper, product, input_precision="tf32")
        total += product.to(tl.float64)
        seen += members.to(tl.int32)
    if not CLEANED:
        # A NaN times zero is a NaN: sums that are finite tell that all features are.
        odd = tl.where(tl.abs(total) < float("inf"), 0, 1)
        if tl.max(tl.max(odd, axis=1), axis=0) > 0:
            tl.store(found, 1)
    row = strip.to(tl.int64) * classes + c
    stored = (c < classes)[:, None] & there[None, :]
    tl.store(sums + row[:, None] * channels + d[None, :], total, mask=stored)
    if part == 0:
        tl.store(counts + row, tl.sum(seen, axis=1).to(tl.int64), mask=c < classes)


@triton.jit
def _clean_kernel(
    features,
    labels,
    found,
    clean,
    per_image,
    channels,
    stride_image,
    stride_channel,
    stride_pixel,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Labels, −1 where the feature is not finite."""
    if tl.load(found) == 0:
        return
    image, pixel = _tile(tl.program_id(0), per_image, BLOCK_PIXELS)
    inside = pixel < per_image
    start = features + image * stride_image + pixel.to(tl.int64) * stride_pixel
    odd = tl.zeros((BLOCK_PIXELS,), tl.int32)
    for first_channel in range(0, channels, BLOCK_CHANNELS):
        d = first_channel + tl.arange(0, BLOCK_CHANNELS)
        x = tl.load(
            start[:, None] + d.to(tl.int64)[None, :] * stride_channel,
            mask=inside[:, None] & (d < channels)[None, :],
            other=0.0,
        ).to(tl.float32)
        odd |= tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), axis=1)
    index = image * per_image + pixel
    y = tl.load(labels + index, mask=inside, other=-1)
    tl.store(clean + index, tl.where(odd == 0, y, -1), mask=inside)


@triton.jit
def _own_anchor(
    start,
    y,
    points,
    present,
    channels,
    stride_channel,
    DISTANCE: tl.constexpr,
    OF_CLASS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Of the anchors of each label the row of the nearest, and the distance to it."""
    active = y >= 0
    first = tl.maximum(y, 0) * OF_CLASS
    row = first
    least = tl.full((BLOCK_PIXELS,), float("inf"), tl.float32)
    for m in range(OF_CLASS):
        of_elements = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
        own = points + (first + m) * channels
        for first_channel in range(0, channels, BLOCK_CHANNELS):
            d = first_channel + tl.arange(0, BLOCK_CHANNELS)
            # An inactive pixel is not even read.
            chosen = active[:, None] & (d < channels)[None, :]
            at = start[:, None] + d.to(tl.int64)[None, :] * stride_channel
            x = tl.load(at, mask=chosen, other=0.0).to(tl.float32)
            offset = x - tl.load(own[:, None] + d[None, :], mask=chosen, other=0.0)
            if DISTANCE == 2:
                size = tl.abs(offset)
                bounded = tl.where(size > 1, 1.0, size)
                of_elements += bounded * (size - bounded / 2)
            else:
                of_elements += offset * offset
        total = tl.sum(of_elements, axis=1)
        if DISTANCE == 0:
            total = tl.sqrt_rn(total)
        if DISTANCE == 2:
            total = total / channels
        if OF_CLASS > 1:
            there = tl.load(present + first + m, mask=active, other=0)
            total = tl.where(there != 0, total, float("inf"))
        nearer = (total < least) | (total != total)  # a NaN, too
        row = tl.where(nearer, first + m, row)
        least = tl.where(nearer, total, least)
    return row, least


@triton.jit
def _losses_kernel(
    features,
    labels,
    points,
    present,
    losses,
    per_image,
    channels,
    stride_image,
    stride_channel,
    stride_pixel,
    DISTANCE: tl.constexpr,
    OF_CLASS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    image, pixel = _tile(tl.program_id(0), per_image, BLOCK_PIXELS)
    inside = pixel < per_image
    start = features + image * stride_image + pixel.to(tl.int64) * stride_pixel
    index = image * per_image + pixel
    y = tl.load(labels + index, mask=inside, other=-1)
    _, total = _own_anchor(
        start,
        y,
        points,
        present,
        channels,
        stride_channel,
        DISTANCE,
        OF_CLASS,
        BLOCK_PIXELS,
        BLOCK_CHANNELS,
    )
    tl.store(losses + index, tl.where(y >= 0, total, 0.0), mask=inside)


@triton.jit
def _losses_backward_kernel(
    grad_losses,
    losses,
    features,
    labels,
    points,
    present,
    grad,
    per_image,
    channels,
    stride_image,
    stride_channel,
    stride_pixel,
    grad_stride_image,
    grad_stride_channel,
    grad_stride_pixel,
    DISTANCE: tl.constexpr,
    OF_CLASS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    image, pixel = _tile(tl.program_id(0), per_image, BLOCK_PIXELS)
    inside = pixel < per_image
    start = features + image * stride_image + pixel.to(tl.int64) * stride_pixel
    grad_start = grad + image * grad_stride_image + pixel.to(tl.int64) * grad_stride_pixel
    index = image * per_image + pixel
    y = tl.load(labels + index, mask=inside, other=-1)
    active = y >= 0
    row = tl.maximum(y, 0)
    if OF_CLASS > 1:
        row, _ = _own_anchor(
            start,
            y,
            points,
            present,
            channels,
            stride_channel,
            DISTANCE,
            OF_CLASS,
            BLOCK_PIXELS,
            BLOCK_CHANNELS,
        )
    own = points + row * channels
    scale = tl.load(grad_losses + index, mask=active, other=0.0)
    if DISTANCE == 0:
        norm = tl.load(losses + index, mask=active, other=0.0)
        scale = scale / tl.where(norm == 0, 1.0, norm)
    elif DISTANCE == 1:
        scale = scale * 2
    else:
        scale = scale / channels
    for first_channel in range(0, channels, BLOCK_CHANNELS):
        d = first_channel + tl.arange(0, BLOCK_CHANNELS)
        chosen = active[:, None] & (d < channels)[None, :]
        along = d.to(tl.int64)[None, :]
        x = tl.load(start[:, None] + along * stride_channel, mask=chosen, other=0.0).to(tl.float32)
        slope = x - tl.load(own[:, None] + d[None, :], mask=chosen, other=0.0)
        if DISTANCE == 2:
            # Written so that a NaN stays one.
            slope = tl.where(slope > 1, 1.0, tl.where(slope < -1, -1.0, slope))
        tl.store(
            grad_start[:, None] + along * grad_stride_channel,
            tl.where(chosen, slope * scale[:, None], 0.0),
            mask=inside[:, None] & (d < channels)[None, :],
        )
