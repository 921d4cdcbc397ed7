"""Losses over features and (pseudo-)labels: pull features to their anchor, keep classes apart.

Each is a function and a module that calls it. Anchors are passed in, never owned and never
differentiated through. Where no pixel is active a loss is a zero that is connected to the graph.

``pixel_weights`` is everywhere a floating-point tensor ``(N, *)``, a constant to the gradient: the
loss is the mean over the active pixels of weight × loss. Weights do not renormalize: weights of 1
change nothing. The weight of an ignored pixel has no influence.
"""

import math
from collections.abc import Sequence
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _ops
from ._checks import (
    PerClass,
    as_per_class,
    check_alike,
    check_anchor_rows,
    check_anchors,
    check_choice,
    check_class_ids,
    check_device,
    check_feature_dim,
    check_features,
    check_floating,
    check_labels,
    check_logits,
    check_one_per_class,
    check_pixel_weights,
    check_positive,
    check_range,
    check_same_pixels,
)
from ._ops.reference import result_dtype
from ._similarity import Similarity, check_similarity, seen_classes, similarities
from ._state import move_buffers, shown

Distance = Literal["euclidean", "squared", "smooth_l1"]
Average = Literal["pixel", "class"]


def anchor_distance_loss(
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    *,
    distance: Distance = "euclidean",
    average: Average = "pixel",
    pixel_weights: Tensor | None = None,
) -> Tensor:
    r"""Return the mean distance of the features to the anchor of their label.

    .. math:: \ell_i = \begin{cases}
                  \lVert x_i - a_{y_i} \rVert_2 & \text{"euclidean"} \\
                  \lVert x_i - a_{y_i} \rVert_2^2 & \text{"squared"} \\
                  \frac{1}{D} \sum_j \mathrm{huber}_1(x_{ij} - a_{y_i j}) & \text{"smooth\_l1"}
              \end{cases}

    averaged over the active pixels, or, for ``average="class"``, over the pixels of each class
    and then over the classes that have any. Of several anchors of a class the nearest counts, by
    that distance. The Euclidean gradient at x = a is 0. Differentiable once, in the features.

    Args:
        features: ``(N, D, *)``, floating point.
        labels: ``(N, *)``, any integer dtype. Active is a label in [0, C) of a seen class.
        anchors: ``(C, D)``, or ``(C, M, D)`` for several of each class, floating point. A row that
            is not finite is absent; a class without any other row is unseen.
        distance: see above.
        average: see above.
        pixel_weights: ``(N, *)``, floating point, multiplied with the losses before the average.

    Returns:
        A scalar, float32 (float64 for float64 features), which the squared distances must not
        overflow. A non-finite feature propagates where its label is active and nowhere else.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device, ``distance`` or ``average`` is wrong.

    Source: equation 5 of CAG-UDA (arXiv 1910.13049); ``"smooth_l1"`` is its released code's.

    >>> features = torch.tensor([[3.0, 4.0], [0.0, 1.0], [7.0, 7.0]], requires_grad=True)
    >>> loss = anchor_distance_loss(features, torch.tensor([0, 0, 255]), torch.zeros(1, 2))
    >>> loss.item()
    3.0
    >>> loss.backward()
    >>> features.grad
    tensor([[0.3000, 0.4000],
            [0.0000, 0.5000],
            [0.0000, 0.0000]])
    """
    check_choice(distance, "distance", ("euclidean", "squared", "smooth_l1"))
    check_choice(average, "average", ("pixel", "class"))
    targets = _active_labels(features, labels, anchors, pixel_weights)
    losses: Tensor = _ops.pixel_losses(features, targets, anchors.detach(), distance)
    losses = _weighted(losses, targets >= 0, pixel_weights)
    return (losses * _shares(targets, anchors.shape[0], average, losses.dtype)).sum()


