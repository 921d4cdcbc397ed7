"""Sums, anchors and evaluation over all processes of ``torch.distributed`` (gloo, NCCL and others).

``update`` never communicates. Each rank feeds its own share of the stream to its own accumulator,
and one `all_reduce` after the pass makes every rank hold what one process would that saw it all::

    for features, labels in share_of_this_rank:
        anchors.update(features, labels)
    all_reduce(anchors)

**Anchors and DistributedDataParallel.** DDP with ``broadcast_buffers=True``, its default, gives
every rank the buffers of rank 0 at the start of each training ``forward``. Anchors inside of the
wrapped module are such buffers: what the other ranks have accumulated is lost, silently, and an
`all_reduce` comes too late. Either keep the anchors outside of the wrapped module, which is the
simplest, or wrap it with ``broadcast_buffers=False`` (``forward_sync_buffers=False`` in versions of
PyTorch that have renamed it); and call `all_reduce` when the pass is over.
"""

import copy
from typing import TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import FLOATS, check_sums, described, type_of
from .anchors import AnchorClusters, CategoryAnchors, ClassSums
from .calibration import ScoreCalibrator
from .evaluation import ConfusionMatrix, PseudoLabelQuality
from .selection import InformationMaximization, LabelAgreement, NuclearNorm, SoftNeighborhoodDensity
from .statistics import ClassVariances, WithinClassCovariance, scatter_of_means

_OfLogits: TypeAlias = SoftNeighborhoodDensity | InformationMaximization | NuclearNorm
State: TypeAlias = (
    CategoryAnchors
    | AnchorClusters
    | WithinClassCovariance
    | ClassVariances
    | ConfusionMatrix
    | PseudoLabelQuality
    | ScoreCalibrator
    | LabelAgreement
    | _OfLogits
)

# Enough for the settings of any state; a message of a fixed size fits on ranks that disagree.
_DESCRIPTION_BYTES = 256


def all_reduce_class_sums(
    class_sums: ClassSums, *, group: dist.ProcessGroup | None = None
) -> ClassSums:
    r"""Add up the class sums of all ranks.

    .. math:: s_c = \sum_r s_c^{(r)}, \qquad n_c = \sum_r n_c^{(r)}

    Called for every batch, between `anchorda.class_sums` and `CategoryAnchors.update_sums`, it
    makes each rank's anchors exactly those of one process with the global batch, for a moving
    average and capped counts too. Every process of the group has to call it, also one whose batch
    is empty. The result has the same bits on every rank. Whether the ranks agree on the shapes
    is looked at first, for which the host waits for the GPU.

    Args:
        class_sums: of this rank: sums ``(C, D)``, floating point, and counts ``(C,)``, integer, or
            floating point of `soft_class_sums`.
        group: the processes that take part; ``None`` is all of them.

    Returns:
        ``ClassSums(sums (C, D), counts (C,))``, new tensors on the devices of the given ones;
        the sums are added up in float64 and keep their dtype. Without an initialized
        ``torch.distributed`` the values are those given.

    Raises:
        TypeError: if ``class_sums`` is not a `ClassSums`, or a dtype is wrong.
        ValueError: on every rank, if shapes or dtypes differ between ranks or do not fit each
            other; or if this process is not in ``group``.

    Source: equation 2 of CAG-UDA (arXiv 1910.13049) is a ratio of sums, and sums add up over ranks.

    >>> import torch, anchorda
    >>> labels = torch.tensor([0, 0, 255])
    >>> sums = anchorda.class_sums(torch.tensor([[1.0], [3.0], [5.0]]), labels, num_classes=2)
    >>> anchors = anchorda.CategoryAnchors(num_classes=2, feature_dim=1, momentum=0.1)
    >>> anchors.update_sums(*all_reduce_class_sums(sums))
    >>> anchors.compute()
    tensor([[2.],
            [nan]])
    """
    if not isinstance(class_sums, ClassSums):
        got = type_of(class_sums)
        raise TypeError(f"Expected `class_sums` to be ClassSums, but got {got}.")
    sums, counts = class_sums
    # Compared before they are checked, so that an error is one on every rank.
    device = sums.device if isinstance(sums, Tensor) else torch.device("cpu")
    content = f"sums={described(sums)}, counts={described(counts)}"
    _check_agreement(f"ClassSums({content})", device, group)
    is_soft = isinstance(counts, Tensor) and counts.dtype in FLOATS
    check_sums(sums, counts.long() if is_soft else counts)
    return ClassSums(_sum(sums, group), _sum(counts if is_soft else counts.long(), group))


