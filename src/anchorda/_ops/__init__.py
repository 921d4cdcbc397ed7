"""The operators, as the rest of the library calls them; `README.md` is the tour of this folder."""

from typing import Any

import torch
from torch import Tensor

from . import majority as _majority
from . import reference
from .blocks import Scratch, for_each_block, new_gradient, pixels_of_part, scalars
from .choice import module_for
from .plain import map_distances as map_distances
from .plain import quadratic_forms as quadratic_forms
from .plain import scatter as scatter
from .plain import soft_class_sums as soft_class_sums
from .reference import new_map
from .registration import (
    directional,
    of_each_pixel,
    register,
    with_derivative,
    without_derivative,
)


def _class_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """See `reference.class_sums`."""
    module = module_for("class_sums", features, num_classes=num_classes)
    sums, counts = module.class_sums(features, labels, num_classes)
    return sums, counts


def _allocate_class_sums(
    features: Tensor, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    shape = num_classes, features.shape[1]
    sums = features.new_empty(shape, dtype=reference.wide_dtype(features))
    return sums, features.new_empty(num_classes, dtype=torch.int64)


class_sums = without_derivative(
    register(
        "class_sums(Tensor features, Tensor labels, SymInt num_classes) -> (Tensor, Tensor)",
        _class_sums,
        _allocate_class_sums,
    )
)


def _nearest_anchors(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.nearest_anchors`."""
    module = module_for("nearest_anchors", features, anchors)
    labels, nearest, second = module.nearest_anchors(features, anchors)
    return labels, nearest, second


nearest_anchors = without_derivative(
    register(
        "nearest_anchors(Tensor features, Tensor anchors) -> (Tensor, Tensor, Tensor)",
        _nearest_anchors,
        lambda features, anchors: reference.new_nearest(features),
    )
)


def _labels_by_margin(
    features: Tensor, anchors: Tensor, min_margin: Tensor, relative: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return labels (N, *) int64 and margins (N, *) float32 of `AnchorPseudoLabeler`."""
    classes, nearest, second = _nearest_anchors(features, anchors)
    labels, scores = _new_labels(features)

    def compute(
        scratch: Scratch, c: Tensor, first: Tensor, next_: Tensor, y: Tensor, margins: Tensor
    ) -> None:
        found = reference.labels_of(c, first, next_, min_margin, relative, ignore_index)
        y.copy_(found[0])
        margins.copy_(found[1])

    tensors = map(scalars, (classes, nearest, second, labels, scores))
    for_each_block(compute, *tensors, part=pixels_of_part(scalars(nearest), torch.float64, 8))
    return labels, scores


def _new_labels(features: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return new_map(features, dtype=torch.int64), new_map(features, dtype=torch.float32)


labels_by_margin = without_derivative(
    register(
        "labels_by_margin(Tensor features, Tensor anchors, Tensor min_margin, bool relative, "
        "SymInt ignore_index) -> (Tensor, Tensor)",
        _labels_by_margin,
        _new_labels,
    )
)
majority = without_derivative(
    register(
        "majority(Tensor labels, SymInt[] size, float min_ratio, SymInt ignore_index) -> Tensor",
        _majority.majority,
        lambda labels, size, min_ratio, ignore_index: labels.new_empty(len(labels), *size),
    )
)


# ----------------------------------------------------------------------------------- sums of images


def _image_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the class sums of each image alone: (N, C, D) and counts (N, C) int64."""
    sums, counts = _allocate_image_sums(features, labels, num_classes)
    for i in range(len(features)):
        image = slice(i, i + 1)
        sums[i], counts[i] = _class_sums(features[image], labels[image], num_classes)
    return sums, counts


def _allocate_image_sums(
    features: Tensor, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    n, d = features.shape[:2]
    sums = features.new_empty(n, num_classes, d, dtype=reference.result_dtype(features))
    return sums, features.new_empty(n, num_classes, dtype=torch.int64)


_image_sums_operator = register(
    "image_sums(Tensor features, Tensor labels, SymInt num_classes) -> (Tensor, Tensor)",
    _image_sums,
    _allocate_image_sums,
)
_image_sums_backward = without_derivative(
    register(
        "image_sums_backward(Tensor grad_sums, Tensor features, Tensor labels) -> Tensor",
        reference.image_sums_backward,
        lambda grad_sums, features, labels: new_gradient(features),
    )
)


class _ImageSums(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_image_sums_operator)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        features, labels, ctx.num_classes = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(features, labels)
        ctx.save_for_forward(features, labels)

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        return _image_sums_backward(grad_sums, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, None]:
        features, labels = ctx.saved_tensors
        finite = features.isfinite().all(dim=1)
        of_finite = torch.where(finite, labels.to(torch.int64), -1)
        return image_sums(tangent, of_finite, ctx.num_classes)[0], None


image_sums = with_derivative(_image_sums_operator, _ImageSums)


# ---------------------------------------------------------------------------- distances and losses


_anchor_distances_operator = register(
    "anchor_distances(Tensor features, Tensor anchors) -> Tensor",
    reference.anchor_distances,
    lambda features, anchors: new_map(features, anchors.shape[0]),
)
_anchor_distances_backward = without_derivative(
    register(
        "anchor_distances_backward(Tensor grad_distances, Tensor distances, Tensor features, "
        "Tensor anchors) -> Tensor",
        reference.anchor_distances_backward,
        lambda grad_distances, distances, features, anchors: new_gradient(features),
    )
)


class _AnchorDistances(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_anchor_distances_operator)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs)
        ctx.save_for_forward(output, *inputs)

    @staticmethod
    def backward(ctx: Any, grad_distances: Tensor) -> tuple[Tensor, None]:
        return _anchor_distances_backward(grad_distances, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        distances = ctx.saved_tensors[0]
        of_classes = []
        for c in range(distances.shape[1]):
            of_class = torch.zeros_like(distances)
            of_class[:, c] = 1
            gradient = _anchor_distances_backward(of_class, *ctx.saved_tensors)
            of_classes.append(directional(gradient, tangent))
        return torch.stack(of_classes, dim=1)


anchor_distances = with_derivative(_anchor_distances_operator, _AnchorDistances)


def _pixel_losses(features: Tensor, labels: Tensor, anchors: Tensor, distance: str) -> Tensor:
    """See `reference.pixel_losses`."""
    module = module_for("pixel_losses", features, anchors)
    losses: Tensor = module.pixel_losses(features, labels, anchors, distance)
    return losses


def _pixel_losses_backward(
    grad_losses: Tensor,
    losses: Tensor,
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    distance: str,
) -> Tensor:
    """See `reference.pixel_losses_backward`."""
    module = module_for("pixel_losses_backward", features, anchors)
    others = features, labels, anchors, distance
    gradient: Tensor = module.pixel_losses_backward(grad_losses, losses, *others)
    return gradient


_pixel_losses_operator = register(
    "pixel_losses(Tensor features, Tensor labels, Tensor anchors, str distance) -> Tensor",
    _pixel_losses,
    lambda features, *others: new_map(features),
)
_pixel_losses_gradient = without_derivative(
    register(
        "pixel_losses_backward(Tensor grad_losses, Tensor losses, Tensor features, Tensor labels, "
        "Tensor anchors, str distance) -> Tensor",
        _pixel_losses_backward,
        lambda grad_losses, losses, features, *others: new_gradient(features),
    )
)


pixel_losses = of_each_pixel(_pixel_losses_operator, _pixel_losses_gradient)


def _contrastive_losses(
    features: Tensor, labels: Tensor, anchors: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """See `reference.contrastive_losses`."""
    module = module_for("contrastive_losses", features, anchors)
    losses, distances = module.contrastive_losses(features, labels, anchors, temperature)
    return losses, distances


def _contrastive_losses_backward(
    grad_losses: Tensor,
    distances: Tensor,
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    temperature: float,
) -> Tensor:
    """See `reference.contrastive_losses_backward`."""
    module = module_for("contrastive_losses_backward", features, anchors)
    others = features, labels, anchors, temperature
    gradient: Tensor = module.contrastive_losses_backward(grad_losses, distances, *others)
    return gradient


_contrastive_losses_operator = register(
    "contrastive_losses(Tensor features, Tensor labels, Tensor anchors, float temperature) "
    "-> (Tensor, Tensor)",
    _contrastive_losses,
    lambda features, labels, anchors, temperature: (
        new_map(features),
        new_map(features, anchors.shape[0]),
    ),
)
_contrastive_losses_gradient = without_derivative(
    register(
        "contrastive_losses_backward(Tensor grad_losses, Tensor distances, Tensor features, "
        "Tensor labels, Tensor anchors, float temperature) -> Tensor",
        _contrastive_losses_backward,
        lambda grad_losses, distances, features, *others: new_gradient(features),
    )
)


contrastive_losses = of_each_pixel(_contrastive_losses_operator, _contrastive_losses_gradient)