def discriminative_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: PerClass | None = None,
    label_smoothing: float = 0.0,
    pixel_weights: Tensor | None = None,
) -> Tensor:
    r"""Return the cross-entropy of the classifier on labels or pseudo-labels.

    .. math:: \ell = -\frac{\sum_i w_{y_i} \log \mathrm{softmax}(z_i)_{y_i}}{\sum_i w_{y_i}}

    What ``torch.nn.functional.cross_entropy`` computes, under the contract of this library: any
    label outside [0, C) is ignored, and an ignored pixel has no influence, whatever its logits.

    Args:
        logits: ``(N, C, *)``, floating point; half precision is computed in float32.
        labels: ``(N, *)``, any integer dtype.
        weight: of each class, a tensor, array or sequence ``(C,)``.
        label_smoothing: as in ``cross_entropy``, in [0, 1].
        pixel_weights: ``(N, *)``, floating point, multiplied with the losses before the average.

    Returns:
        A scalar, float32 (float64 for float64 logits).

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or ``label_smoothing`` is wrong.

    Source: equation 6 of CAG-UDA (arXiv 1910.13049), the discriminative term.

    >>> logits = torch.zeros(2, 4)
    >>> discriminative_loss(logits, torch.tensor([1, 255]))
    tensor(1.3863)
    """
    check_logits(logits)
    check_labels(labels, logits, "logits")
    label_smoothing = check_range(label_smoothing, "label_smoothing", 0.0, 1.0)
    check_pixel_weights(pixel_weights, labels)
    if weight is not None:
        weight = _weight_of_classes(weight, logits).to(result_dtype(logits))
    targets = _labels_in_range(labels, logits.shape[1])
    active = targets >= 0
    losses = _cross_entropies(logits, targets, weight, label_smoothing)
    total = active.sum() if weight is None else torch.where(active, weight[targets], 0.0).sum()
    return _weighted(losses, active, pixel_weights).sum() / torch.where(total == 0, 1, total)


def anchor_contrastive_loss(
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    *,
    similarity: Similarity = "euclidean",
    temperature: float = 1.0,
    pixel_weights: Tensor | None = None,
) -> Tensor:
    r"""Return the cross-entropy of the softmax over similarities to the anchors.

    .. math:: \ell_i = -\log \frac{\exp(s(x_i, a_{y_i}) / \tau)}
                                  {\sum_{k\ \text{seen}} \exp(s(x_i, a_k) / \tau)}

    averaged over the active pixels: the explicit push away from the anchors of other classes. Of
    several anchors of a class the nearest counts. Differentiable once, in the features.

    Args:
        features: ``(N, D, *)``, floating point.
        labels: ``(N, *)``, any integer dtype. Active is a label in [0, C) of a seen class.
        anchors: ``(C, D)``, or ``(C, M, D)`` for several of each class, floating point. A row that
            is not finite is absent; a class without any other row is unseen.
        similarity: s: ``"euclidean"`` −‖x − a‖₂, ``"squared"`` −‖x − a‖₂², ``"cosine"``, or
            ``"dot"``.
        temperature: τ > 0, in the units of the similarity.
        pixel_weights: ``(N, *)``, floating point, multiplied with the losses before the average.

    Returns:
        A scalar, float32 (float64 for float64 features). A non-finite feature propagates where
        its label is active and nowhere else.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device, ``similarity`` or ``temperature`` is wrong.

    Source: ProDA (arXiv 2101.10979) weights pseudo-labels with the softmax over distances; with
    ``"dot"`` this is SePiCo's contrast to class centroids (arXiv 2204.08808), whose code lets a
    class that was never seen compete as a zero vector.

    >>> anchors = torch.tensor([[0.0], [2.0]])
    >>> anchor_contrastive_loss(torch.tensor([[0.0]]), torch.tensor([0]), anchors)
    tensor(0.1269)
    """
    check_similarity(similarity)
    temperature = check_positive(temperature, "temperature")
    targets = _active_labels(features, labels, anchors, pixel_weights)
    losses: Tensor
    if similarity == "euclidean":
        losses, _ = _ops.contrastive_losses(features, targets, anchors.detach(), temperature)
    else:
        logits = similarities(features, anchors, similarity, targets >= 0) / temperature
        losses = _cross_entropies(logits, targets)
    return _mean(losses, targets >= 0, pixel_weights)


