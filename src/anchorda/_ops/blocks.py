"""Views of a few pixels at a time, so that no operator needs memory of the size of the features.

Maps ``(N, K, *)`` are seen as matrices ``(N, K, P)``. An operator computes its result block by
block: some pixels of one image, or some whole images. What is as large as the features of a block
is computed in parts that fit a core's cache. On a CPU, threads share the blocks; see `threads`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar, final

import torch
from torch import Tensor

from .threads import share_among_threads

Item = TypeVar("Item")

# Of the features of a part: so many stay in a core's cache; a GPU wants fewer, larger steps.
_PART_BYTES_CPU = 3 * 2**19
_PART_BYTES_GPU = 2**24
# Of a block: a thread holds the interpreter between operations, so they must not be short.
_BLOCK_PIXELS_CPU = 2**13
# Elements of the features, below which torch does not divide most operations among threads either.
_FEW_ELEMENTS = 2**15


@final
class Scratch:
    """Memory that the blocks of one thread share: fresh pages cost as much as the arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def __call__(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return a tensor of any content, valid until the next one of that name."""
        view = self._views.get((name, shape))
        if view is None:
            size, memory = math.prod(shape), self._memory.get(name)
            if memory is None or len(memory) < size:
                memory = torch.empty(size, dtype=dtype, device=self._device)
                self._memory[name] = memory
                self._views = {key: v for key, v in self._views.items() if key[0] != name}
            view = self._views[name, shape] = memory[:size].view(shape)
        return view

    def like(self, maps: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor of any content in the shape (T, K, p) and the layout of maps."""
        tiles, channels, pixels = maps.shape
        if has_rows(maps):
            return self(name, dtype, tiles, pixels, channels).mT
        return self(name, dtype, tiles, channels, pixels)


def has_rows(maps: Tensor) -> bool:
    """Return True if the channels of a pixel are neighbors in memory, rather than the pixels."""
    return maps.stride(1) == 1


def matrices(maps: Tensor) -> Tensor:
    """View maps (N, K, *) as (N, K, P); a copy where the pixels have no common stride.

    Rows (N, K) are one image of N pixels.
    """
    return maps.T.unsqueeze(0) if maps.dim() == 2 else maps.flatten(2)


def scalars(maps: Tensor) -> Tensor:
    """View maps (N, *) as matrices (N, 1, P) likewise."""
    return matrices(maps.unsqueeze(1))


def new_gradient(features: Tensor) -> Tensor:
    """Allocate a gradient in the layout of the features: channels-last or contiguous."""
    n, channels, *spatial = features.shape
    if has_rows(features):
        return features.new_empty(n, *spatial, channels).movedim(-1, 1)
    return features.new_empty(features.shape)


def pixels_of_part(maps: Tensor, dtype: torch.dtype, others: int = 1) -> int:
    """Return how many pixels a part has, by the channels of maps and ``others`` values a pixel."""
    limit = _PART_BYTES_CPU if maps.device.type == "cpu" else _PART_BYTES_GPU
    return max(1, limit // (dtype.itemsize * (maps.shape[1] + others)))


def for_each_block(compute: Callable[..., None], *tensors: Tensor, part: int) -> None:
    """Call ``compute(scratch, *views)`` with the views (T, K, p) of every block.

    Args:
        compute: writes its results to some of the views.
        tensors: matrices ``(N, K, P)`` of any K; the features first.
        part: how many pixels a part has; see `parts`.
    """
    features = tensors[0]
    pixels = part
    if features.device.type == "cpu":
        of_all = features.shape[0] * features.shape[2]
        pixels = max(part, _BLOCK_PIXELS_CPU)
        if features.numel() >= _FEW_ELEMENTS:
            pixels = min(pixels, math.ceil(of_all / (2 * torch.get_num_threads())))

    def work(blocks: Iterator[tuple[Tensor, ...]]) -> None:
        scratch = Scratch(features.device)
        for views in blocks:
            compute(scratch, *views)

    share_if_many(work, views_of_blocks(pixels, *tensors), features)


def share_if_many(
    work: Callable[[Iterator[Item]], None], items: Iterable[Item], features: Tensor
) -> None:
    """Share the items among threads if the features are many, and on a CPU."""
    if features.device.type == "cpu" and features.numel() >= _FEW_ELEMENTS:
        share_among_threads(work, items)
    else:
        work(iter(items))


def views_of_blocks(pixels: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views (T, K, p) of matrices (N, K, P): some pixels of one image, or some images."""
    images, _, of_image = tensors[0].shape
    if images == 0 or of_image == 0:
        return
    if of_image <= pixels:
        step = _even(images, pixels // of_image)
        for first in range(0, images, step):
            yield tuple(tensor[first : first + step] for tensor in tensors)
        return
    step = _even(of_image, pixels)
    for image in range(images):
        for first in range(0, of_image, step):
            yield tuple(tensor[image : image + 1, :, first : first + step] for tensor in tensors)


def parts(pixels: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split the views (T, K, p) of a block into parts of at most so many pixels."""
    images, _, of_image = tensors[0].shape
    if images * of_image <= pixels:
        return iter([tensors])
    if images > 1 and of_image <= pixels:
        dim, step = 0, _even(images, pixels // of_image)
    elif images == 1:
        dim, step = 2, _even(of_image, pixels)
    else:
        of_images = (views for views in zip(*(t.split(1) for t in tensors), strict=True))
        return (views for one in of_images for views in parts(pixels, *one))
    return zip(*(t.split(step, dim) for t in tensors), strict=True)


def _even(items: int, most: int) -> int:
    """Return the size of shares that are even and at most so large."""
    return math.ceil(items / math.ceil(items / most))