def all_reduce(state: State, *, group: dist.ProcessGroup | None = None) -> None:
    r"""Combine the states of all ranks in place: each holds the result of one process over all.

    Counts are added up, and so are scatters, about the means of all ranks. Anchors are averaged
    with their counts as weights:

    .. math:: a_c = \sum_r \frac{n_c^{(r)}}{n_c}\, a_c^{(r)}, \qquad n_c = \sum_r n_c^{(r)}

    For the exact running mean that is what one process over all streams holds. Moving averages and
    capped counts depend on an order that separate streams do not have: theirs is this average,
    whatever the order of the ranks, with the counts capped again after they were added up. For
    exactly what one process with the global batch holds, call `all_reduce_class_sums` for every
    batch instead.

    Every process of the group has to call it, also one that has seen nothing. Afterwards the states
    have the same bits on every rank, so any of them may be saved. **Call it once, when the pass is
    over**: every rank then holds the whole, and a second call would count it once per rank. For a
    look in between, reduce a ``copy.deepcopy``.

    Args:
        state: of this rank, changed in place: `CategoryAnchors`, `AnchorClusters`,
            `WithinClassCovariance`, `ClassVariances`, `ConfusionMatrix`, `PseudoLabelQuality`,
            `ScoreCalibrator`, `LabelAgreement`, `SoftNeighborhoodDensity`,
            `InformationMaximization` or `NuclearNorm`. Without an initialized
            ``torch.distributed`` it is left as it is.
        group: the processes that take part; ``None`` is all of them.

    Raises:
        TypeError: if ``state`` is of another kind.
        ValueError: on every rank, if the kinds or settings differ between ranks; or if this process
            is not in ``group``. The states are then as they were.

    Source: the mean of Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances" (1979), for any number of parts.

    >>> import torch, anchorda
    >>> anchors = anchorda.CategoryAnchors(num_classes=2, feature_dim=1)
    >>> anchors.update(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]))
    >>> all_reduce(anchors)  # in a single process
    >>> anchors.counts
    tensor([2, 0])
    """
    if not isinstance(state, State):
        kinds = ", ".join(kind.__name__ for kind in get_args(State))
        raise TypeError(f"Expected `state` to be one of {kinds}, but got {type(state).__name__}.")
    check_agreement(state, group)
    if not _ranks(group):
        return
    if isinstance(state, (_OfLogits, AnchorClusters)):
        _merge_all(state, group)
        return
    counts = _sum(state.counts, group)
    if isinstance(state, (CategoryAnchors, ClassVariances, WithinClassCovariance)):
        # Weighted before they are added up, so that a class of one rank alone keeps its bits, and
        # what is handed out is the result. An unseen class is 0 times a share of 0/1.
        shares = state.counts.to(state.means.dtype) / counts.clamp(min=1)
        means = _sum(state.means * shares[:, None], group)
        if not isinstance(state, CategoryAnchors):
            # A scatter about the means of all ranks is that about one's own plus that of the means.
            between = scatter_of_means(state, state.means - means, state.counts)
            state.scatter.copy_(_sum(state.scatter + between, group))
        elif state.max_count is not None:
            counts.clamp_(max=state.max_count)
        state.means.copy_(means)
    state.counts.copy_(counts)


