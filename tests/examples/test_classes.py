"""The class table agrees with the official ids, and everything derived from it; own classes."""

from pathlib import Path

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
    SYNTHIA_IDS,
    read_classes,
    train_ids,
)

OFFICIAL = {
    **{"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17},
    **{"traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23},
    **{"person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31},
    **{"motorcycle": 32, "bicycle": 33},
}
# As in the data set's own table; the pedestrian is Cityscapes' person.
OFFICIAL_SYNTHIA = [
    *("void", "sky", "building", "road", "sidewalk", "fence", "vegetation", "pole", "car"),
    *("traffic sign", "person", "bicycle", "motorcycle", "parking slot", "road work"),
    *("traffic light", "terrain", "rider", "truck", "bus", "train", "wall", "lane marking"),
]


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
    labels = SYNTHIA_IDS.to_train(np.arange(23, dtype=np.uint16).reshape(1, 23))
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
        SYNTHIA_IDS.to_train(np.array([[3, unknown], [unknown, 22]], np.uint16))


def test_synthia_train_ids_names_a_few_of_many_unknown_ids() -> None:
    with pytest.raises(ValueError, match=r"\[23, 24, 25, 26, 27, \.\.\.\]\.$"):
        SYNTHIA_IDS.to_train(np.arange(65536, dtype=np.uint16))


def test_palette_gives_distinct_colors_and_black_for_ignored() -> None:
    assert PALETTE.shape == (256, 3)
    assert PALETTE.dtype == np.uint8
    assert len({tuple(color) for color in PALETTE[:NUM_CLASSES].tolist()}) == NUM_CLASSES
    assert tuple(PALETTE[CLASS_NAMES.index("car")]) == (0, 0, 142)
    assert not PALETTE[NUM_CLASSES:].any()


# ---- own classes --------------------------------------------------------------------------------


def _list(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "classes.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("text", ["{}", "{}\n\n", "\ufeff{}"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_own_classes_with_and_without_ids(tmp_path: Path, text: str, end: str) -> None:
    lines = end.join(["soil", "crop: wheat : 40,7 ", "Unkräuter", "sky:255, 300"])
    classes = read_classes(_list(tmp_path, text.format(lines)))
    assert classes.names == ("soil", "crop: wheat", "Unkräuter", "sky")
    assert classes.ids == ((0,), (40, 7), (2,), (255, 300))
    assert len(classes) == 4
    ids = np.array([[0, 7, 40, 2], [255, 300, 1, 65535]], np.uint16)
    assert classes.label_ids().to_train(ids).tolist() == [[0, 1, 1, 2], [3, 3, IGNORE, IGNORE]]


def test_empty_lines_of_own_classes_count(tmp_path: Path) -> None:
    assert read_classes(_list(tmp_path, "a\n\nb\n\n")).ids == ((0,), (2,))


def test_own_classes_have_distinct_colors_other_than_ignored(tmp_path: Path) -> None:
    classes = read_classes(_list(tmp_path, "\n".join(f"class {k}" for k in range(253))))
    colors = {tuple(color) for color in classes.palette()[:254].tolist()}
    assert len(colors) == 254
    assert classes.palette()[0].tolist() == [128, 0, 0]  # as in Pascal VOC's color map


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected 2 to 253 classes, one a line, but got 0"),
        ("only", "but got 1"),
        ("\n".join(f"c{k}" for k in range(254)), "but got 254"),
        ("a\n: 3", "line 2: .*Every line names a class"),
        ("a: 1\nb: x", "line 2: .*but got 'b: x'.*whole numbers from 0 to 65535"),
        ("a: 1\nb: 2,", "line 2: .*whole numbers"),
        ("a: -1\nb", "line 1: .*whole numbers"),
        ("a: 65536\nb", "line 1: .*whole numbers"),
        ("a: ²\nb", "line 1: .*whole numbers"),
        ("a$b$\nc", "line 1: .*printable characters other than"),
        ("a: 1\nb", r"expected each id once, but got \[1\] .*number of its line, from 0"),
        ("a\nb\na", r"expected each name once, but got \[a\]"),
        (b"\xff\xfe", "not a readable text file"),
    ],
)
def test_lists_of_classes_that_are_none(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = _list(tmp_path, text)
    with pytest.raises(ValueError, match=said) as caught:
        read_classes(path)
    assert str(path) in str(caught.value)


def test_a_list_of_classes_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        read_classes(tmp_path / "nowhere.txt")
