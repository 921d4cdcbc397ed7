"""Behaviors of the released CAG-UDA code that its paper omits, and a reader of anchor files.

For reproducing its numbers, and for starting from anchors that released codes have saved. New work
is better served by `anchorda.losses`, whose gradients are those of the losses they belong to.
"""

import math
import os
from typing import IO, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _ops
from ._checks import (
    check_anchor_rows,
    check_anchors,
    check_device,
    check_features,
    check_label_map,
    check_labels,
    check_logits,
    check_range,
    described,
)
from ._ops.reference import result_dtype
from ._pickles import UnfitError, format_of, read, to_tensor
from .anchors import keep_correct, resize_labels
from .losses import discriminative_loss

_MIN_PIXELS = 10
"""An image with fewer correctly predicted pixels of a class has no distance term for it."""


class CagUdaLoss(NamedTuple):
    """The terms of `cag_uda_loss`: scalars, connected to the graph."""

    total: Tensor
    """The sum of the other three: what to call ``backward()`` on."""
    source: Tensor
    """The cross-entropy with the source labels, at their resolution."""
    pseudo: Tensor
    """The mean of the cross-entropies with the two target label maps, at feature resolution."""
    distance: Tensor
    """The distance losses of both domains, times ``distance_weight``."""


def cag_uda_loss(
    source_features: Tensor,
    source_logits: Tensor,
    source_labels: Tensor,
    target_features: Tensor,
    target_logits: Tensor,
    anchor_labels: Tensor,
    probability_labels: Tensor,
    anchors: Tensor,
    *,
    distance_weight: float = 0.7,
) -> CagUdaLoss:
    r"""Return the training objective of the released CAG-UDA code.

    .. math:: \ell = \mathrm{CE}(\hat z^s, y^s) +
              \tfrac{1}{2} (\mathrm{CE}(z^t, \hat y^a) + \mathrm{CE}(z^t, \hat y^p)) +
              \lambda (d(x^s, y^s) + d(x^t, \hat y^a))

    with :math:`\hat z^s` the source logits interpolated to the labels, bilinearly with aligned
    corners, and the distance loss

    .. math:: d(x, y) = \frac{10}{|T|} \sum_{(n, c) \in T} 10^{-k_{n,c}} h_{n,c}, \qquad
              h_{n,c} = \frac{1}{D} \sum_j \mathrm{huber}_1(\bar x_{n,c,j} - a_{c,j})

    where :math:`\bar x_{n,c}` is the mean over the pixels of image n that are of class c by their
    label and by the prediction; T holds the images and seen classes with at least 10 such pixels;
    and :math:`k_{n,c}` is the smallest number ≥ 0 that leaves no more than 5 of a term. Labels
    are resized to the features for it, by the nearest pixel.

    The gradient is not that of this loss: what reaches the features from the term (n, c) is
    multiplied by 2 · (pixels averaged) / (h · w), so that each of those pixels receives 2 / (h · w)
    of its mean's gradient however many they are. :math:`10^{-k}` is a constant to it.

    Args:
        source_features: ``(N, D, h, w)``, floating point.
        source_logits: ``(N, C, h, w)``, floating point.
        source_labels: ``(N, H, W)``, any integer dtype, at the resolution of the images.
        target_features: ``(M, D, h', w')``, floating point.
        target_logits: ``(M, C, h', w')``, floating point.
        anchor_labels: ``(M, h', w')``, any integer dtype: pseudo-labels by anchor distance. The
            target's distance loss uses these.
        probability_labels: ``(M, h', w')``, any integer dtype: pseudo-labels by probability.
        anchors: ``(C, D)``, floating point. A row that is not finite is an unseen class.
        distance_weight: λ ≥ 0.

    Returns:
        ``CagUdaLoss(total, source, pseudo, distance)``, float32 (float64 for float64 inputs).
        Where the released code gives NaN, having nothing to average, a part is a zero that is
        connected to the graph. Labels outside [0, C) are ignored. A feature that is not finite is
        left out of its mean, as out of every anchor; it shows in the cross-entropies, by its
        logits.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a shape, a device or ``distance_weight`` is wrong.

    Source: the released CAG-UDA code (github RogerZhangzz/CAG_UDA). The paper (arXiv 1910.13049)
    has Euclidean distances of pixels, equation 5, and neither the factors of 10 nor that gradient.

    >>> features, logits = torch.ones(1, 2, 3, 4, requires_grad=True), torch.zeros(1, 2, 3, 4)
    >>> labels, ignored = torch.zeros(1, 3, 4, dtype=torch.int64), torch.full((1, 3, 4), 250)
    >>> loss = cag_uda_loss(
    ...     features, logits, labels, features, logits, ignored, ignored, torch.zeros(2, 2)
    ... )
    >>> loss.source, loss.pseudo, loss.distance  # ln 2; nothing labeled; 0.7 · 10 · huber(1)
    (tensor(0.6931), tensor(0.), tensor(3.5000, grad_fn=<MulBackward0>))
    """
    check_features(source_features, "source_features")
    check_anchors(anchors, source_features)
    check_anchor_rows(anchors)
    _check_domain(source_features, source_logits, anchors, "source")
    _check_domain(target_features, target_logits, anchors, "target")
    _check_source_labels(source_labels, source_features)
    check_labels(anchor_labels, target_features, "target_features", "anchor_labels")
    check_labels(probability_labels, target_features, "target_features", "probability_labels")
    distance_weight = check_range(distance_weight, "distance_weight", 0.0, math.inf)

    resized = resize_labels(source_labels, source_features.shape[2:])
    # At once, so that the gradients of the two target losses are not added up in half precision.
    source_logits = source_logits.to(result_dtype(source_logits))
    target_logits = target_logits.to(result_dtype(target_logits))
    source = discriminative_loss(_interpolate(source_logits, source_labels), source_labels)
    pseudo = 0.5 * (
        discriminative_loss(target_logits, anchor_labels)
        + discriminative_loss(target_logits, probability_labels)
    )
    distance = distance_weight * (
        _distance_loss(source_features, source_logits, resized, anchors)
        + _distance_loss(target_features, target_logits, anchor_labels, anchors)
    )
    return CagUdaLoss(source + pseudo + distance, source, pseudo, distance)


