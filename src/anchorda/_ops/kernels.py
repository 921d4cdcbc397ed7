"""Operators of `reference` in Triton, for CUDA: features are read once, only results written.

The same signatures and results as there, for float32, float16 and bfloat16 features; see `takes`.
Arithmetic is float32. Products run on tensor cores in three parts of TF32, which together are as
precise as float32. Where a feature is so near to an anchor that ``‖x‖² − 2·a·x + ‖a‖²`` would lose
half its digits, the distances of its tile are computed anew from the differences. Sums
over pixels are added up in float64, in an order that depends on the shape and the GPU alone.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_DISTANCES = {"euclidean": 0, "squared": 1, "smooth_l1": 2}


def takes(features: Tensor, *others: Tensor) -> bool:
    """Whether the kernels compute these inputs; what they do not, `reference` does.

    They need pixels at one distance in memory within an image, whatever the layout, and nothing in
    float64, which is to be computed as such.
    """
    if features.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if any(other.dtype == torch.float64 for other in others) or features.numel() == 0:
        return False
    try:
        _maps(features)
    except RuntimeError:
        return False
    return True


def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """See `reference.class_sums`."""
    maps = _maps(features)
    n, channels, per_image = maps.shape
    pixels, device = n * per_image, features.device
    block_classes, block_pixels = _block(num_classes), 64
    block_channels = 64 if block_classes <= 64 else 32
    parts = triton.cdiv(channels, block_channels)
    strips = min(triton.cdiv(pixels, block_pixels), max(1, 4 * _processors(device) // parts))
    length = triton.cdiv(triton.cdiv(pixels, strips), block_pixels) * block_pixels
    sums = torch.empty(strips, num_classes, channels, dtype=torch.float64, device=device)
    counts = torch.empty(strips, num_classes, dtype=torch.int64, device=device)
    # Set if any feature is not finite: only then do the second and third kernel do anything.
    impure = torch.zeros(1, dtype=torch.int32, device=device)
    labels = _flat(labels)
    clean = torch.empty_like(labels)
    shape = (pixels, per_image, channels, num_classes)
    blocks = {
        "BLOCK_PIXELS": block_pixels,
        "BLOCK_CHANNELS": block_channels,
        "num_warps": 4 if block_classes <= 64 else 8,
    }
    classes = {"BLOCK_CLASSES": block_classes, "LENGTH": length}
    results = (impure, sums, counts)
    grid = (strips, parts)
    with _current(device):
        _sums_kernel[grid](
            maps, labels, *results, *shape, *maps.stride(), AGAIN=False, **classes, **blocks
        )
        _clean_kernel[(triton.cdiv(pixels, block_pixels),)](
            maps, labels, impure, clean, *shape[:3], *maps.stride(), **blocks
        )
        _sums_kernel[grid](
            maps, clean, *results, *shape, *maps.stride(), AGAIN=True, **classes, **blocks
        )
    return sums.sum(dim=0), counts.sum(dim=0)


def nearest_anchors(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.nearest_anchors`."""
    maps = _maps(features)
    n, channels, per_image = maps.shape
    pixels = n * per_image
    points, squares = _points(anchors)
    shape = (n, *features.shape[2:])
    labels = torch.empty(shape, dtype=torch.int64, device=features.device)
    nearest = torch.empty(shape, dtype=torch.float32, device=features.device)
    second = torch.empty_like(nearest)
    block_classes = _block(len(points))
    block_pixels = 128 if block_classes <= 32 else 64 if block_classes <= 128 else 32
    with _current(features.device):
        _nearest_kernel[(triton.cdiv(pixels, block_pixels),)](
            *(maps, points, squares, labels, nearest, second),
            *(pixels, per_image, channels, len(points), *maps.stride()),
            BLOCK_PIXELS=block_pixels,
            BLOCK_CHANNELS=32,
            BLOCK_CLASSES=block_classes,
            num_warps=4,
        )
    return labels, nearest, second


