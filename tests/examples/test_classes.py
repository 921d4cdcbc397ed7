"""The class table agrees with the official ids, and everything derived from it with the table."""

import numpy as np
import pytest
from classes import (
    CLASS_NAMES,
    CLASSES,
    IGNORE,
    NUM_CLASSES,
    PALETTE,
    SYNTHIA_13,
    SYNTHIA_16,
    synthia_train_ids,
    train_ids,
)

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
# As in the data set's own table; the pedestrian is Cityscapes' person.
OFFICIAL_SYNTHIA = (
    "void",
    "sky",
    "building",
    "road",
    "sidewalk",
    "fence",
    "vegetation",
    "pole",
    "car",
    "traffic sign",
    "person",
    "bicycle",
    "motorcycle",
    "parking slot",
    "road work",
    "traffic light",
    "terrain",
    "rider",
    "truck",
    "bus",
    "train",
    "wall",
    "lane marking",
)


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


def test_synthia_shares_all_classes_but_three() -> None:
    shared = [CLASS_NAMES[c] for c in SYNTHIA_16]
    assert shared == [c for c in CLASS_NAMES if c not in ("terrain", "truck", "train")]
    assert [CLASS_NAMES[c] for c in SYNTHIA_13] == [
        c for c in shared if c not in ("wall", "fence", "pole")
    ]
    assert (len(SYNTHIA_16), len(SYNTHIA_13)) == (16, 13)


def test_synthia_train_ids_maps_every_id_by_name() -> None:
    labels = synthia_train_ids(np.arange(23, dtype=np.uint16).reshape(1, 23))
    assert labels.dtype == np.uint8
    assert labels.tolist() == [
        [
            CLASS_NAMES.index(name)
            if name in CLASS_NAMES and name not in ("terrain", "truck", "train")
            else IGNORE
            for name in OFFICIAL_SYNTHIA
        ]
    ]


@pytest.mark.parametrize("unknown", [23, 255, 256 + 3, 65535])
def test_synthia_train_ids_rejects_unknown_ids(unknown: int) -> None:
    with pytest.raises(ValueError, match=rf"0-22.*\[{unknown}\]"):
        synthia_train_ids(np.array([[3, unknown], [unknown, 22]], np.uint16))


def test_synthia_train_ids_names_a_few_of_many_unknown_ids() -> None:
    with pytest.raises(ValueError, match=r"\[23, 24, 25, 26, 27\]\.$"):
        synthia_train_ids(np.arange(65536, dtype=np.uint16))


def test_palette_gives_distinct_colors_and_black_for_ignored() -> None:
    assert PALETTE.shape == (256, 3)
    assert PALETTE.dtype == np.uint8
    assert len({tuple(color) for color in PALETTE[:NUM_CLASSES].tolist()}) == NUM_CLASSES
    assert tuple(PALETTE[CLASS_NAMES.index("car")]) == (0, 0, 142)
    assert not PALETTE[NUM_CLASSES:].any()
