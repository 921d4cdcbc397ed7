"""Methods of modules with state, as functions that classes assign: ``reset = reset_state``.

State survives ``.half()`` and ``.to(dtype)``, files and other processes.
"""

from collections.abc import Callable, Mapping
from multiprocessing.context import get_spawning_popen
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ._checks import check_device, check_feature_dim, check_features, check_mergeable
from ._ops.reference import has_float64

Module = TypeVar("Module", bound=nn.Module)


class Accumulator(Protocol):
    """A module that counts a stream."""

    counts: Tensor
    passed_with_counts: bool

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the buffers that are saved."""


def check_batch(features: Tensor, state: Tensor, name: str) -> None:
    """Reject features (N, D, *) of another number of channels or device than a state (*, D)."""
    check_features(features)
    check_feature_dim(features, state.shape[-1], " Set feature_dim={}.")
    if has_float64(features.device):  # else the state is on the CPU
        check_device(state, name, features, "features")


def shown(*names: str) -> Callable[[nn.Module], str]:
    """Return an ``extra_repr`` that lists these attributes."""

    def extra_repr(self: nn.Module) -> str:
        """Return the settings, as ``repr`` shows them."""
        return ", ".join(f"{name}={_shown(getattr(self, name))}" for name in names)

    return extra_repr


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return "..." if value.is_meta else str(value.tolist())
    return repr(value) if isinstance(value, str) else str(value)


def move_buffers(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
    """Follow the device that ``nn.Module._apply(fn)`` asks for, and nothing else: an ``_apply``.

    ``share_memory()`` therefore shares nothing: updates from several processes would race.

    A running mean over 10⁸ pixels, or a threshold of 0.95, does not outlive a cast to half
    precision. On a device without float64 the buffers of a module with a float64 one stay together
    on the CPU.
    """
    buffers = dict(self.named_buffers(recurse=False))
    needs_float64 = any(buffer.dtype == torch.float64 for buffer in buffers.values())
    for name, buffer in buffers.items():
        device = fn(torch.empty(0, device=buffer.device)).device
        if needs_float64 and not has_float64(device):
            device = torch.device("cpu")
        # A buffer on the meta device has no values to move.
        moved = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
        setattr(self, name, moved)
    return self


def load_any_shape(
    self: nn.Module,
    state_dict: Mapping[str, Tensor],
    prefix: str,
    local_metadata: object,
    strict: object,
    missing_keys: object,
    unexpected_keys: object,
    error_msgs: object,
) -> None:
    """Load buffers in the shapes that were saved: a ``_load_from_state_dict``.

    A threshold is () or (C,). A state that is allocated with its first batch has C from the file
    as well.
    """
    for name, buffer in self.named_buffers(recurse=False):
        saved = state_dict.get(prefix + name)
        if isinstance(saved, Tensor) and saved.ndim <= max(1, buffer.ndim):
            setattr(self, name, buffer.new_empty(saved.shape))
    others = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    nn.Module._load_from_state_dict(self, state_dict, prefix, *others)


def sent_state(self: nn.Module) -> dict[str, object]:
    """Return the attributes of an accumulator as they are pickled: a ``__getstate__``.

    ``torch.multiprocessing`` passes tensors to a new process in shared memory, where all ranks
    would count into one accumulator. Values are therefore sent; and that there are counts is noted,
    since a sum over ranks that were passed the same counts would hold them once per rank.
    """
    state = self.__dict__.copy()
    buffers = dict(self.named_buffers(recurse=False))
    if get_spawning_popen() is not None and not buffers["counts"].is_meta:
        state["_buffers"] = {
            name: (buffer.cpu().numpy(), buffer.device) for name, buffer in buffers.items()
        }
        state["passed_with_counts"] = bool(buffers["counts"].any())
    return state


def receive_state(self: nn.Module, state: dict[str, object]) -> None:
    """Restore what `sent_state` returned, in memory of this process: a ``__setstate__``."""
    nn.Module.__setstate__(self, state)
    for name, sent in self._buffers.items():
        if isinstance(sent, tuple):
            values, device = sent
            self._buffers[name] = torch.from_numpy(values).to(device, copy=True)
        elif isinstance(sent, Tensor) and not sent.is_meta and sent.is_shared():
            self._buffers[name] = sent.clone()  # from a queue


def reset_state(self: Accumulator) -> None:
    """Forget everything."""
    for buffer in self.state_dict().values():
        buffer.zero_()
    self.passed_with_counts = False


def merge_counts(state: Accumulator, other: Accumulator) -> None:
    """Add the counts (*, C, *) of an accumulator of the same kind, whose last but one is C."""
    check_mergeable(other, state)
    num_classes, of_other = state.counts.shape[-2], other.counts.shape[-2]
    if num_classes != of_other:
        raise ValueError(f"Expected `other` with {num_classes} classes, but got {of_other}.")
    check_device(other.counts, "other", state.counts, "counts")
    state.counts.add_(other.counts)
