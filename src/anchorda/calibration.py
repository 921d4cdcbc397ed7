"""Choosing a minimum score by what it does to the labels, and judging anchors before they label.

Scores are counted per class while batches stream by; what is read off afterwards (a minimum for a
coverage or a precision, a warning, a report) is read by a person or once a stage, and makes the
host wait for the GPU.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from typing_extensions import Self

from ._checks import (
    PerClass,
    as_floats,
    as_integers,
    as_per_class,
    check_alike,
    check_anchor_groups,
    check_anchor_rows,
    check_class_names,
    check_count,
    check_device,
    check_one_per_class,
    check_per_class,
    check_range,
    check_same_labels,
    check_scores,
    check_values,
)
from ._ops.reference import wide_dtype
from ._state import merge_counts, move_buffers, receive_state, reset_state, sent_state, shown
from .pseudo_labels import anchor_distances

_BINS_PER_OCTAVE = 64


class PrecisionCoverage(NamedTuple):
    """Coverage and precision of each class at T minimum scores; see `ScoreCalibrator.curve`."""

    min_scores: Tensor
    """(T,) float32, ascending from −∞ to ∞."""
    coverage: Tensor
    """(C, T) float64: the fraction of the class's pixels above each; NaN without pixels."""
    precision: Tensor
    """(C, T) float64: the right fraction of those; NaN where none of them came with its truth."""