def anchor_consistency_loss(
    features: Tensor,
    teacher_probabilities: Tensor,
    anchors: Tensor,
    *,
    similarity: Similarity = "euclidean",
    temperature: float = 1.0,
    pixel_weights: Tensor | None = None,
) -> Tensor:
    r"""Return the mean divergence of the soft assignment of features from that of a teacher.

    .. math:: \ell_i = \sum_{k\ \text{seen}} t_{i,k} \log \frac{t_{i,k}}{p_{i,k}}

    averaged over the active pixels, with p the `anchor_probabilities` of the features.
    Differentiable once, in the features.

    Args:
        features: ``(N, D, *)``, floating point.
        teacher_probabilities: t, ``(N, C, *)``, floating point, such as `anchor_probabilities` of
            the teacher's features; a constant to the gradient. A pixel is active where these are
            finite and a seen class has any.
        anchors: ``(C, D)``, or ``(C, M, D)`` for several of each class, floating point. A row that
            is not finite is absent; a class without any other row is unseen.
        similarity: s: ``"euclidean"``, ``"squared"``, ``"cosine"`` or ``"dot"``, as in
            `anchor_probabilities`.
        temperature: τ > 0, in the units of the similarity.
        pixel_weights: ``(N, *)``, floating point, multiplied with the losses before the average.

    Returns:
        A scalar, float32 (float64 for float64 features). A non-finite feature propagates where its
        pixel is active and nowhere else.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device, ``similarity`` or ``temperature`` is wrong.

    Source: ProDA (arXiv 2101.10979), equation 9, whose code averages over pixels and classes, which
    is 1/C of this; with ``"dot"`` the swapped prediction of CPSL (arXiv 2203.09744), but for the
    entropy of its targets.

    >>> anchors = torch.tensor([[0.0], [2.0]])
    >>> anchor_consistency_loss(torch.tensor([[1.0]]), torch.tensor([[1.0, 0.0]]), anchors)
    tensor(0.6931)
    """
    check_features(features)
    check_anchors(anchors, features)
    check_same_pixels(
        teacher_probabilities, "teacher_probabilities", features, channels=anchors.shape[0]
    )
    check_similarity(similarity)
    temperature = check_positive(temperature, "temperature")
    check_pixel_weights(pixel_weights, features[:, 0], "features")
    seen = seen_classes(anchors, features.ndim - 1)
    teacher = teacher_probabilities.detach().to(result_dtype(features))
    active = teacher.isfinite().all(dim=1) & torch.where(seen, teacher > 0, False).any(dim=1)
    teacher = torch.where(seen & active.unsqueeze(1), teacher, 0.0)
    logits = similarities(features, anchors, similarity, active) / temperature
    logarithms = torch.where(seen, logits.log_softmax(dim=1), 0.0)
    losses = (torch.xlogy(teacher, teacher) - teacher * logarithms).sum(dim=1)
    return _mean(losses, active, pixel_weights)


