"""The report: the exact table, the colors in the pictures, and no half-written file."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import report
import torch
from classes import CLASS_NAMES, IGNORE, NUM_CLASSES, PALETTE, SYNTHIA_16
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from anchorda import ConfusionMatrix, ScoreCalibrator

MAPS = ("truth", "warm_up", "adapted", "pseudo")
NOTHING: dict[str, float | None] = dict.fromkeys(CLASS_NAMES)
TERMS = {"warm-up": {"source": 1.0}, "stage 1": {"source": 1.0, "pseudo": 2.0}}
LINES: list[dict[str, object]] = [
    {"kind": "evaluation", "phase": "source only", "miou": 0.2, "accuracy": 0.5, "iou": NOTHING},
    {"kind": "evaluation", "phase": "warm-up", "miou": 0.3, "accuracy": 0.5, "iou": NOTHING},
    {"kind": "evaluation", "phase": "stage 1", "miou": None, "accuracy": None, "iou": NOTHING},
    {
        "kind": "pseudo-labels",
        "phase": "stage 1",
        "labeler": "anchor",
        "coverage": NOTHING | {"road": 0.75, "wall": 0.5},
        "precision": NOTHING | {"road": 0.25},
        "recall": NOTHING,
    },
]
for phase in TERMS:
    for step in range(1, 21):
        LINES.append({"kind": "losses", "phase": phase, "iteration": step, "terms": TERMS[phase]})


def write_metrics(folder: Path, *lines: dict[str, object]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def anchors(seen: list[int]) -> Tensor:
    centroids = torch.full((NUM_CLASSES, 4), math.nan)
    centroids[seen] = torch.arange(4.0 * len(seen)).view(-1, 4)
    return centroids


def panel(height: int, width: int, **labels: int) -> tuple[Tensor, list[Tensor]]:
    maps = [torch.full((height, width), labels.get(name, IGNORE)) for name in MAPS]
    maps[-1] = maps[-1][::4, ::4]
    return torch.full((3, height, width), 0.5), maps


def save_panels(path: Path, *rows: tuple[Tensor, list[Tensor]]) -> None:
    report.save(report.draw_rows(("image", *MAPS), rows), path)


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def margins(*right: float) -> ScoreCalibrator:
    """Return margins 1, 2, 3, … of road, of which these are right, and of no other class."""
    calibrator = ScoreCalibrator(NUM_CLASSES)
    road = torch.zeros(len(right), dtype=torch.int64)
    truth = torch.where(torch.tensor(right) > 0, 0, 1)
    calibrator.update(road, torch.arange(1.0, len(right) + 1), truth)
    return calibrator


PICTURES: list[Callable[[Path], Figure | None]] = [
    lambda folder: report.draw_rows(("image", *MAPS), [panel(12, 16, truth=3)]),
    lambda folder: report.draw_curves(write_metrics(folder, *LINES)),
    lambda folder: report.draw_anchor_distances(anchors([0, 4, 18])),
    lambda folder: report.draw_label_quality(write_metrics(folder, *LINES)),
    lambda folder: report.draw_margin_curves({"source": margins(0, 1, 1)}, torch.tensor(1.5)),
]


def confusion(counts: dict[tuple[int, int], int]) -> ConfusionMatrix:
    """Return pixels by truth and prediction."""
    matrix = ConfusionMatrix(NUM_CLASSES)
    for place, count in counts.items():
        matrix.counts[place] = count
    return matrix


def test_table_lists_the_classes_that_occur_in_any_phase() -> None:
    before, after = confusion({(0, 0): 1, (0, NUM_CLASSES): 1}), confusion({(0, 0): 5})
    after.counts[6, 6], after.counts[6, NUM_CLASSES] = 1, 15
    table = report.iou_table({"source only": before, "warm-up": after}, range(NUM_CLASSES))
    assert table.splitlines() == [
        "class          source only  warm-up",
        "-----------------------------------",
        "road                  50.0    100.0",
        "traffic light            –      6.2",
        "-----------------------------------",
        "mIoU                  50.0     53.1",
    ]


def test_table_keeps_the_order_of_the_phases_and_says_where_there_is_no_mean() -> None:
    quarter = confusion({(0, 0): 1, (0, NUM_CLASSES): 3})
    table = report.iou_table({"b": confusion({}), "a": quarter}, range(NUM_CLASSES))
    assert table.splitlines()[0].split() == ["class", "b", "a"]
    assert table.splitlines()[-1].split() == ["mIoU", "–", "25.0"]


def test_table_of_synthia_has_both_of_its_means() -> None:
    road, wall, sky = (CLASS_NAMES.index(name) for name in ("road", "wall", "sky"))
    some = confusion({(road, road): 3, (road, sky): 1, (wall, wall): 1, (wall, NUM_CLASSES): 3})
    # Sky is predicted but occurs nowhere: it has an IoU, 0, and no part in a mean.
    lines = [line.split() for line in report.iou_table({"now": some}, SYNTHIA_16).splitlines()]
    assert lines[2:5] == [["road", "75.0"], ["wall", "25.0"], ["sky", "0.0"]]
    assert lines[-2:] == [["mIoU", "of", "16", "50.0"], ["mIoU", "of", "13", "75.0"]]
    assert report.mean_iou(some, range(NUM_CLASSES)) == some.mean_iou().item()


@pytest.mark.parametrize(
    "draw", PICTURES, ids=["panels", "curves", "anchors", "quality", "margins"]
)
def test_picture_is_readable_and_alone(
    draw: Callable[[Path], Figure | None], tmp_path: Path
) -> None:
    figure = draw(tmp_path)
    assert figure is not None
    report.save(figure, tmp_path / "picture.png")
    assert pixels(tmp_path / "picture.png").std() > 0
    assert {path.name for path in tmp_path.iterdir()} <= {"picture.png", "metrics.jsonl"}


def test_failed_picture_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Figure, path: Path, **__: object) -> None:
        path.write_bytes(b"half a picture")
        raise OSError("disk full")

    (tmp_path / "picture.png").write_bytes(b"before")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        report.save(Figure(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"picture.png"}


@pytest.mark.parametrize(
    "sizes",
    [[(60, 80), (60, 80)], [(50, 100), (50, 100)], [(60, 80), (50, 100)]],
    ids=["4:3", "2:1", "both"],
)
def test_panels_show_each_label_map_in_its_place_and_color(
    sizes: list[tuple[int, int]], tmp_path: Path
) -> None:
    rows = [
        panel(*sizes[0], truth=0, warm_up=8, adapted=10, pseudo=13),
        panel(*sizes[1], truth=18, warm_up=-1, adapted=250, pseudo=2),
    ]
    save_panels(tmp_path / "panels.png", *rows)
    picture = pixels(tmp_path / "panels.png")
    box = picture.shape[1] / 5
    is_gray = (np.abs(picture[:, int(box / 2)].astype(int) - 128) <= 1).all(axis=1)
    starts, ends = (np.nonzero(np.diff(is_gray.astype(int)) == step)[0] for step in (1, -1))
    assert len(starts) == len(ends) == 2  # an image in each of the two rows
    # A box is narrower than a fifth of the picture by the gap between boxes.
    assert (ends - starts) / box == pytest.approx([h / w for h, w in sizes], rel=0.03)
    black = NUM_CLASSES
    for top, bottom, labels in zip(
        starts, ends, [(0, 8, 10, 13), (18, black, black, 2)], strict=True
    ):
        for column, label in enumerate(labels, start=1):
            left = round(column * box)
            inside = picture[top + 10 : bottom - 10, left + 10 : left + int(box) - 10]
            assert (inside == PALETTE[label]).all()


def test_panel_fills_its_box_whatever_the_resolution_of_the_pseudo_labels(tmp_path: Path) -> None:
    image, maps = panel(50, 100)
    save_panels(tmp_path / "panels.png", (image, [*maps[:-1], torch.full((9, 11), 11)]))
    picture = pixels(tmp_path / "panels.png")
    box = picture.shape[1] // 5
    found = (picture[:, -box:] == PALETTE[11]).all(axis=2)
    middle = found[:, box // 2]
    assert found[np.argmax(middle) + 5].mean() > 0.97
    assert middle.sum() / box == pytest.approx(0.5, rel=0.05)


def test_legend_names_the_classes_that_occur_and_no_other() -> None:
    figure = report.draw_rows(("image", *MAPS), [panel(8, 8, truth=0), panel(8, 8, pseudo=11)])
    assert legend_of(figure) == ["road", "person", "ignored"]


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_curves_put_the_phases_one_after_the_other(tmp_path: Path) -> None:
    losses, mious = report.draw_curves(write_metrics(tmp_path, *LINES)).axes
    lines = [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in losses.lines]
    (raw,) = [x for x, y in lines[::2] if len(x) == 20 and (y == 2).all()]
    assert raw.tolist() == list(range(21, 41))  # "pseudo" begins where the warm-up ends
    assert mious.texts[0].get_text() == "30.0"
    legend = mious.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["source only: 20.0"]


def test_running_mean_is_centered_and_shrinks_at_the_ends() -> None:
    ramp = np.arange(20.0)
    smooth = report._running_mean(ramp)
    assert smooth[4:-4].tolist() == ramp[4:-4].tolist()
    assert smooth[[0, -1]].tolist() == [2.0, 17.0]
    assert report._running_mean(ramp[:1]).tolist() == [0.0]


def test_anchor_distances_show_the_seen_classes() -> None:
    figure = report.draw_anchor_distances(anchors([0, 4, 18]))
    assert figure is not None
    axes = figure.axes[0]
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert {text.get_text() for text in ticks} == {"road", "fence", "bicycle"}
    # Rows (0, 1, 2, 3), (4, 5, 6, 7), ...: neighbors are 4 · √4 apart.
    assert {float(text.get_text()) for text in axes.texts} == {8.0, 16.0}


def test_one_seen_anchor_has_no_distances_to_draw() -> None:
    assert report.draw_anchor_distances(anchors([7])) is None


def test_margin_curves_mark_the_minimum_that_was_used() -> None:
    both = {"source": margins(0, 0, 1, 1), "target": margins(0, 1, 0, 1)}
    figure = report.draw_margin_curves(both, torch.tensor(1.5))
    (axes,) = [a for a in figure.axes if a.get_title()]
    assert axes.get_title() == "road"
    curves = ["source: coverage", "source: precision", "target: coverage", "target: precision"]
    assert legend_of(figure) == [line.get_label() for line in axes.lines[:4]] == curves
    assert axes.lines[4].get_xdata() == [1.5, 1.5]
    none = torch.full((NUM_CLASSES,), math.inf)
    (axes_without,) = [a for a in report.draw_margin_curves(both, none).axes if a.get_title()]
    assert axes_without.get_title() == "road, left out"
    assert len(axes_without.lines) == 4


def test_label_quality_draws_a_bar_where_defined(tmp_path: Path) -> None:
    figure = report.draw_label_quality(write_metrics(tmp_path, *LINES))
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_title() == "stage 1: anchor"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["road", "wall"]
    widths = [bar.get_width() for container in axes.containers for bar in container]
    assert widths == [75.0, 50.0, 25.0]
    assert [text.get_text() for text in axes.texts] == ["n/a"]


def test_without_pseudo_labels_there_is_no_quality_to_draw(tmp_path: Path) -> None:
    lines = [line for line in LINES if line["kind"] != "pseudo-labels"]
    assert report.draw_label_quality(write_metrics(tmp_path, *lines)) is None


@pytest.mark.parametrize("draw", [report.draw_curves, report.draw_label_quality])
@pytest.mark.parametrize(
    "bad",
    [
        '{"kind": "losses", "pha',
        "[1, 2]",
        "null",
        "",
        '{"kind": "loses", "phase": "warm-up"}',
        '{"kind": "losses", "phase": "warm-up", "iteration": 3}',
        '{"kind": "losses", "phase": "warm-up", "iteration": 3, "terms": {"source": "low"}}',
        '{"kind": "evaluation", "phase": "warm-up", "miou": [1]}',
    ],
)
def test_malformed_line_is_named(draw: Callable[[Path], object], bad: str, tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path, *LINES[:2])
    metrics.write_text(metrics.read_text("utf-8") + bad + "\n", "utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3: ") as raised:
        draw(metrics)
    assert str(metrics) in str(raised.value)
