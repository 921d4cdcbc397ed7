"""Readers of data sets as they lie on disk: GTA5, SYNTHIA, Cityscapes, and folders of one's own.

Listing a data set also checks it, by file names, headers and both ends of each file: everything
that is missing, cut off or mixed up is named in one error before training starts. Labels of the
target's training images cannot leak: `UnlabeledImages` and the functions that list images alone
know no label files.
"""

import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from classes import CLASSES, IGNORE, RAW_IDS, STREET, SYNTHIA_IDS, Classes, LabelIds
from image_files import (
    RGB_16,
    SUFFIXES,
    Header,
    read_first_channel,
    read_gray_ids,
    read_header,
    read_rgb,
)
from image_files import (
    DatasetError as DatasetError,
)
from numpy.typing import NDArray
from parallel import is_main
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

_SHOWN = 50  # bad files in one error; the others are counted
_SAMPLE = 240  # label files from which the ids of a data set are told
_ENDS_READ = 4096  # bytes at each end of a PNG


class DatasetWarning(UserWarning):
    """A data set is usable, but not as it is; the message names the files."""


# ------------------------------------------------------------------------------------------ labels


class Pair(NamedTuple):
    """An image and the file of its label ids."""

    image: Path
    label: Path


class _LabelFormat(NamedTuple):
    ids: LabelIds
    modes: tuple[str, ...]
    """Of Pillow, or `RGB_16`."""
    expected: str
    fix: str


_RAW = _LabelFormat(
    RAW_IDS,
    ("L", "P"),
    "a grayscale or paletted image of raw label ids, of at most 8 bits",
    "Use the label id files instead (Cityscapes: *_labelIds.png).",
)
_SYNTHIA = _LabelFormat(
    SYNTHIA_IDS,
    (RGB_16,),
    "a 16-bit RGB PNG with the class in its first channel",
    "Use the files of SYNTHIA's GT/LABELS as they come, not colors, depths or converted labels.",
)
_LOOKS_LIKE = {
    **dict.fromkeys(("RGB", "RGBA", "CMYK"), "colors, where ids are needed"),
    **dict.fromkeys(("I;16", "I", "F"), "instance ids or depths"),
    **dict.fromkeys(("1", "L", "P"), "ids of at most 8 bits"),
    RGB_16: "a label of SYNTHIA",
}


def _gray(classes: Classes) -> _LabelFormat:
    """Return the format of gray label files; own classes bring their own ids, of up to 16 bits."""
    if classes == STREET:
        return _RAW
    return _LabelFormat(
        classes.label_ids(),
        ("1", "L", "P", "I;16", "I", "RGB"),
        "a grayscale, paletted or bilevel image of class ids",
        "Save the class id of each pixel, in a PNG of one channel; list the ids in --classes.",
    )


def _format_of(path: Path, classes: Classes) -> _LabelFormat:
    """Return the format of a label file, which is SYNTHIA's or `_gray`."""
    header = read_header(path)
    is_synthia = classes == STREET and header.mode == RGB_16
    label_format = _SYNTHIA if is_synthia else _gray(classes)
    _check_mode(path, header, label_format)
    return label_format


def _check_mode(path: Path, header: Header, label_format: _LabelFormat) -> None:
    if header.format == "JPEG":
        raise DatasetError(
            f"{path}: expected {label_format.expected}, but got a JPEG, whose compression changes "
            "ids. Save labels as PNG."
        )
    if header.mode == "RGB" and header.mode in label_format.modes:
        read_gray_ids(path)  # which may be color
    if header.mode not in label_format.modes:
        looks = _LOOKS_LIKE.get(header.mode)
        raise DatasetError(
            f"{path}: expected {label_format.expected}, but got mode {header.mode}"
            + (f", which holds {looks}. " if looks else ". ")
            + label_format.fix
        )


def read_labels(path: Path, classes: Classes = STREET) -> Tensor:
    """Read train ids (H, W), int64, of a label file: of raw ids, SYNTHIA's, or own classes.

    Raises:
        DatasetError: If the file is not readable, or holds something else.
    """
    return _label_tensor(_read_label(path, _format_of(path, classes)))


def _read_label(path: Path, label_format: _LabelFormat) -> Image.Image:
    return Image.fromarray(_to_train(path, _read_ids(path, label_format), label_format))


def _read_ids(path: Path, label_format: _LabelFormat) -> NDArray[np.integer]:
    if label_format is _SYNTHIA:
        return read_first_channel(path)
    return read_gray_ids(path)


