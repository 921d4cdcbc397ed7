"""Operators with one implementation for every device: in plain torch, block by block.

As in `reference`, nothing of the size of the features is materialized, and no value is read.
Sums over pixels are in float64. Products of one pixel lose nothing by cancellation, other than
distances that are multiplied out, so they are in float32 (float64 for float64 features).
"""

from typing import Any

import torch
from torch import Tensor

from .blocks import (
    Scratch,
    for_each_block,
    matrices,
    new_gradient,
    parts,
    pixels_of_part,
    scalars,
    views_of_blocks,
)
from .reference import is_finite, new_map, offsets_from, result_dtype, wide_dtype, zero_unless
from .registration import of_each_pixel, register, with_derivative, without_derivative

# -------------------------------------------------------------------------------- quadratic forms


def _quadratic_forms(features: Tensor, linear: Tensor, squared: Tensor) -> Tensor:
    """Return values (N, K, *) of K functions ``Σ_d l_kd · x_d + q_kd · x_d²``; differentiable in x.

    ``linear`` is (K, D). ``squared`` is (J, D) with J ≤ K and belongs to the last J functions, so
    that products alone, J = 0, do not pay for squares.
    """
    maps, dtype = matrices(features), result_dtype(features)
    linear, squared = linear.to(dtype), squared.to(dtype)
    forms = new_map(features, len(linear))

    def compute(scratch: Scratch, x: Tensor, out: Tensor) -> None:
        for x_, out_ in parts(part, x, out):
            wide = scratch.like(x_, "x", dtype).copy_(x_)
            values = scratch("values", dtype, len(x_), len(linear), x_.shape[2]).zero_()
            values.baddbmm_(linear.expand(len(x_), -1, -1), wide)
            if len(squared) > 0:
                of_squares = squared.expand(len(x_), -1, -1)
                values[:, -len(squared) :].baddbmm_(of_squares, wide.mul_(wide))
            out_.copy_(values)

    part = pixels_of_part(maps, dtype, len(linear))
    for_each_block(compute, maps, matrices(forms), part=part)
    return forms


def _quadratic_forms_backward(
    grad_forms: Tensor, features: Tensor, linear: Tensor, squared: Tensor
) -> Tensor:
    """Return the sum of ``grad · (l + 2 q · x)``, 0 where all of a pixel's ``grad`` are 0."""
    maps, dtype, grad = matrices(features), result_dtype(features), new_gradient(features)
    linear, squared = linear.T.to(dtype), 2 * squared.T.to(dtype)

    def compute(scratch: Scratch, x: Tensor, of_forms: Tensor, out: Tensor) -> None:
        for x_, of_forms_, out_ in parts(part, x, of_forms, out):
            g = of_forms_.to(dtype)
            slopes = scratch.like(x_, "slopes", dtype).zero_()
            if squared.shape[1] > 0:
                of_squares = g[:, -squared.shape[1] :]
                slopes.baddbmm_(squared.expand(len(x_), -1, -1), of_squares).mul_(x_)
            slopes.baddbmm_(linear.expand(len(x_), -1, -1), g)
            out_.copy_(zero_unless((g != 0).any(dim=1, keepdim=True), slopes))

    part = pixels_of_part(maps, dtype, linear.shape[1])
    for_each_block(compute, maps, matrices(grad_forms), matrices(grad), part=part)
    return grad


_quadratic_forms_operator = register(
    "quadratic_forms(Tensor features, Tensor linear, Tensor squared) -> Tensor",
    _quadratic_forms,
    lambda features, linear, squared: new_map(features, len(linear)),
)
quadratic_forms_backward = without_derivative(
    register(
        "quadratic_forms_backward(Tensor grad_forms, Tensor features, Tensor linear, "
        "Tensor squared) -> Tensor",
        _quadratic_forms_backward,
        lambda grad_forms, features, linear, squared: new_gradient(features),
    )
)


