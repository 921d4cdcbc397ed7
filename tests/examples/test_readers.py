"""Readers: true formats, errors that name the file and the mend, geometry, and sealed labels."""

import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import readers
import torch
from classes import IGNORE, PALETTE
from numpy.typing import NDArray
from PIL import Image
from readers import (
    DatasetError,
    LabeledImages,
    Pair,
    ResizeAndCrop,
    UnlabeledImages,
    cityscapes_images,
    cityscapes_pairs,
    gta5_pairs,
    synthia_pairs,
)
from torch import Tensor
from torch.utils.data import DataLoader

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
WHOLE = ResizeAndCrop("height:20")


def _save(path: Path, pixels: NDArray[np.uint8], *, palette: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(PALETTE.tobytes())
    image.save(path)
    return path


def _load(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def _pixels(height: int, width: int) -> NDArray[np.uint8]:
    """Give an image whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.full_like(rows, 9)], -1).astype(np.uint8)


def _raw(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).choice([0, 7, 8, 26, 34, 255], (height, width)).astype(np.uint8)


def _save_rgb_16(path: Path, width: int, filtered: bytes, parts: int = 1) -> Path:
    """Write a 16-bit RGB PNG from its rows, each its filter type and then its filtered bytes."""
    height = len(filtered) // (1 + 6 * width)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    packed = zlib.compress(filtered)
    cuts = [len(packed) * part // parts for part in range(parts + 1)]
    chunks = [(b"IHDR", header)]
    chunks += [(b"IDAT", packed[start:end]) for start, end in pairwise(cuts)]
    chunks += [(b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        crc = struct.pack(">I", zlib.crc32(name + data))
        content += struct.pack(">I", len(data)) + name + data + crc
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _save_synthia(path: Path, ids: NDArray[np.uint16]) -> Path:
    """Write a label as SYNTHIA does: class and instance in the first two of three channels."""
    instances = np.arange(ids.size, dtype=np.uint16).reshape(ids.shape) * 37
    channels = np.stack([ids, instances, np.zeros_like(ids)], -1).astype(">u2")
    return _save_rgb_16(path, ids.shape[1], b"".join(b"\0" + row.tobytes() for row in channels))


def _synthia_ids(height: int, width: int) -> NDArray[np.uint16]:
    return np.random.default_rng(0).integers(0, 23, (height, width), np.uint16)


@pytest.fixture
def synthia(tmp_path: Path) -> Path:
    for index, (height, width) in enumerate([(20, 36), (22, 34), (20, 36)]):
        _save(tmp_path / "RGB" / f"{index:07d}.png", _pixels(height, width))
        path = tmp_path / "GT" / "LABELS" / f"{index:07d}.png"
        _save_synthia(path, _synthia_ids(height, width))
        _save(tmp_path / "GT" / "COLOR" / path.name, _pixels(height, width))
    return tmp_path


@pytest.fixture
def gta5(tmp_path: Path) -> Path:
    for index, (height, width) in enumerate([(20, 36), (22, 34), (20, 36)], start=1):
        _save(tmp_path / "images" / f"{index:05d}.png", _pixels(height, width))
        raw = _raw(height, width)
        _save(tmp_path / "labels" / f"{index:05d}.png", raw, palette=index > 1)
    return tmp_path


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    for split, city in (("train", "ulm"), ("train", "aachen"), ("val", "bonn")):
        stem = f"{split}/{city}/{city}_000000_000019"
        _save(tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png", _pixels(20, 40))
        _save(tmp_path / "gtFine" / f"{stem}_gtFine_labelIds.png", _raw(20, 40))
        _save(tmp_path / "gtFine" / f"{stem}_gtFine_color.png", _pixels(20, 40))
    return tmp_path


def _message(act: Callable[[], object]) -> str:
    with pytest.raises(DatasetError) as caught:
        act()
    return str(caught.value)


# ---- listing ------------------------------------------------------------------------------------


def test_gta5_pairs_and_both_label_modes(gta5: Path) -> None:
    pairs = gta5_pairs(gta5)
    assert [pair.image.name for pair in pairs] == ["00001.png", "00002.png", "00003.png"]
    for (image, labels), pair in zip(_items(LabeledImages(pairs, WHOLE)), pairs, strict=True):
        raw = _load(pair.label)
        assert image.dtype == torch.float32
        assert labels.dtype == torch.int64
        expected = np.select([raw == 7, raw == 8, raw == 26], [0, 1, 13], IGNORE)
        assert torch.equal(labels, torch.from_numpy(expected))


def _items(dataset: LabeledImages) -> Iterator[tuple[Tensor, Tensor]]:
    return (dataset[index] for index in range(len(dataset)))


def test_cityscapes_lists_all_cities_of_a_split(cityscapes: Path) -> None:
    assert [path.parent.name for path in cityscapes_images(cityscapes, "train")] == [
        "aachen",
        "ulm",
    ]
    (pair,) = cityscapes_pairs(cityscapes, "val")
    assert pair.label.name == "bonn_000000_000019_gtFine_labelIds.png"


def test_hidden_files_of_archives_are_skipped(gta5: Path) -> None:
    (gta5 / "images" / "._00001.png").write_bytes(b"resource fork")
    assert len(gta5_pairs(gta5)) == 3


def test_missing_folder_names_what_is_there_instead(gta5: Path) -> None:
    (gta5 / "images").rename(gta5 / "pictures")
    message = _message(lambda: gta5_pairs(gta5))
    assert f"Expected the folder {gta5 / 'images'}" in message
    assert "holds labels, pictures" in message
    assert "Pass the folder that holds images/ and labels/" in message


def test_missing_root_names_its_parent(tmp_path: Path) -> None:
    message = _message(lambda: cityscapes_images(tmp_path / "nowhere", "train"))
    assert str(tmp_path / "nowhere" / "leftImg8bit" / "train") in message
    assert f"{tmp_path} is empty" in message


def test_folder_without_images(cityscapes: Path) -> None:
    for image in (cityscapes / "leftImg8bit" / "val").rglob("*.png"):
        image.rename(image.with_suffix(".jpg"))
    message = _message(lambda: cityscapes_pairs(cityscapes, "val"))
    assert "*_leftImg8bit.png" in message
    assert "val holds bonn" in message


def test_image_without_label(gta5: Path) -> None:
    (gta5 / "labels" / "00002.png").unlink()
    message = _message(lambda: gta5_pairs(gta5))
    assert f"{gta5 / 'images' / '00002.png'} has no label" in message
    assert "1 of 3 images" in message
    assert "Unpack the missing labels" in message


def test_label_without_image(gta5: Path) -> None:
    (gta5 / "images" / "00002.png").unlink()
    message = _message(lambda: gta5_pairs(gta5))
    assert f"{gta5 / 'labels' / '00002.png'} has no image" in message
    assert "Unpack the missing images" in message


def test_validation_needs_labels(cityscapes: Path) -> None:
    next((cityscapes / "gtFine" / "val").rglob("*_labelIds.png")).unlink()
    message = _message(lambda: cityscapes_pairs(cityscapes, "val"))
    assert "*_gtFine_labelIds.png" in message


def test_label_of_another_size(gta5: Path) -> None:
    _save(gta5 / "labels" / "00002.png", _raw(11, 17))
    message = _message(lambda: gta5_pairs(gta5))
    assert f"{gta5 / 'labels' / '00002.png'} is 17x11" in message
    assert "00002.png is 34x22" in message
    assert "remove the pair" in message


def test_color_label(gta5: Path) -> None:
    _save(gta5 / "labels" / "00002.png", _pixels(22, 34))
    message = _message(lambda: gta5_pairs(gta5))
    assert str(gta5 / "labels" / "00002.png") in message
    assert "got mode RGB" in message
    assert "use the label id files" in message


@pytest.mark.parametrize("folder", ["images", "labels"])
def test_file_that_is_no_image(gta5: Path, folder: str) -> None:
    path = gta5 / folder / "00002.png"
    path.write_text("<html>404</html>")
    message = _message(lambda: gta5_pairs(gta5))
    assert f"{path} is not a readable image" in message
    assert "download it again" in message


def test_target_image_that_is_no_image(cityscapes: Path) -> None:
    path = next((cityscapes / "leftImg8bit" / "train").rglob("*.png"))
    path.write_bytes(b"")
    assert str(path) in _message(lambda: cityscapes_images(cityscapes, "train"))


# ---- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["images", "labels"])
def test_truncated_file(gta5: Path, folder: str) -> None:
    path = gta5 / folder / "00001.png"
    path.write_bytes(path.read_bytes()[:-40])
    message = _message(lambda: gta5_pairs(gta5))  # known before training
    assert f"{path} is not a readable image" in message
    assert "download it again" in message


def test_broken_pixels(gta5: Path) -> None:
    path = gta5 / "images" / "00001.png"
    content = bytearray(path.read_bytes())
    start = content.index(b"IDAT") + 4
    content[start : start + 20] = bytes(20)
    path.write_bytes(content)
    dataset = LabeledImages(gta5_pairs(gta5), WHOLE)
    assert f"{path} is not a readable image" in _message(lambda: dataset[0])


def test_unknown_id(gta5: Path) -> None:
    raw = _raw(20, 36)
    raw[3, 4] = 77
    path = _save(gta5 / "labels" / "00001.png", raw)
    dataset = LabeledImages(gta5_pairs(gta5), WHOLE)
    message = _message(lambda: dataset[0])
    assert str(path) in message
    assert "[77]" in message
    assert "raw label ids" in message


def test_error_in_a_worker_names_the_file(gta5: Path) -> None:
    path = gta5 / "images" / "00003.png"
    path.write_bytes(path.read_bytes()[:-40])
    images = UnlabeledImages(
        sorted((gta5 / "images").iterdir()), ResizeAndCrop("height:20", (8, 8))
    )
    with pytest.raises(DatasetError, match=re.escape(str(path))):
        list(DataLoader(images, batch_size=2, num_workers=1))


def test_labels_of_the_target_training_images_are_never_opened(cityscapes: Path) -> None:
    for label in (cityscapes / "gtFine" / "train").rglob("*.png"):
        label.write_bytes(b"corrupt")
    images = UnlabeledImages(cityscapes_images(cityscapes, "train"), WHOLE)
    batches = list(DataLoader(images, batch_size=2))
    assert [type(batch) for batch in batches] == [Tensor]
    assert batches[0].shape == (2, 3, 20, 40)
    assert len(cityscapes_pairs(cityscapes, "val")) == 1


# ---- SYNTHIA's labels ---------------------------------------------------------------------------


def test_synthia_pairs_and_their_train_ids(synthia: Path) -> None:
    pairs = synthia_pairs(synthia)
    assert [pair.image for pair in pairs] == sorted((synthia / "RGB").iterdir())
    assert [pair.label for pair in pairs] == sorted((synthia / "GT" / "LABELS").iterdir())
    train_id_of = [255, 10, 2, 0, 1, 4, 8, 5, 13, 7, 11, 18, 17, 255, 255, 6]
    train_id_of += [255, 12, 255, 15, 255, 3, 255]
    for image, labels in _items(LabeledImages(pairs, WHOLE)):
        ids = _synthia_ids(*labels.shape)
        assert image.shape == (3, 20, round(20 * labels.shape[1] / labels.shape[0]))
        assert labels.dtype == torch.int64
        assert torch.equal(labels, torch.tensor(train_id_of)[torch.from_numpy(ids).long()])


# Samples (3, 515, 0) (8, 260, 0) over (21, 770, 0) (1, 256, 0), filtered by hand.
UPPER = "00 000302030000 000801040000"


@pytest.mark.parametrize(
    "lower",
    [
        "00 001503020000 000101000000",
        "01 001503020000 00ecfefe0000",
        "02 001201ff0000 00f900fc0000",
        "03 001402010000 00f3fffd0000",
        "04 001201ff0000 00ecfffd0000",
    ],
    ids=["none", "sub", "up", "average", "paeth"],
)
def test_each_filter_type_by_hand(tmp_path: Path, lower: str) -> None:
    label = _save_rgb_16(tmp_path / "label.png", 2, bytes.fromhex(UPPER + lower))
    image = _save(tmp_path / "image.png", _pixels(2, 2))
    _, labels = LabeledImages([Pair(image, label)], ResizeAndCrop("height:2"))[0]
    assert labels.tolist() == [[0, 13], [3, 10]]


def _filtered(rows: NDArray[np.uint8], kinds: Sequence[int]) -> bytes:
    """Filter rows (H, bytes) as the PNG specification says, one byte after the other."""
    content = bytearray()
    for y, kind in enumerate(kinds):
        content.append(kind)
        for x in range(rows.shape[1]):
            a = int(rows[y, x - 6]) if x >= 6 else 0
            b = int(rows[y - 1, x]) if y else 0
            c = int(rows[y - 1, x - 6]) if y and x >= 6 else 0
            paeth = min((a, b, c), key=lambda value: abs(a + b - c - value))
            predicted = (0, a, b, (a + b) // 2, paeth)[kind]
            content.append((int(rows[y, x]) - predicted) % 256)
    return bytes(content)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kinds", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (3, 3, 4, 4, 1), (4,), (2,)])
def test_every_16_bit_sample_is_read_whole(
    tmp_path: Path, kinds: tuple[int, ...], parts: int
) -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (len(kinds), 13, 3), np.uint16)
    samples[0, :4, 0] = (0, 255, 256, 65535)
    rows = samples.astype(">u2").view(np.uint8).reshape(len(kinds), -1)
    path = _save_rgb_16(tmp_path / "label.png", 13, _filtered(rows, kinds), parts)
    channel = readers._read_first_channel(path)
    assert channel.dtype == np.uint16
    assert np.array_equal(channel, samples[..., 0])


def test_synthia_labels_are_cropped_with_their_image(tmp_path: Path) -> None:
    ids = np.arange(1, 13, dtype=np.uint16).repeat(10)[None].repeat(60, 0)
    label = _save_synthia(tmp_path / "label.png", ids)
    image = _save(tmp_path / "image.png", _pixels(60, 120))
    dataset = LabeledImages([Pair(image, label)], ResizeAndCrop("height:60", (24, 32), flip=True))
    train_id_of = torch.tensor([255, 10, 2, 0, 1, 4, 8, 5, 13, 7, 11, 18, 17])
    for seed in range(6):
        torch.manual_seed(seed)
        pixels, labels = dataset[0]
        columns = (pixels[0] * 255).round().long()
        assert torch.equal(labels, train_id_of[1 + columns // 10])


def test_synthia_missing_label_folder(synthia: Path) -> None:
    (synthia / "GT" / "LABELS").rename(synthia / "GT" / "IDS")
    message = _message(lambda: synthia_pairs(synthia))
    assert f"Expected the folder {synthia / 'GT' / 'LABELS'}" in message
    assert "GT holds COLOR, IDS" in message
    assert "RGB/ and GT/LABELS/ (SYNTHIA)" in message


def test_gta5_folder_taken_for_synthia(gta5: Path) -> None:
    message = _message(lambda: synthia_pairs(gta5))
    assert f"Expected the folder {gta5 / 'RGB'}" in message
    assert "holds images, labels" in message


def test_synthia_image_without_label(synthia: Path) -> None:
    (synthia / "GT" / "LABELS" / "0000001.png").unlink()
    message = _message(lambda: synthia_pairs(synthia))
    assert f"{synthia / 'RGB' / '0000001.png'} has no label" in message
    assert "1 of 3 images" in message


def test_synthia_label_without_image(synthia: Path) -> None:
    (synthia / "RGB" / "0000001.png").unlink()
    message = _message(lambda: synthia_pairs(synthia))
    assert f"{synthia / 'GT' / 'LABELS' / '0000001.png'} has no image" in message
    assert str(synthia / "RGB" / "0000001.png") in message


def test_synthia_label_of_another_size(synthia: Path) -> None:
    path = _save_synthia(synthia / "GT" / "LABELS" / "0000001.png", _synthia_ids(11, 17))
    message = _message(lambda: synthia_pairs(synthia))
    assert f"{path} is 17x11" in message
    assert "0000001.png is 34x22" in message


@pytest.mark.parametrize(("color", "mode"), [(True, "RGB"), (False, "L")])
def test_synthia_label_of_8_bits(synthia: Path, color: bool, mode: str) -> None:
    pixels = _pixels(22, 34) if color else _raw(22, 34)
    path = _save(synthia / "GT" / "LABELS" / "0000001.png", pixels)
    message = _message(lambda: synthia_pairs(synthia))
    assert f"{path}: expected a 16-bit RGB PNG" in message
    assert f"got mode {mode}." in message
    assert "GT/LABELS as they come" in message


def test_synthia_label_taken_for_gta5(gta5: Path) -> None:
    path = _save_synthia(gta5 / "labels" / "00002.png", _synthia_ids(22, 34))
    message = _message(lambda: gta5_pairs(gta5))
    assert f"{path}: expected a grayscale or paletted PNG" in message
    assert "got mode RGB;16B" in message


@pytest.mark.parametrize("folder", ["RGB", "GT/LABELS"])
@pytest.mark.parametrize("kept", [slice(0), slice(60), slice(-40), slice(-1)])
def test_synthia_truncated_file(synthia: Path, folder: str, kept: slice) -> None:
    path = synthia / folder / "0000001.png"
    path.write_bytes(path.read_bytes()[kept])
    message = _message(lambda: synthia_pairs(synthia))
    assert f"{path} is not a readable image" in message
    assert "download it again" in message


def test_synthia_broken_pixels(synthia: Path) -> None:
    path = synthia / "GT" / "LABELS" / "0000000.png"
    content = bytearray(path.read_bytes())
    start = content.index(b"IDAT") + 4
    content[start : start + 20] = bytes(20)
    path.write_bytes(content)
    dataset = LabeledImages(synthia_pairs(synthia), WHOLE)
    assert f"{path} is not a readable image" in _message(lambda: dataset[0])


def test_synthia_unknown_filter_type(synthia: Path) -> None:
    path = _save_rgb_16(synthia / "GT" / "LABELS" / "0000000.png", 36, (b"\5" + bytes(216)) * 20)
    dataset = LabeledImages(synthia_pairs(synthia), WHOLE)
    assert f"{path} is not a readable image" in _message(lambda: dataset[0])


@pytest.mark.parametrize("unknown", [23, 77, 256 + 3])
def test_synthia_unknown_id(synthia: Path, unknown: int) -> None:
    ids = _synthia_ids(20, 36)
    ids[3, 4] = unknown
    path = _save_synthia(synthia / "GT" / "LABELS" / "0000000.png", ids)
    dataset = LabeledImages(synthia_pairs(synthia), WHOLE)
    message = _message(lambda: dataset[0])
    assert str(path) in message
    assert f"[{unknown}]" in message
    assert "GT/LABELS as they come" in message


# ---- geometry -----------------------------------------------------------------------------------


def _one(tmp_path: Path, height: int, width: int, transform: ResizeAndCrop) -> LabeledImages:
    """Give a data set of one pair whose label is the column's sixth: train ids 0 to 5."""
    raw_of = np.array([7, 8, 11, 12, 13, 17], np.uint8)
    raw = raw_of[np.arange(width) * 6 // width][None].repeat(height, 0)
    label = _save(tmp_path / "label.png", raw)
    return LabeledImages(
        [Pair(_save(tmp_path / "image.png", _pixels(height, width)), label)], transform
    )


def test_unscaled_whole_image_is_exact(tmp_path: Path) -> None:
    image, labels = _one(tmp_path, 20, 36, WHOLE)[0]
    assert torch.equal(
        (image * 255).round().byte(), torch.from_numpy(_pixels(20, 36)).permute(2, 0, 1)
    )
    assert labels.shape == (20, 36)


def test_evaluation_scales_the_image_but_not_the_label(tmp_path: Path) -> None:
    image, labels = _one(tmp_path, 40, 72, ResizeAndCrop("height:20"))[0]
    assert image.shape == (3, 20, 36)
    assert labels.shape == (40, 72)


@pytest.mark.parametrize("height", [30, 60, 97])
def test_image_and_label_stay_together(tmp_path: Path, height: int) -> None:
    dataset = _one(tmp_path, 60, 120, ResizeAndCrop(f"height:{height}", (24, 32), flip=True))
    directions = set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, labels = dataset[0]
        assert image.shape == (3, 24, 32)
        assert labels.shape == (24, 32)
        columns = image[0] * 255
        assert int((columns * 6 / 120 - labels - 0.5).abs().gt(0.6).sum()) == 0
        directions.add(bool(columns[0, 0] < columns[0, -1]))
    assert directions == {True, False}


def test_unscaled_crop_is_a_window_of_both(tmp_path: Path) -> None:
    dataset = _one(tmp_path, 60, 120, ResizeAndCrop("height:60", (24, 32)))
    whole, whole_labels = _one(tmp_path, 60, 120, ResizeAndCrop("height:60"))[0]
    corners = set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, labels = dataset[0]
        left, top = (int((image[channel, 0, 0] * 255).round()) for channel in (0, 1))
        window = (slice(top, top + 24), slice(left, left + 32))
        assert torch.equal(image, whole[:, window[0], window[1]])
        assert torch.equal(labels, whole_labels[window])
        corners.add((top, left))
    assert len(corners) > 6


def test_every_corner_is_reached(tmp_path: Path) -> None:
    dataset = _one(tmp_path, 4, 4, ResizeAndCrop("height:4", (3, 3)))
    corners = set()
    for seed in range(40):
        torch.manual_seed(seed)
        corners.add(tuple((dataset[0][0][:2, 0, 0] * 255).round().int().tolist()))
    assert corners == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize(("height", "width"), [(20, 36), (37, 23), (24, 40), (1000, 30), (24, 41)])
def test_an_image_smaller_than_the_crop_is_scaled_to_cover_it(
    height: int, width: int, tmp_path: Path
) -> None:
    image, labels = _one(tmp_path, height, width, ResizeAndCrop("height:24", (24, 40)))[0]
    assert image.shape == (3, 24, 40)
    assert labels.shape == (24, 40)
    assert bool((labels < 19).all())  # nothing is padding


def test_image_alone_gets_the_same_geometry(tmp_path: Path) -> None:
    transform = ResizeAndCrop("height:45", (24, 32), flip=True)
    labeled = _one(tmp_path, 60, 120, transform)
    unlabeled = UnlabeledImages([tmp_path / "image.png"], transform)
    for seed in range(4):
        torch.manual_seed(seed)
        image, _ = labeled[0]
        torch.manual_seed(seed)
        assert torch.equal(unlabeled[0], image)


# ---- real files ---------------------------------------------------------------------------------


def _real(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"real samples are not at {DATA / name}")
    return DATA / name


def test_real_gta5_is_readable() -> None:
    dataset = LabeledImages(
        gta5_pairs(_real("gta5_sample")), ResizeAndCrop("height:526", (256, 448))
    )
    assert len(dataset) == 3
    image, labels = dataset[1]
    assert image.shape == (3, 256, 448)
    assert bool(((labels < 19) | (labels == IGNORE)).all())


def test_real_cityscapes_is_readable() -> None:
    root = _real("cityscapes_sample")
    assert len(cityscapes_images(root, "train")) == 6
    dataset = LabeledImages(cityscapes_pairs(root, "val"), ResizeAndCrop("height:256"))
    image, labels = dataset[0]
    assert image.shape == (3, 256, 512)
    assert labels.shape == (1024, 2048)
    assert len(set(labels.flatten().tolist())) > 8


def test_real_day_and_dusk_photographs_are_readable() -> None:
    root = _real("camvid_day_to_dusk")
    assert len(gta5_pairs(root / "source")) == 577
    assert len(cityscapes_images(root / "target", "train")) == 62
    assert len(cityscapes_pairs(root / "target", "val")) == 62
