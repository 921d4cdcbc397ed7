"""The two domains: settings, splits, class weights, augmentation.

Folders of your own need no code: see `--source-format folder`. For another format, write its reader
in `readers.py` and choose it in `open_data`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import parallel
from augment import photometric
from classes import STREET, SYNTHIA_16, Classes, read_classes
from engine.files import write_text
from readers import (
    DatasetError,
    LabelCounts,
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
    synthia_pairs,
)
from streams import Loading
from torch import Tensor


@dataclass(frozen=True)
class DataSettings:
    """The two data sets, the size of images and crops, and what is done to them."""

    source: Path | None = None
    """Folder of the source. Without it and --target, a synthetic pair is drawn."""
    target: Path | None = None
    """Folder of the target."""
    source_format: Literal["gta5", "synthia", "folder"] = "gta5"
    """Format of the source: gta5, with the folders images and labels;
    synthia, with RGB and GT/LABELS, which is evaluated on its 16 classes;
    or folder, with images and labels of your own, whose classes --classes lists."""
    target_format: Literal["cityscapes", "folder"] = "cityscapes"
    """Format of the target: cityscapes, with leftImg8bit and gtFine;
    or folder, with images and, for evaluation alone, labels of some of them."""
    classes: Path | None = None
    """Text file of your own classes, one a line: `name: id, id`, the ids in the label files.
    Without it, the classes are the 19 of Cityscapes."""
    skip_bad: bool = False
    """Leave out images and labels that cannot be used. Otherwise an error lists them."""
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
        own = "folder" in (self.source_format, self.target_format) or self.classes is not None
        if own and self.source is None:
            raise ValueError("data of your own need --source and --target")
        if self.source_format == "folder" and self.classes is None:
            raise ValueError("--source-format folder needs --classes, a list of your classes")
        if self.source_format == "synthia" and self.classes is not None:
            raise ValueError("--classes is for other formats: SYNTHIA's ids are fixed")
        self.class_list()

    def class_list(self) -> Classes:
        """Return the classes to tell apart."""
        return STREET if self.classes is None else read_classes(self.classes)


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
    """The target's validation split, or its held-out images with a label; empty without labels."""
    analysis: LabeledImages | None
    """The target's training split with its labels, if there are any: never trained on."""
    evaluated: tuple[int, ...]
    """The classes that the source shows: the truth of others is ignored in evaluation."""
    class_weight: Tensor | None
    """(C,): weights of the classes in the cross-entropy of the source."""
    photometric: bool
    loading: Loading
    classes: Classes = STREET

    def augment(self, images: Tensor) -> Tensor:
        """Augment images for the trained network; the frozen one sees them unchanged."""
        return photometric(images) if self.photometric else images


