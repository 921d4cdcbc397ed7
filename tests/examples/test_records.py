"""Files are whole or not there; metrics go back to where a checkpoint was made."""

import json
import math
from pathlib import Path

import pytest
import torch
from classes import CLASS_NAMES, NUM_CLASSES
from engine.files import load_checkpoint, save_checkpoint, write_atomically, write_text
from engine.records import Records
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from anchorda import ConfusionMatrix, PseudoLabelQuality, plots


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the scalars that TensorBoard shows."""
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_rewinding_forgets_what_came_after(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.rewind(0)
    records.losses("warm-up", 1, {"source": 2.5})
    size = records.size()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert len(before) == size
    records.losses("warm-up", 11, {"source": 2.0})
    records.evaluation("warm-up", ConfusionMatrix(NUM_CLASSES), CLASS_NAMES)
    records.close()

    again = Records(tmp_path)
    again.rewind(size)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    again.losses("warm-up", 11, {"source": 1.5})
    again.selection("warm-up", 12, {"source": 0.25})
    again.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 11, 12]
    assert scalars(tmp_path) == {
        "warm-up/source": [(1, 2.5), (11, 1.5)],
        "warm-up/best by source": [(12, 0.25)],
    }


def test_undefined_numbers_are_null(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.rewind(0)
    records.evaluation("warm-up", ConfusionMatrix(NUM_CLASSES), CLASS_NAMES)
    records.pseudo_labels("stage 1", "anchor", PseudoLabelQuality(NUM_CLASSES), CLASS_NAMES)
    records.selection("stage 1", 1, {"source": math.nan})
    records.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    evaluation, labels, selection = map(json.loads, text.splitlines())
    assert evaluation["miou"] is None
    assert set(labels["coverage"].values()) == {None}
    assert selection["scores"] == {"source": None}


def test_a_figure_is_an_image_in_tensorboard(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.rewind(0)
    figure = Figure((2, 1), dpi=50)
    plots.plot_anchor_distances(figure.subplots(), torch.eye(3))
    records.figure("anchor distances", figure, 2)
    records.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (image,) = board.Images("anchor distances")
    assert (image.step, image.width, image.height) == (2, 100, 50)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    records = Records(None)
    records.rewind(0)
    records.losses("warm-up", 1, {"source": 1.0})
    assert records.size() == 0
    records.close()
    assert not list(tmp_path.iterdir())


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_checkpoints_come_back(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.pt"
    save_checkpoint(path, {"phase": "warm-up", "network": {"weight": torch.arange(3)}})
    parts = load_checkpoint(path)
    assert parts["phase"] == "warm-up"
    assert torch.equal(parts["network"]["weight"], torch.arange(3))


class Bomb:
    """Runs if it is unpickled as it is."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Writes a file."""
        return (exec, ("open('exploded', 'w')",))


def test_a_file_that_is_no_checkpoint_is_named_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Bomb(), tmp_path / "bomb.pt")
    (tmp_path / "text.pt").write_text("text")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("bomb.pt", "text.pt", "list.pt"):
        with pytest.raises(ValueError, match=f"{name} is not a checkpoint of this example"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nothing.pt")