def pixel_losses(features: Tensor, labels: Tensor, anchors: Tensor, distance: str) -> Tensor:
    """See `reference.pixel_losses`."""
    maps = _maps(features)
    n, channels, per_image = maps.shape
    points, _ = _points(anchors)
    losses = torch.empty(labels.shape, dtype=torch.float32, device=features.device)
    with _current(features.device):
        _losses_kernel[(triton.cdiv(n * per_image, 64),)](
            *(maps, _flat(labels), points, losses),
            *(n * per_image, per_image, channels, *maps.stride()),
            DISTANCE=_DISTANCES[distance],
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
    maps, grad_maps = _maps(features), _maps(grad)
    n, channels, per_image = maps.shape
    points, _ = _points(anchors)
    of_pixels = (grad_losses.reshape(-1).contiguous(), losses.reshape(-1).contiguous())
    with _current(features.device):
        _losses_backward_kernel[(triton.cdiv(n * per_image, 64),)](
            *(*of_pixels, maps, _flat(labels), points, grad_maps),
            *(n * per_image, per_image, channels, *maps.stride(), *grad_maps.stride()),
            DISTANCE=_DISTANCES[distance],
            BLOCK_PIXELS=64,
            BLOCK_CHANNELS=32,
        )
    return grad


def _maps(features: Tensor) -> Tensor:
    """Features as a view (N, D, P), or a RuntimeError if there is none."""
    return features.view(*features.shape[:2], -1)


def _flat(labels: Tensor) -> Tensor:
    """Labels (P,) int64, neighbors in memory also where they were expanded."""
    return labels.reshape(-1).long().contiguous()


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _points(anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors (C, D) float32, 0 where unseen, and their squares (C,), infinite where unseen."""
    seen = anchors.isfinite().all(dim=1)
    points = torch.where(seen[:, None], anchors, 0.0).float().contiguous()
    squares = points.double().square().sum(dim=1).float()
    return points, torch.where(seen, squares, torch.inf)


def _block(num_classes: int) -> int:
    return max(16, 1 << (num_classes - 1).bit_length())


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _starts(features, index, per_image, stride_image, stride_pixel):
    """Where in memory pixels begin, from their index (int64) over all images."""
    return features + index // per_image * stride_image + index % per_image * stride_pixel


@triton.jit
def _nearest_kernel(
    features,
    points,
    squares,
    labels,
    nearest,
    second,
    pixels,
    per_image,
    channels,
    classes,
    stride_image,
    stride_channel,
    stride_pixel,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    inside = index < pixels
    start = _starts(features, index, per_image, stride_image, stride_pixel)
    c = tl.arange(0, BLOCK_CLASSES)
    known = c < classes
    of_anchors = tl.load(squares + c, mask=known, other=float("inf"))

    products = tl.zeros((BLOCK_PIXELS, BLOCK_CLASSES), tl.float32)
    of_features = tl.zeros((BLOCK_PIXELS,), tl.float32)
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
        of_features += tl.sum(x * x, axis=1)
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
        for _ in range(channels):
            x = tl.load(x_of_channel, mask=inside, other=0.0).to(tl.float32)
            a = tl.load(a_of_channel, mask=known, other=0.0)
            offset = x[:, None] - a[None, :]
            exact += offset * offset
            x_of_channel += stride_channel
            a_of_channel += 1
        distances = tl.where(possible, exact, float("inf"))

    distances = tl.sqrt_rn(distances)
    least = tl.min(distances, axis=1)
    # The first of equally near ones.
    winner = tl.min(tl.where(distances == least[:, None], c[None, :], BLOCK_CLASSES), axis=1)
    others = tl.where(c[None, :] == winner[:, None], float("inf"), distances)
    winner = tl.where(least < float("inf"), winner, -1)
    tl.store(labels + index, winner.to(tl.int64), mask=inside)
    tl.store(nearest + index, least, mask=inside)
    tl.store(second + index, tl.min(others, axis=1), mask=inside)


@triton.jit
def _sums_kernel(
    features,
    labels,
    impure,
    sums,
    counts,
    pixels,
    per_image,
    channels,
    classes,
    stride_image,
    stride_channel,
    stride_pixel,
    AGAIN: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """The sums of one strip of pixels, for some of the channels."""
    if AGAIN:
        if tl.load(impure) == 0:
            return
    strip, part = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK_CLASSES)
    d = part * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    there = d < channels
    total = tl.zeros((BLOCK_CLASSES, BLOCK_CHANNELS), tl.float64)
    count = tl.zeros((BLOCK_CLASSES,), tl.int64)
    bad = tl.zeros((BLOCK_PIXELS,), tl.int32)
    for offset in range(0, LENGTH, BLOCK_PIXELS):
        index = strip.to(tl.int64) * LENGTH + offset + tl.arange(0, BLOCK_PIXELS)
        inside = index < pixels
        y = tl.load(labels + index, mask=inside, other=-1)
        start = _starts(features, index, per_image, stride_image, stride_pixel)
        x = tl.load(
            start[:, None] + d.to(tl.int64)[None, :] * stride_channel,
            mask=inside[:, None] & there[None, :],
            other=0.0,
        ).to(tl.float32)
        finite = tl.abs(x) < float("inf")
        bad |= tl.max((~finite).to(tl.int32), axis=1)
        x = tl.where(finite, x, 0.0)
        members = c[:, None] == y[None, :]
        total += tl.dot(members.to(tl.float32), x, input_precision="tf32x3").to(tl.float64)
        count += tl.sum(members.to(tl.int32), axis=1).to(tl.int64)
    if not AGAIN:
        if tl.max(bad, axis=0) > 0:
            tl.store(impure, 1)
    row = strip.to(tl.int64) * classes + c
    stored = (c < classes)[:, None] & there[None, :]
    tl.store(sums + row[:, None] * channels + d[None, :], total, mask=stored)
    if part == 0:
        tl.store(counts + row, count, mask=c < classes)


@triton.jit
def _clean_kernel(
    features,
    labels,
    impure,
    clean,
    pixels,
    per_image,
    channels,
    stride_image,
    stride_channel,
    stride_pixel,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Labels, −1 where the feature is not finite."""
    if tl.load(impure) == 0:
        return
    index = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    inside = index < pixels
    start = _starts(features, index, per_image, stride_image, stride_pixel)
    bad = tl.zeros((BLOCK_PIXELS,), tl.int32)
    for first_channel in range(0, channels, BLOCK_CHANNELS):
        d = first_channel + tl.arange(0, BLOCK_CHANNELS)
        x = tl.load(
            start[:, None] + d.to(tl.int64)[None, :] * stride_channel,
            mask=inside[:, None] & (d < channels)[None, :],
            other=0.0,
        ).to(tl.float32)
        bad |= tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32), axis=1)
    y = tl.load(labels + index, mask=inside, other=-1)
    tl.store(clean + index, tl.where(bad == 0, y, -1), mask=inside)