def anchor_distribution_loss(
    features: Tensor,
    labels: Tensor,
    means: Tensor,
    variances: Tensor,
    *,
    temperature: float = 1.0,
    pixel_weights: Tensor | None = None,
) -> Tensor:
    r"""Return the expected contrast of features to the samples of Gaussian classes.

    .. math:: \ell_i = -\frac{x_i \cdot \mu_{y_i}}{\tau} + \log \sum_{k\ \text{seen}}
              \exp\Bigl(\frac{x_i \cdot \mu_k}{\tau}
                        + \frac{1}{2 \tau^2} \sum_d \sigma_{k,d}^2\, x_{i,d}^2\Bigr)

    averaged over the active pixels: an upper bound of the contrast to infinitely many samples of
    each class. Differentiable once, in the features.

    Args:
        features: ``(N, D, *)``, floating point; SePiCo's have unit length.
        labels: ``(N, *)``, any integer dtype. Active is a label in [0, C) of a seen class.
        means: μ, ``(C, D)``, floating point. A class is unseen where its mean or variance is not
            finite.
        variances: σ², ``(C, D)``, floating point, such as those of `ClassVariances`.
        temperature: τ > 0.
        pixel_weights: ``(N, *)``, floating point, multiplied with the losses before the average.

    Returns:
        A scalar, float32 (float64 for float64 features). A non-finite feature propagates where its
        label is active and nowhere else.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or ``temperature`` is wrong.

    Source: SePiCo (arXiv 2204.08808), equation 11, whose code lets a class that was never seen
    compete with a mean and variance of 0, and returns a zero without a graph where nothing is
    labeled.

    >>> means, variances = torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.0], [0.0]])
    >>> anchor_distribution_loss(torch.tensor([[1.0]]), torch.tensor([0]), means, variances)
    tensor(0.1269)
    """
    check_features(features)
    check_anchor_rows(means, "means")
    check_feature_dim(features, means.shape[1])
    check_device(means, "means", features, "features")
    check_floating(variances, "variances")
    check_alike(variances, "variances", means, "means")
    check_labels(labels, features)
    check_pixel_weights(pixel_weights, labels)
    temperature = check_positive(temperature, "temperature")
    means, variances = means.detach().to(result_dtype(means)), variances.detach()
    seen = means.isfinite().all(dim=1) & variances.isfinite().all(dim=1)
    targets = _labels_in_range(labels, len(means))
    targets = torch.where(seen[targets], targets, -1)
    active = targets >= 0
    linear = torch.where(seen[:, None], means, 0.0) / temperature
    squared = torch.where(seen[:, None], variances, 0.0) / (2 * temperature**2)
    forms = _ops.quadratic_forms(features, torch.cat([linear, linear]), squared)
    forms = torch.where(active.unsqueeze(1), forms, 0.0)
    own, expected = forms.split(len(means), dim=1)
    own = own.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    unseen = ~seen.view(-1, *[1] * (features.ndim - 2))
    # Without any class the logarithm of an empty sum is −∞, with a gradient that is NaN.
    total = expected.masked_fill(unseen & active.unsqueeze(1), -math.inf).logsumexp(dim=1)
    return _mean(torch.where(active, total - own, 0.0), active, pixel_weights)


def symmetric_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    pixel_weights: Tensor | None = None,
) -> Tensor:
    r"""Return the cross-entropy plus the reverse cross-entropy, which bounds a wrong label's loss.

    .. math:: \ell_i = -\alpha \log p_{i,y_i} - \beta \log(10^{-4})
              \sum_{k \ne y_i} \operatorname{clamp}(p_{i,k}, 10^{-7}, 1), \qquad
              p_i = \mathrm{softmax}(z_i)

    averaged over the active pixels. The logarithm of a label's zeros is that of 1e-4.

    Args:
        logits: ``(N, C, *)``, floating point; half precision is computed in float32.
        labels: ``(N, *)``, any integer dtype; ignored outside [0, C).
        alpha: α ≥ 0.
        beta: β ≥ 0.
        pixel_weights: ``(N, *)``, floating point, multiplied with the losses before the average.

    Returns:
        A scalar, float32 (float64 for float64 logits).

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device, ``alpha`` or ``beta`` is wrong.

    Source: Wang et al. (arXiv 1908.06112) in the form of ProDA's code (arXiv 2101.10979), whose
    defaults these are; it divides by the number of labeled pixels + 1e-6.

    >>> symmetric_cross_entropy(torch.zeros(1, 2), torch.tensor([1]))  # 0.1 ln 2 + 4.6052
    tensor(4.6745)
    """
    check_logits(logits)
    check_labels(labels, logits, "logits")
    check_pixel_weights(pixel_weights, labels)
    alpha = check_range(alpha, "alpha", 0.0, math.inf)
    beta = check_range(beta, "beta", 0.0, math.inf)
    targets = _labels_in_range(labels, logits.shape[1])
    active = targets >= 0
    # At once, so that the gradients of the two parts are not added up in half precision.
    logits = torch.where(active.unsqueeze(1), logits.to(result_dtype(logits)), 0.0)
    probabilities = logits.softmax(dim=1).clamp(1e-7, 1.0)
    classes = torch.arange(logits.shape[1], device=logits.device)
    others = targets.unsqueeze(1) != classes.view(-1, *[1] * (logits.ndim - 2))
    reverse = -math.log(1e-4) * torch.where(others, probabilities, 0.0).sum(dim=1)
    losses = alpha * _cross_entropies(logits, targets) + beta * reverse
    return _mean(torch.where(active, losses, 0.0), active, pixel_weights)


