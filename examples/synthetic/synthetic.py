"""Write a small synthetic pair of data sets in the formats of GTA5 or SYNTHIA, and Cityscapes.

Both are street scenes of all 19 classes, seen in perspective by a camera on the road. What differs
is gathered in two styles: `SUNNY`, a wide street in a sunny game, and `OVERCAST`, a narrow old town
on a dull day through a car's camera. Shapes and places of things are common to both, so that a
network trained on the source transfers in part.

    python examples/synthetic/synthetic.py runs/synthetic
"""

import argparse
import json
import math
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, get_args

sys.path.insert(0, str(Path(__file__).parents[1] / "gta5_to_cityscapes"))

import numpy as np
from classes import CLASSES
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

Color = tuple[int, int, int]
Range = tuple[float, float]
SourceFormat = Literal["gta5", "synthia"]

_RAW_IDS = {"unlabeled": 0, "ego vehicle": 1, "static": 4}
_RAW_IDS |= {entry.name: entry.raw_id for entry in CLASSES}
_SUPERSAMPLING = 2  # scenes are painted larger and averaged down, which smooths their edges
_CITIES = ("altstadt", "hafen", "neustadt", "weststadt")


@dataclass(frozen=True)
class Style:
    """The properties of a domain: camera, street, objects, colors and light."""

    focal: Range  # in image widths
    horizon: Range  # in image heights, from the top
    camera_height: Range  # lengths are in meters
    road_width: Range
    sidewalk_width: Range
    storeys: tuple[int, int]
    window: tuple[float, float]  # share of a bay that is window, across and up
    frontage: Mapping[str, float]  # how often a stretch of the street's side is of each class
    rates: Mapping[str, float]  # expected number of things per image
    colors: Mapping[str, tuple[Color, ...]]
    color_spread: float
    texture: float  # strength of surface noise
    grain: float  # size of surface noise, in pixels
    haze: float  # distance at which haze swallows 63 % of the light
    fog: Color
    clouds: Range
    cast: tuple[float, float, float]
    exposure: Range
    contrast: float
    vignette: float
    blur: float
    noise: float
    hood: bool


SUNNY = Style(
    focal=(0.8, 1.0),
    horizon=(0.42, 0.54),
    camera_height=(1.5, 2.2),
    road_width=(10.0, 16.0),
    sidewalk_width=(2.5, 5.0),
    storeys=(2, 6),
    window=(0.55, 0.5),
    frontage={"building": 5, "wall": 2, "fence": 2, "vegetation": 1.5, "terrain": 1.5},
    rates={
        "car": 4.0,
        "truck": 0.7,
        "bus": 0.6,
        "train": 0.5,
        "motorcycle": 0.9,
        "bicycle": 0.8,
        "person": 2.5,
        "pole": 3.0,
        "traffic light": 1.3,
        "traffic sign": 1.6,
        "tree": 2.0,
        "clutter": 0.7,
    },
    colors={
        "road": ((98, 98, 102), (112, 110, 106)),
        "sidewalk": ((172, 164, 152), (186, 178, 166)),
        "building": (
            (200, 166, 126),
            (176, 122, 98),
            (208, 198, 184),
            (150, 152, 164),
            (128, 86, 74),
        ),
        "wall": ((158, 140, 122), (182, 172, 156)),
        "fence": ((96, 92, 88), (122, 104, 84)),
        "pole": ((104, 104, 108), (134, 132, 128)),
        "traffic light": ((52, 50, 46), (176, 140, 48)),
        "traffic sign": ((36, 116, 70), (232, 232, 232), (232, 188, 48), (196, 44, 44)),
        "vegetation": ((76, 116, 44), (94, 126, 54), (62, 100, 48)),
        "terrain": ((150, 148, 82), (126, 142, 64), (170, 148, 104)),
        "sky": ((104, 156, 222), (132, 176, 228)),
        "person": ((190, 60, 50), (60, 80, 150), (220, 215, 205), (50, 50, 56), (200, 170, 70)),
        "rider": ((190, 60, 50), (70, 90, 160), (220, 215, 205), (60, 60, 64)),
        "car": ((186, 40, 36), (226, 226, 226), (44, 46, 50), (60, 92, 160), (214, 176, 50)),
        "truck": ((230, 228, 222), (150, 112, 76), (206, 110, 44)),
        "bus": ((222, 222, 226), (202, 70, 46), (66, 110, 178)),
        "train": ((178, 182, 188), (196, 190, 176)),
        "motorcycle": ((50, 50, 54), (168, 40, 36)),
        "bicycle": ((56, 66, 116), (148, 44, 40), (50, 52, 54)),
    },
    color_spread=0.10,
    texture=0.06,
    grain=2.0,
    haze=260.0,
    fog=(196, 212, 232),
    clouds=(0.1, 1.0),
    cast=(1.03, 1.0, 0.95),
    exposure=(0.8, 1.15),
    contrast=1.08,
    vignette=0.0,
    blur=0.0,
    noise=0.010,
    hood=False,
)

