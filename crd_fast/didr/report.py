"""`report.html` of a DIDR run: one self-contained page with the result, images of three sides, tables and curves."""

from __future__ import annotations

from html import escape
from pathlib import Path

from crd_fast.didr.report_curves import training_curves
from crd_fast.didr.report_files import ONE_STEP, REFERENCE, SIDES, DIDRRun, read_didr_run
from crd_fast.evaluation.plots import finite, interval_rows, number, score
from crd_fast.evaluation.report_images import Gallery, images_section
from crd_fast.evaluation.report_page import (
    PAGE,
    about_run,
    change,
    config_section,
    environment_footer,
    header,
    last_epoch,
    note_of,
    on_images,
    speed_tiles,
    tiles_section,
    time_and_place,
    time_section,
    unfinished_banner,
    write_document,
)
from crd_fast.evaluation.report_tasks import OCR_TASK, entry, macro, tasks_section

TRIPLES_IN_TOTAL = 32  # with pictures.EMBED_BYTES this keeps a page under 3 MB
STYLE = """
:root { --reference: var(--s2); }
.reference { color: var(--reference); font-style: normal; }
.trio { grid-template-columns: repeat(3, 1fr); }
.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 225px), 1fr)); }
figcaption i { font-style: normal; }
.tile b { white-space: normal; }
"""
_TITLES = {"geneval_strict": "Strict score", "ocr": "OCR score", "geneval_soft": "Soft score"}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the directory of a DIDR run from the files the trainer left there, finished or not.

    Reads what the page of `crd_fast.evaluation.write_report` is made of, besides beta.json and evaluation_<side>.json;
    each may be missing. It depends on these files only, so a second call writes the same bytes.

    Returns the path of the page. Raises DataError as that function does.
    """
    run_dir = Path(run_dir)
    found = read_didr_run(run_dir)
    run = found.run
    sections = [
        header(
            f"crd-fast one-step run · {run.name}",
            _headline(found),
            [*about_run(run), *_about(found)],
            unfinished_banner(run),
        ),
        _tiles(found),
        images_section(run, _gallery(found)),
        tasks_section(run, SIDES) if found.suite else "",
        training_curves(found),
        time_section(run),
        config_section(run),
        environment_footer(run),
    ]
    return write_document(run_dir / PAGE, f"{run.name} · crd-fast one-step run", [*filter(None, sections)], STYLE)


def _about(found: DIDRRun) -> list[str]:
    """What tells runs of one recipe apart."""
    about = [f"reward {found.reward}"] if found.reward else []
    about += [f"beta {number(found.beta)}"] if found.beta is not None else []
    about += [f"reward at {found.reward_at}"] if found.reward_at else []
    return about + ([f"moved {score(found.towards_start)} back to the start"] if found.towards_start else [])


def _steps(found: DIDRRun) -> str:
    return f" in {found.steps} steps" if found.steps is not None else ""


def _reference(found: DIDRRun, key: str) -> str:
    """`reference .91`, the multi-step reference's score; empty where it has none."""
    value = finite(found.run.side(REFERENCE).get(key))
    return "" if value is None else f'<i class="{REFERENCE}">reference {_shown(key, value)}</i>'


def _shown(key: str, value: object) -> str:
    """Distances are small and have no largest value."""
    return number(value) if key == "frechet" else score(value)


def _headline(found: DIDRRun) -> str:
    """The result in one sentence."""
    run = found.run
    time, where = time_and_place(run)
    if not run.finished:
        return f"Unfinished{_reward_so_far(found)} after {last_epoch(run)}{where}"
    after = run.side("after")
    counts = {
        "geneval_strict": macro(after, "strict")["n"],
        "ocr": entry(after, OCR_TASK, "soft").get("n"),
        "geneval_soft": macro(after, "soft")["n"],
    }
    for key in (*_TITLES, *([found.reward] if found.reward else [])):
        values = {side: run.side(side).get(key) for side in ONE_STEP}
        if None not in map(finite, values.values()):
            best = _reference(found, key)
            beside = f", {best}{_steps(found)}" if best else ""
            title, n = _TITLES.get(key, escape(key)), counts.get(key, after.get("n"))
            return f"{title} in one step {change(values)}{beside}{on_images(n)}{time}{where}"
    return f"Trained{time}{where}; no score was evaluated before and after"


def _reward_so_far(found: DIDRRun) -> str:
    """`: hpsv2 .251 → .274`, of the first and the last epoch that have a reward; empty without any."""
    name = found.reward
    values = [(row.get("reward") or {}).get(name) for row in found.run.epochs] if name else []
    told = [value for value in map(finite, values) if value is not None]
    return f": {escape(str(name))} {number(told[0])} → {number(told[-1])}" if told else ""


def _tiles(found: DIDRRun) -> str:
    run = found.run

    def compared(title: str, key: str, text: str) -> tuple[str, str, str]:
        values = {side: run.side(side).get(key) for side in ONE_STEP}
        shown = change(values) if key != "frechet" else _distances(values)
        why = next((run.side(side)[f"{key}_failed"] for side in SIDES if f"{key}_failed" in run.side(side)), "")
        notes = (_reference(found, key), escape(str(why)) or note_of(run, key, SIDES, text))
        return title, shown, " · ".join(filter(None, notes))

    reward = (f"Reward, {escape(found.reward)}", found.reward, "mean over the images") if found.reward else None
    if not found.suite and reward is None:
        return tiles_section("<span>Reward</span><b>none</b><small>the reference as it is</small>", speed_tiles(run))
    if not found.suite and reward is not None:
        title, shown, note = compared(*reward)
        return tiles_section(f"<span>{title}</span>{shown}<small>{note}</small>", speed_tiles(run))
    title, shown, note = compared("Strict score, mean of tasks", "geneval_strict", "0 to 1; bars are 95% intervals")
    bars = interval_rows({side: macro(run.side(side), "strict") for side in SIDES})
    tiles = [
        compared("Soft score", "geneval_soft", "partial credit, mean of tasks"),
        compared("Cleanliness", "clean", "image explained by valid objects"),
        compared("OCR score", "ocr", "quoted text, read back"),
        compared("Fréchet distance", "frechet", "lower is better"),
        *([compared(*reward)] if reward is not None else []),
        *speed_tiles(run),
    ]
    return tiles_section(f"<span>{title}</span>{shown}{bars}<small>{note}</small>", tiles)


def _distances(values: dict[str, object]) -> str:
    sides = [
        f'<i class="{side if finite(value) is not None else "missing"}">{number(value)}</i>'
        for side, value in values.items()
    ]
    return "<b>" + ' <i class="arrow">→</i> '.join(sides) + "</b>"


def _gallery(found: DIDRRun) -> Gallery:
    told = ""
    if found.suite:
        told = " Marks, in the same order: ✓ satisfies its prompt, ✗ does not."
    elif found.reward:
        told = f" Numbers, in the same order: {escape(found.reward)}."
    return Gallery(
        sides=SIDES,
        title="One step before, one step after, and the reference",
        note='Each row is one prompt and one noise: the generator in one step <b class="before">before</b> training, '
        f'<b class="after">after</b> it, and the <b class="reference">reference</b>{_steps(found)}. The first '
        f"{{shown}} recorded per task, not picked.{told}",
        in_total=TRIPLES_IN_TOTAL,
        grid="duo trio",
        between=" ",
        marks=found.suite,
    )
