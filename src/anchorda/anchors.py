"""Class anchors: per-class sums, per-image centroids, and their streaming accumulator."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from typing_extensions import Self

from . import _ops
from ._checks import (
    as_floats,
    as_integers,
    check_anchor_rows,
    check_choice,
    check_count,
    check_device,
    check_features,
    check_fits,
    check_ignore_index,
    check_int,
    check_label_map,
    check_labels,
    check_logits,
    check_mergeable,
    check_one_per_class,
    check_range,
    check_same_pixels,
    check_size,
    check_sums,
    check_values,
)
from ._ops.majority import majority
from ._ops.reference import has_float64, result_dtype
from ._sampling import NO_PRIORITY, join_samples, random_priorities, sample_of_classes
from ._state import check_batch, move_buffers, receive_state, reset_state, sent_state, shown

# Sampled features of a class, for each of its anchors, that the first ones are chosen from.
_CANDIDATES = 64


class ClassSums(NamedTuple):
    """Sums and counts of the features of each class; see `class_sums`."""

    sums: Tensor
    """(C, D) float64: the sum of the features of each class."""
    counts: Tensor
    """(C,) int64: how many features each sum holds; of `soft_class_sums` float64, the sum of
    their memberships."""


def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> ClassSums:
    r"""Sum the features of each class.

    .. math:: s_c = \sum_{i : y_i = c} x_i, \qquad n_c = |\{i : y_i = c\}|

    Labels outside ``[0, num_classes)`` are ignored, and so is a feature that holds a NaN or an
    infinity. The sums are accumulated in float64 (float32 on a device without it, and over 64
    pixels at a time on a GPU). They carry no gradient; `image_centroids` does.

    Args:
        features: ``(N, D, *)``, floating point.
        labels: ``(N, *)``, any integer dtype.
        num_classes: C.

    Returns:
        ``ClassSums(sums (C, D), counts (C,) int64)``.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or ``num_classes`` is wrong.

    Source: equation 2 of CAG-UDA (arXiv 1910.13049), before the division.

    >>> features = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> sums, counts = class_sums(features, torch.tensor([0, 0, 255]), num_classes=2)
    >>> sums
    tensor([[4., 6.],
            [0., 0.]], dtype=torch.float64)
    >>> counts
    tensor([2, 0])
    """
    check_features(features)
    check_labels(labels, features)
    num_classes = check_count(num_classes, "num_classes")
    return ClassSums(*_ops.class_sums(features.detach(), labels, num_classes))


def soft_class_sums(features: Tensor, probabilities: Tensor) -> ClassSums:
    r"""Sum the features of each class by soft membership.

    .. math:: s_c = \sum_i p_{i,c}\, x_i, \qquad n_c = \sum_i p_{i,c}

    A pixel whose feature or probabilities hold a NaN or an infinity is left out. The sums are
    accumulated in float64 (float32 on a device without it) and carry no gradient.

    Args:
        features: ``(N, D, *)``, floating point.
        probabilities: p, ``(N, C, *)``, floating point: memberships, or any weights.

    Returns:
        ``ClassSums(sums (C, D), counts (C,))``, both float64. Sums divided by counts are the soft
        centroids; a count of 0 is an unseen class.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape or a device is wrong.

    Source: SHOT (arXiv 2002.08546), equation 4.

    >>> features = torch.tensor([[1.0], [5.0]])
    >>> soft_class_sums(features, torch.tensor([[1.0, 0.0], [0.25, 0.75]]))
    ClassSums(sums=tensor([[2.2500],
            [3.7500]], dtype=torch.float64), counts=tensor([1.2500, 0.7500], dtype=torch.float64))
    """
    check_features(features)
    check_same_pixels(probabilities, "probabilities", features)
    if probabilities.shape[1] < 1:
        raise ValueError(
            "Expected `probabilities` of shape (N, C, *) with at least one class, "
            f"but got {tuple(probabilities.shape)}."
        )
    return ClassSums(*_ops.soft_class_sums(features.detach(), probabilities.detach()))


def image_centroids(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    min_pixels: int = 1,
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor]:
    r"""Average the features of each class within each image.

    .. math:: x'_{n,:,c} = \frac{1}{|P_{n,c}|} \sum_{p \in P_{n,c}} x_{n,:,p}, \qquad y'_{n,c} = c

    with :math:`P_{n,c}` the pixels of image n whose label is c. The result is again features with
    labels, C "pixels" an image, and goes wherever those go: into `CategoryAnchors.update`, where
    every image then has the same say, or into a loss. Differentiable in the features. A feature
    that holds a NaN or an infinity is left out of its mean, as out of every anchor; a loss over
    centroids therefore does not show it, where a loss over pixels would.

    Args:
        features: ``(N, D, *)``, floating point.
        labels: ``(N, *)``, any integer dtype; outside ``[0, num_classes)`` is ignored.
        num_classes: C.
        min_pixels: a class with fewer pixels in an image is ignored in that image.
        ignore_index: the label of a class that an image has too little of.

    Returns:
        Features ``(N, D, C)``, float32 (float64 for float64 features), NaN where an image holds
        nothing of a class; and labels ``(N, C)`` int64, the class or ``ignore_index``.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or a number is wrong, or ``ignore_index`` is a class.

    Source: released CAG-UDA code, with ``min_pixels=10`` (the paper averages over all pixels).

    >>> features = torch.tensor([[[1.0, 3.0, 10.0]]])  # one image of three pixels, D = 1
    >>> image_centroids(features, torch.tensor([[0, 0, 1]]), num_classes=3)
    (tensor([[[ 2., 10., nan]]]), tensor([[  0,   1, 255]]))
    """
    check_features(features)
    check_labels(labels, features)
    num_classes = check_count(num_classes, "num_classes")
    min_pixels = check_count(min_pixels, "min_pixels")
    ignore_index = check_ignore_index(ignore_index, num_classes)
    sums, counts = _ops.image_sums(features, labels, num_classes)
    means = torch.where(counts[..., None] > 0, sums / counts[..., None].clamp(min=1), torch.nan)
    classes = torch.arange(num_classes, device=features.device)
    return means.mT, torch.where(counts >= min_pixels, classes, ignore_index)


def keep_correct(labels: Tensor, logits: Tensor, *, ignore_index: int = 255) -> Tensor:
    r"""Keep the labels that the classifier agrees with.

    .. math:: y'_i = y_i \text{ if } y_i = \arg\max_c z_{i,c} \text{ else ignore\_index}

    Args:
        labels: ``(N, *)``, any integer dtype.
        logits: ``(N, C, *)``, floating point. A pixel with a NaN among its logits is ignored.
        ignore_index: the label of all other pixels.

    Returns:
        ``(N, *)`` in the dtype of ``labels``.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape or a device is wrong, ``ignore_index`` is a class, or the dtype of
            ``labels`` cannot hold it.

    Source: section 3.2 of CAG-UDA and its released code: anchors are averaged over the correctly
    classified source pixels.

    >>> logits = torch.tensor([[2.0, 1.0], [0.0, 5.0], [3.0, 0.0]])
    >>> keep_correct(torch.tensor([0, 0, 255]), logits)
    tensor([  0, 255, 255])
    """
    check_logits(logits)
    check_labels(labels, logits, "logits")
    ignore_index = check_fits(check_ignore_index(ignore_index, logits.shape[1]), labels)
    largest, predictions = logits.detach().max(dim=1)
    # `max` returns the NaN where there is one, whose position means nothing.
    correct = (predictions == labels.long()) & ~largest.isnan()
    return torch.where(correct, predictions, ignore_index).to(labels.dtype)


def resize_labels(
    labels: Tensor,
    size: Sequence[int],
    *,
    mode: Literal["nearest", "majority"] = "nearest",
    min_ratio: float = 0.75,
    ignore_index: int = 255,
) -> Tensor:
    r"""Resize label maps without inventing labels.

    ``"nearest"`` takes pixel :math:`\lfloor i \cdot \text{in} / \text{out} \rfloor`, as
    ``interpolate(mode="nearest")`` does, but in integers. ``"majority"`` takes the most frequent
    label of the cell from :math:`\lfloor i \cdot \text{in} / \text{out} \rfloor` to
    :math:`\lceil (i + 1) \cdot \text{in} / \text{out} \rceil`, the bins of adaptive pooling, where
    its share of the cell is at least ``min_ratio``, and ``ignore_index`` elsewhere: borders between
    classes are left out rather than given to one side. Ignored pixels count towards a cell.

    Args:
        labels: ``(N, *)``, any integer dtype.
        size: the new spatial size, such as ``features.shape[2:]``.
        mode: how a pixel of the result is chosen.
        min_ratio: the least share of its cell a majority needs, in [0, 1]. Of equally frequent
            labels the smallest wins.
        ignore_index: the label of a cell without such a majority.

    Returns:
        ``(N, *size)`` in the dtype of ``labels``.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if ``size`` has another rank than ``labels`` or holds a number below 1, if
            ``mode`` or ``min_ratio`` is wrong, or if the dtype of ``labels`` cannot hold
            ``ignore_index``.

    Source: ``"nearest"`` is the released CAG-UDA code's; ``"majority"`` follows DAFormer
    (arXiv 2111.14887), section 3.3, whose ratio of 0.75 is the default.

    >>> labels = torch.tensor([[[0, 0, 1, 1], [0, 0, 2, 1]]])
    >>> resize_labels(labels, (1, 2))
    tensor([[[0, 1]]])
    >>> resize_labels(labels, (1, 2), mode="majority", min_ratio=0.8)
    tensor([[[  0, 255]]])
    """
    check_label_map(labels)
    check_choice(mode, "mode", ("nearest", "majority"))
    min_ratio = check_range(min_ratio, "min_ratio", 0.0, 1.0)
    size = check_size(size, labels)
    ignore_index = check_int(ignore_index, "ignore_index")
    spatial = labels.shape[1:]
    if mode == "majority":
        ignore_index = check_fits(ignore_index, labels)
        # An operator only where it is traced: the first call of any operator takes a second.
        resize = _ops.majority if torch.compiler.is_compiling() else majority
        resized: Tensor = resize(labels, size, min_ratio, ignore_index) if size else labels
        return resized
    for dim, new in enumerate(size):
        nearest = torch.arange(new, device=labels.device) * spatial[dim] // new
        labels = labels.index_select(dim + 1, nearest)
    return labels


@final
class CategoryAnchors(nn.Module):
    r"""Class anchors from a stream of batches, in one pass and constant memory.

    For a batch with sums :math:`s_c` and counts :math:`n_c`, for the classes that are in it:

    .. math:: a_c \leftarrow (1 - w_c)\, a_c + w_c\, \frac{s_c}{n_c}, \qquad
              w_c = \begin{cases}
                  n_c / (N_c + n_c) & \text{running mean} \\
                  \text{momentum} & \text{exponential moving average}
              \end{cases}

    where :math:`N_c` is the count so far, and the first batch of a class is taken whole. The
    running mean is the exact mean of all that was seen, whatever the order of the batches and
    however the stream was split; with ``max_count`` it forgets like one that never saw more than
    that many. Anchors are stored in float64 with int64 counts, in buffers that no ``.half()`` or
    ``.to(dtype)`` degrades. ``update`` does not communicate between processes.

    Args:
        num_classes: C.
        feature_dim: D.
        max_count: what the counts of a running mean are capped at.
        momentum: the weight of a new batch in an exponential moving average, in [0, 1], the
            convention of ``nn.BatchNorm2d``. ``None`` is the running mean.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if a number is out of its range, or both options are given.

    Source: equation 2 of CAG-UDA (arXiv 1910.13049); ``max_count=3000`` over `image_centroids`
    is what its released code does.

    >>> anchors = CategoryAnchors(num_classes=2, feature_dim=1)
    >>> anchors.update(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 0]))
    >>> anchors.update(torch.tensor([[6.0], [9.0]]), torch.tensor([0, 255]))
    >>> anchors.compute()
    tensor([[3.],
            [nan]])
    >>> anchors.counts
    tensor([3, 0])
    """

    means: Tensor
    """(C, D) float64: the anchors, 0 where a class is unseen. Read them through `compute`."""
    counts: Tensor
    """(C,) int64: what each anchor averages; capped by ``max_count``."""
    passed_with_counts: bool = False
    """True in a process that was started with this accumulator, already filled, as an argument."""

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        max_count: int | None = None,
        momentum: float | None = None,
    ) -> None:
        super().__init__()
        num_classes = check_count(num_classes, "num_classes")
        feature_dim = check_count(feature_dim, "feature_dim")
        if max_count is not None and momentum is not None:
            raise ValueError(
                "Expected `max_count` or `momentum`, but got both: a capped running mean already "
                "forgets, as an exponential moving average does."
            )
        if max_count is not None:
            max_count = check_count(max_count, "max_count")
        if momentum is not None:
            momentum = check_range(momentum, "momentum", 0.0, 1.0)
        self.num_classes: int = num_classes
        self.feature_dim: int = feature_dim
        self.max_count: int | None = max_count
        self.momentum: float | None = momentum
        self.register_buffer("means", torch.zeros(num_classes, feature_dim, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))

    @classmethod
    def from_centroids(
        cls,
        centroids: Tensor | npt.NDArray[np.floating],
        counts: Tensor | npt.NDArray[np.integer] | None = None,
        *,
        max_count: int | None = None,
        momentum: float | None = None,
    ) -> Self:
        """Go on from centroids that were computed before: the way back from `compute`.

        A running mean goes on as if it had never stopped only with the counts it had: they are the
        weight of the past against the next batch. Without them each centroid weighs as much as one
        feature, and the first batch all but replaces it; an exponential moving average does not
        ask for more. What `compute` rounds to float32 stays rounded; ``state_dict`` is exact.

        Args:
            centroids: ``(C, D)``, floating point, a tensor or a NumPy array, which is copied. A row
                that is not finite is an unseen class.
            counts: ``(C,)``, integer, likewise: what each centroid averages, 0 for an unseen class;
                that of a row that is not finite has no meaning. ``None`` is 1 for each seen class.
            max_count: see `CategoryAnchors`; caps these counts too.
            momentum: see `CategoryAnchors`.

        Returns:
            Anchors on the device of ``centroids``, the CPU for an array.

        Raises:
            TypeError: if a dtype is wrong.
            ValueError: if a shape, a device or an option is wrong, or a count is negative.

        >>> centroids = np.array([[3.0], [np.nan]])
        >>> anchors = CategoryAnchors.from_centroids(centroids, np.array([3, 0]))
        >>> anchors.update(torch.tensor([[7.0], [1.0]]), torch.tensor([0, 1]))
        >>> anchors.compute().numpy()
        array([[4.],
               [1.]], dtype=float32)
        """
        rows = as_floats(centroids, "centroids")
        check_anchor_rows(rows, "centroids")
        anchors = cls(*rows.shape, max_count=max_count, momentum=momentum).to(rows.device)
        means = rows.detach().to(anchors.means.device).to(anchors.means.dtype)
        finite = means.isfinite().all(dim=1)
        if counts is None:
            weights = finite.long()
        else:
            weights = as_integers(counts, "counts", rows.device)
            check_one_per_class(weights, "counts", len(rows), rows, "centroids")
            check_values(rows, "centroids")
            weights = torch.where(finite, weights.to(anchors.counts), 0)
            if (weights < 0).any():
                raise ValueError(
                    f"Expected `counts` of at least 0, but got {int(weights.min())}. "
                    "A class that was never seen has the count 0."
                )
        anchors._blend(means, weights, finite.to(means.dtype))
        return anchors

    @property
    def seen(self) -> Tensor:
        """(C,) bool: which classes have contributed."""
        return self.counts > 0

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features ``(N, D, *)`` with labels ``(N, *)``; see `class_sums`."""
        check_batch(features, self.means, "anchors")
        self.update_sums(*class_sums(features, labels, self.num_classes))

    def update_sums(
        self,
        sums: Tensor | npt.NDArray[np.floating],
        counts: Tensor | npt.NDArray[np.integer],
    ) -> None:
        """Add class sums ``(C, D)`` of a floating dtype over integer counts ``(C,)``."""
        device = self.means.device
        sums, counts = as_floats(sums, "sums", device), as_integers(counts, "counts", device)
        check_sums(sums, counts, (self.num_classes, self.feature_dim))
        if has_float64(sums.device):
            check_device(sums, "sums", self.means, "anchors")
        counts = counts.detach().to(self.counts)
        sums = sums.detach().to(self.means.device).to(self.means.dtype)
        weights = self._share(counts)
        if self.momentum is not None:
            weights = torch.where(self.seen, weights.new_full((), self.momentum), 1.0)
        self._blend(sums / counts[:, None], counts, weights)

    def merge(self, other: Self) -> None:
        """Add what another accumulator of the same settings has seen.

        Anchors are averaged with their counts as weights. For the exact running mean that is what
        one accumulator over both streams holds; moving averages and capped counts depend on an
        order that two streams do not have.
        """
        check_mergeable(other, self)
        if self._settings() != other._settings():
            raise ValueError(
                f"Expected `other` to be CategoryAnchors({self.extra_repr()}), "
                f"but got CategoryAnchors({other.extra_repr()}). Merge equal settings only."
            )
        check_device(other.means, "other", self.means, "anchors")
        self._blend(other.means, other.counts, self._share(other.counts))

    def compute(self) -> Tensor:
        """Return the anchors (C, D) in float32, NaN in the rows of unseen classes."""
        return torch.where(self.seen[:, None], self.means, torch.nan).float()

    def _settings(self) -> tuple[int, int, int | None, float | None]:
        return self.num_classes, self.feature_dim, self.max_count, self.momentum

    def _share(self, counts: Tensor) -> Tensor:
        """Return these counts as a fraction of all counts, theirs included."""
        return counts.to(self.means.dtype) / (self.counts + counts).clamp(min=1)

    def _blend(self, means: Tensor, counts: Tensor, weights: Tensor) -> None:
        present = counts > 0
        # Absent classes have no mean (0/0): replaced before the product, not by a weight of 0.
        means = torch.where(present[:, None], means, self.means)
        self.means.lerp_(means, torch.where(present, weights, 0.0)[:, None])
        self.counts.add_(counts)
        if self.max_count is not None:
            self.counts.clamp_(max=self.max_count)

    reset = reset_state
    extra_repr = shown("num_classes", "feature_dim", "max_count", "momentum")
    _apply = move_buffers
    __getstate__ = sent_state
    __setstate__ = receive_state


