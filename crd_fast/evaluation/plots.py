"""Plots and style of the run report: inline SVG and one style sheet, no scripts, no plotting library.

Colours are CSS variables, so one SVG serves light and dark pages. Series colours are blue, orange, green and
purple of a palette that stays apart under the common colour-vision deficiencies; `before` is always the
orange, `after` the blue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 196
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 10, 26
MAX_POINTS = 200
SERIES_COLOURS = 6

Value = float | None
Scale = Callable[[float], float]

STYLE = """
:root {
  color-scheme: light dark; --page: #f6f7f8; --card: #fff; --ink: #16191d; --muted: #5c646c;
  --hair: #e3e6e8; --good: #12805c; --bad: #b3362b; --notice: #fff6e0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111417; --card: #191d21; --ink: #e8eaec; --muted: #9aa3ab; --hair: #2a3036; --good: #1f9d72;
    --bad: #d0554a; --notice: #33290f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 1152px; margin: 0 auto; padding: 40px 20px 64px; }
h1 {
  font-size: clamp(25px, 4.4vw, 40px); line-height: 1.16; letter-spacing: -.022em; font-weight: 650;
  margin: 6px 0 12px; max-width: 26em; text-wrap: balance;
}
h2 { font-size: 20px; letter-spacing: -.01em; font-weight: 650; margin: 52px 0 4px; }
h3 { font-size: 14px; font-weight: 600; margin: 22px 0 8px; display: flex; gap: 10px; align-items: baseline; }
p { margin: 0; }
.eyebrow, .meta, .note, .none, small { color: var(--muted); }
.eyebrow { font-size: 13px; font-weight: 600; }
.note { font-size: 13.5px; margin-bottom: 14px; max-width: 60em; }
.none { font-size: 14px; padding: 12px 0; }
.banner {
  background: var(--notice); border-left: 3px solid var(--s5); border-radius: 4px; padding: 10px 14px;
  margin-top: 18px;
}
.before, .after, .arrow, .missing { font-style: normal; }
.before { color: var(--before); }
.after { color: var(--after); }
.arrow, .missing { color: var(--muted); font-weight: 400; }
.num, td, .tile b, h1 b { font-variant-numeric: tabular-nums; }
h1 b { font-weight: 700; }
.whole { white-space: nowrap; }
.tiles { display: grid; grid-template-columns: repeat(5, 1fr); gap: 12px; margin-top: 28px; }
.tile, .card {
  background: var(--card); border: 1px solid var(--hair); border-radius: 10px; padding: 14px 16px;
  min-width: 0;
}
.tile > span { display: block; font-size: 13px; color: var(--muted); }
.tile > small { display: block; font-size: 12.5px; line-height: 1.4; }
.tile b {
  display: block; font-size: 26px; font-weight: 650; letter-spacing: -.02em; line-height: 1.3;
  white-space: nowrap;
}
.lead { grid-column: span 3; }
.lead b { font-size: 34px; line-height: 1.2; }
.lead .track { margin: 10px 0 8px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 16px; }
.pair { margin: 0; min-width: 0; }
.duo {
  display: grid; grid-template-columns: 1fr 1fr; gap: 3px; border-radius: 8px; overflow: hidden;
  border: 1px solid var(--hair); background: var(--hair);
}
.shot {
  position: relative; aspect-ratio: 1; background: var(--hair); display: grid; place-items: center;
  font-size: 12px; color: var(--muted);
}
.shot img { display: block; width: 100%; height: 100%; object-fit: cover; }
.mark { font-weight: 700; font-style: normal; }
.pass { color: var(--good); }
.fail { color: var(--bad); }
figcaption {
  font-size: 12.5px; line-height: 1.35; color: var(--muted); margin-top: 6px; overflow-wrap: anywhere;
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; min-width: 680px; font-size: 14px; }
th {
  font-weight: 600; font-size: 12.5px; color: var(--muted); text-align: right; padding: 6px 10px;
  white-space: nowrap;
}
td { text-align: right; padding: 7px 10px; border-top: 1px solid var(--hair); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.wide-cell { width: 26%; min-width: 170px; text-align: left; }
tr.macro td { font-weight: 650; border-top: 2px solid var(--hair); }
td small { font-weight: 400; font-size: 12px; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 12px;
  margin-top: 14px;
}
.card { margin: 0; display: flex; flex-direction: column; }
.card .chart { margin-top: auto; }
.card header {
  display: flex; justify-content: space-between; gap: 8px; align-items: baseline; font-size: 14px;
  font-weight: 600;
}
.card header span {
  font-weight: 400; color: var(--muted); font-size: 13px; font-variant-numeric: tabular-nums;
}
.card .sub { font-size: 12px; color: var(--muted); margin-bottom: 6px; min-height: 18px; }
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 0; padding: 0; font-size: 12px;
  color: var(--muted);
}
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 6px; }
.legend.wide { gap: 6px 24px; font-size: 13.5px; margin-top: 12px; }
.legend b { color: var(--ink); font-variant-numeric: tabular-nums; }
.shares { display: flex; gap: 2px; height: 20px; border-radius: 5px; overflow: hidden; }
.shares span { min-width: 2px; }
details { margin-top: 14px; }
summary { cursor: pointer; font-weight: 600; }
pre {
  overflow-x: auto; font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; margin: 12px 0 0;
}
footer {
  margin-top: 52px; border-top: 1px solid var(--hair); padding-top: 18px; font-size: 13px;
  color: var(--muted);
}
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
@media (max-width: 900px) {
  .tiles { grid-template-columns: 1fr 1fr; }
  .lead { grid-column: span 2; }
}
@media (max-width: 480px) {
  main { padding: 24px 16px 48px; }
  .tile { padding: 12px; }
  .tile b { font-size: 21px; }
  .lead b { font-size: 30px; }
}
:root {
  --s0: #0f6cb5; --s1: #cf5a00; --s2: #00876a; --s3: #9a4f96; --s4: #7d8790; --s5: #b08900;
  --before: var(--s1); --after: var(--s0); --grid: #e6e8ea; --axis: #6a727a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --s0: #5fb0ee; --s1: #f0934a; --s2: #3dbf9c; --s3: #cf93cc; --s4: #98a2ab; --s5: #d9b640;
    --grid: #2b3137; --axis: #949da6;
  }
}
svg { display: block; overflow: visible; }
svg text { font: 11px/1 system-ui, sans-serif; fill: var(--axis); font-variant-numeric: tabular-nums; }
.chart { width: 100%; height: auto; }
.grid { stroke: var(--grid); stroke-width: 1; }
.line { fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round; }
.hit { fill: transparent; stroke: transparent; stroke-width: 6; }
.hit:hover { fill: var(--axis); }
.band { opacity: .15; }
""" + "".join(
    f".l{i} {{ stroke: var(--s{i}); }} .f{i} {{ fill: var(--s{i}); background: var(--s{i}); }}\n"
    for i in range(SERIES_COLOURS)
)


@dataclass(frozen=True)
class Series:
    """A named line: x positions, y values (None leaves a gap) and the half-height of a band around it, if
    any."""

    name: str
    x: Sequence[float]
    y: Sequence[Value]
    spread: Sequence[Value] | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.x), len(self.y), len(self.x if self.spread is None else self.spread)}
        if len(lengths) > 1:
            raise ValueError(f"series '{self.name}': x, y and spread differ in length: {sorted(lengths)}")


def finite(value: object) -> Value:
    """`value` as a float, or None where it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def score(value: object, digits: int = 2) -> str:
    """A score as the field prints it, `.52`, `1.00`, `−.05`; `n/a` where there is none."""
    number = finite(value)
    if number is None:
        return "n/a"
    text = f"{abs(number):.{digits}f}"
    sign = "−" if number < 0 and float(text) > 0 else ""
    return sign + (text[1:] if text.startswith("0.") else text)