def _to_train(
    path: Path, ids: NDArray[np.integer], label_format: _LabelFormat
) -> NDArray[np.uint8]:
    try:
        return label_format.ids.to_train(ids)
    except ValueError as error:
        raise DatasetError(f"{path}: {error} {label_format.fix}") from error


# ----------------------------------------------------------------------------------------- listing


def gta5_pairs(root: Path, classes: Classes = STREET, *, skip_bad: bool = False) -> list[Pair]:
    """List and check `root/images/00001.png` with `root/labels/00001.png`.

    Suffixes may be those of PNG, JPEG, BMP and TIFF, in any case. Files that were derived from a
    label and lie beside it, such as `00001_labelTrainIds.png`, are left alone. A label whose sides
    differ from its image's by a tenth at most is used, with a warning; GTA5 has such pairs.

    Args:
        root: The data set's folder.
        classes: The classes to tell apart; others than Cityscapes' bring their own ids.
        skip_bad: Leave out pairs that cannot be used, with a warning, instead of raising.

    Raises:
        DatasetError: If a folder is missing, or pairs cannot be used; it names all of them.
    """
    return _pairs(_Part(root / "images"), _Part(root / "labels"), _gray(classes), skip_bad)


def synthia_pairs(root: Path, *, skip_bad: bool = False) -> list[Pair]:
    """List and check RAND_CITYSCAPES: `root/RGB/0000000.png` with `root/GT/LABELS/0000000.png`.

    Otherwise as `gta5_pairs`.
    """
    return _pairs(_Part(root / "RGB"), _Part(root / "GT" / "LABELS"), _SYNTHIA, skip_bad)


def cityscapes_images(
    root: Path, split: Literal["train", "val", "test"], *, skip_bad: bool = False
) -> list[Path]:
    """List and check `root/leftImg8bit/<split>/<city>/*_leftImg8bit.png`; no label is looked at.

    Raises:
        DatasetError: If the folder is missing, or files are not images; it names all of them.
    """
    return _images(_cityscapes_part(root, "leftImg8bit", split), skip_bad)


def cityscapes_pairs(
    root: Path,
    split: Literal["train", "val"],
    classes: Classes = STREET,
    *,
    skip_bad: bool = False,
) -> list[Pair]:
    """List and check the images of a split with `gtFine/<split>/<city>/*_gtFine_labelIds.png`.

    Otherwise as `gta5_pairs`.
    """
    images = _cityscapes_part(root, "leftImg8bit", split)
    labels = _cityscapes_part(root, "gtFine", split)
    return _pairs(images, labels, _gray(classes), skip_bad)


def folder_images(root: Path, *, skip_bad: bool = False) -> list[Path]:
    """List and check `root/images`; no label is looked at.

    Raises:
        DatasetError: If the folder is missing, or files are not images; it names all of them.
    """
    return _images(_Part(root / "images"), skip_bad)


class Target(NamedTuple):
    """The images of a target, in two parts."""

    images: list[Path]
    """To train on; their labels are not looked at."""
    evaluation: list[Pair]
    """To evaluate on; empty without labels."""


def folder_target(root: Path, classes: Classes, *, skip_bad: bool = False) -> Target:
    """List and check `root/images`, and hold out those with a label in `root/labels`.

    Images with a label are for evaluation and never trained on; if all have one, every third is.
    The folder of labels may be missing.

    Raises:
        DatasetError: If the folder is missing, or files cannot be used; it names all of them.
    """
    paths = folder_images(root, skip_bad=skip_bad)
    if not (root / "labels").is_dir():
        return Target(paths, [])
    labels, faults = _Part(root / "labels").files()
    labeled = [path for path in paths if path.stem in labels]
    if len(labeled) == len(paths) > 1:
        labeled = labeled[::3]
    if not 0 < len(labeled) < len(paths):
        raise DatasetError(
            f"{root / 'labels'} has labels of {len(labeled)} of the {len(paths)} images in "
            f"{root / 'images'}: expected some to evaluate on, and others to train on. Give labels "
            "the names of their images, or remove the folder of labels."
        )
    held_out = {path.stem: path for path in labeled}
    faults = {name: fault for name, fault in faults.items() if name in held_out}
    pairs = _check_pairs(held_out, labels, _gray(classes), faults, skip_bad)
    return Target([path for path in paths if path.stem not in held_out], pairs)


