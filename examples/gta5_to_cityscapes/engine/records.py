"""Metrics of a run: `metrics.jsonl`, and the same numbers for TensorBoard."""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from anchorda import ConfusionMatrix, PseudoLabelQuality


class Records:
    """Writer of `metrics.jsonl`, a line for each event, and of the same for TensorBoard.

    Args:
        folder: The folder of the run; None, for all processes but the first, writes nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._board: SummaryWriter | None = None
        self._evaluations = 0

    def rewind(self, size: int) -> None:
        """Cut the metrics to `size` bytes and go on from there."""
        if self._folder is None:
            return
        self.close()
        path = self._folder / "metrics.jsonl"
        with path.open("ab") as file:
            file.truncate(min(size, file.tell()))  # never longer than it is
        shutil.rmtree(self._folder / "tensorboard", ignore_errors=True)
        self._board = SummaryWriter(str(self._folder / "tensorboard"))
        self._evaluations = 0
        for line in path.read_text("utf-8").splitlines():
            self._draw(json.loads(line))

    def size(self) -> int:
        """Return the size of the metrics in bytes, after they have been flushed to the disk."""
        if self._folder is None:
            return 0
        with (self._folder / "metrics.jsonl").open("rb") as file:
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)

    def losses(self, phase: str, iteration: int, terms: Mapping[str, float]) -> None:
        """Record the loss terms of an iteration, counted from 1 within its phase."""
        event = {"kind": "losses", "phase": phase, "iteration": iteration, "terms": dict(terms)}
        self._write(event)

    def selection(self, phase: str, iteration: int, scores: Mapping[str, float]) -> None:
        """Record the scores by which the best network of a phase is chosen."""
        event = {"kind": "selection", "phase": phase, "iteration": iteration}
        self._write(event | {"scores": {name: _or_none(value) for name, value in scores.items()}})

    def evaluation(self, phase: str, confusion: ConfusionMatrix, names: Sequence[str]) -> None:
        """Record the scores of a network on the evaluation images, by the names of the classes."""
        scores = {
            "miou": _or_none(confusion.mean_iou().item()),
            "accuracy": _or_none(confusion.accuracy().item()),
            "iou": _by_class(confusion.iou(), names),
        }
        self._write({"kind": "evaluation", "phase": phase, **scores})

    def pseudo_labels(
        self, phase: str, labeler: str, quality: PseudoLabelQuality, names: Sequence[str]
    ) -> None:
        """Record coverage, precision and recall of pseudo-labels."""
        scores = {
            "coverage": _by_class(quality.coverage(), names),
            "precision": _by_class(quality.precision(), names),
            "recall": _by_class(quality.recall(), names),
        }
        self._write({"kind": "pseudo-labels", "phase": phase, "labeler": labeler, **scores})

    def figure(self, tag: str, figure: Figure, step: int = 0) -> None:
        """Show a figure in TensorBoard; `metrics.jsonl` has none."""
        if self._board is not None:
            self._board.add_figure(tag, figure, step)

    def close(self) -> None:
        """Finish the files."""
        if self._board is not None:
            self._board.close()

    def _write(self, event: Mapping[str, Any]) -> None:
        if self._folder is None:
            return
        with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        self._draw(event)

    def _draw(self, event: Mapping[str, Any]) -> None:
        """Show an event in TensorBoard."""
        if self._board is None:
            return
        if event["kind"] == "losses":
            for name, value in event["terms"].items():
                self._board.add_scalar(f"{event['phase']}/{name}", value, event["iteration"])
        elif event["kind"] == "selection":
            for name, value in event["scores"].items():
                tag = f"{event['phase']}/best by {name}"
                self._board.add_scalar(tag, _or_nan(value), event["iteration"])
        elif event["kind"] == "evaluation":
            self._evaluations += 1
            self._board.add_scalar("evaluation/mIoU", _or_nan(event["miou"]), self._evaluations)


def _by_class(values: Tensor, names: Sequence[str]) -> dict[str, float | None]:
    return dict(zip(names, map(_or_none, values.tolist()), strict=True))


def _or_none(value: float) -> float | None:
    """Return None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