def information_maximization_loss(logits: Tensor) -> Tensor:
    r"""Return the mean entropy of the predictions minus the entropy of their mean.

    .. math:: \ell = \frac{1}{n} \sum_i H(p_i) - H\Bigl(\frac{1}{n} \sum_i p_i\Bigr), \qquad
              H(p) = -\sum_k p_k \log(p_k + 10^{-5})

    over all n pixels of the batch: each prediction is to be sure, and all together diverse. It
    needs no labels. As the mean prediction belongs to all pixels, there are no pixel weights.

    Args:
        logits: ``(N, C, *)``, floating point; half precision is computed in float32.

    Returns:
        A scalar, float32 (float64 for float64 logits), in [−log C, 0] but for the 1e-5.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape is wrong.

    Source: SHOT (arXiv 2002.08546), equation 3, and its code's 1e-5.

    >>> information_maximization_loss(torch.tensor([[20.0, 0.0], [0.0, 20.0]]))
    tensor(-0.6931)
    """
    check_logits(logits)
    probabilities = logits.to(result_dtype(logits)).softmax(dim=1).movedim(1, -1).flatten(0, -2)
    mean = probabilities.sum(dim=0) / max(1, len(probabilities))
    entropies = -(probabilities * (probabilities + 1e-5).log()).sum()
    return entropies / max(1, len(probabilities)) + (mean * (mean + 1e-5).log()).sum()


def feature_distance_loss(
    features: Tensor,
    reference: Tensor,
    labels: Tensor | None = None,
    *,
    classes: Sequence[int] | None = None,
    pixel_weights: Tensor | None = None,
) -> Tensor:
    r"""Return the mean Euclidean distance of features to those of another network.

    .. math:: \ell_i = \lVert x_i - r_i \rVert_2

    averaged over the pixels whose label is one of the classes. The gradient at x = r is 0.
    Differentiable once, in the features.

    Args:
        features: ``(N, D, *)``, floating point.
        reference: r, ``(N, D, *)``, floating point: a constant to the gradient, such as the
            features of a frozen network for the same images.
        labels: ``(N, *)``, any integer dtype; needed with ``classes``.
        classes: the class ids whose pixels are active. ``None`` is every pixel, whatever its label.
        pixel_weights: ``(N, *)``, floating point, multiplied with the losses before the average.

    Returns:
        A scalar, float32 (float64 for float64 features). A non-finite feature propagates where its
        pixel is active and nowhere else.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape or a device is wrong, or ``classes`` come without ``labels``.

    Source: the ImageNet feature distance of DAFormer (arXiv 2111.14887), equation 6; without an
    active pixel its code gives NaN, where this is a zero that is connected to the graph.

    >>> features, labels = torch.tensor([[3.0, 4.0], [9.0, 9.0]]), torch.tensor([1, 0])
    >>> feature_distance_loss(features, torch.zeros(2, 2), labels, classes=[1, 2])
    tensor(5.)
    """
    check_features(features)
    check_features(reference, "reference")
    check_alike(reference, "reference", features, "features")
    check_pixel_weights(pixel_weights, features[:, 0], "features")
    if labels is not None:
        check_labels(labels, features)
    active = torch.ones_like(features[:, 0], dtype=torch.bool)
    if classes is not None:
        if labels is None:
            raise ValueError("Expected `labels` with `classes`, but got None. Pass their labels.")
        ids = labels.long()
        active = torch.zeros_like(active)
        for c in check_class_ids(classes):
            active = active | (ids == c)
    distances = _ops.map_distances(features, reference.detach())
    return _mean(torch.where(active, distances, 0.0), active, pixel_weights)


