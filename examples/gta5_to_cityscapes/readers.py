"""Readers of GTA5, SYNTHIA and Cityscapes as they lie on disk.

Listing a data set also checks it, by file names and by both ends of each file: what is missing,
cut off or mixed up is said before training starts and not hours into it. Labels of the target's
training images cannot leak: `cityscapes_images` and `UnlabeledImages` know no label files.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from classes import synthia_train_ids, train_ids
from numpy.typing import NDArray
from parallel import is_main
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

_PNG_END = b"IEND\xaeB`\x82"
_RGB_16 = "RGB;16B"  # what Pillow calls the content of a 16-bit RGB PNG, which it opens as "RGB"
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError)  # what Pillow raises for a broken file


class DatasetError(Exception):
    """A data set on disk is not what its reader expects; the message names the file."""


class Pair(NamedTuple):
    """An image and the file of its raw label ids."""

    image: Path
    label: Path


class _LabelFormat(NamedTuple):
    modes: tuple[str, ...]
    expected: str
    mend: str


_RAW_IDS = _LabelFormat(
    ("L", "P"),
    "a grayscale or paletted PNG of raw label ids",
    "This looks like a color rendering; use the label id files instead.",
)
_SYNTHIA = _LabelFormat(
    (_RGB_16,),
    "a 16-bit RGB PNG with the class in its first channel",
    "Use the files of SYNTHIA's GT/LABELS as they come, not colors, depths or converted labels.",
)


def gta5_pairs(root: Path) -> list[Pair]:
    """List and check `root/images/00001.png` with `root/labels/00001.png`.

    Raises:
        DatasetError: If a folder, an image or a label is missing, or a pair does not fit together.
    """
    return _same_name_pairs(root / "images", root / "labels", _RAW_IDS)


def synthia_pairs(root: Path) -> list[Pair]:
    """List and check RAND_CITYSCAPES: `root/RGB/0000000.png` with `root/GT/LABELS/0000000.png`.

    Raises:
        DatasetError: If a folder, an image or a label is missing, or a pair does not fit together.
    """
    return _same_name_pairs(root / "RGB", root / "GT" / "LABELS", _SYNTHIA)


def cityscapes_images(root: Path, split: Literal["train", "val", "test"]) -> list[Path]:
    """List and check `root/leftImg8bit/<split>/<city>/*_leftImg8bit.png`; no label is looked at.

    Raises:
        DatasetError: If the folder or its images are missing, or a file is not an image.
    """
    images = _list_pngs(root / "leftImg8bit" / split, "*/*_leftImg8bit.png")
    for image in tqdm(images, desc="checking", leave=False, disable=not is_main()):
        _read_header(image)
    return images


def cityscapes_pairs(root: Path, split: Literal["train", "val"]) -> list[Pair]:
    """List and check the images of a split with `gtFine/<split>/<city>/*_gtFine_labelIds.png`.

    Raises:
        DatasetError: If a folder, an image or a label is missing, or a pair does not fit together.
    """
    images = _list_pngs(root / "leftImg8bit" / split, "*/*_leftImg8bit.png")
    _list_pngs(root / "gtFine" / split, "*/*_gtFine_labelIds.png")
    pairs = [Pair(image, _cityscapes_label(root, image)) for image in images]
    _check_pairs(pairs, _RAW_IDS)
    return pairs


def _cityscapes_label(root: Path, image: Path) -> Path:
    name = image.name.removesuffix("_leftImg8bit.png") + "_gtFine_labelIds.png"
    return root / "gtFine" / image.parent.parent.name / image.parent.name / name


def _same_name_pairs(
    image_folder: Path, label_folder: Path, label_format: _LabelFormat
) -> list[Pair]:
    images = _list_pngs(image_folder, "*.png")
    labels = _list_pngs(label_folder, "*.png")
    pairs = [Pair(image, label_folder / image.name) for image in images]
    _check_pairs(pairs, label_format)
    orphans = sorted({label.name for label in labels} - {image.name for image in images})
    if orphans:
        raise DatasetError(
            f"{label_folder / orphans[0]} has no image {image_folder / orphans[0]} "
            f"({len(orphans)} such labels). Unpack the missing images or remove these labels."
        )
    return pairs


def _list_pngs(folder: Path, pattern: str) -> list[Path]:
    # Archives packed on a Mac hold a hidden "._name.png" beside each file.
    found = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
    if found:
        return found
    if folder.is_dir():
        problem = f"Expected images {folder / pattern}, but {_describe(folder)}."
    else:
        parent = next(parent for parent in folder.parents if parent.is_dir())
        problem = f"Expected the folder {folder}, but {_describe(parent)}."
    raise DatasetError(
        f"{problem} Pass the folder that holds images/ and labels/ (GTA5), RGB/ and GT/LABELS/ "
        "(SYNTHIA) or leftImg8bit/ and gtFine/ (Cityscapes), unpacked."
    )


def _describe(folder: Path) -> str:
    names = sorted(os.listdir(folder))
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{folder} holds {shown}" if names else f"{folder} is empty"


def _check_pairs(pairs: Sequence[Pair], label_format: _LabelFormat) -> None:
    missing = [pair for pair in pairs if not pair.label.is_file()]
    if missing:
        raise DatasetError(
            f"{missing[0].image} has no label {missing[0].label} ({len(missing)} of {len(pairs)} "
            "images lack theirs). Unpack the missing labels or remove these images."
        )
    for image, label in tqdm(pairs, desc="checking", leave=False, disable=not is_main()):
        _, image_size = _read_header(image)
        mode, label_size = _read_header(label)
        if mode not in label_format.modes:
            raise DatasetError(
                f"{label}: expected {label_format.expected}, but got mode {mode}. "
                f"{label_format.mend}"
            )
        if label_size != image_size:
            raise DatasetError(
                f"{label} is {_times(label_size)}, but its image {image} is {_times(image_size)}. "
                "Unpack both again, or remove the pair."
            )


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _read_header(path: Path) -> tuple[str, tuple[int, int]]:
    try:
        with path.open("rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            if file.read() != _PNG_END:
                raise EOFError("the file breaks off")
        with Image.open(path) as image:
            is_rgb_16 = any(tile.args == _RGB_16 for tile in image.tile)
            return _RGB_16 if is_rgb_16 else image.mode, image.size
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _read(path: Path, raw_mode: str | None = None) -> Image.Image:
    try:
        with Image.open(path) as image:
            if raw_mode:
                image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
            image.load()
            return image
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DatasetError:
    return DatasetError(f"{path} is not a readable image ({error}). Unpack or download it again.")


def _read_image(path: Path) -> Image.Image:
    return _read(path).convert("RGB")


def _read_label(path: Path) -> Image.Image:
    if _read_header(path)[0] == _RGB_16:  # no other data set's labels are
        return _read_synthia_label(path)
    try:
        return Image.fromarray(train_ids(np.asarray(_read(path))))
    except ValueError as error:
        raise DatasetError(
            f"{path}: {error} Use the raw label ids (Cityscapes: *_labelIds.png), not instance "
            "ids or colors."
        ) from error


def read_labels(path: Path) -> Tensor:
    """Read train ids (H, W), int64, of a label file in any of the formats.

    Raises:
        DatasetError: If the file is not readable, or holds something else.
    """
    return _label_tensor(_read_label(path))


def _read_synthia_label(path: Path) -> Image.Image:
    try:
        return Image.fromarray(synthia_train_ids(_read_first_channel(path)))
    except ValueError as error:
        raise DatasetError(f"{path}: {error} {_SYNTHIA.mend}") from error


def _read_first_channel(path: Path) -> NDArray[np.uint16]:
    # Of a 16-bit sample Pillow keeps the high byte, which is 0 in every class id. Taking the
    # samples for little-endian, it keeps the low byte. Together they are the sample.
    sample: NDArray[np.uint16] = np.asarray(_read(path, "RGB;16B"))[..., 0].astype(np.uint16)
    sample <<= 8
    sample |= np.asarray(_read(path, "RGB;16L"))[..., 0]
    return sample


@dataclass(frozen=True)
class ResizeAndCrop:
    """The geometric part of reading: scale to a height, then crop and flip at random.

    Args:
        resize: What the whole image is scaled to, keeping its aspect ratio: "height:144", or
            "width:2200".
        crop: Height and width of the random crop; an image too narrow for it is scaled further,
            until it covers the crop. None keeps the whole image, its label at the original size.
        flip: Whether to mirror half of the samples.
    """

    resize: str
    crop: tuple[int, int] | None = None
    flip: bool = False

    def __call__(
        self, image: Image.Image, label: Image.Image, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Transform an image and its label alike."""
        view = self._draw(image, generator)
        labels = view.apply(label, Image.Resampling.NEAREST) if self.crop else label
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
        full = (round(image.height * scale), round(image.width * scale))
        size = self.crop or full
        top, left = (_randint(full[axis] - size[axis] + 1, generator) for axis in (0, 1))
        # Cutting out while scaling computes only the pixels that are kept.
        across, down = image.width / full[1], image.height / full[0]
        box = (left * across, top * down, (left + size[1]) * across, (top + size[0]) * down)
        return _View(size, box, mirror=self.flip and _randint(2, generator) == 1)


