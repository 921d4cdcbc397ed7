"""Write three pairs of street data sets in the folder layout of ``examples/segmentation.py``.

    git clone https://github.com/alberto-mate/CARLA-SB3-RL-Training-Environment carla
    git clone https://github.com/CityscapeSegmentation/helloworld cityscapes
    python benchmarks/street_pairs.py carla cityscapes runs/streets --camvid DIR

The pairs are ``carla-to-cityscapes``, a task of ``adaptation.py``, and ``carla-to-camvid`` and
``cityscapes-to-camvid``, by which settings were chosen. DIR has the day frames of CamVid, in
``images/`` and ``labels/`` with raw ids of Cityscapes. Without it, the first pair is written alone.

CARLA is every 20th of 20,000 simulated images, Cityscapes 500 images, CamVid 577. As a target, two
of five images are for the evaluation; they alone have labels. The classes of CARLA are road, with
its markings, sidewalk and other. Images and labels of the two clones are read from their history,
whatever is checked out. All are resized to 240×120; CamVid's are cropped to that. ``classes.txt``
is written last: a folder with it is complete.
"""

import argparse
import io
import subprocess
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = (240, 120)
OTHER, VOID = "other", 255
OF_CARLA = ("road", "sidewalk", OTHER)
OF_STREETS = (
    "road", "sidewalk", "building", "fence", "pole", "vegetation", "sky", "person", "car",
)  # fmt: skip
# Road, lane marking and sidewalk in the CARLA labels. Other pixels are black; 731 of all are blue.
COLORS = {(50, 64, 128): "road", (157, 234, 50): "road", (255, 255, 255): "sidewalk"}
# Names of the ids in the Cityscapes masks, whose 0 and 1 are void, and of Cityscapes' raw ids, as
# CamVid's labels have them. Signs are poles, riders persons; in three classes all else is "other".
CITYSCAPES_IDS = {
    2: "road", 3: "sidewalk", 4: "sidewalk", 5: "building", 6: "fence", 7: "pole", 8: "vegetation",
    9: "terrain", 10: "sky", 11: "person", 12: "car", 13: "bicycle", 14: "wall",
}  # fmt: skip
RAW_IDS = {
    7: "road", 8: "sidewalk", 11: "building", 13: "fence", 17: "pole", 20: "pole",
    21: "vegetation", 23: "sky", 24: "person", 25: "person", 26: "car",
}  # fmt: skip

Ids = NDArray[np.uint8]
Pair = tuple[str, Image.Image, Ids]  # file name, image, and label as indices of classes
Read = Callable[[tuple[str, ...]], Iterable[Pair]]  # of the classes


class Origin(NamedTuple):
    """A commit, and its folders of images and labels with equal names, numbers."""

    commit: str
    images: str
    labels: str


CARLA = Origin(
    "50e1104db6f92a782d46094b1dccea9be6da07d2", "vae/images/rgb", "vae/images/segmentation"
)
CITYSCAPES = Origin("6d738621bfff344c8c84c7e30c3325b888cd0380", "data/val/rgb", "data/val/mask")


def git(repository: Path, *arguments: str) -> bytes:
    """Return what a git command prints."""
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout


def read_history(
    repository: Path, origin: Origin, step: int = 1
) -> Iterator[tuple[str, Image.Image, Image.Image]]:
    """Yield the name, image and label of every `step`-th pair, in the order of their numbers."""
    listed = git(repository, "ls-tree", "--name-only", f"{origin.commit}:{origin.images}").decode()
    for name in sorted(listed.split(), key=lambda name: int(Path(name).stem))[::step]:
        image, label = (
            Image.open(io.BytesIO(git(repository, "show", f"{origin.commit}:{folder}/{name}")))
            for folder in (origin.images, origin.labels)
        )
        yield name, image.convert("RGB"), label


def indices(label: Ids, names: dict[int, str], classes: tuple[str, ...]) -> Ids:
    """Return the index (H, W) of each pixel's class; a name that is no class is `OTHER` or void."""
    table = np.full(256, VOID, np.uint8)
    for value, name in names.items():
        if name in classes or OTHER in classes:
            table[value] = classes.index(name if name in classes else OTHER)
    found: Ids = table[label]
    return found


def read_carla(repository: Path, step: int, classes: tuple[str, ...]) -> Iterator[Pair]:
    """Yield the simulated images, whose labels are colors."""
    for name, image, label in read_history(repository, CARLA, step):
        pixels = np.asarray(label.convert("RGB"))
        ids = np.full(pixels.shape[:2], classes.index(OTHER), np.uint8)
        for color, of_color in COLORS.items():
            ids[(pixels == color).all(-1)] = classes.index(of_color)
        yield name, image, ids


def read_cityscapes(repository: Path, classes: tuple[str, ...]) -> Iterator[Pair]:
    """Yield the images of Cityscapes, whose masks have ids of their own."""
    for name, image, label in read_history(repository, CITYSCAPES):
        yield name, image, indices(np.asarray(label), CITYSCAPES_IDS, classes)


def read_camvid(folder: Path, classes: tuple[str, ...]) -> Iterator[Pair]:
    """Yield the frames of CamVid, the middle of their height."""
    for path in sorted((folder / "images").iterdir()):
        image, label = Image.open(path), np.asarray(Image.open(folder / "labels" / path.name))
        margin = (image.height - image.width // 2) // 2
        part = image.convert("RGB").crop((0, margin, image.width, margin + image.width // 2))
        yield path.name, part, indices(label[margin:][: part.height], RAW_IDS, classes)


def write(folder: Path, pair: Pair, *, labeled: bool) -> None:
    """Write a resized image and, if it has one, its label."""
    name, image, ids = pair
    kinds = [("images", image, Image.Resampling.BILINEAR)]
    if labeled:
        kinds.append(("labels", Image.fromarray(ids), Image.Resampling.NEAREST))
    for kind, picture, resample in kinds:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        picture.resize(SIZE, resample).save(folder / kind / name)


def write_pair(root: Path, classes: tuple[str, ...], source: Read, target: Read) -> None:
    """Write both domains, unless the pair is complete already."""
    if (root / "classes.txt").exists():
        return
    for pair in source(classes):
        write(root / "source", pair, labeled=True)
    for number, pair in enumerate(target(classes)):
        write(root / "target", pair, labeled=number % 5 < 2)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")


def write_pairs(
    carla: Path, cityscapes: Path, root: Path, camvid: Path | None = None, *, step: int = 20
) -> None:
    """Write the pairs whose data are there."""
    simulated, real = partial(read_carla, carla, step), partial(read_cityscapes, cityscapes)
    write_pair(root / "carla-to-cityscapes", OF_CARLA, simulated, real)
    if camvid is not None:
        day = partial(read_camvid, camvid)
        write_pair(root / "carla-to-camvid", OF_CARLA, simulated, day)
        write_pair(root / "cityscapes-to-camvid", OF_STREETS, real, day)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write pairs of street data sets.")
    parser.add_argument("carla", type=Path, help="clone of CARLA-SB3-RL-Training-Environment")
    parser.add_argument("cityscapes", type=Path, help="clone of CityscapeSegmentation/helloworld")
    parser.add_argument("root", type=Path, help="folder to write")
    parser.add_argument("--camvid", type=Path, help="day frames of CamVid, images/ and labels/")
    options = parser.parse_args()
    write_pairs(options.carla, options.cityscapes, options.root, options.camvid)