@final
class AnchorDistanceLoss(nn.Module):
    r"""Mean distance of the features to the anchor of their label; see `anchor_distance_loss`.

    Args:
        distance: ``"euclidean"`` ‖x − a‖₂, ``"squared"`` ‖x − a‖₂², or ``"smooth_l1"``, the mean
            over D of the Huber function at 1.
        average: over the active ``"pixel"``s, or within each ``"class"`` first.

    Shape:
        - features: ``(N, D, *)``, floating point; labels: ``(N, *)``, integer; anchors:
          ``(C, D)`` or ``(C, M, D)``, floating point.
        - Output: scalar, float32 (float64 for float64 features).

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or an option is wrong.

    Source: equation 5 of CAG-UDA (arXiv 1910.13049).

    >>> features, anchors = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    >>> AnchorDistanceLoss("squared")(features, torch.tensor([0]), anchors)
    tensor(25.)
    """

    def __init__(self, distance: Distance = "euclidean", *, average: Average = "pixel") -> None:
        super().__init__()
        check_choice(distance, "distance", ("euclidean", "squared", "smooth_l1"))
        check_choice(average, "average", ("pixel", "class"))
        self.distance: Distance = distance
        self.average: Average = average

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        anchors: Tensor,
        *,
        pixel_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of features (N, D, *) with labels (N, *) against anchors."""
        return anchor_distance_loss(
            features,
            labels,
            anchors,
            distance=self.distance,
            average=self.average,
            pixel_weights=pixel_weights,
        )

    def extra_repr(self) -> str:
        """Return the settings, as ``repr`` shows them."""
        return f"{self.distance!r}, average={self.average!r}"


@final
class DiscriminativeLoss(nn.Module):
    r"""Cross-entropy of the classifier on (pseudo-)labels; see `discriminative_loss`.

    Args:
        weight: of each class, a tensor, array or sequence ``(C,)``; a buffer.
        label_smoothing: as in ``torch.nn.CrossEntropyLoss``, in [0, 1].

    Shape:
        - logits: ``(N, C, *)``, floating point; labels: ``(N, *)``, integer, ignored outside
          [0, C).
        - Output: scalar, float32 (float64 for float64 logits).

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or an option is wrong.

    Source: equation 6 of CAG-UDA (arXiv 1910.13049).

    >>> DiscriminativeLoss()(torch.zeros(1, 4), torch.tensor([1]))
    tensor(1.3863)
    """

    weight: Tensor | None

    def __init__(self, *, weight: PerClass | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing: float = check_range(label_smoothing, "label_smoothing", 0.0, 1.0)
        self.register_buffer("weight", None if weight is None else as_per_class(weight, "weight"))

    def forward(
        self, logits: Tensor, labels: Tensor, *, pixel_weights: Tensor | None = None
    ) -> Tensor:
        """Return the loss of logits (N, C, *) with labels (N, *)."""
        return discriminative_loss(
            logits,
            labels,
            weight=self.weight,
            label_smoothing=self.label_smoothing,
            pixel_weights=pixel_weights,
        )

    extra_repr = shown("label_smoothing")
    _apply = move_buffers


@final
class AnchorContrastiveLoss(nn.Module):
    r"""Cross-entropy of the softmax over similarities; see `anchor_contrastive_loss`.

    Args:
        temperature: τ > 0, in the units of the similarity.
        similarity: ``"euclidean"`` −‖x − a‖₂, ``"squared"`` −‖x − a‖₂², ``"cosine"``, or ``"dot"``.

    Shape:
        - features: ``(N, D, *)``, floating point; labels: ``(N, *)``, integer; anchors:
          ``(C, D)`` or ``(C, M, D)``, floating point.
        - Output: scalar, float32 (float64 for float64 features).

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or an option is wrong.

    Source: the softmax over distances to prototypes of ProDA (arXiv 2101.10979), as a loss; the
    contrast of SePiCo (arXiv 2204.08808).

    >>> anchors = torch.tensor([[0.0], [2.0]])
    >>> AnchorContrastiveLoss(temperature=2.0)(torch.tensor([[0.0]]), torch.tensor([0]), anchors)
    tensor(0.3133)
    """

    def __init__(self, temperature: float = 1.0, *, similarity: Similarity = "euclidean") -> None:
        super().__init__()
        check_similarity(similarity)
        self.temperature: float = check_positive(temperature, "temperature")
        self.similarity: Similarity = similarity

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        anchors: Tensor,
        *,
        pixel_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of features (N, D, *) with labels (N, *) against anchors."""
        return anchor_contrastive_loss(
            features,
            labels,
            anchors,
            similarity=self.similarity,
            temperature=self.temperature,
            pixel_weights=pixel_weights,
        )

    extra_repr = shown("temperature", "similarity")


