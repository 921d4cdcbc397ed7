"""Promises of the operators beyond their results: bounded blocks, and no value is read."""

import math

import pytest
import torch
from torch import Tensor

from anchorda._ops import blocks, reference
from tests.oracles import LAYOUTS, lay_out

SHAPES = [(3, 5), (1, 256, 1, 4096), (2, 8, 100, 3), (1, 4, 7, 30, 50), (100, 2, 3), (0, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("most", [1, 7, 64, 1000, 2**19])
@pytest.mark.parametrize("part", [1, 5, 2**19])
def test_blocks_and_parts_are_bounded_and_cover_every_pixel_once(
    shape: tuple[int, ...], most: int, part: int
) -> None:
    features = blocks.matrices(torch.empty(shape))
    visits = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    for x, visited in blocks.views_of_blocks(most, features, blocks.scalars(visits)):
        assert visited.numel() <= most
        for x_, visited_ in blocks.parts(part, x, visited):
            assert visited_.numel() <= part
            assert x_.shape == (len(visited_), shape[1], visited_.shape[2])
            visited_ += 1
    assert (visits == 1).all()


@pytest.mark.parametrize("shape", [(8, 64, 30, 40), (1000, 64, 3, 4), (9600, 64)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_blocks_are_few_where_much_fits(shape: tuple[int, ...], device: str) -> None:
    maps = blocks.matrices(torch.empty(shape, device=device))
    part = blocks.pixels_of_part(maps, torch.float32)
    limit = blocks._PART_BYTES_CPU if device == "cpu" else blocks._PART_BYTES_GPU
    fewest = math.ceil(maps.numel() * 4 / limit)
    assert len(list(blocks.views_of_blocks(part, maps))) <= 2 * fewest
    assert len(list(blocks.parts(part, maps))) <= 2 * max(fewest, len(maps) if fewest > 1 else 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 5, 7), (4, 3)])
def test_scratch_and_gradients_have_the_layout_of_the_features(
    shape: tuple[int, ...], layout: str
) -> None:
    features = lay_out(torch.randn(shape), layout)
    maps, scratch = blocks.matrices(features), blocks.Scratch(features.device)
    copied = blocks.new_gradient(features)
    for x, out in blocks.views_of_blocks(7, maps, blocks.matrices(copied)):
        held = scratch.like(x, "x", torch.float64).copy_(x)
        assert blocks.has_rows(held) == blocks.has_rows(x)
        out.copy_(held)
    assert blocks.has_rows(copied) or not blocks.has_rows(features)
    torch.testing.assert_close(copied, features, rtol=0, atol=0)


def test_scratch_is_used_again() -> None:
    scratch = blocks.Scratch(torch.device("cpu"))
    large = scratch("x", torch.float32, 4, 5)
    assert scratch("x", torch.float32, 2, 3).data_ptr() == large.data_ptr()
    assert scratch("x", torch.float32, 4, 5) is large
    assert scratch("x", torch.float32, 6, 5).shape == (6, 5)
    assert scratch("x", torch.float32, 4, 5) is not large
    assert scratch("y", torch.float64, 4, 5).dtype == torch.float64


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
