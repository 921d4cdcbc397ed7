"""What a run leaves behind: metrics, TensorBoard scalars and checkpoints."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from classes import CLASS_NAMES
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from anchorda import ConfusionMatrix, PseudoLabelQuality


class Records:
    """Writes `metrics.jsonl`, a line per event, and the same numbers for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self._file = self.path.open("w", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"))
        self._evaluations = 0

    def losses(self, phase: str, iteration: int, terms: Mapping[str, float]) -> None:
        """Record the loss terms of an iteration, counted from 1 within its phase."""
        event = {"kind": "losses", "phase": phase, "iteration": iteration, "terms": dict(terms)}
        self._write(event)
        for name, value in terms.items():
            self._board.add_scalar(f"{phase}/{name}", value, iteration)

    def evaluation(self, phase: str, confusion: ConfusionMatrix) -> None:
        """Record the scores of a network on the evaluation images."""
        miou, accuracy = confusion.mean_iou().item(), confusion.accuracy().item()
        scores = {
            "miou": _or_none(miou),
            "accuracy": _or_none(accuracy),
            "iou": _by_class(confusion.iou()),
        }
        self._write({"kind": "evaluation", "phase": phase, **scores})
        self._evaluations += 1
        self._board.add_scalar("evaluation/mIoU", miou, self._evaluations)

    def pseudo_labels(self, phase: str, labeler: str, quality: PseudoLabelQuality) -> None:
        """Record how many pseudo-labels there are and how many of them are right."""
        scores = {
            "coverage": _by_class(quality.coverage()),
            "precision": _by_class(quality.precision()),
            "recall": _by_class(quality.recall()),
        }
        self._write({"kind": "pseudo-labels", "phase": phase, "labeler": labeler, **scores})

    def close(self) -> None:
        """Finish the files."""
        self._file.close()
        self._board.close()

    def _write(self, event: Mapping[str, object]) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, which then takes the place of `path` as a whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, parts: Mapping[str, object]) -> None:
    """Save the parts of a run, of plain values and tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: torch.save(dict(parts), temporary))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load what `save_checkpoint` saved; nothing in the file is executed."""
    parts: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return parts


def _by_class(values: Tensor) -> dict[str, float | None]:
    return dict(zip(CLASS_NAMES, map(_or_none, values.tolist()), strict=True))


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