def _cityscapes_part(root: Path, kind: str, split: str) -> "_Part":
    ending = "_gtFine_labelIds" if kind == "gtFine" else "_leftImg8bit"
    return _Part(root / kind / split, "*/*", ending)


class _Files(NamedTuple):
    found: dict[str, Path]
    """By name: the path below the folder, without suffix and ending."""
    faults: dict[str, str]
    """Files that cannot be used: an error message by name."""


class _Part(NamedTuple):
    """Images or labels of a data set: the files of a folder whose stems have an ending."""

    folder: Path
    pattern: str = "*"
    ending: str = ""

    def expected(self, name: str) -> Path:
        """Return the path that a file is expected to have."""
        return self.folder / f"{name}{self.ending}.png"

    def files(self) -> _Files:
        """List them, in order.

        Raises:
            DatasetError: If there are none.
        """
        found: dict[str, Path] = {}
        faults: dict[str, str] = {}
        known = Image.registered_extensions()
        for path in sorted(self.folder.glob(self.pattern)):
            # Archives packed on a Mac hold a hidden "._name.png" beside each file.
            if path.name.startswith(".") or not path.stem.endswith(self.ending):
                continue
            stem = path.stem.removesuffix(self.ending)
            name = path.relative_to(self.folder).with_name(stem).as_posix() if stem else ""
            if path.suffix.lower() in SUFFIXES:
                if name in found:
                    faults[name] = f"{path} has the name of {found[name].name}. Remove one of them."
                found.setdefault(name, path)
            elif path.suffix.lower() in known:
                kinds = ", ".join(sorted(SUFFIXES))
                faults.setdefault(name, f"{path}: expected one of {kinds}. Convert or remove it.")
        if not found:
            raise DatasetError(self._nothing(faults))
        return _Files(found, faults)

    def _nothing(self, faults: Mapping[str, str]) -> str:
        if faults:
            return _lines("No file is usable:", [*faults.values()])
        if self.folder.is_dir():
            wanted = self.folder / f"{self.pattern}{self.ending}.png"
            folders = [self.folder]
            if self.pattern != "*":
                folders += [path for path in sorted(self.folder.iterdir()) if path.is_dir()][:1]
            problem = f"Expected images {wanted}, but {', and '.join(map(_describe, folders))}."
        else:
            parent = next(parent for parent in self.folder.parents if parent.is_dir())
            problem = f"Expected the folder {self.folder}, but {_describe(parent)}."
        return (
            f"{problem} Pass the folder that holds images/ and labels/ (GTA5 and own data), RGB/ "
            "and GT/LABELS/ (SYNTHIA) or leftImg8bit/ and gtFine/ (Cityscapes), unpacked."
        )


def _describe(folder: Path) -> str:
    names = sorted(os.listdir(folder))
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{folder} holds {shown}" if names else f"{folder} is empty"


# ---------------------------------------------------------------------------------------- checking


def _images(part: _Part, skip_bad: bool) -> list[Path]:
    found, faults = part.files()
    for name, path in _with_progress(found):
        try:
            _image_header(path)
        except DatasetError as error:
            faults[name] = str(error)
    good = [path for name, path in found.items() if name not in faults]
    _settle(faults, "images", len(good), skip_bad)
    return good


def _pairs(images: _Part, labels: _Part, label_format: _LabelFormat, skip_bad: bool) -> list[Pair]:
    image_files, faults = images.files()
    label_files, more = labels.files()
    if not image_files.keys() & label_files.keys():
        raise DatasetError(
            f"No label in {labels.folder} has the name of an image in {images.folder}: expected "
            f"{labels.expected(next(iter(image_files)))}, for one, but "
            f"{_describe(next(iter(label_files.values())).parent)}. Give both the same names."
        )
    faults = more | faults
    for name in image_files.keys() - label_files.keys():
        faults.setdefault(
            name,
            f"{image_files[name]} has no label {labels.expected(name)}. Unpack the missing label, "
            "or remove the image.",
        )
    # Cityscapes names both parts by a scheme: images may be a selection from it.
    for name in () if labels.ending else label_files.keys() - image_files.keys():
        if not _is_derived(name, label_files):
            faults.setdefault(
                name,
                f"{label_files[name]} has no image {images.expected(name)}. Unpack the missing "
                "image, or remove the label.",
            )
    return _check_pairs(image_files, label_files, label_format, faults, skip_bad)


