"""Similarities of features to class anchors, for soft assignments and for losses."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from . import _ops
from ._checks import check_choice

Similarity = Literal["euclidean", "squared", "cosine", "dot"]


def check_similarity(similarity: Similarity) -> None:
    """Reject an unknown similarity."""
    check_choice(similarity, "similarity", get_args(Similarity))


def seen_classes(anchors: Tensor, rank: int = 1) -> Tensor:
    """Seen classes (C, 1, …) of that many dimensions: those with a finite anchor."""
    seen = anchors.detach().isfinite().all(dim=-1)
    seen = seen.any(dim=1) if anchors.ndim == 3 else seen
    return seen.view(-1, *[1] * (rank - 1))


def similarities(
    features: Tensor, anchors: Tensor, similarity: Similarity, active: Tensor | None = None
) -> Tensor:
    """Return similarities (N, C, *) of features to anchors (C, D) or, the largest of M, (C, M, D).

    −∞ for an unseen class, else NaN where a feature is not finite; 0 where a pixel is not
    ``active (N, *)``, so that its value reaches no gradient. Of a zero vector the cosine is 0.
    """
    anchors = anchors.detach()
    seen = seen_classes(anchors, features.ndim - 1)
    if similarity in ("euclidean", "squared"):
        distances = torch.where(seen, _ops.anchor_distances(features, anchors), 0.0)
        distances = _where_active(distances, active)
        values = -distances if similarity == "euclidean" else -distances.square()
        return torch.where(seen, values, -math.inf)
    points = anchors.flatten(0, -2)
    present = points.isfinite().all(dim=1)
    points = torch.where(present[:, None], points, 0.0)
    if similarity == "dot":
        values = _where_active(_ops.quadratic_forms(features, points, points[:0]), active)
    else:
        points = points.to(torch.promote_types(points.dtype, _ops.reference.result_dtype(features)))
        points = torch.nn.functional.normalize(points, dim=1)
        # The last of the forms is ‖x‖².
        linear = torch.cat([points, torch.zeros_like(points[:1])])
        forms = _ops.quadratic_forms(features, linear, torch.ones_like(points[:1]))
        forms = _where_active(forms, active)
        squares = forms[:, -1:]
        values = forms[:, :-1] / torch.where(squares == 0, 1.0, squares).sqrt()
    values = torch.where(present.view(-1, *[1] * (features.ndim - 2)), values, -math.inf)
    return values if anchors.ndim == 2 else values.unflatten(1, anchors.shape[:2]).amax(dim=2)


def _where_active(values: Tensor, active: Tensor | None) -> Tensor:
    """Return values (N, K, *), 0 for inactive pixels: 0 times a NaN slope would be a NaN."""
    return values if active is None else torch.where(active.unsqueeze(1), values, 0.0)