def check_agreement(state: State, group: dist.ProcessGroup | None) -> None:
    """Reject on every rank what `all_reduce` would: before the work that leads up to it."""
    settings = state.extra_repr()
    if not settings and not isinstance(state, _OfLogits):
        settings = f"num_classes={len(state.counts)}"
    description = f"{type(state).__name__}({settings})"
    if state.passed_with_counts:
        description += ", passed with counts"
    _check_agreement(description, state.counts.device, group)
    if state.passed_with_counts and _ranks(group):
        raise ValueError(
            "Expected `state` with the counts of this rank alone, but got one that was passed to "
            "the process with counts in it, which would be added up once per rank. Call "
            "state.reset() at the start of the process, or merge those counts after all_reduce."
        )


def _ranks(group: dist.ProcessGroup | None) -> list[int]:
    """Return the processes of a group by their global ranks; none without ``torch.distributed``."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"Expected a process that is in `group`, but got rank {dist.get_rank()}, which is not. "
            "Call this in the processes of the group only."
        )
    return dist.get_process_group_ranks(dist.group.WORLD if group is None else group)


def _check_agreement(
    description: str, device: torch.device, group: dist.ProcessGroup | None
) -> None:
    """Reject on every rank what differs between ranks: its sum would hang, or be nonsense."""
    ranks = _ranks(group)
    if not ranks:
        return
    encoded = description.encode().ljust(_DESCRIPTION_BYTES)[:_DESCRIPTION_BYTES]
    own = torch.tensor(list(encoded), dtype=torch.uint8, device=_meeting_place(device, group))
    gathered = [torch.empty_like(own) for _ in ranks]
    dist.all_gather(gathered, own, group=group)
    held: dict[str, list[str]] = {}
    for rank, received in zip(ranks, torch.stack(gathered).tolist(), strict=True):
        held.setdefault(bytes(received).decode(errors="replace").rstrip(), []).append(str(rank))
    if len(held) > 1:
        got = " and ".join(
            f"{what} on rank{'s' if len(where) > 1 else ''} {', '.join(where)}"
            for what, where in held.items()
        )
        raise ValueError(
            f"Expected the same state on every rank, but got {got}. "
            "Create it with the same settings in every process."
        )


def _merge_all(state: _OfLogits | AnchorClusters, group: dist.ProcessGroup | None) -> None:
    """Replace a state by the states of all ranks, merged in their order.

    Its shapes depend on what a rank has seen, so the states travel as objects; they are small.
    """
    own = {name: buffer.cpu() for name, buffer in state.state_dict().items()}
    gathered: list[dict[str, Tensor]] = [{} for _ in _ranks(group)]
    dist.all_gather_object(gathered, own, group=group)
    merged, other = copy.deepcopy(state).cpu(), copy.deepcopy(state).cpu()
    merged.load_state_dict(gathered[0])
    for part in gathered[1:]:
        other.load_state_dict(part)
        merged.merge(other)  # type: ignore[arg-type]  # both are copies of one state
    state.load_state_dict(merged.state_dict())


def _sum(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum over all ranks in a new tensor, of the same bits on each."""
    ranks = _ranks(group)
    if not ranks:
        return values.detach().clone()
    dtype = torch.float64 if values.is_floating_point() else torch.int64
    total = values.detach().to(_meeting_place(values.device, group))
    total = total.to(dtype, copy=True, memory_format=torch.contiguous_format)
    # No backend promises that an all-reduce of floats adds up in the same order on every rank. So
    # one rank receives the sum and hands it out; unlike after an all-gather, which would also do,
    # memory and traffic of a rank do not grow with their number.
    dist.reduce(total, dst=ranks[0], group=group)
    dist.broadcast(total, src=ranks[0], group=group)
    return total.to(values)


def _meeting_place(device: torch.device, group: dist.ProcessGroup | None) -> torch.device:
    """Return the device on which a group exchanges tensors: NCCL on a GPU only, gloo on the CPU.

    With either of them this kind of device depends on the group alone, so that ranks whose states
    live on different devices meet.
    """
    backends = dist.get_backend_config(group)
    if "nccl" in backends and torch.cuda.is_available():
        return device if device.type == "cuda" else torch.device("cuda")
    return torch.device("cpu") if "gloo" in backends else device