def number(value: object) -> str:
    """Three significant digits: `.0123`, `4.57`, `15,200`, `3.1e-05`; `n/a` where there is none."""
    x = finite(value)
    if x is None:
        return "n/a"
    if x == 0:
        return "0"
    size = abs(x)
    if size >= 1e6 or size < 1e-3:
        text = f"{x:.1e}"
    else:
        text = f"{x:,.{max(0, 2 - math.floor(math.log10(size)))}f}"
    if text.startswith(("0.", "-0.")):
        text = text.replace("0.", ".", 1)
    return text.replace("-", "−", 1) if x < 0 else text


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (steps of 1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def binned(series: Series, limit: int = MAX_POINTS) -> Series:
    """The series with neighbours averaged until at most `limit` points are left, so long runs stay light."""
    size = math.ceil(len(series.x) / limit)
    if size <= 1:
        return series
    starts = range(0, len(series.x), size)
    spread = series.spread
    return Series(
        series.name,
        [sum(series.x[i : i + size]) / len(series.x[i : i + size]) for i in starts],
        [_mean(series.y[i : i + size]) for i in starts],
        None if spread is None else [_mean(spread[i : i + size]) for i in starts],
    )


def line_chart(series: Sequence[Series], *, domain: tuple[float, float] | None = None, x_name: str = "epoch") -> str:
    """Lines over a shared axis, each with its band, an end point and a tooltip per point.

    Args:
        series: at most `SERIES_COLOURS` series, drawn in palette order.
        domain: y range that must be shown; values outside of it still widen the axis.
        x_name: label of the x axis.

    Returns:
        `<svg>` text, or a `<p>` that says there is nothing to draw.
    """
    if len(series) > SERIES_COLOURS:
        raise ValueError(f"{len(series)} series in one chart, at most {SERIES_COLOURS}: split them over charts")
    drawn = [(i, binned(s)) for i, s in enumerate(series) if any(finite(v) is not None for v in s.y)]
    if not drawn:
        return '<p class="none">No finite values recorded.</p>'
    reach = [v for _, s in drawn for point in _reach(s) for v in point] + list(domain or ())
    low, high = min(reach), max(reach)
    pad = 0.0 if domain == (low, high) else 0.06 * ((high - low) or abs(high) or 1.0)
    # A padded axis must not dip under zero when no value does: a negative KL would look measured.
    low, high = (low - pad if low < 0 or low - pad >= 0 else 0.0), high + pad
    xs = [x for _, s in drawn for x in s.x]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT) if max(xs) > min(xs) else WIDTH / 2

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    ticks = nice_ticks(low, high)
    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>'
        f'<text x="{LEFT - 7}" y="{py(t) + 4:.1f}" text-anchor="end">{tick_label(t, ticks)}</text>'
        for t in ticks
    ]
    x_ticks = [t for t in nice_ticks(x_low, x_high, 5) if t == int(t)]
    for t in x_ticks:
        parts.append(f'<text x="{px(t):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{t:,.0f}</text>')
    parts.append(f'<text x="{LEFT - 7}" y="{HEIGHT - 8}" text-anchor="end">{escape(x_name)}</text>')
    for i, s in drawn:
        parts += _line(i, s, px, py, x_name)
    label = escape(", ".join(s.name for _, s in drawn))
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg class="chart" {box} role="img" aria-label="{label}">{"".join(parts)}</svg>'


