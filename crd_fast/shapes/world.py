"""Prompts, scenes and renders of the shapes world.

An image is 64x64 RGB: circles, squares and triangles in four colours on a dark ground, or a light sign with a two- or
three-digit number. Prompts come in the six tasks of the GenEval benchmark plus `text`, each with metadata in GenEval's
format, so the benchmark's rules score them unchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.random import Generator

SIZE = 64
SHAPES = ("circle", "square", "triangle")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (228, 58, 52),
    "green": (46, 180, 76),
    "blue": (58, 104, 236),
    "yellow": (244, 206, 48),
}
RELATIONS = ("left of", "right of", "above", "below")
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
GENEVAL_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TASKS = (*GENEVAL_TASKS, "text")
BACKGROUND = (24, 26, 32)
PANEL = (232, 230, 222)
INK = (22, 22, 26)
TEST_SHARE = 4  # one prompt in four of every task is held out

Metadata = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One shape: its centre (x, y) and the radius of the circle of the same area, in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What one image shows: shapes, or the digits on a sign whose panel is centred at `sign_center`."""

    items: tuple[Item, ...] = ()
    text: str | None = None
    sign_center: tuple[float, float] = (SIZE / 2, SIZE / 2)


def _one(shape: str, color: str | None = None, count: int = 1) -> Metadata:
    return {"class": shape, "count": count} | ({"color": color} if color else {})


def _single_object() -> list[Metadata]:
    phrases = ("a {}", "one {}", "just a {}", "a picture of a {}")
    return [{"include": [_one(s)], "prompt": p.format(s)} for p in phrases for s in SHAPES]


def _two_object() -> list[Metadata]:
    phrases = ("a {} and a {}", "a {} with a {}")
    return [
        {"include": [_one(a), _one(b)], "prompt": p.format(a, b)}
        for p in phrases
        for a, b in itertools.permutations(SHAPES, 2)
    ]


def _counting() -> list[Metadata]:
    return [
        {
            "include": [_one(s, c, n)],
            "exclude": [{"class": s, "count": n + 1}],
            "prompt": " ".join(filter(None, (COUNT_WORDS[n], c, f"{s}s"))),
        }
        for n in COUNT_WORDS
        for s in SHAPES
        for c in (None, *COLORS)
    ]


def _colors() -> list[Metadata]:
    phrases = ("a {} {}", "one {} {}")
    return [{"include": [_one(s, c)], "prompt": p.format(c, s)} for p in phrases for c in COLORS for s in SHAPES]


def _position() -> list[Metadata]:
    return [
        {"include": [_one(b), _one(a) | {"position": [r, 0]}], "prompt": f"a {a} {r} a {b}"}
        for r in RELATIONS
        for a, b in itertools.permutations(SHAPES, 2)
    ]


def _color_attr() -> list[Metadata]:
    return [
        {"include": [_one(a, ca), _one(b, cb)], "prompt": f"a {ca} {a} and a {cb} {b}"}
        for a, b in itertools.permutations(SHAPES, 2)
        for ca, cb in itertools.permutations(COLORS, 2)
    ]


def _text() -> list[Metadata]:
    numbers = [f"{n:02d}" for n in range(100)] + [f"{n:03d}" for n in range(0, 1000, 3)]
    return [{"text": n, "prompt": f'a sign "{n}"'} for n in numbers]