OVERCAST = Style(
    focal=(1.0, 1.15),
    horizon=(0.38, 0.46),
    camera_height=(1.15, 1.35),
    road_width=(7.0, 11.0),
    sidewalk_width=(2.0, 4.0),
    storeys=(3, 5),
    window=(0.42, 0.6),
    frontage={"building": 6, "wall": 1.2, "fence": 1.5, "vegetation": 2.5, "terrain": 1},
    rates={
        "car": 5.0,
        "truck": 0.5,
        "bus": 0.5,
        "train": 0.4,
        "motorcycle": 0.7,
        "bicycle": 1.5,
        "person": 3.5,
        "pole": 3.0,
        "traffic light": 1.2,
        "traffic sign": 2.0,
        "tree": 2.5,
        "clutter": 0.8,
    },
    colors={
        "road": ((92, 94, 94), (104, 104, 104)),
        "sidewalk": ((136, 132, 130), (144, 126, 118)),
        "building": (
            (176, 164, 140),
            (140, 132, 124),
            (190, 182, 164),
            (150, 116, 96),
            (120, 118, 120),
        ),
        "wall": ((128, 122, 114), (146, 138, 130)),
        "fence": ((78, 82, 82), (104, 96, 86)),
        "pole": ((92, 96, 96), (118, 120, 118)),
        "traffic light": ((34, 38, 36),),
        "traffic sign": ((40, 82, 164), (224, 226, 224), (190, 48, 48), (222, 190, 60)),
        "vegetation": ((56, 78, 46), (70, 88, 52), (50, 68, 46)),
        "terrain": ((104, 116, 66), (96, 104, 62), (122, 112, 86)),
        "sky": ((208, 212, 212), (196, 204, 210)),
        "person": ((56, 58, 66), (84, 76, 70), (126, 52, 50), (62, 76, 110), (170, 166, 160)),
        "rider": ((60, 62, 70), (150, 60, 50), (70, 84, 118), (172, 170, 120)),
        "car": ((40, 42, 46), (150, 154, 158), (204, 206, 206), (44, 56, 92), (120, 36, 38)),
        "truck": ((204, 206, 202), (70, 98, 140), (150, 60, 50)),
        "bus": ((196, 186, 90), (170, 60, 52), (206, 208, 206)),
        "train": ((176, 58, 50), (204, 200, 186)),
        "motorcycle": ((44, 46, 48), (90, 40, 38)),
        "bicycle": ((48, 50, 54), (100, 102, 106), (110, 46, 44)),
    },
    color_spread=0.12,
    texture=0.08,
    grain=1.4,
    haze=160.0,
    fog=(204, 210, 208),
    clouds=(0.0, 0.3),
    cast=(0.95, 1.03, 0.97),
    exposure=(0.78, 1.02),
    contrast=0.95,
    vignette=0.25,
    blur=0.5,
    noise=0.012,
    hood=True,
)


