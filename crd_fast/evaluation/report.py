"""`report.html` of a run directory: one self-contained page with the result, images, tables and curves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path

from crd_fast.evaluation.pictures import data_uri
from crd_fast.evaluation.plots import (
    STYLE,
    finite,
    interval_bars,
    number,
    score,
    share_bar,
)
from crd_fast.evaluation.report_curves import training_curves
from crd_fast.evaluation.run_files import Row, Run, read_run

PAIRS_PER_TASK = 6
PAIRS_IN_TOTAL = 48  # with pictures.EMBED_BYTES this keeps a page under 3 MB
TASK_ORDER = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TASK_NAMES = {"color_attr": "Colour attribution", "colors": "Colours", "text": "Text on a sign"}
SIDES = ("before", "after")
KINDS = ("strict", "soft")
OCR_TASK = "text"  # scored by reading, not by the rules, and so outside of the GenEval mean


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory from the files the trainer left there, finished or not.

    Reads config.yaml, metrics.jsonl, summary.json, environment.json, samples/metadata.jsonl and the images
    beside it; each may be missing. The page is complete in itself and depends on these files only, so a
    second call writes the same bytes. It is written aside and renamed: a reader never sees half a page.

    Returns:
        Path of the page.

    Raises:
        DataError: no such directory, or a file that is not what it should be; names the file and the line.
    """
    run_dir = Path(run_dir)
    page = _page(read_run(run_dir))
    target = run_dir / "report.html"
    aside = run_dir / "report.html.tmp"
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, target)
    return target


def _page(run: Run) -> str:
    body = "\n".join(
        [
            _header(run),
            _tiles(run),
            _images(run),
            _tasks(run),
            training_curves(run),
            _time(run),
            _config(run),
            _environment(run),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)} · crd-fast run</title>\n<style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _change(before: object, after: object) -> str:
    """`.52 → .87`, each side in its colour."""
    sides = [
        f'<i class="{side if finite(value) is not None else "missing"}">{score(value)}</i>'
        for side, value in zip(SIDES, (before, after), strict=True)
    ]
    return "<b>" + ' <i class="arrow">→</i> '.join(sides) + "</b>"


def _header(run: Run) -> str:
    about = [f"Model {run.summary['model']}"] if run.summary.get("model") else []
    about += [f"seed {run.summary['seed']}"] if run.summary.get("seed") is not None else []
    banner = ""
    if not run.finished:
        lacks = "no evaluation after training yet" if run.summary else "no summary.json yet"
        banner = (
            f'<p class="banner"><b>Unfinished run.</b> There is {lacks}; what was recorded up to '
            f"{_last_epoch(run)} is shown.</p>"
        )
    return (
        f'<header><p class="eyebrow">crd-fast run · {escape(run.name)}</p><h1>{_headline(run)}</h1>'
        f'<p class="meta">{escape(" · ".join(about))}</p>{banner}</header>'
    )


def _headline(run: Run) -> str:
    """The result in one sentence."""
    minutes = finite(run.summary.get("minutes"))
    device, threads = str(run.environment.get("device") or ""), run.environment.get("threads")
    if device.startswith("cpu") and threads:
        device = f"{threads} CPU thread{'' if threads == 1 else 's'}"
    time = f" in {minutes:.1f} minutes" if minutes is not None else ""
    where = f" on {escape(device)}" if device else ""
    if not run.finished:
        return f"Unfinished{_reward_so_far(run)} after {_last_epoch(run)}{where}"
    after = run.side("after")
    for key, label, n in (
        ("geneval_strict", "Strict score", _macro(after, "strict")["n"]),
        ("ocr", "OCR score", _entry(after, OCR_TASK, "soft").get("n")),
        ("geneval_soft", "Soft score", _macro(after, "soft")["n"]),
    ):
        values = [run.side(side).get(key) for side in SIDES]
        if None not in map(finite, values):
            images = f' on <span class="whole">{n:,} held-out images</span>' if isinstance(n, int) else ""
            return f"{label} {_change(*values)}{images}{time}{where}"
    return f"Trained{time}{where}; no score was evaluated before and after"


def _reward_so_far(run: Run) -> str:
    """`: geneval reward .634 → .881`, the first reward in the first and last epoch; empty without rewards."""
    for name in run.epochs[0].get("reward") or {} if run.epochs else {}:
        first, last = ((run.epochs[i].get("reward") or {}).get(name) for i in (0, -1))
        return f": {escape(name)} reward {number(first)} → {number(last)}"
    return ""


def _last_epoch(run: Run) -> str:
    return f"epoch {run.epochs[-1]['epoch']}" if run.epochs else "the start, before a first epoch"


