"""Pairs of street data as a user gets them from two clones, here of two small repositories."""

from pathlib import Path

import numpy as np
import pytest
import street_pairs
from numpy.typing import NDArray
from PIL import Image
from street_pairs import CARLA, CITYSCAPES, VOID, git, write_pairs

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


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the pairs, written from two histories and a folder."""
    gray, files = np.full((80, 160, 3), 90, np.uint8), dict[str, NDArray[np.uint8]]()
    colors = np.array(COLORS, np.uint8)[np.newaxis].repeat(80, 0).repeat(32, 1)
    for number in range(12):
        files |= {f"{CARLA.images}/{number}.png": gray, f"{CARLA.labels}/{number}.png": colors}
    simulated = CARLA._replace(commit=commit(tmp_path / "carla", files))
    ids = np.array([IDS], np.uint8).repeat(70, 0).repeat(10, 1)
    files = {}
    for number in range(1, 12):
        for folder in (CITYSCAPES.images, CITYSCAPES.labels):
            files[f"{folder}/{number}.png"] = ids
    real = CITYSCAPES._replace(commit=commit(tmp_path / "cityscapes", files))
    monkeypatch.setattr(street_pairs, "CARLA", simulated)
    monkeypatch.setattr(street_pairs, "CITYSCAPES", real)
    raw = np.full((180, 240), 25, np.uint8)  # a bicyclist above and below the middle
    raw[30:150] = np.array([7, 20, 0], np.uint8).repeat(80)
    for kind in ("images", "labels"):
        (tmp_path / "camvid" / kind).mkdir(parents=True)
        for name in "abc":
            Image.fromarray(raw).save(tmp_path / "camvid" / kind / f"{name}.png")
    folders = (tmp_path / name for name in ("carla", "cityscapes", "pairs", "camvid"))
    write_pairs(*folders, step=5)
    return tmp_path / "pairs"


def test_all_of_the_source_and_two_of_five_target_images_have_labels(root: Path) -> None:
    def names(folder: str) -> list[str]:
        paths = (root / folder).iterdir()
        return sorted((path.stem for path in paths), key=lambda name: (len(name), name))

    of_carla = ["0", "5", "10"]
    assert names("carla-to-camvid/source/images") == of_carla
    pair = "carla-to-cityscapes"
    assert names(f"{pair}/source/images") == names(f"{pair}/source/labels") == of_carla
    assert names(f"{pair}/target/images") == [str(number) for number in range(1, 12)]
    # By number, not by name.
    assert names(f"{pair}/target/labels") == ["1", "2", "6", "7", "11"]
    pair = "cityscapes-to-camvid"
    assert len(names(f"{pair}/source/labels")) == 11
    assert names(f"{pair}/target/images") == ["a", "b", "c"]
    assert names(f"{pair}/target/labels") == ["a", "b"]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("carla-to-cityscapes/source/labels/5.png", ["road", "road", "sidewalk", "other", "other"]),
        (
            "carla-to-cityscapes/target/labels/2.png",
            ["", "", "road", "sidewalk", "sidewalk", "other", "other"],
        ),
        (
            "cityscapes-to-camvid/source/labels/2.png",
            ["", "", "road", "sidewalk", "sidewalk", "building", ""],  # walls are in no class
        ),
        ("cityscapes-to-camvid/target/labels/a.png", ["road", "pole", ""]),
        ("carla-to-camvid/target/labels/a.png", ["road", "other", ""]),
    ],
)
def test_labels_are_indices_of_the_classes(file: str, expected: list[str], root: Path) -> None:
    classes = (root / Path(file).parts[0] / "classes.txt").read_text("utf-8").split()
    assert len(classes) == (9 if "cityscapes-to" in file else 3)
    values = [classes.index(name) if name else VOID for name in expected]
    with Image.open(root / file.replace("labels", "images")) as image:
        assert image.size == (240, 120)
    with Image.open(root / file) as image:
        label = np.asarray(image)
    assert label.shape == (120, 240)
    step = 240 / len(values)
    assert [label[60, int((i + 0.5) * step)] for i in range(len(values))] == values
    assert set(np.unique(label)) == set(values)  # resizing adds no id