class _Canvas:
    """Paints shapes given in meters on color, label and depth at once.

    The street runs along z, x points right and y up; the camera stands at z = 0.
    """

    def __init__(self, width: int, height: int, style: Style, rng: np.random.Generator) -> None:
        self.style, self.rng = style, rng
        self.width, self.height = width, height
        self.focal = width * rng.uniform(*style.focal)
        self.horizon = height * rng.uniform(*style.horizon)
        self.camera_height = rng.uniform(*style.camera_height)
        self.road = rng.uniform(*style.road_width) / 2
        self.sidewalk = self.road + rng.uniform(*style.sidewalk_width)
        self.camera_x = rng.uniform(0.0, 0.5) * self.road
        self.yaw = rng.normal(0.0, 0.04)
        self.sun = rng.choice([-1.0, 1.0])
        self.color = Image.new("RGB", (width, height))
        self.label = Image.new("L", (width, height), _RAW_IDS["sky"])
        self.depth = Image.new("F", (width, height))
        self._pens = [ImageDraw.Draw(plane) for plane in (self.color, self.label, self.depth)]

    def pick(self, name: str) -> Color:
        """Draw one of the colors that a class has in this style."""
        variants = self.style.colors[name]
        color = np.array(variants[self.rng.integers(len(variants))], np.float64)
        spread = self.style.color_spread
        return _shade(color, *self.rng.normal(self.rng.normal(1.0, spread), spread / 4, 3))

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Return the pixel at which a point appears."""
        x, z = x - self.camera_x + self.yaw * z, max(z, 0.4)
        return (
            self.width / 2 + self.focal * x / z,
            self.horizon + self.focal * (self.camera_height - y) / z,
        )

    def polygon(self, name: str, color: Color, *points: tuple[float, float, float]) -> None:
        """Fill a polygon in space."""
        depth = sum(point[2] for point in points) / len(points)
        pixels = [self.project(*point) for point in points]
        for pen, ink in zip(self._pens, _inks(name, color, depth), strict=True):
            pen.polygon(pixels, fill=ink)

    def ground(self, name: str, color: Color, x: Range, z: Range) -> None:
        """Fill a rectangle on the ground, whose depth is already known from its row."""
        corners = ((x[0], z[0]), (x[1], z[0]), (x[1], z[1]), (x[0], z[1]))
        pixels = [self.project(across, 0.0, along) for across, along in corners]
        for pen, ink in zip(self._pens[:2], _inks(name, color), strict=True):
            pen.polygon(pixels, fill=ink)

    def front(self, name: str, color: Color, z: float, x: Range, y: Range) -> None:
        """Fill a rectangle that faces the camera."""
        corners = ((x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1]))
        self.polygon(name, color, *((across, up, z) for across, up in corners))

    def side(self, name: str, color: Color, x: float, z: Range, y: Range) -> None:
        """Fill a rectangle that runs along the street."""
        corners = ((z[0], y[0]), (z[1], y[0]), (z[1], y[1]), (z[0], y[1]))
        self.polygon(name, color, *((x, up, along) for along, up in corners))

    def disk(
        self, name: str, color: Color, center: tuple[float, float, float], radius: Range
    ) -> None:
        """Fill an ellipse that faces the camera."""
        column, row = self.project(*center)
        across, up = (self.focal * length / max(center[2], 0.4) for length in radius)
        bounds = (column - across, row - up, column + across, row + up)
        for pen, ink in zip(self._pens, _inks(name, color, center[2]), strict=True):
            pen.ellipse(bounds, fill=ink)


def _inks(name: str, color: Color, *depth: float) -> tuple[Color | float, ...]:
    return (color, _RAW_IDS[name], *depth)


def _shade(color: Sequence[float] | NDArray[np.float64], *gains: float) -> Color:
    """Multiply a color by one gain, or by one for each of its channels."""
    scaled = np.clip(np.asarray(color) * np.array(gains), 0, 255).astype(int)
    return int(scaled[0]), int(scaled[1]), int(scaled[2])


# ---- the street ---------------------------------------------------------------------------------


def _paint_sky(canvas: _Canvas) -> None:
    top, size = np.array(canvas.pick("sky"), np.float64), (canvas.height, canvas.width)
    fog = np.array(canvas.style.fog, np.float64)
    rise = np.clip(np.arange(canvas.height) / canvas.horizon, 0, 1)[:, None, None] ** 1.5
    puffs = sum(_noise(canvas.rng, size, canvas.width / cells) / cells for cells in (6, 14, 30))
    cloud = np.clip(6 * puffs, 0, 1)[..., None]
    sky = top * (1 - rise) + fog * rise
    sky = sky + (250 - sky) * cloud * canvas.rng.uniform(*canvas.style.clouds)
    canvas.color.paste(Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8)))


def _paint_backdrop(canvas: _Canvas) -> None:
    x = -110.0
    while x < 110:
        width, height = canvas.rng.uniform(6, 18), canvas.rng.uniform(4, 16)
        name = canvas.rng.choice(["building", "vegetation"])
        if name == "building":
            canvas.front(name, canvas.pick(name), 95.0, (x, x + width), (0, height))
        else:
            for _ in range(6):
                spot = (x + canvas.rng.uniform(0, width), canvas.rng.uniform(0, height / 2), 95.0)
                canvas.disk(name, canvas.pick(name), spot, (width / 3, height / 3))
        x += width * 0.9


def _paint_ground(canvas: _Canvas) -> None:
    rows = np.arange(canvas.height, dtype=np.float32) + 0.5 - canvas.horizon
    depth = np.where(rows > 0, canvas.focal * canvas.camera_height / np.maximum(rows, 1e-3), 1e4)
    canvas.depth.paste(Image.fromarray(np.repeat(depth[:, None], canvas.width, 1).astype("f4")))
    road, edge, near, far = canvas.road, canvas.sidewalk, 0.5, 400.0
    canvas.ground("terrain", canvas.pick("terrain"), (-400, 400), (near, far))
    paving, asphalt = canvas.pick("sidewalk"), canvas.pick("road")
    canvas.ground("sidewalk", paving, (-edge, edge), (near, far))
    for z in np.arange(2.0, 30.0, 1.5):
        canvas.ground("sidewalk", _shade(paving, 0.88), (-edge, edge), (z, z + 0.08))
    canvas.ground("sidewalk", _shade(paving, 1.15), (-road - 0.2, road + 0.2), (near, far))
    canvas.ground("road", asphalt, (-road, road), (near, far))
    if canvas.rng.random() < 0.5:  # a strip of grass between sidewalk and road
        side = canvas.rng.choice([-1.0, 1.0])
        strip = sorted((side * (road + 0.2), side * (road + 0.45 * (edge - road))))
        canvas.ground("terrain", canvas.pick("terrain"), (strip[0], strip[1]), (near, far))
    paint = _shade(asphalt, 1.9)
    lanes = max(2, round(2 * road / 3.5))
    for lane in range(1, lanes):
        x = -road + lane * 2 * road / lanes
        for z in np.arange(canvas.rng.uniform(1, 7), 90, 7):
            canvas.ground("road", paint, (x - 0.08, x + 0.08), (z, z + 3))
    if canvas.rng.random() < 0.3:  # a zebra crossing
        z = canvas.rng.uniform(8, 18)
        for x in np.arange(-road + 0.4, road - 0.5, 1.0):
            canvas.ground("road", paint, (x, x + 0.5), (z, z + 3))


def _paint_frontage(canvas: _Canvas) -> None:
    names = list(canvas.style.frontage)
    weights = np.array(list(canvas.style.frontage.values()))
    paint = {"building": _building, "wall": _wall, "fence": _fence, "vegetation": _hedge}
    for side in (-1.0, 1.0):
        z = 90.0
        while z > 1:
            length = canvas.rng.uniform(7, 16)
            name = str(canvas.rng.choice(names, p=weights / weights.sum()))
            near = max(z - length, 0.5)
            if name != "building":
                for _ in range(canvas.rng.poisson(1.5)):
                    x = side * (canvas.sidewalk + canvas.rng.uniform(3, 9))
                    _tree(canvas, x, canvas.rng.uniform(near, z) + 2)
            if name in paint:
                paint[name](canvas, side, (near, z))
            z = near


def _building(canvas: _Canvas, side: float, z: Range) -> None:
    low, high = canvas.style.storeys
    storeys, storey = int(canvas.rng.integers(low, high + 1)), canvas.rng.uniform(2.8, 3.6)
    x, top = side * canvas.sidewalk, storeys * storey
    plaster = _shade(canvas.pick("building"), 1.1 if side == canvas.sun else 0.8)
    glass = _shade(plaster, 0.45, 0.5, 0.6) if canvas.rng.random() < 0.7 else (190, 200, 205)
    across, up = canvas.style.window
    bays = max(2, round((z[1] - z[0]) / canvas.rng.uniform(2.2, 3.4)))
    edges = np.linspace(z[1], z[0], bays + 1)
    canvas.front("building", _shade(plaster, 0.9), z[0], _outward(x, side, 9), (0, top))
    for far, near in pairwise(edges):
        canvas.side("building", plaster, x, (near, far), (0, top))
        gap = (1 - across) / 2 * (far - near)
        for floor in range(storeys):
            sill = (floor + (1 - up) / 2) * storey
            canvas.side("building", glass, x, (near + gap, far - gap), (sill, sill + up * storey))
    canvas.side("building", _shade(plaster, 0.7), x, z, (top - 0.4, top))


def _wall(canvas: _Canvas, side: float, z: Range) -> None:
    color, x, top = canvas.pick("wall"), side * canvas.sidewalk, canvas.rng.uniform(1.8, 3.2)
    canvas.front("wall", _shade(color, 0.9), z[0], _outward(x, side, 0.4), (0, top))
    canvas.side("wall", color, x, z, (0, top))
    for y in np.arange(0.4, top, 0.4):
        canvas.side("wall", _shade(color, 0.8), x, z, (y, y + 0.05))
    canvas.side("wall", _shade(color, 1.15), x, z, (top - 0.15, top))


def _fence(canvas: _Canvas, side: float, z: Range) -> None:
    color, x, top = canvas.pick("fence"), side * canvas.sidewalk, canvas.rng.uniform(1.2, 2.2)
    behind = _shade(canvas.pick("vegetation"), 0.9)
    canvas.side("fence", behind, x, z, (0, top))  # annotators outline a fence as a whole
    for along in np.arange(z[1], z[0], -0.55):
        canvas.side("fence", color, x, (along - 0.2, along), (0, top))
    for y in (0.2, top - 0.25):
        canvas.side("fence", color, x, z, (y, y + 0.14))


def _hedge(canvas: _Canvas, side: float, z: Range) -> None:
    for along in np.arange(z[1], z[0], -0.7):
        for _ in range(3):
            x = side * (canvas.sidewalk + canvas.rng.uniform(0.6, 1.4))
            spot = (x, canvas.rng.uniform(0.3, 1.8), along + canvas.rng.uniform(0, 0.5))
            canvas.disk("vegetation", canvas.pick("vegetation"), spot, (0.8, 0.7))


def _outward(x: float, side: float, depth: float) -> Range:
    return (x, x + depth) if side > 0 else (x - depth, x)


# ---- the things in it ---------------------------------------------------------------------------


def _tree(canvas: _Canvas, x: float, z: float) -> None:
    rng, height = canvas.rng, canvas.rng.uniform(4.5, 9)
    canvas.front("vegetation", (84, 70, 56), z, (x - 0.15, x + 0.15), (0, height * 0.6))
    green, crown = np.array(canvas.pick("vegetation"), np.float64), height * 0.28
    for _ in range(34):
        dx, dy = crown * rng.triangular(-1.1, 0, 1.1, 2)
        light = 1 + 0.25 * (dx * canvas.sun + dy) / crown + rng.normal(0, 0.08)
        spot = (x + dx, height * 0.68 + dy, z)
        canvas.disk("vegetation", _shade(green, light), spot, (crown / 3, crown / 3.4))


def _shadow(canvas: _Canvas, x: Range, z: Range) -> None:
    name = "sidewalk" if min(abs(x[0]), abs(x[1])) > canvas.road else "road"
    canvas.ground(name, _shade(canvas.pick(name), 0.45), x, z)


def _car(canvas: _Canvas, x: float, z: float) -> None:
    paint, half, top = canvas.pick("car"), 0.9, canvas.rng.uniform(1.4, 1.75)
    belt, glass = top * 0.58, (46, 54, 62)
    flank = x + half * math.copysign(1, canvas.camera_x - x)
    far, inner = z + canvas.rng.uniform(3.6, 4.6), flank - 0.12 * math.copysign(1, flank - x)
    _shadow(canvas, (x - half, x + half), (z - 0.2, far + 0.2))
    canvas.side("car", _shade(paint, 0.75), flank, (z, far), (0.25, belt))
    canvas.side("car", _shade(paint, 0.85), inner, (z, far - 1.2), (belt, top))
    canvas.side("car", glass, inner, (z + 0.4, far - 1.5), (belt + 0.05, top - 0.1))
    for wheel in (z + 0.5, far - 1.1):
        canvas.side("car", (24, 24, 26), flank, (wheel, wheel + 0.65), (0, 0.6))
    for left in (x - half + 0.05, x + half - 0.3):
        canvas.front("car", (24, 24, 26), z, (left, left + 0.25), (0, 0.4))
    canvas.front("car", paint, z, (x - half, x + half), (0.25, belt))
    roof = ((-half + 0.02, belt), (half - 0.02, belt), (half - 0.2, top), (-half + 0.2, top))
    canvas.polygon("car", paint, *((x + dx, y, z) for dx, y in roof))
    pane = [(dx * 0.84, belt + (y - belt) * 0.78 + 0.06) for dx, y in roof]
    canvas.polygon("car", glass, *((x + dx, y, z) for dx, y in pane))
    lamp = (190, 30, 28) if x > 0 else (240, 240, 220)  # rear lights here, headlights over there
    for left in (x - half + 0.04, x + half - 0.3):
        canvas.front("car", lamp, z, (left, left + 0.26), (belt - 0.28, belt - 0.1))
    canvas.front("car", (216, 216, 206), z, (x - 0.26, x + 0.26), (0.42, 0.55))


def _truck(canvas: _Canvas, x: float, z: float) -> None:
    cargo, half, top = canvas.pick("truck"), 1.25, canvas.rng.uniform(3.0, 3.7)
    far, flank = z + 6.0, x + half * math.copysign(1, canvas.camera_x - x)
    cab = canvas.pick("car")
    _shadow(canvas, (x - half, x + half), (z - 0.3, far + 2.2))
    canvas.side("truck", cab, flank, (far, far + 2), (0.5, top * 0.75))
    canvas.side("truck", _shade(cargo, 0.78), flank, (z, far), (1.0, top))
    canvas.side("truck", (40, 40, 42), flank, (z, far + 1.5), (0.5, 1.0))
    for wheel in (z + 0.6, z + 1.8, far + 0.4):
        canvas.side("truck", (24, 24, 26), flank, (wheel, wheel + 0.9), (0, 0.9))
    canvas.front("truck", (40, 40, 42), z, (x - half, x + half), (0.45, 1.0))
    for left in (x - half, x + half - 0.5):
        canvas.front("truck", (24, 24, 26), z, (left, left + 0.5), (0, 0.6))
        canvas.front("truck", (190, 30, 28), z, (left + 0.1, left + 0.4), (0.75, 0.95))
    canvas.front("truck", cargo, z, (x - half, x + half), (1.0, top))
    canvas.front("truck", _shade(cargo, 0.65), z, (x - 0.04, x + 0.04), (1.0, top))


def _coach(
    canvas: _Canvas, name: str, x: float, z: float, size: tuple[float, float, float]
) -> None:
    """Paint a bus or tram: a long box with rows of windows."""
    half, top, length = size[0] / 2, size[1], size[2]
    paint, glass = canvas.pick(name), (52, 60, 70)
    far, flank = z + length, x + half * math.copysign(1, canvas.camera_x - x)
    _shadow(canvas, (x - half, x + half), (z - 0.3, far))
    canvas.side(name, _shade(paint, 0.78), flank, (z, far), (0.35, top))
    for pane in np.arange(far - 0.4, z + 1.0, -1.6):
        canvas.side(name, glass, flank, (pane - 1.3, pane), (top * 0.45, top * 0.8))
    canvas.side(name, (36, 36, 38), flank, (z, far), (0.1, 0.45))
    canvas.front(name, (36, 36, 38), z, (x - half, x + half), (0.1, 0.5))
    canvas.front(name, paint, z, (x - half, x + half), (0.4, top))


def _bus(canvas: _Canvas, x: float, z: float) -> None:
    top, half = canvas.rng.uniform(2.9, 3.2), 1.25
    _coach(canvas, "bus", x, z, (2 * half, top, 10.5))
    canvas.front(
        "bus", (48, 56, 66), z, (x - half + 0.15, x + half - 0.15), (top * 0.5, top * 0.84)
    )
    canvas.front("bus", (232, 150, 40), z, (x - 0.7, x + 0.7), (top * 0.87, top * 0.96))
    for left in (x - half + 0.1, x + half - 0.4):
        canvas.front("bus", (200, 40, 34), z, (left, left + 0.3), (0.8, 1.2))
        canvas.front("bus", (24, 24, 26), z, (left, left + 0.3), (0, 0.4))


def _train(canvas: _Canvas, x: float, z: float) -> None:
    top, half = canvas.rng.uniform(3.4, 3.7), 1.2
    for rail in (x - 0.72, x + 0.72):
        canvas.ground("road", (66, 64, 64), (rail - 0.06, rail + 0.06), (1.0, z + 40))
    _coach(canvas, "train", x, z, (2 * half, top, 28.0))
    band = _shade(canvas.pick("train"), 0.6, 0.7, 0.9)
    canvas.front("train", band, z, (x - half, x + half), (0.5, 1.1))
    window = ((-half + 0.1, 1.5), (half - 0.1, 1.5), (half - 0.35, 2.8), (-half + 0.35, 2.8))
    canvas.polygon("train", (44, 52, 60), *((x + dx, y, z) for dx, y in window))
    for dx in (-0.8, 0.8):
        canvas.disk("train", (250, 246, 214), (x + dx, 0.95, z), (0.16, 0.16))
    canvas.front("train", (226, 170, 60), z, (x - 0.6, x + 0.6), (top - 0.5, top - 0.2))


def _person(canvas: _Canvas, x: float, z: float) -> None:
    rng, height = canvas.rng, canvas.rng.uniform(1.55, 1.9)
    coat, trousers = canvas.pick("person"), _shade(canvas.pick("person"), 0.6)
    stride, hip, neck = rng.uniform(0.05, 0.3), height * 0.5, height * 0.84
    _shadow(canvas, (x - 0.3, x + 0.3), (z - 0.1, z + 0.3))
    for foot in (-stride, stride):
        leg = ((-0.16, hip), (0.16, hip), (foot + 0.09, 0), (foot - 0.09, 0))
        canvas.polygon("person", trousers, *((x + dx, y, z) for dx, y in leg))
    torso = ((-0.18, hip - 0.1), (0.18, hip - 0.1), (0.26, neck - 0.06), (-0.26, neck - 0.06))
    canvas.polygon("person", coat, *((x + dx, y, z) for dx, y in torso))
    for arm in (-0.3, 0.3):
        left = x + arm - 0.06
        canvas.front("person", _shade(coat, 0.8), z, (left, left + 0.12), (hip, neck - 0.1))
    canvas.disk("person", _skin(canvas), (x, height - 0.14, z), (0.12, 0.15))


def _skin(canvas: _Canvas) -> Color:
    return _shade((214, 168, 138), canvas.rng.uniform(0.45, 1.05))


def _rider(canvas: _Canvas, x: float, z: float, squeeze: float, seat: float) -> None:
    coat, lean = canvas.pick("rider"), 0.28 * squeeze
    leg = ((-0.14, seat + 0.1), (0.16, seat + 0.1), (0.2 * squeeze + 0.1, 0.25), (-0.06, 0.25))
    canvas.polygon("rider", _shade(coat, 0.55), *((x + dx, y, z) for dx, y in leg))
    torso = ((-0.2, seat), (0.2, seat), (lean + 0.25, seat + 0.62), (lean - 0.25, seat + 0.62))
    canvas.polygon("rider", coat, *((x + dx, y, z) for dx, y in torso))
    canvas.disk("rider", _skin(canvas), (x + lean, seat + 0.8, z), (0.12, 0.15))
    canvas.disk("rider", canvas.pick("rider"), (x + lean, seat + 0.87, z), (0.14, 0.1))


def _bicycle(canvas: _Canvas, x: float, z: float) -> None:
    paint, squeeze = canvas.pick("bicycle"), canvas.rng.uniform(0.45, 1.0)
    reach = 0.55 * squeeze
    _shadow(canvas, (x - reach, x + reach), (z - 0.1, z + 0.2))
    ridden = canvas.rng.random() < 0.65
    for dx in (-reach, reach):
        canvas.disk("bicycle", (36, 36, 38), (x + dx, 0.36, z), (0.36 * squeeze, 0.36))
        canvas.disk("bicycle", (120, 122, 122), (x + dx, 0.36, z), (0.27 * squeeze, 0.28))
    bars = (
        (-1, 0.36, -0.4, 0.85),
        (-0.4, 0.85, 0.7, 0.9),
        (-0.2, 0.3, 0.7, 0.9),
        (0.7, 1.05, 1, 0.36),
    )
    for start, low, end, high in bars:
        a, b = x + start * reach, x + end * reach
        line = ((a, low), (a, low + 0.1), (b, high + 0.1), (b, high), (b + 0.06, high))
        canvas.polygon("bicycle", paint, *((column, y, z) for column, y in line))
    canvas.front("bicycle", (30, 30, 30), z, (x - 0.7 * reach, x - 0.2 * reach), (0.9, 1.0))
    if ridden:
        _rider(canvas, x - 0.2 * reach, z, squeeze, 0.9)


def _motorcycle(canvas: _Canvas, x: float, z: float) -> None:
    paint, squeeze = canvas.pick("motorcycle"), canvas.rng.uniform(0.45, 1.0)
    reach = 0.65 * squeeze
    _shadow(canvas, (x - reach, x + reach), (z - 0.1, z + 0.3))
    for dx in (-reach, reach):
        canvas.disk("motorcycle", (26, 26, 28), (x + dx, 0.32, z), (0.32 * squeeze + 0.05, 0.32))
        canvas.disk("motorcycle", (120, 120, 122), (x + dx, 0.32, z), (0.14 * squeeze, 0.14))
    body = (
        (-1.2, 0.75),
        (-0.9, 0.45),
        (0.5, 0.3),
        (0.9, 0.75),
        (0.7, 1.1),
        (0.2, 0.95),
        (-0.3, 0.8),
    )
    canvas.polygon("motorcycle", paint, *((x + dx * reach, y, z) for dx, y in body))
    canvas.front("motorcycle", (28, 28, 28), z, (x - reach, x + 0.1 * reach), (0.78, 0.9))
    canvas.disk("motorcycle", (240, 90, 60), (x - 1.1 * reach, 0.72, z), (0.08, 0.08))
    if canvas.rng.random() < 0.55:
        _rider(canvas, x - 0.2 * reach, z, squeeze, 0.85)


def _pole(canvas: _Canvas, x: float, z: float) -> None:
    color, height, half = canvas.pick("pole"), canvas.rng.uniform(4.5, 8.0), 0.1
    canvas.front("pole", color, z, (x - half, x + half), (0, height))
    if canvas.rng.random() < 0.6:  # a street lamp
        arm = _outward(x, -math.copysign(1, x), 1.6)
        canvas.front("pole", color, z, arm, (height - 0.14, height))


def _traffic_light(canvas: _Canvas, x: float, z: float) -> None:
    color, bottom = canvas.pick("traffic light"), canvas.rng.uniform(2.4, 3.4)
    canvas.front("pole", canvas.pick("pole"), z, (x - 0.08, x + 0.08), (0, bottom + 0.2))
    canvas.front("traffic light", color, z, (x - 0.24, x + 0.24), (bottom, bottom + 1.15))
    lit = canvas.rng.integers(3)
    lamps = ((60, 220, 130), (250, 190, 50), (245, 50, 40))
    for index, lamp in enumerate(lamps):
        glow = lamp if index == lit else _shade(lamp, 0.22)
        spot = (x, bottom + 0.22 + 0.36 * index, z)
        canvas.disk("traffic light", glow, spot, (0.15, 0.15))


def _traffic_sign(canvas: _Canvas, x: float, z: float) -> None:
    color, rng, y = canvas.pick("traffic sign"), canvas.rng, canvas.rng.uniform(2.2, 2.9)
    canvas.front("pole", canvas.pick("pole"), z, (x - 0.05, x + 0.05), (0, y))
    shape = rng.integers(4)
    inner = (238, 238, 236) if sum(color) < 500 else (40, 40, 42)
    if shape == 0:
        for radius, paint in ((0.42, color), (0.27, inner)):
            canvas.disk("traffic sign", paint, (x, y, z), (radius, radius))
    elif shape == 1:
        for half, paint in ((0.46, color), (0.26, inner)):
            corners = ((x - half, y - half, z), (x + half, y - half, z), (x, y + half, z))
            canvas.polygon("traffic sign", paint, *corners)
    else:
        half, tall = (0.4, 0.4) if shape == 2 else (1.1, 0.5)
        canvas.front("traffic sign", color, z, (x - half, x + half), (y - tall, y + tall))
        for row in (-0.2, 0.15):
            text = (y + row, y + row + 0.1)
            canvas.front("traffic sign", inner, z, (x - 0.7 * half, x + 0.7 * half), text)


def _clutter(canvas: _Canvas, x: float, z: float) -> None:
    name = str(canvas.rng.choice(["static", "unlabeled"]))
    color = _shade((120, 120, 110), *canvas.rng.uniform(0.4, 1.3, 3))
    half, top = canvas.rng.uniform(0.25, 0.7), canvas.rng.uniform(0.8, 1.5)
    canvas.front(name, color, z, (x - half, x + half), (0, top))


class _Kind(NamedTuple):
    """A kind of thing: the function that paints it, and its positions."""

    paint: Callable[[_Canvas, float, float], None]
    place: Literal["lane", "curb", "sidewalk"]
    near: float
    far: float
    footprint: Range  # its size across and along the street


# Long things first: a place is refused where something already stands.
_KINDS = {
    "train": _Kind(_train, "lane", 10, 34, (2.6, 29.0)),
    "bus": _Kind(_bus, "lane", 9, 32, (2.6, 11.5)),
    "truck": _Kind(_truck, "lane", 9, 32, (2.6, 9.0)),
    "car": _Kind(_car, "lane", 6, 45, (2.0, 5.0)),
    "motorcycle": _Kind(_motorcycle, "curb", 5, 16, (1.2, 1.5)),
    "bicycle": _Kind(_bicycle, "curb", 5, 16, (1.2, 1.5)),
    "person": _Kind(_person, "sidewalk", 5, 24, (0.5, 0.5)),
    "pole": _Kind(_pole, "sidewalk", 6, 40, (0.3, 0.3)),
    "traffic light": _Kind(_traffic_light, "sidewalk", 6, 18, (0.4, 0.4)),
    "traffic sign": _Kind(_traffic_sign, "sidewalk", 6, 20, (0.4, 0.4)),
    "tree": _Kind(_tree, "sidewalk", 9, 45, (0.4, 0.4)),
    "clutter": _Kind(_clutter, "sidewalk", 6, 20, (0.8, 0.8)),
}


def _place(canvas: _Canvas, kind: _Kind) -> tuple[float, float]:
    rng, side = canvas.rng, canvas.rng.choice([-1.0, 1.0])
    if kind.place == "lane":
        x = side * rng.uniform(0.25, 0.9) * (canvas.road - kind.footprint[0] / 2)
    elif kind.place == "curb":
        x = side * rng.uniform(canvas.road - 1.5, canvas.road + 0.8)
    else:
        x = side * rng.uniform(canvas.road + 0.4, canvas.sidewalk - 0.2)
    # Nearer than this it would stand outside the picture.
    visible = 2.1 * canvas.focal / canvas.width * abs(x - canvas.camera_x)
    near = max(kind.near, visible)
    return x, near + (max(kind.far, near + 6) - near) * rng.random() ** 1.5


def _paint_things(canvas: _Canvas) -> None:
    placed: list[tuple[float, float, _Kind]] = []
    for name, kind in _KINDS.items():
        for _ in range(canvas.rng.poisson(canvas.style.rates[name])):
            x, z = _place(canvas, kind)
            if all(_apart((x, z, kind), other) for other in placed):
                placed.append((x, z, kind))
    for x, z, kind in sorted(placed, key=lambda thing: -thing[1]):
        kind.paint(canvas, x, z)


def _apart(first: tuple[float, float, _Kind], second: tuple[float, float, _Kind]) -> bool:
    near, far = sorted((first, second), key=lambda thing: thing[1])
    across = (near[2].footprint[0] + far[2].footprint[0]) / 2
    return abs(near[0] - far[0]) > across or far[1] - near[1] > near[2].footprint[1]


def _paint_hood(canvas: _Canvas) -> None:
    width, height = canvas.width, canvas.height
    bounds = (-0.15 * width, 0.91 * height, 1.15 * width, 1.3 * height)
    ImageDraw.Draw(canvas.color).ellipse(bounds, fill=(46, 50, 52))
    ImageDraw.Draw(canvas.label).ellipse(bounds, fill=_RAW_IDS["ego vehicle"])
    ImageDraw.Draw(canvas.depth).ellipse(bounds, fill=1.0)


# ---- light and camera ---------------------------------------------------------------------------


def _noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> NDArray[np.float32]:
    """Draw smooth noise of unit variance before smoothing, whose blobs are `cell` pixels wide."""
    rows, columns = (max(2, round(length / cell)) for length in shape)
    grid = Image.fromarray(rng.standard_normal((rows, columns), np.float32))
    return np.asarray(grid.resize(shape[::-1], Image.Resampling.BICUBIC))


def _surface(canvas: _Canvas) -> NDArray[np.float32]:
    """Return the roughness of each pixel: leaves and grass are rough, the sky is smooth."""
    rough = np.ones(256, np.float32)
    for name, strength in (("vegetation", 2.2), ("terrain", 1.6), ("sky", 0.05), ("car", 0.4)):
        rough[_RAW_IDS[name]] = strength
    shape, grain = (canvas.height, canvas.width), canvas.style.grain * _SUPERSAMPLING
    noise = sum(_noise(canvas.rng, shape, grain * scale) for scale in (1.0, 4.0, 16.0))
    gain: NDArray[np.float32] = rough[np.asarray(canvas.label)] * (
        canvas.style.texture * noise / 1.7
    )
    return 1 + gain


def _expose(canvas: _Canvas) -> NDArray[np.uint8]:
    """Turn paint into a photograph: surface, haze, light, lens and sensor."""
    style, rng = canvas.style, canvas.rng
    color = np.asarray(canvas.color, np.float32) / 255 * _surface(canvas)[..., None]
    clear = np.exp(-np.asarray(canvas.depth) / style.haze)
    clear[np.asarray(canvas.label) == _RAW_IDS["sky"]] = 1
    fog = np.array(style.fog, np.float32) / 255
    color = fog + (color - fog) * clear[..., None]
    height, width = canvas.height // _SUPERSAMPLING, canvas.width // _SUPERSAMPLING
    color = color.reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING, 3).mean((1, 3))
    gain = rng.uniform(*style.exposure) * np.array(style.cast, np.float32)
    color = (color * gain - 0.45) * style.contrast + 0.45
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    color *= (1 - style.vignette * (x**2 + y**2) / 2)[..., None]
    if style.blur:
        photo = Image.fromarray(_to_bytes(color)).filter(ImageFilter.GaussianBlur(style.blur))
        color = np.asarray(photo, np.float32) / 255
    return _to_bytes(color + style.noise * rng.standard_normal(color.shape, np.float32))


def _to_bytes(color: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (np.clip(color, 0, 1) * 255).round().astype(np.uint8)


def render(
    style: Style, width: int, height: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one street scene.

    Returns:
        The image (height, width, 3) and its raw label ids (height, width).
    """
    canvas = _Canvas(width * _SUPERSAMPLING, height * _SUPERSAMPLING, style, rng)
    _paint_sky(canvas)
    _paint_ground(canvas)
    _paint_backdrop(canvas)
    _paint_frontage(canvas)
    _paint_things(canvas)
    if style.hood:
        _paint_hood(canvas)
    labels = np.asarray(canvas.label)[::_SUPERSAMPLING, ::_SUPERSAMPLING]
    return _expose(canvas), np.ascontiguousarray(labels)


