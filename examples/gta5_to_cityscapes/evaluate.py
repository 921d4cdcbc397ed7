"""Score a checkpoint of `train.py` on Cityscapes, top to bottom.

    python examples/gta5_to_cityscapes/evaluate.py --checkpoint runs/one/checkpoints/stage-3.pt \
        --target CITYSCAPES --output results/one

Settings, network, prediction, scores, files. Nothing of it chooses anything: it reports.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import parallel
import torch
import tyro
from classes import IGNORE, NUM_CLASSES, STREET, SYNTHIA_13, SYNTHIA_16, Classes
from engine.files import load_finished, write_atomically, write_text
from image_files import read_header
from networks.build import build_network
from networks.segmenter import Precision, Segmenter, enlarge, segment
from PIL import Image
from readers import (
    DatasetError,
    ResizeAndCrop,
    UnlabeledImages,
    cityscapes_images,
    cityscapes_pairs,
    count_labels,
    folder_images,
    folder_target,
    read_labels,
)
from report import draw_rows, iou_table, mean_iou, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import anchorda

# ---------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """Score a checkpoint of train.py on Cityscapes or images of your own."""

    checkpoint: Path
    """Checkpoint of a finished phase, such as runs/first/checkpoints/stage-3.pt."""
    target: Path
    """Folder of Cityscapes, which holds leftImg8bit and gtFine, or of images and labels."""
    output: Path
    """Folder for scores, labels and pictures."""
    target_format: Literal["cityscapes", "folder"] = "cityscapes"
    """Format of the target, as for train.py."""
    split: Literal["val", "test"] = "val"
    """Split to predict; test has no labels to score by.
    Of a folder, val is the labeled images that train.py evaluates on, and test all images."""
    scales: tuple[float, ...] = (1.0,)
    """Scales of the images to average predictions over."""
    flip: bool = False
    """Average over the mirrored images too."""
    labels: bool = False
    """Write labelIds PNGs, as the test server takes them."""
    pictures: int = 0
    """Number of images to draw with their predictions."""
    precision: Precision = "float32"
    """Precision of the network, by autocast."""
    workers: int = 2
    """Processes that read images."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device of torch, such as cpu or cuda."""

    def check(self) -> None:
        """Raise a ValueError that names the flags which are wrong."""
        if not self.checkpoint.is_file():
            raise ValueError(f"there is no checkpoint {self.checkpoint}")
        parallel.check_device(self.device)
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"--scales: expected numbers above 0, got {[*self.scales]}")
        if self.split == "test" and not (self.labels or self.pictures):
            raise ValueError(
                "--split test has no labels to score by: ask for --labels or --pictures"
            )


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Return settings from the command line; exit with a message where they are wrong."""
    settings = tyro.cli(Settings, prog="evaluate.py", args=arguments)
    try:
        settings.check()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return settings


# ----------------------------------------------------------------------------------------- network


class Trained(NamedTuple):
    """A trained network, its image size and its classes."""

    network: Segmenter
    resize: str
    """The size of its images, "height:144" or "width:2200"."""
    classes: Classes
    evaluated: tuple[int, ...]
    """The classes that its source knows: the truth of others is ignored."""


def load_trained(path: Path, device: str, precision: Precision = "float32") -> Trained:
    """Return the network of a checkpoint.

    Raises:
        ValueError: if the file is none of `train.py`'s, or its weights do not fit its network.
    """
    parts = load_finished(path)
    settings = parts["settings"]
    classes = Classes.from_plain(parts["classes"]) if "classes" in parts else STREET
    network = build_network(settings["network"], len(classes))
    try:
        network.load_state_dict(parts["network"])
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its own settings: {error}") from error
    network.precision = precision
    network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    is_synthia = settings["source_format"] == "synthia"
    evaluated = SYNTHIA_16 if is_synthia else tuple(range(NUM_CLASSES))
    evaluated = tuple(parts.get("evaluated", evaluated))
    return Trained(network.to(device), settings["resize"], classes, evaluated)


# -------------------------------------------------------------------------------------- prediction


class Views(Dataset[tuple[list[Tensor], tuple[int, int]]]):
    """Images at several scales, each (1, 3, h, w), and their own height and width."""

    def __init__(self, paths: Sequence[Path], resize: str, scales: Sequence[float]) -> None:
        self.paths = paths
        side, _, pixels = resize.partition(":")
        sizes = [max(1, round(scale * int(pixels))) for scale in scales]
        self.scaled = [UnlabeledImages(paths, ResizeAndCrop(f"{side}:{size}")) for size in sizes]

    def __len__(self) -> int:
        """Count the images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[list[Tensor], tuple[int, int]]:
        """Read one image at all scales."""
        width, height = read_header(self.paths[index]).size
        return [images.read(index)[None] for images in self.scaled], (height, width)


@torch.no_grad()
def predict(
    network: Segmenter, views: Sequence[Tensor], size: tuple[int, int], *, flip: bool
) -> Tensor:
    r"""Return the class scores (C, H, W) of an image from several views of it.

    .. math:: \frac{1}{|V|} \sum_{v \in V} \mathrm{softmax}(\mathrm{up}(z(v)))

    with the logits z of a view interpolated to the image's size and, if the view was mirrored,
    mirrored back. Of a single view the scores are its interpolated logits: the same class wins.
    """
    scores = torch.zeros(())
    for view in views:
        for mirrored in (False, True) if flip else (False,):
            _, logits = segment(network, view.flip(-1) if mirrored else view)
            logits = enlarge(network, logits, size)
            if len(views) == 1 and not flip:
                return logits[0]
            logits = logits.flip(-1) if mirrored else logits
            scores = logits[0].softmax(dim=0).add_(scores.to(logits.device))
    return scores / (len(views) * (2 if flip else 1))


