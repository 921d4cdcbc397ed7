"""Features that a network computes but does not return."""

from collections.abc import Mapping
from types import TracebackType
from typing import Literal, final, get_args

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from ._checks import check_choice, structure_of

Side = Literal["output", "input"]
"""What is taken of a module: what it returns, or what it receives."""


@final
class FeatureTap:
    """Take the features that a module inside of a network returns or receives.

    A context manager around the call of the network: inside of it the module has a forward hook,
    which is removed at its end, also when an exception ends it. Of several calls within one
    ``with`` the last one counts. The features are the module's own tensor, no copy: gradients flow
    through it, under autocast it has the dtype that the module computed in, and what a later
    in-place operation, such as ``ReLU(inplace=True)``, makes of it shows.

    A tap keeps its features, and with them their graph, until it is entered again or goes out of
    scope; after an exception it keeps nothing. It can be entered again, but not while it is.

    **Wrapped networks.** The module is one of the wrapped network: ``wrapper.module.layer4``.

    - ``DistributedDataParallel`` calls that very module, with the share of its rank. It looks for
      parameters without a gradient among what the network returns, not among what was tapped: with
      ``find_unused_parameters=True``, tap what the logits are computed from.
    - ``nn.DataParallel`` on several GPUs runs copies, each on a part of the batch. Reading is then
      an error.
    - ``torch.compile`` looks for hooks when it compiles. A network that was called outside of a tap
      does not know that of a later call, and reading is then an error. Compile the parts before
      and behind the tapped module, not the whole.
    - ``torch.utils.checkpoint`` runs a checkpointed module again in the backward pass: read the
      features before it. Those from inside of a segment with ``use_reentrant=True`` carry no
      gradient; tap its end.

    Args:
        module: any module that the network calls.
        of: ``"output"``, what the module returns, or ``"input"``, its first argument: the features
            before a classifier are the classifier's input.

    Raises:
        TypeError: if ``module`` is not a module; on reading, if what came is not a single tensor.
        ValueError: if ``of`` is unknown.
        RuntimeError: on reading, if the module has not been called inside of the ``with``, or only
            copies of it; on entering a tap that is entered.

    Source: forward hooks, ``torch.nn.Module.register_forward_hook``.

    >>> import torch
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Conv2d(8, 2, 1))
    >>> with FeatureTap(network[2], of="input") as tap:
    ...     logits = network(torch.rand(1, 3, 16, 32))
    >>> tap.features.shape
    torch.Size([1, 8, 4, 8])
    >>> torch.equal(network[2](tap.features), logits)
    True
    """

    def __init__(self, module: nn.Module, of: Side = "output") -> None:
        if not isinstance(module, nn.Module):
            got = type(module).__name__
            fix = " Pass the module itself, network.get_submodule(name)." if got == "str" else ""
            raise TypeError(f"Expected `module` to be a torch.nn.Module, but got {got}.{fix}")
        check_choice(of, "of", get_args(Side))
        self._module = module
        self._of: Side = of
        self._handle: RemovableHandle | None = None
        # What came, whatever it is: raised about where it is read, not in the midst of a forward.
        self._held: tuple[object, bool] | None = None

    @property
    def features(self) -> Tensor:
        """The output or input of the module in its last call inside of the ``with``."""
        name = type(self._module).__name__
        if self._held is None:
            raise RuntimeError(
                f"Expected a call of {name} inside of the `with`, but got none. Tap a module that "
                "the network calls; of a network in torch.compile, compile the parts before and "
                "behind the tapped module, not the whole."
            )
        value, whole = self._held
        if not whole:
            raise RuntimeError(
                f"Expected a call of {name} itself, but got calls of copies of it, each with a "
                "part of the batch. Use DistributedDataParallel instead of DataParallel, and tap "
                "a module of the network that you call."
            )
        if not isinstance(value, Tensor):
            raise TypeError(
                f"Expected the {self._of} of {name} to be a torch.Tensor, but got "
                f"{structure_of(value)}. Tap a module before or behind it that returns, or with "
                'of="input" receives, just the features.'
            )
        return value

    def __enter__(self) -> Self:
        """Register the hook, and forget features of an earlier use."""
        if self._handle is not None:
            raise RuntimeError(
                "Expected a tap that is not entered, but got one that is. Make another one."
            )
        self._held = None
        self._handle = self._module.register_forward_hook(self._hold, with_kwargs=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hook; after an exception, forget the features too."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        if error is not None:
            self._held = None

    def _hold(
        self,
        module: nn.Module,
        positional: tuple[object, ...],
        by_keyword: Mapping[str, object],
        output: object,
    ) -> None:
        value = output
        if self._of == "input":
            value = next(iter((*positional, *by_keyword.values())), None)
        self._held = value, module is self._module

    def __repr__(self) -> str:
        """Return the module's class and the side that is taken."""
        return f"FeatureTap({type(self._module).__name__}, of={self._of!r})"