@final
class AnchorClusters(nn.Module):
    r"""Several anchors of each class, by k-means of its features in passes over a stream.

    .. math:: a_{c,m} \leftarrow \frac{1}{|P_{c,m}|} \sum_{i \in P_{c,m}} x_i, \qquad
              P_{c,m} = \{i : y_i = c,\ m = \arg\min_j \lVert x_i - a_{c,j} \rVert_2\}

    In the first pass `update` samples candidates of each class, and `step` chooses the first
    anchors among them as k-means++ does: each by the squared distance to those before it. In every
    later pass `update` assigns the features and adds them up, and `step` moves the anchors::

        for _ in range(passes):
            for features, labels in stream:
                clusters.update(features, labels)
            clusters.step()

    Ignored labels and features that are not finite do not contribute. ``update`` does not
    communicate between processes: call `all_reduce` before each ``step``, and all ranks have the
    same anchors. Sums are float64 with int64 counts. The candidates are random, but the same for
    one seed on every device and however the stream is divided into batches.

    Args:
        num_classes: C.
        feature_dim: D.
        anchors_per_class: M.
        seed: of the candidates and of the choice among them.

    Raises:
        TypeError: if an argument or a dtype is wrong.
        ValueError: if a number, a shape or a device is wrong.

    Source: k-means as in MADA (arXiv 2108.07991) and BiSMAP, with the seeds of k-means++ (Arthur
    and Vassilvitskii, 2007) among 64 candidates for each anchor.

    >>> clusters = AnchorClusters(num_classes=2, feature_dim=1, anchors_per_class=2)
    >>> features, labels = torch.tensor([[1.0], [2.0], [9.0], [5.0]]), torch.tensor([0, 0, 0, 1])
    >>> for _ in range(3):
    ...     clusters.update(features, labels)
    ...     move = clusters.step()
    >>> clusters.compute().squeeze(2).sort(dim=1).values
    tensor([[1.5000, 9.0000],
            [5.0000,    nan]])
    >>> move
    tensor(0., dtype=torch.float64)
    """

    anchors: Tensor
    """(C, M, D) float64: NaN where there is none. Read them through `compute`."""
    sums: Tensor
    """(C, M, D) float64: of the features of each anchor in this pass."""
    counts: Tensor
    """(C, M) int64: their number; in the first pass of each class, in the first column."""
    candidates: Tensor
    """(C, K, D) float32: the sample of the first pass; (C, 0, D) later."""
    priorities: Tensor
    """(C, K) int64: those of the candidates, ascending."""
    passed_with_counts: bool = False
    """True in a process that was started with this accumulator, already filled, as an argument."""

    def __init__(
        self, num_classes: int, feature_dim: int, anchors_per_class: int, *, seed: int = 0
    ) -> None:
        super().__init__()
        num_classes = check_count(num_classes, "num_classes")
        feature_dim = check_count(feature_dim, "feature_dim")
        anchors_per_class = check_count(anchors_per_class, "anchors_per_class")
        self.seed: int = check_int(seed, "seed")
        shape = num_classes, anchors_per_class, feature_dim
        self.register_buffer("anchors", torch.full(shape, torch.nan, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(shape[:2], dtype=torch.int64))
        self.register_buffer("candidates", torch.zeros(num_classes, 0, feature_dim))
        self.register_buffer("priorities", torch.zeros(num_classes, 0, dtype=torch.int64))
        self._resize(_CANDIDATES * anchors_per_class)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features ``(N, D, *)`` with labels ``(N, *)`` to this pass."""
        check_batch(features, self.anchors, "anchors")
        check_labels(labels, features)
        features, labels = features.detach(), labels.long()
        num_classes, per_class, dim = self.anchors.shape
        labels = torch.where((labels >= 0) & (labels < num_classes), labels, -1)
        if self._is_first_pass():
            self._sample(features, labels)
            return
        # To the own anchors alone: the other classes' would be M·C distances a pixel.
        present = self.anchors.isfinite().all(dim=2).to(features.device)
        points = self.anchors.to(features.device, result_dtype(features))
        squared = torch.stack(
            [
                torch.where(
                    present[labels, m],
                    _ops.pixel_losses(features, labels, points[:, m], "squared"),
                    torch.inf,
                )
                for m in range(per_class)
            ]
        )
        least, nearest = squared.min(dim=0)
        cluster = torch.where((labels >= 0) & (least < torch.inf), labels * per_class + nearest, -1)
        sums, counts = _ops.class_sums(features, cluster, num_classes * per_class)
        self.sums += sums.view(num_classes, per_class, dim).to(self.sums)
        self.counts += counts.view(num_classes, per_class).to(self.counts)

    def step(self) -> Tensor:
        """Move the anchors, begin the next pass, and return the largest move, a scalar.

        The first step places the anchors: its move is infinite. An anchor without features stays.
        """
        if self._is_first_pass():
            self.anchors.copy_(self._seeds())
            self._resize(0)
            move = self.anchors.new_full((), torch.inf)
        else:
            moved = self.sums / self.counts[:, :, None].clamp(min=1)
            moved = torch.where((self.counts > 0)[:, :, None], moved, self.anchors)
            move = (moved - self.anchors).norm(dim=2).nan_to_num(0.0).amax()
            self.anchors.copy_(moved)
        self.sums.zero_()
        self.counts.zero_()
        return move

    def merge(self, other: Self) -> None:
        """Add what another one, with the same settings and anchors, has seen in this pass."""
        check_mergeable(other, self)
        mine, its = self.extra_repr(), other.extra_repr()
        if mine != its or self._is_first_pass() != other._is_first_pass():
            raise ValueError(
                f"Expected `other` to be AnchorClusters({mine}) in the same pass, but got "
                f"AnchorClusters({its}). Merge equal settings, before the same step."
            )
        check_device(other.anchors, "other", self.anchors, "anchors")
        self.sums += other.sums
        self.counts += other.counts
        self.candidates, self.priorities = join_samples(
            (self.candidates, self.priorities), (other.candidates, other.priorities)
        )

    def reset(self) -> None:
        """Forget everything."""
        self.anchors.fill_(torch.nan)
        self.sums.zero_()
        self.counts.zero_()
        self._resize(_CANDIDATES * self.anchors.shape[1])
        self.passed_with_counts = False

    def compute(self) -> Tensor:
        """Return the anchors (C, M, D) in float32.

        Rows are NaN before the first step, and where a class has fewer distinct candidates.
        """
        return self.anchors.float()

    def _is_first_pass(self) -> bool:
        return self.priorities.shape[1] > 0

    def _resize(self, count: int) -> None:
        """Allocate an empty sample of that many candidates a class."""
        num_classes, _, dim = self.anchors.shape
        self.candidates = self.candidates.new_zeros(num_classes, count, dim)
        self.priorities = self.priorities.new_full((num_classes, count), NO_PRIORITY)

    def _sample(self, features: Tensor, labels: Tensor) -> None:
        """Sample candidates of each class."""
        if labels.numel() == 0:
            return
        num_classes, count = self.priorities.shape
        zero = features.new_zeros(1, features.shape[1])
        norms = _ops.pixel_losses(features, torch.zeros_like(labels), zero, "euclidean")
        used = (labels >= 0) & norms.isfinite()
        classes = torch.where(used, labels, num_classes).flatten()
        seen = self.counts.sum().to(used.device)
        chosen, priorities, sizes = sample_of_classes(
            classes, num_classes, count, seen=seen, seed=self.seed
        )
        pixels = features.flatten(2) if features.ndim > 2 else features.unsqueeze(2)
        rows = pixels[chosen // pixels.shape[2], :, chosen % pixels.shape[2]].to(self.candidates)
        self.candidates, self.priorities = join_samples(
            (self.candidates, self.priorities), (rows, priorities.to(self.priorities))
        )
        self.counts[:, 0] += sizes.to(self.counts)

    def _seeds(self) -> Tensor:
        """Return seeds (C, M, D) of k-means++ from the candidates; NaN where not distinct."""
        x, (num_classes, per_class, _) = self.candidates.double(), self.anchors.shape
        some = torch.arange(num_classes * per_class, device=x.device)
        draws = random_priorities(some, self.seed).view(num_classes, per_class) / NO_PRIORITY
        # Candidates are in random order: the first one is a uniform draw.
        squared = (self.priorities < NO_PRIORITY).double()
        index = torch.zeros(num_classes, dtype=torch.int64, device=x.device)
        seeds = []
        for m in range(per_class):
            total = squared.sum(dim=1)
            if m > 0:
                below = squared.cumsum(dim=1) <= (draws[:, m] * total)[:, None]
                index = below.sum(dim=1).clamp(max=x.shape[1] - 1)
            seed = x.gather(1, index[:, None, None].expand(-1, 1, x.shape[2]))
            seeds.append(torch.where(total[:, None, None] > 0, seed, torch.nan))
            to_seed = (x - seed).square().sum(dim=2)
            squared = torch.minimum(squared, to_seed) if m > 0 else squared * to_seed
        return torch.cat(seeds, dim=1)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *others: object
    ) -> None:
        # There are as many candidates as in the pass of the state.
        saved = state_dict.get(prefix + "priorities")
        if isinstance(saved, Tensor) and saved.ndim == 2:
            self._resize(saved.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        """Return the settings, as ``repr`` shows them."""
        num_classes, per_class, dim = self.anchors.shape
        return (
            f"num_classes={num_classes}, feature_dim={dim}, anchors_per_class={per_class}, "
            f"seed={self.seed}"
        )

    _apply = move_buffers
    __getstate__ = sent_state
    __setstate__ = receive_state
