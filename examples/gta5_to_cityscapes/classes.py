"""The 19 Cityscapes evaluation classes: one table, everything else derived from it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class StreetClass(NamedTuple):
    """One evaluation class; its train id is its position in `CLASSES`."""

    raw_id: int
    name: str
    color: tuple[int, int, int]
    synthia_id: int | None = None  # None: SYNTHIA shows nothing of this class


CLASSES = (
    StreetClass(7, "road", (128, 64, 128), 3),
    StreetClass(8, "sidewalk", (244, 35, 232), 4),
    StreetClass(11, "building", (70, 70, 70), 2),
    StreetClass(12, "wall", (102, 102, 156), 21),
    StreetClass(13, "fence", (190, 153, 153), 5),
    StreetClass(17, "pole", (153, 153, 153), 7),
    StreetClass(19, "traffic light", (250, 170, 30), 15),
    StreetClass(20, "traffic sign", (220, 220, 0), 9),
    StreetClass(21, "vegetation", (107, 142, 35), 6),
    StreetClass(22, "terrain", (152, 251, 152)),
    StreetClass(23, "sky", (70, 130, 180), 1),
    StreetClass(24, "person", (220, 20, 60), 10),
    StreetClass(25, "rider", (255, 0, 0), 17),
    StreetClass(26, "car", (0, 0, 142), 8),
    StreetClass(27, "truck", (0, 0, 70)),
    StreetClass(28, "bus", (0, 60, 100), 19),
    StreetClass(31, "train", (0, 80, 100)),
    StreetClass(32, "motorcycle", (0, 0, 230), 12),
    StreetClass(33, "bicycle", (119, 11, 32), 11),
)
NUM_CLASSES = len(CLASSES)
CLASS_NAMES = tuple(entry.name for entry in CLASSES)
IGNORE = 255

# Train ids of the classes that SYNTHIA shares, and of those in its usual second mean.
SYNTHIA_16 = tuple(c for c, entry in enumerate(CLASSES) if entry.synthia_id is not None)
SYNTHIA_13 = tuple(c for c in SYNTHIA_16 if CLASS_NAMES[c] not in ("wall", "fence", "pole"))

# Cityscapes numbers its labels 0-33 and GTA5 adds 34; a license plate, -1, is 255 in 8 bits.
_KNOWN_RAW_IDS = (*range(35), 255)
_UNKNOWN = 254
_SYNTHIA_IDS = 23  # 0-22; those without a class: void, parking slot, road work, lane marking, ...


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


def _synthia_to_train() -> NDArray[np.uint8]:
    table = np.full(_SYNTHIA_IDS, IGNORE, np.uint8)
    for train_id, entry in enumerate(CLASSES):
        if entry.synthia_id is not None:
            table[entry.synthia_id] = train_id
    table.setflags(write=False)
    return table


PALETTE = _palette()  # (256, 3): the color of each train id; ignored is black
_RAW_TO_TRAIN = _raw_to_train()
_SYNTHIA_TO_TRAIN = _synthia_to_train()


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


def synthia_train_ids(ids: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Map SYNTHIA's ids to the train ids of `SYNTHIA_16`; its other ids become `IGNORE`.

    Raises:
        ValueError: If `ids` holds an id that SYNTHIA does not define.
    """
    unknown = np.unique(ids[ids >= _SYNTHIA_IDS])
    if unknown.size:
        some = unknown[:5].tolist()
        raise ValueError(f"Expected SYNTHIA ids 0-{_SYNTHIA_IDS - 1}, but got ids such as {some}.")
    return _SYNTHIA_TO_TRAIN.take(ids)
