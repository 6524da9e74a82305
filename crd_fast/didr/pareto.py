"""`report.html` of a sweep over beta: score against Fréchet distance, both over beta, and the runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from crd_fast.didr.pareto_plot import Chart, Point, chart_legend, draw, finite_point
from crd_fast.didr.report import STYLE
from crd_fast.didr.report_files import REFERENCE, SWEEP
from crd_fast.errors import DataError
from crd_fast.evaluation.plots import finite, number, score
from crd_fast.evaluation.report_page import PAGE, change, header, write_document
from crd_fast.evaluation.run_files import Row, read_object

BEFORE, AFTER = "before", "after"
MARKS = {BEFORE: "one step, before", REFERENCE: "reference, many steps"}
LABELS = {BEFORE: "start", REFERENCE: "reference"}  # in a chart
TITLES = {
    "geneval_strict": "Strict score",
    "geneval_soft": "Soft score",
    "clean": "Cleanliness",
    "ocr": "OCR score",
    "frechet": "Fréchet distance",
}
_STYLE = (
    STYLE
    + """
.wide-charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 12px; }
a { color: var(--after); }
th { white-space: normal; }
"""
)


@dataclass(frozen=True)
class Sweep:
    """sweep.json, see `crd_fast.didr.sweep`. rows: of the runs that have been evaluated, by reward_at and beta."""

    name: str
    reward: str
    score: str
    runs: int
    rows: tuple[Row, ...]
    failed: tuple[Row, ...]

    def kinds(self) -> list[str]:
        """Values of reward_at, in the order of the rows."""
        return list(dict.fromkeys(str(row["reward_at"]) for row in self.rows))

    def of(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["reward_at"] == kind]

    def shared(self, side: str) -> Row:
        """The start's or the reference's scores, which all runs of a recipe share; empty without a row."""
        return next((row[side] for row in self.rows if row.get(side)), {})

    def title(self, key: str) -> str:
        return f"Reward, {key}" if key == self.reward else TITLES[key]

    def told(self) -> list[str]:
        """Keys of what some run was scored by, the sweep's own score first."""
        keys = dict.fromkeys((self.score, *TITLES, self.reward))
        return [key for key in keys if any(finite(row[AFTER].get(key)) is not None for row in self.rows)]


def read_sweep(directory: Path) -> Sweep:
    """Raises DataError where there is no sweep.json, or one that is not what it should be."""
    path = Path(directory) / SWEEP
    if not path.is_file():
        raise DataError(f"{path} does not exist: give the directory of a sweep over beta")
    found = read_object(path)
    missing = [key for key in ("name", "reward", "score", "runs", "rows", "failed") if key not in found]
    if missing:
        raise DataError(f"{path}: no {' and no '.join(map(repr, missing))}: repeat the sweep with --resume")
    rows = list(found["rows"])
    for number_, row in enumerate(rows):
        lacking = [key for key in ("folder", "reward_at", "beta", "before", "after", "reference") if key not in row]
        if lacking:
            raise DataError(f"{path}: row {number_} has no {' and no '.join(map(repr, lacking))}")
    return Sweep(
        name=str(found["name"]),
        reward=str(found["reward"]),
        score=str(found["score"]),
        runs=int(found["runs"]),
        rows=tuple(rows),
        failed=tuple(found["failed"]),
    )


def write_sweep_report(directory: Path) -> Path:
    """Write `report.html` into the directory of a sweep, finished or not, from its sweep.json alone.

    Returns the path of the page. Raises DataError as `read_sweep` does.
    """
    directory = Path(directory)
    sweep = read_sweep(directory)
    sections = [
        header(f"crd-fast sweep over beta · {sweep.name}", _headline(sweep), _about(sweep), _banner(sweep)),
        _trade_off(sweep),
        _over_beta(sweep),
        _table(sweep),
    ]
    return write_document(directory / PAGE, f"{sweep.name} · crd-fast sweep", sections, _STYLE)


def _headline(sweep: Sweep) -> str:
    """The run with the best score, and what it cost in Fréchet distance."""
    scored = [row for row in sweep.rows if finite(row[AFTER].get(sweep.score)) is not None]
    if not scored:
        return "No run of this sweep has been evaluated yet"
    best = max(scored, key=lambda row: float(row[AFTER][sweep.score]))
    values = {side: best[side].get(sweep.score) for side in (BEFORE, AFTER)}
    at = f" at β {as_beta(best['beta'])}" + (f", {escape(str(best['reward_at']))}" if len(sweep.kinds()) > 1 else "")
    far = finite(best[AFTER].get("frechet"))
    distance = f", Fréchet distance {number(far)}" if far is not None else ""
    return f"{escape(sweep.title(sweep.score))} in one step {change(values)}{at}{distance}"


def _about(sweep: Sweep) -> list[str]:
    seeds = sorted({str(row.get("seed")) for row in sweep.rows})
    return [f"{len(sweep.rows)} of {sweep.runs} runs", f"reward {sweep.reward}"] + [f"seed {', '.join(seeds)}"] * bool(
        seeds
    )


def _banner(sweep: Sweep) -> str:
    if len(sweep.rows) >= sweep.runs:
        return ""
    reasons = "".join(f"<br>{escape(str(row['folder']))}: {escape(str(row['reason']))}" for row in sweep.failed)
    return (
        f'<p class="banner"><b>Unfinished sweep.</b> {len(sweep.rows)} of {sweep.runs} runs have been evaluated; '
        f"--resume continues it.{reasons}</p>"
    )


