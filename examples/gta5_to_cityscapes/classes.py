"""The 19 Cityscapes evaluation classes: one table, everything else derived from it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class StreetClass(NamedTuple):
    """One evaluation class; its train id is its position in `CLASSES`."""

    raw_id: int
    name: str
    color: tuple[int, int, int]


CLASSES = (
    StreetClass(7, "road", (128, 64, 128)),
    StreetClass(8, "sidewalk", (244, 35, 232)),
    StreetClass(11, "building", (70, 70, 70)),
    StreetClass(12, "wall", (102, 102, 156)),
    StreetClass(13, "fence", (190, 153, 153)),
    StreetClass(17, "pole", (153, 153, 153)),
    StreetClass(19, "traffic light", (250, 170, 30)),
    StreetClass(20, "traffic sign", (220, 220, 0)),
    StreetClass(21, "vegetation", (107, 142, 35)),
    StreetClass(22, "terrain", (152, 251, 152)),
    StreetClass(23, "sky", (70, 130, 180)),
    StreetClass(24, "person", (220, 20, 60)),
    StreetClass(25, "rider", (255, 0, 0)),
    StreetClass(26, "car", (0, 0, 142)),
    StreetClass(27, "truck", (0, 0, 70)),
    StreetClass(28, "bus", (0, 60, 100)),
    StreetClass(31, "train", (0, 80, 100)),
    StreetClass(32, "motorcycle", (0, 0, 230)),
    StreetClass(33, "bicycle", (119, 11, 32)),
)
NUM_CLASSES = len(CLASSES)
CLASS_NAMES = tuple(entry.name for entry in CLASSES)
IGNORE = 255

# Cityscapes numbers its labels 0-33 and GTA5 adds 34; a license plate, -1, is 255 in 8 bits.
_KNOWN_RAW_IDS = (*range(35), 255)
_UNKNOWN = 254


def _palette() -> NDArray[np.uint8]:
    palette = np.zeros((256, 3), np.uint8)
    palette[:NUM_CLASSES] = [entry.color for entry in CLASSES]
    palette.setflags(write=False)
    return palette


def _raw_to_train() -> NDArray[np.uint8]:
    table = np.full(256, _UNKNOWN, np.uint8)
    table[list(_KNOWN_RAW_IDS)] = IGNORE
    table[[entry.raw_id for entry in CLASSES]] = np.arange(NUM_CLASSES)
    table.setflags(write=False)
    return table


PALETTE = _palette()  # (256, 3): the color of each train id; ignored is black
_RAW_TO_TRAIN = _raw_to_train()


def train_ids(raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Map raw ids to train ids 0-18; every other known raw id becomes `IGNORE`.

    Raises:
        ValueError: If `raw` holds an id that neither Cityscapes nor GTA5 defines.
    """
    labels = _RAW_TO_TRAIN.take(raw)
    if (labels == _UNKNOWN).any():
        unknown = np.unique(raw[labels == _UNKNOWN]).tolist()
        raise ValueError(f"Expected raw ids 0-34 or 255, but got {unknown}.")
    return labels
