"""Minimum scores from streamed histograms, the limits of margins, and the report on anchors."""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anchorda import (
    AnchorPseudoLabeler,
    PseudoLabelQuality,
    ScoreCalibrator,
    anchor_health,
    margin_limits,
    warn_unreachable_margins,
)
from tests.oracles import FLOATS, INTEGERS, LAYOUTS, SHAPES, lay_out

RESOLUTION = 0.011
NAN = math.nan


class Stream(NamedTuple):
    """Labels, scores and truths (N, *)."""

    labels: Tensor
    scores: Tensor
    truth: Tensor


def draw(shape: Sequence[int], num_classes: int = 3) -> Stream:
    """Return labels and truths, some ignored, and scores of all magnitudes."""
    some = torch.tensor([*range(num_classes), *range(num_classes), -1, num_classes, 255])
    labels, truth = some[torch.randint(len(some), (2, *shape))]
    scores = torch.stack(
        [
            torch.exp(6 * torch.randn(*shape)),
            torch.rand(*shape),
            1 - torch.rand(*shape) ** 8,
            torch.tensor([0.0, 1.0, math.inf, NAN])[torch.randint(4, tuple(shape))],
        ]
    )
    return Stream(labels, scores.gather(0, torch.randint(4, (1, *shape)))[0], truth)


def rates(stream: Stream, c: int, minimum: float, num_classes: int = 3) -> tuple[float, float]:
    """Return the coverage and precision of class c above a minimum: a loop over pixels."""
    called = labeled = judged = right = 0
    for label, score, truth in zip(*(part.flatten().tolist() for part in stream), strict=True):
        if label != c or math.isnan(score):
            continue
        called += 1
        labeled += score > minimum
        if 0 <= truth < num_classes and score > minimum:
            judged += 1
            right += truth == c
    return labeled / called if called else NAN, right / judged if judged else NAN


def calibrated(stream: Stream, num_classes: int = 3) -> ScoreCalibrator:
    calibrator = ScoreCalibrator(num_classes)
    calibrator.update(*stream)
    return calibrator


@pytest.mark.parametrize("shape", SHAPES)
def test_the_curve_is_exact_at_every_candidate(shape: Sequence[int]) -> None:
    stream = draw(shape)
    before = [part.clone() for part in stream]
    curve = calibrated(stream).curve()
    for part, copy in zip(stream, before, strict=True):
        torch.testing.assert_close(part, copy, rtol=0, atol=0, equal_nan=True)
    candidates = [0, 1, 2, *torch.randint(len(curve.min_scores), (12,)).tolist(), -2, -1]
    for c in range(3):
        for t in candidates:
            expected = rates(stream, c, curve.min_scores[t].item())
            actual = curve.coverage[c, t].item(), curve.precision[c, t].item()
            np.testing.assert_array_equal(actual, expected)


def test_candidates_ascend_and_are_as_close_as_promised() -> None:
    edges = ScoreCalibrator(1).edges
    assert edges[0] == -math.inf
    assert edges[-1] == math.inf
    zero = int((edges == 0).nonzero())
    negative = -edges[1:zero].double()
    assert negative[-1] < 1e-6
    assert negative[0] > 1e6
    assert (negative[:-1] / negative[1:]).max() < 1 + RESOLUTION
    inner = edges[zero + 1 : -1].double()
    assert inner[0] < 1e-6
    assert inner[-1] > 1e6
    ratios = inner[1:] / inner[:-1]
    assert ratios.min() > 1
    assert ratios.max() < 1 + RESOLUTION
    near_one = 1 - inner[(inner >= 0.5) & (inner < 1)]
    steps = near_one[:-1] - near_one[1:]
    # Next to 1 float32 itself is coarser than 1.1 % of 1 − s: there each float is a candidate.
    assert (steps <= RESOLUTION * near_one[:-1] + 2**-24).all()
    assert 1 - near_one[-1] == np.nextafter(np.float32(1), np.float32(0))


def test_memory_is_what_the_page_says() -> None:
    assert ScoreCalibrator(19).counts.shape == (3, 19, 6269)
    assert ScoreCalibrator(19).counts.nbytes < 2.9e6
    assert list(ScoreCalibrator(19).state_dict()) == ["counts"]


