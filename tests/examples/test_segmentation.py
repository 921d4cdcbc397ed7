"""Own images, one file: runs whole, resumes, predicts; refuses files and classes that do not fit."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("kornia", reason="the examples extra is not installed")

import segmentation
from segmentation import DataError, Options, open_data, read_classes

CLASSES = "road: 7\nsidewalk: 8\nbuilding: 11, 12\nsky: 23\ncar: 26\n"
IDS = (0, 7, 8, 11, 12, 23, 26)


def write(
    folder: Path,
    stem: str,
    ids: Sequence[int] = IDS,
    *,
    size: tuple[int, int] = (30, 40),
    image: str = "jpg",
    labeled: bool = True,
) -> NDArray[np.uint8]:
    """An image whose blocks of color are its classes, and its label."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(map(ord, stem)))
    blocks = rng.choice(ids, (3, 4)).astype(np.uint8)
    labels = np.kron(blocks, np.ones((size[0] // 3, size[1] // 4), np.uint8))
    pixels = np.stack([labels * 9, labels * 5, 255 - labels * 7], -1)
    Image.fromarray(pixels).save(folder / "images" / f"{stem}.{image}")
    if labeled:
        Image.fromarray(labels).save(folder / "labels" / f"{stem}.png")
    return labels


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """Five classes, ids not from 0, jpg beside png, a target of other sizes; and few steps."""
    for index in range(10):
        write(tmp_path / "source", f"s{index}")
    for index in range(30):
        size = (30 + 3 * index, 40 + 4 * index)
        write(tmp_path / "target", f"t{index}", size=size, labeled=index >= 26, image="JPG")
    (tmp_path / "classes.txt").write_text(CLASSES)
    return Options(
        output=tmp_path / "out",
        source=tmp_path / "source",
        target=tmp_path / "target",
        classes=tmp_path / "classes.txt",
        size=(32, 48),
        warmup_iterations=4,
        stages=2,
        stage_iterations=2,
        batch=2,
        threads=1,
        control=True,
        device="cpu",
    )


def arguments(options: Options) -> list[str]:
    return [
        *("--output", str(options.output), "--source", str(options.source)),
        *("--target", str(options.target), "--classes", str(options.classes)),
        *("--size", "32", "48", "--warmup-iterations", "4", "--stages", "2"),
        *("--stage-iterations", "2", "--batch", "2", "--threads", "1", "--control"),
        *("--device", "cpu"),
    ]


def test_runs_from_folders_to_masks(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    segmentation.main(arguments(options))
    said = capsys.readouterr().out
    assert "% ignored, ids [0]" in said
    table = [line for line in said.splitlines() if line.startswith("|")]
    assert table[0] == "| IoU (%) | source only | control | adapted | change |"
    assert [row.split(" | ")[0] for row in table[2:]] == [
        *("| road", "| sidewalk", "| building", "| sky", "| car", "| mean")
    ]
    scores = json.loads((options.output / "scores.json").read_text())
    adapted = [v for name, v in scores["adapted"].items() if name != "mean" and v == v]
    assert scores["adapted"]["mean"] == pytest.approx(sum(adapted) / len(adapted))
    with Image.open(options.output / "pictures.png") as picture:
        assert picture.size[0] > 1000

    write(options.output / "new", "a", size=(60, 80), image="bmp")
    segmentation.main(
        ["--output", str(options.output), "--predict", str(options.output / "new" / "images")]
    )
    with Image.open(options.output / "masks" / "a.png") as mask:
        assert mask.size == (80, 60)
        assert set(np.unique(np.asarray(mask))) <= {7, 8, 11, 23, 26}  # the first id of each class
