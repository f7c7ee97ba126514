"""The embedded data set: scenes of coloured shapes over textured backgrounds, drawn on the fly.

A scene follows from (seed, index, size), and (seed, index) decides what it shows whatever the size. Its class is the
kind of its largest object; smaller objects distract, cover a part of it or stand behind it.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("circle", "cross", "crescent", "pentagon", "ring", "square", "star", "triangle")
MIN_SIZE, MAX_SIZE = 32, 640
COLOURS = {
    "red": (205, 50, 45),
    "orange": (225, 130, 40),
    "yellow": (220, 195, 60),
    "green": (60, 150, 70),
    "teal": (50, 160, 160),
    "blue": (55, 90, 190),
    "purple": (130, 70, 165),
    "pink": (220, 130, 165),
    "brown": (120, 80, 50),
    "grey": (130, 130, 135),
    "white": (225, 225, 220),
    "black": (40, 40, 45),
}
#: Names of a colour and a shape together, the shapes of a colour one after the other.
COMBINATIONS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in CLASSES)
TEXTURES = ("shaded", "striped", "cloudy", "checked")
_NAMES = tuple(COLOURS)
_RGB = np.array(list(COLOURS.values()), dtype=np.float32)
_MAIN_AREA = (0.1, 0.28)
_OTHER_AREA = (0.08, 0.3)  # of the main object's
_VISIBLE = 0.6  # least share of an object that others leave in sight
_CONTRAST = 110.0  # least difference of an object's colour from the background's, summed over RGB
_TURN = math.radians(80)  # from 40 degrees one way to 40 degrees the other
_DRAWS = 64


@dataclass(frozen=True)
class Scene:
    """One drawn picture and all that is known about it.

    Attributes:
        image: RGB, size x size.
        label: Index in ``CLASSES`` of the largest object.
        mask: size x size of uint8; 0 is background, 1 + class index elsewhere.
        boxes_xyxy: N x 4 of float32, in pixels, around the visible part of each object, the largest object first.
        box_labels: N of int64, class indices.
        box_colours: N of int64, indices in ``COLOURS`` by order.
        caption: One English sentence without a full stop.
    """

    image: Image.Image
    label: int
    mask: np.ndarray
    boxes_xyxy: np.ndarray
    box_labels: np.ndarray
    box_colours: np.ndarray
    caption: str


def draw(seed: int, index: int, size: int) -> Scene:
    """Draw a scene.

    Args:
        seed: Chooses the data set.
        index: Chooses the scene; its class is ``index % 8``, so that any run of indices is balanced.
        size: Height and width in pixels, 32 to 640.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"size {size} is not in {MIN_SIZE} to {MAX_SIZE}")
    key = hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=16).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(key, "little")))
    label = index % len(CLASSES)
    chance = iter(rng.random(_DRAWS).tolist())
    scene = _Canvas(rng, chance, size)
    area = _between(_MAIN_AREA, next(chance))
    scene.add(label, area, (0.32, 0.68), chance, in_front=True)
    others = []
    for _ in range(int(next(chance) * 4)):
        kind = int(next(chance) * len(CLASSES))
        in_front = next(chance) < 0.5
        colour = scene.add(kind, area * _between(_OTHER_AREA, next(chance)), (0.1, 0.9), chance, in_front=in_front)
        if colour:
            others.append(f"a small {colour} {CLASSES[kind]}")
    return scene.finish(rng, label, others)


def _between(limits: tuple[float, float], chance: float) -> float:
    return limits[0] + chance * (limits[1] - limits[0])