def interval_bars(before: Mapping[str, object] | None, after: Mapping[str, object] | None) -> str:
    """Two rows of `interval_rows`, before above after."""
    return interval_rows({"before": before, "after": after})


def interval_rows(entries: Mapping[str, Mapping[str, object] | None]) -> str:
    """Rows on a 0 to 1 track: the 95 % interval as a bar and the mean as a dot, the first entry on top.

    entries: by the name of a CSS colour, such as "before". Coordinates are percentages, so the drawing fills whatever
    cell it stands in without scaling its strokes.
    """
    height = 6 + 10 * len(entries)
    parts = [f'<line class="grid" x1="{x}%" x2="{x}%" y1="0" y2="{height}"/>' for x in (0, 25, 50, 75, 100)]
    for row, (role, side) in enumerate(entries.items()):
        y, mean = 8 + 10 * row, finite((side or {}).get("mean"))
        if mean is None:
            continue
        low, high = finite((side or {}).get("low")), finite((side or {}).get("high"))
        colour, at = f"var(--{role})", _percent(mean)
        if low is not None and high is not None:
            parts.append(
                f'<line x1="{_percent(low)}" x2="{_percent(high)}" y1="{y}" y2="{y}" '
                f'style="stroke:{colour};stroke-width:4;stroke-linecap:round;opacity:.35"/>'
            )
        parts.append(
            f'<circle cx="{at}" cy="{y}" r="4" style="fill:{colour}"><title>{role} {score(mean)}</title></circle>'
        )
    return f'<svg class="track" width="100%" height="{height}" aria-hidden="true">{"".join(parts)}</svg>'


