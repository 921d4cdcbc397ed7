"""Folders of images and labels: listed, checked and read into memory; masks and pictures of them.

A folder holds ``images/`` and ``labels/`` with equal stems; a label file is a gray or palette image
of class ids. A line of ``classes.txt`` is ``name: id, id``, or ``name``, whose id is the number of
its line, from 0. Other ids are ignored.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from anchorda.plots import class_colors, plot_labels

IGNORE, MAX_ID = 255, 65535
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
Batch = tuple[Tensor, Tensor]  # images (N, 3, H, W) in [0, 1] and labels (N, H, W)
Classes = dict[str, list[int]]  # the ids of each class in the label files


Predictor = Callable[[Tensor], Tensor]  # images (N, 3, H, W) to indices of classes (N, H, W)


class DataError(ValueError):
    """Files that cannot be used; the message names all of them."""


class Domain(NamedTuple):
    """Images (N, 3, H, W) uint8 and labels (N, H, W) uint8, 255 where ignored."""

    images: Tensor
    labels: Tensor

    def batch(self, indices: Tensor, device: str) -> Batch:
        """Return some images and their labels."""
        images, labels = (part[indices].to(device) for part in self)
        return images / 255, labels.long()

    def draw(self, count: int, device: str) -> Batch:
        """Return images and labels drawn at random."""
        return self.batch(torch.randint(len(self.images), [count]), device)

    def batches(self, size: int, device: str) -> Iterator[Batch]:
        """Yield all images and labels in order, in batches of a size."""
        for indices in torch.arange(len(self.images)).split(size):
            yield self.batch(indices, device)


class Data(NamedTuple):
    """Both domains; no image of `held_out` and `evaluation` is trained on."""

    classes: Classes
    source: Domain
    held_out: Domain
    target: Domain
    evaluation: Domain
    frequency: Tensor  # (C,) of the classes among the labeled pixels of the source

    def class_weights(self) -> Tensor:
        """Return larger weights (C,) for rarer classes, 1 on average over the source's pixels."""
        weights = (len(self.classes) * self.frequency).clamp(min=1e-3).rsqrt()
        return weights / (weights @ self.frequency)


def read_classes(path: Path) -> Classes:
    """Return the ids of each class."""
    classes: Classes = {}
    for number, line in enumerate(path.read_text("utf-8-sig").rstrip().splitlines()):
        name, ids = line.rsplit(":", 1) if ":" in line else (line, str(number))
        if line.strip() and not all(i.strip().isdecimal() for i in ids.split(",")):
            raise DataError(f"{path}: expected `name` or `name: id, id`, but got {line!r}.")
        if line.strip():
            classes.setdefault(name.strip(), []).extend(map(int, ids.split(",")))
    every = [i for ids in classes.values() for i in ids]
    if len(classes) < 2 or len(set(every)) < len(every) or max(every) >= MAX_ID:
        raise DataError(f"{path}: expected two classes or more and each id once, got {classes}.")
    return classes


def list_images(folder: Path) -> dict[str, Path]:
    """Return the image files of a folder by their stems.

    Raises:
        DataError: if two files have one stem.
    """
    files = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in SUFFIXES]
    images = {path.stem: path for path in files}
    if twice := [path.name for path in files if images[path.stem] != path]:
        raise DataError(f"{folder}: expected one file of each name, but {twice} have another.")
    return images


def read_image(path: Path) -> Image.Image:
    """Return an image in RGB, turned as its camera says."""
    with Image.open(path) as file:
        return ImageOps.exif_transpose(file).convert("RGB")


