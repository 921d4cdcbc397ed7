"""Pseudo-labels for target pixels, from distances to the anchors or from class probabilities."""

import math
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from . import _ops
from ._checks import (
    PerClass,
    as_per_class,
    check_alike,
    check_anchors,
    check_choice,
    check_count,
    check_device,
    check_features,
    check_flag,
    check_ignore_index,
    check_int,
    check_logits,
    check_per_class,
    check_positive,
    check_same_labels,
)
from ._ops import exportable
from ._ops.reference import active_labels, result_dtype
from ._similarity import Similarity, check_similarity, seen_classes, similarities
from ._state import load_any_shape, move_buffers, shown


class PseudoLabels(NamedTuple):
    """The labels and scores that a labeler returns."""

    labels: Tensor
    """(N, *) int64: a class where the pixel is active, ``ignore_index`` elsewhere."""
    scores: Tensor
    """(N, *) float32: what the pixels are ranked by, given for inactive pixels too; never NaN,
    and 0 where nothing can be said (a non-finite input, or no class seen)."""


def anchor_distances(features: Tensor, anchors: Tensor) -> Tensor:
    r"""Return the Euclidean distances from every feature to every class.

    .. math:: d_{i,k} = \lVert x_i - a_k \rVert_2 \quad\text{or}\quad
              d_{i,k} = \min_m \lVert x_i - a_{k,m} \rVert_2

    for one anchor of each class or several. Computed in float64 inside: a float32 result is right
    to its last digits, and to 1e-6 where a feature of norm 10 lies on an anchor. Differentiable in
    the features, with gradient 0 where x = a; never in the anchors. An infinite distance has no
    useful gradient: mask before squaring.

    Args:
        features: ``(N, D, *)``, floating point.
        anchors: ``(C, D)``, or ``(C, M, D)`` for several of each class, floating point. A row that
            is not finite is absent; a class without any other row is unseen.

    Returns:
        ``(N, C, *)`` float32 (float64 for float64 features); infinite for unseen classes, and
        otherwise NaN where a feature, or in float64 its square, is not finite.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape or a device is wrong.

    Source: equation 3 of CAG-UDA (arXiv 1910.13049).

    >>> anchors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [torch.nan, torch.nan]])
    >>> anchor_distances(torch.zeros(1, 2), anchors)
    tensor([[0., 5., inf]])
    """
    check_features(features)
    check_anchors(anchors, features)
    operators = exportable if torch.onnx.is_in_onnx_export() else _ops
    distances: Tensor = operators.anchor_distances(features, anchors.detach())
    return distances


def anchor_probabilities(
    features: Tensor,
    anchors: Tensor,
    *,
    similarity: Similarity = "euclidean",
    temperature: float = 1.0,
) -> Tensor:
    r"""Return the softmax over the similarities of every feature to the anchors.

    .. math:: p_{i,k} = \frac{\exp(s(x_i, a_k) / \tau)}
                            {\sum_{j\ \text{seen}} \exp(s(x_i, a_j) / \tau)}

    Differentiable once, in the features.

    Args:
        features: ``(N, D, *)``, floating point.
        anchors: ``(C, D)``, or ``(C, M, D)`` for several of each class, of which the most similar
            counts, floating point. A row that is not finite is absent; a class without any other
            row is unseen.
        similarity: s: ``"euclidean"`` −‖x − a‖₂, ``"squared"`` −‖x − a‖₂², ``"cosine"``, or
            ``"dot"``.
        temperature: τ > 0, in the units of the similarity.

    Returns:
        ``(N, C, *)`` float32 (float64 for float64 features): 0 for unseen classes, and otherwise
        NaN where a feature is not finite. With no class seen, 0 throughout.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device, ``similarity`` or ``temperature`` is wrong.

    Source: ProDA (arXiv 2101.10979), equation 5, whose code multiplies by 1/τ; CPSL (arXiv
    2203.09744) with ``"dot"`` of normalized vectors.

    >>> anchors = torch.tensor([[0.0], [2.0], [torch.nan]])
    >>> anchor_probabilities(torch.tensor([[0.0], [1.0]]), anchors)
    tensor([[0.8808, 0.1192, 0.0000],
            [0.5000, 0.5000, 0.0000]])
    """
    check_features(features)
    check_anchors(anchors, features)
    check_similarity(similarity)
    temperature = check_positive(temperature, "temperature")
    values = similarities(features, anchors, similarity)
    # The largest is subtracted before a small temperature makes all of them infinite.
    values = (values - values.detach().amax(dim=1, keepdim=True)) / temperature
    # A softmax over no class at all is NaN.
    return torch.where(seen_classes(anchors, features.ndim - 1), values.softmax(dim=1), 0.0)