class _Canvas:
    """A picture in the making: pixels, who covers each of them, and what was placed."""

    def __init__(self, rng: np.random.Generator, chance, size: int) -> None:
        self.size = size
        ground = int(next(chance) * len(_NAMES))
        self.texture = int(next(chance) * len(TEXTURES))
        # An object of the background's brightness and hue could hide in its texture.
        self.free = np.flatnonzero(np.abs(_RGB - (_RGB[ground] * 0.75 + 32.0)).sum(1) > _CONTRAST).tolist()
        self.ground = _NAMES[ground]
        first = _RGB[ground] * 0.75 + 32.0
        # The texture's other tone is the same colour, lighter or darker.
        depth = 0.15 + 0.3 * next(chance)
        second = first * (1.0 - depth) if next(chance) < 0.5 else first + (235.0 - first) * depth
        tone = _texture(self.texture, [next(chance) for _ in range(4)], rng, size)
        self.pixels = first + tone[:, :, None] * (second - first)
        self.covered = np.zeros((size, size), dtype=np.float32)
        self.owner = np.zeros((size, size), dtype=np.uint8)
        self.kinds: list[int] = []
        self.whole: list[int] = [0]
        self.colours: list[str] = []

    def add(self, kind: int, area: float, where: tuple[float, float], chance, *, in_front: bool) -> str | None:
        """Place an object, unless it would hide another one or be hidden; returns its colour."""
        across, down, turn, stretch, pick, shade, angle = (next(chance) for _ in range(7))
        size = self.size
        colour = self.free[int(pick * len(self.free))]
        centre = np.array([_between(where, across), _between(where, down)]) * size
        points = _outline(kind) @ _placement((turn - 0.5) * _TURN, 0.82 + 0.36 * stretch) * (math.sqrt(area) * size)
        found = _coverage(points + centre, size)
        if found is None:
            return None
        alpha, (y0, y1, x0, x1) = found
        owner, covered = self.owner[y0:y1, x0:x1], self.covered[y0:y1, x0:x1]
        solid = alpha >= 0.5
        whole = int(np.count_nonzero(solid))
        if self.kinds:
            lost = np.bincount(owner[solid], minlength=len(self.whole))[1:]
            if not whole or (not in_front and whole - lost.sum() < _VISIBLE * whole):
                return None
            if in_front:
                left = np.bincount(self.owner.ravel(), minlength=len(self.whole))[1:] - lost
                if (left < _VISIBLE * np.array(self.whole[1:])).any():
                    return None
        if not in_front:
            alpha = alpha * (1.0 - covered)
            solid = solid & (owner == 0)
        self.kinds.append(kind)
        self.whole.append(whole)
        self.colours.append(_NAMES[colour])
        owner[solid] = len(self.kinds)
        covered += alpha * (1.0 - covered)
        # Lit from one side, so that a colour is not one value.
        rows, columns = _grid(size)
        light = math.cos(angle * 6.2832) * columns[:, x0:x1] + math.sin(angle * 6.2832) * rows[y0:y1]
        fill = (_RGB[colour] + (shade - 0.5) * 30.0) + light[:, :, None] * 60.0
        target = self.pixels[y0:y1, x0:x1]
        target += alpha[:, :, None] * (fill - target)
        return _NAMES[colour]

    def finish(self, rng: np.random.Generator, label: int, others: list[str]) -> Scene:
        size = self.size
        noise = np.frombuffer(rng.bytes(size * size * 3), dtype=np.int8).reshape(size, size, 3)
        pixels = self.pixels + noise * np.float32(0.06 + 0.12 * rng.random())
        boxes = np.empty((len(self.kinds), 4), dtype=np.float32)
        for number in range(1, len(self.kinds) + 1):
            own = self.owner == number
            rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
            boxes[number - 1] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        caption = f"a {self.colours[0]} {CLASSES[label]} on a {TEXTURES[self.texture]} {self.ground} background"
        if others:
            listed = others[0] if len(others) == 1 else f"{', '.join(others[:-1])} and {others[-1]}"
            caption += f", with {listed}"
        return Scene(
            image=Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)),
            label=label,
            mask=np.array([0] + [kind + 1 for kind in self.kinds], dtype=np.uint8)[self.owner],
            boxes_xyxy=boxes,
            box_labels=np.array(self.kinds, dtype=np.int64),
            box_colours=np.array([_NAMES.index(name) for name in self.colours], dtype=np.int64),
            caption=caption,
        )


def _coverage(points: np.ndarray, size: int) -> tuple[np.ndarray, tuple[int, int, int, int]] | None:
    """Share of each pixel inside a polygon, over the part of the picture that it touches, and that part's bounds."""
    x0, y0 = np.maximum(np.floor(points.min(0)).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(points.max(0)).astype(int) + 1, size)
    if x1 - x0 < 2 or y1 - y0 < 2:
        return None
    fine = 4 if max(x1 - x0, y1 - y0) <= 128 else 2
    # Pillow puts the centre of a pixel at whole coordinates.
    corners = ((points - (x0, y0)) * fine - 0.5).ravel().tolist()
    drawn = Image.new("L", ((x1 - x0) * fine, (y1 - y0) * fine))
    ImageDraw.Draw(drawn).polygon(corners, fill=255)
    return np.asarray(drawn.reduce(fine), dtype=np.float32) / 255.0, (y0, y1, x0, x1)