def read_ids(path: Path, size: tuple[int, int]) -> NDArray[np.int64]:
    """Return the class ids (H, W) of a gray or palette file that is as large as its image."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise DataError("the label is a JPEG, which changes class ids; write labels as PNG")
    with Image.open(path) as file:
        ids = np.asarray(file).astype(np.int64)
    if ids.shape[1::-1] != size:
        raise DataError(
            f"the label is {ids.shape[1]}×{ids.shape[0]}, the image {size[0]}×{size[1]}"
        )
    if ids.ndim == 3 and (ids == ids[..., :1]).all():
        ids = ids[..., 0]  # gray, saved with three channels
    if ids.ndim == 3:
        raise DataError("the label is a color image; expected one channel of class ids")
    return np.where((ids < 0) | (ids > MAX_ID), MAX_ID, ids)


def read_domain(
    name: str, pairs: Sequence[tuple[Path, Path | None]], classes: Classes, size: tuple[int, int]
) -> Domain:
    """Read images and label files, resized to (H, W), and print what the labels show.

    Raises:
        DataError: if files cannot be used; it names all of them.
    """
    index_of = np.full(MAX_ID + 1, IGNORE, np.uint8)
    for index, ids_of_class in enumerate(classes.values()):
        index_of[ids_of_class] = index
    images = torch.zeros(len(pairs), 3, *size, dtype=torch.uint8)
    labels = torch.full((len(pairs), *size), IGNORE, dtype=torch.uint8)
    pixels, problems = Counter[int](), ""
    for number, (path, label) in enumerate(tqdm(pairs, f"reading the {name}", leave=False)):
        try:
            image = read_image(path)
            resized = np.array(image.resize(size[::-1], Image.Resampling.BILINEAR))
            images[number] = torch.from_numpy(resized).permute(2, 0, 1)
            if label is not None:
                ids = read_ids(label, image.size)
                pixels.update(ids.ravel().tolist())
                indices = Image.fromarray(index_of[ids])
                resized = np.array(indices.resize(size[::-1], Image.Resampling.NEAREST))
                labels[number] = torch.from_numpy(resized)
        except (OSError, DataError, Image.DecompressionBombError) as error:
            problems += f"\n  {path}: {error}"
    if problems:
        raise DataError(f"The {name} has files that cannot be used:{problems}")
    ignored = {i: count for i, count in pixels.items() if index_of[i] == IGNORE}
    missing = [c for c, ids in classes.items() if not any(i in pixels for i in ids)]
    text = f"{sum(ignored.values()) / max(1, pixels.total()):.1%} ignored, ids {sorted(ignored)}"
    text += f"; not shown: {', '.join(missing)}" if missing else ""
    print(f"{name}: {len(pairs)} images" + (f"; {text}" if pixels else ""))
    return Domain(images, labels)


def open_data(source: Path, target: Path, classes_file: Path, size: tuple[int, int]) -> Data:
    """List, split and read both domains.

    A tenth of the source is held out. Target images with a label are for the evaluation; if all
    have one, every third is.

    Raises:
        DataError: if files cannot be used, or the source's labels show fewer than two classes.
    """
    classes, listed = read_classes(classes_file), []
    for folder in (source, target):
        images, labels = list_images(folder / "images"), list_images(folder / "labels")
        listed.append([(path, labels.get(stem)) for stem, path in images.items()])
        if not images:
            raise DataError(f"Expected images in {folder / 'images'}, but found none.")
    labeled, truth = ([pair for pair in pairs if pair[1] is not None] for pairs in listed)
    if not labeled:
        raise DataError(f"Expected files in {source / 'labels'} with the names of the images.")
    truth = truth[::3] if len(truth) == len(listed[1]) else truth
    unlabeled = [(path, None) for path, label in listed[1] if (path, label) not in truth]
    whole = read_domain("source", labeled, classes, size)
    counts = whole.labels[whole.labels != IGNORE].bincount(minlength=len(classes))
    if (counts > 0).sum() < 2:
        raise DataError(
            f"The labels of {source} show fewer than two of the classes. Compare their ids, above, "
            f"with those in {classes_file}: {classes}."
        )
    learned = {c: ids if n else [] for (c, ids), n in zip(classes.items(), counts, strict=True)}
    held_out = torch.arange(len(labeled)) % 10 == 0
    trained = ~held_out if len(labeled) > 1 else held_out
    return Data(
        classes,
        source=Domain(whole.images[trained], whole.labels[trained]),
        held_out=Domain(whole.images[held_out], whole.labels[held_out]),
        target=read_domain("target", unlabeled or [(truth[0][0], None)], classes, size),
        evaluation=read_domain("evaluation", truth, learned, size),
        frequency=counts / counts.sum(),
    )


def load_weights(path: Path, settings: dict[str, object]) -> dict[str, Tensor]:
    """Return the weights that a phase has saved.

    Raises:
        DataError: if they were trained with other settings; it names these.
    """
    saved = torch.load(path, "cpu", weights_only=True)
    if other := {k: v for k, v in saved["settings"].items() if v != settings[k]}:
        raise DataError(f"{path} was trained with {other}. Resume with the same settings.")
    weights: dict[str, Tensor] = saved["weights"]
    return weights


def write_scores(path: Path, scores: dict[str, dict[str, float]]) -> None:
    """Write the scores of each network, and print them as a Markdown table in percent."""
    text = json.dumps(scores)
    save(path, lambda file: file.write_text(text))
    rows = [["IoU (%)", *scores, "change"], [":--", *["--:"] * (len(scores) + 1)]]
    for name in scores["adapted"]:
        values = [100 * score[name] for score in scores.values()]
        rows.append([name, *(f"{v:.1f}" for v in values), f"{values[-1] - values[0]:+.1f}"])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    print("\n".join(lines).replace("+nan", "–").replace("nan", "–"))


def write_masks(
    folder: Path,
    output: Path,
    classes: Classes,
    size: tuple[int, int],
    predict: Callable[[Tensor, tuple[int, int]], Tensor],
) -> None:
    """Write a mask of each image in a folder, as large as the image, in the ids of the classes.

    Args:
        folder: holds the images.
        output: for the masks, PNG files of the same stems.
        classes: the first id of a class stands for it.
        size: (H, W) that images are resized to.
        predict: maps an image (1, 3, H, W) and the size (h, w) of its mask to indices (1, h, w).
    """
    ids = np.array([ids[0] for ids in classes.values()], np.uint16)
    ids = ids.astype(np.uint8) if max(ids) < 256 else ids
    files = list_images(folder)
    images = read_domain("images", [(path, None) for path in files.values()], classes, size)
    for (stem, path), (image, _) in zip(files.items(), images.batches(1, "cpu"), strict=True):
        width, height = read_image(path).size
        mask = Image.fromarray(ids[predict(image, (height, width))[0].cpu().numpy()])
        save(output / f"{stem}.png", mask.save)
    print(f"{len(files)} masks are in {output}.")


def draw_pictures(domain: Domain, predictors: Mapping[str, Predictor], classes: Classes) -> Figure:
    """Draw up to four images, what each predictor makes of them, and the truth if there is any."""
    chosen = torch.linspace(0, len(domain.images) - 1, min(4, len(domain.images))).long()
    images, labels = domain.batch(chosen, "cpu")
    columns = {"image": images.permute(0, 2, 3, 1)}
    columns |= {name: predict(images) for name, predict in predictors.items()}
    columns |= {"truth": labels} if (labels != IGNORE).any() else {}
    rows, height, width = labels.shape
    size = 3.2 * len(columns), 3.2 * rows * height / width + 0.8
    figure, colors = Figure(size, layout="constrained"), class_colors(len(classes))
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, maps) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title)
        for axis, shown in zip(column, maps.cpu(), strict=True):
            if title == "image":
                axis.imshow(shown.numpy())
                axis.set_axis_off()
            else:
                plot_labels(axis, shown, colors=colors)
    handles = [Patch(color=color, label=c) for c, color in zip(classes, colors, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * len(columns))
    return figure


def save(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(partial := path.with_name(f"partial-{path.name}"))
    partial.replace(path)