def _tiles(run: Run) -> str:
    before, after = run.side("before"), run.side("after")
    start, end = finite(before.get("geneval_strict")), finite(after.get("geneval_strict"))
    intervals = [_macro(side, "strict") for side in (before, after)]

    def note(key: str, text: str) -> str:
        given = any(finite(side.get(key)) is not None for side in (before, after))
        return _reason(run, key) or (text if given else "not evaluated")

    lead = (
        f'<div class="tile lead"><span>Strict score, mean of tasks</span>{_change(start, end)}'
        f"{interval_bars(*intervals)}"
        f"<small>{note('geneval_strict', '0 to 1; bars are 95% intervals')}</small></div>"
    )
    reduction = None if start is None or end is None or start >= 1 else 1 - (1 - end) / (1 - start)
    error = f"{score(1 - start)} → {score(1 - end)}" if start is not None and end is not None else ""
    frechet = [finite(side.get("frechet")) for side in (before, after)]
    ratio = frechet[1] / frechet[0] if frechet[0] and frechet[1] is not None else None
    rates = [r for r in (finite(row.get("samples_per_second")) for row in run.epochs) if r is not None]
    samples, minutes = finite(run.summary.get("samples")), finite(run.summary.get("minutes"))
    if minutes is None and run.epochs:
        elapsed = finite(run.epochs[-1].get("elapsed_seconds"))
        minutes = None if elapsed is None else elapsed / 60

    def compared(label: str, key: str, text: str) -> tuple[str, str, str]:
        return label, _change(before.get(key), after.get(key)), note(key, text)

    tiles = [
        ("Strict error reduction", _big(reduction, "{:.0%}"), error or note("geneval_strict", "")),
        *_guided_tile(run),
        compared("Soft score", "geneval_soft", "partial credit, mean of tasks"),
        compared("OCR score", "ocr", "quoted text, read back"),
        (
            "Fréchet ratio",
            _big(ratio, "{:.2f}×"),
            note("frechet", f"{number(frechet[0])} → {number(frechet[1])}, lower is better"),
        ),
        compared("Cleanliness", "clean", "image explained by valid objects"),
        (
            "Samples per second",
            _big(sorted(rates)[len(rates) // 2] if rates else None, "{:,.0f}"),
            "median epoch" + (f", {samples:,.0f} samples" if samples is not None else ""),
        ),
        ("Minutes", _big(minutes, "{:.1f}"), f"{len(run.epochs)} epochs"),
    ]
    rest = "".join(f'<div class="tile"><span>{t}</span>{value}<small>{note}</small></div>' for t, value, note in tiles)
    return f'<section id="result" class="tiles">{lead}{rest}</section>'


def _guided_tile(run: Run) -> list[tuple[str, str, str]]:
    """What guidance alone makes of the base: the yardstick that training is measured against."""
    guided = finite(run.side("guided").get("geneval_strict"))
    return [] if guided is None else [("Base with guidance", _big(guided, "{:.2f}"), "strict score, untrained")]


def _big(value: float | None, form: str) -> str:
    return f"<b>{form.format(value)}</b>" if value is not None else '<b><i class="missing">n/a</i></b>'


def _reason(run: Run, key: str) -> str:
    """Why a metric is missing on a side that was evaluated: `before: rapidocr is not installed`."""
    reasons = [(side, (run.side(side).get("reasons") or {}).get(key)) for side in SIDES]
    given = {str(reason): side for side, reason in reasons if reason}
    if len(given) == 1 and all(reason for _, reason in reasons):
        return escape(next(iter(given)))
    return escape("; ".join(f"{side}: {reason}" for reason, side in given.items()))


def _macro(side: Row, kind: str) -> Row:
    """The GenEval mean as a table entry; `n` counts the images of the tasks in it, not those read by OCR."""
    bounds = side.get(f"geneval_{kind}_interval") or [None, None]
    counts = [_entry(side, task, kind).get("n") for task in side.get("tasks") or {} if task != OCR_TASK]
    n = sum(count for count in counts if isinstance(count, int)) or side.get("n")
    return {"mean": side.get(f"geneval_{kind}"), "low": bounds[0], "high": bounds[1], "n": n}


def _task_key(task: str) -> tuple[int, str]:
    """GenEval's order, then other tasks by name, then reading."""
    place = TASK_ORDER.index(task) if task in TASK_ORDER else len(TASK_ORDER)
    return (place + (task == OCR_TASK), task)


def _task_name(task: str) -> str:
    return escape(TASK_NAMES.get(task, task.replace("_", " ").capitalize()))


def _entry(side: Row, task: str, kind: str) -> Row:
    return ((side.get("tasks") or {}).get(task) or {}).get(kind) or {}


def _images(run: Run) -> str:
    title = '<section id="images"><h2>Before and after</h2>'
    if not run.samples:
        return title + '<p class="none">No samples recorded.</p></section>'
    groups: dict[str, list[Row]] = {}
    for row in run.samples:
        groups.setdefault(str(row.get("tag") or "samples"), []).append(row)
    shown = max(1, min(PAIRS_PER_TASK, PAIRS_IN_TOTAL // len(groups)))
    parts = [
        title,
        '<p class="note">Each pair is one prompt and one seed: <b class="before">before</b> training on the '
        f'left, <b class="after">after</b> on the right. The first {shown} recorded per task, not picked. '
        "✓ satisfies its prompt, ✗ does not; before → after.</p>",
    ]
    for task in sorted(groups, key=_task_key)[:PAIRS_IN_TOTAL]:
        means = [_entry(run.side(side), task, "strict").get("mean") for side in SIDES]
        change = _change(*means) if None not in map(finite, means) else ""
        parts.append(f'<h3>{_task_name(task)} <span class="num">{change}</span></h3><div class="pairs">')
        parts += [_pair(run, row) for row in groups[task][:shown]]
        parts.append("</div>")
    return "".join(parts) + "</section>"


def _pair(run: Run, row: Row) -> str:
    """Both images of one prompt and seed; the marks stand in the caption, where they hide nothing."""
    prompt = escape(str(row["prompt"]))
    shots, marks = [], []
    for side in SIDES:
        path = run.directory / "samples" / side / row["file_name"]
        image = f'<img src="{data_uri(path)}" alt="{side}: {prompt}">' if path.is_file() else "n/a"
        shots.append(f'<div class="shot">{image}</div>')
        value = finite(row.get(side))
        if value is not None:
            kind, sign = ("pass", "✓") if value >= 1 - 1e-6 else ("fail", "✗")
            marks.append(f'<i class="mark {kind}" title="{side}: score {score(value)}">{sign}</i>')
    seed = f' title="seed {escape(str(row["seed"]))}"' if row.get("seed") is not None else ""
    return (
        f'<figure class="pair"{seed}><div class="duo">{"".join(shots)}</div>'
        f"<figcaption>{' → '.join(marks)} {prompt}</figcaption></figure>"
    )


def _tasks(run: Run) -> str:
    title = '<section id="tasks"><h2>Scores by task</h2>'
    tasks = sorted({task for side in SIDES for task in run.side(side).get("tasks") or {}}, key=_task_key)
    if not tasks:
        return title + '<p class="none">No task was evaluated.</p></section>'
    rows = [
        _task_row(_task_name(task), "", *([_entry(run.side(side), task, kind) for side in SIDES] for kind in KINDS))
        for task in tasks
    ]
    if tasks != [OCR_TASK]:
        macro = [[_macro(run.side(side), kind) for side in SIDES] for kind in KINDS]
        rows.insert(len([t for t in tasks if t != OCR_TASK]), _task_row("Mean of tasks", ' class="macro"', *macro))
    return (
        f'{title}<p class="note">Held-out prompts, same seeds on both sides. Brackets and bars are 95% '
        "bootstrap intervals that resample whole prompts. Strict needs the exact count, colour and position; "
        "soft gives partial credit.</p>"
        f'<div class="scroll"><table><thead><tr><th>Task</th><th>n</th>{_head("Strict")}'
        f'<th>Change</th><th class="wide-cell">Strict, 0 to 1</th>{_head("Soft")}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _head(kind: str) -> str:
    return "".join(f'<th>{kind} <i class="{side}">{side}</i></th>' for side in SIDES)


def _task_row(name: str, attributes: str, strict: list[Row], soft: list[Row]) -> str:
    before, after = (finite(entry.get("mean")) for entry in strict)
    change = "n/a" if before is None or after is None else f"{'+' if after >= before else ''}{score(after - before)}"
    n = next((entry["n"] for entry in reversed(strict) if isinstance(entry.get("n"), int)), None)
    cells = [name, f"{n:,}" if n is not None else "n/a", *map(_with_interval, strict), change]
    cells += [interval_bars(*strict), *(score(entry.get("mean")) for entry in soft)]
    return f"<tr{attributes}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _with_interval(entry: Mapping[str, object]) -> str:
    low, high = finite(entry.get("low")), finite(entry.get("high"))
    bounds = f" <small>[{score(low)}, {score(high)}]</small>" if low is not None and high is not None else ""
    return score(entry.get("mean")) + bounds


def _time(run: Run) -> str:
    totals: dict[str, float] = {}
    for row in run.epochs:
        for phase, seconds in (row.get("seconds") or {}).items():
            totals[phase] = totals.get(phase, 0.0) + (finite(seconds) or 0.0)
    title = '<section id="time"><h2>Where the time went</h2>'
    hidden = [h for h in (finite(row.get("reward_hidden_share")) for row in run.epochs) if h is not None]
    beside = (
        f" Of the scoring, {sorted(hidden)[len(hidden) // 2]:.0%} went on beside other work (median epoch)."
        if hidden
        else ""
    )
    return f'{title}<p class="note">Seconds per phase, all epochs.{beside}</p>{share_bar(totals)}</section>'


def _config(run: Run) -> str:
    body = (
        f"<pre>{escape(run.config)}</pre>" if run.config is not None else '<p class="none">No config.yaml recorded.</p>'
    )
    title = '<section id="recipe"><h2>Recipe</h2><details><summary>Resolved config.yaml</summary>'
    return f"{title}{body}</details></section>"


def _environment(run: Run) -> str:
    rows: list[tuple[str, object]] = [
        (key.capitalize(), run.environment[key])
        for key in ("command", "commit", "device", "threads")
        if run.environment.get(key) is not None
    ]
    versions = run.environment.get("versions") or {}
    if versions:
        rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))))
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows)
    body = f"<dl>{items}</dl>" if items else "No environment.json recorded."
    return f'<footer id="environment">{body}</footer>'