def rectify(probabilities: Tensor, assignments: Tensor) -> Tensor:
    r"""Return the product of class probabilities and soft assignments, scaled to a sum of 1.

    .. math:: \hat p_{i,k} = \frac{p_{i,k}\, w_{i,k}}{\sum_j p_{i,j}\, w_{i,j}}

    Both are constants to the gradient. ``ProbabilityPseudoLabeler`` labels by the result's
    logarithm.

    Args:
        probabilities: p, ``(N, C, *)``, floating point, of the classifier.
        assignments: w, ``(N, C, *)``, floating point, such as those of `anchor_probabilities`.

    Returns:
        ``(N, C, *)`` float32 (float64 if one is float64); 0 throughout where no class has both, and
        NaN where an input is NaN.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if the shapes or devices differ.

    Source: ProDA (arXiv 2101.10979), equation 4.

    >>> rectify(torch.tensor([[0.6, 0.4]]), torch.tensor([[0.2, 0.8]]))
    tensor([[0.2727, 0.7273]])
    """
    check_features(probabilities, "probabilities")
    check_features(assignments, "assignments")
    check_alike(assignments, "assignments", probabilities, "probabilities")
    dtype = torch.promote_types(result_dtype(probabilities), assignments.dtype)
    product = probabilities.detach().to(dtype) * assignments.detach()
    total = product.sum(dim=1, keepdim=True)
    return product / torch.where(total == 0, 1.0, total)