def _is_derived(name: str, names: Mapping[str, Path]) -> bool:
    """Return True if a name is a longer form of another, as a_labelTrainIds is of a."""
    return any(name[k] in "_-." and name[:k] in names for k in range(1, len(name)))


def _check_pairs(
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    label_format: _LabelFormat,
    faults: Mapping[str, str],
    skip_bad: bool,
) -> list[Pair]:
    """Return the pairs of equal names that can be used; raise or warn about the others."""
    faults = dict(faults)
    pairs: list[Pair] = []
    scaled: list[str] = []
    for name, image in _with_progress(images):
        if name in faults:
            continue
        pair = Pair(image, labels[name])
        try:
            if difference := _check_pair(pair, label_format):
                scaled.append(difference)
            pairs.append(pair)
        except DatasetError as error:
            faults[name] = str(error)
    _settle(faults, "pairs", len(pairs), skip_bad)
    if scaled:
        _warn("Labels of almost the size of their images are scaled to them.", scaled)
    return pairs


def _check_pair(pair: Pair, label_format: _LabelFormat) -> str:
    """Return how the sizes of a pair differ, if by little.

    Raises:
        DatasetError: If the pair cannot be used.
    """
    headers, problems = [], []
    checks = (
        (pair.image, _image_header),
        (pair.label, partial(_label_header, label_format=label_format)),
    )
    for path, check in checks:
        try:
            headers.append(check(path))
        except DatasetError as error:
            problems.append(str(error))
    if problems:
        raise DatasetError("\n".join(problems))
    (width, height), (label_width, label_height) = (header.size for header in headers)
    if (width, height) == (label_width, label_height):
        return ""
    difference = (
        f"{pair.label} is {label_width}x{label_height}, but its image {pair.image} is "
        f"{width}x{height}."
    )
    if abs(label_width - width) > width / 10 or abs(label_height - height) > height / 10:
        raise DatasetError(f"{difference} Unpack both again, or remove the pair.")
    return difference


def _image_header(path: Path) -> Header:
    header = read_header(path)
    if header.mode in ("I", "F") and header.format != "PNG":
        raise DatasetError(
            f"{path}: expected an image of 8 or 16 bits, but got mode {header.mode}, which holds "
            f"{_LOOKS_LIKE[header.mode]}. Convert it to 8 bits."
        )
    return header


def _label_header(path: Path, label_format: _LabelFormat) -> Header:
    header = read_header(path)
    _check_mode(path, header, label_format)
    return header


def _settle(faults: Mapping[str, str], what: str, good: int, skip_bad: bool = False) -> None:
    """Raise an error that lists faults; or, if they are to be skipped, warn."""
    said = [faults[name] for name in sorted(faults)]
    total = f"{len(said)} of {len(said) + good} {what}"
    if said and skip_bad and good:
        _warn(f"{total} are left out:", said)
    elif said:
        hint = "\nLeave them out with --skip-bad." if good and what != "label files" else ""
        raise DatasetError(_lines(f"{total} cannot be used:", said) + hint)


def _warn(title: str, lines: Sequence[str]) -> None:
    if is_main():
        warnings.warn(_lines(title, lines), DatasetWarning, stacklevel=2)


def _lines(title: str, lines: Sequence[str]) -> str:
    more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n  ".join([title, *lines[:_SHOWN], *more])


def _with_progress(files: Mapping[str, Path]) -> Iterable[tuple[str, Path]]:
    return tqdm(files.items(), desc="checking", leave=False, disable=not is_main())


# --------------------------------------------------------------------------------- ids and content


class LabelCounts(NamedTuple):
    """Pixels in the label files of a data set."""

    files: int
    """Label files that were read, evenly spread over the data set."""
    classes: Tensor
    """(C,), int64: pixels of each class."""
    ignored: dict[int, int]
    """Pixels of each id that belongs to no class."""

    def describe(self, names: Sequence[str]) -> str:
        """Return a line on the classes that are missing and the pixels that are ignored."""
        missing = [name for name, count in zip(names, self.classes, strict=True) if count == 0]
        ignored = sum(self.ignored.values())
        share = ignored / (ignored + int(self.classes.sum()))
        most = sorted(self.ignored, key=lambda id_: -self.ignored[id_])[:5]
        return (
            f"{len(names) - len(missing)} of {len(names)} classes in {self.files} label files"
            + (f", no pixel of {', '.join(missing)}" if missing else "")
            + (f"; {share:.1%} of the pixels are ignored, ids {most}" if most else "")
        )