class _QuadraticForms(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_quadratic_forms_operator)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_forms: Tensor) -> tuple[Tensor, None, None]:
        return quadratic_forms_backward(grad_forms, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        features, linear, squared = ctx.saved_tensors
        forms: Tensor = quadratic_forms(tangent, linear, squared[:0])
        if len(squared) > 0:
            slopes = 2 * features * tangent
            of_squares = quadratic_forms(slopes, squared, squared[:0])
            first = linear.shape[0] - len(squared)
            forms = torch.cat([forms[:, :first], forms[:, first:] + of_squares], dim=1)
        return forms


quadratic_forms = with_derivative(_quadratic_forms_operator, _QuadraticForms)


# ------------------------------------------------------------------------- distances between maps


def _map_distances(features: Tensor, reference: Tensor) -> Tensor:
    """Return ‖x − r‖ (N, *) of the pixels of two maps (N, D, *); differentiable in the first."""
    maps, others, dtype = matrices(features), matrices(reference), result_dtype(features)
    distances = new_map(features)

    def compute(scratch: Scratch, x: Tensor, r: Tensor, out: Tensor) -> None:
        for x_, r_, out_ in parts(part, x, r, out):
            offsets = scratch.like(x_, "x", dtype).copy_(x_).sub_(r_)
            out_.copy_(offsets.square_().sum(dim=1, keepdim=True))
        out.sqrt_()

    part = pixels_of_part(maps, dtype)
    for_each_block(compute, maps, others, scalars(distances), part=part)
    return distances


def _map_distances_backward(
    grad_distances: Tensor, distances: Tensor, features: Tensor, reference: Tensor
) -> Tensor:
    """Return ``grad · (x − r) / ‖x − r‖``, 0 where x = r or ``grad`` is 0."""
    maps, others, dtype = matrices(features), matrices(reference), result_dtype(features)
    grad = new_gradient(features)

    def compute(scratch: Scratch, x: Tensor, r: Tensor, d: Tensor, g: Tensor, out: Tensor) -> None:
        scale = g / torch.where(d == 0, 1.0, d)
        for x_, r_, scale_, active_, out_ in parts(part, x, r, scale, g != 0, out):
            offsets = scratch.like(x_, "x", dtype).copy_(x_).sub_(r_)
            out_.copy_(zero_unless(active_, offsets.mul_(scale_)))

    part = pixels_of_part(maps, dtype)
    of_pixels = scalars(distances), scalars(grad_distances)
    for_each_block(compute, maps, others, *of_pixels, matrices(grad), part=part)
    return grad


_map_distances_operator = register(
    "map_distances(Tensor features, Tensor reference) -> Tensor",
    _map_distances,
    lambda features, reference: new_map(features),
)
map_distances_backward = without_derivative(
    register(
        "map_distances_backward(Tensor grad_distances, Tensor distances, Tensor features, "
        "Tensor reference) -> Tensor",
        _map_distances_backward,
        lambda grad_distances, distances, features, reference: new_gradient(features),
    )
)


map_distances = of_each_pixel(_map_distances_operator, map_distances_backward)


# ----------------------------------------------------------------------------- sums over all pixels


def _soft_class_sums(features: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums (C, D) of p · x and totals (C,) of p, over the pixels where both are finite."""
    maps, memberships, dtype = matrices(features), matrices(probabilities), wide_dtype(features)
    num_classes, scratch = probabilities.shape[1], Scratch(features.device)
    sums = torch.zeros(num_classes, features.shape[1], dtype=dtype, device=features.device)
    totals = sums.new_zeros(num_classes)
    part = pixels_of_part(maps, dtype, num_classes)
    for x, p in views_of_blocks(part, maps, memberships):
        finite = is_finite(x, scratch) & p.isfinite().all(dim=1, keepdim=True)
        p = torch.where(finite, p.to(dtype), 0.0)
        x = scratch.like(x, "x", dtype).copy_(x).nan_to_num_(0.0, 0.0, 0.0)
        of_images = scratch("sums", dtype, len(x), *sums.shape).zero_()
        sums += of_images.baddbmm_(p, x.mT).sum(dim=0)
        totals += p.sum(dim=(0, 2))
    return sums, totals


def _allocate_soft_class_sums(features: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    shape = probabilities.shape[1], features.shape[1]
    sums = features.new_empty(shape, dtype=wide_dtype(features))
    return sums, torch.empty_like(sums[:, 0])


soft_class_sums = without_derivative(
    register(
        "soft_class_sums(Tensor features, Tensor probabilities) -> (Tensor, Tensor)",
        _soft_class_sums,
        _allocate_soft_class_sums,
    )
)


def _scatter(features: Tensor, labels: Tensor, means: Tensor, shared: bool) -> Tensor:
    """Return sums of (x − m_y)(x − m_y)ᵀ over the finite pixels with a label in [0, C).

    With ``shared`` (D, D) over all classes; else the diagonal (C, D) of each.
    """
    maps, targets, dtype = matrices(features), scalars(labels), wide_dtype(features)
    (num_classes, channels), scratch = means.shape, Scratch(features.device)
    classes = torch.arange(num_classes, device=features.device)[:, None]
    means = means.to(dtype)
    total = means.new_zeros(channels if shared else num_classes, channels)
    part = pixels_of_part(maps, dtype, num_classes + channels)
    for x, y in views_of_blocks(part, maps, targets):
        y = y.to(torch.int64)
        summed = (y >= 0) & (y < num_classes) & is_finite(x, scratch)
        y = torch.where(summed, y, 0)
        offsets = zero_unless(summed, offsets_from(means, y, x, scratch))
        if shared:
            for image in offsets:
                total.addmm_(image, image.mT)
        else:
            members = (y == classes).to(dtype)
            of_images = scratch("sums", dtype, len(offsets), *total.shape).zero_()
            total += of_images.baddbmm_(members, offsets.square_().mT).sum(dim=0)
    return total


def _allocate_scatter(features: Tensor, labels: Tensor, means: Tensor, shared: bool) -> Tensor:
    rows = means.shape[1] if shared else means.shape[0]
    return features.new_empty(rows, means.shape[1], dtype=wide_dtype(features))


scatter = without_derivative(
    register(
        "scatter(Tensor features, Tensor labels, Tensor means, bool shared) -> Tensor",
        _scatter,
        _allocate_scatter,
    )
)