# ---- files --------------------------------------------------------------------------------------


def write_synthetic_pair(
    root: Path,
    *,
    seed: int,
    source_images: int = 240,
    target_images: int = 120,
    val_images: int = 40,
    height: int = 144,
    source_format: SourceFormat = "gta5",
) -> tuple[Path, Path]:
    """Write a source in GTA5's or SYNTHIA's layout and a target in Cityscapes', or reuse them.

    Args:
        root: Folder for both; `complete.json` appears in it last.
        seed: The same seed and settings give the same files.
        source_images: Number of source images, all labeled.
        target_images: Number of target training images; their labels are for analysis only.
        val_images: Number of labeled target validation images.
        height: Height of the target images; the source's vary by 3 % around it.
        source_format: Layout of the source. The scenes are the same, but SYNTHIA's labels know
            only the 16 classes of `SYNTHIA_16`; the other pixels are void.

    Returns:
        The folder of the source and that of the target.

    Raises:
        FileExistsError: If `root` holds a source or target that was not written here.
    """
    source, target = root / "source", root / "target"
    begun, complete = root / "writing.json", root / "complete.json"
    settings = json.dumps(
        {
            "version": 1,
            "seed": seed,
            "source_images": source_images,
            "target_images": target_images,
            "val_images": val_images,
            "height": height,
        }
        | ({} if source_format == "gta5" else {"source_format": source_format})
    )
    if complete.is_file() and complete.read_text() == settings:
        return source, target
    _clear(root, [source, target], [begun, complete])
    _write(begun, lambda path: path.write_text(settings))
    with tqdm(total=source_images + target_images + val_images, desc="synthetic scenes") as bar:
        for index in range(source_images):
            rng = np.random.default_rng([seed, 0, index])
            _write_source(source, source_format, index, height, rng)
            bar.update()
        for domain, (split, count) in enumerate((("train", target_images), ("val", val_images)), 1):
            for index in range(count):
                rng = np.random.default_rng([seed, domain, index])
                _write_target(target, split, index, height, rng)
                bar.update()
    os.replace(begun, complete)
    return source, target


