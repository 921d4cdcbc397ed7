"""Classes and the ids that label files have for them: Cityscapes' 19, SYNTHIA's, one's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

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
_SYNTHIA_IDS = 23  # 0-22; those without a class: void, parking slot, road work, lane marking, ...
_UNKNOWN = 254
_ALL_IDS = 2**16  # what label files of up to 16 bits can hold


@final
@dataclass(frozen=True, eq=False)
class LabelIds:
    """The meaning of the numbers in label files."""

    name: str
    """As errors call them."""
    table: NDArray[np.uint8]
    """(65536,): the train id of each number, `IGNORE`, or 254 where the number is undefined."""

    def to_train(self, ids: NDArray[np.integer]) -> NDArray[np.uint8]:
        """Map ids to train ids; ids of no class become `IGNORE`.

        Raises:
            ValueError: If `ids` holds an undefined id.
        """
        labels = self.table.take(np.asarray(ids), mode="clip")
        wrong = ids[(labels == _UNKNOWN) | (ids < 0) | (ids >= _ALL_IDS)]
        if wrong.size:
            raise ValueError(f"Expected {self.name}, but got {_some(np.unique(wrong).tolist())}.")
        return labels


@final
@dataclass(frozen=True)
class Classes:
    """The classes of a network; a class's train id is its position."""

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    ids: tuple[tuple[int, ...], ...]
    """The ids of each class in gray label files."""

    def __len__(self) -> int:
        """Count the classes."""
        return len(self.names)

    def plain(self) -> dict[str, list[object]]:
        """Return lists, numbers and strings alone, as a checkpoint holds them."""
        return {
            "names": [*self.names],
            "colors": [[*color] for color in self.colors],
            "ids": [[*ids] for ids in self.ids],
        }

    @classmethod
    def from_plain(cls, parts: Mapping[str, Sequence[Any]]) -> "Classes":
        """Return the classes of a checkpoint."""
        names, colors, ids = parts["names"], parts["colors"], parts["ids"]
        return cls(tuple(names), tuple(map(tuple, colors)), tuple(map(tuple, ids)))

    def palette(self) -> NDArray[np.uint8]:
        """Return the color (256, 3) of each train id; ignored is black."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: len(self)] = self.colors
        palette.setflags(write=False)
        return palette

    def label_ids(self) -> LabelIds:
        """Return the ids of label files; an id that no class names is ignored."""
        named = {id_: train_id for train_id, ids in enumerate(self.ids) for id_ in ids}
        return _label_ids("ids from 0 to 65535", named, ignored=range(_ALL_IDS))


def read_classes(path: Path) -> Classes:
    """Read own classes: a text file with one class a line, `name` or `name: id, id`.

    The ids are the numbers in the label files that the class covers. A class without ids has the
    number of its line, from 0; empty lines count too.

    Raises:
        ValueError: If the file is not such a list; the message names the line.
    """
    try:
        lines = path.read_text("utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable text file ({error}).") from error
    parsed = [_parse_class(path, k, line) for k, line in enumerate(lines) if line.strip()]
    if not 2 <= len(parsed) < _UNKNOWN:
        raise ValueError(
            f"{path}: expected 2 to {_UNKNOWN - 1} classes, one a line, but got {len(parsed)}."
        )
    names, ids = zip(*parsed, strict=True)
    for kind, values in (("name", [*names]), ("id", [str(id_) for of in ids for id_ in of])):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(
                f"{path}: expected each {kind} once, but got {_some(twice)} more than once. "
                "A class without ids has the number of its line, from 0."
            )
    return Classes(names, tuple(_color(k + 1) for k in range(len(parsed))), ids)


def _parse_class(path: Path, number: int, line: str) -> tuple[str, tuple[int, ...]]:
    name, colon, numbers = line.rpartition(":")
    name = (name if colon else line).strip()
    where = f"{path}, line {number + 1}: expected `name` or `name: id, id`, but got {line!r}."
    if not name:
        raise ValueError(f"{where} Every line names a class; the first line has number 0.")
    if not name.isprintable() or "$" in name:  # matplotlib takes $ for a formula
        raise ValueError(f"{where} A name consists of printable characters other than $.")
    if not colon:
        return name, (number,)
    parts = [part.strip() for part in numbers.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) < _ALL_IDS for part in parts):
        raise ValueError(f"{where} Ids are whole numbers from 0 to {_ALL_IDS - 1}.")
    return name, tuple(map(int, parts))


def _color(index: int) -> tuple[int, int, int]:
    """Return a color of the Pascal VOC color map, whose colors are distinct up to 255."""
    red, green, blue = (
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
        for channel in range(3)
    )
    return red, green, blue


def _label_ids(name: str, train_id: dict[int, int], ignored: range | tuple[int, ...]) -> LabelIds:
    table = np.full(_ALL_IDS, _UNKNOWN, np.uint8)
    table[list(ignored)] = IGNORE
    table[list(train_id)] = list(train_id.values())
    table.setflags(write=False)
    return LabelIds(name, table)


def _some(values: Sequence[object]) -> str:
    return "[" + ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "") + "]"


STREET = Classes(
    CLASS_NAMES,
    tuple(entry.color for entry in CLASSES),
    tuple((entry.raw_id,) for entry in CLASSES),
)
PALETTE = STREET.palette()  # (256, 3): the color of each train id; ignored is black
RAW_IDS = _label_ids(
    "raw ids 0-34 or 255",
    {entry.raw_id: train_id for train_id, entry in enumerate(CLASSES)},
    ignored=_KNOWN_RAW_IDS,
)
SYNTHIA_IDS = _label_ids(
    f"SYNTHIA ids 0-{_SYNTHIA_IDS - 1}",
    {
        entry.synthia_id: train_id
        for train_id, entry in enumerate(CLASSES)
        if entry.synthia_id is not None
    },
    ignored=range(_SYNTHIA_IDS),
)


def train_ids(raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Map raw ids to train ids 0-18; every other known raw id becomes `IGNORE`.

    Raises:
        ValueError: If `raw` holds an id that neither Cityscapes nor GTA5 defines.
    """
    return RAW_IDS.to_train(raw)