@final
class ScoreCalibrator(nn.Module):
    r"""The minimum score of each class for a coverage or a precision, from a stream of labels.

    With the pixels i that a labeler calls class c, their scores s and, where known, truths y:

    .. math:: \mathrm{coverage}_c(t) = \frac{|\{i : s_i > t\}|}{|\{i\}|}, \qquad
              \mathrm{precision}_c(t) =
              \frac{|\{i : s_i > t,\ y_i = c\}|}{|\{i : s_i > t,\ y_i \text{ known}\}|}

    Coverage here is of what is called c, as the truth is not needed for it;
    `PseudoLabelQuality.coverage` is of what is c. Scores are counted in fixed bins, whose edges
    are the candidates for t. What is said of a candidate is exact, not interpolated; only the
    choice is limited to them. They lie 1.1 % apart, for sizes from 10⁻⁶ to 10⁶ of either sign, and
    between 0.5 and 1 also 1.1 % apart in 1 − s, so that margins of any scale, negative distances
    or entropies, and probabilities close to 1 are resolved equally well. A minimum for a coverage
    is thus at most 1.1 % of its size below the exact quantile within that range. The memory is
    that of (3, C, 6269) int64 counts, 2.9 MB for 19 classes, however long the stream.

    Take the labels from a labeler that leaves none out (a minimum of −∞): pixels without a label
    belong to no class and are not counted.

    Args:
        num_classes: C.

    Raises:
        TypeError: if an argument or a dtype is wrong.
        ValueError: if ``num_classes``, a shape or a device is wrong.

    Source: the class-balanced thresholds of CBST (arXiv 1810.07911) are a coverage; the selective
    classification of Geifman and El-Yaniv (arXiv 1705.08500) is a precision.

    >>> calibrator = ScoreCalibrator(num_classes=2)
    >>> labels = torch.tensor([[0, 0, 0, 0, 1, 1]])
    >>> scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.7, 0.9]])
    >>> calibrator.update(labels, scores, truth=torch.tensor([[1, 0, 0, 0, 0, 0]]))
    >>> calibrator.min_score_for_coverage(0.5)
    tensor([2.9858, 0.8993])
    >>> calibrator.min_score_for_precision(0.9, min_count=1)
    tensor([1.9785,    inf])
    """

    counts: Tensor
    """(3, C, B) int64: pixels of each class by bin, with the label right, wrong, not judged."""
    edges: Tensor
    """(B + 1,) float32, not saved: bin b holds the scores in (edges[b], edges[b + 1]]."""
    passed_with_counts: bool = False
    """True in a process that was started with this accumulator, already filled, as an argument."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        num_classes = check_count(num_classes, "num_classes")
        self.num_classes: int = num_classes
        self.register_buffer("edges", _edges(), persistent=False)
        counts = torch.zeros(3, num_classes, len(self.edges) - 1, dtype=torch.int64)
        self.register_buffer("counts", counts)

    def update(self, labels: Tensor, scores: Tensor, truth: Tensor | None = None) -> None:
        """Add labels and scores ``(N, *)`` of a labeler, and the true labels where known.

        A pixel whose label is outside [0, C) or whose score is NaN is not counted; one whose truth
        is outside [0, C) is not judged.
        """
        check_scores(scores, labels)
        check_device(self.counts, "counts", labels, "labels")
        classes = labels.long().flatten()
        judged = torch.zeros_like(classes, dtype=torch.bool)
        right = judged
        if truth is not None:
            check_same_labels(labels, truth, ("labels", "truth"))
            true_classes = truth.long().flatten()
            judged = (true_classes >= 0) & (true_classes < self.num_classes)
            right = true_classes == classes
        kind = torch.where(judged, torch.where(right, 0, 1), 2)
        scores = scores.detach().float().flatten().contiguous()
        bins = torch.bucketize(scores, self.edges[1:-1])
        counted = (classes >= 0) & (classes < self.num_classes) & ~scores.isnan()
        cell = (kind * self.num_classes + classes) * self.counts.shape[2] + bins
        self.counts.view(-1).scatter_add_(0, torch.where(counted, cell, 0), counted.long())

    def merge(self, other: Self) -> None:
        """Add what another calibrator of as many classes has counted."""
        merge_counts(self, other)

    def min_score_for_coverage(self, coverage: float) -> Tensor:
        """Return the largest minimum (C,) float32 that labels this fraction of each class.

        No truth is needed. Infinite for a class that no pixel was called, and for a coverage of 0.
        """
        coverage = check_range(coverage, "coverage", 0.0, 1.0)
        # Coverage falls along the candidates, so those that suffice come first. Without pixels
        # it is NaN, nothing suffices, and the index of -1 is that of infinity.
        enough = self.curve().coverage >= coverage
        return self.edges[enough.sum(dim=1) - 1]

    def min_score_for_precision(self, precision: float, *, min_count: int = 100) -> Tensor:
        """Return the minimum (C,) float32 that labels most at this precision or above.

        Of minimums that label the same judged pixels it is the largest. Infinite for a class that
        does not reach the precision where at least ``min_count`` judged pixels exceed the minimum:
        among thousands of candidates a few lucky pixels reach any precision. Even so it is what was
        measured and not a bound, and neighboring pixels are no independent samples.

        Raises:
            ValueError: if no pixel at all came with its truth.
        """
        precision = check_range(precision, "precision", 0.0, 1.0)
        min_count = check_count(min_count, "min_count")
        judged = _above(self.counts[:2].sum(dim=0))
        if not bool(judged.any()):
            raise ValueError(
                "Expected true labels to measure a precision by, but got none. Pass `truth` to "
                "`update`, as on labeled source images, or use min_score_for_coverage."
            )
        enough = (self.curve().precision >= precision) & (judged >= min_count)
        labeled = judged.gather(1, enough.long().argmax(dim=1, keepdim=True))
        largest = (judged >= labeled).sum(dim=1) - 1
        return torch.where(enough.any(dim=1), self.edges[largest], torch.inf)

    def curve(self) -> PrecisionCoverage:
        """Return coverage and precision of each class at every candidate."""
        right, wrong, _ = above = _above(self.counts)
        labeled, dtype = above.sum(dim=0), wide_dtype(above)
        coverage = labeled.to(dtype) / labeled[:, :1]
        return PrecisionCoverage(self.edges.clone(), coverage, right.to(dtype) / (right + wrong))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        without_values = self.edges.is_meta
        move_buffers(self, fn)
        if without_values and not self.edges.is_meta:
            # Not in any state_dict, so nothing else would fill them in.
            self.edges = _edges().to(self.edges.device)
        return self

    reset = reset_state
    extra_repr = shown("num_classes")
    __getstate__ = sent_state
    __setstate__ = receive_state


def _edges() -> Tensor:
    """Return candidates evenly spaced in log |s| and, between 0.5 and 1, also in log(1 − s)."""
    steps = np.arange(-20 * _BINS_PER_OCTAVE, 24 * _BINS_PER_OCTAVE + 1) / _BINS_PER_OCTAVE
    scales, to_one = np.exp2(steps[steps <= 20]), 1 - np.exp2(-steps[steps >= 1])
    inner = np.unique(np.concatenate([scales, to_one]).astype(np.float32))
    negative = -scales[::-1].astype(np.float32)
    return torch.tensor([-np.inf, *negative, 0.0, *inner, np.inf], dtype=torch.float32)


def _above(counts: Tensor) -> Tensor:
    """Return the number of scores (*, B + 1) that exceed each edge."""
    return nn.functional.pad(counts.flip(-1).cumsum(-1).flip(-1), (0, 1))


def margin_limits(anchors: Tensor | npt.NDArray[np.floating]) -> Tensor:
    r"""Return the margin that no pixel of a class can exceed.

    .. math:: \ell_c = \min_{k \ne c} \lVert a_c - a_k \rVert_2

    By the triangle inequality the runner-up is at most :math:`\ell_c` farther than :math:`a_c`. Of
    several anchors of a class it is the one farthest from other classes that limits the margin:

    .. math:: \ell_c = \max_m \min_{k \ne c,\, n} \lVert a_{c,m} - a_{k,n} \rVert_2

    Args:
        anchors: ``(C, D)`` or ``(C, M, D)``, floating point. A row that is not finite is absent; a
            class without any other row is unseen.

    Returns:
        ``(C,)`` float32 (float64 for float64 anchors): NaN for unseen classes, infinite if only
        one is seen.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if the shape is wrong.

    Source: the triangle inequality on equation 4 of CAG-UDA (arXiv 1910.13049).

    >>> margin_limits(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]]))
    tensor([5., 1., 1.])
    """
    anchors = as_floats(anchors, "anchors")
    check_anchor_groups(anchors)
    of_anchors = _to_other_classes(anchors).amin(dim=2)
    absent = of_anchors.isnan()
    limits = of_anchors.masked_fill(absent, -torch.inf).amax(dim=1)
    return torch.where(absent.all(dim=1), torch.nan, limits)


def warn_unreachable_margins(
    min_margin: PerClass,
    anchors: Tensor | npt.NDArray[np.floating],
    *,
    class_names: Sequence[str] | None = None,
) -> None:
    """Warn of classes whose minimum margin no pixel can exceed, with their `margin_limits`.

    A minimum of infinity is a class left out on purpose, and unseen classes are never labeled:
    neither is warned of. Relative margins are not meant here: they have no such limit below 1.

    Args:
        min_margin: one number, or ``(C,)``; see `AnchorPseudoLabeler`.
        anchors: ``(C, D)`` or ``(C, M, D)``.
        class_names: C names for the message; without them classes are numbered.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape is wrong, or the number of names.

    Source: see `margin_limits`.

    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn_unreachable_margins(2.5, torch.tensor([[0.0], [2.0], [9.0]]))
    >>> print(caught[0].message)
    No pixel can exceed the minimum margin of these classes, so none will be labeled: 0 (minimum 2.5, limit 2), 1 (minimum 2.5, limit 2). A margin is at most the distance from the class's anchor to the nearest other one; lower the minimum, or let ScoreCalibrator choose it.
    """  # noqa: E501
    limits, minimum = margin_limits(anchors), as_per_class(min_margin, "min_margin").detach()
    check_values(limits, "anchors")
    check_values(minimum, "min_margin")
    minimum = minimum.to(limits)
    check_per_class(minimum, "min_margin", limits, "anchors", len(limits))
    names = check_class_names(class_names, len(limits))
    unreachable = minimum.isfinite() & (minimum >= limits)
    if not bool(unreachable.any()):
        return
    minimum = minimum.expand_as(limits)
    classes = ", ".join(
        f"{names[c]} (minimum {minimum[c]:.4g}, limit {limits[c]:.4g})"
        for c in unreachable.nonzero().flatten().tolist()
    )
    warnings.warn(
        "No pixel can exceed the minimum margin of these classes, so none will be labeled: "
        f"{classes}. A margin is at most the distance from the class's anchor to the nearest "
        "other one; lower the minimum, or let ScoreCalibrator choose it.",
        stacklevel=2,
    )


@final
@dataclasses.dataclass(frozen=True, eq=False)
class AnchorHealth:
    """The report of `anchor_health`; ``str()`` of it is a short table."""

    distances: Tensor
    """(C, C): Euclidean distance between each two anchors; NaN if one of them is unseen."""
    nearest: Tensor
    """(C,) int64: the class of the nearest other anchor; −1 where there is none."""
    limits: Tensor
    """(C,): the distance to it, which no margin of the class can exceed; see `margin_limits`."""
    counts: Tensor
    """(C,) int64: the contributions to each anchor."""
    drift: Tensor
    """(C,): how far each anchor has moved from the previous set; NaN where that is unknown."""
    unseen: Tensor
    """(C,) bool: the classes without an anchor."""
    too_few: Tensor
    """(C,) bool: the classes with an anchor of fewer contributions than asked for."""

    def table(self, class_names: Sequence[str] | None = None) -> str:
        """Return a line for each class, with C names if given."""
        names = check_class_names(class_names, len(self.counts))
        check_values(self.limits, "anchors")
        check_values(self.counts, "counts")
        rows = [("class", "count", "nearest", "distance", "drift", "")]
        for c, name in enumerate(names):
            nearest = int(self.nearest[c])
            rows.append(
                (
                    name,
                    str(int(self.counts[c])),
                    names[nearest] if nearest >= 0 else "-",
                    _shown(self.limits[c]),
                    _shown(self.drift[c]),
                    "unseen" if self.unseen[c] else "too few" if self.too_few[c] else "",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligned = "<><>><"
        return "\n".join(
            "  ".join(
                f"{cell:{align}{width}}"
                for cell, align, width in zip(row, aligned, widths, strict=True)
            ).rstrip()
            for row in rows
        )

    def __str__(self) -> str:
        """Return the table, with numbered classes."""
        return self.table()


def anchor_health(
    anchors: Tensor | npt.NDArray[np.floating],
    counts: Tensor | npt.NDArray[np.integer],
    *,
    previous: Tensor | npt.NDArray[np.floating] | None = None,
    min_count: int = 10,
) -> AnchorHealth:
    """Return distances between anchors, the counts behind them, and their drift.

    Anchors that are close together limit the margin, anchors of a handful of pixels are
    noise, and anchors that move a lot between stages mean that the features have changed.

    Args:
        anchors: ``(C, D)``, floating point. A row that is not finite is an unseen class.
        counts: ``(C,)``, integer: the contributions to each, `CategoryAnchors.counts`.
        previous: ``(C, D)``, the anchors to measure the drift from.
        min_count: an anchor of fewer contributions is reported as of too few.

    Returns:
        `AnchorHealth`: all of it as tensors, and as a table.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or ``min_count`` is wrong.

    Source: none; the distances are those of equation 3 of CAG-UDA (arXiv 1910.13049).

    >>> anchors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [torch.nan, torch.nan]])
    >>> health = anchor_health(anchors, torch.tensor([1200, 7, 0]), previous=anchors + 1)
    >>> print(health.table(["road", "car", "train"]))
    class  count  nearest  distance  drift
    road    1200  car             5   1.41
    car        7  road            5   1.41  too few
    train      0  -               -      -  unseen
    """
    anchors = as_floats(anchors, "anchors")
    check_anchor_rows(anchors)
    counts = as_integers(counts, "counts", anchors.device)
    min_count = check_count(min_count, "min_count")
    check_one_per_class(counts, "counts", len(anchors), anchors, "anchors")
    counts = counts.long()  # Not all operators know unsigned dtypes.
    if previous is not None:
        previous = as_floats(previous, "previous", anchors.device)
        check_anchor_rows(previous, "previous")
        check_alike(previous, "previous", anchors, "anchors")
    to_others = _to_other_classes(anchors).squeeze(1)
    limits, nearest = to_others.min(dim=1)
    seen = anchors.isfinite().all(dim=1)
    distances = torch.where(to_others.isinf(), torch.nan, to_others)
    distances.diagonal().copy_(torch.where(seen, 0.0, torch.nan))
    # Not in half precision, whose squares overflow.
    before = torch.full_like(anchors, torch.nan) if previous is None else previous
    moved = (anchors.detach().to(limits.dtype) - before.detach().to(limits.dtype)).norm(dim=1)
    return AnchorHealth(
        distances=distances,
        nearest=torch.where(limits.isfinite(), nearest, -1),
        limits=limits,
        counts=counts,
        drift=torch.where(moved.isfinite(), moved, torch.nan),
        unseen=~seen,
        too_few=seen & (counts < min_count),
    )


def _to_other_classes(anchors: Tensor) -> Tensor:
    """Return distances (C, M, C) of anchors to classes: infinite to their own and to unseen ones.

    NaN from an anchor that is absent.
    """
    num_classes, dim = anchors.shape[0], anchors.shape[-1]
    distances = anchor_distances(anchors.detach().reshape(-1, dim), anchors)
    distances = distances.view(num_classes, -1, num_classes)
    absent = ~anchors.isfinite().all(dim=-1).view(num_classes, -1, 1)
    own = torch.eye(num_classes, dtype=torch.bool, device=anchors.device)[:, None]
    return torch.where(absent, torch.nan, torch.where(own, torch.inf, distances))


def _shown(value: Tensor) -> str:
    return "-" if value.isnan() else f"{value:.3g}"
