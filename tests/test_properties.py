"""Laws that hold for any input, searched for a counterexample."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import anchorda
from tests.oracles import Problem, draw

# Measured: 1e-6 for distances of up to 10 among features moved by up to 8; margins twice that.
TOLERANCE = 1e-5

sizes = st.integers(1, 9)
small_labels = st.integers(-1, 3)


@st.composite
def problems(draw_: st.DrawFn, dtype: torch.dtype = torch.float32) -> Problem:
    """Return a problem of random rank, size and classes, sometimes with an unseen class."""
    shape = [draw_(st.integers(1, 3)), *draw_(st.lists(st.integers(1, 5), max_size=3))]
    torch.manual_seed(draw_(st.integers(0, 2**31)))
    problem = draw(shape, draw_(st.integers(1, 6)), draw_(st.integers(2, 6)), dtype)
    if draw_(st.booleans()):
        problem.anchors[draw_(st.integers(0, len(problem.anchors) - 1))] = math.nan
    return problem


def losses(p: Problem) -> Tensor:
    """Return all losses of the features, in one vector."""
    values = [
        anchorda.anchor_distance_loss(p.features, p.labels, p.anchors, distance=kind, average=mean)
        for kind in ("euclidean", "squared", "smooth_l1")
        for mean in ("pixel", "class")
    ]
    return torch.stack([*values, anchorda.anchor_contrastive_loss(*_without_logits(p))])


def _without_logits(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return p.features, p.labels, p.anchors


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, check_dtype=False
    )


@given(problems(), st.floats(-8, 8, allow_subnormal=False))
def test_translation_changes_no_distance(p: Problem, offset: float) -> None:
    features, anchors = (p.features + offset).double(), (p.anchors + offset).double()
    # Back again: what is left of the features after the rounding of the sum.
    p = p._replace(features=features - offset, anchors=anchors - offset)
    assert_close(
        anchorda.anchor_distances(features, anchors),
        anchorda.anchor_distances(p.features, p.anchors),
    )
    labeler = anchorda.AnchorPseudoLabeler()
    assert_close(labeler(features, anchors).scores, labeler(p.features, p.anchors).scores)
    assert_close(losses(p._replace(features=features, anchors=anchors)), losses(p))


@given(problems(), st.randoms(use_true_random=False))
def test_order_of_the_pixels_means_nothing(p: Problem, random: Any) -> None:  # noqa: ANN401
    features, labels = p.features.movedim(1, 0).flatten(1)[None], p.labels.flatten()[None]
    order = list(range(labels.shape[1]))
    random.shuffle(order)
    moved = p._replace(features=features[..., order], labels=labels[:, order])
    p = p._replace(features=features, labels=labels)
    assert_close(losses(moved), losses(p))
    labeler = anchorda.AnchorPseudoLabeler(0.5)
    before, after = labeler(features, p.anchors), labeler(moved.features, p.anchors)
    assert_close(after.scores, before.scores[:, order])
    unsure = (before.scores[:, order] - 0.5).abs() < TOLERANCE
    assert torch.equal(after.labels[~unsure], before.labels[:, order][~unsure])
    num_classes = len(p.anchors)
    sums, counts = anchorda.class_sums(features, labels, num_classes)
    moved_sums, moved_counts = anchorda.class_sums(moved.features, moved.labels, num_classes)
    assert_close(moved_sums, sums, 1e-12)
    assert torch.equal(moved_counts, counts)


@given(problems(), st.randoms(use_true_random=False))
def test_names_of_the_classes_mean_nothing(p: Problem, random: Any) -> None:  # noqa: ANN401
    num_classes = len(p.anchors)
    order = list(range(num_classes))
    random.shuffle(order)
    new_name = torch.tensor(order).argsort()
    valid = (p.labels >= 0) & (p.labels < num_classes)
    labels = torch.where(valid, new_name[p.labels.clamp(0, num_classes - 1)], 255)
    renamed = p._replace(labels=labels, anchors=p.anchors[order])
    assert_close(losses(renamed), losses(p))
    assert_close(
        anchorda.anchor_distances(p.features, renamed.anchors),
        anchorda.anchor_distances(p.features, p.anchors)[:, order],
    )
    labeler = anchorda.AnchorPseudoLabeler(torch.rand(num_classes))
    before = labeler(p.features, p.anchors)
    labeler.min_margin = labeler.min_margin[order]
    after = labeler(p.features, renamed.anchors)
    assert_close(after.scores, before.scores)
    sure = (before.scores[..., None] - labeler.min_margin).abs().amin(dim=-1) > TOLERANCE
    expected = torch.where(
        before.labels < num_classes, new_name[before.labels.clamp(max=num_classes - 1)], 255
    )
    assert torch.equal(after.labels[sure], expected[sure])


@given(problems(), st.integers(-20, 20))
def test_relative_margin_has_no_scale(p: Problem, exponent: int) -> None:
    labeler = anchorda.AnchorPseudoLabeler(0.25, relative=True)
    labels, scores = labeler(p.features, p.anchors)
    assert ((scores >= 0) & (scores <= 1)).all()
    scale = 2.0**exponent  # Exact in floating point, so the answer is the same to the last bit.
    scaled = labeler(p.features * scale, p.anchors * scale)
    assert torch.equal(scaled.scores, scores)
    assert torch.equal(scaled.labels, labels)


@given(problems(), st.floats(0, 1, allow_subnormal=False), st.floats(0, 1, allow_subnormal=False))
def test_higher_minimum_activates_no_pixel(p: Problem, first: float, second: float) -> None:
    low, high = sorted((first, second))
    by_anchor = (p.features, p.anchors)
    labelers: list[tuple[Callable[[float], Any], tuple[Tensor, ...]]] = [
        (lambda minimum: anchorda.AnchorPseudoLabeler(4 * minimum), by_anchor),
        (lambda minimum: anchorda.AnchorPseudoLabeler(minimum, relative=True), by_anchor),
        (anchorda.ProbabilityPseudoLabeler, (p.logits,)),
    ]
    for labeler, inputs in labelers:
        lenient, strict = labeler(low)(*inputs), labeler(high)(*inputs)
        assert torch.equal(lenient.scores, strict.scores)
        kept = strict.labels != 255
        assert torch.equal(lenient.labels[kept], strict.labels[kept])
        assert (strict.labels == 255)[lenient.labels == 255].all()


@given(st.lists(st.tuples(small_labels, small_labels, small_labels), min_size=1))
def test_algebra_of_combined_labels(columns: list[tuple[int, int, int]]) -> None:
    a, b, c = torch.tensor(columns).T

    def agree(x: Tensor, y: Tensor) -> Tensor:
        return anchorda.combine_pseudo_labels(x, y, "agree", ignore_index=-1)

    def union(x: Tensor, y: Tensor) -> Tensor:
        return anchorda.combine_pseudo_labels(x, y, "union", ignore_index=-1)

    nothing = torch.full_like(a, -1)
    for combine in (agree, union):
        assert torch.equal(combine(a, b), combine(b, a))
        assert torch.equal(combine(a, a), a)
    assert torch.equal(agree(agree(a, b), c), agree(a, agree(b, c)))
    assert torch.equal(agree(a, nothing), nothing)
    assert torch.equal(union(a, nothing), a)
    kept = agree(a, b) >= 0
    assert torch.equal(union(a, b)[kept], agree(a, b)[kept])
    either = union(a, b)
    assert ((either == -1) | (either == a) | (either == b)).all()


@given(problems(), problems())
def test_sums_add_up_under_concatenation(first: Problem, second: Problem) -> None:
    num_classes = 4
    one, other = (
        (p.features.movedim(1, -1).flatten(0, -2)[:, :1], p.labels.flatten())
        for p in (first, second)
    )
    sums = [anchorda.class_sums(*part, num_classes) for part in (one, other)]
    both = anchorda.class_sums(
        torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]]), num_classes
    )
    assert_close(both.sums, sums[0].sums + sums[1].sums, 1e-12)
    assert torch.equal(both.counts, sums[0].counts + sums[1].counts)


@pytest.mark.parametrize("kind", ["anchors", "confusion", "quality"])
@given(st.lists(problems(), min_size=3, max_size=3))
def test_merging_is_associative_and_commutative(kind: str, parts: list[Problem]) -> None:
    states = [_state(kind, part) for part in parts]
    left = _merged(_merged(states[0], states[1]), states[2])
    right = _merged(states[0], _merged(states[1], states[2]))
    swapped = _merged(_merged(states[2], states[1]), states[0])
    for other in (right, swapped):
        assert torch.equal(other.counts, left.counts)
        if kind == "anchors":
            assert_close(other.means, left.means, 1e-12)


def _state(kind: str, p: Problem) -> Any:  # noqa: ANN401
    if kind == "anchors":
        anchors = anchorda.CategoryAnchors(4, 1)
        anchors.update(p.features[:, :1], p.labels)
        return anchors
    state = anchorda.ConfusionMatrix(4) if kind == "confusion" else anchorda.PseudoLabelQuality(4)
    state.update(p.logits.argmax(dim=1), p.labels)
    return state


def _merged(first: Any, second: Any) -> Any:  # noqa: ANN401
    merged = copy.deepcopy(first)
    merged.merge(second)
    return merged


@given(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=2), st.integers(0, 2**31))
def test_nearest_is_that_of_interpolate(ratios: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    # `interpolate` multiplies by a rounded float32 ratio: exact for powers of two.
    old = [new * 2 ** (k % 4) for new, k in ratios]
    for before, after in ((old, [new for new, _ in ratios]), ([new for new, _ in ratios], old)):
        labels = torch.randint(256, (2, *before))
        expected = torch.nn.functional.interpolate(labels[:, None].double(), after, mode="nearest")
        assert torch.equal(anchorda.resize_labels(labels, after), expected[:, 0].long())


@given(sizes, sizes, sizes, sizes, st.integers(0, 2**31))
def test_majority_of_everything_keeps_pure_cells_alone(
    height: int, width: int, new_height: int, new_width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    labels, size = torch.randint(2, (1, height, width)), (new_height, new_width)
    pool = torch.nn.functional.adaptive_avg_pool2d
    share = pool(labels.double(), size)
    # Adaptive pooling has the same cells, and its mean of 0s and 1s is exact where they are pure.
    expected = torch.where(share == 0, 0, torch.where(share == 1, 1, 255))
    resized = anchorda.resize_labels(labels, size, mode="majority", min_ratio=1.0)
    assert torch.equal(resized, expected)


@given(problems(), st.sampled_from([0.0, 1e30, math.nan, math.inf, -math.inf]))
def test_ignored_pixels_have_no_influence(p: Problem, value: float) -> None:
    num_classes = len(p.anchors)
    ignored = (p.labels < 0) | (p.labels >= num_classes)
    disturbed = p._replace(
        features=torch.where(ignored[:, None], value, p.features),
        logits=torch.where(ignored[:, None], value, p.logits),
    )
    assert torch.equal(losses(disturbed), losses(p))
    assert torch.equal(
        anchorda.discriminative_loss(disturbed.logits, p.labels),
        anchorda.discriminative_loss(p.logits, p.labels),
    )
    sums = anchorda.class_sums(p.features, p.labels, num_classes)
    assert torch.equal(
        anchorda.class_sums(disturbed.features, p.labels, num_classes).sums, sums.sums
    )


@given(problems())
def test_losses_bound_each_other(p: Problem) -> None:
    euclidean, squared, huber = losses(p)[[0, 2, 4]]
    # Jensen: the mean of squares is at least the square of the mean; and huber(t) ≤ t²/2.
    assert squared >= euclidean**2 * (1 - TOLERANCE)
    assert huber <= squared / (2 * p.features.shape[1]) * (1 + TOLERANCE)
    assert anchorda.anchor_contrastive_loss(*_without_logits(p)) >= 0
