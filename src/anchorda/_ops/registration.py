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
