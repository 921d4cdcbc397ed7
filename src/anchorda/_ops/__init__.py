"""The operators as torch sees them: opaque to the compiler, with their gradients and fake results.

Registered as custom operators because they loop over blocks: traced, that loop would be unrolled;
opaque, ``torch.compile(fullgraph=True)`` takes them for any size. This is also where inputs with a
faster path than `reference` are sent to it: `kernels` on a GPU, `cpu` on a CPU.
"""

import functools
import subprocess
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference
from . import majority as majority_
from .plain import map_distances as map_distances
from .plain import map_distances_backward as map_distances_backward
from .plain import quadratic_forms as quadratic_forms
from .plain import quadratic_forms_backward as quadratic_forms_backward
from .plain import scatter as scatter
from .plain import soft_class_sums as soft_class_sums
from .tiles import new_gradient

# Annotations in this file must be types, not strings: torch infers the schemas from them.


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels, where they run: on NVIDIA GPUs that have TF32."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        import triton

        # Triton 3.0 to 3.2 abort the process where they compile the class sums.
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
            return None
        # Builds Triton's launcher, for which a C compiler or Python's headers may be missing.
        triton.runtime.driver.active.get_current_device()
        from . import kernels
    except (ImportError, RuntimeError, OSError, subprocess.CalledProcessError):
        return None
    return kernels


def _fastest(
    features: Tensor, *others: Tensor, num_classes: int = 1, plain: ModuleType = reference
) -> ModuleType:
    """The module whose operators compute these inputs: the kernels, or one in plain torch."""
    kernels = _kernels(features.device)
    if kernels is None or not kernels.takes(features, *others, num_classes=num_classes):
        return plain
    return kernels


@torch.library.custom_op("anchorda::majority", mutates_args=())
def majority(labels: Tensor, size: Sequence[int], min_ratio: float, ignore_index: int) -> Tensor:
    """See `majority.majority`."""
    return majority_.majority(labels, size, min_ratio, ignore_index)


@majority.register_fake
def _(labels: Tensor, size: Sequence[int], min_ratio: float, ignore_index: int) -> Tensor:
    return labels.new_empty(labels.shape[0], *size)


@torch.library.custom_op("anchorda::class_sums", mutates_args=())
def class_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """See `reference.class_sums`."""
    plain = cpu if cpu.adds(features) else reference
    fastest = _fastest(features, num_classes=num_classes, plain=plain)
    sums: tuple[Tensor, Tensor] = fastest.class_sums(features, labels, num_classes)
    return sums


