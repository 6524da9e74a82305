"""Reward hacking made visible: the trained reward against what was not trained on, over a run's checkpoints."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crd_fast.evaluation.plots import finite
from crd_fast.evaluation.results import Row, reward_of, value_of
from crd_fast.evaluation.suites import Suite
from crd_fast.evaluation.tables import cell, column_order, title_of
from crd_fast.whole_files import write_whole

_TRAINED, _HELD_OUT, _LOGGED = "#0f6cb5", "#cf5a00", "#9fb8cc"


def sides(suite: Suite, summaries: Sequence[Row]) -> tuple[list[str], list[str]]:
    """(columns of trained rewards, held-out columns), those of them that have a number for every model."""
    trained = {name for summary in summaries for name in summary["trained_on"]}
    whole = [
        name
        for name in column_order(suite, summaries)
        if all(value_of(summary["columns"].get(name)) is not None for summary in summaries)
    ]
    return (
        [name for name in whole if reward_of(name) in trained],
        [name for name in whole if reward_of(name) not in trained],
    )


def write_plot(path: Path, suite: Suite, summaries: Sequence[Row], run: Path | None) -> bool:
    """`path` as a PNG: first the trained reward over epochs, then every held-out column against it.

    False where there is nothing to draw: fewer than two states with a known epoch, or no column on one of the sides.
    """
    states = sorted((s for s in summaries if s["epoch"] is not None), key=lambda s: s["epoch"])
    trained, held_out = sides(suite, states)
    if len(states) < 2 or not trained or not held_out:
        return False
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    across = 2 if len(held_out) in (1, 3) else 3
    rows = -(-(1 + len(held_out)) // across)
    figure = Figure(figsize=(3.6 * across, 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, across, squeeze=False).flatten()
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e3e6e8", linewidth=0.6)
        panel.tick_params(labelsize=8)
    _over_epochs(panels[0], suite, states, trained, run)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel, name in zip(panels[1:], held_out, strict=False):
        _against(panel, suite, states, trained[0], name)
    for panel in panels[1 + len(held_out) :]:
        panel.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    write_whole(path, buffer.getvalue())
    return True


def _over_epochs(panel: Any, suite: Suite, states: Sequence[Row], trained: Sequence[str], run: Path | None) -> None:
    for reward, points in _logged(run).items():
        panel.plot(*zip(*points, strict=True), color=_LOGGED, linewidth=1, label=f"{reward}, as trained")
    for index, name in enumerate(trained):
        x, y, errors = _points(states, name)
        style = ("-", "--", ":", "-.")[index % 4]
        panel.errorbar(
            x, y, yerr=errors, color=_TRAINED, linestyle=style, marker="o", markersize=3, label=title_of(suite, name)
        )
    panel.set_title("Trained reward", fontsize=9, loc="left", fontweight="bold")
    panel.set_xlabel("epoch", fontsize=8)
    panel.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, handlelength=3.5)


def _against(panel: Any, suite: Suite, states: Sequence[Row], trained: str, name: str) -> None:
    _, x, _ = _points(states, trained)
    _, y, errors = _points(states, name)
    panel.errorbar(x, y, yerr=errors, color=_HELD_OUT, linewidth=1.2, marker="o", markersize=3.5)
    for state, at_x, at_y in zip(states, x, y, strict=True):
        panel.annotate(str(state["epoch"]), (at_x, at_y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    better = "lower" if name in suite.lower_is_better else "higher"
    panel.set_title(f"{title_of(suite, name)}, {better} is better", fontsize=9, loc="left", fontweight="bold")
    panel.set_xlabel(f"{title_of(suite, trained)}, trained; labels are epochs", fontsize=8)


def _points(states: Sequence[Row], name: str) -> tuple[list[int], list[float], list[list[float]] | None]:
    """Epochs, means, and the distances to the ends of their intervals where they have any."""
    values = [value_of(state["columns"][name]) or {} for state in states]
    means = [float(value["mean"]) for value in values]
    if any(finite(value["low"]) is None for value in values):
        return [state["epoch"] for state in states], means, None
    low = [value["mean"] - value["low"] for value in values]
    high = [value["high"] - value["mean"] for value in values]
    return [state["epoch"] for state in states], means, [low, high]


def _logged(run: Path | None) -> dict[str, list[tuple[int, float]]]:
    """Rewards of the run's training samples over epochs; a torn last line is left out."""
    file = None if run is None else run / "metrics.jsonl"
    points: dict[str, list[tuple[int, float]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file is not None and file.is_file() else []:
        try:
            row = json.loads(line)
            for name, value in row["reward"].items():
                points.setdefault(str(name), []).append((int(row["epoch"]), float(value)))
        except (ValueError, KeyError, TypeError, AttributeError):
            break
    return points


def changes(suite: Suite, summaries: Sequence[Row]) -> list[str]:
    """What became of every column from the first state to the last: `Fréchet .0032 → .0038, worse`."""
    states = sorted((s for s in summaries if s["epoch"] is not None), key=lambda s: s["epoch"])
    if len(states) < 2:
        return []
    trained, held_out = sides(suite, states)
    lines = []
    for name in [*trained, *held_out]:
        before, after = ((value_of(states[i]["columns"][name]) or {})["mean"] for i in (0, -1))
        gain = before - after if name in suite.lower_is_better else after - before
        verdict = "better" if gain > 0 else "worse" if gain < 0 else "equal"
        side = "trained" if name in trained else "held out"
        lines.append(f"{title_of(suite, name)} ({side}): {cell(before)} → {cell(after)}, {verdict}")
    return lines
