"""The most frequent label of each cell of a label map, in bounded memory.

Cells are those of adaptive pooling: along a dimension of size ``old``, cell i of ``new`` begins at
pixel ⌊i·old/new⌋ and ends before ⌈(i+1)·old/new⌉. A map is gathered once for every position inside
a cell, for a few rows of cells at a time. Cells of few pixels are counted by comparing every two of
them, which is several times faster than sorting; the pixels of large cells are sorted.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK_PIXELS = 2**17
_FEW = 32


def majority(labels: Tensor, size: Sequence[int], min_ratio: float, ignore_index: int) -> Tensor:
    """Return labels (N, *size), ``ignore_index`` where the largest share is below ``min_ratio``."""
    result = labels.new_empty(labels.shape[0], *size)
    if labels.dtype in (torch.uint16, torch.uint32, torch.uint64):
        labels = labels.long()  # Not all operators know unsigned dtypes.
    axes = [_axis(o, n, labels.device) for o, n in zip(labels.shape[1:], size, strict=True)]
    offsets = list(itertools.product(*(range(pixels.shape[1]) for pixels, _ in axes)))
    rows = max(1, _BLOCK_PIXELS // max(1, len(offsets) * result[:1, 0].numel()))
    for n, start in itertools.product(range(len(labels)), range(0, size[0], rows)):
        block = slice(start, start + rows)
        parts = [(axes[0][0][block], axes[0][1][block]), *axes[1:]]
        maps, inside = zip(*(_gather(labels[n], parts, offset) for offset in offsets), strict=True)
        count = _count_pairs if len(offsets) <= _FEW else _count_sorted
        winners, counts = count(maps, inside)
        total = sum(mask.int() for mask in inside)
        enough = counts / total >= min_ratio
        result[n, block] = torch.where(enough, winners.long(), ignore_index).to(result.dtype)
    return result


def _axis(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return pixels (new, K) along one dimension of each cell, and which of the K are in it."""
    widest = old // new if old % new == 0 else old // new + 2
    cell = torch.arange(new, device=device)[:, None]
    pixels = cell * old // new + torch.arange(widest, device=device)
    return pixels.clamp(max=old - 1), pixels < ((cell + 1) * old + new - 1) // new


def _gather(
    labels: Tensor, axes: Sequence[tuple[Tensor, Tensor]], offset: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the pixel at one position of every cell, and where that position is in the cell."""
    inside = torch.ones((), dtype=torch.bool, device=labels.device)
    for dim, ((pixels, within), k) in enumerate(zip(axes, offset, strict=True)):
        labels = labels.index_select(dim, pixels[:, k])
        inside = inside.unsqueeze(-1) & within[:, k]
    return labels, inside


def _count_pairs(maps: Sequence[Tensor], inside: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the most frequent label of each cell, the smallest of several, and its count."""
    counts = [mask.to(torch.uint8) for mask in inside]
    for (i, first), (j, second) in itertools.combinations(enumerate(maps), 2):
        equal = (first == second) & inside[i] & inside[j]
        counts[i] = counts[i] + equal
        counts[j] = counts[j] + equal
    winners, most = maps[0], counts[0]
    for labels, count in zip(maps[1:], counts[1:], strict=True):
        better = (count > most) | ((count == most) & (labels < winners))
        winners, most = torch.where(better, labels, winners), torch.maximum(most, count)
    return winners, most


def _count_sorted(maps: Sequence[Tensor], inside: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the same as `_count_pairs`, faster for cells with many pixels."""
    labels, order = torch.stack(list(maps), dim=-1).sort(dim=-1)
    within = torch.stack([m.expand_as(maps[0]) for m in inside], dim=-1).gather(-1, order)
    # Equal labels form runs; pixels outside of the cell do not count.
    place = torch.arange(labels.shape[-1], device=labels.device)
    starts = labels.diff(dim=-1, prepend=labels[..., :1]) != 0
    first = torch.where(starts, place, 0).cummax(dim=-1).values
    counted = within.cumsum(dim=-1)
    before = (counted - within.long()).gather(-1, first)
    lengths = counted - before
    most = lengths.amax(dim=-1)
    largest = torch.iinfo(labels.dtype).max
    winners = torch.where(lengths == most[..., None], labels, largest).amin(dim=-1)
    return winners, most
