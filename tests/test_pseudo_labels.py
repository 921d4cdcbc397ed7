"""Distances to the anchors, and the labelers."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import anchorda
from anchorda import AnchorPseudoLabeler, ProbabilityPseudoLabeler
from anchorda._ops import reference
from tests import oracles
from tests.oracles import BLOCKS, FLOATS, LAYOUTS, SHAPES, draw, flat, lay_out, pairwise, rows

# Measured: 5e-7, one rounding to float32 of distances up to 8, and two in a margin.
TOLERANCE = 2e-6
NAN, INF = math.nan, math.inf


def assert_distances(features: Tensor, anchors: Tensor) -> None:
    distances = anchorda.anchor_distances(features, anchors)
    assert distances.dtype == (torch.float64 if features.dtype == torch.float64 else torch.float32)
    assert distances.shape == (features.shape[0], anchors.shape[0], *features.shape[2:])
    expected = oracles.anchor_distances(rows(features), anchors.double().numpy())
    np.testing.assert_allclose(rows(distances), expected, rtol=0, atol=TOLERANCE)


def assert_margin_labels(
    features: Tensor, anchors: Tensor, min_margin: float | Tensor, relative: bool = False
) -> None:
    labeler = AnchorPseudoLabeler(min_margin, relative=relative, ignore_index=-3)
    labels, scores = labeler(features, anchors)
    assert (labels.dtype, scores.dtype) == (torch.int64, torch.float32)
    assert labels.shape == scores.shape == (features.shape[0], *features.shape[2:])
    minimum = torch.as_tensor(min_margin).expand(anchors.shape[0]).tolist()
    expected_labels, expected_scores = oracles.margin_labels(
        rows(features), anchors.double().numpy(), minimum, relative, -3
    )
    flat_scores = scores.reshape(-1).double().numpy()
    np.testing.assert_allclose(flat_scores, expected_scores, rtol=0, atol=TOLERANCE)
    # Where a score is as near to its minimum as it is rounded, both answers are right.
    unsure = [any(abs(score - m) < TOLERANCE for m in minimum) for score in expected_scores]
    np.testing.assert_array_equal(np.where(unsure, 0, flat(labels) - expected_labels), 0)
    assert not np.all(unsure) or not len(unsure)


@pytest.mark.parametrize(
    ("shape", "block_elements", "size"),
    pairwise(SHAPES, BLOCKS, [(3, 4), (1, 1), (1, 3), (6, 2)]),
    indirect=["block_elements"],
)
def test_any_shape(shape: Sequence[int], block_elements: int, size: tuple[int, int]) -> None:
    dim, num_classes = size
    features, _, _, anchors = draw(shape, dim, num_classes)
    before = features.clone(), anchors.clone()
    assert_distances(features, anchors)
    assert_margin_labels(features, anchors, 0.8)
    assert_margin_labels(features, anchors, 0.3, relative=True)
    assert torch.equal(features, before[0])
    assert torch.equal(anchors, before[1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_elements", [7], indirect=True)
def test_any_layout_and_dtype(dtype: torch.dtype, layout: str, block_elements: int) -> None:
    features, _, _, anchors = draw((3, 4, 5), dtype=dtype)
    features, anchors = lay_out(features, layout), anchors.T.contiguous().T
    assert_distances(features, anchors)
    assert_margin_labels(features, anchors, 0.8)
    assert_margin_labels(features, anchors.to(dtype), torch.tensor([0.1, INF, 0.5, 2.0]))


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("unseen", [[1], [0, 2], [0, 1, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("marker", [NAN, INF])
def test_unseen_class_never_wins_and_is_never_runner_up(unseen: list[int], marker: float) -> None:
    features, _, _, anchors = draw((2, 3, 4))
    anchors[unseen] = 0.0  # The nearest of all, if it were not for one number.
    anchors[unseen, 1] = marker
    assert_distances(features, anchors)
    for relative in (False, True):
        assert_margin_labels(features, anchors, 0.1, relative)
    labels, scores = AnchorPseudoLabeler()(features, anchors)
    assert not torch.isin(labels, torch.tensor(unseen)).any()
    if len(unseen) == 3:
        assert (labels == 2).all()
        assert (scores == INF).all()
        assert (AnchorPseudoLabeler(relative=True)(features, anchors).scores == 1).all()
        assert (AnchorPseudoLabeler(INF)(features, anchors).labels == 255).all()
    if len(unseen) == 4:
        assert (labels == 255).all()
        assert (scores == 0).all()


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_pixel_that_is_not_finite_is_ignored_whatever_its_neighbors(value: float) -> None:
    features, _, _, anchors = draw((2, 3, 4))
    features[1, 2, 1, 1] = value
    anchors[3] = NAN
    assert_distances(features, anchors)
    assert_margin_labels(features, anchors, 0.5)
    labels, scores = AnchorPseudoLabeler(0.5)(features, torch.nan_to_num(anchors, nan=1e4))
    clean = AnchorPseudoLabeler(0.5)(features.nan_to_num(0.0, 0.0, 0.0), anchors.nan_to_num(1e4))
    assert labels[1, 1, 1] == 255
    assert scores[1, 1, 1] == 0
    others = torch.ones(2, 3, 4, dtype=torch.bool)
    others[1, 1, 1] = False
    assert torch.equal(labels[others], clean.labels[others])
    assert torch.equal(scores[others], clean.scores[others])


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_operator_where_nothing_can_win(value: float) -> None:
    features, _, _, anchors = draw((2, 3))
    features[0, 1, 2] = value
    classes, nearest, second = reference.nearest_anchors(features, anchors)
    won = torch.ones(2, 3, dtype=torch.bool)
    won[0, 2] = False
    assert classes[0, 2] == -1
    assert nearest[0, 2] == second[0, 2] == INF
    assert torch.equal(classes >= 0, won)
    assert torch.equal(nearest.isfinite() & second.isfinite(), won)


def test_margin_must_exceed_the_minimum_strictly() -> None:
    anchors, features = torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [0.5], [3.0]])
    labels, scores = AnchorPseudoLabeler(2.0)(features, anchors)
    assert labels.tolist() == [255, 0, 255]
    assert scores.tolist() == [2.0, 3.0, 2.0]
    below = math.nextafter(2.0, 0.0) - 1e-6
    assert AnchorPseudoLabeler(below)(features, anchors).labels.tolist() == [0, 0, 1]
    per_class = AnchorPseudoLabeler(torch.tensor([INF, 1.5]))
    assert per_class(features, anchors).labels.tolist() == [255, 255, 1]


def test_relative_margin_is_the_share_of_the_second_distance() -> None:
    anchors, features = torch.tensor([[0.0], [4.0]]), torch.tensor([[0.0], [1.0], [2.0], [4.0]])
    labels, scores = AnchorPseudoLabeler(0.5, relative=True)(features, anchors)
    torch.testing.assert_close(scores, torch.tensor([1.0, 2 / 3, 0.0, 1.0]))
    assert labels.tolist() == [0, 0, 255, 1]
    # Two anchors in one place, and the feature there as well: 0/0 is no margin.
    labels, scores = AnchorPseudoLabeler(relative=True)(torch.zeros(1, 2), torch.zeros(3, 2))
    assert labels.tolist() == [255]
    assert scores.tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_of_equally_near_classes_the_first_wins_and_the_margin_is_zero(dtype: torch.dtype) -> None:
    for num_classes in (2, 3, 5, 19):
        anchors = torch.randn(num_classes, 64)
        anchors[-1] = anchors[0]
        features = (anchors[0] + 0.1 * torch.randn(500, 64)).to(dtype)
        classes, nearest, second = reference.nearest_anchors(features, anchors)
        assert (classes == 0).all()
        assert torch.equal(nearest, second)
        assert (AnchorPseudoLabeler()(features, anchors).labels == 255).all()


def test_scores_are_never_nan_for_finite_features() -> None:
    features, anchors = torch.full((1, 4), 3e38), torch.tensor([[0.0] * 4, [1.0] * 4])
    assert not AnchorPseudoLabeler()(features, anchors).scores.isnan().any()


@pytest.mark.usefixtures("block_elements")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_give_the_answer_of_the_same_rounded_float32(
    dtype: torch.dtype,
) -> None:
    features, _, logits, anchors = draw((2, 5, 3), dtype=dtype)
    for half, single in zip(
        (
            anchorda.anchor_distances(features, anchors),
            *AnchorPseudoLabeler(0.5)(features, anchors),
            *ProbabilityPseudoLabeler(0.5)(logits),
        ),
        (
            anchorda.anchor_distances(features.float(), anchors),
            *AnchorPseudoLabeler(0.5)(features.float(), anchors),
            *ProbabilityPseudoLabeler(0.5)(logits.float()),
        ),
        strict=True,
    ):
        assert torch.equal(half, single)


@pytest.mark.usefixtures("block_elements")
def test_distances_gradient() -> None:
    features, _, _, anchors = draw((2, 3, 2), dtype=torch.float64)
    anchors[1] = NAN
    features.requires_grad_()

    def finite_distances(features: Tensor) -> Tensor:
        distances = anchorda.anchor_distances(features, anchors)
        return distances[:, [0, 2, 3]]

    assert torch.autograd.gradcheck(finite_distances, features)


def test_distances_gradient_at_an_anchor_is_zero() -> None:
    anchors = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    features = torch.zeros(1, 2, requires_grad=True)
    distances = anchorda.anchor_distances(features, anchors)
    (gradient,) = torch.autograd.grad(distances[0, 0], features, retain_graph=True)
    assert gradient.tolist() == [[0.0, 0.0]]
    (gradient,) = torch.autograd.grad(distances[0, 1], features)
    torch.testing.assert_close(gradient, torch.tensor([[-0.6, -0.8]]))


def test_nothing_is_differentiable_in_the_anchors_or_through_a_labeler() -> None:
    features, _, logits, anchors = draw((2, 3))
    for tensor in (features, logits, anchors):
        tensor.requires_grad_()
    anchorda.anchor_distances(features, anchors).sum().backward()
    assert anchors.grad is None
    assert not AnchorPseudoLabeler()(features, anchors).scores.requires_grad
    assert not ProbabilityPseudoLabeler()(logits).scores.requires_grad


@pytest.mark.parametrize(("shape", "layout", "dtype"), pairwise(SHAPES, LAYOUTS, FLOATS))
def test_probability_labels(shape: Sequence[int], layout: str, dtype: torch.dtype) -> None:
    logits = lay_out(draw(shape, dtype=dtype).logits, layout)
    before = logits.clone()
    for minimum in ([0.7] * 4, [0.5, 0.9, 1.0, 0.3]):
        labels, scores = ProbabilityPseudoLabeler(torch.tensor(minimum), ignore_index=-3)(logits)
        assert (labels.dtype, scores.dtype) == (torch.int64, torch.float32)
        expected_labels, expected_scores = oracles.probability_labels(rows(logits), minimum, -3)
        # Measured: 1.2e-7, two roundings of numbers below 1.
        np.testing.assert_allclose(scores.reshape(-1).numpy(), expected_scores, atol=1e-6)
        clear = [all(abs(s - m) > 1e-6 for m in minimum) for s in expected_scores]
        np.testing.assert_array_equal(flat(labels)[clear], expected_labels[clear])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("logits", "label"),
    [
        ([0.0, NAN], 255),
        ([NAN, 9.0], 255),
        ([INF, 0.0], 255),
        ([-INF, -INF], 255),
        ([-INF, 0.0], 1),
        ([0.0, 9.0], 1),
    ],
)
def test_probability_where_the_softmax_is_not_finite(logits: list[float], label: int) -> None:
    neighbors = torch.tensor([logits, [9.0, 0.0]]).T[None]
    labels, scores = ProbabilityPseudoLabeler()(neighbors)
    assert labels.tolist() == [[label, 0]]
    assert (scores[0, 0] == 0) == (label == 255)
    assert scores.isfinite().all()


def test_probability_must_exceed_the_minimum_strictly() -> None:
    logits = torch.zeros(1, 2)
    assert ProbabilityPseudoLabeler(0.5)(logits).labels.tolist() == [255]
    assert ProbabilityPseudoLabeler(0.4999)(logits).labels.item() in (0, 1)
    certain = torch.tensor([[0.0, 200.0]])
    assert ProbabilityPseudoLabeler(1.0)(certain).labels.tolist() == [255]


def test_default_minimum_probability_is_that_of_the_released_code() -> None:
    odds = torch.tensor([[0.0, math.log(0.951 / 0.049)], [0.0, math.log(0.949 / 0.051)]])
    assert ProbabilityPseudoLabeler()(odds).labels.tolist() == [1, 255]


@pytest.mark.parametrize("ignore_index", [-1, 2, 255])
def test_ignore_index(ignore_index: int) -> None:
    anchors = torch.tensor([[0.0], [1.0]])
    labels, _ = AnchorPseudoLabeler(ignore_index=ignore_index)(torch.tensor([[0.5]]), anchors)
    assert labels.tolist() == [ignore_index]
    labels, _ = ProbabilityPseudoLabeler(ignore_index=ignore_index)(torch.zeros(1, 2))
    assert labels.tolist() == [ignore_index]


def test_ignore_index_may_not_be_a_class() -> None:
    with pytest.raises(ValueError, match="outside of the 2 classes, but got 1"):
        AnchorPseudoLabeler(ignore_index=1)(torch.zeros(1, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="outside of the 300 classes, but got 255"):
        ProbabilityPseudoLabeler()(torch.zeros(1, 300))


@pytest.mark.parametrize("ignore_index", [255, -1])
def test_combine_pseudo_labels(ignore_index: int) -> None:
    first = torch.tensor([[0, 1, 2, 9, 9, 9]])
    second = torch.tensor([[0, 2, 9, 1, 9, 0]])
    first[first == 9], second[second == 9] = ignore_index, ignore_index
    combine = partial(anchorda.combine_pseudo_labels, first, ignore_index=ignore_index)
    agree, union = combine(second.to(torch.int16)), combine(second.to(torch.int16), "union")
    assert agree.dtype == union.dtype == torch.int64
    i = ignore_index
    assert agree.tolist() == [[0, i, i, i, i, i]]
    assert union.tolist() == [[0, i, 2, 1, i, 0]]
    assert torch.equal(combine(second, "agree"), agree)


def test_settings_are_shown() -> None:
    shown = "AnchorPseudoLabeler(min_margin=0.5, relative=True, ignore_index=-1)"
    assert repr(AnchorPseudoLabeler(0.5, relative=True, ignore_index=-1)) == shown
    shown = "ProbabilityPseudoLabeler(min_probability=[0.5, 1.0], ignore_index=255)"
    assert repr(ProbabilityPseudoLabeler(torch.tensor([0.5, 1.0]))) == shown
    assert "min_margin=..., " in repr(AnchorPseudoLabeler().to("meta"))  # no values to show


@pytest.mark.parametrize(
    "build",
    [
        lambda: ProbabilityPseudoLabeler(95),
        lambda: AnchorPseudoLabeler(2.5, relative=True),
        lambda: AnchorPseudoLabeler(torch.tensor([0.5, -0.5]), relative=True),
    ],
)
def test_a_minimum_outside_of_the_scores_is_rejected(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\], as these scores are"):
        build()


def test_infinity_is_never() -> None:
    features, anchors = torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert AnchorPseudoLabeler(INF, relative=True)(features, anchors).labels.tolist() == [255]
    assert ProbabilityPseudoLabeler(INF)(torch.tensor([[99.0, 0.0]])).labels.tolist() == [255]


def test_no_gradient_comes_from_an_anchor_whatever_goes_in() -> None:
    anchors = torch.randn(3, 5)
    features = anchors[:1].clone().requires_grad_()
    own = anchorda.anchor_distances(features, anchors)[0, 0]
    (gradient,) = torch.autograd.grad(own.sqrt(), features)  # infinite where the distance is 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(2,), (2, 3, 4)])
def test_features_without_channels(shape: tuple[int, ...]) -> None:
    features = torch.empty(shape[0], 0, *shape[1:])
    anchors = torch.empty(4, 0)
    assert (anchorda.anchor_distances(features, anchors) == 0).all()
    labels, scores = AnchorPseudoLabeler(-INF)(features, anchors)
    assert (labels == 0).all()
    assert (scores == 0).all()
