"""How a module's state survives ``.half()``, ``.to(dtype)`` and a round trip through a file."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ._ops.reference import has_float64


def move_buffers(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Follow the device that ``nn.Module._apply(fn)`` asks for, and nothing else.

    A running mean over 10⁸ pixels, or a threshold of 0.95, does not outlive a cast to half
    precision. On a device without float64 the buffers of a module with a float64 one stay together
    on the CPU.
    """
    buffers = dict(module.named_buffers(recurse=False))
    needs_float64 = any(buffer.dtype == torch.float64 for buffer in buffers.values())
    for name, buffer in buffers.items():
        device = fn(torch.empty(0, device=buffer.device)).device
        if needs_float64 and not has_float64(device):
            device = torch.device("cpu")
        # A buffer on the meta device has no values to move.
        moved = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
        setattr(module, name, moved)


def adopt_shapes(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Give buffers the shapes that are about to be loaded: a threshold is () or (C,)."""
    for name, buffer in module.named_buffers(recurse=False):
        saved = state_dict.get(prefix + name)
        if isinstance(saved, Tensor) and saved.ndim <= 1:
            setattr(module, name, buffer.new_empty(saved.shape))
