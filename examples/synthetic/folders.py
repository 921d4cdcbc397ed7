"""Write the synthetic pair in the folder layout that ``examples/segmentation.py`` reads.

    python examples/synthetic/folders.py runs/synthetic

``source`` shows sunny streets with labels, ``target`` other streets at dusk; only those to evaluate
on have labels. Label files hold raw ids. ``classes.txt`` groups them in 12 classes and is written
last: a folder with it is complete.
"""

import argparse
import dataclasses
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from synthetic import OVERCAST, SUNNY, render
from tqdm import tqdm

CLASSES = """\
road: 7
sidewalk: 8
building: 11
wall or fence: 12, 13
pole, light or sign: 17, 19, 20
vegetation: 21
terrain: 22
sky: 23
person or rider: 24, 25
car: 26
truck, bus or train: 27, 28, 31
two-wheeler: 32, 33
"""
# `OVERCAST` costs a network with ImageNet weights and strong augmentation only a few points.
DUSK = dataclasses.replace(
    OVERCAST,
    haze=110.0,
    fog=(176, 170, 190),
    cast=(0.92, 0.96, 1.2),
    exposure=(0.5, 0.75),
    blur=0.7,
    noise=0.022,
)
STYLES = (SUNNY, DUSK, DUSK)  # source, target, target to evaluate on


def write_scene(root: Path, seed: int, size: tuple[int, int], number: tuple[int, int]) -> None:
    """Write a scene, of a part (see `STYLES`) and an index in it."""
    part, index = number
    rng = np.random.default_rng([seed, part, index])
    folder = root / ("source" if part == 0 else "target")
    name = f"{'evaluation-' if part == 2 else ''}{index:04d}.png"
    for kind, pixels in zip(("images", "labels"), render(STYLES[part], *size, rng), strict=True):
        if kind == "images" or part != 1:  # nobody knows the labels of the target
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / name)


def write_folders(
    root: Path, *, seed: int = 0, images: tuple[int, int, int] = (160, 80, 40), height: int = 180
) -> None:
    """Write so many images of each part of `STYLES`, 4:3, unless the pair is complete already."""
    if (root / "classes.txt").exists():
        return
    numbers = [(part, index) for part, count in enumerate(images) for index in range(count)]
    write = partial(write_scene, root, seed, (height * 4 // 3, height))
    with ProcessPoolExecutor() as pool:
        list(tqdm(pool.map(write, numbers, chunksize=4), "synthetic scenes", len(numbers)))
    (root / "classes.txt").write_text(CLASSES, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a synthetic source and target.")
    parser.add_argument("root", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_folders(arguments.root, seed=arguments.seed)