def open_data(settings: DataSettings, loading: Loading) -> Data:
    """List both data sets, and check them: files, ids, classes.

    Raises:
        DatasetError: If they cannot be trained on.
    """
    assert settings.source is not None
    assert settings.target is not None
    classes = settings.class_list()
    whole = ResizeAndCrop(settings.resize)
    crops = ResizeAndCrop(settings.resize, settings.crop, flip=True)
    pairs = _source_pairs(settings.source, settings, classes)
    target_images, evaluation, analysis = _target_parts(settings.target, settings, classes)
    tenth = min(500, max(1, len(pairs) // 10))
    pairs, held_out = pairs[:-tenth] or pairs, pairs[-tenth:]
    counts = count_labels(pairs, classes)
    _say(f"source: {len(pairs)} images; {counts.describe(classes.names)}")
    if int(counts.classes.count_nonzero()) < 2:
        raise DatasetError(
            f"Expected two classes or more in the labels of {settings.source}, but there is one. "
            "Check their ids, and the list of classes."
        )
    _say(f"target: {len(target_images)} images")
    if evaluation:
        known = count_labels(evaluation, classes).describe(classes.names)
        _say(f"evaluation: {len(evaluation)} images; {known}")
    if settings.source_format == "synthia":
        evaluated = SYNTHIA_16
    elif classes == STREET:
        evaluated = tuple(range(len(classes)))
    else:
        evaluated = tuple(counts.classes.nonzero()[:, 0].tolist())
    return Data(
        source=LabeledImages(pairs, crops, classes),
        source_whole=LabeledImages(pairs, whole, classes),
        held_out=LabeledImages(held_out, whole, classes),
        target=UnlabeledImages(target_images, crops),
        target_whole=UnlabeledImages(target_images, whole),
        evaluation=LabeledImages(evaluation, whole, classes),
        analysis=LabeledImages(analysis, whole, classes) if analysis else None,
        evaluated=evaluated,
        class_weight=class_weights(counts).to(loading.device) if settings.class_weights else None,
        photometric=settings.photometric,
        loading=loading,
        classes=classes,
    )


def _source_pairs(folder: Path, settings: DataSettings, classes: Classes) -> list[Pair]:
    if settings.source_format == "synthia":
        return synthia_pairs(folder, skip_bad=settings.skip_bad)
    return gta5_pairs(folder, classes, skip_bad=settings.skip_bad)  # as folders of one's own


def _target_parts(
    folder: Path, settings: DataSettings, classes: Classes
) -> tuple[list[Path], list[Pair], list[Pair]]:
    """Return images to train on, images to evaluate on, and the first with their labels, if any."""
    skip = settings.skip_bad
    if settings.target_format == "folder":
        return *folder_target(folder, classes, skip_bad=skip), []
    images = cityscapes_images(folder, "train", skip_bad=skip)
    evaluation = cityscapes_pairs(folder, "val", classes, skip_bad=skip)
    if not (folder / "gtFine" / "train").is_dir():
        return images, evaluation, []
    return images, evaluation, cityscapes_pairs(folder, "train", classes, skip_bad=skip)


def _say(text: str) -> None:
    if parallel.is_main():
        print(text, flush=True)


def class_weights(counts: LabelCounts) -> Tensor:
    """Return 1/√frequency of each class in the source, scaled to mean 1 over its pixels.

    Without these weights, small and rare classes are not learned in as few iterations as the
    defaults are.
    """
    frequency = counts.classes.double() / counts.classes.sum()
    weight = frequency.clamp(min=1e-4).rsqrt()
    return (weight / (weight @ frequency)).float()


def check_content(data: Data, settings: DataSettings, saved: Path, resume: bool) -> None:
    """Save the checksums of all files that a run reads; if it is resumed, compare them.

    Raises:
        DatasetError: If the files are others than those that the run began with. Their folders
            may have moved.
    """
    if not parallel.is_main():
        return
    content = _content(data, settings)
    if resume and saved.is_file():
        difference = content_difference(json.loads(saved.read_text("utf-8")), content)
        if difference:
            raise DatasetError(
                f"{saved.parent} holds a run on other data. Since it began, there are files "
                f"{difference}. Restore them, or name another --output."
            )
    write_text(saved, json.dumps(content, indent=0, ensure_ascii=False) + "\n")


def _content(data: Data, settings: DataSettings) -> dict[str, str]:
    """Return a checksum of each file by its path in its data set, and the classes."""
    assert settings.source is not None
    assert settings.target is not None
    source = [*data.source.pairs, *data.held_out.pairs]
    target = [*data.evaluation.pairs, *(data.analysis.pairs if data.analysis else [])]
    parts = {
        "source": (settings.source, [file for pair in source for file in pair]),
        "target": (
            settings.target,
            [*data.target.paths, *(file for pair in target for file in pair)],
        ),
    }
    content = {
        f"{domain}/{name}": checksum
        for domain, (root, files) in parts.items()
        for name, checksum in content_of(root, dict.fromkeys(files)).items()
    }
    return {"classes": str([*zip(data.classes.names, data.classes.ids, strict=True)]), **content}
