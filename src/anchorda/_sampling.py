"""Uniform samples of the pixels of each class: those with the smallest random priorities.

Priorities are hashes of ordinals in the stream: they are the same on every device and however the
stream is divided, need no generator, and samples merge exactly.
"""

import torch
from torch import Tensor

_PRIORITY_BITS = 40
NO_PRIORITY = 2**_PRIORITY_BITS
"""Greater than any: of an entry without a pixel."""


def random_priorities(ordinals: Tensor, seed: int) -> Tensor:
    """Hash ordinals (P,) to integers below 2⁴⁰: the same on every device (splitmix64)."""
    x = (ordinals + (seed + 1) * 0x632BE59BD9B4E019 % 2**63) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _logical_shift(x, shift)) * _signed(factor)
    return _logical_shift(x ^ _logical_shift(x, 31), 64 - _PRIORITY_BITS)


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def sample_of_classes(
    classes: Tensor, num_classes: int, count: int, *, seen: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample pixels (P,) of each class, C where a pixel has none; P ≥ 1.

    By one sort and fixed shapes, so that the host does not wait for the device.

    Returns:
        Indices (C, K) of pixels, their priorities (C, K), and the number (C,) of a class's pixels.
    """
    # Numbered throughout the stream, so that its division into batches does not matter.
    priorities = random_priorities((classes < num_classes).cumsum(0) + seen, seed)
    order = ((classes << _PRIORITY_BITS) + priorities).argsort(stable=True)
    in_order = classes[order]
    sizes = classes.new_zeros(num_classes + 1)
    sizes.scatter_add_(0, classes, torch.ones_like(classes))
    rank = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[in_order]
    unused = num_classes * count
    slots = torch.where((in_order < num_classes) & (rank < count), in_order * count + rank, unused)
    chosen = order.new_zeros(unused + 1).scatter_(0, slots, order)[:-1].view(num_classes, count)
    found = torch.arange(count, device=order.device) < sizes[:-1, None]
    return chosen, torch.where(found, priorities[chosen], NO_PRIORITY), sizes[:-1]


def join_samples(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Join rows (C, K, D) with priorities (C, K): the smallest K, as many as the first has."""
    priorities = torch.cat([first[1], second[1]], dim=1)
    order = priorities.argsort(dim=1, stable=True)[:, : first[1].shape[1]]
    rows = torch.cat([first[0], second[0]], dim=1)
    return rows.gather(1, order[:, :, None].expand(-1, -1, rows.shape[2])), priorities.gather(
        1, order
    )
