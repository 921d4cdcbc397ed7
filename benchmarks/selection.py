"""Compare scores that need no target labels by the checkpoints that they pick.

    python benchmarks/selection.py --output runs/selection --camvid DIR
    python benchmarks/selection.py --output runs/selection --results FILE

The first command trains, the second redraws tables and picture from FILE, a ``results.csv``. DIR is
that of ``own_images.py``, which also says what the two pairs of domains are.

Protocol, fixed before the first run:

- For each pair and seed, a warm-up on the source, then runs of `METHODS` from its last network at
  each of `RATES`, the second of which is ten times the default and may spoil a run. A checkpoint
  is the moving average of the weights after some steps, `CHECKPOINTS` of them in a run.
- Truth: the mIoU on the labeled images of the target. Scores see the unlabeled images of the target
  alone, every second one, at the resolution of the logits; the anchors are those of about
  `ANCHOR_IMAGES` images of the source. What is not trained on is scored in batches of `BATCH`.
- One choice is one seed: over all of its checkpoints; and within each of its runs, where a run
  after the warm-up may also pick the network that it starts from. Regret is how many points of mIoU
  the picked checkpoint is below the best. Tables have means ± standard deviations over seeds.
- "last step" takes the last checkpoint; over all runs, that of self-training at the default rate.
  "average" is the mean regret of the checkpoints, what a random choice has.
- A score is recommended if on both pairs both of its mean regrets are below those of held-out
  source mIoU and of the last step. No score was tuned here: all have their default settings.
- SHOT minimizes a loss that is one of the scores, so that tables are repeated without its runs.

A quarter of an hour on one core. A finished run is not repeated; it is in OUTPUT/runs. Results:
OUTPUT/results.csv, results.md and selection.png.
"""

import argparse
import csv
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "methods"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "synthetic"))

import shot
import torch
from folders import write_folders
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from own_images import lay_out
from scipy.stats import spearmanr
from seeds import markdown
from torch import Tensor, nn

import anchorda
from image_folders import Data, Domain, open_data, save
from light_network import build_network
from segmentation import (
    BeginStage,
    Options,
    evaluate,
    self_training,
    source_alone,
    train,
)

PAIRS = ("synthetic", "day to dusk")
METHODS: dict[str, BeginStage] = {
    "control": source_alone,
    "self-training": self_training,
    "SHOT": shot.begin_stage,
}
WARM_UP, RATE = "warm-up", 1e-3
RATES = (RATE, 10 * RATE)
CHECKPOINTS, ANCHOR_IMAGES, BATCH = 3, 32, 16
SOURCE, TARGET = "held-out source mIoU", "target mIoU"
SCORES = (
    SOURCE,
    "density",
    "information",
    "nuclear norm",
    "agreement with anchors",
    "agreement when flipped",
)
COLORS = dict(zip(PAIRS, ("#0072B2", "#D55E00"), strict=True))
MARKERS = dict(zip([WARM_UP, *METHODS], "Dos^", strict=True))


class Checkpoint(NamedTuple):
    """One network, where it comes from, and its mIoU and scores by name."""

    pair: str
    seed: int
    method: str
    rate: float
    step: int
    scores: dict[str, float]


# -------------------------------------------------------------------------------------------- runs


@torch.no_grad()
def score(network: nn.Module, data: Data, options: Options) -> dict[str, float]:
    """Return the truth, held-out source mIoU, and the scores without target labels, by name."""
    num_classes, options = len(data.classes), dataclasses.replace(options, batch=BATCH)
    found = {
        TARGET: evaluate(network, data.evaluation, data, options)["mean"],
        SOURCE: evaluate(network, data.held_out, data, options)["mean"],
    }
    centroids = source_anchors(network, data, options)
    density = anchorda.SoftNeighborhoodDensity()
    information, norm = anchorda.InformationMaximization(), anchorda.NuclearNorm()
    with_anchors, flipped = (anchorda.LabelAgreement(num_classes) for _ in range(2))
    nearest = anchorda.AnchorPseudoLabeler()
    for images, _ in every(2, data.target).batches(BATCH, options.device):
        features, logits = network(images)
        density.update(logits)
        information.update(logits)
        norm.update(logits)
        labels = logits.argmax(dim=1)
        with_anchors.update(labels, nearest(features, centroids).labels)
        _, mirrored = network(images.flip(3))
        flipped.update(labels, mirrored.flip(3).argmax(dim=1))
    computed = [s.compute() for s in (density, information, norm, with_anchors, flipped)]
    found |= {name: value.item() for name, value in zip(SCORES[1:], computed, strict=True)}
    return found


