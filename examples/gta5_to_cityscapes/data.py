"""The two domains: settings, splits, class weights, augmentation.

To train on a data set of your own, write its reader in `readers.py` and choose it in `open_data`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from augment import photometric
from classes import NUM_CLASSES, SYNTHIA_16
from engine import parallel
from readers import (
    LabeledImages,
    ResizeAndCrop,
    UnlabeledImages,
    cityscapes_images,
    cityscapes_pairs,
    gta5_pairs,
    synthia_pairs,
)
from streams import Loading, each_once
from torch import Tensor
from torch.utils.data import Subset


@dataclass(frozen=True)
class DataSettings:
    """The two data sets, the size of images and crops, and what is done to them."""

    source: Path | None = None
    """Folder of GTA5 or SYNTHIA. Without it and --target, a synthetic pair is drawn."""
    target: Path | None = None
    """Folder of Cityscapes, which holds leftImg8bit and gtFine."""
    source_format: Literal["gta5", "synthia"] = "gta5"
    """Format of the source: gta5, with the folders images and labels,
    or synthia, with RGB and GT/LABELS, which is evaluated on its 16 classes."""
    resize: str = "height:144"
    """Size that images are scaled to, height:PIXELS or width:PIXELS."""
    crop: tuple[int, int] = (128, 192)
    """Height and width of the random crops to train on."""
    photometric: bool = True
    """Change color, light and sharpness of the crops at random."""
    class_weights: bool = True
    """Give rare classes more weight in the cross-entropy of the source."""

    def check(self) -> None:
        """Raise a ValueError that names the flags which do not fit together."""
        side, _, pixels = self.resize.partition(":")
        if side not in ("height", "width") or not pixels.isdecimal() or int(pixels) < 1:
            raise ValueError(
                f"--resize: expected height:PIXELS or width:PIXELS, got {self.resize!r}"
            )
        if min(self.crop) < 1:
            raise ValueError(f"--crop: expected two sizes of at least 1, got {self.crop}")
        if self.crop[side == "width"] > int(pixels):
            raise ValueError(f"--crop {self.crop} is larger than --resize {self.resize}")
        if (self.source is None) != (self.target is None):
            raise ValueError("--source and --target belong together: give both, or neither")


@dataclass(frozen=True)
class Data:
    """The two domains, listed and checked."""

    source: LabeledImages
    """Crops to train on."""
    source_whole: LabeledImages
    """The same images uncropped, to compute anchors from."""
    held_out: LabeledImages
    """The last tenth of the source, at most 500 images, never trained on: they measure the
    precision of a margin, and choose the best network of a phase."""
    target: UnlabeledImages
    target_whole: UnlabeledImages
    evaluation: LabeledImages
    """The target's validation split."""
    analysis: LabeledImages | None
    """The target's training split with its labels, if there are any: never trained on."""
    evaluated: tuple[int, ...]
    """The classes that the source knows: the truth of others is ignored in evaluation."""
    class_weight: Tensor | None
    """(C,): weights of the classes in the cross-entropy of the source."""
    photometric: bool
    loading: Loading

    def augment(self, images: Tensor) -> Tensor:
        """The images as the trained network sees them; the frozen one sees them unchanged."""
        return photometric(images) if self.photometric else images


def open_data(settings: DataSettings, loading: Loading) -> Data:
    """List and check both data sets."""
    assert settings.source is not None
    assert settings.target is not None
    whole = ResizeAndCrop(settings.resize)
    crops = ResizeAndCrop(settings.resize, settings.crop, flip=True)
    is_synthia = settings.source_format == "synthia"
    pairs = synthia_pairs(settings.source) if is_synthia else gta5_pairs(settings.source)
    target_images = cityscapes_images(settings.target, "train")
    has_truth = (settings.target / "gtFine" / "train").is_dir()
    tenth = min(500, max(1, len(pairs) // 10))
    pairs, held_out = pairs[:-tenth] or pairs, pairs[-tenth:]
    source_whole = LabeledImages(pairs, whole)
    return Data(
        source=LabeledImages(pairs, crops),
        source_whole=source_whole,
        held_out=LabeledImages(held_out, whole),
        target=UnlabeledImages(target_images, crops),
        target_whole=UnlabeledImages(target_images, whole),
        evaluation=LabeledImages(cityscapes_pairs(settings.target, "val"), whole),
        analysis=(
            LabeledImages(cityscapes_pairs(settings.target, "train"), whole) if has_truth else None
        ),
        evaluated=SYNTHIA_16 if is_synthia else tuple(range(NUM_CLASSES)),
        class_weight=weigh_classes(source_whole, loading) if settings.class_weights else None,
        photometric=settings.photometric,
        loading=loading,
    )


def weigh_classes(source: LabeledImages, loading: Loading) -> Tensor:
    """One over the root of each class's frequency in the source, scaled to mean 1 over its pixels.

    Without these weights, small and rare classes are not learned in as few iterations as the
    defaults are.
    """
    some = Subset(source, range(0, len(source), math.ceil(len(source) / 240)))
    counts = torch.zeros(NUM_CLASSES, device=loading.device)
    for _, labels in each_once(some, "class frequencies", loading):
        counts += torch.bincount(labels[labels < NUM_CLASSES], minlength=NUM_CLASSES)
    counts = parallel.total(counts.double())
    frequency = counts / counts.sum()
    weight = frequency.clamp(min=1e-4).rsqrt()
    return (weight / (weight @ frequency)).float()