@pytest.mark.parametrize("coverage", [1e-3, 0.1, 1 / 3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("kind", ["margins", "probabilities", "negative", "of both signs"])
def test_minimum_for_coverage_against_exact_quantiles(kind: str, coverage: float) -> None:
    scores = {
        "margins": torch.exp(2 * torch.randn(2, 700)),
        "probabilities": 1 - torch.rand(2, 700) ** 6,
        "negative": -torch.exp(2 * torch.randn(2, 700)),
        "of both signs": 100 * torch.randn(2, 700),
    }[kind]
    labels = torch.tensor([[0], [1]]).expand(2, 700)
    calibrator = ScoreCalibrator(3)
    calibrator.update(labels, scores)
    minimum = calibrator.min_score_for_coverage(coverage)
    assert minimum.dtype == torch.float32
    assert minimum[2] == math.inf  # No pixel was called so.
    for c in (0, 1):
        enough = math.ceil(coverage * 700)
        # Any minimum below this score labels enough, and none at or above it does.
        exact = scores[c].sort(descending=True).values[enough - 1].item()
        assert minimum[c].item() < exact
        assert (scores[c] > minimum[c]).sum().item() >= enough
        assert exact - minimum[c].item() <= RESOLUTION * abs(exact)
        if 0.5 < exact < 1:
            assert exact - minimum[c].item() <= RESOLUTION * (1 - minimum[c].item()) + 2**-24


def test_coverage_at_its_ends() -> None:
    calibrator = ScoreCalibrator(2)
    calibrator.update(torch.tensor([0, 0]), torch.tensor([0.0, 3.0]))
    assert calibrator.min_score_for_coverage(0.0).tolist() == [math.inf, math.inf]
    assert calibrator.min_score_for_coverage(1.0).tolist() == [-(2.0**-20), math.inf]
    assert 2.9 < calibrator.min_score_for_coverage(0.5)[0].item() < 3
    calibrator.update(torch.tensor([0]), torch.tensor([-1e9]))
    assert calibrator.min_score_for_coverage(1.0)[0].item() == -math.inf


@pytest.mark.parametrize("precision", [0.0, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("size", [3, 20, 400])
@pytest.mark.parametrize("min_count", [1, 5, 50])
def test_minimum_for_precision_by_trying_every_candidate(
    precision: float, size: int, min_count: int
) -> None:
    stream = draw((size,))
    # The higher the score, the more often right: there is something to find.
    stream = stream._replace(
        truth=torch.where(torch.rand(size) < stream.scores, stream.labels, stream.truth)
    )
    calibrator = calibrated(stream)
    if not calibrator.counts[:2].any():
        return
    minimum = calibrator.min_score_for_precision(precision, min_count=min_count)
    pixels = list(zip(*(part.tolist() for part in stream), strict=True))
    for c in range(3):
        judged = [(s, y == c) for k, s, y in pixels if k == c and 0 <= y < 3 and not math.isnan(s)]
        best: tuple[int, float] = (0, math.inf)
        for t in calibrator.edges.tolist():
            rights = [right for s, right in judged if s > t]
            enough = len(rights) >= max(min_count, best[0])
            if enough and sum(rights) / len(rights) >= precision:
                best = len(rights), t
        assert minimum[c].item() == best[1]


def test_the_labels_have_the_precision_and_the_coverage_asked_for() -> None:
    anchors = torch.randn(4, 8)
    truth = torch.randint(4, (3, 500))
    features = anchors[truth].mT + 0.9 * torch.randn(3, 8, 500)
    calibrator, everything = ScoreCalibrator(4), AnchorPseudoLabeler(-math.inf)
    for x, y in zip(features.split(1), truth.split(1), strict=True):
        labels, margins = everything(x, anchors)
        calibrator.update(labels, margins, y)
    minimum = calibrator.min_score_for_precision(0.95)
    quality = PseudoLabelQuality(4)
    quality.update(AnchorPseudoLabeler(minimum)(features, anchors).labels, truth)
    assert (quality.precision()[minimum.isfinite()] >= 0.95).all()
    assert minimum.isfinite().any()
    minimum = calibrator.min_score_for_coverage(0.5)
    nearest = everything(features, anchors).labels
    labeled = AnchorPseudoLabeler(minimum)(features, anchors).labels != 255
    for c in range(4):
        assert 0.5 <= labeled[nearest == c].double().mean().item() < 0.52


def test_what_is_not_counted() -> None:
    calibrator = ScoreCalibrator(2)
    labels = torch.tensor([0, 1, 2, 255, -1, 0])
    scores = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, NAN])
    calibrator.update(labels, scores, truth=torch.tensor([0, 255, 0, 0, 0, 0]))
    right, wrong, unjudged = calibrator.counts.sum(dim=2).tolist()
    assert (right, wrong, unjudged) == ([1, 0], [0, 0], [0, 1])


def test_precision_without_truth_is_an_error_that_says_so() -> None:
    calibrator = ScoreCalibrator(2)
    calibrator.update(torch.tensor([0]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="Pass `truth` to `update`"):
        calibrator.min_score_for_precision(0.9)
    assert calibrator.curve().precision.isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_and_dtype_of_scores(layout: str, dtype: torch.dtype) -> None:
    labels, truth = torch.randint(5, (2, 3, 4, 5))
    scores = lay_out(torch.rand(3, 4, 5).to(dtype), layout)
    labels, truth = lay_out(labels, layout), lay_out(truth, layout)
    one, other = ScoreCalibrator(5), ScoreCalibrator(5)
    one.update(labels, scores, truth)
    other.update(labels.contiguous(), scores.float().contiguous(), truth.contiguous())
    assert torch.equal(one.counts, other.counts)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_any_integer_dtype(dtype: torch.dtype) -> None:
    labels, truth = torch.randint(5, (2, 40))
    one, other = ScoreCalibrator(4), ScoreCalibrator(4)
    one.update(labels.to(dtype), torch.ones(40), truth.to(dtype))
    other.update(labels, torch.ones(40), truth)
    assert torch.equal(one.counts, other.counts)


def test_split_merge_reset_and_state() -> None:
    stream = draw((4, 50))
    whole, first, second = calibrated(stream), ScoreCalibrator(3), ScoreCalibrator(3)
    for i in range(4):
        part = Stream(*(part[i] for part in stream))
        (first if i % 2 else second).update(*part)
    first.half().merge(second)
    assert torch.equal(first.counts, whole.counts)
    assert torch.equal(first.edges, whole.edges)
    restored = ScoreCalibrator(3)
    restored.load_state_dict(whole.state_dict())
    assert torch.equal(restored.min_score_for_coverage(0.5), whole.min_score_for_coverage(0.5))
    whole.reset()
    assert not whole.counts.any()
    with pytest.raises(ValueError, match="Expected `other` with 3 classes, but got 2"):
        whole.merge(ScoreCalibrator(2))
    with pytest.raises(TypeError, match="Expected `other` to be ScoreCalibrator"):
        whole.merge(PseudoLabelQuality(3))  # type: ignore[arg-type]


def test_made_without_values_it_works_once_it_has_some() -> None:
    with torch.device("meta"):
        calibrator = ScoreCalibrator(2)
    assert calibrator.counts.is_meta
    calibrator.to_empty(device="cpu")
    assert torch.equal(calibrator.edges, ScoreCalibrator(2).edges)


def test_a_few_lucky_pixels_do_not_make_a_minimum() -> None:
    calibrator = ScoreCalibrator(2)
    truth = torch.tensor([0] * 50 + [1] * 949)
    calibrator.update(torch.zeros(999, dtype=torch.int64), torch.arange(999.0, 0, -1), truth)
    assert calibrator.min_score_for_precision(0.99)[0].item() == math.inf
    assert 949 < calibrator.min_score_for_precision(0.99, min_count=1)[0].item() < 970
    assert calibrator.min_score_for_precision(0.3)[0].item() < 900
    with pytest.raises(ValueError, match="Expected `min_count` of at least 1, but got 0"):
        calibrator.min_score_for_precision(0.9, min_count=0)


def test_wrong_arguments_are_named() -> None:
    calibrator = ScoreCalibrator(2)
    labels, scores = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"Expected `scores` of shape \(2, 3\) to match `labels`"):
        calibrator.update(labels, scores[:1])
    with pytest.raises(TypeError, match="Expected `scores` of a floating-point dtype"):
        calibrator.update(labels, labels)
    with pytest.raises(ValueError, match=r"Expected `truth` of shape \(2, 3\)"):
        calibrator.update(labels, scores, labels[:, :2])
    with pytest.raises(ValueError, match=r"Expected `coverage` in \[0.0, 1.0\], but got 90"):
        calibrator.min_score_for_coverage(90)
    with pytest.raises(ValueError, match="Expected `precision` in"):
        calibrator.min_score_for_precision(-0.1)
    with pytest.raises(ValueError, match="Expected `num_classes` of at least 1"):
        ScoreCalibrator(0)


def draw_anchors(num_classes: int, dim: int, unseen: float = 0.3) -> Tensor:
    anchors = torch.randn(num_classes, dim)
    return torch.where(torch.rand(num_classes, 1) < unseen, NAN, anchors)


@pytest.mark.parametrize(("num_classes", "dim"), [(1, 1), (2, 3), (5, 1), (7, 4)])
def test_margin_limits_against_a_loop(num_classes: int, dim: int) -> None:
    anchors = draw_anchors(num_classes, dim)
    rows = anchors.double().numpy()
    for c, limit in enumerate(margin_limits(anchors).tolist()):
        expected = min(
            (float(np.linalg.norm(rows[c] - row)) for k, row in enumerate(rows)
             if k != c and not np.isnan(row).any()),
            default=math.inf,
        )  # fmt: skip
        np.testing.assert_allclose(limit, NAN if np.isnan(rows[c]).any() else expected, rtol=1e-6)


@given(seed=st.integers(0, 10**6))
def test_no_margin_exceeds_its_limit(seed: int) -> None:
    torch.manual_seed(seed)
    anchors = draw_anchors(4, 2)
    near_a_line = anchors.nan_to_num()[torch.randint(4, (60,))] * (3 * torch.rand(60, 1) - 1)
    labels, margins = AnchorPseudoLabeler(-math.inf)(near_a_line.double(), anchors)
    for label, margin in zip(labels.tolist(), margins.tolist(), strict=True):
        if label != 255:
            assert margin <= margin_limits(anchors)[label].item() * (1 + 1e-6)


def test_unreachable_margins_are_warned_of_by_name_with_their_limit() -> None:
    anchors = torch.tensor([[0.0], [2.0], [9.0], [NAN]])
    with pytest.warns(UserWarning, match=r"will be labeled: road \(minimum 2.5, limit 2\), car"):
        warn_unreachable_margins(2.5, anchors, class_names=["road", "car", "bus", "train"])
    minimum = torch.tensor([math.inf, 2.0, 7.0, 5.0])
    with pytest.warns(UserWarning, match="No pixel can exceed") as caught:
        warn_unreachable_margins(minimum, anchors)
    message = str(caught[0].message)
    assert "1 (minimum 2, limit 2), 2 (minimum 7, limit 7)." in message
    assert caught[0].filename == __file__


def test_reachable_and_switched_off_margins_are_not_warned_of() -> None:
    anchors = torch.tensor([[0.0], [2.0], [9.0], [NAN]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unreachable_margins(1.9, anchors)
        warn_unreachable_margins(torch.tensor([1.0, math.inf, -math.inf, 99.0]), anchors)
        warn_unreachable_margins(5.0, anchors[:1])
    with pytest.raises(ValueError, match="`min_margin` to be one number or of shape"):
        warn_unreachable_margins(torch.ones(3), anchors)
    with pytest.raises(
        ValueError, match=r"of shape \(C,\) with one for each class, but got \(4, 1\)"
    ):
        warn_unreachable_margins(torch.ones(4, 1), anchors)
    with pytest.raises(ValueError, match="`class_names` for 4 classes, but got 1"):
        warn_unreachable_margins(1.0, anchors, class_names=["road"])


def test_health_against_loops() -> None:
    anchors, previous = draw_anchors(6, 3), draw_anchors(6, 3)
    anchors[0] = 1.0
    counts = torch.tensor([3, 10, 0, 9, 1000, 5])
    health = anchor_health(anchors, counts, previous=previous)
    for i in range(6):
        unseen = bool(anchors[i].isnan().any())
        assert health.unseen[i].item() == unseen
        assert health.too_few[i].item() == (not unseen and counts[i].item() < 10)
        drift = float(np.linalg.norm(anchors[i].numpy() - previous[i].numpy()))
        np.testing.assert_allclose(health.drift[i], drift, rtol=1e-6)
        for j in range(6):
            expected = float(np.linalg.norm(anchors[i].numpy() - anchors[j].numpy()))
            if i != j:
                np.testing.assert_allclose(health.distances[i, j], expected, rtol=1e-5)
        others = health.distances[i].clone()
        others[i] = NAN
        if unseen or others.isnan().all():
            assert health.nearest[i] == -1
        else:
            assert health.nearest[i] == others.nan_to_num(math.inf).argmin()
            assert health.limits[i] == others.nan_to_num(math.inf).min()
    diagonal = torch.where(health.unseen, NAN, torch.zeros(6))
    torch.testing.assert_close(health.distances.diagonal(), diagonal, equal_nan=True)
    assert anchor_health(anchors, counts).drift.isnan().all()


def test_health_as_a_table() -> None:
    anchors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [NAN, NAN]])
    health = anchor_health(anchors, torch.tensor([12, 8, 0]), min_count=9)
    assert str(health).splitlines() == [
        "class  count  nearest  distance  drift",
        "0         12  1               5      -",
        "1          8  0               5      -  too few",
        "2          0  -               -      -  unseen",
    ]
    assert health.table(["sky", "motorcycle", "bus"]).splitlines()[1:3] == [
        "sky            12  motorcycle         5      -",
        "motorcycle      8  sky                5      -  too few",
    ]
    with pytest.raises(ValueError, match="`class_names` for 3 classes, but got 1"):
        health.table(["sky"])


def test_health_of_half_precision_anchors_does_not_overflow() -> None:
    anchors = torch.tensor([[0.0], [300.0], [math.inf]]).half().requires_grad_()
    health = anchor_health(anchors, torch.zeros(3, dtype=torch.int64), previous=anchors.flip(0) - 9)
    assert health.drift.isnan().tolist() == [True, False, True]
    assert health.limits[0] == 300
    assert not health.drift.requires_grad


def test_counts_are_one_for_each_anchor() -> None:
    with pytest.raises(ValueError, match=r"Expected `counts` of shape \(C,\) = \(3,\)"):
        anchor_health(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
