"""Points on two axes as inline SVG: lines of points with labels, single points beside them, and levels.

In the style of `crd_fast.evaluation.plots`. A label is put where it hides no point and no other label; where there is
no such place it is left to the point's tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

from crd_fast.evaluation.plots import finite, nice_ticks, number, tick_label

LINE_COLOURS = ("s0", "s3", "s4", "s5")  # of the palette; orange is the start, green the reference
MARK_COLOURS = {"before": "before", "reference": "reference"}
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 24, 40
_CHARACTER, _LETTER_HEIGHT = 6.2, 11.0  # pixels of the style's 11-pixel type
_RADIUS = 4.0
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """x, y; label: beside it; low, high: ends of an interval of y, if it has one."""

    x: float
    y: float
    label: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Chart:
    """lines: points by name, connected in their order, in palette order. marks: single points by side, "before" or
    "reference". levels: y by side, drawn across. log_x: x is on a logarithmic scale, whose ticks are the points' own.
    width, height: of the view box, pixels.
    """

    lines: Mapping[str, Sequence[Point]]
    x_name: str
    y_name: str
    marks: Mapping[str, Point] = field(default_factory=dict)
    levels: Mapping[str, float] = field(default_factory=dict)
    log_x: bool = False
    width: int = 560
    height: int = 360

    def __post_init__(self) -> None:
        if len(self.lines) > len(LINE_COLOURS):
            raise ValueError(f"{len(self.lines)} lines in one chart, at most {len(LINE_COLOURS)}")
        for sides in (self.marks, self.levels):
            if not set(sides) <= set(MARK_COLOURS):
                raise ValueError(f"marks and levels of {sorted(sides)}: expected some of {sorted(MARK_COLOURS)}")
        if self.log_x and any(point.x <= 0 for point in self.points):
            raise ValueError("a logarithmic axis has no place for x <= 0")

    @property
    def points(self) -> list[Point]:
        return [point for line in self.lines.values() for point in line] + list(self.marks.values())


def draw(chart: Chart) -> str:
    """`<svg>` text, or a `<p>` that says there is nothing to draw."""
    if not any(chart.lines.values()):
        return '<p class="none">No finite values recorded.</p>'
    return _Canvas(chart).svg()


def chart_legend(names: Sequence[str], sides: Mapping[str, str]) -> str:
    """Colour keys of a chart's lines, and of its marks or levels. sides: what is said of each."""
    keys = [(f"background:var(--{LINE_COLOURS[i]})", name) for i, name in enumerate(names)]
    keys += [(f"background:var(--{MARK_COLOURS[side]});border-radius:50%", text) for side, text in sides.items()]
    items = "".join(f'<li><i style="{style}"></i>{escape(name)}</li>' for style, name in keys)
    return f'<ul class="legend">{items}</ul>'