def sinkhorn_assignments(
    scores: Tensor,
    *,
    shares: PerClass | None = None,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Tensor:
    r"""Return soft assignments of samples to classes whose sizes are prescribed.

    .. math:: Q = \operatorname{diag}(u)\, \exp(S / \epsilon)\, \operatorname{diag}(v)

    In each iteration the columns are scaled to sums in proportion to the shares, then the rows to
    sums of 1: so rows sum to 1 exactly, and columns nearly to n times their shares. Computed with
    logarithms, so that no exponential overflows. Carries no gradient.

    Args:
        scores: S, ``(n, K)``, floating point: similarities of samples to classes. A column of −∞ is
            an unseen class.
        shares: part of the samples of each class, ``(K,)``; they need not sum to 1. ``None`` is the
            same for all.
        epsilon: ε > 0; a small one makes assignments hard.
        iterations: number of rounds, at least 1.

    Returns:
        ``(n, K)`` float32 (float64 for float64 scores): 0 for unseen classes. A sample with a score
        of NaN or +∞ has NaN throughout and no influence on others.

    Raises:
        TypeError: if an argument or a dtype is wrong.
        ValueError: if a shape, a device or a number is wrong.

    Source: Cuturi (arXiv 1306.0895); with shares that of CPSL (arXiv 2203.09744), without that of
    ProtoSeg (arXiv 2203.15102).

    >>> sinkhorn_assignments(torch.tensor([[1.0, 0.9], [1.0, 0.0]]), epsilon=0.1, iterations=50)
    tensor([[0.0136, 0.9864],
            [0.9911, 0.0089]])
    """
    check_features(scores, "scores")
    if scores.ndim != 2:
        raise ValueError(
            f"Expected `scores` of shape (n, K), but got {tuple(scores.shape)}. Make rows of maps "
            "with scores.movedim(1, -1).flatten(0, -2)."
        )
    epsilon = check_positive(epsilon, "epsilon")
    iterations = check_count(iterations, "iterations")
    log_q = scores.detach().to(result_dtype(scores)) / epsilon
    valid = (log_q < math.inf).all(dim=1, keepdim=True)
    log_q = torch.where(valid, log_q, -math.inf)
    log_shares = torch.zeros_like(log_q[:1])
    if shares is not None:
        of_classes = as_per_class(shares, "shares")
        check_per_class(of_classes, "shares", of_classes, "shares", scores.shape[1])
        if isinstance(shares, Tensor):
            check_device(shares, "shares", scores, "scores")
        log_shares = log_shares + of_classes.to(log_q).log()
    for _ in range(iterations):
        log_q = _subtract(log_q, log_q.logsumexp(dim=0, keepdim=True)) + log_shares
        log_q = _subtract(log_q, log_q.logsumexp(dim=1, keepdim=True))
    return torch.where(valid, log_q.exp(), math.nan)


def combine_pseudo_labels(
    first: Tensor,
    second: Tensor,
    rule: Literal["agree", "union"] = "agree",
    *,
    ignore_index: int = 255,
) -> Tensor:
    r"""Combine the labels of two labelers.

    Both rules keep a label on which the two agree and ignore a disagreement. ``"union"`` also
    keeps a label where just one of the two is active.

    Args:
        first: ``(N, *)``, any integer dtype.
        second: ``(N, *)``, likewise.
        rule: see above.
        ignore_index: what both labelers write where they are inactive, and what this does. Any
            negative label is taken for inactive too; other values are classes, as C is not known.

    Returns:
        ``(N, *)`` int64.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if the shapes or devices differ, or ``rule`` is unknown.

    Source: the filters of ensemble pseudo-labeling; CAG-UDA itself keeps both label maps and
    averages their two losses.

    >>> first, second = torch.tensor([[0, 1, 255, 1]]), torch.tensor([[0, 2, 2, 255]])
    >>> combine_pseudo_labels(first, second)
    tensor([[  0, 255, 255, 255]])
    >>> combine_pseudo_labels(first, second, "union")
    tensor([[  0, 255,   2,   1]])
    """
    check_same_labels(first, second, ("first", "second"))
    check_choice(rule, "rule", ("agree", "union"))
    ignore_index = check_int(ignore_index, "ignore_index")
    first, second = first.long(), second.long()
    first = torch.where(first < 0, ignore_index, first)
    second = torch.where(second < 0, ignore_index, second)
    combined = torch.where(first == second, first, ignore_index)
    if rule == "union":
        combined = torch.where(first == ignore_index, second, combined)
        combined = torch.where(second == ignore_index, first, combined)
    return combined


@final
class AnchorPseudoLabeler(nn.Module):
    r"""Label a pixel with its nearest anchor where that is nearer than the next by a margin.

    .. math:: \hat y_i = \arg\min_k d_{i,k}, \qquad m_i = d_{i,(2)} - d_{i,(1)}, \qquad
              \text{active where } m_i > \text{min\_margin}_{\hat y_i}

    with the distances of `anchor_distances` in ascending order. Carries no gradient.

    Args:
        min_margin: what the score must exceed, strictly; one number, or one for each class as a
            tensor, array or sequence ``(C,)``. In the units of the features, so it belongs to one
            network: 2.5 in the paper. With the default every pixel gets its nearest anchor but for
            exact ties.
        relative: divide the margin by the distance to the runner-up, which makes it a number in
            [0, 1] that is free of the scale of the features.
        ignore_index: the label of inactive pixels.

    Shape:
        - features: ``(N, D, *)``, floating point. Where one is not finite: ignored, score 0.
        - anchors: ``(C, D)``, or ``(C, M, D)`` for several of each class. A row that is not finite
          is absent, and a class without any other row unseen: never nearest, never runner-up.
        - Output: ``PseudoLabels(labels (N, *) int64, scores (N, *) float32)``. The score is the
          margin: with one class seen infinite (1 if ``relative``), with none 0 and ignored.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or ``min_margin`` is wrong, or ``ignore_index`` is a class.

    Source: equations 3 and 4 of CAG-UDA (arXiv 1910.13049).

    >>> anchors = torch.tensor([[0.0], [10.0]])
    >>> features = torch.tensor([[1.0], [4.5], [12.0]])
    >>> AnchorPseudoLabeler(min_margin=2.5)(features, anchors)
    PseudoLabels(labels=tensor([  0, 255,   1]), scores=tensor([ 8.,  1., 10.]))
    """

    min_margin: Tensor
    """() or (C,) float32."""

    def __init__(
        self,
        min_margin: PerClass = 0.0,
        *,
        relative: bool = False,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.relative: bool = check_flag(relative, "relative")
        self.ignore_index: int = check_int(ignore_index, "ignore_index")
        minimum = _minimum(min_margin, "min_margin", is_ratio=self.relative)
        self.register_buffer("min_margin", minimum)

    def forward(self, features: Tensor, anchors: Tensor) -> PseudoLabels:
        """Label the pixels of features (N, D, *) by anchors (C, D) or (C, M, D)."""
        check_features(features)
        check_anchors(anchors, features)
        check_per_class(self.min_margin, "min_margin", anchors, "anchors", anchors.shape[0])
        check_ignore_index(self.ignore_index, anchors.shape[0])
        operators = exportable if torch.onnx.is_in_onnx_export() else _ops
        settings = self.min_margin, self.relative, self.ignore_index
        return PseudoLabels(
            *operators.labels_by_margin(features.detach(), anchors.detach(), *settings)
        )

    extra_repr = shown("min_margin", "relative", "ignore_index")
    _apply = move_buffers
    _load_from_state_dict = load_any_shape


@final
class ProbabilityPseudoLabeler(nn.Module):
    r"""Label a pixel with its most probable class where that is probable enough.

    .. math:: p_i = \mathrm{softmax}(z_i), \qquad \hat y_i = \arg\max_k p_{i,k}, \qquad
              \text{active where } p_{i,\hat y_i} > \text{min\_probability}_{\hat y_i}

    Carries no gradient.

    Args:
        min_probability: what the score must exceed, strictly; one number, or one for each class
            as a tensor, array or sequence ``(C,)``.
        ignore_index: the label of inactive pixels.

    Shape:
        - logits: ``(N, C, *)``, floating point. Where the softmax is not finite: ignored, score 0.
        - Output: ``PseudoLabels(labels (N, *) int64, scores (N, *) float32)``. The score is the
          largest probability.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or ``min_probability`` is wrong, or ``ignore_index`` is a
            class.

    Source: section 3.3 of CAG-UDA (arXiv 1910.13049); 0.95 is its released code's.

    >>> logits = torch.tensor([[0.0, 4.0], [0.0, 1.0]])
    >>> labels, scores = ProbabilityPseudoLabeler(0.95)(logits)
    >>> labels
    tensor([  1, 255])
    >>> scores
    tensor([0.9820, 0.7311])
    """

    min_probability: Tensor
    """() or (C,) float32."""

    def __init__(self, min_probability: PerClass = 0.95, *, ignore_index: int = 255) -> None:
        super().__init__()
        minimum = _minimum(min_probability, "min_probability", is_ratio=True)
        self.register_buffer("min_probability", minimum)
        self.ignore_index: int = check_int(ignore_index, "ignore_index")

    def forward(self, logits: Tensor) -> PseudoLabels:
        """Label the pixels of logits (N, C, *)."""
        check_logits(logits)
        check_per_class(self.min_probability, "min_probability", logits, "logits", logits.shape[1])
        check_ignore_index(self.ignore_index, logits.shape[1])
        probabilities = logits.detach().float().softmax(dim=1)
        scores, classes = probabilities.max(dim=1)
        classes = torch.where(scores.isfinite(), classes, -1)
        settings = self.min_probability, self.ignore_index
        return PseudoLabels(*active_labels(classes, scores, *settings))

    extra_repr = shown("min_probability", "ignore_index")
    _apply = move_buffers
    _load_from_state_dict = load_any_shape


def _subtract(logarithms: Tensor, total: Tensor) -> Tensor:
    """Divide by a total; what has a total of 0 stays 0."""
    return logarithms - torch.where(total == -math.inf, 0.0, total)


def _minimum(value: PerClass, name: str, *, is_ratio: bool) -> Tensor:
    minimum = as_per_class(value, name).detach().to(torch.float32, copy=True)
    if minimum.is_meta:
        return minimum
    if bool(minimum.isnan().any()):
        raise ValueError(
            f"Expected `{name}` without NaN, but got {value}. "
            "Use float('inf') for a class that shall not be labeled."
        )
    if is_ratio and bool((minimum.isfinite() & ((minimum < 0) | (minimum > 1))).any()):
        raise ValueError(
            f"Expected `{name}` in [0, 1], as these scores are, but got {value}. "
            "Use float('inf') for a class that shall not be labeled."
        )
    return minimum