def _interval(side: Row, key: str) -> object:
    return side.get(f"{key}_interval")


def _points(rows: Sequence[Row], x_key: str | None, y_key: str) -> list[Point]:
    """Of the trained generators, by beta. x_key: a score, or None for beta itself."""
    found = []
    for row in sorted(rows, key=lambda row: float(row["beta"])):
        after, beta = row[AFTER], as_beta(row["beta"])
        x, label = (row["beta"], "") if x_key is None else (after.get(x_key), beta)
        found.append(finite_point(x, after.get(y_key), label, _interval(after, y_key)))
    return [point for point in found if point is not None]


def _trade_off(sweep: Sweep) -> str:
    """The sweep's score, and the reward where that is another, against Fréchet distance."""
    title = '<section id="pareto"><h2>What the reward costs</h2>'
    if not sweep.rows:
        return title + '<p class="none">No run recorded yet.</p></section>'
    keys = [key for key in dict.fromkeys((sweep.score, sweep.reward)) if key in sweep.told()]
    if "frechet" not in sweep.told():
        reasons = {str((row[AFTER].get("reasons") or {}).get("frechet") or "") for row in sweep.rows} - {""}
        why = escape("; ".join(sorted(reasons)) or "only the shapes suite measures it")
        return f'{title}<p class="none">No Fréchet distance was measured: {why}.</p></section>'
    cards = []
    for key in keys:
        lines = {kind: _points(sweep.of(kind), "frechet", key) for kind in sweep.kinds()}
        marks = {}
        for side in MARKS:
            found = sweep.shared(side)
            point = finite_point(found.get("frechet"), found.get(key), LABELS[side], _interval(found, key))
            if point is not None:
                marks[side] = point
        chart = Chart(lines, "Fréchet distance, lower is better", f"{sweep.title(key)}, higher is better", marks)
        cards.append(_card(f"{sweep.title(key)} against Fréchet distance", sweep.kinds(), marks, draw(chart)))
    return (
        f'{title}<p class="note">Each point is a trained one-step generator, labelled by its β; a line connects the '
        "βs of one way to use the reward. Up and to the left is better. Bars are 95% bootstrap intervals that "
        f'resample whole prompts.</p><div class="wide-charts">{"".join(cards)}</div></section>'
    )


def _card(title: str, names: Sequence[str], sides: Iterable[str], chart: str) -> str:
    keys = chart_legend([f"reward at {name}" for name in names], {side: MARKS[side] for side in sides})
    return f'<figure class="card"><header>{escape(title)}</header><div class="sub">{keys}</div>{chart}</figure>'


def _over_beta(sweep: Sweep) -> str:
    cards = []
    for key in [key for key in dict.fromkeys((sweep.score, sweep.reward, "frechet")) if key in sweep.told()]:
        lines = {kind: _points(sweep.of(kind), None, key) for kind in sweep.kinds()}
        found = {side: finite(sweep.shared(side).get(key)) for side in MARKS}
        levels = {side: value for side, value in found.items() if value is not None}
        chart = Chart(lines, "β", sweep.title(key), levels=levels, log_x=True, width=420, height=260)
        cards.append(_card(f"{sweep.title(key)} over β", sweep.kinds(), [*levels], draw(chart)))
    if not cards:
        return ""
    return (
        '<section id="beta"><h2>Over beta</h2><p class="note">β is the temperature: the smaller, the more the reward '
        f'counts against the reference.</p><div class="charts">{"".join(cards)}</div></section>'
    )


def _table(sweep: Sweep) -> str:
    title = '<section id="runs"><h2>Runs</h2>'
    if not sweep.rows:
        return title + '<p class="none">No run recorded yet.</p></section>'
    keys = sweep.told()
    head = "".join(f"<th>{escape(sweep.title(key))}{' ↓' if key == 'frechet' else ''}</th>" for key in keys)
    rows = [
        _row(f'<i class="{side}">{MARKS[side]}</i>', "", "", sweep.shared(side), keys, "")
        for side in MARKS
        if sweep.shared(side)
    ]
    for row in sweep.rows:
        folder = escape(str(row["folder"]), quote=True)
        link = f'<a href="{folder}/{PAGE}">{folder}</a>'
        minutes = finite(row.get("minutes"))
        spent = "n/a" if minutes is None else f"{minutes:.1f}"
        rows.append(_row(link, escape(str(row["reward_at"])), as_beta(row["beta"]), row[AFTER], keys, spent))
    return (
        f'{title}<div class="scroll"><table><thead><tr><th>Run</th><th>Reward at</th><th>β</th>{head}'
        f"<th>Minutes</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _row(name: str, kind: str, beta: str, side: Row, keys: Sequence[str], minutes: str) -> str:
    values = [number(side.get(key)) if key == "frechet" else _with_interval(side, key) for key in keys]
    cells = [name, kind, beta, *values, minutes]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _with_interval(side: Row, key: str) -> str:
    ends = _interval(side, key)
    bounds = [finite(end) for end in ends] if isinstance(ends, list) else []
    told = f" <small>[{', '.join(map(score, bounds))}]</small>" if bounds and None not in bounds else ""
    return score(side.get(key)) + told


def as_beta(value: float) -> str:
    """A beta as folders and pages write it: the shortest text that reads back as the same number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
