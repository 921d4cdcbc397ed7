"""How the operators in plain torch walk over their input: in blocks of tiles that fit a cache.

Maps ``(N, K, *)`` are seen as matrices ``(N, K, P)``. A tile is a matrix of all channels and a few
pixels, a block some tiles ``(T, K, p)``, copied one behind the other. Torch divides what it does
with a block among its threads by tiles, so that a core finds in its own cache what it wrote there:
over one wide matrix it would divide some steps by channels and some by pixels, and half of a block
would go from one core to another in between.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, final

import torch
from torch import Tensor

# Of a block: 4 MB stay near a core's cache; a GPU wants fewer, larger steps.
_BLOCK_BYTES_CPU = 2**22
_BLOCK_BYTES_GPU = 2**24
# Of a tile: enough for its matrix products to be fast.
_TILE_ELEMENTS = 2**15
_TILE_PIXELS = 128


class Block(NamedTuple):
    """Some tiles of the pixels of some images."""

    images: slice
    pixels: slice
    tiles: int
    """Of each image: they divide its pixels evenly."""


@final
class Scratch:
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


def has_rows(maps: Tensor) -> bool:
    """Whether the channels of a pixel are neighbors in memory, rather than the pixels."""
    return maps.stride(1) == 1


def matrices(maps: Tensor) -> Tensor:
    """Maps (N, K, *) as (N, K, P): a view where the pixels of an image lie at one distance.

    Rows (N, K) are one image of N pixels.
    """
    return maps.T.unsqueeze(0) if maps.dim() == 2 else maps.flatten(2)


def scalars(maps: Tensor) -> Tensor:
    """Maps (N, *) as matrices (N, 1, P) likewise."""
    return matrices(maps.unsqueeze(1))


def new_gradient(features: Tensor) -> Tensor:
    """Memory for a gradient, in the layout of the features: channels-last or contiguous."""
    n, channels, *spatial = features.shape
    if has_rows(features):
        return features.new_empty(n, *spatial, channels).movedim(-1, 1)
    return features.new_empty(features.shape)


def blocks(
    maps: Tensor, dtype: torch.dtype, others: int = 1, *, one_tile: bool = False
) -> Iterator[Block]:
    """Blocks that cover matrices (N, K, P), of few enough pixels.

    Few enough for their features, and some other values a pixel, to fit the limit in that dtype.
    One tile, instead of several, suits what no channel shares with another: torch divides
    it by channels, as it does the results that it is copied to.
    """
    images, channels, pixels = maps.shape
    limit = _BLOCK_BYTES_CPU if maps.device.type == "cpu" else _BLOCK_BYTES_GPU
    limit //= dtype.itemsize
    per_pixel = channels + others
    of_block = max(1, limit // per_pixel)
    if one_tile:
        of_tile = _share(max(1, pixels), of_block)
    else:
        of_tile = max(_TILE_PIXELS, _TILE_ELEMENTS // per_pixel)
        of_tile = _divisor(pixels, max(1, min(of_tile, of_block, pixels)))
    most = of_block // of_tile
    tiles, rest = divmod(pixels, of_tile)
    if tiles > 0:
        at_once, step = max(1, most // tiles), of_tile * _share(tiles, most)
        for of_images in _ranges(0, images, at_once):
            for of_pixels in _ranges(0, pixels - rest, step):
                yield Block(of_images, of_pixels, (of_pixels.stop - of_pixels.start) // of_tile)
    if rest > 0:
        for of_images in _ranges(0, images, most):
            yield Block(of_images, slice(pixels - rest, pixels), 1)


def _divisor(items: int, most: int) -> int:
    """The largest divisor of a number up to `most`, or `most` if none is half as large."""
    return next((size for size in range(most, most // 2, -1) if items % size == 0), most)


def _share(items: int, most: int) -> int:
    """How many to take at once, if shares are to be even and at most so large."""
    return math.ceil(items / math.ceil(items / most))


def _ranges(start: int, stop: int, step: int) -> Iterator[slice]:
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))


def _view(maps: Tensor, block: Block) -> Tensor:
    """The tiles (images, tiles, K, p) of a block of matrices (N, K, P)."""
    of_block = maps[block.images, :, block.pixels]
    images, channels, pixels = of_block.shape
    shape = images, channels, block.tiles, pixels // block.tiles
    return of_block.view(shape).movedim(2, 1)


def get(maps: Tensor, block: Block) -> Tensor:
    """The tiles (T, K, p) of a block, to be read."""
    return _view(maps, block).flatten(0, 1)


def room(maps: Tensor, block: Block, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Memory for the tiles (T, K, p) of a block, in the layout of the maps."""
    images, tiles, channels, pixels = _view(maps, block).shape
    if has_rows(maps):
        return scratch("tiles", dtype, images * tiles, pixels, channels).mT
    return scratch("tiles", dtype, images * tiles, channels, pixels)


def take(maps: Tensor, block: Block, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """A copy (T, K, p) of the tiles of a block, to be written over."""
    return room(maps, block, dtype, scratch).copy_(get(maps, block))


def place(maps: Tensor, block: Block, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Memory for what will be put into a block: its own, where it has the dtype and rows."""
    if maps.dtype == dtype and has_rows(maps):
        return get(maps, block)
    return room(maps, block, dtype, scratch)


def put(maps: Tensor, block: Block, tiles: Tensor) -> None:
    """Write the tiles (T, K, p) of a block, unless they are in their place."""
    view = _view(maps, block)
    if tiles.data_ptr() != view.data_ptr():
        view.copy_(tiles.view(view.shape))
