"""The loop of a phase: gradients over parts, the best network, the teacher, and what stops it."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.loop import Batch, Phase, Term, TrainingSettings, back_propagate, train
from engine.run import Run, RunSettings
from networks.segmenter import Precision, Segmenter
from streams import RandomStream, numbers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


class Points:
    """Thirteen samples of two numbers."""

    def __len__(self) -> int:
        """Return the number of samples, 13."""
        return 13

    def read(self, index: int, generator: torch.Generator | None = None) -> Tensor:
        """Return one sample."""
        return torch.tensor([1.0, index / 13])

    def path(self, index: int) -> Path:
        """Return its path."""
        return Path(f"{index:02}.png")


class Line(Segmenter):
    """The smallest network there is."""

    feature_dim = 1

    def __init__(self, precision: Precision = "float32") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.25]))
        self.precision = precision


def squared(networks: nn.ModuleDict, batch: Batch) -> dict[str, Term]:
    """Return a loss with two terms."""
    (points,) = batch
    line = networks["network"]
    assert isinstance(line, Line)
    error = points @ line.weight - 2 * points[:, 1]
    count = torch.tensor(float(len(points)))
    return {"square": Term(error.square().mean(), count), "size": Term(error.abs().mean(), count)}


def changed_at(
    iteration: int, change: Callable[[Line, Tensor], Tensor]
) -> Callable[[nn.ModuleDict, Batch], Mapping[str, Term]]:
    """Return losses of which one is changed at one iteration."""
    calls = 0

    def losses(networks: nn.ModuleDict, batch: Batch) -> dict[str, Term]:
        nonlocal calls
        calls += 1
        terms, line = squared(networks, batch), networks["network"]
        if calls == iteration:
            assert isinstance(line, Line)
            terms["size"] = Term(change(line, terms["size"].loss), terms["size"].amount)
        return terms

    return losses


def lose_weight(line: Line, loss: Tensor) -> Tensor:
    """Add a term that is finite when its gradient is not: the slope of its root is infinite."""
    return loss + (line.weight - line.weight.detach()).sum().sqrt()


def run_of(folder: Path, **changes: Any) -> Run:  # noqa: ANN401
    base = RunSettings(output=folder, device="cpu", workers=0, seed=3)
    return Run(dataclasses.replace(base, **changes), {})


def phase_of(
    iterations: int = 25,
    losses: Callable[[nn.ModuleDict, Batch], Mapping[str, Term]] = squared,
    score: Callable[[Segmenter], Mapping[str, float]] = lambda network: {"source": 0.0},
    precision: Precision = "float32",
) -> Phase:
    networks = nn.ModuleDict({"network": Line(precision)})
    optimizer = torch.optim.SGD(networks.parameters(), 0.05, momentum=0.9)
    schedule = LambdaLR(optimizer, lambda t: 1 - t / iterations)
    return Phase(
        name="stage 1", number=1, iterations=iterations, batch=4, networks=networks, losses=losses,
        optimizers=[(optimizer, schedule)], streams=[RandomStream(Points(), (3, 1))], score=score,
    )  # fmt: skip


def trained(phase: Phase, run: Run, **settings: Any) -> Tensor:  # noqa: ANN401
    try:
        train(phase, TrainingSettings(**{"teacher": 0.0, **settings}), run)
    finally:
        run.records.close()
    network = phase.networks["network"]
    assert isinstance(network, Line)
    return network.weight.detach().clone()


def weights_by_hand(iterations: int) -> Iterator[Tensor]:
    """Return the result of the same training in a few lines."""
    line = Line()
    optimizer = torch.optim.SGD(line.parameters(), 0.05, momentum=0.9)
    stream = RandomStream(Points(), (3, 1))
    for t in range(iterations):
        points = torch.stack([stream[k] for k in numbers(t, 4)])
        terms = squared(nn.ModuleDict({"network": line}), [points])
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - t / iterations)
        optimizer.zero_grad()
        (terms["square"].loss + terms["size"].loss).backward()
        optimizer.step()
        yield line.weight.detach().clone()


def test_a_phase_is_plain_training(tmp_path: Path) -> None:
    *_, expected = weights_by_hand(25)
    assert torch.equal(trained(phase_of(), run_of(tmp_path)), expected)
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event["iteration"] for event in events] == [1, 11, 21]


def test_parts_of_a_batch_give_their_mean() -> None:
    line = Line()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    points = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))

    class OfLine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.networks = nn.ModuleDict({"network": line})

        def forward(self, batch: Batch) -> dict[str, Term]:
            return squared(self.networks, batch)

    values = back_propagate(OfLine(), [points], 2, scaler)
    assert line.weight.grad is not None
    gradient = line.weight.grad.clone()
    line.weight.grad = None
    halves = [squared(nn.ModuleDict({"network": line}), [half]) for half in points.split(3)]
    sum(((h["square"].loss + h["size"].loss) / 2 for h in halves), torch.zeros(())).backward()
    torch.testing.assert_close(gradient, line.weight.grad)
    expected = (halves[0]["size"].loss + halves[1]["size"].loss) / 2
    torch.testing.assert_close(values["size"], expected.detach())


@pytest.mark.parametrize("bad", [1, 7, 20, 25])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named_with_its_files(
    bad: int, value: float, tmp_path: Path
) -> None:
    phase = phase_of(losses=changed_at(bad, lambda line, loss: loss * value))
    with pytest.raises(FloatingPointError) as raised:
        trained(phase, run_of(tmp_path, checkpoint_every=5))
    said = str(raised.value)
    assert said.startswith(f"stage 1, iteration {bad}: the loss term 'size' is {value}.")
    files = phase.streams[0].files(numbers(bad - 1, 4))
    assert said.endswith("files of the batch: " + ", ".join(map(str, files)))
    kept = run_of(tmp_path, resume=True).unfinished("stage 1")
    assert (0 if kept is None else kept["iteration"]) == (bad - 1) // 5 * 5


def test_weights_that_are_not_finite_are_in_no_checkpoint(tmp_path: Path) -> None:
    run = run_of(tmp_path, checkpoint_every=5)
    with pytest.raises(FloatingPointError, match=r"iteration 11: the loss term 'square' is inf"):
        trained(phase_of(losses=changed_at(10, lose_weight)), run)
    kept = run_of(tmp_path, resume=True).unfinished("stage 1")
    assert kept is not None
    assert kept["iteration"] == 5
    with pytest.raises(FloatingPointError, match="stage 1: the weights it ends with are not fin"):
        trained(phase_of(losses=changed_at(25, lose_weight)), run_of(tmp_path, checkpoint_every=5))


def test_the_best_network_is_kept(tmp_path: Path) -> None:
    scores = iter([math.nan, 0.2, 0.5, math.nan, 0.5, 0.1])

    def score(network: Segmenter) -> dict[str, float]:
        return {"source": next(scores), "target": 0.0}

    weight = trained(phase_of(30, score=score), run_of(tmp_path), evaluate_every=5)
    steps = list(weights_by_hand(30))
    assert torch.equal(weight, steps[14])  # of two that are equal the first
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    chosen = [e for e in map(json.loads, lines) if e["kind"] == "selection"]
    assert [e["iteration"] for e in chosen] == [5, 10, 15, 20, 25, 30]
    assert chosen[0]["scores"] == {"source": None, "target": 0.0}


def test_the_last_network_counts_without_evaluations(tmp_path: Path) -> None:
    def score(network: Segmenter) -> dict[str, float]:
        raise AssertionError("nobody asked for a score")

    *_, expected = weights_by_hand(25)
    assert torch.equal(trained(phase_of(score=score), run_of(tmp_path)), expected)


def test_the_teacher_is_an_exponential_average(tmp_path: Path) -> None:
    weight = trained(phase_of(), run_of(tmp_path), teacher=0.75)
    first, *rest = weights_by_hand(25)
    average = first.double()
    for step in rest:
        average = 0.75 * average + 0.25 * step.double()
    torch.testing.assert_close(weight.double(), average, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "precision"),
    [({}, "float32"), ({"teacher": 0.9, "evaluate_every": 4}, "float32"), ({}, "float16")],
)
def test_it_goes_on_where_it_was(
    changes: dict[str, Any], precision: Precision, tmp_path: Path
) -> None:
    def score(network: Segmenter) -> dict[str, float]:
        assert isinstance(network, Line)
        return {"source": -abs(float(network.weight.detach()[1]) - 1)}

    run = run_of(tmp_path, checkpoint_every=10)
    whole = trained(phase_of(score=score, precision=precision), run, **changes)
    again = run_of(tmp_path, checkpoint_every=10, resume=True)
    kept = again.unfinished("stage 1")
    assert kept is not None
    assert kept["iteration"] == 20
    assert again.unfinished("stage 2") is None
    weight = trained(phase_of(score=score, precision=precision), again, **changes)
    assert torch.equal(weight, whole)


def test_half_precision_is_scaled(tmp_path: Path) -> None:
    *_, expected = weights_by_hand(25)
    weight = trained(phase_of(precision="float16"), run_of(tmp_path))
    torch.testing.assert_close(weight, expected)