def count_labels(pairs: Sequence[Pair], classes: Classes = STREET) -> LabelCounts:
    """Count the ids in the label files of up to 240 pairs, and check that they are plausible.

    Raises:
        DatasetError: If label files hold undefined ids or cannot be read; it names all of them.
            If they hold train ids where raw ids are expected, or no pixel of any class.
    """
    some = pairs[:: math.ceil(len(pairs) / _SAMPLE) or 1]
    total: Counter[int] = Counter()
    faults: dict[str, str] = {}
    converted: list[str] = []
    label_format = _gray(classes)
    for _, path in tqdm(some, desc="label ids", leave=False, disable=not is_main()):
        try:
            label_format = _format_of(path, classes)
            counts = _count_ids(path, label_format)
        except DatasetError as error:
            faults[str(path)] = str(error)
            continue
        total.update(counts)
        if label_format is _RAW and _are_train_ids(counts):
            converted.append(str(path))
    _settle(faults, "label files", len(some) - len(faults))
    by_class = torch.zeros(len(classes), dtype=torch.int64)
    ignored: dict[int, int] = {}
    for id_, train_id in zip(total, label_format.ids.to_train(np.array([*total])), strict=True):
        if train_id == IGNORE:
            ignored[id_] = total[id_]
        else:
            by_class[train_id] += total[id_]
    _check_convention(some, total, by_class, converted, label_format)
    return LabelCounts(len(some), by_class, ignored)


def _count_ids(path: Path, label_format: _LabelFormat) -> dict[int, int]:
    """Return the pixels of each id in a label file, all of which are defined."""
    found, counts = np.unique(_read_ids(path, label_format), return_counts=True)
    _to_train(path, found, label_format)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _may_be_train_ids(ids: Iterable[int]) -> bool:
    """Return True if there is none of the raw ids from 19, such as vegetation, sky, person, car."""
    return all(id_ < len(CLASSES) or id_ == IGNORE for id_ in ids)


def _are_train_ids(ids: Iterable[int]) -> bool:
    """Return True if, moreover, some ids are classes as train ids alone."""
    raw = {entry.raw_id for entry in CLASSES}
    return _may_be_train_ids(ids) and not {0, IGNORE, *raw}.issuperset(ids)


def _check_convention(
    pairs: Sequence[Pair],
    total: Mapping[int, int],
    by_class: Tensor,
    converted: Sequence[str],
    label_format: _LabelFormat,
) -> None:
    shown = _some(sorted(total))
    where = f"The {len(pairs)} label files looked at, such as {pairs[0].label},"
    if label_format is _RAW and _may_be_train_ids(total):
        raise DatasetError(
            f"{where} hold no ids but {shown}. Expected raw ids, where 0 is unlabeled, 7 road, 23 "
            "sky and 26 car; these look like train ids, which count from 0, road, to 18, bicycle, "
            "or ids of your own. Use the label files with raw ids (Cityscapes: *_labelIds.png), or "
            "list the classes and their ids: --classes FILE."
        )
    if not by_class.any():
        raise DatasetError(
            f"{where} hold the ids {shown}, and none of them belongs to a class. Expected "
            f"{label_format.ids.name}. {label_format.fix}"
        )
    if len(converted) > len(pairs) / 10:
        _warn(
            f"{len(converted)} of {len(pairs)} label files look as if they held train ids 0-18, "
            "and the others raw ids:",
            converted,
        )


def _some(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:24])) + (", ..." if len(ids) > 24 else "")


