"""Draw the pictures of Concepts and Results, the same bytes on the same machine and versions.

    python docs/figures.py              # all of them, in about a minute
    python docs/figures.py margins      # one of them

`margins` is drawn from the equations. `active_pixels` and `precision_coverage` are of the small
network of the example, trained here for 300 iterations on street scenes of its synthetic source.
`results` is drawn from the files in benchmarks/results.
"""

import argparse
import csv
import functools
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "gta5_to_cityscapes"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "synthetic"))

import numpy as np
import torch
from augment import photometric
from classes import CLASS_NAMES, IGNORE, NUM_CLASSES, PALETTE, train_ids
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from networks.small import SmallSegmenter
from synthetic import OVERCAST, SUNNY, Style, render
from torch import Tensor

import anchorda

IMAGES = Path(__file__).parent / "images"
MEASURED = Path(__file__).parents[1] / "benchmarks" / "results"
WIDTH, HEIGHT = 320, 160
ITERATIONS = 300
COLORS = ("#0072b2", "#d55e00", "#009e73")
SHOWN = ("road", "building", "vegetation", "sky", "car", "sidewalk")


def margins() -> Figure:
    """Draw three anchors in a plane, and the areas that margins of different size label."""
    anchors = torch.tensor([[-1.6, -1.0], [1.8, -0.6], [0.1, 1.7]])
    feature = torch.tensor([-0.5, -1.6])
    figure = Figure((8, 4.1), dpi=140, layout="constrained")
    absolute, relative = figure.subplots(1, 2, sharex=True, sharey=True)
    _shade_margins(absolute, anchors, (0.0, 0.7, 1.5), relative=False)
    _shade_margins(relative, anchors, (0.0, 0.3, 0.6), relative=True)
    absolute.set_title(r"margin $d_{(2)} - d_{(1)}$")
    relative.set_title(r"relative margin $1 - d_{(1)} / d_{(2)}$")
    for axes in (absolute, relative):
        axes.scatter(
            anchors[:, 0], anchors[:, 1], s=220, c=COLORS, marker="*", edgecolors="black", zorder=3
        )
        axes.set(xlim=(-3.2, 3.2), ylim=(-2.8, 2.8), aspect="equal", xticks=[], yticks=[])
    distances, order = (feature - anchors).norm(dim=1).sort()
    for rank in (1, 2):
        distance, end = distances[rank - 1], anchors[order[rank - 1]]
        x, y = torch.stack([feature, end]).T
        absolute.plot(x, y, color="black", linewidth=1)
        absolute.annotate(
            f"$d_{{({rank})}}$ = {distance:.1f}",
            ((feature + end) / 2).tolist(),
            (-6, -14) if rank == 1 else (6, -14),
            textcoords="offset points",
            ha="right" if rank == 1 else "left",
        )
    absolute.plot(feature[:1], feature[1:], "o", color="black")
    return figure


def _shade_margins(
    axes: Axes, anchors: Tensor, minimums: tuple[float, ...], *, relative: bool
) -> None:
    x, y = torch.linspace(-3.2, 3.2, 640), torch.linspace(-2.8, 2.8, 560)
    plane = torch.stack(torch.meshgrid(x, y, indexing="xy"))[None]
    labels, scores = anchorda.AnchorPseudoLabeler(relative=relative)(plane, anchors)
    for label, color in enumerate(COLORS):
        for minimum in minimums:
            active = (labels[0] == label) & (scores[0] > minimum)
            axes.contourf(x, y, active, levels=(0.5, 1.5), colors=[color], alpha=0.22)
    axes.contour(x, y, scores[0], levels=minimums[1:], colors="0.25", linewidths=0.9)
    axes.set_xlabel("labeled above 0 (pale), {1}, and {2} (dark)".format(*minimums))


class Scenes(NamedTuple):
    """Synthetic street scenes: images (N, 3, H, W) in [0, 1] and train ids (N, H, W)."""

    images: Tensor
    labels: Tensor


class Labeled(NamedTuple):
    """A network trained on the source, its anchors, and scenes that it has not seen."""

    network: SmallSegmenter
    centroids: Tensor
    source: Scenes
    target: Scenes


