"""Write CARLA → Cityscapes in the folder layout that ``examples/segmentation.py`` reads.

    git clone https://github.com/alberto-mate/CARLA-SB3-RL-Training-Environment carla
    git clone https://github.com/CityscapeSegmentation/helloworld cityscapes
    python benchmarks/carla_to_cityscapes.py carla cityscapes runs/carla-to-cityscapes

The source is every 20th of 20,000 simulated images, the target 500 images of Cityscapes. Two of
five target images are for the evaluation; they alone have labels. The classes are road, with its
markings, sidewalk and other. Images and labels are read from the history of the two clones,
whatever is checked out, and resized to 240×120. ``classes.txt`` is written last: a folder with it
is complete.
"""

import argparse
import io
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = "road\nsidewalk\nother\n"
ROAD, SIDEWALK, OTHER, VOID = 0, 1, 2, 255
SIZE = (240, 120)
# Road, lane marking and sidewalk in the CARLA labels. Other pixels are black; 731 of all are blue.
COLORS = {(50, 64, 128): ROAD, (157, 234, 50): ROAD, (255, 255, 255): SIDEWALK}
IDS = {0: VOID, 1: VOID, 2: ROAD, 3: SIDEWALK, 4: SIDEWALK}  # of the Cityscapes masks, else other


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


def read_pairs(
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


def carla_ids(label: Image.Image) -> NDArray[np.uint8]:
    """Return the class ids of a label in colors."""
    pixels = np.asarray(label.convert("RGB"))
    ids = np.full(pixels.shape[:2], OTHER, np.uint8)
    for color, index in COLORS.items():
        ids[(pixels == color).all(-1)] = index
    return ids


def cityscapes_ids(label: Image.Image) -> NDArray[np.uint8]:
    """Return the class ids of a label in gray, `VOID` where it has none."""
    pixels = np.asarray(label)
    ids = np.full(pixels.shape, OTHER, np.uint8)
    for value, index in IDS.items():
        ids[pixels == value] = index
    return ids


def write(path: Path, image: Image.Image, resample: Image.Resampling) -> None:
    """Write a resized image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize(SIZE, resample).save(path)


def write_folders(carla: Path, cityscapes: Path, root: Path, *, step: int = 20) -> None:
    """Write both domains, unless the pair is complete already."""
    if (root / "classes.txt").exists():
        return
    for name, image, label in read_pairs(carla, CARLA, step):
        write(root / "source" / "images" / name, image, Image.Resampling.BILINEAR)
        ids = Image.fromarray(carla_ids(label))
        write(root / "source" / "labels" / name, ids, Image.Resampling.NEAREST)
    for number, (name, image, label) in enumerate(read_pairs(cityscapes, CITYSCAPES)):
        write(root / "target" / "images" / name, image, Image.Resampling.BILINEAR)
        if number % 5 < 2:
            ids = Image.fromarray(cityscapes_ids(label))
            write(root / "target" / "labels" / name, ids, Image.Resampling.NEAREST)
    (root / "classes.txt").write_text(CLASSES, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write CARLA as source, Cityscapes as target.")
    parser.add_argument("carla", type=Path, help="clone of CARLA-SB3-RL-Training-Environment")
    parser.add_argument("cityscapes", type=Path, help="clone of CityscapeSegmentation/helloworld")
    parser.add_argument("root", type=Path, help="folder to write")
    arguments = parser.parse_args()
    write_folders(arguments.carla, arguments.cityscapes, arguments.root)