@final
class AnchorConsistencyLoss(nn.Module):
    r"""Divergence of soft assignments from those of a teacher; see `anchor_consistency_loss`.

    Args:
        temperature: τ > 0, in the units of the similarity.
        similarity: ``"euclidean"``, ``"squared"``, ``"cosine"`` or ``"dot"``.

    Shape:
        - features: ``(N, D, *)``; teacher_probabilities: ``(N, C, *)``; anchors: ``(C, D)`` or
          ``(C, M, D)``; all floating point.
        - Output: scalar, float32 (float64 for float64 features).

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or an option is wrong.

    Source: ProDA (arXiv 2101.10979), equation 9.

    >>> anchors, teacher = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0, 0.0]])
    >>> AnchorConsistencyLoss(temperature=2.0)(torch.tensor([[1.0]]), teacher, anchors)
    tensor(0.6931)
    """

    def __init__(self, temperature: float = 1.0, *, similarity: Similarity = "euclidean") -> None:
        super().__init__()
        check_similarity(similarity)
        self.temperature: float = check_positive(temperature, "temperature")
        self.similarity: Similarity = similarity

    def forward(
        self,
        features: Tensor,
        teacher_probabilities: Tensor,
        anchors: Tensor,
        *,
        pixel_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of features (N, D, *) with probabilities (N, C, *) against anchors."""
        return anchor_consistency_loss(
            features,
            teacher_probabilities,
            anchors,
            similarity=self.similarity,
            temperature=self.temperature,
            pixel_weights=pixel_weights,
        )

    extra_repr = shown("temperature", "similarity")


@final
class AnchorDistributionLoss(nn.Module):
    r"""Contrast of features to Gaussian classes; see `anchor_distribution_loss`.

    Args:
        temperature: τ > 0.

    Shape:
        - features: ``(N, D, *)``, floating point; labels: ``(N, *)``, integer; means and
          variances: ``(C, D)``, floating point.
        - Output: scalar, float32 (float64 for float64 features).

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or ``temperature`` is wrong.

    Source: SePiCo (arXiv 2204.08808), equation 11; its experiments have τ = 100.

    >>> moments = torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.0], [0.0]])
    >>> AnchorDistributionLoss()(torch.tensor([[1.0]]), torch.tensor([0]), *moments)
    tensor(0.1269)
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature: float = check_positive(temperature, "temperature")

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        means: Tensor,
        variances: Tensor,
        *,
        pixel_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of features (N, D, *) with labels (N, *) against moments (C, D)."""
        return anchor_distribution_loss(
            features,
            labels,
            means,
            variances,
            temperature=self.temperature,
            pixel_weights=pixel_weights,
        )

    extra_repr = shown("temperature")


@final
class SymmetricCrossEntropyLoss(nn.Module):
    r"""Cross-entropy plus reverse cross-entropy; see `symmetric_cross_entropy`.

    Args:
        alpha: the weight of the cross-entropy.
        beta: the weight of the reverse cross-entropy.

    Shape:
        - logits: ``(N, C, *)``, floating point; labels: ``(N, *)``, integer.
        - Output: scalar, float32 (float64 for float64 logits).

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or a weight is wrong.

    Source: Wang et al. (arXiv 1908.06112), as in ProDA (arXiv 2101.10979).

    >>> SymmetricCrossEntropyLoss(alpha=1.0, beta=0.0)(torch.zeros(1, 2), torch.tensor([1]))
    tensor(0.6931)
    """

    def __init__(self, *, alpha: float = 0.1, beta: float = 1.0) -> None:
        super().__init__()
        self.alpha: float = check_range(alpha, "alpha", 0.0, math.inf)
        self.beta: float = check_range(beta, "beta", 0.0, math.inf)

    def forward(
        self, logits: Tensor, labels: Tensor, *, pixel_weights: Tensor | None = None
    ) -> Tensor:
        """Return the loss of logits (N, C, *) with labels (N, *)."""
        return symmetric_cross_entropy(
            logits, labels, alpha=self.alpha, beta=self.beta, pixel_weights=pixel_weights
        )

    extra_repr = shown("alpha", "beta")


@final
class InformationMaximizationLoss(nn.Module):
    r"""Entropy of the predictions minus that of their mean; see `information_maximization_loss`.

    Shape:
        - logits: ``(N, C, *)``, floating point.
        - Output: scalar, float32 (float64 for float64 logits).

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape is wrong.

    Source: SHOT (arXiv 2002.08546), equation 3.

    >>> InformationMaximizationLoss()(torch.tensor([[20.0, 0.0], [0.0, 20.0]]))
    tensor(-0.6931)
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, logits: Tensor) -> Tensor:
        """Return the loss of logits (N, C, *)."""
        return information_maximization_loss(logits)


