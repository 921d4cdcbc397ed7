"""The loop of one phase, whatever its losses: gradients, the best network, resuming.

A checkpoint holds all that an iteration depends on: networks, optimizers, schedules, scaler,
teacher, the best network so far, and what else the phase stores. It holds no random state, because
all random numbers of an iteration depend on the iteration's number alone (see `streams`).
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import parallel
import torch
from limits import Count, Fraction, Positive, Weight
from networks.segmenter import Segmenter
from streams import RandomStream, numbers, seed_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from engine.records import Records
from engine.run import Run

_SHOW_EVERY = 10  # iterations: reading a loss makes the host wait for the GPU


@dataclass(frozen=True)
class TrainingSettings:
    """Training, in the warm-up and in every stage."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of the network; sgd has a momentum of 0.9."""
    weight_decay: Weight = 0.01
    """Weight decay of the optimizer."""
    rise: Fraction = 0.05
    """Part of a phase in which the learning rate rises, before it falls."""
    accumulate: Positive = 1
    """Parts in which the gradient of a batch is computed, one after the other, to save memory."""
    max_iterations: Count = 0
    """Maximum iterations of every phase; 0 sets none."""
    teacher: Fraction = 0.0
    """Decay of a moving average of the weights, with which a phase ends, and which labels the
    target in a stage. 0 ends with the weights themselves, and a stage's labels are those of the
    network that it begins with."""
    evaluate_every: Count = 0
    """Iterations between evaluations; a phase ends with the best network.
    0 evaluates no network but the last."""
    best_by: Literal[
        "source", "target", "agreement", "flipped", "density", "information", "norm"
    ] = "source"
    """Score that tells the best network: the mIoU on held-out images of the source, or on the
    target's validation split, as in the released code, whose labels have then been used to choose;
    or on 64 training images of the target, without labels: agreement of the classifier with the
    nearest anchors, or with itself on flipped images, density, information or nuclear norm."""

    def iterations(self, of_phase: int) -> int:
        """Return the length of a phase under `max_iterations`."""
        return min(of_phase, self.max_iterations or of_phase)


class Term(NamedTuple):
    """One term of a loss."""

    loss: Tensor
    """(): a mean, weight included."""
    amount: Tensor
    """(): the number that the mean divides by, such as pixels; it weighs this process."""


Batch = Sequence[Tensor]
"""One tensor or several of each stream; (images, labels) of a labeled one are two."""
Losses = Callable[[nn.ModuleDict, Batch], Mapping[str, Term]]
"""The losses of networks for a part of a batch."""


@dataclass(frozen=True)
class Phase:
    """A baseline, a warm-up or a stage: networks, losses, data and length."""

    name: str
    number: int
    """Number of the phase within the run: a seed of all that is drawn in it."""
    iterations: int
    batch: int
    """Samples of each stream that a step takes, over all processes."""
    networks: nn.ModuleDict
    """The trained networks; the phase ends with `networks["network"]`."""
    losses: Losses
    optimizers: Sequence[tuple[Optimizer, LRScheduler]]
    streams: Sequence[RandomStream[Any]]
    score: Callable[[Segmenter], Mapping[str, float]]
    """Scores by the values of `TrainingSettings.best_by`; the highest is the best."""
    stored: Mapping[str, object] = field(default_factory=dict)
    """Other values that a checkpoint stores to resume the phase."""
    after_step: Callable[[], object] = lambda: None
    """What is called after each step, such as an update of what `losses` refers to."""


def make_optimizer(
    network: nn.Module, learning_rate: float, settings: TrainingSettings
) -> Optimizer:
    """Return the optimizer of a network's trainable weights."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    decay = settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, learning_rate, 0.9, weight_decay=decay)
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=decay)


def scheduled(optimizer: Optimizer, iterations: int, rise: float) -> tuple[Optimizer, LRScheduler]:
    """Return the optimizer with its schedule: a linear rise, then a fall by (1 − t/T)^0.9."""

    def factor(iteration: int) -> float:
        linear = min(1.0, (iteration + 1) / max(1.0, rise * iterations))
        return linear * math.pow(1 - iteration / max(1, iterations), 0.9)

    return optimizer, LambdaLR(optimizer, factor)


class Objective(nn.Module):
    """Networks and their losses as one module: data-parallel training needs one call of one."""

    def __init__(self, networks: nn.ModuleDict, losses: Losses) -> None:
        super().__init__()
        self.networks = networks
        self._losses = losses

    def forward(self, batch: Batch) -> Mapping[str, Term]:
        """Return the terms of the loss."""
        return self._losses(self.networks, batch)


def train(phase: Phase, settings: TrainingSettings, run: Run) -> None:
    """Train a phase to its best network, from the start or from where a checkpoint left it.

    Raises:
        FloatingPointError: if a loss becomes non-finite, with iteration, term and files; or if a
            weight of the result is.
    """
    state = _State(phase, settings)
    unfinished = run.unfinished(phase.name)
    if unfinished is not None:
        state.load(unfinished)
    objective = Objective(phase.networks, phase.losses)
    whole = DistributedDataParallel(objective) if parallel.size() > 1 else objective
    watch = _Watch(phase, run.records)
    objective.train()
    progress = _batches(phase, state.iteration, run)
    for iteration, batch in enumerate(progress, start=state.iteration + 1):
        torch.manual_seed(seed_of(run.settings.seed, phase.number, iteration, parallel.rank()))
        values = back_propagate(whole, batch, settings.accumulate, state.scaler)
        state.step(iteration)
        watch.add(iteration, values)
        if iteration % _SHOW_EVERY == 1 % _SHOW_EVERY:
            progress.set_postfix(watch.read())
        is_last = iteration == phase.iterations
        if settings.evaluate_every and (is_last or iteration % settings.evaluate_every == 0):
            watch.read()
            state.choose(run.records)
            objective.train()
        if iteration % run.settings.checkpoint_every == 0 and not is_last:
            watch.read()
            # Networks that are not finite never replace those that are. If they became so in this
            # very step, the next loss will tell.
            if _is_finite(phase.networks):
                run.interrupt(phase.name, state.plain())
    watch.read()
    state.finish()


def _batches(phase: Phase, first: int, run: Run) -> "tqdm[list[Tensor]]":
    """Return the batches from number `first` on, on the device, with a progress bar."""
    loaders = [s.batches(first, phase.iterations, phase.batch, run.loading) for s in phase.streams]

    def on_device() -> Iterator[list[Tensor]]:
        for samples in zip(*loaders, strict=True):
            yield [tensor.to(run.device, non_blocking=True) for tensor in flat(samples)]

    return tqdm(
        on_device(), desc=phase.name, initial=first, total=phase.iterations,
        disable=not parallel.is_main(),
    )  # fmt: skip


def back_propagate(
    objective: nn.Module, batch: Batch, parts: int, scaler: torch.amp.GradScaler
) -> dict[str, Tensor]:
    """Compute gradients of the mean over the parts of a batch; return this process's terms.

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