class _Canvas:
    """A chart's scales, and what has been drawn so far."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        self.plot: Box = (LEFT, TOP, chart.width - RIGHT, chart.height - BOTTOM)
        self.x_range = _range([self._along(point.x) for point in chart.points], floor=not chart.log_x)
        reach = [v for p in chart.points for v in (p.y, p.low, p.high) if v is not None]
        self.y_range = _range([*reach, *chart.levels.values()], floor=True)
        self.taken: list[Box] = []  # places of points and labels
        self.strokes: list[tuple[Box, int]] = []  # segments that labels had better not cross, and how much better

    def _along(self, x: float) -> float:
        return math.log(x) if self.chart.log_x else x

    def at(self, point: Point) -> tuple[float, float]:
        return self.px(point.x), self.py(point.y)

    def px(self, x: float) -> float:
        low, high = self.x_range
        return self.plot[0] + (self._along(x) - low) / (high - low) * (self.plot[2] - self.plot[0])

    def py(self, y: float) -> float:
        low, high = self.y_range
        return self.plot[3] - (y - low) / (high - low) * (self.plot[3] - self.plot[1])

    def svg(self) -> str:
        chart = self.chart
        self.taken = [_around(*self.at(point)) for point in chart.points]
        parts = [*self._axes(), *self._levels()]
        colours = dict(zip(chart.lines, LINE_COLOURS, strict=False))
        marks = {MARK_COLOURS[side]: (side, point) for side, point in chart.marks.items()}
        # what is wide and pale goes below what is small
        for name, line in chart.lines.items():
            parts += [self._whisker(colours[name], point) for point in line]
        parts += [self._whisker(colour, point) for colour, (_, point) in marks.items()]
        parts += [self._line(colours[name], line) for name, line in chart.lines.items()]
        for name, line in chart.lines.items():
            parts += [self._mark(colours[name], name, point) for point in line]
        parts += [self._mark(colour, side, point) for colour, (side, point) in marks.items()]
        # the longest labels first, while there is most room
        labelled = [point for point in chart.points if point.label]
        parts += [self._label(point) for point in sorted(labelled, key=lambda point: -len(point.label))]
        label = escape(f"{chart.y_name} over {chart.x_name}")
        box = f'viewBox="0 0 {chart.width} {chart.height}"'
        return f'<svg class="chart" {box} role="img" aria-label="{label}">{"".join(filter(None, parts))}</svg>'

    def _axes(self) -> list[str]:
        chart, (left, top, right, bottom) = self.chart, self.plot
        ticks = [t for t in nice_ticks(*self.y_range) if self.y_range[0] - 1e-12 <= t <= self.y_range[1] + 1e-12]
        parts = [
            f'<line class="grid" x1="{left}" x2="{right}" y1="{self.py(t):.1f}" y2="{self.py(t):.1f}"/>'
            f'<text x="{left - 6}" y="{self.py(t) + 4:.1f}" text-anchor="end">{tick_label(t, ticks)}</text>'
            for t in ticks
        ]
        used = -math.inf
        for x, text in self._x_ticks():
            at, half = self.px(x), _width(text) / 2
            if at - half < used or at + half > chart.width:
                continue
            used = at + half + 4
            parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}"/>')
            parts.append(f'<text x="{at:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{text}</text>')
        middle = (left + right) / 2
        parts.append(
            f'<text x="{middle:.1f}" y="{chart.height - 7}" text-anchor="middle">{escape(chart.x_name)}</text>'
        )
        parts.append(f'<text x="4" y="12">{escape(chart.y_name)}</text>')
        return parts

    def _x_ticks(self) -> list[tuple[float, str]]:
        if self.chart.log_x:
            return [(x, f"{x:g}") for x in sorted({point.x for point in self.chart.points})]
        ticks = nice_ticks(*self.x_range)
        return [(t, tick_label(t, ticks)) for t in ticks]

    def _levels(self) -> list[str]:
        parts = []
        for side, y in self.chart.levels.items():
            at = f'x1="{self.plot[0]}" x2="{self.plot[2]}" y1="{self.py(y):.1f}" y2="{self.py(y):.1f}"'
            style = f"stroke:var(--{MARK_COLOURS[side]});stroke-width:1.5;stroke-dasharray:5 4"
            parts.append(f'<line {at} style="{style}"><title>{side} {number(y)}</title></line>')
            self.strokes.append(((self.plot[0], self.py(y), self.plot[2], self.py(y)), 3))
        return parts

    def _line(self, colour: str, line: Sequence[Point]) -> str:
        if not line:
            return ""
        corners = [self.at(point) for point in line]
        self.strokes += [((*start, *end), 3) for start, end in pairwise(corners)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        return f'<polyline class="line" style="stroke:var(--{colour})" points="{points}"/>'

    def _whisker(self, colour: str, point: Point) -> str:
        if point.low is None or point.high is None:
            return ""
        x, top, bottom = self.px(point.x), self.py(point.high), self.py(point.low)
        self.strokes.append(((x, top, x, bottom), 1))
        style = f"stroke:var(--{colour});stroke-width:4;stroke-linecap:round;opacity:.25"
        return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" style="{style}"/>'

    def _mark(self, colour: str, name: str, point: Point) -> str:
        chart, (x, y) = self.chart, self.at(point)
        label = f" {point.label}" if point.label and point.label != name else ""
        told = f"{name}{label}: {chart.x_name} {number(point.x)}, {chart.y_name} {number(point.y)}"
        style = f"fill:var(--{colour})"
        return (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_RADIUS:g}" style="{style}"><title>{escape(told)}</title></circle>'
        )

    def _label(self, point: Point) -> str:
        """Beside its point: where it meets no point and no label, as few strokes as can be, and as near as can be."""
        found = [
            (sum(weight for stroke, weight in self.strokes if _crosses(stroke, box)) + far, number, box)
            for number, (far, box) in enumerate(self._places(point))
            if _inside(box, self.plot) and not any(_meet(box, other) for other in self.taken)
        ]
        if not found:
            return ""
        left, _, right, bottom = box = min(found)[2]
        self.taken.append(box)
        text = escape(point.label)
        return f'<text x="{(left + right) / 2:.1f}" y="{bottom - 2:.1f}" text-anchor="middle">{text}</text>'

    def _places(self, point: Point) -> Iterator[tuple[int, Box]]:
        """Where a label may stand, with how far away that is: 0 beside its point, or 1."""
        (x, y), width = self.at(point), _width(point.label)
        left, _, right, _ = self.plot
        for far in (0, 1):
            across, along = _RADIUS + 3 + 8 * far + width / 2, _RADIUS + 2 + 8 * far + _LETTER_HEIGHT / 2
            shifts = [(across, 0.0), (-across, 0.0), (0.0, -along), (0.0, along)]
            shifts += [(i * width / 2, j * along) for j in (-1, 1) for i in (1, -1)]
            for dx, dy in shifts:
                # above and below, a label may be pushed inwards
                at = x + dx if dy == 0 else min(max(x + dx, left + width / 2), right - width / 2)
                yield far, _box(at, y + dy, width, _LETTER_HEIGHT)


def finite_point(x: object, y: object, label: str = "", interval: object = None) -> Point | None:
    """None where one of the two is not a finite number. interval: [low, high], or anything else for none."""
    at_x, at_y = finite(x), finite(y)
    if at_x is None or at_y is None:
        return None
    ends = [finite(end) for end in interval] if isinstance(interval, list) and len(interval) == 2 else [None, None]
    return Point(at_x, at_y, label, *ends)


def _range(values: Sequence[float], floor: bool) -> tuple[float, float]:
    """What an axis spans. floor: it does not go below zero unless a value does."""
    low, high = min(values), max(values)
    pad = 0.09 * (high - low) or 0.1 * abs(high) or 0.1
    return (0.0 if floor and low >= 0 > low - pad else low - pad), high + pad


def _width(text: str) -> float:
    return _CHARACTER * len(text) + 2


def _around(x: float, y: float) -> Box:
    return _box(x, y, 2 * _RADIUS + 2, 2 * _RADIUS + 2)


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _inside(box: Box, outer: Box) -> bool:
    return outer[0] <= box[0] and outer[1] <= box[1] and box[2] <= outer[2] and box[3] <= outer[3]


def _crosses(stroke: Box, box: Box) -> bool:
    """Whether a segment, from its first to its second corner, passes through a box, by points along it."""
    x1, y1, x2, y2 = stroke
    steps = max(2, int(math.hypot(x2 - x1, y2 - y1) / 3))
    points = ((x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps) for i in range(steps + 1))
    return any(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in points)