def every(step: int, domain: Domain) -> Domain:
    """Return every so many of the images and labels."""
    return Domain(*(part[::step] for part in domain))


def source_anchors(network: nn.Module, data: Data, options: Options) -> Tensor:
    """Return the centroids of pixels classified right in some images of the source."""
    network.eval()
    feature_dim = network.get_parameter("classifier.weight").shape[1]
    anchors = anchorda.CategoryAnchors(len(data.classes), feature_dim)
    some = every(len(data.source.images) // ANCHOR_IMAGES, data.source)
    for images, labels in some.batches(BATCH, options.device):
        features, logits = network(images)
        labels = anchorda.resize_labels(labels, features.shape[2:])
        anchors.update(features, anchorda.keep_correct(labels, logits))
    return anchors.compute()


def scored_run(
    name: str, network: nn.Module, begin: BeginStage, data: Data, options: Options, steps: int
) -> Iterator[tuple[int, nn.Module, dict[str, float]]]:
    """Train; yield step, moving average and scores of `CHECKPOINTS`, unless it diverges."""
    try:
        objective = begin(network, data, options)
        for step, average in enumerate(train(name, network, objective, data, options, steps), 1):
            if step % (steps // CHECKPOINTS) == 0:
                yield step, average, score(average, data, options)
    except FloatingPointError as error:
        print(f"ended: {error}", flush=True)


def run_seed(pair: str, data: Data, options: Options) -> Iterator[Checkpoint]:
    """Yield the checkpoints of all runs of a seed, those of finished runs from their files."""
    torch.manual_seed(options.seed)
    warm = build_network("", len(data.classes), options.device)
    jobs: list[tuple[str, BeginStage, float, int]]
    jobs = [(WARM_UP, source_alone, RATE, options.warmup_iterations)]
    jobs += [
        (method, begin, rate, options.stage_iterations)
        for method, begin in METHODS.items()
        for rate in RATES
    ]
    weights = options.output / "runs" / f"{pair}, {options.seed}, {WARM_UP}.pt"
    for number, (method, begin, rate, steps) in enumerate(jobs):
        name = f"{pair}, {options.seed}, {method}, {rate:g}"
        path = options.output / "runs" / f"{name}.jsonl"
        if not path.exists():
            torch.manual_seed(options.seed + 1000 * number)
            network = build_network("", len(data.classes), options.device)
            network.load_state_dict(warm.state_dict())
            lines = []
            of_run = dataclasses.replace(options, rate=rate)
            for step, average, scores in scored_run(name, network, begin, data, of_run, steps):
                lines.append(json.dumps([pair, options.seed, method, rate, step, scores]) + "\n")
                if method == WARM_UP:
                    save(weights, partial(torch.save, average.state_dict()))
            text = "".join(lines)
            save(path, lambda file, text=text: file.write_text(text, "utf-8"))  # type: ignore[misc]
        if method == WARM_UP:
            warm.load_state_dict(torch.load(weights, weights_only=True))
        yield from (Checkpoint(*json.loads(line)) for line in path.read_text("utf-8").splitlines())


def run_all(camvid: Path, seeds: Sequence[int], options: Options) -> list[Checkpoint]:
    """Return the checkpoints of all pairs and seeds."""
    checkpoints: list[Checkpoint] = []
    for seed in seeds:
        for pair in PAIRS:
            folder = options.output / "data" / (f"synthetic-{seed}" if pair == PAIRS[0] else pair)
            if pair == PAIRS[0]:
                write_folders(folder, seed=seed)
            else:
                lay_out(camvid, folder)
            data = open_data(
                folder / "source", folder / "target", folder / "classes.txt", options.size
            )
            checkpoints += run_seed(pair, data, dataclasses.replace(options, seed=seed))
    return checkpoints


# ------------------------------------------------------------------------------------------ choices


def value(checkpoint: Checkpoint, name: str) -> float:
    """Return a score of a checkpoint; −∞ for NaN."""
    score = checkpoint.scores[name]
    return -math.inf if math.isnan(score) else score


def correlation(checkpoints: Sequence[Checkpoint], name: str) -> float:
    """Return Spearman's rank correlation of a score and the truth; NaN where one is constant."""
    pairs = [(value(c, name), c.scores[TARGET]) for c in checkpoints]
    if any(len(set(values)) < 2 for values in zip(*pairs, strict=True)):
        return math.nan
    return float(spearmanr(pairs).statistic)


def pick(checkpoints: Sequence[Checkpoint], name: str) -> Checkpoint:
    """Return the checkpoint with the highest score, the first of several."""
    return max(checkpoints, key=partial(value, name=name))


def regret(checkpoints: Sequence[Checkpoint], picked: Checkpoint) -> float:
    """Return the points of target mIoU by which the picked checkpoint is below the best."""
    best = max(c.scores[TARGET] for c in checkpoints)
    return 100 * (best - picked.scores[TARGET])


def runs_of(checkpoints: Sequence[Checkpoint]) -> list[list[Checkpoint]]:
    """Return the checkpoints of a seed by run, each after the one that it starts from."""
    keys = dict.fromkeys((c.method, c.rate) for c in checkpoints)
    runs = {key: [c for c in checkpoints if (c.method, c.rate) == key] for key in keys}
    start = runs[WARM_UP, RATE][-1]
    return [run if key[0] == WARM_UP else [start, *run] for key, run in runs.items()]


def of_seed(checkpoints: Sequence[Checkpoint], name: str) -> list[float]:
    """Return correlation and regret of a score over all checkpoints of a seed, then within runs."""
    runs = runs_of(checkpoints)
    within = [rho for run in runs if not math.isnan(rho := correlation(run, name))]
    return [
        correlation(checkpoints, name),
        statistics.mean(within) if within else math.nan,
        regret(checkpoints, pick(checkpoints, name)),
        statistics.mean(regret(run, pick(run, name)) for run in runs),
    ]


def without_choice(checkpoints: Sequence[Checkpoint]) -> dict[str, list[float]]:
    """Return the regrets of a seed, over all checkpoints and within runs, of choosing none."""
    runs = runs_of(checkpoints)
    (default,) = (run for run in runs if run[-1][2:4] == ("self-training", RATE))
    average = [statistics.mean(regret(run, c) for c in run) for run in (checkpoints, *runs)]
    last = [regret(checkpoints, default[-1]), statistics.mean(regret(r, r[-1]) for r in runs)]
    return {
        "last step": [math.nan, math.nan, *last],
        "average": [math.nan, math.nan, average[0], statistics.mean(average[1:])],
    }


def by_seed(checkpoints: Iterable[Checkpoint], pair: str) -> dict[int, list[Checkpoint]]:
    """Return the checkpoints of a pair by seed."""
    of_pair = [c for c in checkpoints if c.pair == pair]
    return {
        seed: [c for c in of_pair if c.seed == seed]
        for seed in dict.fromkeys(c.seed for c in of_pair)
    }


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean ± standard deviation, or a dash."""
    if any(map(math.isnan, values)):
        return "–"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}".replace("-", "−")


def table(checkpoints: Sequence[Checkpoint], pair: str) -> str:
    """Return correlations and regrets of each score on a pair, as mean ± deviation over seeds."""
    seeds = by_seed(checkpoints, pair).values()
    found = {name: [of_seed(seed, name) for seed in seeds] for name in SCORES}
    for name in ("last step", "average"):
        found[name] = [without_choice(seed)[name] for seed in seeds]
    rows = []
    for name, of_name in found.items():
        columns = zip(zip(*of_name, strict=True), (2, 2, 1, 1), strict=True)
        rows.append([name, *(spread(values, digits) for values, digits in columns)])
    head = [
        f"{pair}, {len(seeds)} seeds",
        "ρ, all",
        "ρ, in a run",
        "regret, all",
        "regret, in a run",
    ]
    return markdown(head, rows)


# ------------------------------------------------------------------------------------------ results


def write_csv(checkpoints: Iterable[Checkpoint], path: Path) -> None:
    """Write a line for each checkpoint."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Checkpoint._fields[:-1], TARGET, *SCORES])
        for c in checkpoints:
            writer.writerow([*c[:-1], *(f"{c.scores[name]:.6f}" for name in (TARGET, *SCORES))])


def read_csv(path: Path) -> list[Checkpoint]:
    """Return the checkpoints of a file of `write_csv`."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Checkpoint(
                line["pair"],
                int(line["seed"]),
                line["method"],
                float(line["rate"]),
                int(line["step"]),
                {name: float(line[name]) for name in (TARGET, *SCORES)},
            )
            for line in csv.DictReader(file)
        ]


def draw(checkpoints: Sequence[Checkpoint]) -> Figure:
    """Draw target mIoU over each score, with what the score picks for each pair and seed."""
    figure = Figure((7.2, 6.6), dpi=120, layout="constrained")
    panels = figure.subplots(3, 2, sharey=True)
    for axes, name in zip(panels.flat, SCORES, strict=True):
        said = []
        for pair, color in COLORS.items():
            seeds = by_seed(checkpoints, pair).values()
            said.append(spread([correlation(seed, name) for seed in seeds], 2))
            for c in (c for seed in seeds for c in seed):
                axes.plot(
                    c.scores[name], 100 * c.scores[TARGET], MARKERS[c.method], markersize=4.5,
                    color=color, markerfacecolor=color if c.rate == RATE else "none", alpha=0.7,
                )  # fmt: skip
            for picked in (pick(seed, name) for seed in seeds):
                axes.plot(
                    picked.scores[name], 100 * picked.scores[TARGET], "o", markersize=11,
                    color="black", markerfacecolor="none",
                )  # fmt: skip
        axes.set_title(f"{name}\nρ = {said[0]} and {said[1]}", fontsize=10)
        axes.grid(color="0.9", linewidth=0.5)
    figure.supylabel(f"{TARGET} (%)")
    mark = partial(Line2D, [], [], linestyle="")
    handles = [mark(color=color, marker="o", label=pair) for pair, color in COLORS.items()]
    handles += [mark(color="0.3", marker=m, label=method) for method, m in MARKERS.items()]
    hollow = partial(mark, marker="o", markerfacecolor="none")
    handles.append(hollow(color="0.3", label=f"rate {RATES[1]:g}"))
    handles.append(hollow(color="black", markersize=11, label="picked, by seed"))
    title = f"ρ: {' and '.join(PAIRS)}, mean ± standard deviation over seeds"
    figure.legend(handles=handles, title=title, loc="outside lower center", ncols=4, frameon=False)
    return figure


def main() -> None:
    """Run what is missing, then write the table and the picture."""
    parser = argparse.ArgumentParser(description="Compare scores that need no target labels.")
    parser.add_argument("--output", type=Path, required=True, help="folder for runs and results")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--camvid", type=Path, help="folder of day to dusk")
    which.add_argument("--results", type=Path, help="a results.csv, to train nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, nargs=2, default=(96, 128), help="of all images")
    parser.add_argument("--warmup-iterations", type=int, default=99)
    parser.add_argument("--stage-iterations", type=int, default=30)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    if given.results is not None:
        checkpoints = read_csv(given.results)
    else:
        torch.set_num_threads(1)
        options = Options(
            output=given.output,
            size=tuple(given.size),
            warmup_iterations=given.warmup_iterations,
            stage_iterations=given.stage_iterations,
            device="cpu",
            threads=1,
        )
        checkpoints = run_all(given.camvid, given.seeds, options)
        write_csv(checkpoints, given.output / "results.csv")
    texts = [table(checkpoints, pair) for pair in PAIRS]
    others = [c for c in checkpoints if c.method != "SHOT"]
    texts += ["Without the runs of SHOT:", *(table(others, pair) for pair in PAIRS)]
    text = "\n\n".join(texts)
    (given.output / "results.md").write_text(text + "\n", encoding="utf-8")
    draw(checkpoints).savefig(given.output / "selection.png")
    print(text)


if __name__ == "__main__":
    main()