@cache
def _catalogue() -> tuple[tuple[Metadata, ...], tuple[Metadata, ...]]:
    makers = (_single_object, _two_object, _counting, _colors, _position, _color_attr, _text)
    train: list[Metadata] = []
    test: list[Metadata] = []
    for task, make in zip(TASKS, makers, strict=True):
        entries = [{"tag": task} | entry for entry in make()]
        order = np.random.default_rng([7, len(entries)]).permutation(len(entries))
        held_out = set(order[: len(entries) // TEST_SHARE].tolist())
        for index, entry in enumerate(entries):
            (test if index in held_out else train).append(entry)
    return tuple(train), tuple(test)


def prompts(split: str, tasks: Sequence[str] = TASKS) -> list[Metadata]:
    """Prompts of one split ("train", "test" or "all"), as GenEval metadata with a `prompt` key.

    Train and test never share a combination: every prompt belongs to exactly one of them. Raises ValueError for an
    unknown split or task.
    """
    unknown = set(tasks) - set(TASKS)
    if unknown:
        raise ValueError(f"unknown tasks {sorted(unknown)}: expected some of {TASKS}")
    if split not in ("train", "test", "all"):
        raise ValueError(f"split is {split!r}: expected 'train', 'test' or 'all'")
    train, test = _catalogue()
    chosen = {"train": train, "test": test, "all": train + test}[split]
    return [dict(entry) for entry in chosen if entry["tag"] in tasks]


def sample_scene(metadata: Metadata, rng: Generator) -> Scene:
    """A random scene that satisfies a prompt: unspecified colours, sizes and places are drawn."""
    if metadata["tag"] == "text":
        center = (SIZE / 2 + rng.uniform(-2, 2), SIZE / 2 + rng.uniform(-4, 4))
        return Scene(text=metadata["text"], sign_center=center)
    kinds: list[tuple[str, str]] = []
    for entry in metadata["include"]:
        shared = entry.get("color") or rng.choice(list(COLORS))
        for _ in range(entry["count"]):
            # a group with no colour asked is one colour half of the time and mixed otherwise
            mixed = "color" not in entry and rng.random() < 0.5
            kinds.append((entry["class"], str(rng.choice(list(COLORS))) if mixed else str(shared)))
    relation = metadata["include"][-1].get("position", [None])[0]
    while True:
        placed = _place(len(kinds), relation, rng)
        if placed is not None:
            return Scene(tuple(Item(s, c, *place) for (s, c), place in zip(kinds, placed, strict=True)))


def crowded_scene(rng: Generator) -> Scene:
    """As many random shapes as fit: no prompt's scene, but made of the same parts."""
    places: list[tuple[float, float, float]] = []
    while len(places) < 2:
        places = _fit(7, (7.0, 12.0), rng)
    return Scene(tuple(Item(str(rng.choice(SHAPES)), str(rng.choice(list(COLORS))), *place) for place in places))


def _place(count: int, relation: str | None, rng: Generator) -> list[tuple[float, float, float]] | None:
    """Centres and radii without overlap, or None when a draw did not fit."""
    places = _fit(count, (8.0, 12.0) if count <= 2 else (7.0, 9.0), rng)
    if len(places) < count:
        return None
    if relation is not None:
        (bx, by, _), (ax, ay, _) = places
        along, across = {"left of": (bx - ax, by - ay), "right of": (ax - bx, by - ay)}.get(
            relation, (by - ay if relation == "above" else ay - by, ax - bx)
        )
        if along < 2 * abs(across):
            return None
    return places


def _fit(count: int, radii: tuple[float, float], rng: Generator) -> list[tuple[float, float, float]]:
    """Up to `count` centres and radii that touch neither each other nor the border; fewer when they do not fit."""
    places: list[tuple[float, float, float]] = []
    for _ in range(30 * count):
        if len(places) == count:
            break
        radius = rng.uniform(*radii)
        # a triangle of the circle's area reaches 1.56 radii up and 1.35 to either side of its centre
        x = rng.uniform(1.35 * radius + 1, SIZE - 1.35 * radius - 1)
        y = rng.uniform(1.56 * radius + 1, SIZE - 1.1 * radius - 1)
        if all(np.hypot(x - px, y - py) > 1.3 * (radius + pr) + 2 for px, py, pr in places):
            places.append((x, y, radius))
    return places


def corrupt(metadata: Metadata, rng: Generator) -> Metadata:
    """A neighbouring prompt that differs in one fact: the kind of mistake a web caption makes.

    Pretraining draws the *image* from the neighbour and keeps the caption, so the base model has learned the right
    answer but gives it only part of the time.
    """
    tag = metadata["tag"]
    include = [dict(entry) for entry in metadata.get("include", ())]
    if tag == "text":
        digits = list(metadata["text"])
        for i in range(len(digits)):
            if len(digits) - i == 1 or rng.random() < 0.7:
                digits[i] = str((int(digits[i]) + int(rng.integers(1, 10))) % 10)
        return metadata | {"text": "".join(digits)}
    if tag == "position":
        mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        relation = include[1]["position"][0]
        turned = [r for r in RELATIONS if r != relation]
        include[1]["position"] = [mirrored[relation] if rng.random() < 0.6 else str(rng.choice(turned)), 0]
    elif tag == "counting":
        count = include[0]["count"]
        include[0]["count"] = int(rng.choice([n for n in (1, 2, 3, 4) if abs(n - count) == 1]))
    elif tag == "two_object":
        drop = int(rng.integers(2))
        include = [include[drop]] if rng.random() < 0.5 else [include[drop], dict(include[drop])]
    elif tag == "color_attr" and rng.random() < 0.6:
        include[0]["color"], include[1]["color"] = include[1]["color"], include[0]["color"]
    elif tag in ("colors", "color_attr"):
        entry = include[int(rng.integers(len(include)))]
        entry["color"] = str(rng.choice([c for c in COLORS if c != entry["color"]]))
    else:
        entry = include[0]
        entry["class"] = str(rng.choice([s for s in SHAPES if s != entry["class"]]))
    return metadata | {"include": include}


@cache
def _glyphs() -> dict[str, np.ndarray]:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=23)
    masks = {}
    for digit in "0123456789":
        canvas = Image.new("L", (15, 26), 0)
        ImageDraw.Draw(canvas).text((7.5, 13), digit, fill=255, font=font, anchor="mm", stroke_width=0)
        masks[digit] = np.asarray(canvas, dtype=np.float32) / 255
    return masks


def _distance(item: Item, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Signed distance to the outline in pixels, negative inside; all shapes have the area of the circle."""
    dx, dy = xs - item.x, ys - item.y
    if item.shape == "circle":
        return np.hypot(dx, dy) - item.radius
    if item.shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - item.radius * np.sqrt(np.pi) / 2
    # an equilateral triangle pointing up: inradius 0.7776 r, three half-planes around the centroid
    inradius = item.radius * np.sqrt(np.pi / (3 * np.sqrt(3)))
    slanted = np.abs(dx) * (np.sqrt(3) / 2) - dy * 0.5
    return np.maximum(slanted, dy) - inradius


def render(scenes: Sequence[Scene], rng: Generator | None = None) -> np.ndarray:
    """Anti-aliased images (N, 3, 64, 64), float32 in [0, 1]. With `rng`, ground and colours vary slightly."""
    centers = np.arange(SIZE, dtype=np.float32) + 0.5
    ys, xs = np.meshgrid(centers, centers, indexing="ij")
    images = np.empty((len(scenes), 3, SIZE, SIZE), dtype=np.float32)

    def paint(image: np.ndarray, alpha: np.ndarray, color: tuple[int, int, int]) -> None:
        tint = np.asarray(color, dtype=np.float32)
        if rng is not None:
            tint = tint + rng.uniform(-8, 8, 3).astype(np.float32)
        image += alpha * (np.clip(tint, 0, 255)[:, None, None] / 255 - image)

    for image, scene in zip(images, scenes, strict=True):
        image[:] = 0
        paint(image, np.ones((SIZE, SIZE), np.float32), BACKGROUND)
        for item in scene.items:
            paint(image, np.clip(0.5 - _distance(item, xs, ys), 0, 1), COLORS[item.color])
        if scene.text is not None:
            _paint_sign(image, scene, paint, xs, ys)
    return images


def _paint_sign(image: np.ndarray, scene: Scene, paint: Any, xs: np.ndarray, ys: np.ndarray) -> None:
    assert scene.text is not None
    cx, cy = scene.sign_center
    width = 15 * len(scene.text)
    panel = np.maximum(np.abs(xs - cx) - width / 2 - 4, np.abs(ys - cy) - 16)
    paint(image, np.clip(0.5 - panel, 0, 1), PANEL)
    left, top = round(cx - width / 2), round(cy - 13)
    ink = np.zeros((SIZE, SIZE), np.float32)
    for i, digit in enumerate(scene.text):
        x = left + 15 * i
        ink[top : top + 26, x : x + 15] = _glyphs()[digit]
    paint(image, ink, INK)
