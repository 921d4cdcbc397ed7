"""Operators with one implementation for every device: in plain torch, block by block.

As in `reference`, nothing of the size of the features is materialized, and no value is read.
Sums over pixels are in float64. Products of one pixel lose nothing by cancellation, other than
distances that are multiplied out, so they are in float32 (float64 for float64 features).
"""

from typing import Any

import torch
from torch import Tensor

from .reference import (
    _finite,
    _offsets,
    _wide_dtype,
    kept,
    labels_at,
    result_dtype,
)
from .tiles import Scratch, blocks, get, matrices, new_gradient, put, scalars, take

# Annotations in this file must be types, not strings: torch infers the schemas from them.


@torch.library.custom_op("anchorda::quadratic_forms", mutates_args=())
def quadratic_forms(features: Tensor, linear: Tensor, squared: Tensor) -> Tensor:
    """Values (N, K, *) of K functions ``Σ_d l_kd · x_d + q_kd · x_d²``; differentiable in x.

    ``linear`` is (K, D). ``squared`` is (J, D) with J ≤ K and belongs to the last J functions, so
    that products alone, J = 0, do not pay for squares.
    """
    maps, dtype, scratch = matrices(features), result_dtype(features), Scratch(features.device)
    linear, squared = linear.to(dtype), squared.to(dtype)
    forms = _new_map(features, len(linear))
    for block in blocks(maps, dtype, len(linear)):
        x = take(maps, block, dtype, scratch)
        values = scratch("values", dtype, len(x), len(linear), x.shape[2]).zero_()
        values.baddbmm_(linear.expand(len(x), -1, -1), x)
        if len(squared) > 0:
            values[:, -len(squared) :].baddbmm_(squared.expand(len(x), -1, -1), x.mul_(x))
        put(matrices(forms), block, values)
    return forms


@quadratic_forms.register_fake
def _(features: Tensor, linear: Tensor, squared: Tensor) -> Tensor:
    return _new_map(features, len(linear))


@torch.library.custom_op("anchorda::quadratic_forms_backward", mutates_args=())
def quadratic_forms_backward(
    grad_forms: Tensor, features: Tensor, linear: Tensor, squared: Tensor
) -> Tensor:
    """Sum over the functions of ``grad · (l + 2 q · x)``, 0 where all of a pixel's ``grad`` are."""
    maps, dtype, scratch = matrices(features), result_dtype(features), Scratch(features.device)
    linear, squared = linear.T.to(dtype), 2 * squared.T.to(dtype)
    grad, of_forms = new_gradient(features), matrices(grad_forms)
    for block in blocks(maps, dtype, linear.shape[0]):
        x, g = take(maps, block, dtype, scratch), get(of_forms, block).to(dtype)
        slopes = scratch("slopes", dtype, *x.shape).zero_()
        if squared.shape[1] > 0:
            of_squares = g[:, -squared.shape[1] :]
            slopes.baddbmm_(squared.expand(len(x), -1, -1), of_squares).mul_(x)
        slopes.baddbmm_(linear.expand(len(x), -1, -1), g)
        put(matrices(grad), block, kept(slopes, (g != 0).any(dim=1, keepdim=True)))
    return grad


@quadratic_forms_backward.register_fake
def _(grad_forms: Tensor, features: Tensor, linear: Tensor, squared: Tensor) -> Tensor:
    return new_gradient(features)


def _quadratic_forms_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _quadratic_forms_grad(ctx: Any, grad_forms: Tensor) -> tuple[Tensor, None, None]:
    return quadratic_forms_backward(grad_forms, *ctx.saved_tensors), None, None


quadratic_forms.register_autograd(_quadratic_forms_grad, setup_context=_quadratic_forms_setup)


@torch.library.custom_op("anchorda::map_distances", mutates_args=())
def map_distances(features: Tensor, reference: Tensor) -> Tensor:
    """‖x − r‖ (N, *) of two maps (N, D, *), pixel by pixel; differentiable in the first."""
    maps, others, dtype = matrices(features), matrices(reference), result_dtype(features)
    distances, scratch = _new_map(features, 1), Scratch(features.device)
    for block in blocks(maps, dtype):
        offsets = take(maps, block, dtype, scratch).sub_(get(others, block))
        put(matrices(distances), block, offsets.square_().sum(dim=1, keepdim=True).sqrt_())
    return distances.squeeze(1)


@map_distances.register_fake
def _(features: Tensor, reference: Tensor) -> Tensor:
    return _new_map(features, 1).squeeze(1)


