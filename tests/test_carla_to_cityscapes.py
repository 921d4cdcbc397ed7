"""CARLA → Cityscapes as a user gets it from two clones, here of two small repositories."""

from pathlib import Path

import carla_to_cityscapes
import numpy as np
import pytest
from carla_to_cityscapes import CARLA, CITYSCAPES, OTHER, ROAD, SIDEWALK, VOID, git, write_folders
from numpy.typing import NDArray
from PIL import Image

COLORS = [(50, 64, 128), (157, 234, 50), (255, 255, 255), (0, 0, 0), (0, 0, 255)]
IDS = [0, 1, 2, 3, 4, 5, 14]


def commit(folder: Path, files: dict[str, NDArray[np.uint8]]) -> str:
    """Return the commit that adds images; a later one removes them."""
    folder.mkdir()
    git(folder, "init", "--quiet")
    for name, pixels in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    git(folder, "add", ".")
    git(folder, *identity, "commit", "--quiet", "--message", "Add images")
    added = git(folder, "rev-parse", "HEAD").decode().strip()
    git(folder, "rm", "--quiet", "-r", ".")
    git(folder, *identity, "commit", "--quiet", "--message", "Remove images")
    return added


def test_both_domains_and_their_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gray, files = np.full((80, 160, 3), 90, np.uint8), dict[str, NDArray[np.uint8]]()
    colors = np.array(COLORS, np.uint8)[np.newaxis].repeat(80, 0).repeat(32, 1)
    for number in range(12):
        files |= {f"{CARLA.images}/{number}.png": gray, f"{CARLA.labels}/{number}.png": colors}
    monkeypatch.setattr(
        carla_to_cityscapes, "CARLA", CARLA._replace(commit=commit(tmp_path / "carla", files))
    )
    ids = np.array([IDS], np.uint8).repeat(70, 0).repeat(10, 1)
    files = {}
    for number in range(1, 12):
        files |= {
            f"{CITYSCAPES.images}/{number}.png": ids,
            f"{CITYSCAPES.labels}/{number}.png": ids,
        }
    monkeypatch.setattr(
        carla_to_cityscapes,
        "CITYSCAPES",
        CITYSCAPES._replace(commit=commit(tmp_path / "cityscapes", files)),
    )

    root = tmp_path / "pair"
    write_folders(tmp_path / "carla", tmp_path / "cityscapes", root, step=5)

    def numbers(folder: str) -> list[int]:
        return sorted(int(path.stem) for path in (root / folder).iterdir())

    assert numbers("source/images") == numbers("source/labels") == [0, 5, 10]
    assert numbers("target/images") == list(range(1, 12))
    assert numbers("target/labels") == [1, 2, 6, 7, 11]  # two of five; by number, not by name
    assert (root / "classes.txt").read_text("utf-8") == "road\nsidewalk\nother\n"
    for name, expected in (
        ("source/labels/5.png", [ROAD, ROAD, SIDEWALK, OTHER, OTHER]),
        ("target/labels/2.png", [VOID, VOID, ROAD, SIDEWALK, SIDEWALK, OTHER, OTHER]),
    ):
        with Image.open(root / name.replace("labels", "images")) as image:
            assert image.size == (240, 120)
        with Image.open(root / name) as file:
            label = np.asarray(file)
        assert label.shape == (120, 240)
        step = 240 / len(expected)
        middles = [label[60, int((i + 0.5) * step)] for i in range(len(expected))]
        assert middles == expected
        assert set(np.unique(label)) == set(expected)  # resizing adds no id