def draw_scenes(style: Style, number: int, seed: int) -> Scenes:
    """Draw street scenes of one style."""
    rng = np.random.default_rng(seed)
    images, labels = zip(*(render(style, WIDTH, HEIGHT, rng) for _ in range(number)), strict=True)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return Scenes(stacked, torch.from_numpy(np.stack([train_ids(ids) for ids in labels])).long())


@functools.cache
def trained() -> Labeled:
    """Train on the source; then anchors, from the pixels classified right."""
    torch.manual_seed(0)
    scenes = draw_scenes(SUNNY, 64, seed=1)
    network = SmallSegmenter(NUM_CLASSES)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    discriminate = anchorda.DiscriminativeLoss()
    for _ in range(ITERATIONS):
        drawn = torch.randint(len(scenes.labels), (4,))
        features, logits = network(photometric(scenes.images[drawn]))
        labels = anchorda.resize_labels(scenes.labels[drawn], features.shape[2:])
        loss = discriminate(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    anchors = anchorda.CategoryAnchors(NUM_CLASSES, network.feature_dim)
    stage = anchorda.StageLabeler.from_source(
        network, zip(scenes.images.split(8), scenes.labels.split(8), strict=True), anchors
    )
    source, target = draw_scenes(SUNNY, 40, seed=2), draw_scenes(OVERCAST, 40, seed=3)
    return Labeled(network.eval().requires_grad_(False), stage.centroids, source, target)


def calibrated(labeled: Labeled, scenes: Scenes) -> anchorda.ScoreCalibrator:
    """Count the margins of scenes, with their truth."""
    calibrator = anchorda.ScoreCalibrator(NUM_CLASSES)
    labeler = anchorda.AnchorPseudoLabeler(float("-inf"))
    for images, labels in zip(scenes.images.split(8), scenes.labels.split(8), strict=True):
        features, _ = labeled.network(images)
        truth = anchorda.resize_labels(labels, features.shape[2:])
        nearest, margin = labeler(features, labeled.centroids)
        calibrator.update(nearest, margin, truth)
    return calibrator


def active_pixels() -> Figure:
    """Draw a target image, its margins, and the pixels that a coverage of a half labels."""
    labeled = trained()
    minimum = calibrated(labeled, labeled.target).min_score_for_coverage(0.5)
    image, truth = labeled.target.images[2], labeled.target.labels[2]
    features, _ = labeled.network(image[None])
    everything, scores = anchorda.AnchorPseudoLabeler(float("-inf"))(features, labeled.centroids)
    active = anchorda.AnchorPseudoLabeler(minimum)(features, labeled.centroids).labels
    truth = anchorda.resize_labels(truth[None], features.shape[2:])
    wrong = (active != truth) & (active != IGNORE) & (truth != IGNORE)

    figure = Figure((7, 7), dpi=110, layout="constrained")
    grid = figure.subplots(3, 2)
    grid[0, 0].imshow(image.permute(1, 2, 0).numpy())
    grid[0, 0].set_title("target image")
    maps = {
        (0, 1): ("truth (never used)", truth),
        (1, 0): ("nearest anchor of every pixel", everything),
        (2, 0): ("active: half of each class", active),
    }
    for place, (title, labels) in maps.items():
        grid[place].imshow(PALETTE[labels[0].numpy()], interpolation="nearest")
        grid[place].set_title(title)
    grid[1, 1].imshow(scores[0].numpy(), cmap="viridis")
    grid[1, 1].set_title(f"margin, from 0 (dark) to {scores.max():.1f} (bright)")
    picture = np.full((*wrong.shape[1:], 3), 255, np.uint8)
    picture[(active != IGNORE)[0]] = (170, 200, 225)
    picture[wrong[0]] = (190, 30, 30)
    grid[2, 1].imshow(picture, interpolation="nearest")
    grid[2, 1].set_title("active: right (blue), wrong (red)")
    for axes in grid.flat:
        axes.set_axis_off()
    present = sorted(set(torch.cat([truth, everything]).unique().tolist()) - {IGNORE})
    patches = [Patch(color=PALETTE[c] / 255, label=CLASS_NAMES[c]) for c in present]
    patches.append(Patch(color="black", label="ignored"))
    figure.legend(handles=patches, loc="outside lower center", ncols=5, frameon=False)
    return figure


def precision_coverage() -> Figure:
    """Draw precision against coverage of the anchor labels of six classes, on both domains."""
    labeled = trained()
    domains = {"source, held out": labeled.source, "target": labeled.target}
    curves = {name: calibrated(labeled, scenes).curve() for name, scenes in domains.items()}
    figure = Figure((7, 6.6), dpi=120, layout="constrained")
    grid = figure.subplots(3, 2, sharex=True, sharey=True)
    for axes, name in zip(grid.flat, SHOWN, strict=True):
        c = CLASS_NAMES.index(name)
        for color, curve in zip(COLORS, curves.values(), strict=False):
            some = curve.coverage[c] > 0.005  # a few pixels are no curve
            axes.plot(100 * curve.coverage[c][some], 100 * curve.precision[c][some], color=color)
        axes.axvline(50, color="0.6", linewidth=0.8, linestyle="--")
        axes.set_title(name)
        axes.grid(color="0.85", linewidth=0.5)
    grid[0, 0].set(xlim=(0, 101), ylim=(0, 101))
    figure.supxlabel("coverage (%): pixels called this class that keep their label")
    figure.supylabel("precision (%)")
    patches = [Patch(color=color, label=name) for color, name in zip(COLORS, curves, strict=False)]
    figure.legend(handles=patches, loc="outside upper center", ncols=2, frameon=False)
    return figure


class Task(NamedTuple):
    """A row of the chart: the file, and which of its networks are source only, control, adapted."""

    title: str
    file: str
    networks: tuple[str, str, str]


TASKS = (
    Task("digits, turned\n(accuracy)", "digits.csv", ("source only", "control", "CAG-UDA")),
    Task(
        "synthetic streets\nto dusk",
        "own_images_synthetic.csv",
        ("source only", "control", "adapted"),
    ),
    Task(
        "CamVid,\nday to dusk", "own_images_day_to_dusk.csv", ("source only", "control", "adapted")
    ),
    Task(
        "trainer: CamVid,\nday to dusk",
        "trainer_dusk.csv",
        ("source only", "no target labels, stage 3", "both, stage 3"),
    ),
    Task(
        "trainer:\nsynthetic streets",
        "trainer_synthetic.csv",
        ("warm-up", "control, stage 3", "default, stage 3"),
    ),
)


def scores(task: Task, network: str) -> list[float]:
    """Return the score of each seed in percent: the mean over the classes, if there are any."""
    seeds = defaultdict(list)
    with (MEASURED / task.file).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if network in (row.get("network"), row.get("method")):
                score = row.get("miou") or row.get("accuracy") or 100 * float(row["iou"])
                seeds[row["seed"]].append(float(score))
    return [statistics.fmean(classes) for classes in seeds.values()]


def results() -> Figure:
    """Draw the scores of every seed as dots, and their means, for each task."""
    figure = Figure((7, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row, task in enumerate(TASKS):
        for network, color, shift in zip(task.networks, COLORS, (-0.24, 0, 0.24), strict=True):
            values = scores(task, network)
            axes.plot(values, [row + shift] * len(values), "o", color=color, alpha=0.55)
            mean = statistics.fmean(values)
            axes.plot([mean, mean], [row + shift - 0.11, row + shift + 0.11], color=color, lw=3)
    axes.set_yticks(range(len(TASKS)), [task.title for task in TASKS])
    axes.invert_yaxis()
    axes.set_xlabel("mIoU or accuracy on the target (%)")
    axes.set_xlim(0, 70)
    axes.grid(axis="x", color="0.85", linewidth=0.5)
    names = ("source only", "control: source alone, as many steps", "adapted")
    patches = [Patch(color=color, label=name) for color, name in zip(COLORS, names, strict=True)]
    figure.legend(handles=patches, loc="outside upper center", ncols=3, frameon=False)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "margins": margins,
    "active_pixels": active_pixels,
    "precision_coverage": precision_coverage,
    "results": results,
}


def main() -> None:
    """Draw the figures that are named, or all."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the concept pages.")
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=", ".join(FIGURES))
    names = parser.parse_args().names or list(FIGURES)
    torch.set_num_threads(1)  # more of them would add up in another order
    for name in names:
        path = IMAGES / f"{name}.png"
        FIGURES[name]().savefig(path, bbox_inches="tight", pad_inches=0.08)
        print(path)


if __name__ == "__main__":
    main()
