"""Readers: true formats, errors that name all bad files, geometry, and sealed labels."""

import io
import re
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from classes import CLASSES, IGNORE, PALETTE, Classes, train_ids
from hypothesis import given
from hypothesis import strategies as st
from image_files import read_first_channel, read_header, read_rgb
from numpy.typing import NDArray
from PIL import Image
from readers import (
    DatasetError,
    DatasetWarning,
    LabeledImages,
    Pair,
    ResizeAndCrop,
    UnlabeledImages,
    cityscapes_images,
    cityscapes_pairs,
    content_difference,
    content_of,
    count_labels,
    folder_target,
    gta5_pairs,
    read_labels,
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
    """Return an image whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.full_like(rows, 9)], -1).astype(np.uint8)


def _raw(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).choice([0, 7, 8, 26, 34, 255], (height, width)).astype(np.uint8)


def _png(
    width: int, bits: int, color: int, filtered: bytes, *, height: int, parts: int = 1
) -> bytes:
    """Write a PNG by hand from its rows, each its filter type and then its filtered bytes."""
    packed = zlib.compress(filtered)
    cuts = [len(packed) * part // parts for part in range(parts + 1)]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))]
    chunks += [(b"PLTE", bytes(range(48)))] if color == 3 else []
    chunks += [(b"IDAT", packed[start:end]) for start, end in pairwise(cuts)]
    chunks += [(b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        crc = struct.pack(">I", zlib.crc32(name + data))
        content += struct.pack(">I", len(data)) + name + data + crc
    return content


def _save_rgb_16(path: Path, width: int, filtered: bytes, parts: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    height = len(filtered) // (1 + 6 * width)
    path.write_bytes(_png(width, 16, 2, filtered, height=height, parts=parts))
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


class Layout(NamedTuple):
    """A source of three pairs as one of the data sets lays it out."""

    root: Path
    read: Callable[..., list[Pair]]
    images: Path
    labels: Path


@pytest.fixture(params=["gta5", "synthia"])
def layout(request: pytest.FixtureRequest) -> Layout:
    root = request.getfixturevalue(request.param)
    if request.param == "gta5":
        return Layout(root, gta5_pairs, root / "images", root / "labels")
    return Layout(root, synthia_pairs, root / "RGB", root / "GT" / "LABELS")


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


@pytest.mark.parametrize("part", ["images", "labels"])
def test_missing_folder_names_what_is_there_instead(layout: Layout, part: str) -> None:
    folder: Path = getattr(layout, part)
    folder.rename(folder.with_name("other"))
    message = _message(lambda: layout.read(layout.root))
    assert f"Expected the folder {folder}" in message
    there = ", ".join(sorted(path.name for path in folder.parent.iterdir()))
    assert f"{folder.parent.name} holds {there}" in message
    assert "Pass the folder that holds images/ and labels/" in message
    assert "RGB/ and GT/LABELS/ (SYNTHIA)" in message


def test_missing_root_names_its_parent(tmp_path: Path) -> None:
    message = _message(lambda: cityscapes_images(tmp_path / "nowhere", "train"))
    assert str(tmp_path / "nowhere" / "leftImg8bit" / "train") in message
    assert f"{tmp_path} is empty" in message


def test_folder_without_images(cityscapes: Path) -> None:
    for image in (cityscapes / "leftImg8bit" / "val").rglob("*.png"):
        image.unlink()
    message = _message(lambda: cityscapes_pairs(cityscapes, "val"))
    assert "*_leftImg8bit.png" in message
    assert "val holds bonn, and" in message
    assert "bonn is empty" in message


def test_validation_needs_labels(cityscapes: Path) -> None:
    next((cityscapes / "gtFine" / "val").rglob("*_labelIds.png")).unlink()
    message = _message(lambda: cityscapes_pairs(cityscapes, "val"))
    assert "*_gtFine_labelIds.png" in message


def _break(layout: Layout) -> dict[Path, str]:
    """Spoil pairs in every way there is; what each file is to be blamed for."""
    label = min(layout.labels.iterdir()).read_bytes()
    blamed = {}
    for kind in range(8):
        image_path, label_path = (part / f"bad{kind}.png" for part in layout[2:])
        _save(image_path, _pixels(20, 36))
        label_path.write_bytes(label)
        if kind == 0:
            image_path.write_text("<html>404</html>")
            blamed[image_path] = "a web page"
        elif kind == 1:
            label_path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
            blamed[label_path] = "git lfs pull"
        elif kind == 2:
            label_path.unlink()
            blamed[image_path] = "has no label"
        elif kind == 3:
            image_path.unlink()
            blamed[label_path] = "has no image"
        elif kind == 4:
            _save(image_path, _pixels(44, 72))
            blamed[label_path] = "is 36x20, but its image"
        elif kind == 5:
            _save(label_path, _pixels(20, 36))
            blamed[label_path] = "got mode RGB, which holds colors"
        elif kind == 6:
            label_path.write_bytes(b"")
            blamed[label_path] = "the file is empty"
        else:
            image_path.write_bytes(image_path.read_bytes()[:-40])
            blamed[image_path] = "is not a readable image"
            label_path.unlink()
            Image.new("L", (36, 20)).save(label_path.with_suffix(".jpg"))
            blamed[label_path.with_suffix(".jpg")] = "got a JPEG"
    return blamed


def test_all_bad_pairs_are_named_at_once_and_can_be_left_out(layout: Layout) -> None:
    good = layout.read(layout.root)
    blamed = _break(layout)
    message = _message(lambda: layout.read(layout.root))
    for path, fault in blamed.items():
        assert re.search(f"{re.escape(str(path))}.*{re.escape(fault)}", message), (path, message)
    assert "8 of 11 pairs cannot be used" in message
    assert "--skip-bad" in message
    with pytest.warns(DatasetWarning, match="8 of 11 pairs are left out"):
        assert layout.read(layout.root, skip_bad=True) == good


def test_target_images_that_are_bad_are_named_at_once(cityscapes: Path) -> None:
    first, second = sorted((cityscapes / "leftImg8bit" / "train").rglob("*.png"))
    first.write_bytes(b"")
    message = _message(lambda: cityscapes_images(cityscapes, "train"))
    assert f"{first} is not a readable image (the file is empty)" in message
    with pytest.warns(DatasetWarning, match="1 of 2 images are left out"):
        assert cityscapes_images(cityscapes, "train", skip_bad=True) == [second]
    second.unlink()
    second.mkdir()
    message = _message(lambda: cityscapes_images(cityscapes, "train", skip_bad=True))
    assert f"{second} is not a readable image (not a regular file)" in message


def test_labels_of_almost_the_size_of_their_images_are_scaled_to_them(gta5: Path) -> None:
    path = gta5 / "labels" / "00002.png"
    _save(path, np.repeat(np.array([[7], [8]], np.uint8), 10, 0).repeat(32, 1))  # of 22x34
    with pytest.warns(DatasetWarning, match=rf"(?s)scaled to them.*{path} is 32x20"):
        pairs = gta5_pairs(gta5)
    dataset = LabeledImages(pairs, ResizeAndCrop("height:22", (22, 34)))
    _, labels = dataset[1]
    assert labels.shape == (22, 34)
    assert labels[:11].eq(0).all()
    assert labels[11:].eq(1).all()


def test_files_that_were_derived_from_labels_are_left_alone(layout: Layout) -> None:
    pairs = layout.read(layout.root)
    for _, label in pairs:
        for ending in ("_labelTrainIds.png", "_color.PNG", ".instances.tif"):
            shutil.copy(label, label.with_name(label.stem + ending))
    assert layout.read(layout.root) == pairs


def test_labels_of_other_names_are_said_once(gta5: Path) -> None:
    for label in (gta5 / "labels").iterdir():
        label.rename(label.with_stem(label.stem + "_mask"))
    message = _message(lambda: gta5_pairs(gta5))
    assert f"expected {gta5 / 'labels' / '00001.png'}" in message
    assert "00001_mask.png, 00002_mask.png" in message


def test_two_files_of_one_name(gta5: Path) -> None:
    shutil.copy(gta5 / "images" / "00002.png", gta5 / "images" / "00002.JPG")
    message = _message(lambda: gta5_pairs(gta5))
    assert "00002.png has the name of 00002.JPG" in message


def test_images_of_other_kinds_are_not_passed_over(gta5: Path) -> None:
    with Image.open(gta5 / "images" / "00002.png") as image:
        image.save(gta5 / "images" / "00004.webp")
    (gta5 / "images" / "notes.txt").write_text("are passed over")
    message = _message(lambda: gta5_pairs(gta5))
    assert f"{gta5 / 'images' / '00004.webp'}: expected one of .bmp, .jpeg" in message


# ---- kinds of files -----------------------------------------------------------------------------

EIGHT = Classes(
    tuple("abcdefgh"),
    tuple((k + 1, 0, 0) for k in range(8)),
    ((0,), (1,), (2,), (3,), (5, 6), (9,), (255,), (300, 40000)),
)
EIGHT_IDS = {id_: k for k, ids in enumerate(EIGHT.ids) for id_ in ids}


def _encoded(ids: NDArray[np.int64], container: str, bits: int) -> bytes:
    """Return ids as the content of a label file of a kind."""
    height, width = ids.shape
    if container in ("gray", "palette"):
        rows = b""
        for row in ids:
            numbers = "".join(f"{id_:0{bits}b}" for id_ in row)
            numbers += "0" * (-len(numbers) % 8)
            rows += b"\0" + int(numbers, 2).to_bytes(len(numbers) // 8, "big")
        return _png(width, bits, 0 if container == "gray" else 3, rows, height=height)
    buffer = io.BytesIO()
    Image.fromarray(ids.astype(np.uint16 if bits == 16 else np.uint8)).save(buffer, container)
    return buffer.getvalue()


@given(data=st.data())
def test_a_label_file_is_read_right_or_named(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    container, bits = data.draw(
        st.sampled_from(
            [
                *(("gray", bits) for bits in (1, 2, 4, 8, 16)),
                *(("palette", bits) for bits in (1, 2, 4, 8)),
                *(("TIFF", 8), ("TIFF", 16), ("BMP", 8)),
            ]
        )
    )
    legal = [id_ for id_ in (*range(16), 77, 255, 300, 40000, 65535) if id_ < 2**bits]
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 9)))
    ids = np.array(data.draw(st.lists(st.sampled_from(legal), min_size=45, max_size=45)))
    ids = ids[: shape[0] * shape[1]].reshape(shape)
    content = _encoded(ids, container, bits)
    damage = data.draw(st.sampled_from(["none", "none", "bytes behind", "cut", "bytes", "other"]))
    if damage == "bytes behind":
        content += data.draw(st.binary(max_size=20))
    elif damage == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif damage == "bytes":
        spoiled = bytearray(content)
        for _ in range(data.draw(st.integers(1, 8))):
            spoiled[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = bytes(spoiled)
    elif damage == "other":
        content = data.draw(st.sampled_from([b"", b"\0" * 99, b"GIF89a", b"<html>", b"\x89PNG\r"]))
    suffix = data.draw(st.sampled_from([".png", ".PNG", ".Tif", ".bmp", ".TIFF", ".jpg"]))
    root = tmp_path_factory.mktemp("folder")
    _save(root / "images" / "a.png", _pixels(*shape))
    (root / "labels").mkdir()
    path = root / "labels" / f"a{suffix}"
    path.write_bytes(content)
    labels = _labels_or_error(root)
    if isinstance(labels, str):
        assert damage not in ("none", "bytes behind"), labels
        assert str(path) in labels
    else:
        assert labels.shape == shape
        if damage != "bytes":
            assert labels.tolist() == np.vectorize(lambda i: EIGHT_IDS.get(i, IGNORE))(ids).tolist()


def _labels_or_error(root: Path) -> Tensor | str:
    try:
        (pair,) = gta5_pairs(root, EIGHT)
        return read_labels(pair.label, EIGHT)
    except DatasetError as error:
        return str(error)


STEMS = st.text("ab1_-. é", min_size=1, max_size=4).filter(lambda stem: stem[0] != ".")
PARTS = st.sampled_from(["both", "both", "image alone", "label alone", "derived label"])


@given(files=st.dictionaries(STEMS, st.tuples(PARTS, st.sampled_from([".png", ".PNG", ".tiff"]))))
def test_pairs_by_name(
    files: dict[str, tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("names")
    pixels, raw = (io.BytesIO() for _ in range(2))
    Image.fromarray(_pixels(2, 3)).save(pixels, "png")
    Image.fromarray(_raw(2, 3)).save(raw, "png")
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    written: dict[str, dict[str, Path]] = {"images": {}, "labels": {}}
    for stem, (part, suffix) in {"always": ("both", ".png"), **files}.items():
        if part != "label alone":
            written["images"][stem] = root / "images" / (stem + suffix)
        if part != "image alone":
            written["labels"][stem] = root / "labels" / (stem + suffix)
        if part == "derived label":
            written["labels"][stem + "_ids"] = root / "labels" / (stem + "_ids" + suffix)
    for folder, content in (("images", pixels), ("labels", raw)):
        for path in written[folder].values():
            path.write_bytes(content.getvalue())
    images, labels = written["images"], written["labels"]
    lonely = [images[stem] for stem in images.keys() - labels.keys()]
    for stem in labels.keys() - images.keys():
        if not any(stem.startswith(f"{other}{mark}") for other in labels for mark in "_-."):
            lonely.append(labels[stem])
    expected = [Pair(images[stem], labels[stem]) for stem in images if stem in labels]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetWarning)
        assert sorted(gta5_pairs(root, skip_bad=True)) == sorted(expected)
    if lonely:
        message = _message(lambda: gta5_pairs(root))
        assert f"{len(lonely)} of {len(lonely) + len(expected)} pairs" in message
        assert all(str(path) in message for path in lonely)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".JPG", ".jpeg", ".Bmp", ".TIF"])
def test_images_of_every_format_and_suffix(gta5: Path, suffix: str) -> None:
    pixels = _pixels(20, 36)
    path = gta5 / "images" / f"00001{suffix}"
    (gta5 / "images" / "00001.png").unlink()
    Image.fromarray(pixels).save(path, quality=100)
    pairs = gta5_pairs(gta5)
    assert len(pairs) == 3
    assert next(pair.image for pair in pairs if pair.label.stem == "00001") == path
    with read_rgb(path) as image:
        assert np.abs(np.asarray(image).astype(int) - pixels).max() <= (
            8 if "J" in path.suffix.upper() else 0
        )


def test_photographs_of_other_bit_depths_and_modes(tmp_path: Path) -> None:
    gray = _pixels(4, 6)[..., 0]
    expected = np.stack([gray] * 3, -1)
    for name, image in {
        "16 bits.png": Image.fromarray(gray.astype(np.uint16) * 257),
        "16 bits.tif": Image.fromarray(gray.astype(np.uint16) * 257),
        "8 bits.png": Image.fromarray(gray),
        "transparent.png": Image.fromarray(gray).convert("LA"),
        "palette.png": Image.fromarray(gray).convert("P"),
    }.items():
        image.save(tmp_path / name)
        assert np.array_equal(np.asarray(read_rgb(tmp_path / name)), expected), name
    Image.fromarray(gray.astype(np.float32)).save(tmp_path / "floating.tif")
    assert "Convert it to 8 bits" in _message(lambda: read_rgb(tmp_path / "floating.tif"))


def test_a_photograph_lies_as_its_camera_was_held(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(_pixels(20, 36)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert read_header(tmp_path / "a.jpg").size == (20, 36)
    assert read_rgb(tmp_path / "a.jpg").size == (20, 36)


@pytest.mark.parametrize("width", [12_000, 100_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(gta5: Path, width: int) -> None:
    path = gta5 / "images" / "00002.png"
    path.write_bytes(_png(width, 8, 2, bytes(100), height=width))
    assert f"{path} has too many pixels" in _message(lambda: gta5_pairs(gta5))
    assert f"{path} has too many pixels" in _message(lambda: read_rgb(path))


def test_a_scaled_image_is_never_empty_and_never_huge(tmp_path: Path) -> None:
    flat = _save(tmp_path / "flat.png", _pixels(2, 4000))
    images = UnlabeledImages([flat], ResizeAndCrop("width:100"))
    assert images[0].shape == (3, 1, 100)
    images = UnlabeledImages([flat], ResizeAndCrop("height:1000"))
    assert f"{flat}: expected at most" in _message(lambda: images[0])


def test_links_are_followed_and_nothing_but_files_is_opened(gta5: Path, tmp_path: Path) -> None:
    moved = gta5 / "elsewhere.png"
    (gta5 / "images" / "00002.png").rename(moved)
    (gta5 / "images" / "00002.png").symlink_to(moved)
    assert len(gta5_pairs(gta5)) == 3
    moved.unlink()
    assert "00002.png is not a readable image (no such file)" in _message(lambda: gta5_pairs(gta5))
    (gta5 / "images" / "00002.png").unlink()
    (gta5 / "images" / "00002.png").symlink_to("/dev/zero")
    assert "not a regular file" in _message(lambda: gta5_pairs(gta5))


# ---- ids ----------------------------------------------------------------------------------------


def test_ids_are_counted(gta5: Path) -> None:
    pairs = gta5_pairs(gta5)
    raw = np.concatenate([_load(label).ravel() for _, label in pairs])
    counts = count_labels(pairs)
    assert counts.files == 3
    assert counts.classes.tolist() == [int((raw == entry.raw_id).sum()) for entry in CLASSES]
    assert counts.ignored == {i: int((raw == i).sum()) for i in (0, 34, 255)}
    text = counts.describe([entry.name for entry in CLASSES])
    assert text.startswith("3 of 19 classes in 3 label files, no pixel of building, ")
    share = np.isin(raw, (0, 34, 255)).mean()
    assert f"{share:.1%} of the pixels are ignored" in text


@pytest.mark.parametrize("ids", [range(19), (0, 1, 2, 3, 4), (0,), (0, 13, 255), (2, 8, 10)])
def test_ids_of_another_convention_are_named(gta5: Path, ids: Sequence[int]) -> None:
    for _, label in gta5_pairs(gta5):
        shape = _load(label).shape
        _save(label, np.resize(np.array(ids, np.uint8), shape))
    message = _message(lambda: count_labels(gta5_pairs(gta5)))
    assert "Expected raw ids, where 0 is unlabeled, 7 road" in message
    assert "train ids, which count from 0, road, to 18, bicycle" in message
    assert "--classes" in message


def test_a_set_of_which_a_part_was_converted_is_named(gta5: Path) -> None:
    _save(
        gta5 / "labels" / "00002.png", train_ids(np.resize(np.arange(34, dtype=np.uint8), (22, 34)))
    )
    with pytest.warns(DatasetWarning, match=r"(?s)1 of 3 label files.*train ids.*00002\.png"):
        count_labels(gta5_pairs(gta5))


def test_own_ids_that_belong_to_no_class(gta5: Path) -> None:
    own = Classes(("a", "b"), ((1, 1, 1), (2, 2, 2)), ((100,), (101,)))
    message = _message(lambda: count_labels(gta5_pairs(gta5, own), own))
    assert "hold the ids 0, 7, 8, 26, 34, 255, and none of them belongs to a class" in message
    assert "--classes" in message


def test_all_label_files_with_unknown_ids_are_named(gta5: Path) -> None:
    for name in ("00001.png", "00003.png"):
        raw = _raw(20, 36)
        raw[3, 4] = 77
        _save(gta5 / "labels" / name, raw)
    pairs = gta5_pairs(gta5)
    message = _message(lambda: count_labels(pairs))
    assert "2 of 3 label files cannot be used" in message
    for name in ("00001.png", "00003.png"):
        assert f"{gta5 / 'labels' / name}: Expected raw ids 0-34 or 255, but got [77]" in message


# ---- content ------------------------------------------------------------------------------------


def test_content_is_the_same_wherever_it_lies(
    gta5: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def content(root: Path) -> dict[str, str]:
        return content_of(root, [path for pair in gta5_pairs(root) for path in pair])

    before = content(gta5)
    assert len(before) == 6
    moved = tmp_path_factory.mktemp("moved") / "set"
    shutil.copytree(gta5, moved)
    assert content_difference(before, content(moved)) == ""
    raw = _load(moved / "labels" / "00001.png").copy()
    raw[0, 0] = 8 if raw[0, 0] == 7 else 7
    _save(moved / "labels" / "00001.png", raw)
    for part in ("images", "labels"):
        shutil.copy(moved / part / "00002.png", moved / part / "00009.png")
        (moved / part / "00003.png").unlink()
    assert content_difference(before, content(moved)) == (
        "2 missing (images/00003.png, labels/00003.png), "
        "2 new (images/00009.png, labels/00009.png), 1 changed (labels/00001.png)"
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
def test_one_other_pixel_is_other_content(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    checksums = set()
    for value in (0, 80):
        pixels[100, 150] = value
        Image.fromarray(pixels).save(tmp_path / f"a{suffix}")
        checksums.add(content_of(tmp_path, [tmp_path / f"a{suffix}"])[f"a{suffix}"])
    assert len(checksums) == 2


# ---- own folders --------------------------------------------------------------------------------


@pytest.fixture
def own(gta5: Path) -> Path:
    """Write JPEGs of several sizes beside PNG masks, and a list of two classes."""
    shutil.rmtree(gta5)
    for index in range(5):
        _save(
            gta5 / "labels" / f"scene {index}.png",
            np.full((20, 30 + index), 255 * (index % 2), np.uint8),
        )
        (gta5 / "images").mkdir(exist_ok=True)
        Image.fromarray(_pixels(20, 30 + index)).save(gta5 / "images" / f"scene {index}.JPG")
    return gta5


MASK = Classes(("rest", "thing"), ((1, 1, 1), (2, 2, 2)), ((0,), (255,)))


def test_a_target_holds_out_labeled_images(own: Path) -> None:
    target = folder_target(own, MASK)  # of all labeled ones, every third
    assert [path.stem for path in target.images] == ["scene 1", "scene 2", "scene 4"]
    assert [pair.label.name for pair in target.evaluation] == ["scene 0.png", "scene 3.png"]
    _, labels = LabeledImages(target.evaluation, WHOLE, MASK)[1]
    assert labels.eq(1).all()
    (own / "labels" / "scene 1.png").unlink()
    target = folder_target(own, MASK)
    assert [path.stem for path in target.images] == ["scene 1"]
    assert len(target.evaluation) == 4


def test_a_target_needs_no_labels_and_those_to_train_on_are_never_opened(own: Path) -> None:
    for index in (1, 2, 4):
        (own / "labels" / f"scene {index}.png").write_bytes(b"corrupt")
    assert len(folder_target(own, MASK).evaluation) == 2
    shutil.rmtree(own / "labels")
    target = folder_target(own, MASK)
    assert len(target.images) == 5
    assert target.evaluation == []


def test_labels_of_a_target_by_other_names(own: Path) -> None:
    for label in (own / "labels").iterdir():
        label.rename(label.with_stem(f"{label.stem} mask"))
    message = _message(lambda: folder_target(own, MASK))
    assert "has labels of 0 of the 5 images" in message
    assert "remove the folder of labels" in message


def test_own_gray_labels_of_three_channels(own: Path) -> None:
    for index, label in enumerate(sorted((own / "labels").iterdir())):
        gray = _load(label)
        _save(label, np.stack([gray] * 3, -1))
        assert read_labels(label, MASK).eq(index % 2).all()
    pixels = np.stack([gray] * 3, -1)
    pixels[3, 4, 0] = 7
    _save(label, pixels)
    message = _message(lambda: gta5_pairs(own, MASK))
    assert f"{label}: expected one channel of ids, but got colors" in message


# ---- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["images", "labels"])
def test_broken_pixels(layout: Layout, part: str) -> None:
    path = min(getattr(layout, part).iterdir())
    content = bytearray(path.read_bytes())
    start = content.index(b"IDAT") + 4
    content[start : start + 20] = bytes(20)
    path.write_bytes(content)
    dataset = LabeledImages(layout.read(layout.root), WHOLE)
    assert f"{path} is not a readable image" in _message(lambda: dataset[0])


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


@pytest.mark.parametrize(
    ("kinds", "parts"), [((0, 1, 2, 3, 4), 1), ((4, 3, 2, 1, 0), 3), ((3, 3, 4, 4, 1), 3)]
)
def test_every_16_bit_sample_is_read_whole(
    tmp_path: Path, kinds: tuple[int, ...], parts: int
) -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (len(kinds), 13, 3), np.uint16)
    samples[0, :4, 0] = (0, 255, 256, 65535)
    rows = samples.astype(">u2").view(np.uint8).reshape(len(kinds), -1)
    path = _save_rgb_16(tmp_path / "label.png", 13, _filtered(rows, kinds), parts)
    channel = read_first_channel(path)
    assert channel.dtype == np.uint16
    assert np.array_equal(channel, samples[..., 0])


@pytest.mark.parametrize(("color", "mode"), [(True, "RGB"), (False, "L")])
def test_synthia_label_of_8_bits(synthia: Path, color: bool, mode: str) -> None:
    pixels = _pixels(22, 34) if color else _raw(22, 34)
    path = _save(synthia / "GT" / "LABELS" / "0000001.png", pixels)
    message = _message(lambda: synthia_pairs(synthia))
    assert f"{path}: expected a 16-bit RGB PNG" in message
    assert f"got mode {mode}, which holds" in message
    assert "GT/LABELS as they come" in message


def test_synthia_label_taken_for_gta5(gta5: Path) -> None:
    path = _save_synthia(gta5 / "labels" / "00002.png", _synthia_ids(22, 34))
    message = _message(lambda: gta5_pairs(gta5))
    assert f"{path}: expected a grayscale or paletted image" in message
    assert "got mode RGB;16B" in message


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
    """Return a data set of one pair whose label is the column's sixth: train ids 0 to 5."""
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