@final
class FeatureDistanceLoss(nn.Module):
    r"""Mean distance of features to those of another network; see `feature_distance_loss`.

    Args:
        classes: the class ids whose pixels are active; ``None`` is every pixel.

    Shape:
        - features and reference: ``(N, D, *)``, floating point; labels: ``(N, *)``, integer.
        - Output: scalar, float32 (float64 for float64 features).

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape or a device is wrong, or ``classes`` come without labels.

    Source: the ImageNet feature distance of DAFormer (arXiv 2111.14887).

    >>> FeatureDistanceLoss()(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    tensor(5.)
    """

    def __init__(self, *, classes: Sequence[int] | None = None) -> None:
        super().__init__()
        self.classes: list[int] | None = None
        if classes is not None:
            self.classes = check_class_ids(classes)

    def forward(
        self,
        features: Tensor,
        reference: Tensor,
        labels: Tensor | None = None,
        *,
        pixel_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of features and a reference (N, D, *) with labels (N, *)."""
        return feature_distance_loss(
            features, reference, labels, classes=self.classes, pixel_weights=pixel_weights
        )

    extra_repr = shown("classes")


def _active_labels(
    features: Tensor, labels: Tensor, anchors: Tensor, pixel_weights: Tensor | None
) -> Tensor:
    """Return labels int64 (N, *), −1 where outside [0, C) or of an unseen class."""
    check_features(features)
    check_labels(labels, features)
    check_anchors(anchors, features)
    check_pixel_weights(pixel_weights, labels)
    targets = _labels_in_range(labels, anchors.shape[0])
    return torch.where(seen_classes(anchors)[targets], targets, -1)


def _labels_in_range(labels: Tensor, num_classes: int) -> Tensor:
    """Return labels int64, −1 where outside [0, C)."""
    labels = labels.long()
    return torch.where((labels >= 0) & (labels < num_classes), labels, -1)


def _weighted(losses: Tensor, active: Tensor, pixel_weights: Tensor | None) -> Tensor:
    """Return the losses times their weights; the weight of an inactive pixel has no influence."""
    if pixel_weights is None:
        return losses
    return losses * torch.where(active, pixel_weights.detach(), 0.0).to(losses.dtype)


def _mean(losses: Tensor, active: Tensor, pixel_weights: Tensor | None) -> Tensor:
    """Return the mean over the active pixels of weight × loss; inactive losses are 0."""
    return _weighted(losses, active, pixel_weights).sum() / active.sum().clamp(min=1)


def _shares(targets: Tensor, num_classes: int, average: Average, dtype: torch.dtype) -> Tensor:
    """Return factors (N, *): the sum of the losses times these is their average."""
    active = targets >= 0
    if average == "pixel":
        return active.to(dtype) / active.sum().clamp(min=1)
    targets = targets.clamp(min=0)
    counts = torch.zeros(num_classes, dtype=torch.int64, device=targets.device)
    counts.scatter_add_(0, targets.flatten(), active.flatten().long())
    present = (counts > 0).sum()
    return active.to(dtype) / (counts[targets] * present).clamp(min=1)


def _cross_entropies(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the cross-entropy (N, *) of each pixel, 0 where the target is −1."""
    # The softmax of an ignored pixel enters the gradient as 0·softmax: NaN where that is NaN.
    logits = torch.where((targets >= 0).unsqueeze(1), logits.to(result_dtype(logits)), 0.0)
    return F.cross_entropy(
        logits,
        targets,
        weight,
        ignore_index=-1,
        reduction="none",
        label_smoothing=label_smoothing,
    )


def _weight_of_classes(weight: PerClass, logits: Tensor) -> Tensor:
    """Return the weights (C,) on the device of the logits."""
    values = as_per_class(weight, "weight")
    if not isinstance(weight, Tensor):
        values = values.to(logits.device)
    check_one_per_class(values, "weight", logits.shape[1], logits, "logits")
    return values
