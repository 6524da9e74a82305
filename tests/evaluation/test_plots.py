"""Numbers and drawings of the report."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from crd_fast.evaluation.plots import (
    HEIGHT,
    WIDTH,
    Series,
    binned,
    interval_bars,
    legend,
    line_chart,
    nice_ticks,
    number,
    score,
    share_bar,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5243, ".52"),
        (0.999, "1.00"),
        (1, "1.00"),
        (0, ".00"),
        (-0.051, "−.05"),
        (-0.001, ".00"),
        (22.3, "22.30"),
    ],
)
def test_scores_are_printed_without_the_leading_zero(value: float, text: str) -> None:
    assert score(value) == text


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "0.5", True])
def test_what_is_not_a_number_is_not_available(value: object) -> None:
    assert score(value) == "n/a" and number(value) == "n/a"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (4.567, "4.57"),
        (36.04, "36.0"),
        (15234, "15,234"),
        (0.02134, ".0213"),
        (-0.5, "−.500"),
        (3.14e-5, "3.1e-05"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.002, 0.0041), (-3.0, 12.0), (34.0, 38.7), (0.0, 5e5)])
def test_ticks_are_round_even_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 3 <= len(ticks) <= 7
    assert low - 1e-9 <= ticks[0] and ticks[-1] <= high * (1 + 1e-9)
    step = ticks[1] - ticks[0]
    assert all(math.isclose(b - a, step) for a, b in zip(ticks, ticks[1:], strict=False))
    assert round(step / 10 ** math.floor(math.log10(step * (1 + 1e-9))), 6) in (1, 2, 2.5, 5)


def test_long_series_are_averaged_and_keep_gaps() -> None:
    series = binned(Series("r", range(1000), [1.0] * 500 + [None] * 500, [0.5] * 1000), limit=100)
    assert len(series.x) == 100
    assert series.x[0] == 4.5
    assert series.y[:50] == [1.0] * 50 and series.y[50:] == [None] * 50
    assert series.spread == [0.5] * 100
    short = Series("r", [1, 2], [0.0, 1.0])
    assert binned(short) is short


def _points(svg: str) -> list[tuple[float, float]]:
    line = re.search(r'<polyline class="line l0" points="([^"]+)"', svg)
    assert line is not None
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line[1].split())]


def test_a_rising_line_rises_left_to_right_inside_the_box() -> None:
    svg = line_chart([Series("kl", [1, 2, 3], [0.1, 0.2, 0.4])])
    points = _points(svg)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    first, second, third = (y for _, y in points)
    assert (second - third) == pytest.approx(2 * (first - second), abs=0.2)
    assert "<title>epoch 3 · kl .400</title>" in svg
    ElementTree.fromstring(svg)


def test_gaps_split_a_line_and_nothing_finite_says_so() -> None:
    svg = line_chart([Series("loss", [1, 2, 3, 4, 5], [1.0, 2.0, float("nan"), 2.0, 1.0])])
    assert svg.count("<polyline") == 2 and "nan" not in svg
    assert "No finite values" in line_chart([Series("loss", [1], [None])])


def test_flat_and_single_point_series_are_drawn() -> None:
    for series in (
        Series("kl", [1, 2], [0.0, 0.0]),
        Series("kl", [1], [3.0]),
        Series("lr", [1, 2], [5e-4, 5e-4]),
    ):
        svg = line_chart([series])
        assert "nan" not in svg and "<circle" in svg
        ElementTree.fromstring(svg)


def test_values_that_are_never_negative_have_no_negative_axis() -> None:
    assert "−" not in line_chart([Series("kl", [1, 2, 3], [0.0, 0.01, 0.02])])
    assert "−" in line_chart([Series("loss", [1, 2, 3], [-0.5, 0.0, 0.5])])


def test_bands_are_drawn_around_the_line() -> None:
    svg = line_chart([Series("geneval", [1, 2], [0.5, 0.6], [0.2, 0.1])])
    assert svg.count("<polygon") == 1
    assert "geneval .500 ± .200" in svg


def test_names_are_escaped_everywhere() -> None:
    name = "<b>&\"'"
    for text in (line_chart([Series(name, [1], [1.0])]), legend([name, "b"]), share_bar({name: 1.0})):
        assert "<b>&" not in text and "&lt;b&gt;&amp;" in text


def test_intervals_stand_where_the_numbers_say() -> None:
    svg = interval_bars({"mean": 0.5, "low": 0.25, "high": 0.75}, {"mean": 0.9})
    assert 'x1="25.00%" x2="75.00%"' in svg and 'cx="50.00%"' in svg and 'cx="90.00%"' in svg
    assert svg.count("opacity") == 1  # no interval was given for the second
    assert "circle" not in interval_bars(None, {})


def test_shares_are_sorted_summed_to_other_and_add_up() -> None:
    html = share_bar({"a": 1, "b": 60, "c": 20, "d": 10, "e": 5, "f": 2, "g": 2, "zero": 0})
    assert re.findall(r"</i>(\w+) <b>(\d+)%", html) == [
        ("b", "60"),
        ("c", "20"),
        ("d", "10"),
        ("e", "5"),
        ("f", "2"),
        ("other", "3"),
    ]
    assert "No time recorded" in share_bar({})


def test_a_legend_is_drawn_for_two_series_or_more() -> None:
    assert legend(["loss"]) == ""
    assert legend(["old", "sampling"]).count("<li>") == 2


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="series 'kl'"):
        Series("kl", [1, 2], [1.0])
    with pytest.raises(ValueError, match="7 series in one chart, at most 6"):
        line_chart([Series("s", [1], [1.0])] * 7)
