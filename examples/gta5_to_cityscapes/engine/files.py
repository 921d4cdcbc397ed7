"""Files that are written as a whole, and checkpoints that run no code when they are loaded."""

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a temporary file, flush it, and rename it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_checkpoint(path: Path, parts: Mapping[str, object]) -> None:
    """Save a dict of plain values and tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: torch.save(dict(parts), temporary))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a file of `save_checkpoint`; nothing in the file is executed.

    Raises:
        ValueError: if the file is damaged or holds something else.
    """
    try:
        parts: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(parts, dict):
            raise TypeError(f"it holds a {type(parts).__name__}")
    except OSError:
        raise
    except Exception as error:  # Unpickling what is damaged may raise any.
        # torch's own text advises to load the file unsafely.
        is_unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "not tensors and plain values alone" if is_unsafe else str(error).split("\n")[0]
        raise ValueError(
            f"{path} is not a checkpoint of this example, or it is damaged ({reason})."
        ) from error
    return parts


def load_finished(path: Path) -> dict[str, Any]:
    """Load the checkpoint of a finished phase.

    Raises:
        ValueError: if the file is damaged, or holds a phase in progress, or something else.
    """
    parts = load_checkpoint(path)
    missing = [name for name in ("settings", "network") if name not in parts]
    if missing:
        fix = " Take one of a finished phase, such as stage-3.pt." if "networks" in parts else ""
        raise ValueError(f"{path} is not a checkpoint of a phase: it lacks {missing}.{fix}")
    return parts
