"""Tables and pictures by which a person judges a run.

Pictures are figures of their own, without pyplot: no display, no global state. `save` writes one
under another name and then renames it, so that the file is whole or not there.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from classes import CLASS_NAMES, IGNORE, STREET, SYNTHIA_13, SYNTHIA_16, Classes
from engine.files import write_atomically
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from torch import Tensor

from anchorda import ConfusionMatrix, ScoreCalibrator, plots

_DPI = 150
_FAINT = "0.75"  # the gray of grid lines


def mean_iou(confusion: ConfusionMatrix, classes: Sequence[int]) -> float:
    """Return the mean IoU over those of some classes that occur in the truth; NaN if none does."""
    occurs = confusion.counts.sum(dim=1) > 0
    iou = torch.where(occurs, confusion.iou(), torch.nan)
    return iou[list(classes)].nanmean().item()


def iou_table(
    scores: Mapping[str, ConfusionMatrix],
    evaluated: Sequence[int],
    names: Sequence[str] = CLASS_NAMES,
) -> str:
    """Lay out the IoU in percent: a row per class that occurs, a column per phase, then the means.

    Args:
        scores: The confusion of each phase.
        evaluated: The classes whose mean is meant; of SYNTHIA's 16 that of 13 is given, too.
        names: Of all classes.
    """
    means = {"mIoU": evaluated}
    if tuple(evaluated) == SYNTHIA_16 and tuple(names) == CLASS_NAMES:
        means = {"mIoU of 16": SYNTHIA_16, "mIoU of 13": SYNTHIA_13}
    by_class = zip(*(confusion.iou().tolist() for confusion in scores.values()), strict=True)
    rows = [
        (name, values)
        for name, values in zip(names, by_class, strict=True)
        if not all(map(math.isnan, values))
    ]
    first = max(len(name) for name in ("class", *means, *(name for name, _ in rows)))
    widths = [max(len(phase), len("100.0")) for phase in scores]

    def line(name: str, cells: Iterable[str]) -> str:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join((name.ljust(first), *aligned))

    head = line("class", scores)
    rule = "-" * len(head)
    body = [line(name, map(_percent, values)) for name, values in rows]
    last = [
        line(name, (_percent(mean_iou(confusion, classes)) for confusion in scores.values()))
        for name, classes in means.items()
    ]
    return "\n".join((head, rule, *body, rule, *last))


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def draw_rows(
    titles: Sequence[str],
    rows: Sequence[tuple[Tensor, Sequence[Tensor]]],
    classes: Classes = STREET,
) -> Figure:
    """Draw rows of an image (3, H, W) in [0, 1] and its maps of train ids; below, a legend."""
    colors = [tuple(color) for color in (classes.palette() / 255).tolist()]
    handles = _class_patches((labels for _, maps in rows for labels in maps), classes)
    # In inches. Boxes of the images' shapes, so that nothing has to be stretched or padded.
    box, gap, head = 3.0, 0.05, 0.32
    width = (box + gap) * len(titles) + gap
    legend_columns = max(1, int(width / 1.55))
    heights = [box * image.shape[1] / image.shape[2] for image, _ in rows]
    foot = 0.15 + 0.27 * math.ceil(len(handles) / legend_columns)
    height = head + sum(heights) + gap * (len(rows) - 1) + foot
    figure = Figure((width, height), dpi=_DPI)
    figure.subplots_adjust(gap / width, foot / height, 1 - gap / width, 1 - head / height)
    spacing = {"wspace": gap / box, "hspace": gap * len(rows) / sum(heights)}
    grid = figure.subplots(
        len(rows), len(titles), squeeze=False, height_ratios=heights, gridspec_kw=spacing
    )
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=13, pad=5)
    for axes in grid.flat:
        axes.set_axis_off()
    for places, (image, maps) in zip(grid, rows, strict=True):
        places[0].imshow(image.float().clamp(0, 1).permute(1, 2, 0).cpu().numpy(), aspect="auto")
        for axes, labels in zip(places[1:], maps, strict=True):
            ids = torch.from_numpy(_train_ids(labels, len(classes)))
            plots.plot_labels(axes, ids, colors=colors).set_aspect("auto")
    figure.legend(
        handles=handles, loc="lower center", ncols=legend_columns, frameon=False, fontsize=11,
        handlelength=1.3, handleheight=1.0, columnspacing=1.4, borderaxespad=0.1,
    )  # fmt: skip
    return figure


def _train_ids(labels: Tensor, num_classes: int) -> NDArray[np.int64]:
    ids: NDArray[np.int64] = labels.long().cpu().numpy()
    return np.where((ids >= 0) & (ids < num_classes), ids, IGNORE)


def _class_patches(label_maps: Iterable[Tensor], classes: Classes) -> list[Patch]:
    present = sorted(
        {
            int(label)
            for labels in label_maps
            for label in np.unique(_train_ids(labels, len(classes)))
        }
    )
    names = [classes.names[label] if label != IGNORE else "ignored" for label in present]
    colors = [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in classes.palette()[present]]
    return [Patch(color=color, label=name) for color, name in zip(colors, names, strict=True)]


def draw_curves(metrics: Path) -> Figure:
    """Draw the losses of all phases one after the other, and the mean IoU after each phase.

    Raises:
        ValueError: If a line of `metrics` is malformed; the message names file and line.
    """
    read = _read_metrics(metrics)
    figure = Figure((13, 4.5), dpi=_DPI, layout="constrained")
    losses, mious = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_losses(losses, read.losses)
    _draw_mious(mious, read.mious)
    return figure


def _draw_losses(axes: Axes, losses: Mapping[str, Mapping[int, Mapping[str, float]]]) -> None:
    terms = dict.fromkeys(t for phase in losses.values() for step in phase.values() for t in step)
    lengths = [max(phase) for phase in losses.values()]
    ends = np.cumsum(lengths, dtype=int)
    for phase, end, length in zip(losses.values(), ends, lengths, strict=True):
        for index, term in enumerate(terms):
            steps = [step for step in sorted(phase) if term in phase[step]]
            x = end - length + np.array(steps)
            values = np.array([phase[step][term] for step in steps])
            axes.plot(x, values, color=f"C{index}", alpha=0.25, linewidth=0.8, zorder=1)
            axes.plot(x, _running_mean(values), color=f"C{index}", linewidth=1.6)
        axes.axvline(end, color="0.5", linewidth=0.8)
    names = axes.secondary_xaxis("top")
    crowded = any(length < 0.08 * sum(lengths) for length in lengths)
    names.set_xticks(ends - np.array(lengths) / 2, list(losses), rotation=90 if crowded else 0)
    names.tick_params(length=0)
    axes.set(xlabel="iteration", ylabel="loss", xlim=(0, sum(lengths) or 1), ylim=(0, None))
    axes.grid(axis="y", color=_FAINT, linewidth=0.5)
    handles = [axes.plot([], color=f"C{index}", label=term)[0] for index, term in enumerate(terms)]
    axes.legend(handles=handles, loc="upper right", framealpha=1)


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return centered means over a twentieth of the values, of fewer at the ends."""
    reach = max(4, len(values) // 40)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return np.array([window.mean() for window in windows])


def _draw_mious(axes: Axes, mious: Mapping[str, float]) -> None:
    percent = {phase: 100 * miou for phase, miou in mious.items()}
    reference = percent.pop("source only", None)
    axes.plot(list(percent), list(percent.values()), marker="o")
    for place, value in enumerate(percent.values()):
        axes.annotate(
            f"{value:.1f}", (place, value), (0, 8), textcoords="offset points", ha="center",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
    if reference is not None:
        label = f"source only: {reference:.1f}"
        axes.axhline(reference, color="0.4", linestyle="--", linewidth=1.2, label=label)
        axes.legend(loc="lower right")
    axes.set_xlim(-0.4, len(percent) - 0.6)
    axes.margins(y=0.25)  # for the numbers, and the legend below the curve
    axes.locator_params(axis="y", integer=True)
    axes.set_ylabel("mIoU after each phase (%)")
    axes.grid(axis="y", color=_FAINT, linewidth=0.5)


def draw_anchor_distances(
    centroids: Tensor, class_names: Sequence[str] = CLASS_NAMES
) -> Figure | None:
    """Draw the distances between the anchors (C, D) of the seen classes; None if fewer than two."""
    seen = int(centroids.isfinite().all(dim=1).sum())
    if seen < 2:
        return None
    size = 2.5 + 0.42 * seen
    figure = Figure((size + 1, size), dpi=_DPI, layout="constrained")
    plots.plot_anchor_distances(figure.subplots(), centroids, class_names=class_names)
    return figure


def draw_margin_curves(
    margins: Mapping[str, ScoreCalibrator],
    minimum: Tensor,
    class_names: Sequence[str] = CLASS_NAMES,
) -> Figure:
    """Draw coverage and precision of each class's labels over their minimum margin.

    Args:
        margins: The margins by domain.
        minimum: () or (C,), the minimum that was used: a line.
        class_names: Of all classes.
    """
    curves = [calibrator.curve() for calibrator in margins.values()]
    known = torch.stack([curve.precision.isfinite().any(dim=1) for curve in curves]).any(dim=0)
    classes = [c for c in range(len(class_names)) if known[c]]
    columns = 4
    rows = max(1, math.ceil(len(classes) / columns))
    figure = Figure((3 * columns, 0.6 + 2.3 * rows), dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    minimum = minimum.cpu().expand(len(class_names))
    handles: tuple[list[Artist], list[str]] = [], []
    for axes in grid.flat[len(classes) :]:
        axes.set_axis_off()
    for axes, c in zip(grid.flat, classes, strict=False):
        plots.plot_coverage_and_precision(axes, margins, c, minimum)
        left_out = minimum[c] == math.inf
        axes.set_title(class_names[c] + (", left out" if left_out else ""), fontsize=10)
        axes.set(xlabel="", ylabel="")
        handles = axes.get_legend_handles_labels()
        axes.get_legend().remove()
    figure.supxlabel("minimum margin", fontsize=10)
    figure.supylabel("percent", fontsize=10)
    figure.legend(*handles, loc="outside upper center", ncols=len(handles[0]), frameon=False)
    return figure


class Quality(NamedTuple):
    """Coverage and precision of pseudo-labels by class name, NaN where undefined."""

    coverage: Mapping[str, float]
    precision: Mapping[str, float]


def draw_label_quality(metrics: Path) -> Figure | None:
    """Draw coverage and precision of the pseudo-labels per class, by stage and labeler.

    Returns:
        The figure; None without pseudo-labels whose truth is known.

    Raises:
        ValueError: If a line of `metrics` is malformed; the message names file and line.
    """
    qualities = _read_metrics(metrics).qualities
    parts = [part for quality in qualities.values() for part in quality]
    every = dict.fromkeys(name for part in parts for name in part)
    names = [n for n in every if any(not math.isnan(part.get(n, math.nan)) for part in parts)]
    if not names:
        return None
    labelers = list(dict.fromkeys(labeler for labeler, _ in qualities))
    phases = list(dict.fromkeys(phase for _, phase in qualities))
    size = (1.8 + 3.4 * len(phases), 0.9 + len(labelers) * (0.7 + 0.26 * len(names)))
    figure = Figure(size, dpi=_DPI, layout="constrained")
    grid = figure.subplots(len(labelers), len(phases), sharex=True, sharey=True, squeeze=False)
    for (labeler, phase), quality in qualities.items():
        axes = grid[labelers.index(labeler), phases.index(phase)]
        axes.set_title(f"{phase}: {labeler}")
        _draw_quality(axes, quality, names)
    grid[0, 0].set(xlim=(0, 105), ylim=(len(names) - 0.5, -0.5), xticks=range(0, 101, 25))
    grid[0, 0].set_yticks(range(len(names)), names)
    for axes in grid[-1]:
        axes.set_xlabel("percent")
    handles = [Patch(color=f"C{index}", label=name) for index, name in enumerate(Quality._fields)]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _draw_quality(axes: Axes, quality: Quality, names: Sequence[str]) -> None:
    bar = 0.38
    for index, values in enumerate(quality):
        for place, name in enumerate(names):
            y, value = place + bar * (index - 0.5), 100 * values.get(name, math.nan)
            if math.isnan(value):  # undefined is not 0
                axes.text(0.5, y, "n/a", color=f"C{index}", fontsize=7, va="center")
            else:
                axes.barh(y, value, height=bar, color=f"C{index}")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_FAINT, linewidth=0.5)
    axes.set_axisbelow(True)


class _Metrics(NamedTuple):
    """The numbers of a metrics file; of repeated lines the last one counts."""

    losses: dict[str, dict[int, dict[str, float]]]  # by phase, iteration and term
    mious: dict[str, float]  # by phase
    qualities: dict[tuple[str, str], Quality]  # by labeler and phase


def _read_metrics(path: Path) -> _Metrics:
    metrics = _Metrics({}, {}, {})
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                _add_event(metrics, json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object of losses, an evaluation or "
                    f"pseudo-labels, but got {line.strip()[:80]!r} ({error!r})."
                ) from error
    return metrics


def _add_event(metrics: _Metrics, event: dict[str, Any]) -> None:
    kind, phase = event["kind"], event["phase"]
    if kind == "losses":
        steps = metrics.losses.setdefault(phase, {})
        steps[int(event["iteration"])] = _numbers(event["terms"])
    elif kind == "evaluation":
        metrics.mious.update(_numbers({phase: event["miou"]}))
    elif kind == "pseudo-labels":
        quality = Quality(_numbers(event["coverage"]), _numbers(event["precision"]))
        metrics.qualities[event["labeler"], phase] = quality
    elif kind != "selection":  # within a phase, as TensorBoard shows it
        raise ValueError(f"unknown kind {kind!r}")


def _numbers(values: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
