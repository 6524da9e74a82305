"""The page of a sweep over beta, from known numbers."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from crd_fast.didr.pareto import as_beta, write_sweep_report
from crd_fast.didr.pareto_plot import Chart, Point, draw
from crd_fast.errors import DataError
from tests.evaluation.report_text import visible_text

# beta -> strict score, Fréchet distance and reward of the trained generator
DIFFUSED = {
    0.175: (0.80, 0.031, -0.35),
    0.35: (0.78, 0.021, -0.42),
    0.7: (0.71, 0.0152, -0.6),
    1.4: (0.62, 0.0121, -0.8),
}
ENDPOINT = {beta: (strict - 0.03, far + 0.004, reward - 0.01) for beta, (strict, far, reward) in DIFFUSED.items()}


def _side(strict: float, frechet: float | None, reward: float) -> dict[str, Any]:
    interval = [strict - 0.04, strict + 0.04]
    side = {"geneval_strict": strict, "geneval_strict_interval": interval, "geneval_soft": strict + 0.1, "n": 420}
    return side | {"frechet": frechet, "shapes_judge": reward, "tasks": {}}


def _rows(kind: str, scores: dict[float, tuple[float, float, float]]) -> list[dict[str, Any]]:
    shared = {"before": _side(0.30, 0.034, -2.4), "reference": _side(0.60, 0.0082, -0.86), "seed": 3, "minutes": 5.25}
    return [
        {"folder": f"{kind}-beta-{beta:g}", "reward_at": kind, "beta": beta, "after": _side(*values)} | shared
        for beta, values in scores.items()
    ]


def _write(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    found = {"name": "shapes_didr", "model": "m", "reward": "shapes_judge", "score": "geneval_strict"}
    found |= {"runs": len(rows), "rows": rows, "failed": []} | changes
    (folder / "sweep.json").write_text(json.dumps(found))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _write(tmp_path, _rows("diffused", DIFFUSED) + _rows("endpoint", ENDPOINT))


def _render(folder: Path) -> tuple[str, str]:
    page = write_sweep_report(folder).read_text(encoding="utf-8")
    return page, visible_text(page)


def _charts(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r'<svg class="chart".*?</svg>', page)]


def _dots(svg: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """Points by their tooltip."""
    return {
        str(dot.findtext("title")): (float(dot.get("cx", "nan")), float(dot.get("cy", "nan")))
        for dot in svg.findall("circle")
    }


def _boxes(svg: ElementTree.Element) -> dict[str, tuple[float, float, float, float]]:
    """Where each text is, in letters 6 wide and 10 high."""
    boxes = {}
    for number, text in enumerate(svg.findall("text")):
        x, y, width = float(text.get("x", "nan")), float(text.get("y", "nan")), 6.0 * len(str(text.text))
        left = x - {"middle": width / 2, "end": width, "start": 0.0}[text.get("text-anchor", "start")]
        boxes[f"{number} {text.text}"] = (left, y - 9, left + width, y + 1)
    return boxes


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def test_the_best_run_is_the_headline(folder: Path) -> None:
    page, text = _render(folder)
    assert "Strict score in one step .30 → .80 at β 0.175, diffused, Fréchet distance .0310" in text
    assert "8 of 8 runs · reward shapes_judge · seed 3" in text and "Unfinished" not in text
    assert re.findall(r'<section id="(\w+)"', page) == ["pareto", "beta", "runs"]


def test_score_and_reward_stand_against_the_distance(folder: Path) -> None:
    """One line for each way to use the reward, its points by beta, beside the start and the reference."""
    page, _ = _render(folder)
    strict, reward, *over_beta = _charts(page)
    assert len(over_beta) == 3
    for svg, y_name in ((strict, "Strict score, higher is better"), (reward, "Reward, shapes_judge, higher is better")):
        assert len(svg.findall("polyline")) == 2
        dots = _dots(svg)
        assert len(dots) == 10
        at = {label: dots[next(title for title in dots if title.startswith(label))] for label in (
            "diffused 0.175:", "diffused 1.4:", "endpoint 0.175:", "before start:", "reference:"
        )}  # fmt: skip
        assert at["diffused 0.175:"][0] > at["diffused 1.4:"][0] and at["diffused 0.175:"][1] < at["diffused 1.4:"][1]
        assert at["endpoint 0.175:"][0] > at["diffused 0.175:"][0], "its distance is larger"
        assert at["reference:"][0] == min(x for x, _ in dots.values())
        assert at["before start:"][1] == max(y for _, y in dots.values())
        line = svg.findall("polyline")[0].get("points", "").split()
        assert [point.split(",")[0] for point in line][0] == f"{at['diffused 0.175:'][0]:.1f}"
        assert any(y_name in str(text.text) for text in svg.findall("text"))
    title = "diffused 0.7: Fréchet distance, lower is better .0152, Strict score, higher is better .710"
    assert title in _dots(strict)
    assert {"0.175", "0.35", "0.7", "1.4", "start", "reference"} <= {str(text.text) for text in strict.findall("text")}


def test_nothing_is_drawn_outside_and_no_label_hides_another(folder: Path) -> None:
    page, _ = _render(folder)
    for svg in _charts(page):
        width, height = map(float, svg.get("viewBox", "").split()[2:])
        for x, y in _dots(svg).values():
            assert 4 <= x <= width - 4 and 4 <= y <= height - 4
        boxes = _boxes(svg)
        for name, (left, top, right, bottom) in boxes.items():
            assert left >= 0 and top >= 0 and right <= width and bottom <= height, (name, left, right)
        for one, other in combinations(boxes, 2):
            assert not _overlap(boxes[one], boxes[other]), (one, other)


def test_labels_of_points_that_crowd_never_overlap() -> None:
    """Where there is no room a label is left out; its point keeps its tooltip."""
    line = [Point(0.01 + 0.0001 * i, 0.5 + 0.001 * i, f"{0.1 * (i + 1):.1f}") for i in range(39)]
    line.append(Point(0.1, 1.0, "9.0"))
    svg = ElementTree.fromstring(draw(Chart({"a": line}, "x", "y")))
    texts = {str(text.text) for text in svg.findall("text")}
    assert 5 < len({point.label for point in line} & texts) < 40
    assert len(_dots(svg)) == 40
    for one, other in combinations(_boxes(svg).values(), 2):
        assert not _overlap(one, other)


def test_beta_is_an_axis(folder: Path) -> None:
    page, _ = _render(folder)
    for svg, name in zip(_charts(page)[2:], ("Strict score", "Reward, shapes_judge", "Fréchet distance"), strict=True):
        assert svg.get("aria-label") == f"{name} over β"
        columns = sorted({x for x, _ in _dots(svg).values()})
        steps = [b - a for a, b in zip(columns, columns[1:], strict=False)]
        assert len(columns) == 4 and max(steps) - min(steps) < 0.2, "doubled betas are evenly apart"
        levels = [line for line in svg.findall("line") if "dasharray" in line.get("style", "")]
        assert len(levels) == 2, "the start and the reference"


def test_the_table_links_to_the_runs(folder: Path) -> None:
    page, text = _render(folder)
    assert len(re.findall(r'<a href="(?:diffused|endpoint)-beta-[\d.]+/report.html">', page)) == 8
    assert "one step, before .30 [.26, .34] .40 .0340 −2.40" in text
    assert "diffused-beta-0.35 diffused 0.35 .78 [.74, .82] .88 .0210 −.42 5.2" in text
    assert not re.search(r"https?:|@import|url\(|<link|<iframe|<script", page)


def test_without_a_suite_the_reward_is_drawn_over_beta(tmp_path: Path) -> None:
    rows = _rows("diffused", DIFFUSED)
    for row in rows:
        for side in ("before", "after", "reference"):
            row[side] = {"n": 4, "hpsv2": row[side]["shapes_judge"]}
    page, text = _render(_write(tmp_path, rows, reward="hpsv2", score="hpsv2"))
    assert "No Fréchet distance was measured: only the shapes suite measures it." in text
    assert "Reward, hpsv2 in one step −2.40 → −.35 at β 0.175" in text
    assert len(_charts(page)) == 1 and len(_charts(page)[0].findall("polyline")) == 1


def test_too_few_images_for_a_distance_are_the_reason(tmp_path: Path) -> None:
    rows = _rows("diffused", DIFFUSED)
    for row in rows:
        row["after"] |= {"frechet": None, "reasons": {"frechet": "needs more than 64 images, got 10"}}
    page, text = _render(_write(tmp_path, rows))
    assert "No Fréchet distance was measured: needs more than 64 images, got 10." in text
    assert len(_charts(page)) == 2


def test_a_sweep_that_is_not_finished_says_so(tmp_path: Path) -> None:
    failed = [{"folder": "diffused-beta-0.1", "reward_at": "diffused", "beta": 0.1, "reason": "steps of <it>"}]
    _, text = _render(_write(tmp_path, _rows("diffused", {0.7: DIFFUSED[0.7]}), runs=3, failed=failed))
    assert "Unfinished sweep. 1 of 3 runs have been evaluated; --resume continues it." in text
    assert "diffused-beta-0.1: steps of <it>" in text
    page, text = _render(_write(tmp_path, [], runs=3))
    assert "No run of this sweep has been evaluated yet" in text and not _charts(page)


def test_a_second_page_is_the_same_bytes(folder: Path) -> None:
    first = write_sweep_report(folder).read_bytes()
    assert write_sweep_report(folder).read_bytes() == first


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sweep\.json does not exist"):
        write_sweep_report(tmp_path)
    (tmp_path / "sweep.json").write_text('{"name": "a"}')
    with pytest.raises(DataError, match=r"sweep\.json: no 'reward' and no 'score'"):
        write_sweep_report(tmp_path)
    _write(tmp_path, [{"folder": "a"}])
    with pytest.raises(DataError, match=r"row 0 has no 'reward_at' and no 'beta'"):
        write_sweep_report(tmp_path)


@pytest.mark.parametrize(("value", "text"), [(0.35, "0.35"), (1.0, "1"), (1e-5, "1e-05"), (0.12345678, "0.12345678")])
def test_a_beta_has_one_name(value: float, text: str) -> None:
    assert as_beta(value) == text and float(text) == value
