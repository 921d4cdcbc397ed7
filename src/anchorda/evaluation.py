"""Streaming, mergeable evaluation of predictions and of pseudo-labels against the truth."""

from typing import final

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ._checks import check_count, check_device, check_same_labels
from ._ops.reference import wide_dtype
from ._state import merge_counts, receive_state, reset_state, sent_state


@final
class ConfusionMatrix(nn.Module):
    r"""Intersection over union, its mean, and accuracy, from a stream of predictions.

    .. math:: \mathrm{IoU}_c = \frac{M_{cc}}{\sum_k M_{ck} + \sum_k M_{kc} - M_{cc}}, \qquad
              M_{ck} = |\{i : y_i = c,\ \hat y_i = k\}|

    A pixel whose truth is outside [0, C) is ignored. A prediction outside [0, C) is a wrong one:
    abstaining does not raise a score.

    Args:
        num_classes: C.

    Raises:
        TypeError: if an argument or a dtype is wrong.
        ValueError: if ``num_classes``, a shape or a device is wrong.

    Source: the evaluation scripts of the Cityscapes data set.

    >>> confusion = ConfusionMatrix(num_classes=3)
    >>> confusion.update(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 255]]))
    >>> confusion.iou()
    tensor([0.5000, 0.5000,    nan], dtype=torch.float64)
    >>> confusion.mean_iou()
    tensor(0.5000, dtype=torch.float64)
    """

    counts: Tensor
    """(C, C + 1) int64: truth by prediction, the last column for predictions outside [0, C)."""
    passed_with_counts: bool = False
    """True in a process that was started with this accumulator, already filled, as an argument."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("counts", _no_counts(num_classes))

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add predictions and true labels, both ``(N, *)`` of any integer dtype."""
        check_same_labels(labels, predictions, ("labels", "predictions"))
        _add_counts(self.counts, predictions, labels)

    def merge(self, other: Self) -> None:
        """Add what another matrix of as many classes has counted."""
        merge_counts(self, other)

    def iou(self) -> Tensor:
        """Return the IoU (C,) float64; NaN for a class neither in the truth nor predicted."""
        hits = self.counts.diagonal()
        return _ratio(hits, self.counts.sum(dim=1) + self.counts.sum(dim=0)[:-1] - hits)

    def mean_iou(self) -> Tensor:
        """Return the mean IoU () float64 over the classes in the truth; NaN if there is none."""
        occurs = self.counts.sum(dim=1) > 0
        return torch.where(occurs, self.iou(), torch.nan).nanmean()

    def accuracy(self) -> Tensor:
        """Return the fraction () float64 of pixels predicted right; NaN without pixels."""
        return _ratio(self.counts.diagonal().sum(), self.counts.sum())

    reset = reset_state
    __getstate__ = sent_state
    __setstate__ = receive_state


@final
class PseudoLabelQuality(nn.Module):
    r"""Coverage, precision and recall of pseudo-labels, per class, from a stream.

    With :math:`M_{ck}` the pixels of true class c and pseudo-label k, and :math:`M_{c-}` those
    without a pseudo-label:

    .. math:: \mathrm{coverage}_c = 1 - \frac{M_{c-}}{\sum_k M_{ck} + M_{c-}}, \qquad
              \mathrm{precision}_c = \frac{M_{cc}}{\sum_k M_{kc}}, \qquad
              \mathrm{recall}_c = \frac{M_{cc}}{\sum_k M_{ck} + M_{c-}}

    A pixel whose truth is outside [0, C) is ignored.

    Args:
        num_classes: C.

    Raises:
        TypeError: if an argument or a dtype is wrong.
        ValueError: if ``num_classes``, a shape or a device is wrong.

    Source: precision and recall of classification; coverage is that of selective classification.

    >>> quality = PseudoLabelQuality(num_classes=2)
    >>> quality.update(torch.tensor([[0, 1, 255, 0]]), torch.tensor([[0, 1, 1, 1]]))
    >>> quality.coverage()
    tensor([1.0000, 0.6667], dtype=torch.float64)
    >>> quality.precision()
    tensor([0.5000, 1.0000], dtype=torch.float64)
    >>> quality.recall()
    tensor([1.0000, 0.3333], dtype=torch.float64)
    """

    counts: Tensor
    """(C, C + 1) int64: truth by pseudo-label, the last column for pixels without one."""
    passed_with_counts: bool = False
    """True in a process that was started with this accumulator, already filled, as an argument."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("counts", _no_counts(num_classes))

    def update(self, pseudo_labels: Tensor, labels: Tensor) -> None:
        """Add pseudo-labels and true labels, both ``(N, *)`` of any integer dtype."""
        check_same_labels(labels, pseudo_labels, ("labels", "pseudo_labels"))
        _add_counts(self.counts, pseudo_labels, labels)

    def merge(self, other: Self) -> None:
        """Add what another one of as many classes has counted."""
        merge_counts(self, other)

    def coverage(self) -> Tensor:
        """Return the labeled fraction (C,) float64 of each true class; NaN if not in the truth."""
        return _ratio(self.counts[:, :-1].sum(dim=1), self.counts.sum(dim=1))

    def precision(self) -> Tensor:
        """Return the right fraction (C,) float64 of each pseudo-label; NaN if never given."""
        return _ratio(self.counts.diagonal(), self.counts[:, :-1].sum(dim=0))

    def recall(self) -> Tensor:
        """Return the fraction (C,) float64 of each true class labeled right; NaN if not there."""
        return _ratio(self.counts.diagonal(), self.counts.sum(dim=1))

    reset = reset_state
    __getstate__ = sent_state
    __setstate__ = receive_state


def _no_counts(num_classes: int) -> Tensor:
    num_classes = check_count(num_classes, "num_classes")
    return torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)


def _add_counts(counts: Tensor, predictions: Tensor, labels: Tensor) -> None:
    """Count pairs of labels without a look at how many there are: no host synchronization."""
    check_device(counts, "counts", labels, "labels")
    num_classes, columns = counts.shape
    truth, predicted = labels.long().flatten(), predictions.long().flatten()
    valid = (truth >= 0) & (truth < num_classes)
    predicted = torch.where((predicted >= 0) & (predicted < num_classes), predicted, num_classes)
    cell = torch.where(valid, truth * columns + predicted, 0)
    counts.view(-1).scatter_add_(0, cell, valid.long())


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return part.to(wide_dtype(part)) / whole
