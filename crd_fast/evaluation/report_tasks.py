"""A report's table of tasks: the scores of several sides of a run, such as before and after, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from crd_fast.evaluation.plots import finite, interval_rows, score
from crd_fast.evaluation.run_files import Row, Run

TASK_ORDER = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TASK_NAMES = {"color_attr": "Colour attribution", "colors": "Colours", "text": "Text on a sign"}
KINDS = ("strict", "soft")
OCR_TASK = "text"  # scored by reading, not by the rules, and so outside of the GenEval mean


def entry(side: Row, task: str, kind: str) -> Row:
    """A task's mean, low, high and n on a side; empty where it was not evaluated."""
    return ((side.get("tasks") or {}).get(task) or {}).get(kind) or {}


def macro(side: Row, kind: str) -> Row:
    """The GenEval mean as a table entry; `n` counts the images of the tasks in it, not those read by OCR."""
    bounds = side.get(f"geneval_{kind}_interval") or [None, None]
    counts = [entry(side, task, kind).get("n") for task in side.get("tasks") or {} if task != OCR_TASK]
    n = sum(count for count in counts if isinstance(count, int)) or side.get("n")
    return {"mean": side.get(f"geneval_{kind}"), "low": bounds[0], "high": bounds[1], "n": n}


def task_key(task: str) -> tuple[int, str]:
    """GenEval's order, then other tasks by name, then reading."""
    place = TASK_ORDER.index(task) if task in TASK_ORDER else len(TASK_ORDER)
    return (place + (task == OCR_TASK), task)


def task_name(task: str) -> str:
    return escape(TASK_NAMES.get(task, task.replace("_", " ").capitalize()))


def tasks_section(run: Run, sides: Sequence[str]) -> str:
    """sides: names and CSS colours, the first two of which are compared."""
    title = '<section id="tasks"><h2>Scores by task</h2>'
    tasks = sorted({task for side in sides for task in run.side(side).get("tasks") or {}}, key=task_key)
    if not tasks:
        return title + '<p class="none">No task was evaluated.</p></section>'
    rows = [
        _row(task_name(task), "", *({s: entry(run.side(s), task, kind) for s in sides} for kind in KINDS))
        for task in tasks
    ]
    if tasks != [OCR_TASK]:
        means = [{side: macro(run.side(side), kind) for side in sides} for kind in KINDS]
        rows.insert(len([t for t in tasks if t != OCR_TASK]), _row("Mean of tasks", ' class="macro"', *means))
    same = "both" if len(sides) == 2 else "all"
    return (
        f'{title}<p class="note">Held-out prompts, same seeds on {same} sides. Brackets and bars are 95% '
        "bootstrap intervals that resample whole prompts. Strict needs the exact count, colour and position; "
        "soft gives partial credit.</p>"
        f'<div class="scroll"><table><thead><tr><th>Task</th><th>n</th>{_head("Strict", sides)}'
        f'<th>Change</th><th class="wide-cell">Strict, 0 to 1</th>{_head("Soft", sides)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _head(kind: str, sides: Sequence[str]) -> str:
    return "".join(f'<th>{kind} <i class="{side}">{side}</i></th>' for side in sides)


def _row(name: str, attributes: str, strict: Mapping[str, Row], soft: Mapping[str, Row]) -> str:
    before, after = (finite(found.get("mean")) for found in list(strict.values())[:2])
    change = "n/a" if before is None or after is None else f"{'+' if after >= before else ''}{score(after - before)}"
    n = next((found["n"] for found in reversed([*strict.values()]) if isinstance(found.get("n"), int)), None)
    cells = [name, f"{n:,}" if n is not None else "n/a", *map(_with_interval, strict.values()), change]
    cells += [interval_rows(strict), *(score(found.get("mean")) for found in soft.values())]
    return f"<tr{attributes}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _with_interval(found: Mapping[str, object]) -> str:
    low, high = finite(found.get("low")), finite(found.get("high"))
    bounds = f" <small>[{score(low)}, {score(high)}]</small>" if low is not None and high is not None else ""
    return score(found.get("mean")) + bounds