def _clear(root: Path, folders: Sequence[Path], markers: Sequence[Path]) -> None:
    """Remove an earlier pair, but never data that came from elsewhere."""
    existing = [folder for folder in folders if folder.exists()]
    if existing and not any(marker.is_file() for marker in markers):
        raise FileExistsError(
            f"{existing[0]} exists and was not written here. Choose another folder than {root}."
        )
    for folder in existing:
        shutil.rmtree(folder)
    for marker in markers:
        marker.unlink(missing_ok=True)


def _write_source(
    root: Path, source_format: SourceFormat, index: int, height: int, rng: np.random.Generator
) -> None:
    tall = round(height * rng.uniform(0.97, 1.03))
    wide = round(height * 16 / 9 * rng.uniform(0.97, 1.03))
    image, labels = render(SUNNY, wide, tall, rng)
    write = {"gta5": _write_gta5, "synthia": _write_synthia}[source_format]
    write(root, index, image, labels)


def _write_gta5(
    root: Path, index: int, image: NDArray[np.uint8], labels: NDArray[np.uint8]
) -> None:
    paletted = Image.fromarray(labels)
    palette = np.zeros((256, 3), np.uint8)
    palette[[entry.raw_id for entry in CLASSES]] = [entry.color for entry in CLASSES]
    paletted.putpalette(palette.tobytes())
    _write_png(root / "images" / f"{index + 1:05d}.png", Image.fromarray(image))
    _write_png(root / "labels" / f"{index + 1:05d}.png", paletted)