def _placement(turn: float, stretch: float) -> np.ndarray:
    """Stretch by ``stretch`` along one axis and its inverse along the other, then turn; 2 x 2, keeps areas."""
    cos, sin = math.cos(turn), math.sin(turn)
    return np.array([[cos * stretch, sin * stretch], [-sin / stretch, cos / stretch]])


@functools.lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column coordinates in [-0.5, 0.5], as a column and a row."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    return line[:, None], line[None, :]


def _texture(kind: int, chance: list[float], rng: np.random.Generator, size: int) -> np.ndarray:
    """A pattern in [0, 1], size x size of float32."""
    rows, columns = _grid(size)
    cos, sin = math.cos(chance[0] * math.pi), math.sin(chance[0] * math.pi)
    if TEXTURES[kind] == "shaded":
        return np.clip(cos * columns + sin * rows + 0.5, 0, 1)
    if TEXTURES[kind] == "cloudy":
        cells = 3 + int(chance[1] * 5)
        grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        return np.clip(np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)), 0, 1)
    waves = 2 * math.pi * (2 + chance[1] * 5)
    across = np.sin(waves * (cos * columns + sin * rows) + 6.0 * chance[2])
    if TEXTURES[kind] == "checked":
        across = across * np.sin(waves * (cos * rows - sin * columns) + 6.0 * chance[3])
    return 0.5 + 0.5 * np.clip(across * 3.0, -1, 1)


@functools.lru_cache(maxsize=len(CLASSES))
def _outline(kind: int) -> np.ndarray:
    """Corners of a shape of area 1 around its centre, K x 2."""
    name = CLASSES[kind]
    if name == "circle":
        points = _arc(0, 2 * math.pi, 40)
    elif name in ("triangle", "square", "pentagon"):
        corners, first = {"triangle": (3, -math.pi / 2), "square": (4, math.pi / 4), "pentagon": (5, -math.pi / 2)}[
            name
        ]
        points = _arc(first, first + 2 * math.pi, corners)
    elif name == "star":
        points = _arc(-math.pi / 2, 1.5 * math.pi, 10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
    elif name == "cross":
        arm = np.array([(1, 0.32), (0.32, 0.32), (0.32, 1)])
        points = np.concatenate([arm @ np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))])
    elif name == "ring":
        # Out and back along the same edge: the inner circle is cut out.
        outer, inner = _arc(0, 2 * math.pi, 40, closed=True), _arc(2 * math.pi, 0, 40, closed=True) * 0.55
        points = np.concatenate([outer, inner])
    else:  # crescent: a circle without a second one, of radius 0.85 and moved by 0.45
        cos = (1 + 0.45**2 - 0.85**2) / (2 * 0.45)
        horn = math.acos(cos)
        inner = math.atan2(math.sin(horn), cos - 0.45)
        outside = _arc(horn, 2 * math.pi - horn, 32, closed=True)
        inside = _arc(2 * math.pi - inner, inner, 32, closed=True) * 0.85 + (0.45, 0.0)
        points = np.concatenate([outside, inside])
    x, y = points.T
    products = x * np.roll(y, -1) - np.roll(x, -1) * y
    area = products.sum() / 2
    centre = np.array([((v + np.roll(v, -1)) * products).sum() / (6 * area) for v in (x, y)])
    return (points - centre) / math.sqrt(abs(area))


def _arc(start: float, stop: float, count: int, *, closed: bool = False) -> np.ndarray:
    angles = np.linspace(start, stop, count, endpoint=closed)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


class ShapesSource:
    """Scenes as classification samples, equally many of each class.

    Args:
        seed: Chooses the data set.
        num_samples: How many scenes.
        size: Height and width in pixels.
        first: Index of the first scene, a multiple of 8; splits take ranges far apart.
    """

    def __init__(self, seed: int, num_samples: int, size: int, first: int = 0) -> None:
        self.seed = seed
        self.num_samples = num_samples
        self.size = size
        self.first = first

    def __len__(self) -> int:
        return self.num_samples

    def _at(self, index: int) -> int:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        return self.first + index

    def scene(self, index: int) -> Scene:
        """Return the whole scene: mask, boxes and caption too."""
        return draw(self.seed, self._at(index), self.size)

    def load(self, index: int) -> Image.Image:
        return self.scene(index).image

    def target(self, index: int) -> int:
        return self._at(index) % len(CLASSES)

    def name(self, index: int) -> str:
        return f"shapes-{self.seed}-{self._at(index)}"