def predictions(trained: Trained, paths: Sequence[Path], settings: Settings) -> Iterator[Tensor]:
    """Yield predicted train ids (H, W) of images, at their own size and in their order."""
    views = Views(paths, trained.resize, settings.scales)
    loader = DataLoader(views, batch_size=None, num_workers=settings.workers)
    for images, size in tqdm(loader, desc="predicting"):
        moved = [image.to(settings.device) for image in images]
        yield predict(trained.network, moved, size, flip=settings.flip).argmax(dim=0)


# ------------------------------------------------------------------------------------------ scores


def scores_of(
    confusion: anchorda.ConfusionMatrix, settings: Settings, trained: Trained
) -> dict[str, Any]:
    """Return the scores as plain values, None where a class does not occur, and the settings."""
    iou = confusion.iou()
    named = {
        name: None if math.isnan(value) else value
        for name, value in zip(trained.classes.names, iou.tolist(), strict=True)
    }
    scores = {"miou": confusion.mean_iou().item(), "accuracy": confusion.accuracy().item()}
    if trained.classes == STREET and trained.evaluated == SYNTHIA_16:
        scores["miou of 13 classes"] = mean_iou(confusion, SYNTHIA_13)
    how = {
        name: str(v) if isinstance(v, Path) else v
        for name, v in dataclasses.asdict(settings).items()
    }
    return {**scores, "iou": named, "settings": how}


# ------------------------------------------------------------------------------------------- files


def save_label_ids(folder: Path, image: Path, prediction: Tensor, classes: Classes) -> None:
    """Write the ids of label files, under a name by which the official evaluation finds them."""
    ids = np.array([of_class[0] for of_class in classes.ids])
    ids = ids.astype(np.uint8 if ids.max() < 256 else np.uint16)
    picture = Image.fromarray(ids[prediction.cpu().numpy()])
    name = image.stem.removesuffix("_leftImg8bit") + "_labelIds.png"
    write_atomically(folder / name, lambda temporary: picture.save(temporary, format="png"))


def files_of(settings: Settings, classes: Classes) -> tuple[list[Path], list[Path]]:
    """Return the images of the split, and their labels, if it has labels."""
    target, own = settings.target, settings.target_format == "folder"
    if settings.split == "test":
        return (folder_images(target) if own else cityscapes_images(target, "test")), []
    if own:
        pairs = folder_target(target, classes).evaluation
        if not pairs:
            raise DatasetError(f"{target} has no folder labels to score by: choose --split test.")
    else:
        pairs = cityscapes_pairs(target, "val", classes)
    count_labels(pairs, classes)
    return [pair.image for pair in pairs], [pair.label for pair in pairs]


def evaluate(trained: Trained, settings: Settings) -> None:
    """Predict every image of the split, and write what was asked for."""
    labeled = settings.split == "val"
    paths, truths = files_of(settings, trained.classes)
    settings.output.mkdir(parents=True, exist_ok=True)
    label_folder = settings.output / "labelIds"
    if settings.labels:
        label_folder.mkdir(exist_ok=True)

    confusion = anchorda.ConfusionMatrix(len(trained.classes))
    evaluated = torch.tensor(trained.evaluated)
    drawn = set(np.linspace(0, len(paths) - 1, min(settings.pictures, len(paths)), dtype=int))
    rows: list[tuple[Tensor, list[Tensor]]] = []
    plain = UnlabeledImages(paths, ResizeAndCrop(trained.resize))
    for index, prediction in enumerate(predictions(trained, paths, settings)):
        prediction = prediction.cpu()
        maps = [prediction]
        if labeled:
            truth = read_labels(truths[index], trained.classes)
            truth = truth.where(torch.isin(truth, evaluated), IGNORE)
            confusion.update(prediction, truth)
            maps = [truth, prediction]
        if settings.labels:
            save_label_ids(label_folder, paths[index], prediction, trained.classes)
        if index in drawn:
            rows.append((plain.read(index), maps))

    if rows:
        titles = ("image", "truth", "prediction") if labeled else ("image", "prediction")
        save(draw_rows(titles, rows, trained.classes), settings.output / "pictures.png")
    if labeled:
        scores = scores_of(confusion, settings, trained)
        table = iou_table({"IoU": confusion}, trained.evaluated, trained.classes.names)
        table += f"\naccuracy  {100 * scores['accuracy']:.1f}"
        write_text(settings.output / "iou.txt", table + "\n")
        write_text(settings.output / "scores.json", json.dumps(scores, indent=2) + "\n")
        print(table)
    print(f"Results: {settings.output}")


def main() -> None:
    """Run from the command line."""
    settings = parse_settings()
    try:
        trained = load_trained(settings.checkpoint, settings.device, settings.precision)
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        evaluate(trained, settings)
    except DatasetError as error:
        # From a worker process the message comes behind a traceback.
        sys.exit("error: " + str(error).rpartition("DatasetError: ")[2])


if __name__ == "__main__":
    main()
