"""A run on disk and on its machine: settings, checkpoints, records, processes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parallel
import torch
from limits import Count, Positive
from streams import Loading

from engine.files import load_checkpoint, save_checkpoint
from engine.records import Records

_CHECKPOINT = re.compile(r"(unfinished|source-only|warm-up|stage-\d+)\.pt$")  # others are ignored


@dataclass(frozen=True)
class RunSettings:
    """The folder of the run, its seed, and the machine it runs on."""

    output: Path = Path("runs/run")
    """Folder for metrics, checkpoints and report."""
    resume: bool = False
    """Go on with the interrupted run in --output, if there is one."""
    checkpoint_every: Positive = 200
    """Iterations between two checkpoints to resume from."""
    seed: Count = 0
    """Seed of all randomness."""
    workers: Count = 2
    """Processes that read images of each domain, for each process that trains."""
    threads: Count = 0
    """Threads of torch on the CPU; 0 leaves the number to torch."""
    device: str = ""
    """Device of torch, such as cpu or cuda; by default a GPU if there is one."""

    def check(self) -> None:
        """Raise a ValueError that names the flags which do not fit together."""
        if self.device:
            parallel.check_device(self.device)


class ResumeError(Exception):
    """A run cannot be resumed from its folder; the message says why."""


class Run:
    """A run in its processes and its folder: device, records, and the checkpoints of its phases.

    A phase is finished when its own checkpoint exists. A phase in progress has one that all phases
    share, `unfinished.pt`.

    Args:
        settings: The folder and the machine.
        everything: All settings as plain values, for the checkpoints.
    """

    def __init__(self, settings: RunSettings, everything: Mapping[str, object]) -> None:
        self.settings = settings
        self.everything = everything
        self.device = parallel.start(settings.device)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        if parallel.is_main():
            settings.output.mkdir(parents=True, exist_ok=True)
        self.loading = Loading(settings.workers, self.device)
        self.records = Records(settings.output if parallel.is_main() else None)
        found = sorted(self.folder.glob("*.pt")) if settings.resume else ()
        # Events after the latest checkpoint will be recorded again.
        sizes = (self._load(path)["metrics_size"] for path in found if _CHECKPOINT.match(path.name))
        self.records.rewind(max(sizes, default=0))

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return self.settings.output / "checkpoints"

    def finished(self, phase: str) -> dict[str, Any] | None:
        """Return the checkpoint of a phase that an earlier start of this run has finished."""
        path = self._path(phase)
        return self._load(path) if self.settings.resume and path.is_file() else None

    def unfinished(self, phase: str) -> dict[str, Any] | None:
        """Return the checkpoint of a phase in which an earlier start was interrupted."""
        path = self.folder / "unfinished.pt"
        if not self.settings.resume or not path.is_file():
            return None
        parts = self._load(path)
        return parts if parts["phase"] == phase else None

    def stored(self, phase: str) -> dict[str, Any] | None:
        """Return `Phase.stored` of a phase that has been begun."""
        parts = self.finished(phase) or self.unfinished(phase)
        return None if parts is None else parts["stored"]

    def finish(self, phase: str, parts: Mapping[str, object]) -> None:
        """Save the checkpoint of a finished phase."""
        self._save(self._path(phase), phase, {"settings": self.everything, **parts})

    def interrupt(self, phase: str, parts: Mapping[str, object]) -> None:
        """Save the checkpoint of a phase in progress."""
        self._save(self.folder / "unfinished.pt", phase, parts)

    def _load(self, path: Path) -> dict[str, Any]:
        """Load a checkpoint of this run."""
        fix = "Remove it to go on from the checkpoint before."
        try:
            parts = load_checkpoint(path)
        except ValueError as error:
            raise ResumeError(f"{error} {fix}") from error
        missing = [name for name in ("phase", "metrics_size", "stored") if name not in parts]
        if missing:
            raise ResumeError(f"{path} is no checkpoint of a phase: it lacks {missing}. {fix}")
        return parts

    def _path(self, phase: str) -> Path:
        return self.folder / f"{phase.replace(' ', '-')}.pt"

    def _save(self, path: Path, phase: str, parts: Mapping[str, object]) -> None:
        """Save a checkpoint; the first process does it for all."""
        size = self.records.size()
        if parallel.is_main():
            save_checkpoint(path, {"phase": phase, **parts, "metrics_size": size})