@torch.library.custom_op("anchorda::map_distances_backward", mutates_args=())
def map_distances_backward(
    grad_distances: Tensor, distances: Tensor, features: Tensor, reference: Tensor
) -> Tensor:
    """``grad · (x − r) / ‖x − r‖``, 0 where x = r or ``grad`` is 0."""
    maps, others, dtype = matrices(features), matrices(reference), result_dtype(features)
    grad, scratch = new_gradient(features), Scratch(features.device)
    for block in blocks(maps, dtype):
        offsets = take(maps, block, dtype, scratch).sub_(get(others, block))
        d, g = get(scalars(distances), block), get(scalars(grad_distances), block)
        offsets.mul_(g / torch.where(d == 0, 1.0, d))
        put(matrices(grad), block, kept(offsets, g != 0))
    return grad


@map_distances_backward.register_fake
def _(grad_distances: Tensor, distances: Tensor, features: Tensor, reference: Tensor) -> Tensor:
    return new_gradient(features)


def _map_distances_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs)


def _map_distances_grad(ctx: Any, grad_distances: Tensor) -> tuple[Tensor, None]:
    return map_distances_backward(grad_distances, *ctx.saved_tensors), None


map_distances.register_autograd(_map_distances_grad, setup_context=_map_distances_setup)


@torch.library.custom_op("anchorda::soft_class_sums", mutates_args=())
def soft_class_sums(features: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (C, D) of p · x and totals (C,) of p, over the pixels where both are finite."""
    maps, memberships, dtype = matrices(features), matrices(probabilities), _wide_dtype(features)
    num_classes, scratch = probabilities.shape[1], Scratch(features.device)
    sums = torch.zeros(num_classes, features.shape[1], dtype=dtype, device=features.device)
    totals = sums.new_zeros(num_classes)
    for block in blocks(maps, dtype, num_classes):
        p = get(memberships, block).to(dtype)
        finite = _finite(maps, block, scratch) & p.isfinite().all(dim=1, keepdim=True)
        p = torch.where(finite, p, 0.0)
        x = take(maps, block, dtype, scratch).nan_to_num_(0.0, 0.0, 0.0)
        of_tiles = scratch("sums", dtype, len(x), *sums.shape).zero_()
        sums += of_tiles.baddbmm_(p, x.mT).sum(dim=0)
        totals += p.sum(dim=(0, 2))
    return sums, totals


@soft_class_sums.register_fake
def _(features: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    shape = probabilities.shape[1], features.shape[1]
    sums = features.new_empty(shape, dtype=_wide_dtype(features))
    return sums, torch.empty_like(sums[:, 0])


@torch.library.custom_op("anchorda::scatter", mutates_args=())
def scatter(features: Tensor, labels: Tensor, means: Tensor, shared: bool) -> Tensor:
    """Sums of (x − m_y)(x − m_y)ᵀ over the finite pixels with a label in [0, C).

    With ``shared`` (D, D) over all classes; else the diagonal (C, D) of each.
    """
    maps, targets, dtype = matrices(features), scalars(labels), _wide_dtype(features)
    (num_classes, channels), scratch = means.shape, Scratch(features.device)
    classes = torch.arange(num_classes, device=features.device)[:, None]
    means = means.to(dtype)
    total = means.new_zeros(channels if shared else num_classes, channels)
    # One tile is one product of all pixels of the block.
    for block in blocks(maps, dtype, num_classes + channels, one_tile=True):
        y = labels_at(targets, block)
        summed = (y >= 0) & (y < num_classes) & _finite(maps, block, scratch)
        y = torch.where(summed, y, 0)
        offsets = kept(_offsets(maps, block, means, y, scratch), summed)
        if shared:
            for tile in offsets:
                total.addmm_(tile, tile.mT)
        else:
            members = (y == classes).to(dtype)
            of_tiles = scratch("sums", dtype, len(offsets), *total.shape).zero_()
            total += of_tiles.baddbmm_(members, offsets.square_().mT).sum(dim=0)
    return total


@scatter.register_fake
def _(features: Tensor, labels: Tensor, means: Tensor, shared: bool) -> Tensor:
    rows = means.shape[1] if shared else means.shape[0]
    return features.new_empty(rows, means.shape[1], dtype=_wide_dtype(features))


def _new_map(features: Tensor, channels: int) -> Tensor:
    """Memory for a result (N, K, *) of features (N, D, *)."""
    shape = features.shape[0], channels, *features.shape[2:]
    return features.new_empty(shape, dtype=result_dtype(features))
