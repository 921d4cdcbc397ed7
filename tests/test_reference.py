"""What the operators promise beyond their results: bounded blocks, and no look at the values."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from anchorda._ops import reference, tiles
from tests.oracles import LAYOUTS, lay_out

SHAPES = [(3, 5), (1, 256, 1, 4096), (2, 8, 100, 3), (1, 4, 7, 30, 50), (100, 2, 3), (0, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_classes", [1, 19, 1000])
@pytest.mark.parametrize("limit", [1, 64, 5000, 2**19])
def test_blocks_are_bounded_and_cover_every_pixel_once(
    shape: tuple[int, ...], num_classes: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_BLOCK_BYTES_CPU", 8 * limit)
    features = tiles.matrices(torch.empty(shape))
    visits = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    view = tiles.scalars(visits)
    for block in itertools.islice(tiles.blocks(features, torch.float64, num_classes), 20000):
        visited = tiles.get(view, block)
        assert visited.numel() == 1 or visited.numel() * (shape[1] + num_classes) <= limit
        tiles.put(view, block, visited + 1)
    if limit > 1:
        assert (visits == 1).all()


@pytest.mark.parametrize("shape", [(8, 64, 30, 40), (1000, 64, 3, 4), (9600, 64)])
def test_blocks_are_few_where_much_fits(shape: tuple[int, ...]) -> None:
    features = torch.empty(shape, device="meta")
    fewest = math.ceil(features.numel() / (tiles._BLOCK_BYTES_GPU / 4))
    assert len(list(tiles.blocks(tiles.matrices(features), torch.float32))) <= 2 * fewest


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 5, 7), (4, 3)])
def test_tiles_are_copied_as_they_lie(shape: tuple[int, ...], layout: str) -> None:
    features = lay_out(torch.randn(shape), layout)
    maps, scratch = tiles.matrices(features), tiles.Scratch(features.device)
    copied = tiles.new_gradient(features)
    for block in tiles.blocks(maps, torch.float64):
        x = tiles.take(maps, block, torch.float64, scratch)
        assert tiles.has_rows(x) == tiles.has_rows(maps)
        tiles.put(tiles.matrices(copied), block, x)
    torch.testing.assert_close(copied, features, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (7, 3)])
def test_no_operator_looks_at_a_value(shape: tuple[int, ...]) -> None:
    """On tensors without values, a result whose size depends on them raises."""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    n, d, *spatial = shape
    features, anchors = empty(*shape), empty(19, d)
    labels, distances = empty(n, *spatial, dtype=torch.int64), empty(n, 19, *spatial)
    losses = empty(n, *spatial)
    sums, counts = reference.class_sums(features, labels, 19)
    assert (sums.shape, counts.shape) == ((19, d), (19,))
    assert reference.image_sums_backward(empty(n, 19, d), features, labels).shape == shape
    assert reference.anchor_distances(features, anchors).shape == distances.shape
    grad = reference.anchor_distances_backward(distances, distances, features, anchors)
    assert grad.shape == shape
    assert {r.shape for r in reference.nearest_anchors(features, anchors)} == {losses.shape}
    for distance in ("euclidean", "squared", "smooth_l1"):
        assert reference.pixel_losses(features, labels, anchors, distance).shape == losses.shape
        grad = reference.pixel_losses_backward(losses, losses, features, labels, anchors, distance)
        assert grad.shape == shape
