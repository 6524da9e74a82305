"""The table of an evaluation: models against columns, published numbers below, reasons under it. Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from crd_fast.evaluation.plots import finite, number
from crd_fast.evaluation.plots import score as short
from crd_fast.evaluation.results import Row, reward_of, value_of
from crd_fast.evaluation.suites import Suite

TRAINED_MARK = "†"


@dataclass(frozen=True)
class Table:
    """Rows of cells as (text, interval), both empty where there is nothing. notes: lines to stand under it."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    notes: tuple[str, ...] = ()


def column_order(suite: Suite, summaries: Sequence[Row]) -> list[str]:
    """The suite's headline columns that there are, then the others by name."""
    present = {name for summary in summaries for name in summary["columns"]}
    # GenEval's column repeats one of its diagnostics, by its option
    options = [summary.get("versions", {}).get("geneval", {}).get("options", {}) for summary in summaries]
    rest = sorted(present - set(suite.headline) - {f"geneval/{given.get('score')}" for given in options})
    return [name for name in suite.headline if name in present] + rest


def title_of(suite: Suite, column: str) -> str:
    return suite.headline.get(column, column)


def cell(value: object) -> str:
    """A score as the field prints it, with as many digits as tell models apart; `n/a` where there is none."""
    x = finite(value)
    if x is None:
        return "n/a"
    if abs(x) < 0.01 and x != 0:
        return number(x)
    return short(x, 3) if abs(x) <= 1 else f"{x:.2f}"


def scores_table(suite: Suite, summaries: Sequence[Row]) -> Table:
    """Every model's columns with 95 % intervals, and what others have published for the suite."""
    names = column_order(suite, summaries)
    trained = {name for summary in summaries for name in summary["trained_on"]}
    headers = ["model"]
    for name in names:
        better = " ↓" if name in suite.lower_is_better else ""
        headers.append(title_of(suite, name) + better + (f" {TRAINED_MARK}" if reward_of(name) in trained else ""))
    rows = [(summary["label"], tuple(_scored(summary["columns"].get(name)) for name in names)) for summary in summaries]
    shown = [reference for reference in suite.references if any(name in reference.values for name in names)]
    for reference in shown:
        cells = tuple((reference.values.get(n, ""), "") for n in names)
        rows.append((f"{reference.method} ({reference.source})", cells))
    return Table(tuple(headers), tuple(rows), tuple(_notes(suite, summaries, names, trained, bool(shown))))


def _scored(column: Row | None) -> tuple[str, str]:
    value = value_of(column)
    if value is None:
        return "n/a", ""
    low, high = finite(value["low"]), finite(value["high"])
    return cell(value["mean"]), "" if low is None or high is None else f"[{cell(low)}, {cell(high)}]"


def _notes(
    suite: Suite, summaries: Sequence[Row], names: Sequence[str], trained: set[str], published: bool
) -> list[str]:
    counts = sorted({summary["n"] for summary in summaries})
    prompts = summaries[0]["prompts"]
    official = f" of the benchmark's {prompts['official']}" if prompts["official"] else ""
    notes = [
        f"{' to '.join(map(str, counts))} images of {prompts['n']}{official} prompts. Brackets: 95% bootstrap "
        "intervals that resample whole prompts. Where prompts have tasks, a number is the mean of the tasks' means."
    ]
    if any(reward_of(name) in trained for name in names):
        notes.append(f"{TRAINED_MARK} Trained on this reward: the number says how well it was optimised.")
    if published:
        notes.append("Rows with a source are published numbers of those papers, not made here.")
    for summary in summaries:
        for name in names:
            reason = (summary["columns"].get(name) or {}).get("reason")
            if reason:
                notes.append(f"n/a, {summary['label']}, {title_of(suite, name)}: {reason}")
    return notes


def tasks_table(suite: Suite, summaries: Sequence[Row]) -> Table | None:
    """The first headline column that has tasks, task by task; None where there is none."""
    for name in column_order(suite, summaries):
        tasks: dict[str, None] = {}
        for summary in summaries:
            tasks |= dict.fromkeys((summary["columns"].get(name) or {}).get("tasks") or {})
        if len(tasks) > 1:
            rows = tuple(
                (summary["label"], tuple(_task(summary["columns"].get(name), t) for t in tasks))
                for summary in summaries
            )
            return Table((title_of(suite, name), *tasks), rows)
    return None


def _task(column: Row | None, task: str) -> tuple[str, str]:
    entry: Mapping[str, object] = ((column or {}).get("tasks") or {}).get(task) or {}
    if not entry:
        return "n/a", ""
    return cell(entry["mean"]), f"[{cell(entry['low'])}, {cell(entry['high'])}]"


def as_markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in cells) + " |"

    rows = [line(table.headers), "|" + "---|" * len(table.headers)]
    rows += [line([label, *(" ".join(filter(None, pair)) for pair in cells)]) for label, cells in table.rows]
    return "\n".join([*rows, "", *(f"{' '.join(note.split())}\n" for note in table.notes)])


def as_html(table: Table) -> str:
    head = "".join(f"<th>{escape(header)}</th>" for header in table.headers)
    body = []
    for label, cells in table.rows:
        shown = "".join(f"<td>{escape(text)} <small>{escape(interval)}</small></td>" for text, interval in cells)
        body.append(f"<tr><td>{escape(label)}</td>{shown}</tr>")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>{notes}'
    )