class _View(NamedTuple):
    size: tuple[int, int]
    box: tuple[float, float, float, float]
    mirror: bool

    def apply(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        return image.resize(self.size[::-1], resample, self.box)

    def turn(self, tensor: Tensor) -> Tensor:
        return tensor.flip(-1) if self.mirror else tensor


def _randint(high: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(high, (), generator=generator))


def _image_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _label_tensor(label: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(label, np.int64))


class LabeledImages(Dataset[tuple[Tensor, Tensor]]):
    """Images (3, H, W), float32 in [0, 1], with train ids (H, W), int64."""

    def __init__(self, pairs: Sequence[Pair], transform: ResizeAndCrop) -> None:
        self.pairs = pairs
        self.transform = transform

    def __len__(self) -> int:
        """Count the images."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Read one pair, with draws from torch's global generator."""
        return self.read(index)

    def read(self, index: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Read one pair, or raise a `DatasetError` that names the broken file."""
        pair = self.pairs[index]
        return self.transform(_read_image(pair.image), _read_label(pair.label), generator)

    def path(self, index: int) -> Path:
        """The image file of one pair."""
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
        return self.transform.image_only(_read_image(self.paths[index]), generator)

    def path(self, index: int) -> Path:
        """The image file."""
        return self.paths[index]
