"""The synthetic pair: formats, classes, reproducibility, interrupted and foreign folders."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import synthetic
from classes import CLASSES, IGNORE, NUM_CLASSES, SYNTHIA_16, train_ids
from folders import write_folders
from image_files import read_first_channel
from numpy.typing import NDArray
from PIL import Image
from readers import (
    LabeledImages,
    ResizeAndCrop,
    cityscapes_images,
    cityscapes_pairs,
    gta5_pairs,
    synthia_pairs,
)
from synthetic import SourceFormat, write_synthetic_pair

from image_folders import open_data, read_classes


def _write(root: Path, seed: int = 0, *, source_format: SourceFormat = "gta5") -> tuple[Path, Path]:
    return write_synthetic_pair(
        root, seed=seed, source_images=3, target_images=2, val_images=2, height=48,
        source_format=source_format,
    )  # fmt: skip


def _header(path: Path) -> tuple[str, tuple[int, int]]:
    with Image.open(path) as image:
        return image.mode, image.size


def _labels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return train_ids(np.asarray(image))


def _digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_synthetic_pair(
        tmp_path_factory.mktemp("pair"), seed=0, source_images=24, target_images=8, val_images=16
    )


def test_layout_modes_and_sizes(pair: tuple[Path, Path]) -> None:
    source, target = pair
    sizes = set()
    for image, label in gta5_pairs(source):
        assert _header(label)[0] == "P"
        mode, size = _header(image)
        assert mode == "RGB"
        sizes.add(size)
    assert len(sizes) > 1
    assert all(248 <= width <= 264 and 139 <= height <= 149 for width, height in sizes)
    for image, label in cityscapes_pairs(target, "val"):
        assert _header(image) == ("RGB", (288, 144))
        assert _header(label) == ("L", (288, 144))
    assert len(cityscapes_images(target, "train")) == 8
    assert len(cityscapes_pairs(target, "train")) == 8
    assert len(list((target / "leftImg8bit" / "val").iterdir())) > 1


def test_every_class_and_ignored_pixels_occur_in_both_domains(pair: tuple[Path, Path]) -> None:
    source, target = pair
    for pairs in (gta5_pairs(source), cityscapes_pairs(target, "val")):
        labels = [_labels(pair.label) for pair in pairs]
        images_with = np.sum([np.bincount(ids.ravel(), minlength=256) > 0 for ids in labels], 0)
        assert (images_with[:NUM_CLASSES] >= 2).all()
        assert images_with[255] > 0


def test_synthia_source_shows_the_scenes_of_the_gta5_source(tmp_path: Path) -> None:
    gta5, target = _write(tmp_path / "gta5")
    synthia, same_target = _write(tmp_path / "synthia", source_format="synthia")
    assert _digests(target) == _digests(same_target)
    assert [path.name for path in sorted(synthia.iterdir())] == ["GT", "RGB"]
    whole = ResizeAndCrop("height:48")
    pairs = synthia_pairs(synthia)
    assert [pair.image.name for pair in pairs] == ["0000000.png", "0000001.png", "0000002.png"]
    for pair, same in zip(pairs, gta5_pairs(gta5), strict=True):
        assert pair.image.read_bytes() == same.image.read_bytes()
        expected = _labels(same.label)
        expected[~np.isin(expected, SYNTHIA_16)] = IGNORE
        _, labels = LabeledImages([pair], whole)[0]
        assert np.array_equal(labels.numpy(), expected)


def test_every_painted_id_is_written_as_synthia_has_it(tmp_path: Path) -> None:
    painted = np.array([[0, 1, 4, *(entry.raw_id for entry in CLASSES)]] * 2, np.uint8)
    synthetic._write_synthia(tmp_path, 0, np.zeros((*painted.shape, 3), np.uint8), painted)
    _, labels = LabeledImages(synthia_pairs(tmp_path), ResizeAndCrop("height:2"))[0]
    expected = [c if c in SYNTHIA_16 else IGNORE for c in range(NUM_CLASSES)]
    assert labels.tolist() == [[IGNORE, IGNORE, IGNORE, *expected]] * 2


def test_every_16_bit_sample_is_written(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), np.uint16)
    content = synthetic._png_of_16_bits(samples)
    for first in range(3):  # the reader knows the first channel
        path = tmp_path / f"{first}.png"
        path.write_bytes(synthetic._png_of_16_bits(np.roll(samples, -first, 2)))
        assert np.array_equal(read_first_channel(path), samples[..., first])
    with Image.open(io.BytesIO(content)) as image:
        image.verify()  # the checksums
        assert image.size == (7, 5)


def test_source_formats_are_told_apart(tmp_path: Path) -> None:
    _write(tmp_path / "a")
    before = _digests(tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "complete.json").read_text())
    assert "source_format" not in settings  # pairs from before there was a choice stay complete
    _write(tmp_path / "a", source_format="synthia")
    _write(tmp_path / "b", source_format="synthia")
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")  # nothing of GTA5's layout is left
    stamp = (tmp_path / "a" / "source" / "RGB" / "0000000.png").stat().st_mtime_ns
    _write(tmp_path / "a", source_format="synthia")
    assert (tmp_path / "a" / "source" / "RGB" / "0000000.png").stat().st_mtime_ns == stamp
    _write(tmp_path / "a")
    assert _digests(tmp_path / "a") == before


def test_same_seed_gives_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _write(tmp_path / name, seed)
    first, second, third = (_digests(tmp_path / name) for name in "abc")
    assert first == second
    assert first.keys() == third.keys()
    assert all(first[name] != third[name] for name in first)


def test_complete_pair_is_reused_and_other_settings_rewrite_it(tmp_path: Path) -> None:
    source, _ = _write(tmp_path)
    image = source / "images" / "00001.png"
    stamp = image.stat().st_mtime_ns
    _write(tmp_path)
    assert image.stat().st_mtime_ns == stamp
    before = _digests(tmp_path)
    _write(tmp_path, seed=1)
    assert _digests(tmp_path)["source/images/00001.png"] != before["source/images/00001.png"]


def test_interrupted_write_is_started_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "_write_target", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _write(tmp_path / "a")
    assert not (tmp_path / "a" / "complete.json").exists()
    _write(tmp_path / "a")
    _write(tmp_path / "b")
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")


def test_foreign_data_is_never_removed(tmp_path: Path) -> None:
    precious = tmp_path / "source" / "images" / "00001.png"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"source exists .* Choose another folder"):
        _write(tmp_path)
    assert precious.read_bytes() == b"precious"


def test_folders_are_what_the_class_list_says(tmp_path: Path) -> None:
    write_folders(tmp_path, images=(3, 2, 2), height=48)
    classes = read_classes(tmp_path / "classes.txt")
    data = open_data(tmp_path / "source", tmp_path / "target", tmp_path / "classes.txt", (48, 64))
    counts = [len(data.source.images) + len(data.held_out.images), len(data.target.images)]
    assert [*counts, len(data.evaluation.images)] == [3, 2, 2]
    assert len(classes) == 12
    assert len(data.source.labels.unique()) > 6
    assert len(list((tmp_path / "target" / "labels").iterdir())) == 2  # no label to adapt with
    before = _digests(tmp_path)
    write_folders(tmp_path, images=(9, 9, 9))  # complete
    assert _digests(tmp_path) == before
