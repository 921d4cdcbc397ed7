"""Operators written with those that ONNX has, for ``torch.onnx.export``: no blocks, more memory."""

import torch
from torch import Tensor

from .reference import labels_of, result_dtype


def anchor_distances(features: Tensor, anchors: Tensor) -> Tensor:
    """See `reference.anchor_distances`."""
    dim = features.shape[1]
    x = features.reshape(features.shape[0], dim, -1).double()
    points = anchors.reshape(-1, dim).double()
    seen = points.isfinite().all(dim=1)
    points = torch.where(seen[:, None], points, 0.0)
    products = torch.matmul(points, x)  # (N, C·M, P)
    of_points = points.square().sum(dim=1)[:, None]
    squares = x.square().sum(dim=1, keepdim=True) - 2 * products + of_points
    distances = squares.clamp(min=0.0).sqrt()
    distances = torch.where(x.isfinite().all(dim=1, keepdim=True), distances, torch.nan)
    distances = torch.where(seen[:, None], distances, torch.inf)
    if anchors.ndim == 3:
        distances = distances.unflatten(1, anchors.shape[:2]).amin(dim=2)
    shape = (features.shape[0], anchors.shape[0], *features.shape[2:])
    return distances.to(result_dtype(features)).reshape(shape)


def nearest_anchors(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.nearest_anchors`."""
    distances = anchor_distances(features, anchors)
    distances = torch.where(distances.isnan(), torch.inf, distances)
    nearest, labels = distances.min(dim=1)
    classes = torch.arange(anchors.shape[0], device=anchors.device)
    classes = classes.reshape(-1, *[1] * (features.ndim - 2))
    second = torch.where(classes == labels.unsqueeze(1), torch.inf, distances).amin(dim=1)
    return torch.where(nearest.isinf(), -1, labels).int(), nearest, second


def labels_by_margin(
    features: Tensor, anchors: Tensor, min_margin: Tensor, relative: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """See `anchorda._ops.labels_by_margin`."""
    return labels_of(*nearest_anchors(features, anchors), min_margin, relative, ignore_index)
