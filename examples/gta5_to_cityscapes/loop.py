"""The loop of one phase, whatever its losses: gradients, the best network, and the way back.

A checkpoint holds all that an iteration depends on: networks, optimizers, schedules, scaler,
teacher, the best network so far, and what the phase holds fixed. Randomness is not in it, because
all that is drawn in an iteration depends on its number alone (see `streams`).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import parallel
import torch
from network import Segmenter
from records import Records, load_checkpoint, save_checkpoint
from settings import Settings
from streams import Loading, RandomStream, numbers, seed_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

_SHOW_EVERY = 10  # iterations: reading a loss makes the host wait for the GPU


class Term(NamedTuple):
    """One term of a loss."""

    loss: Tensor
    """(): a mean, weight included."""
    amount: Tensor
    """(): what it is the mean over, such as a number of pixels: how much this process counts."""


Batch = Sequence[Tensor]
"""What each stream gives; (images, labels) of a labeled one are two entries."""
Losses = Callable[[nn.ModuleDict, Batch], Mapping[str, Term]]
"""The losses of networks for a part of a batch."""


@dataclass(frozen=True)
class Phase:
    """A baseline, a warm-up or a stage: what is trained, on what, and for how long."""

    name: str
    number: int
    """Of the phase within the run: seeds what is drawn in it."""
    iterations: int
    batch: int
    """Samples of each stream that a step takes, over all processes."""
    networks: nn.ModuleDict
    """What is trained; `networks["network"]` is what the phase ends with."""
    losses: Losses
    optimizers: Sequence[tuple[Optimizer, LRScheduler]]
    streams: Sequence[RandomStream[Any]]
    score: Callable[[Segmenter], Mapping[str, float]]
    """mIoU by what `Settings.best_by` may name."""
    held: Mapping[str, object] = field(default_factory=dict)
    """What else a checkpoint has to hold, to take the phase up again."""


class Objective(nn.Module):
    """Networks and their losses as one module, of which data-parallel training needs one call."""

    def __init__(self, networks: nn.ModuleDict, losses: Losses) -> None:
        super().__init__()
        self.networks = networks
        self._losses = losses

    def forward(self, batch: Batch) -> Mapping[str, Term]:
        """The terms of the loss."""
        return self._losses(self.networks, batch)


def train(
    phase: Phase, settings: Settings, records: Records, unfinished: Mapping[str, Any] | None
) -> None:
    """Train a phase, from its start or from where a checkpoint left it, to the best network.

    Raises:
        FloatingPointError: if a loss is not finite any more; it names iteration, term and files.
            Or if a weight of the result is not.
    """
    network = phase.networks["network"]
    assert isinstance(network, Segmenter)
    state = _State(phase, settings)
    if unfinished is not None:
        state.load(unfinished)
    objective = Objective(phase.networks, phase.losses)
    whole = DistributedDataParallel(objective) if parallel.size() > 1 else objective
    watch = _Watch(phase, records)
    objective.train()
    first, device = state.iteration, torch.device(settings.device)
    loading = loading_of(settings)
    loaders = [s.batches(first, phase.iterations, phase.batch, loading) for s in phase.streams]
    progress = tqdm(
        zip(*loaders, strict=True), desc=phase.name, initial=first, total=phase.iterations,
        disable=not parallel.is_main(),
    )  # fmt: skip
    for iteration, samples in enumerate(progress, start=first + 1):
        torch.manual_seed(seed_of(settings.seed, phase.number, iteration, parallel.rank()))
        batch = [tensor.to(device, non_blocking=True) for tensor in _flat(samples)]
        values = back_propagate(whole, batch, settings.accumulate, state.scaler)
        state.step(iteration)
        watch.add(iteration, values)
        if iteration % _SHOW_EVERY == 1 % _SHOW_EVERY:
            progress.set_postfix(watch.read())
        is_last = iteration == phase.iterations
        if settings.evaluate_every and (is_last or iteration % settings.evaluate_every == 0):
            watch.read()
            _choose(state, records)
            objective.train()
        if iteration % settings.checkpoint_every == 0 and not is_last:
            watch.read()
            # A network that is not finite never takes the place of one that is. If it became so in
            # this very step, the next loss will tell.
            if _is_finite(phase.networks):
                state.save(records)
    watch.read()
    result = state.result()
    if result is not network:
        network.load_state_dict(result if isinstance(result, dict) else result.state_dict())
    if not _is_finite(network):
        raise FloatingPointError(
            f"{phase.name}: the weights it ends with are not finite. Lower the learning rate"
        )
    parallel.share_buffers(network)


def back_propagate(
    objective: nn.Module, batch: Batch, parts: int, scaler: torch.amp.GradScaler
) -> dict[str, Tensor]:
    """Gradients of the mean over the parts of a batch; the value of each term on this process.

    Within a part every term is a mean over the pixels of all processes, as one process with the
    whole part would take it. `DistributedDataParallel` averages gradients over processes however
    much each of them has to average, so that a term counts by its amount before.
    """
    values: dict[str, Tensor] = {}
    for index, part in enumerate(zip(*(tensor.chunk(parts) for tensor in batch), strict=True)):
        with contextlib.ExitStack() as stack:
            if isinstance(objective, DistributedDataParallel) and index < parts - 1:
                stack.enter_context(objective.no_sync())
            terms = _over_processes(objective(part))
            scaler.scale(torch.stack([*terms.values()]).sum() / parts).backward()
        for name, loss in terms.items():
            values[name] = values.get(name, 0.0) + loss.detach() / parts
    return values


def _over_processes(terms: Mapping[str, Term]) -> dict[str, Tensor]:
    if parallel.size() == 1:
        return {name: term.loss for name, term in terms.items()}
    amounts = torch.stack([term.amount.detach().double() for term in terms.values()])
    counts = parallel.size() * amounts / parallel.total(amounts).clamp(min=1e-12)
    return {
        name: term.loss * count.to(term.loss.dtype)
        for (name, term), count in zip(terms.items(), counts.unbind(), strict=True)
    }


def loading_of(settings: Settings) -> Loading:
    """How the settings have batches read."""
    return Loading(settings.workers, torch.device(settings.device).type == "cuda")


def unfinished_path(settings: Settings) -> Path:
    """Where the checkpoint of a phase in progress is."""
    return settings.output / "checkpoints" / "unfinished.pt"


def load_unfinished(phase: str, settings: Settings) -> dict[str, Any] | None:
    """The checkpoint from which a phase can go on, if the run was interrupted in it."""
    path = unfinished_path(settings)
    if not settings.resume or not path.is_file():
        return None
    parts = load_checkpoint(path)
    return parts if parts["phase"] == phase else None


def _is_finite(module: nn.Module) -> bool:
    """Whether all weights are; processes agree on it, as their weights are the same."""
    return bool(torch.stack([p.detach().isfinite().all() for p in module.parameters()]).all())


class _State:
    """All that changes from one iteration of a phase to the next."""

    def __init__(self, phase: Phase, settings: Settings) -> None:
        self.phase, self.settings = phase, settings
        self.iteration = 0
        device = torch.device(settings.device).type
        self.scaler = torch.amp.GradScaler(device, enabled=settings.precision == "float16")
        self.teacher: AveragedModel | None = None
        if settings.teacher:
            average = get_ema_multi_avg_fn(settings.teacher)
            network = phase.networks["network"]
            self.teacher = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
        self.best: dict[str, Any] | None = None

    def step(self, iteration: int) -> None:
        """Move the weights by their gradients."""
        for optimizer, _ in self.phase.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        for _, schedule in self.phase.optimizers:
            schedule.step()
        if self.teacher is not None:
            self.teacher.update_parameters(self.phase.networks["network"])
        self.iteration = iteration

    def candidate(self) -> Segmenter:
        """The network that would be the result now."""
        network = self.phase.networks["network"] if self.teacher is None else self.teacher.module
        assert isinstance(network, Segmenter)
        return network

    def result(self) -> "Segmenter | dict[str, Tensor]":
        """What the phase ends with."""
        return self.candidate() if self.best is None else self.best["network"]

    def save(self, records: Records) -> None:
        """Write the checkpoint to go on from; the first process does it for all."""
        size = records.size()
        if not parallel.is_main():
            return
        parts = {
            "settings": self.settings.plain(),
            "phase": self.phase.name,
            "iteration": self.iteration,
            "networks": self.phase.networks.state_dict(),
            "optimizers": [o.state_dict() for o, _ in self.phase.optimizers],
            "schedules": [s.state_dict() for _, s in self.phase.optimizers],
            "scaler": self.scaler.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "best": self.best,
            "held": dict(self.phase.held),
            "metrics_size": size,
        }
        save_checkpoint(unfinished_path(self.settings), parts)

    def load(self, parts: Mapping[str, Any]) -> None:
        """Go back to a checkpoint."""
        self.iteration = parts["iteration"]
        self.phase.networks.load_state_dict(parts["networks"])
        for (optimizer, schedule), of_optimizer, of_schedule in zip(
            self.phase.optimizers, parts["optimizers"], parts["schedules"], strict=True
        ):
            optimizer.load_state_dict(of_optimizer)
            schedule.load_state_dict(of_schedule)
        self.scaler.load_state_dict(parts["scaler"])
        if self.teacher is not None:
            self.teacher.load_state_dict(parts["teacher"])
        self.best = parts["best"]


def _choose(state: _State, records: Records) -> None:
    """Score the network of now, and keep it if it is the best so far."""
    candidate = state.candidate()
    parallel.share_buffers(candidate)
    scores = state.phase.score(candidate)
    records.selection(state.phase.name, state.iteration, scores)
    score = scores[state.settings.best_by]
    score = -math.inf if math.isnan(score) else score
    if state.best is None or score > state.best["score"]:
        weights = {name: value.cpu().clone() for name, value in candidate.state_dict().items()}
        state.best = {"score": score, "iteration": state.iteration, "network": weights}


class _Watch:
    """Collects the losses of some iterations, to read them at once."""

    def __init__(self, phase: Phase, records: Records) -> None:
        self.phase, self.records = phase, records
        self.pending: dict[int, dict[str, Tensor]] = {}

    def add(self, iteration: int, values: dict[str, Tensor]) -> None:
        self.pending[iteration] = values

    def read(self) -> dict[str, str]:
        """Record what there is to record, and return what the last iteration has to show."""
        shown: dict[str, str] = {}
        if not self.pending:
            return shown
        stacked = torch.stack([torch.stack([*v.values()]) for v in self.pending.values()])
        means = (parallel.total(stacked.double()) / parallel.size()).tolist()
        for (iteration, names), values in zip(self.pending.items(), means, strict=True):
            terms = dict(zip(names, values, strict=True))
            for name, value in terms.items():
                if not math.isfinite(value):
                    raise FloatingPointError(self._lost(iteration, name, value))
            if iteration % _SHOW_EVERY == 1 % _SHOW_EVERY:
                self.records.losses(self.phase.name, iteration, terms)
            shown = {name: f"{value:.3f}" for name, value in terms.items()}
        self.pending.clear()
        return shown

    def _lost(self, iteration: int, name: str, value: float) -> str:
        batch = numbers(iteration - 1, self.phase.batch)
        files = ", ".join(str(f) for stream in self.phase.streams for f in stream.files(batch))
        return (
            f"{self.phase.name}, iteration {iteration}: the loss term {name!r} is {value}. "
            f"Lower the learning rate, or look at the files of the batch: {files}"
        )


def _flat(samples: Sequence[Any]) -> Iterator[Tensor]:
    for sample in samples:
        yield from (sample,) if isinstance(sample, Tensor) else sample
