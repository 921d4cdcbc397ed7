"""State of modules through ``.half()``, ``.to(dtype)``, files and other processes."""

from collections.abc import Callable, Mapping
from multiprocessing.context import get_spawning_popen

import torch
from torch import Tensor, nn

from ._ops.reference import has_float64


def move_buffers(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Follow the device that ``nn.Module._apply(fn)`` asks for, and nothing else.

    ``share_memory()`` therefore shares nothing: updates from several processes would race.

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
    """Give buffers the shapes that are about to be loaded: a threshold is () or (C,).

    A state that is allocated with its first batch has C from the file as well.
    """
    for name, buffer in module.named_buffers(recurse=False):
        saved = state_dict.get(prefix + name)
        if isinstance(saved, Tensor) and saved.ndim <= max(1, buffer.ndim):
            setattr(module, name, buffer.new_empty(saved.shape))


def sent_state(module: nn.Module) -> dict[str, object]:
    """Return the attributes of an accumulator as they are pickled: its ``__getstate__``.

    ``torch.multiprocessing`` passes tensors to a new process in shared memory, where all ranks
    would count into one accumulator. Values are therefore sent; and that there are counts is noted,
    since a sum over ranks that were passed the same counts would hold them once per rank.
    """
    state = module.__dict__.copy()
    buffers = dict(module.named_buffers(recurse=False))
    if get_spawning_popen() is not None and not buffers["counts"].is_meta:
        state["_buffers"] = {
            name: (buffer.cpu().numpy(), buffer.device) for name, buffer in buffers.items()
        }
        state["passed_with_counts"] = bool(buffers["counts"].any())
    return state


def receive_state(module: nn.Module, state: dict[str, object]) -> None:
    """Restore what `sent_state` returned, in memory of this process: the ``__setstate__``."""
    nn.Module.__setstate__(module, state)
    for name, sent in module._buffers.items():
        if isinstance(sent, tuple):
            values, device = sent
            module._buffers[name] = torch.from_numpy(values).to(device, copy=True)
        elif isinstance(sent, Tensor) and not sent.is_meta and sent.is_shared():
            module._buffers[name] = sent.clone()  # from a queue