def _is_finite(module: nn.Module) -> bool:
    """Return True if all weights are finite; processes agree, as their weights are the same."""
    return bool(torch.stack([p.detach().isfinite().all() for p in module.parameters()]).all())


class _State:
    """All that changes from one iteration of a phase to the next."""

    def __init__(self, phase: Phase, settings: TrainingSettings) -> None:
        network = phase.networks["network"]
        assert isinstance(network, Segmenter)
        self.phase, self.network = phase, network
        self.best_by = settings.best_by
        self.iteration = 0
        device = next(network.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=network.precision == "float16")
        self.teacher: AveragedModel | None = None
        if settings.teacher:
            average = get_ema_multi_avg_fn(settings.teacher)
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
        self.phase.after_step()
        if self.teacher is not None:
            self.teacher.update_parameters(self.network)
        self.iteration = iteration

    def choose(self, records: Records) -> None:
        """Score the network of this iteration, and keep its weights if it is the best so far."""
        candidate = self._candidate()
        parallel.share_buffers(candidate)
        scores = self.phase.score(candidate)
        records.selection(self.phase.name, self.iteration, scores)
        score = scores[self.best_by]
        score = -math.inf if math.isnan(score) else score
        if self.best is None or score > self.best["score"]:
            weights = {name: value.cpu().clone() for name, value in candidate.state_dict().items()}
            self.best = {"score": score, "iteration": self.iteration, "network": weights}

    def finish(self) -> None:
        """Give the network the weights that the phase ends with."""
        if self.best is not None:
            self.network.load_state_dict(self.best["network"])
        elif self.teacher is not None:
            self.network.load_state_dict(self._candidate().state_dict())
        if not _is_finite(self.network):
            raise FloatingPointError(
                f"{self.phase.name}: the weights it ends with are not finite. Lower the learning "
                "rate"
            )
        parallel.share_buffers(self.network)

    def _candidate(self) -> Segmenter:
        """Return the network that the phase would end with now."""
        network = self.network if self.teacher is None else self.teacher.module
        assert isinstance(network, Segmenter)
        return network

    def plain(self) -> dict[str, object]:
        """Return the parts of a checkpoint."""
        return {
            "iteration": self.iteration,
            "networks": self.phase.networks.state_dict(),
            "optimizers": [o.state_dict() for o, _ in self.phase.optimizers],
            "schedules": [s.state_dict() for _, s in self.phase.optimizers],
            "scaler": self.scaler.state_dict(),
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "best": self.best,
            "stored": dict(self.phase.stored),
        }

    def load(self, parts: Mapping[str, Any]) -> None:
        """Restore a checkpoint."""
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


class _Watch:
    """Losses of some iterations, to be read from the GPU at once."""

    def __init__(self, phase: Phase, records: Records) -> None:
        self.phase, self.records = phase, records
        self.pending: dict[int, dict[str, Tensor]] = {}
        self.has_learned = False

    def add(self, iteration: int, values: dict[str, Tensor]) -> None:
        self.pending[iteration] = values

    def read(self) -> dict[str, str]:
        """Record the losses so far, and return those of the last iteration to show them."""
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
            self.has_learned |= any(terms.values())
            if iteration == _SHOW_EVERY and not self.has_learned and parallel.is_main():
                tqdm.write(
                    f"warning: {self.phase.name}: all losses were 0 in the first {iteration} "
                    "iterations: every label is ignored. Check the ids of the labels.",
                    file=sys.stderr,
                )
        self.pending.clear()
        return shown

    def _lost(self, iteration: int, name: str, value: float) -> str:
        batch = numbers(iteration - 1, self.phase.batch)
        files = ", ".join(str(f) for stream in self.phase.streams for f in stream.files(batch))
        return (
            f"{self.phase.name}, iteration {iteration}: the loss term {name!r} is {value}. "
            f"Lower the learning rate, or look at the files of the batch: {files}"
        )


def flat(samples: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the tensors of samples, each of which is a tensor or several."""
    for sample in samples:
        yield from (sample,) if isinstance(sample, Tensor) else sample
