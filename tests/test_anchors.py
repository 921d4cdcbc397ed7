"""Class sums, image centroids, and the filters over label maps."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import anchorda
from tests import oracles
from tests.oracles import BLOCKS, FLOATS, INTEGERS, LAYOUTS, SHAPES, draw, flat, lay_out, rows

# Inputs hold at most 24 bits, and products with 0 and 1 are exact: only float64 sums are rounded.
# Measured: 1e-15 for class sums; 6e-8, one rounding to float32, for image centroids.
SUM_TOLERANCE = 1e-13
MEAN_TOLERANCE = 1e-6


def assert_class_sums(features: Tensor, labels: Tensor, num_classes: int) -> None:
    sums, counts = anchorda.class_sums(features, labels, num_classes)
    expected_sums, expected_counts = oracles.class_sums(rows(features), flat(labels), num_classes)
    assert (sums.dtype, counts.dtype) == (torch.float64, torch.int64)
    assert not sums.requires_grad
    np.testing.assert_allclose(sums.numpy(), expected_sums, rtol=0, atol=SUM_TOLERANCE)
    np.testing.assert_array_equal(counts.numpy(), expected_counts)


def assert_image_centroids(
    features: Tensor, labels: Tensor, num_classes: int, min_pixels: int = 2
) -> None:
    means, classes = anchorda.image_centroids(
        features, labels, num_classes, min_pixels=min_pixels, ignore_index=-1
    )
    assert means.dtype == (torch.float64 if features.dtype == torch.float64 else torch.float32)
    assert classes.dtype == torch.int64
    assert means.shape == (features.shape[0], features.shape[1], num_classes)
    assert classes.shape == (features.shape[0], num_classes)
    for i in range(features.shape[0]):
        x, y = rows(features[i : i + 1]), flat(labels[i : i + 1])
        expected_means, expected_classes = oracles.image_centroids(
            x, y, num_classes, min_pixels, -1
        )
        np.testing.assert_allclose(means[i].detach().mT, expected_means, atol=MEAN_TOLERANCE)
        np.testing.assert_array_equal(classes[i], expected_classes)


@pytest.mark.parametrize(
    ("shape", "block_elements", "size"),
    oracles.pairwise(SHAPES, BLOCKS, [(3, 4), (1, 1), (5, 2)]),
    indirect=["block_elements"],
)
def test_sums_and_centroids_of_any_shape(
    shape: Sequence[int], block_elements: int, size: tuple[int, int]
) -> None:
    dim, num_classes = size
    problem = draw(shape, dim, num_classes)
    before = problem.features.clone(), problem.labels.clone()
    assert_class_sums(problem.features, problem.labels, num_classes)
    assert_image_centroids(problem.features, problem.labels, num_classes)
    assert torch.equal(problem.features, before[0])
    assert torch.equal(problem.labels, before[1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_elements", [7], indirect=True)
def test_sums_and_centroids_of_any_layout_and_dtype(
    dtype: torch.dtype, layout: str, block_elements: int
) -> None:
    problem = draw((3, 4, 5), dtype=dtype)
    features, labels = lay_out(problem.features, layout), lay_out(problem.labels, layout)
    assert_class_sums(features, labels, 4)
    assert_image_centroids(features, labels, 4)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    problem = draw((2, 5, 3))
    labels = torch.where((problem.labels >= 0) & (problem.labels < 4), problem.labels, 120)
    labels = labels.to(dtype)
    assert_class_sums(problem.features, labels, 4)
    assert_image_centroids(problem.features, labels, 4)
    kept = anchorda.keep_correct(labels, problem.logits, ignore_index=127)
    assert kept.dtype == dtype
    np.testing.assert_array_equal(
        flat(kept), oracles.keep_correct(flat(labels), rows(problem.logits), 127)
    )
    for mode in ("nearest", "majority"):
        resized = anchorda.resize_labels(labels, (3, 2), mode=mode, ignore_index=127)
        assert resized.dtype == dtype
        assert torch.equal(
            resized.long(),
            anchorda.resize_labels(labels.long(), (3, 2), mode=mode, ignore_index=127),
        )


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pixel_that_is_not_finite_never_contributes(value: float) -> None:
    problem = draw((2, 4, 5))
    labels = problem.labels.clamp(0, 3)
    clean = anchorda.class_sums(problem.features, torch.where(labels == 1, 255, labels), 4)
    features = problem.features.clone()
    features[:, 1] = torch.where(labels == 1, value, features[:, 1])
    assert_class_sums(features, labels, 4)
    assert_image_centroids(features, labels, 4)
    assert torch.equal(anchorda.class_sums(features, labels, 4).sums, clean.sums)


def test_image_centroids_without_one_class_are_nan_and_ignored() -> None:
    features = torch.tensor([[[1.0, 3.0, 5.0]]])
    means, labels = anchorda.image_centroids(
        features, torch.tensor([[0, 0, 1]]), num_classes=3, min_pixels=2
    )
    torch.testing.assert_close(means, torch.tensor([[[2.0, 5.0, math.nan]]]), equal_nan=True)
    assert labels.tolist() == [[0, 255, 255]]


@pytest.mark.usefixtures("block_elements")
def test_image_centroids_gradient() -> None:
    problem = draw((2, 3, 3), dtype=torch.float64)
    features = problem.features.requires_grad_()
    weights = torch.randn(2, 3, 4, dtype=torch.float64)

    def weighted_means(features: Tensor) -> Tensor:
        means, labels = anchorda.image_centroids(features, problem.labels, 4)
        return torch.where(labels[:, None] < 4, weights * means, 0.0).sum()

    assert torch.autograd.gradcheck(weighted_means, features)


@pytest.mark.parametrize("dtype", FLOATS)
def test_image_centroids_gradient_is_a_share_of_the_pixels_that_were_averaged(
    dtype: torch.dtype,
) -> None:
    features = torch.zeros(1, 2, 6, dtype=dtype)
    features[0, 1, 3] = math.nan
    features.requires_grad_()
    labels = torch.tensor([[0, 0, 255, 0, 1, -7]])
    means, classes = anchorda.image_centroids(features, labels, 3)
    loss = anchorda.anchor_distance_loss(means, classes, torch.ones(3, 2), distance="squared")
    loss.backward()
    assert features.grad is not None
    assert features.grad.dtype == dtype
    # d/dx of the mean over 2 classes of ‖x' − 1‖² at 0 is −1 per class mean.
    expected = torch.tensor([-0.5, -0.5, 0, 0, -1, 0], dtype=dtype).expand(1, 2, 6)
    torch.testing.assert_close(features.grad, expected, rtol=0, atol=0)


def test_image_centroids_of_nothing_are_connected() -> None:
    features = torch.randn(2, 3, 4, requires_grad=True)
    means, labels = anchorda.image_centroids(features, torch.full((2, 4), 255), 2)
    assert means.isnan().all()
    assert (labels == 255).all()
    loss = anchorda.anchor_distance_loss(means, labels, torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0
    assert features.grad is not None
    assert not features.grad.any()


@pytest.mark.parametrize(("shape", "layout", "dtype"), oracles.pairwise(SHAPES, LAYOUTS, FLOATS))
def test_keep_correct(shape: Sequence[int], layout: str, dtype: torch.dtype) -> None:
    problem = draw(shape, dtype=dtype)
    logits, labels = lay_out(problem.logits, layout), lay_out(problem.labels, layout)
    before = labels.clone()
    kept = anchorda.keep_correct(labels, logits)
    assert kept.shape == labels.shape
    np.testing.assert_array_equal(flat(kept), oracles.keep_correct(flat(labels), rows(logits), 255))
    assert torch.equal(labels, before)


@pytest.mark.parametrize(
    ("logits", "kept"),
    [
        ([math.nan, 0.0], 255),
        ([0.0, math.nan], 255),
        ([math.inf, 0.0], 0),
        ([0.0, -math.inf], 0),
        ([0.0, math.inf], 255),
    ],
)
def test_keep_correct_with_logits_that_are_not_finite(logits: list[float], kept: int) -> None:
    assert anchorda.keep_correct(torch.tensor([0]), torch.tensor([logits])).tolist() == [kept]


RESIZES: list[tuple[Sequence[int], Sequence[int]]] = [
    ((2, 6), (3,)),
    ((2, 7), (3,)),
    ((1, 3), (7,)),
    ((2, 5, 7), (5, 7)),
    ((2, 8, 6), (2, 3)),
    ((1, 9, 4), (2, 5)),
    ((2, 4, 5, 6), (2, 5, 4)),
    ((0, 4, 4), (2, 2)),
    ((5,), ()),
]


MODES: list[dict[str, Any]] = [
    {"mode": "nearest"},
    {"mode": "majority"},
    {"mode": "majority", "min_ratio": 0.0},
    {"mode": "majority", "min_ratio": 0.5, "ignore_index": -1},
    {"mode": "majority", "min_ratio": 1.0},
]


@pytest.mark.parametrize(("sizes", "options", "layout"), oracles.pairwise(RESIZES, MODES, LAYOUTS))
def test_resize_labels(
    sizes: tuple[Sequence[int], Sequence[int]], options: dict[str, Any], layout: str
) -> None:
    shape, size = sizes
    labels = lay_out(torch.tensor([-1, 0, 1, 250])[torch.randint(4, tuple(shape))], layout)
    before = labels.clone()
    resized = anchorda.resize_labels(labels, size, **options)
    assert resized.shape == (shape[0], *size)
    assert torch.equal(labels, before)
    for old, new in zip(labels.numpy(), resized.numpy(), strict=True):
        if options["mode"] == "nearest":
            expected = oracles.resize_nearest(np.asarray(old), size)
        else:
            ratio, ignore_index = options.get("min_ratio", 0.75), options.get("ignore_index", 255)
            expected = oracles.resize_majority(np.asarray(old), size, ratio, ignore_index)
        np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("size", [(2, 3), (19, 29), (25, 40)])
def test_majority_of_extreme_labels(size: tuple[int, int]) -> None:
    limits = torch.iinfo(torch.int64)
    labels = torch.tensor([limits.min, -1, 0, limits.max])[torch.randint(4, (2, 20, 30))]
    resized = anchorda.resize_labels(labels, size, mode="majority", min_ratio=0.3, ignore_index=7)
    for image, expected in zip(labels, resized, strict=True):
        oracle = oracles.resize_majority(image.numpy(), size, 0.3, 7)
        np.testing.assert_array_equal(expected.numpy(), oracle)


@pytest.mark.parametrize("total", range(1, 13))
def test_majority_needs_at_least_its_ratio(total: int) -> None:
    for part in range(total // 2 + 1, total + 1):
        labels = torch.tensor([[7] * part + list(range(20, 20 + total - part))])
        ratio = part / total
        enough = anchorda.resize_labels(labels, (1,), mode="majority", min_ratio=ratio)
        assert enough.item() == 7
        if part < total:
            above = math.nextafter(ratio, 1.0) + 1e-6
            short = anchorda.resize_labels(labels, (1,), mode="majority", min_ratio=above)
            assert short.item() == 255


@pytest.mark.parametrize("ignore_index", [-1, 4, 255, 1000])
def test_ignored_is_the_ignore_index(ignore_index: int) -> None:
    labels, logits = torch.tensor([[0, 0, 1, 1]]), torch.zeros(1, 4, 4)
    options = {"ignore_index": ignore_index}
    assert anchorda.keep_correct(labels, logits, **options)[0, 2:].tolist() == [ignore_index] * 2
    resized = anchorda.resize_labels(labels, (1,), mode="majority", ignore_index=ignore_index)
    assert resized.tolist() == [[ignore_index]]
    _, centroid_labels = anchorda.image_centroids(
        torch.zeros(1, 2, 4), labels, 4, ignore_index=ignore_index
    )
    assert centroid_labels.tolist() == [[0, 1, ignore_index, ignore_index]]


def test_ignore_index_may_not_be_a_class() -> None:
    labels, features = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, 4)
    with pytest.raises(ValueError, match="outside of the 256 classes, but got 255"):
        anchorda.image_centroids(features, labels, 256)


@pytest.mark.parametrize(
    ("dtype", "ignore_index"), [(torch.int8, 255), (torch.uint8, -1), (torch.uint16, 2**16)]
)
def test_ignore_index_must_fit_the_labels(dtype: torch.dtype, ignore_index: int) -> None:
    labels = torch.zeros(1, 4, dtype=dtype)
    with pytest.raises(ValueError, match=r"Convert them with labels\.long\(\)"):
        anchorda.keep_correct(labels, torch.zeros(1, 2, 4), ignore_index=ignore_index)
    with pytest.raises(ValueError, match=r"Convert them with labels\.long\(\)"):
        anchorda.resize_labels(labels, (2,), mode="majority", ignore_index=ignore_index)