def share_bar(parts: Mapping[str, float], unit: str = "s") -> str:
    """One bar split by share, largest first, with a legend of amounts and percentages below.

    Args:
        parts: name to amount; beyond `SERIES_COLOURS` names the smallest are summed as "other".
    """
    amounts = sorted(((n, v) for n, v in parts.items() if v > 0), key=lambda item: (-item[1], item[0]))
    if len(amounts) > SERIES_COLOURS:
        rest = amounts[SERIES_COLOURS - 1 :]
        amounts = [*amounts[: SERIES_COLOURS - 1], ("other", sum(v for _, v in rest))]
    total = sum(v for _, v in amounts)
    if total <= 0:
        return '<p class="none">No time recorded.</p>'
    segments, legend = [], []
    for i, (name, amount) in enumerate(amounts):
        share = f"{100 * amount / total:.0f}%"
        text = f"{escape(name)} {number(amount)} {escape(unit)} ({share})"
        segments.append(f'<span class="f{i}" style="flex:{amount / total:.5f}" title="{text}"></span>')
        legend.append(
            f'<li><i class="f{i}"></i>{escape(name)} <b>{share}</b> <small>{number(amount)} {escape(unit)}</small></li>'
        )
    return f'<div class="shares">{"".join(segments)}</div><ul class="legend wide">{"".join(legend)}</ul>'


def legend(names: Sequence[str]) -> str:
    """Colour keys of a chart's series in palette order; empty for a single series, which its title names."""
    if len(names) < 2:
        return ""
    return (
        '<ul class="legend">'
        + "".join(f'<li><i class="f{i}"></i>{escape(n)}</li>' for i, n in enumerate(names))
        + "</ul>"
    )


def _line(index: int, s: Series, px: Scale, py: Scale, x_name: str) -> list[str]:
    """Band, line, end point and tooltips of one series."""
    runs: list[list[tuple[float, float, float]]] = [[]]
    for i, (x, raw) in enumerate(zip(s.x, s.y, strict=True)):
        y = finite(raw)
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y, (finite(s.spread[i]) if s.spread is not None else None) or 0.0))
    parts = []
    for run in filter(None, runs):
        if s.spread is not None and len(run) > 1:
            edge = [(x, y + d) for x, y, d in run] + [(x, y - d) for x, y, d in reversed(run)]
            points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in edge)
            parts.append(f'<polygon class="band f{index}" points="{points}"/>')
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y, _ in run)
        parts.append(f'<polyline class="line l{index}" points="{points}"/>')
    points_of = [point for run in runs for point in run]
    x, y, _ = points_of[-1]
    parts.append(f'<circle class="f{index}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3"/>')
    for x, y, d in points_of:
        text = f"{x_name} {x:,.0f} · {s.name} {number(y)}" + (f" ± {number(d)}" if s.spread is not None else "")
        parts.append(
            f'<circle class="hit" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3"><title>{escape(text)}</title></circle>'
        )
    return parts


def _reach(s: Series) -> list[tuple[float, float]]:
    """Lowest and highest drawn value of each point."""
    spread = s.spread if s.spread is not None else [0.0] * len(s.y)
    points = [(finite(y), finite(d) or 0.0) for y, d in zip(s.y, spread, strict=True)]
    return [(y - d, y + d) for y, d in points if y is not None]


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """A tick label with as many decimals as the step between ticks needs."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(value) or 1.0
    top = max(abs(t) for t in ticks)
    if value == 0 or abs(value) < step * 1e-6:
        return "0"
    if step < 1e-4 or top >= 1e6:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    decimals = next(d for d in range(8) if math.isclose(round(step, d), step, rel_tol=1e-6))
    return score(value, decimals) if top <= 1 else f"{value:,.{decimals}f}".replace("-", "−")


def _mean(values: Sequence[Value]) -> Value:
    numbers = [v for v in map(finite, values) if v is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _percent(value: float) -> str:
    return f"{100 * min(max(value, 0.0), 1.0):.2f}%"