def _write_synthia(
    root: Path, index: int, image: NDArray[np.uint8], labels: NDArray[np.uint8]
) -> None:
    synthia_ids = np.zeros(256, np.uint16)
    for entry in CLASSES:
        synthia_ids[entry.raw_id] = entry.synthia_id or 0
    channels = np.zeros((*labels.shape, 3), np.uint16)  # class, instance (none here), unused
    channels[..., 0] = synthia_ids[labels]
    content = _png_of_16_bits(channels)
    _write_png(root / "RGB" / f"{index:07d}.png", Image.fromarray(image))
    _write(
        root / "GT" / "LABELS" / f"{index:07d}.png", lambda partial: partial.write_bytes(content)
    )


def _png_of_16_bits(channels: NDArray[np.uint16]) -> bytes:
    """Encode (height, width, 3) as a 16-bit RGB PNG, which Pillow cannot write."""
    height, width, _ = channels.shape
    rows = channels.astype(">u2").view(np.uint8).reshape(height, -1)
    filtered = np.pad(rows, ((0, 0), (1, 0)))  # each row begins with its filter type: 0, none
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def _write_target(
    root: Path, split: str, index: int, height: int, rng: np.random.Generator
) -> None:
    image, labels = render(OVERCAST, 2 * height, height, rng)
    city = _CITIES[index % len(_CITIES)]
    stem = f"{city}_{index:06d}_000019"
    photo = root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png"
    _write_png(photo, Image.fromarray(image))
    ids = root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png"
    _write_png(ids, Image.fromarray(labels))


def _write_png(path: Path, image: Image.Image) -> None:
    _write(path, lambda partial: image.save(partial, "PNG"))


def _write(path: Path, save: Callable[[Path], object]) -> None:
    """Save under a temporary name first, so that no half-written file looks whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save(partial)
    os.replace(partial, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the synthetic pair of data sets.")
    parser.add_argument("root", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source-format", choices=get_args(SourceFormat), default="gta5")
    arguments = parser.parse_args()
    write_synthetic_pair(arguments.root, seed=arguments.seed, source_format=arguments.source_format)