@triton.jit
def _losses_kernel(
    features,
    labels,
    points,
    losses,
    pixels,
    per_image,
    channels,
    stride_image,
    stride_channel,
    stride_pixel,
    DISTANCE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    inside = index < pixels
    start = _starts(features, index, per_image, stride_image, stride_pixel)
    y = tl.load(labels + index, mask=inside, other=-1)
    active = y >= 0
    own = points + tl.maximum(y, 0) * channels
    total = tl.zeros((BLOCK_PIXELS,), tl.float32)
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
            total += tl.sum(bounded * (size - bounded / 2), axis=1)
        else:
            total += tl.sum(offset * offset, axis=1)
    if DISTANCE == 0:
        total = tl.sqrt_rn(total)
    if DISTANCE == 2:
        total = total / channels
    tl.store(losses + index, total, mask=inside)


@triton.jit
def _losses_backward_kernel(
    grad_losses,
    losses,
    features,
    labels,
    points,
    grad,
    pixels,
    per_image,
    channels,
    stride_image,
    stride_channel,
    stride_pixel,
    grad_stride_image,
    grad_stride_channel,
    grad_stride_pixel,
    DISTANCE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    inside = index < pixels
    start = _starts(features, index, per_image, stride_image, stride_pixel)
    grad_start = _starts(grad, index, per_image, grad_stride_image, grad_stride_pixel)
    y = tl.load(labels + index, mask=inside, other=-1)
    active = y >= 0
    own = points + tl.maximum(y, 0) * channels
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
