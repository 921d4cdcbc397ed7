"""The class table agrees with the official ids, and everything derived from it with the table."""

import numpy as np
import pytest
from classes import CLASS_NAMES, CLASSES, IGNORE, NUM_CLASSES, PALETTE, train_ids

OFFICIAL = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}


def test_table_is_the_official_one_in_order() -> None:
    assert [(entry.name, entry.raw_id) for entry in CLASSES] == list(OFFICIAL.items())
    assert list(OFFICIAL) == list(CLASS_NAMES)
    assert NUM_CLASSES == 19


def test_train_ids_maps_every_known_raw_id() -> None:
    known = np.array([*range(35), 255], np.uint8)
    expected = [
        list(OFFICIAL.values()).index(raw) if raw in OFFICIAL.values() else IGNORE for raw in known
    ]
    labels = train_ids(known)
    assert labels.dtype == np.uint8
    assert labels.tolist() == expected


@pytest.mark.parametrize("raw", [35, 100, 254])
def test_train_ids_rejects_unknown_raw_ids(raw: int) -> None:
    with pytest.raises(ValueError, match=rf"\[{raw}\]"):
        train_ids(np.array([[7, raw], [raw, 255]], np.uint8))


def test_palette_gives_distinct_colors_and_black_for_ignored() -> None:
    assert PALETTE.shape == (256, 3)
    assert PALETTE.dtype == np.uint8
    assert len({tuple(color) for color in PALETTE[:NUM_CLASSES].tolist()}) == NUM_CLASSES
    assert tuple(PALETTE[CLASS_NAMES.index("car")]) == (0, 0, 142)
    assert not PALETTE[NUM_CLASSES:].any()
