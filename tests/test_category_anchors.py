"""The streaming accumulator: its mathematics, its state and its precision."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import anchorda
from anchorda import AnchorPseudoLabeler, CategoryAnchors, ProbabilityPseudoLabeler
from tests import oracles
from tests.oracles import draw, flat, rows

Options = dict[str, Any]
# Measured: 1e-16 for means of size 1, whatever the order and the split of the stream.
TOLERANCE = 1e-13
OPTIONS: list[Options] = [
    *({}, {"max_count": 1}, {"max_count": 30}),
    *({"momentum": 0.0}, {"momentum": 0.25}, {"momentum": 1.0}),
]
Batch = tuple[Tensor, Tensor]


def stream(batches: int = 6, dtype: torch.dtype = torch.float32) -> list[Batch]:
    """Return batches in which class 3 comes late and class 4 never."""
    drawn = [draw((2, 4, 5), num_classes=5, dtype=dtype) for _ in range(batches)]
    return [
        (p.features, p.labels.masked_fill((p.labels == 4) | ((p.labels == 3) & (i < 3)), 255))
        for i, p in enumerate(drawn)
    ]


def accumulated(batches: list[Batch], options: Options | None = None) -> CategoryAnchors:
    anchors = CategoryAnchors(5, 3, **(options or {}))
    for features, labels in batches:
        anchors.update(features, labels)
    return anchors


def assert_same(first: CategoryAnchors, second: CategoryAnchors, tolerance: float) -> None:
    assert torch.equal(first.counts, second.counts)
    torch.testing.assert_close(first.means, second.means, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_stream(options: Options, dtype: torch.dtype) -> None:
    batches = stream(dtype=dtype)
    before = [(features.clone(), labels.clone()) for features, labels in batches]
    anchors = accumulated(batches, options)
    expected, counts = oracles.stream_anchors(
        ((rows(features), flat(labels)) for features, labels in batches), 5, 3, **options
    )
    np.testing.assert_array_equal(anchors.counts, counts)
    assert anchors.seen.tolist() == [True, True, True, True, False]
    means = torch.where(anchors.seen[:, None], anchors.means, math.nan)
    np.testing.assert_allclose(means, expected, rtol=0, atol=TOLERANCE)
    centroids = anchors.compute()
    assert centroids.dtype == torch.float32
    np.testing.assert_array_equal(centroids, expected.astype(np.float32))
    for used, copied in zip(batches, before, strict=True):
        assert all(map(torch.equal, used, copied))


def test_sums_are_a_batch() -> None:
    batches = stream()
    anchors = CategoryAnchors(5, 3)
    for features, labels in batches:
        anchors.update_sums(*anchorda.class_sums(features, labels, 5))
    assert_same(anchors, accumulated(batches), 0.0)
    single = CategoryAnchors(1, 2)
    single.update_sums(torch.tensor([[2.0, 4.0]]).half(), torch.tensor([4], dtype=torch.uint8))
    assert single.compute().tolist() == [[0.5, 1.0]]
    assert single.counts.dtype == torch.int64


def test_exact_mean_is_independent_of_order_and_split() -> None:
    batches = stream()
    whole = accumulated(batches)
    assert_same(accumulated(batches[::-1]), whole, TOLERANCE)
    images = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(2)]
    assert_same(accumulated(images), whole, TOLERANCE)
    joined = (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    assert_same(accumulated([joined]), whole, TOLERANCE)


def test_merge_is_one_stream() -> None:
    batches = stream()
    merged = accumulated(batches[:4])
    merged.merge(accumulated(batches[4:]))
    assert_same(merged, accumulated(batches), TOLERANCE)
    empty = CategoryAnchors(5, 3)
    empty.merge(merged)
    assert_same(empty, merged, 0.0)
    merged.merge(CategoryAnchors(5, 3))
    assert_same(empty, merged, 0.0)
    doubled = copy.deepcopy(merged)
    doubled.merge(doubled)
    assert torch.equal(doubled.counts, 2 * merged.counts)
    torch.testing.assert_close(doubled.means, merged.means, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("options", [{"max_count": 30}, {"momentum": 0.1}])
def test_merge_of_forgetful_ones_weighs_by_their_counts(options: Options) -> None:
    batches = stream()
    first, second = accumulated(batches[:3], options), accumulated(batches[3:], options)
    seen = (first.seen | second.seen)[:, None]
    weights = first.counts[:, None].double(), second.counts[:, None].double()
    expected = (weights[0] * first.means + weights[1] * second.means) / (weights[0] + weights[1])
    total = first.counts + second.counts
    first.merge(second)
    torch.testing.assert_close(
        first.means, torch.where(seen, expected, 0.0), rtol=0, atol=TOLERANCE
    )
    assert torch.equal(first.counts, total.clamp(max=options.get("max_count", 10**9)))


@pytest.mark.parametrize("other", [(4, 3, {}), (5, 2, {}), (5, 3, {"max_count": 7})])
def test_merge_needs_equal_settings(other: tuple[int, int, dict[str, Any]]) -> None:
    *sizes, options = other
    with pytest.raises(ValueError, match="Merge equal settings only"):
        CategoryAnchors(5, 3).merge(CategoryAnchors(*sizes, **options))


NUMPY: list[Callable[[Tensor], Any]] = [lambda tensor: tensor, lambda tensor: tensor.numpy()]


@pytest.mark.parametrize("given", NUMPY, ids=["tensor", "array"])
@pytest.mark.parametrize("options", OPTIONS)
def test_centroids_and_back(options: Options, given: Callable[[Tensor], Any]) -> None:
    anchors = accumulated(stream(), options)
    centroids, counts = anchors.compute(), anchors.counts.clone()
    before = centroids.clone(), counts.clone()
    twin = CategoryAnchors.from_centroids(given(centroids), given(counts), **options)
    assert repr(twin) == repr(anchors)
    assert torch.equal(twin.counts, anchors.counts)
    assert (twin.means.dtype, twin.counts.dtype) == (torch.float64, torch.int64)
    torch.testing.assert_close(twin.compute(), centroids, rtol=0, atol=0, equal_nan=True)
    twin.update(*stream()[0])
    for kept, copied in zip((centroids, counts), before, strict=True):
        torch.testing.assert_close(kept, copied, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("given", NUMPY, ids=["tensor", "array"])
@pytest.mark.parametrize("options", OPTIONS)
def test_stream_goes_on_from_centroids(options: Options, given: Callable[[Tensor], Any]) -> None:
    batches = stream()
    stopped, whole = accumulated(batches[:3], options), accumulated(batches, options)
    exact = torch.where(stopped.seen[:, None], stopped.means, math.nan)
    # Measured for means of size 1: 0 from the float64 means, 4e-8 from those of `compute`.
    for centroids, tolerance in ((exact, 0.0), (stopped.compute(), 4e-7)):
        going_on = CategoryAnchors.from_centroids(
            given(centroids), given(stopped.counts), **options
        )
        for features, labels in batches[3:]:
            going_on.update(features, labels)
        assert_same(going_on, whole, tolerance)


def test_centroids_without_counts_weigh_as_one_feature() -> None:
    centroids = np.array([[4.0, 8.0], [math.nan, 1.0], [0.0, 0.0], [math.inf, 0.0]])
    anchors = CategoryAnchors.from_centroids(centroids)
    assert anchors.counts.tolist() == [1, 0, 1, 0]
    expected = CategoryAnchors(4, 2)
    expected.update(torch.tensor([[4.0, 8.0], [0.0, 0.0]]), torch.tensor([0, 2]))
    assert_same(anchors, expected, 0.0)
    anchors.update(torch.tensor([[1.0, 2.0]] * 3 + [[5.0, 5.0]]), torch.tensor([0, 0, 0, 1]))
    assert anchors.compute()[:2].tolist() == [[1.75, 3.5], [5.0, 5.0]]


def test_a_class_is_seen_if_its_row_is_finite_and_its_count_positive() -> None:
    centroids = torch.tensor([[1.0], [2.0], [math.nan], [math.nan]])
    anchors = CategoryAnchors.from_centroids(centroids, torch.tensor([5, 0, 7, 0]), max_count=3)
    assert anchors.counts.tolist() == [3, 0, 0, 0]
    assert anchors.means.tolist() == [[1.0], [0.0], [0.0], [0.0]]


@pytest.mark.parametrize(
    "awkward",
    [
        np.arange(6.0, dtype=">f4").reshape(3, 2),
        np.arange(6.0, dtype=np.float16).reshape(3, 2),
        np.arange(6.0, dtype=np.longdouble).reshape(3, 2),
        np.arange(5.0, -1.0, -1.0)[::-1].reshape(3, 2),
        np.asfortranarray(np.arange(6.0).reshape(3, 2)),
        np.broadcast_to(np.arange(6.0).reshape(3, 2), (3, 2)),  # read-only
    ],
    ids=["big-endian", "float16", "longdouble", "reversed", "Fortran", "read-only"],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, ">i8", np.uint64])
def test_arrays_of_any_kind(awkward: Any, dtype: Any) -> None:  # noqa: ANN401
    anchors = CategoryAnchors.from_centroids(awkward, np.array([1, 2, 200]).astype(dtype))
    assert anchors.compute().tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert anchors.counts.tolist() == [1, 2, 200]


TWO = np.ones((2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (TWO.astype(np.int64),),
            "`centroids` of a floating-point dtype, but got int64. Convert it with "
            "centroids.astype('float64').",
        ),
        (
            (torch.ones(2, 3, dtype=torch.int64),),
            "`centroids` of a floating-point dtype, but got torch.int64. Convert them with "
            "centroids.float().",
        ),
        (
            ([[1.0]],),
            "`centroids` to be a torch.Tensor, but got list. Convert it with "
            "torch.as_tensor(centroids).",
        ),
        (
            (TWO, np.ones(2)),
            "`counts` of an integer dtype, but got float64. Convert it with "
            "counts.astype('int64').",
        ),
        (
            (TWO, torch.ones(2)),
            "`counts` of an integer dtype, but got torch.float32. Convert them with counts.long().",
        ),
    ],
)
def test_centroids_of_wrong_types(arguments: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(TypeError) as raised:
        CategoryAnchors.from_centroids(*arguments)
    assert str(raised.value) == f"Expected {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(3),), "`centroids` of shape (C, D), one row for each class, but got (3,)."),
        (
            (np.ones((2, 0)),),
            "`centroids` of shape (C, D), one row for each class, but got (2, 0).",
        ),
        (
            (TWO, np.ones(3, np.int64)),
            "`counts` of shape (C,) = (2,) to match `centroids`, but got (3,).",
        ),
        (
            (TWO, np.array([4, -1])),
            "`counts` of at least 0, but got -1. A class that was never seen has the count 0.",
        ),
        (
            (torch.ones(2, 3), torch.ones(2, dtype=torch.int64, device="meta")),
            "`counts` on cpu like `centroids`, but got meta. Move them with .to(centroids.device).",
        ),
    ],
)
def test_rejected_centroids(arguments: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match="Expected") as raised:
        CategoryAnchors.from_centroids(*arguments)
    assert str(raised.value) == f"Expected {message}"


def test_centroids_exclude_options_as_the_constructor_does() -> None:
    with pytest.raises(ValueError, match="Expected `max_count` or `momentum`, but got both"):
        CategoryAnchors.from_centroids(np.ones((2, 3)), max_count=10, momentum=0.1)


def test_reset_forgets_everything() -> None:
    anchors = accumulated(stream())
    anchors.reset()
    assert not anchors.seen.any()
    assert anchors.compute().isnan().all()
    batches = stream()
    for features, labels in batches:
        anchors.update(features, labels)
    assert_same(anchors, accumulated(batches), 0.0)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda anchors: pickle.loads(pickle.dumps(anchors)),
        lambda anchors: _restored(anchors, assign=False),
        lambda anchors: _restored(anchors, assign=True),
    ],
    ids=["deepcopy", "pickle", "state_dict", "state_dict_assign"],
)
def test_copies_are_bit_exact_and_independent(
    copied: Callable[[CategoryAnchors], CategoryAnchors],
) -> None:
    batches = stream()
    anchors = accumulated(batches[:3])
    twin = copied(anchors)
    assert repr(twin) == repr(anchors)
    assert_same(twin, anchors, 0.0)
    for features, labels in batches[3:]:
        twin.update(features, labels)
    assert_same(twin, accumulated(batches), 0.0)
    assert_same(anchors, accumulated(batches[:3]), 0.0)


def _restored(anchors: CategoryAnchors, assign: bool) -> CategoryAnchors:
    state = {name: value.clone() for name, value in anchors.state_dict().items()}
    assert set(state) == {"means", "counts"}
    restored = CategoryAnchors(5, 3)
    restored.load_state_dict(state, assign=assign)
    return restored


@pytest.mark.parametrize(
    "cast",
    [
        lambda parent: parent.half(),
        lambda parent: parent.bfloat16(),
        lambda parent: parent.double(),
        lambda parent: parent.float(),
        lambda parent: parent.to(torch.float16),
        lambda parent: parent.to("cpu", torch.bfloat16),
        lambda parent: parent.type(torch.float16),
    ],
)
def test_casting_a_parent_changes_the_network_and_no_state(
    cast: Callable[[nn.Module], nn.Module],
) -> None:
    anchors = accumulated(stream())
    margin = AnchorPseudoLabeler(torch.tensor([0.1, 2.503, 1e-9]))
    probability = ProbabilityPseudoLabeler(0.9501)
    parent = nn.ModuleList([nn.Linear(2, 2), anchors, nn.ModuleList([margin, probability])])
    means, minimum = anchors.means.clone(), margin.min_margin.clone()
    linear = parent[0]
    assert isinstance(linear, nn.Linear)
    dtype = linear.weight.dtype
    cast(parent)
    assert linear.weight.dtype != dtype or cast(parent) is parent
    assert torch.equal(anchors.means, means)
    assert (anchors.means.dtype, anchors.counts.dtype) == (torch.float64, torch.int64)
    assert torch.equal(margin.min_margin, minimum)
    assert margin.min_margin.dtype == probability.min_probability.dtype == torch.float32
    assert probability.min_probability.item() == torch.tensor(0.9501).item()


def test_meta_device_and_to_empty() -> None:
    with torch.device("meta"):
        anchors = CategoryAnchors(5, 3)
    assert anchors.means.is_meta
    anchors = anchors.half().to_empty(device="cpu")
    assert (anchors.means.dtype, anchors.counts.dtype) == (torch.float64, torch.int64)
    anchors.reset()
    assert anchors.compute().isnan().all()
    anchors.load_state_dict(accumulated(stream()).state_dict())
    assert anchors.seen.any()
    assert CategoryAnchors(5, 3).to("meta").means.is_meta


@pytest.mark.parametrize("kind", [AnchorPseudoLabeler, ProbabilityPseudoLabeler])
def test_labelers_on_the_meta_device(kind: type[nn.Module]) -> None:
    with torch.device("meta"):
        labeler = kind(0.5)
    labeler.to_empty(device="cpu").load_state_dict(kind(0.5).state_dict())
    assert labeler.state_dict() == kind(0.5).state_dict()


def test_settings_are_shown() -> None:
    shown = "CategoryAnchors(num_classes=2, feature_dim=3, max_count=10, momentum=None)"
    assert repr(CategoryAnchors(2, 3, max_count=10)) == shown


def test_hundred_million_pixels_agree_to_1e_6() -> None:
    num_classes, pixels, steps = 2, 2_500_000, 40
    # A zero-sum pattern around means that float32 holds exactly: float32 sums of so many such
    # numbers would stand still at 2²⁴ times one of them. In
    # float64 every sum of them is exact, in any order, and so is the mean: well within 1e-6.
    means = torch.tensor([[1000.0, -3.0, 0.25, 2**-10], [-2000.0, 5.0, 1e4, -(2**-10)]])
    labels = torch.arange(pixels) % 2
    pattern = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(pixels // 4)
    features = means[labels].T.contiguous()[None] + pattern
    anchors = CategoryAnchors(num_classes, 4)
    for _ in range(steps):
        anchors.update(features, labels[None])
    assert anchors.counts.tolist() == [pixels * steps // 2] * 2
    assert anchors.counts.sum().item() == 10**8
    assert torch.equal(anchors.means, means.double())
    assert torch.equal(anchors.compute(), means)