@class_sums.register_fake
def _(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if reference.has_float64(features.device) else torch.float32
    sums = features.new_empty(num_classes, features.shape[1], dtype=dtype)
    return sums, features.new_empty(num_classes, dtype=torch.int64)


@torch.library.custom_op("anchorda::image_sums", mutates_args=())
def image_sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The class sums of each image alone: (N, C, D) and counts (N, C) int64; differentiable."""
    n, d = features.shape[:2]
    sums = features.new_empty(n, num_classes, d, dtype=reference.result_dtype(features))
    counts = features.new_empty(n, num_classes, dtype=torch.int64)
    for i in range(n):
        image = slice(i, i + 1)
        sums[i], counts[i] = class_sums(features[image], labels[image], num_classes)
    return sums, counts


@image_sums.register_fake
def _(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    n, d = features.shape[:2]
    sums = features.new_empty(n, num_classes, d, dtype=reference.result_dtype(features))
    return sums, features.new_empty(n, num_classes, dtype=torch.int64)


@torch.library.custom_op("anchorda::image_sums_backward", mutates_args=())
def image_sums_backward(grad_sums: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """See `reference.image_sums_backward`."""
    return reference.image_sums_backward(grad_sums, features, labels)


@image_sums_backward.register_fake
def _(grad_sums: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    return new_gradient(features)


def _image_sums_setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Any) -> None:
    features, labels, _ = inputs
    ctx.save_for_backward(features, labels)


def _image_sums_grad(ctx: Any, grad_sums: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return image_sums_backward(grad_sums, *ctx.saved_tensors), None, None


image_sums.register_autograd(_image_sums_grad, setup_context=_image_sums_setup)


@torch.library.custom_op("anchorda::anchor_distances", mutates_args=())
def anchor_distances(features: Tensor, anchors: Tensor) -> Tensor:
    """See `reference.anchor_distances`; differentiable in the features."""
    return reference.anchor_distances(features, anchors)


@anchor_distances.register_fake
def _(features: Tensor, anchors: Tensor) -> Tensor:
    shape = (features.shape[0], anchors.shape[0], *features.shape[2:])
    return features.new_empty(shape, dtype=reference.result_dtype(features))


@torch.library.custom_op("anchorda::anchor_distances_backward", mutates_args=())
def anchor_distances_backward(
    grad_distances: Tensor, distances: Tensor, features: Tensor, anchors: Tensor
) -> Tensor:
    """See `reference.anchor_distances_backward`."""
    return reference.anchor_distances_backward(grad_distances, distances, features, anchors)


@anchor_distances_backward.register_fake
def _(grad_distances: Tensor, distances: Tensor, features: Tensor, anchors: Tensor) -> Tensor:
    return new_gradient(features)


def _anchor_distances_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs)


def _anchor_distances_grad(ctx: Any, grad_distances: Tensor) -> tuple[Tensor, None]:
    return anchor_distances_backward(grad_distances, *ctx.saved_tensors), None


anchor_distances.register_autograd(_anchor_distances_grad, setup_context=_anchor_distances_setup)


@torch.library.custom_op("anchorda::nearest_anchors", mutates_args=())
def nearest_anchors(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.nearest_anchors`."""
    nearest: tuple[Tensor, Tensor, Tensor]
    plain = cpu if cpu.multiplies(features) else reference
    num_anchors = anchors.shape[:-1].numel()
    fastest = _fastest(features, anchors, num_classes=num_anchors, plain=plain)
    nearest = fastest.nearest_anchors(features, anchors)
    return nearest


@nearest_anchors.register_fake
def _(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = (features.shape[0], *features.shape[2:])
    nearest = features.new_empty(shape, dtype=reference.result_dtype(features))
    return features.new_empty(shape, dtype=torch.int32), nearest, torch.empty_like(nearest)


@torch.library.custom_op("anchorda::pixel_losses", mutates_args=())
def pixel_losses(features: Tensor, labels: Tensor, anchors: Tensor, distance: str) -> Tensor:
    """See `reference.pixel_losses`; differentiable in the features."""
    losses: Tensor
    losses = _fastest(features, anchors).pixel_losses(features, labels, anchors, distance)
    return losses


@pixel_losses.register_fake
def _(features: Tensor, labels: Tensor, anchors: Tensor, distance: str) -> Tensor:
    shape = (features.shape[0], *features.shape[2:])
    return features.new_empty(shape, dtype=reference.result_dtype(features))


@torch.library.custom_op("anchorda::pixel_losses_backward", mutates_args=())
def pixel_losses_backward(
    grad_losses: Tensor,
    losses: Tensor,
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    distance: str,
) -> Tensor:
    """See `reference.pixel_losses_backward`."""
    grad: Tensor = _fastest(features, anchors).pixel_losses_backward(
        grad_losses, losses, features, labels, anchors, distance
    )
    return grad


@pixel_losses_backward.register_fake
def _(
    grad_losses: Tensor,
    losses: Tensor,
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    distance: str,
) -> Tensor:
    return new_gradient(features)


def _pixel_losses_setup(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor
) -> None:
    features, labels, anchors, ctx.distance = inputs
    ctx.save_for_backward(output, features, labels, anchors)


def _pixel_losses_grad(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None, None]:
    grad = pixel_losses_backward(grad_losses, *ctx.saved_tensors, ctx.distance)
    return grad, None, None, None


pixel_losses.register_autograd(_pixel_losses_grad, setup_context=_pixel_losses_setup)


@torch.library.custom_op("anchorda::contrastive_losses", mutates_args=())
def contrastive_losses(
    features: Tensor, labels: Tensor, anchors: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """See `reference.contrastive_losses`; differentiable in the features."""
    plain = cpu if cpu.multiplies(features) else reference
    losses: tuple[Tensor, Tensor]
    losses = plain.contrastive_losses(features, labels, anchors, temperature)
    return losses


@contrastive_losses.register_fake
def _(
    features: Tensor, labels: Tensor, anchors: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    dtype = reference.result_dtype(features)
    n, _, *spatial = features.shape
    distances = features.new_empty(n, anchors.shape[0], *spatial, dtype=dtype)
    return features.new_empty(n, *spatial, dtype=dtype), distances


@torch.library.custom_op("anchorda::contrastive_losses_backward", mutates_args=())
def contrastive_losses_backward(
    grad_losses: Tensor,
    distances: Tensor,
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    temperature: float,
) -> Tensor:
    """See `reference.contrastive_losses_backward`."""
    plain = cpu if cpu.multiplies(features) else reference
    grad: Tensor = plain.contrastive_losses_backward(
        grad_losses, distances, features, labels, anchors, temperature
    )
    return grad


@contrastive_losses_backward.register_fake
def _(
    grad_losses: Tensor,
    distances: Tensor,
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    temperature: float,
) -> Tensor:
    return new_gradient(features)


def _contrastive_losses_setup(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]
) -> None:
    features, labels, anchors, ctx.temperature = inputs
    ctx.save_for_backward(output[1], features, labels, anchors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the distances


def _contrastive_losses_grad(
    ctx: Any, grad_losses: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, None, None, None]:
    if grad_losses is None:
        return None, None, None, None
    grad = contrastive_losses_backward(grad_losses, *ctx.saved_tensors, ctx.temperature)
    return grad, None, None, None


contrastive_losses.register_autograd(
    _contrastive_losses_grad, setup_context=_contrastive_losses_setup
)
