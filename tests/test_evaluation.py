"""Confusion matrices and the quality of pseudo-labels."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anchorda import ConfusionMatrix, PseudoLabelQuality
from tests import oracles
from tests.oracles import INTEGERS, LAYOUTS, SHAPES, draw, flat, lay_out, pairwise

CLASSES = [ConfusionMatrix, PseudoLabelQuality]


def assert_ratio(actual: Tensor, part: float, whole: float) -> None:
    assert actual.dtype == torch.float64
    np.testing.assert_equal(actual.item(), part / whole if whole else math.nan)


def assert_results(
    counts: oracles.Labels, confusion: ConfusionMatrix, quality: PseudoLabelQuality
) -> None:
    """Every ratio, class by class, from the counts of the oracle."""
    num_classes = len(counts)
    ious = []
    for c in range(num_classes):
        hits, of_truth = counts[c, c], counts[c].sum()
        predicted = counts[:, c].sum()
        assert_ratio(confusion.iou()[c], hits, of_truth + predicted - hits)
        if of_truth:
            ious.append(hits / (of_truth + predicted - hits))
        assert_ratio(quality.coverage()[c], of_truth - counts[c, num_classes], of_truth)
        assert_ratio(quality.precision()[c], hits, predicted)
        assert_ratio(quality.recall()[c], hits, of_truth)
    mean_iou = sum(ious) / len(ious) if ious else math.nan
    np.testing.assert_allclose(confusion.mean_iou().item(), mean_iou, rtol=1e-15)
    assert_ratio(confusion.accuracy(), np.trace(counts), counts.sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_classes", [1, 2, 4])
def test_any_shape(shape: Sequence[int], num_classes: int) -> None:
    confusion, quality = ConfusionMatrix(num_classes), PseudoLabelQuality(num_classes)
    expected = np.zeros((num_classes, num_classes + 1), np.int64)
    for _ in range(2):
        labels, predictions = (draw(shape, num_classes=num_classes).labels for _ in range(2))
        before = labels.clone(), predictions.clone()
        confusion.update(predictions, labels)
        quality.update(predictions, labels)
        expected += oracles.confusion(flat(predictions), flat(labels), num_classes)
        assert torch.equal(labels, before[0])
        assert torch.equal(predictions, before[1])
    for counted in (confusion.counts, quality.counts):
        assert counted.dtype == torch.int64
        np.testing.assert_array_equal(counted, expected)
    assert_results(expected, confusion, quality)


@pytest.mark.parametrize(("dtype", "layout", "kind"), pairwise(INTEGERS, LAYOUTS, CLASSES))
def test_any_dtype_and_layout(dtype: torch.dtype, layout: str, kind: type[Any]) -> None:
    labels, predictions = torch.randint(7, (2, 3, 4, 5)).to(dtype)
    labels, predictions = lay_out(labels, layout), lay_out(predictions, layout)
    state = kind(5)
    state.update(predictions, labels.long())
    state.update(predictions.long(), labels)
    expected = oracles.confusion(flat(predictions), flat(labels), 5)
    np.testing.assert_array_equal(state.counts, 2 * expected)


def test_nothing_counted_is_nan() -> None:
    confusion, quality = ConfusionMatrix(2), PseudoLabelQuality(2)
    nothing = [confusion.iou(), confusion.mean_iou(), confusion.accuracy()]
    nothing += [quality.coverage(), quality.precision(), quality.recall()]
    assert all(value.isnan().all() for value in nothing)


def test_class_only_predicted_counts_in_no_mean() -> None:
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]))
    assert confusion.iou().nan_to_num(-1).tolist() == [2 / 3, 0.0, -1]
    assert confusion.mean_iou().item() == 2 / 3


def test_abstaining_does_not_raise_a_score() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([0, 255, -1]), torch.tensor([0, 0, 1]))
    assert confusion.iou().tolist() == [0.5, 0.0]
    assert confusion.accuracy().item() == 1 / 3


@pytest.mark.parametrize("kind", CLASSES)
def test_merge_reset_and_state(kind: type[Any]) -> None:
    batches = [draw((2, 5)).labels for _ in range(4)]
    whole, first, second = kind(4), kind(4), kind(4)
    for state, (predictions, labels) in zip(
        (first, second), (batches[:2], batches[2:]), strict=True
    ):
        state.update(predictions, labels)
        whole.update(predictions, labels)
    first.half().merge(second)
    assert torch.equal(first.counts, whole.counts)
    restored = kind(4)
    restored.load_state_dict(whole.state_dict())
    assert torch.equal(restored.counts, whole.counts)
    whole.reset()
    assert not whole.counts.any()
    with pytest.raises(ValueError, match="Expected `other` with 4 classes, but got 3"):
        whole.merge(kind(3))


@pytest.mark.parametrize("kind", CLASSES)
def test_counts_beyond_float32_and_int32_are_exact(kind: type[Any]) -> None:
    state = kind(2)
    state.counts[0, 0] = 2**40
    state.update(torch.tensor([0]), torch.tensor([0]))
    assert state.counts[0, 0].item() == 2**40 + 1
