"""Operators as torch sees them: opaque to its compiler, and differentiable in every mode.

Opaque because they loop over blocks: traced, that loop would be unrolled; opaque,
``torch.compile(fullgraph=True)`` calls them for any size. They are defined by
`torch.library.Library` and not by `torch.library.custom_op`, whose first call imports the compiler.

Torch's own registration of derivatives knows neither forward mode nor `torch.func`. So an operator
is called through a `torch.autograd.Function`, except by the compiler.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Operator = Callable[..., Any]
_LIBRARY = torch.library.Library("anchorda", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def register(schema: str, compute: Operator, allocate: Operator) -> Operator:
    """Register an operator and return it.

    Args:
        schema: its name, arguments and results, in torch's notation.
        compute: what it does.
        allocate: returns results of the right shapes, dtypes and strides, and of any content.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, _hidden_from_dynamo(compute), "CompositeExplicitAutograd")
    torch.library.register_fake(f"anchorda::{name}", allocate, lib=_LIBRARY)
    operator: Operator = getattr(torch.ops.anchorda, name).default
    return operator


def with_derivative(operator: Operator, function: type[torch.autograd.Function]) -> Operator:
    """Return the operator with the derivatives of a function that has it as its forward."""
    torch.library.register_autograd(
        _name_of(operator), function.backward, setup_context=function.setup_context, lib=_LIBRARY
    )

    @functools.wraps(operator)
    def call(*arguments: Any) -> Any:  # noqa: ANN401
        if torch.compiler.is_compiling():
            return operator(*arguments)
        return function.apply(*arguments)

    return call


def of_each_pixel(operator: Operator, gradient: Operator) -> Operator:
    """Return an operator, whose first result (N, *) is a number of each pixel, with derivatives.

    Args:
        operator: of features, other tensors and, last, settings. Of several results the first alone
            has a gradient.
        gradient: of the gradient of that result, the operator's last result, and its arguments.
    """

    class Function(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(operator)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
            results = output if isinstance(output, tuple) else (output,)
            tensors = [value for value in inputs if isinstance(value, Tensor)]
            ctx.settings, ctx.no_gradients = inputs[len(tensors) :], [None] * (len(inputs) - 1)
            ctx.no_tangents = [None] * (len(results) - 1)
            ctx.mark_non_differentiable(*results[1:])
            ctx.set_materialize_grads(False)  # no zeros for the other results
            ctx.save_for_backward(results[-1], *tensors)
            ctx.save_for_forward(results[-1], *tensors)

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:  # noqa: ANN401
            if grad is not None:
                grad = gradient(grad, *ctx.saved_tensors, *ctx.settings)
            return grad, *ctx.no_gradients

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor, *_: None) -> Any:  # noqa: ANN401
            ones = torch.ones_like(tangent[:, 0], dtype=ctx.saved_tensors[0].dtype)
            slopes = gradient(ones, *ctx.saved_tensors, *ctx.settings)
            derivative = directional(slopes, tangent)
            return (derivative, *ctx.no_tangents) if ctx.no_tangents else derivative

    return with_derivative(operator, Function)


def directional(gradient: Tensor, tangent: Tensor) -> Tensor:
    """Return the sum (N, *) over the channels of gradient times tangent, both (N, D, *)."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(dtype) * tangent.to(dtype)).sum(dim=1)


def without_derivative(operator: Operator) -> Operator:
    """Return the operator with an error in place of derivatives, which torch takes for 0."""

    class Function(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(operator)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:  # noqa: ANN401
            raise RuntimeError(message)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:  # noqa: ANN401
            raise RuntimeError(message)

    message = (
        f"{_name_of(operator)} has no derivative: distances and losses of anchorda are "
        "differentiable once, in the features. Detach the features of what needs no gradient; for "
        "derivatives of second order, write the term in plain torch, as with torch.cdist."
    )
    return with_derivative(operator, Function)


def _name_of(operator: Any) -> str:  # noqa: ANN401
    return str(operator._schema.name)


def _hidden_from_dynamo(compute: Operator) -> Operator:
    """Return the function such that Dynamo does not compile its frames.

    As long as Dynamo is not loaded it compiles nothing, and loading it takes more than a second.
    """
    hidden = functools.cache(torch.compiler.disable)

    @functools.wraps(compute)
    def call(*arguments: Any) -> Any:  # noqa: ANN401
        if "torch._dynamo" in sys.modules:
            return hidden(compute)(*arguments)
        return compute(*arguments)

    return call
