"""Readers of GTA5 and Cityscapes as they lie on disk.

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
from classes import train_ids
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

_PNG_END = b"IEND\xaeB`\x82"
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError)  # what Pillow raises for a broken file


class DatasetError(Exception):
    """A data set on disk is not what its reader expects; the message names the file."""


class Pair(NamedTuple):
    """An image and the file of its raw label ids."""

    image: Path
    label: Path


def gta5_pairs(root: Path) -> list[Pair]:
    """List and check `root/images/00001.png` with `root/labels/00001.png`.

    Raises:
        DatasetError: If a folder, an image or a label is missing, or a pair does not fit together.
    """
    images = _list_pngs(root / "images", "*.png")
    labels = _list_pngs(root / "labels", "*.png")
    pairs = [Pair(image, root / "labels" / image.name) for image in images]
    _check_pairs(pairs)
    orphans = sorted({label.name for label in labels} - {image.name for image in images})
    if orphans:
        raise DatasetError(
            f"{root / 'labels' / orphans[0]} has no image {root / 'images' / orphans[0]} "
            f"({len(orphans)} such labels). Unpack the missing images or remove these labels."
        )
    return pairs


def cityscapes_images(root: Path, split: Literal["train", "val"]) -> list[Path]:
    """List and check `root/leftImg8bit/<split>/<city>/*_leftImg8bit.png`; no label is looked at.

    Raises:
        DatasetError: If the folder or its images are missing, or a file is not an image.
    """
    images = _list_pngs(root / "leftImg8bit" / split, "*/*_leftImg8bit.png")
    for image in tqdm(images, desc="checking", leave=False):
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
    _check_pairs(pairs)
    return pairs


def _cityscapes_label(root: Path, image: Path) -> Path:
    name = image.name.removesuffix("_leftImg8bit.png") + "_gtFine_labelIds.png"
    return root / "gtFine" / image.parent.parent.name / image.parent.name / name


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
        f"{problem} Pass the folder that holds images/ and labels/ (GTA5) or leftImg8bit/ and "
        "gtFine/ (Cityscapes), unpacked."
    )


def _describe(folder: Path) -> str:
    names = sorted(os.listdir(folder))
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{folder} holds {shown}" if names else f"{folder} is empty"


def _check_pairs(pairs: Sequence[Pair]) -> None:
    missing = [pair for pair in pairs if not pair.label.is_file()]
    if missing:
        raise DatasetError(
            f"{missing[0].image} has no label {missing[0].label} ({len(missing)} of {len(pairs)} "
            "images lack theirs). Unpack the missing labels or remove these images."
        )
    for image, label in tqdm(pairs, desc="checking", leave=False):
        _, image_size = _read_header(image)
        mode, label_size = _read_header(label)
        if mode not in ("L", "P"):
            raise DatasetError(
                f"{label}: expected a grayscale or paletted PNG of raw label ids, but got mode "
                f"{mode}. This looks like a color rendering; use the label id files instead."
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
            return image.mode, image.size
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DatasetError:
    return DatasetError(f"{path} is not a readable image ({error}). Unpack or download it again.")


def _read_image(path: Path) -> Image.Image:
    return _read(path).convert("RGB")


def _read_label(path: Path) -> Image.Image:
    try:
        return Image.fromarray(train_ids(np.asarray(_read(path))))
    except ValueError as error:
        raise DatasetError(
            f"{path}: {error} Use the raw label ids (Cityscapes: *_labelIds.png), not instance "
            "ids or colors."
        ) from error


@dataclass(frozen=True)
class ResizeAndCrop:
    """The geometric part of reading: scale to a height, then crop and flip at random.

    Randomness comes from torch's global generator, which `DataLoader` seeds in each worker.

    Args:
        height: Height of the whole image after scaling, which keeps the aspect ratio.
        crop: Height and width of the random crop; an image too narrow for it is scaled further,
            until it covers the crop. None keeps the whole image, its label at the original size.
        flip: Whether to mirror half of the samples.
    """

    height: int
    crop: tuple[int, int] | None = None
    flip: bool = False

    def __call__(self, image: Image.Image, label: Image.Image) -> tuple[Tensor, Tensor]:
        """Transform an image and its label alike."""
        view = self._draw(image)
        labels = view.apply(label, Image.Resampling.NEAREST) if self.crop else label
        pixels = view.apply(image, Image.Resampling.BILINEAR)
        return view.turn(_image_tensor(pixels)), view.turn(_label_tensor(labels))

    def image_only(self, image: Image.Image) -> Tensor:
        """Transform an image that has no label."""
        view = self._draw(image)
        pixels = view.apply(image, Image.Resampling.BILINEAR)
        return view.turn(_image_tensor(pixels))

    def _draw(self, image: Image.Image) -> "_View":
        scale = self.height / image.height
        if self.crop:
            scale = max(scale, self.crop[0] / image.height, self.crop[1] / image.width)
        full = (round(image.height * scale), round(image.width * scale))
        size = self.crop or full
        top, left = (_randint(full[axis] - size[axis] + 1) for axis in (0, 1))
        # Cutting out while scaling computes only the pixels that are kept.
        across, down = image.width / full[1], image.height / full[0]
        box = (left * across, top * down, (left + size[1]) * across, (top + size[0]) * down)
        return _View(size, box, mirror=self.flip and _randint(2) == 1)


class _View(NamedTuple):
    size: tuple[int, int]
    box: tuple[float, float, float, float]
    mirror: bool

    def apply(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        return image.resize(self.size[::-1], resample, self.box)

    def turn(self, tensor: Tensor) -> Tensor:
        return tensor.flip(-1) if self.mirror else tensor


def _randint(high: int) -> int:
    return int(torch.randint(high, ()))


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
        """Read one pair, or raise a `DatasetError` that names the broken file."""
        pair = self.pairs[index]
        return self.transform(_read_image(pair.image), _read_label(pair.label))


class UnlabeledImages(Dataset[Tensor]):
    """Images (3, H, W), float32 in [0, 1], and nothing else."""

    def __init__(self, paths: Sequence[Path], transform: ResizeAndCrop) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        """Count the images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Read one image, or raise a `DatasetError` that names the broken file."""
        return self.transform.image_only(_read_image(self.paths[index]))
