"""What every page about training is made of: its frame, tiles, the time spent, the recipe and the environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from crd_fast.evaluation.plots import STYLE, finite, score, share_bar
from crd_fast.evaluation.run_files import Run
from crd_fast.whole_files import write_text

PAGE = "report.html"


def write_document(path: Path, title: str, sections: Sequence[str], style: str = "") -> Path:
    """A self-contained page. style: rules of this page beside those of all pages. Returns `path`."""
    body = "\n".join(sections)
    write_text(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n",
    )
    return path


def header(eyebrow: str, headline: str, about: Sequence[str], banner: str = "") -> str:
    """headline, banner: HTML; the others: text."""
    return (
        f'<header><p class="eyebrow">{escape(eyebrow)}</p><h1>{headline}</h1>'
        f'<p class="meta">{escape(" · ".join(about))}</p>{banner}</header>'
    )


def about_run(run: Run) -> list[str]:
    """The model and the seed, where they are known."""
    about = [f"Model {run.summary['model']}"] if run.summary.get("model") else []
    return about + ([f"seed {run.summary['seed']}"] if run.summary.get("seed") is not None else [])


def unfinished_banner(run: Run) -> str:
    """A notice on the page of a run that is not finished; empty for one that is."""
    if run.finished:
        return ""
    lacks = "no evaluation after training yet" if run.summary else "no summary.json yet"
    return (
        f'<p class="banner"><b>Unfinished run.</b> There is {lacks}; what was recorded up to '
        f"{last_epoch(run)} is shown.</p>"
    )


def last_epoch(run: Run) -> str:
    return f"epoch {run.epochs[-1]['epoch']}" if run.epochs else "the start, before a first epoch"


def time_and_place(run: Run) -> tuple[str, str]:
    """` in 6.1 minutes` and ` on 2 CPU threads`; empty where they are not known."""
    minutes = finite(run.summary.get("minutes"))
    device, threads = str(run.environment.get("device") or ""), run.environment.get("threads")
    if device.startswith("cpu") and threads:
        device = f"{threads} CPU thread{'' if threads == 1 else 's'}"
    time = f" in {minutes:.1f} minutes" if minutes is not None else ""
    return time, f" on {escape(device)}" if device else ""


def on_images(n: object) -> str:
    """` on 180 held-out images`; empty where the number is not known."""
    return f' on <span class="whole">{n:,} held-out images</span>' if isinstance(n, int) else ""


def change(values: Mapping[str, object]) -> str:
    """`.52 → .87`, each side in its colour. values: by side, in their order."""
    sides = [
        f'<i class="{side if finite(value) is not None else "missing"}">{score(value)}</i>'
        for side, value in values.items()
    ]
    return "<b>" + ' <i class="arrow">→</i> '.join(sides) + "</b>"


def big(value: float | None, form: str) -> str:
    """A tile's number, formatted by `form`."""
    return f"<b>{form.format(value)}</b>" if value is not None else '<b><i class="missing">n/a</i></b>'


def tiles_section(lead: str, tiles: Sequence[tuple[str, str, str]]) -> str:
    """lead: of a wide tile, HTML. tiles: title, value and note, HTML."""
    rest = "".join(f'<div class="tile"><span>{t}</span>{value}<small>{note}</small></div>' for t, value, note in tiles)
    return f'<section id="result" class="tiles"><div class="tile lead">{lead}</div>{rest}</section>'


def missing_reason(run: Run, key: str, sides: Sequence[str]) -> str:
    """Why a metric is missing on a side that was evaluated: `before: rapidocr is not installed`."""
    reasons = [(side, (run.side(side).get("reasons") or {}).get(key)) for side in sides]
    given = {str(reason): side for side, reason in reasons if reason}
    if len(given) == 1 and all(reason for _, reason in reasons):
        return escape(next(iter(given)))
    return escape("; ".join(f"{side}: {reason}" for reason, side in given.items()))


def note_of(run: Run, key: str, sides: Sequence[str], text: str) -> str:
    """What stands below a metric: why it is missing, or `text`."""
    given = any(finite(run.side(side).get(key)) is not None for side in sides)
    return missing_reason(run, key, sides) or (text if given else "not evaluated")


def speed_tiles(run: Run) -> list[tuple[str, str, str]]:
    """Samples per second, and minutes."""
    rates = [r for r in (finite(row.get("samples_per_second")) for row in run.epochs) if r is not None]
    samples, minutes = finite(run.summary.get("samples")), finite(run.summary.get("minutes"))
    if minutes is None and run.epochs:
        elapsed = finite(run.epochs[-1].get("elapsed_seconds"))
        minutes = None if elapsed is None else elapsed / 60
    return [
        (
            "Samples per second",
            big(sorted(rates)[len(rates) // 2] if rates else None, "{:,.0f}"),
            "median epoch" + (f", {samples:,.0f} samples" if samples is not None else ""),
        ),
        ("Minutes", big(minutes, "{:.1f}"), f"{len(run.epochs)} epochs"),
    ]


def time_section(run: Run) -> str:
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


def config_section(run: Run) -> str:
    body = (
        f"<pre>{escape(run.config)}</pre>" if run.config is not None else '<p class="none">No config.yaml recorded.</p>'
    )
    title = '<section id="recipe"><h2>Recipe</h2><details><summary>Resolved config.yaml</summary>'
    return f"{title}{body}</details></section>"


def environment_footer(run: Run) -> str:
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