def load_category_anchors(path: str | os.PathLike[str]) -> Tensor:
    """Read an anchor or prototype file of the released CAG-UDA, ProDA or SePiCo code.

    The layout is known by what the file holds: in CAG-UDA an array ``(C, D)``, or a dict of
    ``objective_vectors (C, D)`` and ``objective_num (C,)``; in ProDA, whose files are named
    ``prototypes_on_..._from_...``, an array ``(C, D)``; in SePiCo a dict of ``Ave (C, D)`` and
    ``Amount (C,)``, beside which its ``CoVariance`` is not read.

    The file is a pickle, but nothing it names is ever imported or called: it is read into a
    description, of which arrays are made here. A file that names anything but what an array
    consists of is refused, and so is the checkpoint of a network.

    Args:
        path: a file of ``torch.save`` or ``pickle.dump``, of any version. Arrays are NumPy's or, in
            a file of ``torch.save``, tensors on any device. For arrays in other files, such as
            ``.npy``, see `CategoryAnchors.from_centroids`.

    Returns:
        The anchors ``(C, D)`` float32, on the CPU. A row is NaN, its class unseen, where
        ``objective_num`` or ``Amount`` is 0, or, in a file without them, where the row is all
        zeros, as the released codes begin it. To move them on with new features, as ProDA does,
        pass them to `CategoryAnchors.from_centroids` with a ``momentum``.

    Raises:
        TypeError: if ``path`` is not a path.
        OSError: if the file cannot be opened.
        ValueError: if it holds something else, or is damaged; the message names the file.

    Source: the released code of CAG-UDA (github RogerZhangzz/CAG_UDA), which itself can read but
    one of its layouts at a time; of ProDA (github microsoft/ProDA), ``calc_prototype.py``; and of
    SePiCo (github BIT-DA/SePiCo), ``ProtoEstimator.save_proto``.

    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "category_anchors")
    ...     means, counts = np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([80, 0])
    ...     torch.save({"objective_vectors": means, "objective_num": counts}, path)
    ...     load_category_anchors(path)
    tensor([[1., 2.],
            [nan, nan]])
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"Expected `path` to be a str or os.PathLike, but got {described(path)}.")
    if "\0" in str(path):
        raise ValueError(f"Expected `path` without null characters, but got {described(path)}.")
    with open(path, "rb") as file:
        try:
            return _anchors(read(file))
        except Exception as error:  # Unpickling what is damaged may raise any.
            reason = str(error) if isinstance(error, UnfitError) else _reason(file, error)
            raise ValueError(
                f"Expected {os.fspath(path)!r} to hold category anchors, an array (C, D) or a dict "
                "with `objective_vectors` (C, D) and `objective_num` (C,), or with `Ave` (C, D) "
                f"and `Amount` (C,), but {reason}."
            ) from error


def _reason(file: IO[bytes], error: Exception) -> str:
    """Say why a file could not be read, as the end of a sentence."""
    try:
        known = format_of(file)
    except Exception:  # An archive may be damaged in any way.
        known = None
    return f"it is {known}" if known else f"it is damaged: {error!r}"


def _interpolate(logits: Tensor, labels: Tensor) -> Tensor:
    size = labels.shape[1:]
    scaled: Tensor = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
    return scaled


def _distance_loss(features: Tensor, logits: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    num_classes, pixels = anchors.shape[0], features.shape[2] * features.shape[3]
    anchors = anchors.detach()
    correct = keep_correct(labels.long(), logits, ignore_index=-1)
    sums, counts = _ops.image_sums(features, correct, num_classes)
    counts = counts[..., None].to(sums.dtype)
    means = _scale_gradient(sums / counts.clamp(min=1), 2 * counts / pixels)
    present = (counts[..., 0] >= _MIN_PIXELS) & anchors.isfinite().all(dim=1)
    classes = torch.where(present, torch.arange(num_classes, device=features.device), -1)
    terms: Tensor = _ops.pixel_losses(means.mT, classes, anchors, "smooth_l1")
    # As many tens as the released code's `while term > 5: term /= 10`, for any term in float32.
    tens = 10.0 ** torch.arange(38, device=terms.device, dtype=terms.dtype)
    too_many = (terms.detach()[..., None] > 5 * tens).sum(dim=-1, dtype=terms.dtype)
    loss: Tensor = 10 * (terms / 10.0**too_many).sum() / present.sum().clamp(min=1)
    return loss


def _scale_gradient(values: Tensor, scale: Tensor) -> Tensor:
    """Return the same values, to the last bit, whose gradient is multiplied by the scale."""
    constant = values.detach()
    return constant + scale * (values - constant)


def _check_domain(features: Tensor, logits: Tensor, anchors: Tensor, domain: str) -> None:
    check_features(features, f"{domain}_features")
    check_logits(logits, f"{domain}_logits")
    if features.ndim != 4 or features.shape[1] != anchors.shape[1]:
        raise ValueError(
            f"Expected `{domain}_features` of shape (N, D, h, w) with D = {anchors.shape[1]} to "
            f"match `anchors`, but got {tuple(features.shape)}."
        )
    check_device(features, f"{domain}_features", anchors, "anchors")
    expected = (features.shape[0], anchors.shape[0], *features.shape[2:])
    if tuple(logits.shape) != expected:
        raise ValueError(
            f"Expected `{domain}_logits` of shape (N, C, h, w) = {expected} to match "
            f"`{domain}_features` and `anchors`, but got {tuple(logits.shape)}. "
            "Pass the logits of the classifier before they are interpolated."
        )
    check_device(logits, f"{domain}_logits", features, f"{domain}_features")


def _check_source_labels(labels: Tensor, features: Tensor) -> None:
    check_label_map(labels, "source_labels")
    if labels.ndim != 3 or labels.shape[0] != features.shape[0]:
        fix = ""
        if labels.ndim == 4 and 1 in (labels.shape[1], labels.shape[-1]):
            dim = 1 if labels.shape[1] == 1 else -1
            fix = f" Drop the channel dimension with source_labels.squeeze({dim})."
        raise ValueError(
            f"Expected `source_labels` of shape (N, H, W) with N = {features.shape[0]} to match "
            f"`source_features`, but got {tuple(labels.shape)}.{fix}"
        )
    check_device(labels, "source_labels", features, "source_features")


def _anchors(content: object) -> Tensor:
    match content:
        case {"objective_vectors": vectors, "objective_num": counts} | {
            "Ave": vectors,
            "Amount": counts,
        }:
            anchors, seen = to_tensor(vectors), to_tensor(counts) > 0
        case dict():
            keys = ", ".join(repr(key[:40]) for key in list(content)[:5] if isinstance(key, str))
            raise UnfitError(f"it is a dict of other keys: {keys}")
        case _:
            anchors = to_tensor(content)
            seen = (anchors != 0).any(dim=-1)
    if not anchors.is_floating_point() or anchors.ndim != 2 or 0 in anchors.shape:
        raise UnfitError(f"its anchors are {anchors.dtype} of shape {tuple(anchors.shape)}")
    if seen.shape != anchors.shape[:1]:
        raise UnfitError(f"its counts are of shape {tuple(seen.shape)} for {len(anchors)} anchors")
    anchors = torch.where(seen[:, None], anchors, torch.nan).float()
    if not (anchors.isfinite().all(dim=1) | anchors.isnan().all(dim=1)).all():
        raise UnfitError("some of its anchors are not finite")
    return anchors