def content_of(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return a checksum of each file by its path below `root`, which itself does not matter.

    Of a PNG, size and both ends are read, which hold checksums of its pixels; of other formats,
    everything.
    """
    return {
        Path(os.path.relpath(path, root)).as_posix(): _checksum(path)
        for path in tqdm(files, desc="content", leave=False, disable=not is_main())
    }


def _checksum(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        start = file.read(_ENDS_READ)
        digest.update(start)
        if start.startswith(b"\x89PNG"):
            file.seek(max(_ENDS_READ, size - _ENDS_READ))
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def content_difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return how the content of two data sets differs, or an empty text."""
    kinds = {
        "missing": sorted(before.keys() - now.keys()),
        "new": sorted(now.keys() - before.keys()),
        "changed": sorted(n for n in before.keys() & now.keys() if before[n] != now[n]),
    }
    return ", ".join(
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    )


# ---------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class ResizeAndCrop:
    """The geometric part of reading: scale to a height, then crop and flip at random.

    Args:
        resize: Height or width of the scaled image, "height:144" or "width:2200"; its aspect ratio
            stays.
        crop: Height and width of the random crop; an image too narrow for it is scaled further,
            until it covers the crop. None keeps the whole image, its label at the original size.
        flip: Mirror half of the samples.
    """

    resize: str
    crop: tuple[int, int] | None = None
    flip: bool = False

    def __call__(
        self, image: Image.Image, label: Image.Image, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Transform an image and its label alike."""
        view = self._draw(image, generator)
        scale = (label.width / image.width, label.height / image.height)
        labels = view.apply(label, Image.Resampling.NEAREST, scale) if self.crop else label
        pixels = view.apply(image, Image.Resampling.BILINEAR)
        return view.turn(_image_tensor(pixels)), view.turn(_label_tensor(labels))

    def image_only(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        """Transform an image that has no label."""
        view = self._draw(image, generator)
        pixels = view.apply(image, Image.Resampling.BILINEAR)
        return view.turn(_image_tensor(pixels))

    def _draw(self, image: Image.Image, generator: torch.Generator | None) -> "_View":
        side, _, pixels = self.resize.partition(":")
        scale = int(pixels) / (image.height if side == "height" else image.width)
        if self.crop:
            scale = max(scale, self.crop[0] / image.height, self.crop[1] / image.width)
        full = (max(1, round(image.height * scale)), max(1, round(image.width * scale)))
        size = self.crop or full
        limit = Image.MAX_IMAGE_PIXELS or math.inf
        if size[0] * size[1] > limit:
            raise ValueError(
                f"expected at most {limit} pixels after scaling by {self.resize}, but got "
                f"{size[1]}x{size[0]}"
            )
        top, left = (_randint(full[axis] - size[axis] + 1, generator) for axis in (0, 1))
        # Cutting out while scaling computes only the pixels of the crop.
        across, down = image.width / full[1], image.height / full[0]
        box = (left * across, top * down, (left + size[1]) * across, (top + size[0]) * down)
        return _View(size, box, mirror=self.flip and _randint(2, generator) == 1)


class _View(NamedTuple):
    size: tuple[int, int]
    box: tuple[float, float, float, float]
    mirror: bool

    def apply(
        self,
        image: Image.Image,
        resample: Image.Resampling,
        scale: tuple[float, float] = (1.0, 1.0),
    ) -> Image.Image:
        left, top, right, bottom = self.box
        across, down = scale
        box = (left * across, top * down, right * across, bottom * down)
        return image.resize(self.size[::-1], resample, box)

    def turn(self, tensor: Tensor) -> Tensor:
        return tensor.flip(-1) if self.mirror else tensor


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in an error of its transformation."""
    try:
        yield
    except ValueError as error:
        raise DatasetError(f"{path}: {error}. Remove it, or choose another --resize.") from error


def _randint(high: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(high, (), generator=generator))


def _image_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _label_tensor(label: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(label, np.int64))


class LabeledImages(Dataset[tuple[Tensor, Tensor]]):
    """Images (3, H, W), float32 in [0, 1], with train ids (H, W), int64."""

    def __init__(
        self, pairs: Sequence[Pair], transform: ResizeAndCrop, classes: Classes = STREET
    ) -> None:
        self.pairs = pairs
        self.transform = transform
        self.classes = classes

    def __len__(self) -> int:
        """Count the images."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Read one pair, with draws from torch's global generator."""
        return self.read(index)

    def read(self, index: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Read one pair, or raise a `DatasetError` that names the broken file."""
        pair = self.pairs[index]
        label = _read_label(pair.label, _format_of(pair.label, self.classes))
        with _named(pair.image):
            return self.transform(read_rgb(pair.image), label, generator)

    def path(self, index: int) -> Path:
        """Return the image file of one pair."""
        return self.pairs[index].image


class UnlabeledImages(Dataset[Tensor]):
    """Images (3, H, W), float32 in [0, 1], and nothing else."""

    def __init__(self, paths: Sequence[Path], transform: ResizeAndCrop) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        """Count the images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Read one image, with draws from torch's global generator."""
        return self.read(index)

    def read(self, index: int, generator: torch.Generator | None = None) -> Tensor:
        """Read one image, or raise a `DatasetError` that names the broken file."""
        path = self.paths[index]
        with _named(path):
            return self.transform.image_only(read_rgb(path), generator)

    def path(self, index: int) -> Path:
        """Return the image file."""
        return self.paths[index]
