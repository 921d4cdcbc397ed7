"""What the operators promise beyond their results: bounded blocks, and no look at the values."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from anchorda._ops import reference

SHAPES = [(3, 5), (1, 256, 1, 4096), (2, 8, 100, 3), (1, 4, 7, 30, 50), (100, 2, 3), (0, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_classes", [1, 19, 1000])
@pytest.mark.parametrize("limit", [1, 64, 5000])
def test_blocks_are_bounded_and_cover_every_pixel_once(
    shape: tuple[int, ...], num_classes: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS_CPU", limit)
    visits = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    per_pixel = max(min(shape[1], reference._most_channels(torch.empty(shape))), num_classes)
    for block in itertools.islice(reference._blocks(torch.empty(shape), num_classes), 20000):
        pixels = visits[block].numel()
        assert pixels == 1 or pixels * per_pixel <= limit
        visits[block] += 1
    if limit > 1:
        assert (visits == 1).all()


def test_blocks_are_few_where_much_fits() -> None:
    features = torch.empty(8, 64, 30, 40, device="meta")
    pixels = 8 * 30 * 40
    fewest = math.ceil(pixels * 64 / reference._BLOCK_ELEMENTS_GPU)
    assert len(list(reference._blocks(features))) <= 2 * fewest


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
    sums, counts = reference.image_sums(features, labels, 19)
    assert (sums.shape, counts.shape) == ((n, 19, d), (n, 19))
    assert reference.image_sums_backward(sums, features, labels).shape == shape
    assert reference.anchor_distances(features, anchors).shape == distances.shape
    grad = reference.anchor_distances_backward(distances, distances, features, anchors)
    assert grad.shape == shape
    assert {r.shape for r in reference.nearest_anchors(features, anchors)} == {losses.shape}
    for distance in ("euclidean", "squared", "smooth_l1"):
        assert reference.pixel_losses(features, labels, anchors, distance).shape == losses.shape
        grad = reference.pixel_losses_backward(losses, losses, features, labels, anchors, distance)
        assert grad.shape == shape
