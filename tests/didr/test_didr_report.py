"""The page of a DIDR run: from known files, unfinished, without a suite, and as the command leaves it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from crd_fast.didr.report import write_report
from crd_fast.errors import DataError
from crd_fast.evaluation.pictures import read_image
from crd_fast.evaluation.plots import score
from crd_fast.rewards import registry
from tests.didr.tiny import PROMPTS, didr, make_world, recipe_tree
from tests.evaluation.report_text import visible_text

SIDES = ("before", "after", "reference")
STRICT = {"before": 0.31, "after": 0.66, "reference": 0.78}
TASKS = ("single_object", "counting")


def _evaluation(side: str) -> dict[str, Any]:
    mean = STRICT[side]
    entry = {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "n": 60}
    return {
        "n": 120,
        "geneval_strict": mean,
        "geneval_strict_interval": [mean - 0.04, mean + 0.04],
        "geneval_soft": mean + 0.1,
        "clean": mean + 0.2,
        "ocr": None,
        "reasons": {"ocr": "no reader"},
        "frechet": {"before": 0.0312, "after": 0.0121, "reference": 0.0088}[side],
        "shapes_judge": -3 * (1 - mean),
        "tasks": {task: {"strict": entry, "soft": entry} for task in TASKS},
    }


def _epoch(number: int) -> dict[str, Any]:
    """The first epoch is a warm-up of the TA, without Stage II."""
    row: dict[str, Any] = {
        "epoch": number,
        "iteration": 10 * (number + 1),
        "ta_loss": 0.5,
        "ta_loss_before": 0.5,
        "ta_loss_after": 0.4,
        "grad_norm": {"ta": 0.3},
        "skipped_steps": {"generator": 0, "ta": number},
        "lr": 5e-4,
        "ta_lr": 1e-3,
        "seconds": {"stage_one": 6.0, "stage_two": 3.0, "optimizer": 1.0},
        "samples_per_second": 100.0 + number,
        "elapsed_seconds": 60.0 * (number + 1),
    }
    if number:
        row |= {"gap": 0.2 * number, "reward": {"shapes_judge": -2.0 + 0.1 * number}, "correction": 0.3, "nonfinite": 0}
        row["correction_ratio"] = {"early": 0.1, "middle": 1.0, "late": 3.0}
        row["grad_norm"]["generator"] = 0.1
    return row


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "demo"
    run.mkdir()
    config = {
        "reward": {"name": "shapes_judge", "options": {}},
        "algorithm": {"beta": None, "reward_at": "diffused"},
        "evaluation": {"suite": "shapes", "steps": 8},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "beta.json").write_text(json.dumps({"beta": 0.75, "deviation": 1.5}))
    _write_lines(run / "metrics.jsonl", [_epoch(i) for i in range(5)])
    evaluations = {side: _evaluation(side) for side in SIDES}
    for side in SIDES:
        (run / f"evaluation_{side}.json").write_text(json.dumps({"summary": evaluations[side]}))
    summary = {"name": "shapes_didr", "model": "models/shapes-sd3", "seed": 4, "samples": 9600, "minutes": None}
    (run / "summary.json").write_text(json.dumps(summary | evaluations))
    (run / "timing.json").write_text(json.dumps({"train_minutes": 5.0}))
    environment = {"device": "cpu (x86)", "threads": 2, "versions": {"torch": "2.6.0"}, "command": "crd-fast didr x"}
    (run / "environment.json").write_text(json.dumps(environment))
    _images(run, {side: 1.0 if side == "reference" else 0.0 for side in SIDES})
    return run


def _images(run: Path, scores: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(16):
        task = TASKS[number % 2]
        row = {"file_name": f"{number:05d}.png", "prompt": f"<prompt {number}>", "tag": task, "seed": number}
        rows.append(row | scores)
        for side in SIDES:
            (run / "samples" / side).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 40, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(run / "samples" / side / row["file_name"])
    _write_lines(run / "samples" / "metadata.jsonl", rows)


def _render(run: Path) -> tuple[str, str]:
    page = write_report(run).read_text(encoding="utf-8")
    return page, visible_text(page)


def test_the_headline_compares_one_step_with_itself_and_the_reference(run_dir: Path) -> None:
    page, text = _render(run_dir)
    sentence = (
        "Strict score in one step .31 → .66 , reference .78 in 8 steps on 120 held-out images in 5.0 minutes on 2 CPU "
        "threads"
    )
    assert sentence in text
    assert "Model models/shapes-sd3 · seed 4 · reward shapes_judge · beta .750 · reward at diffused" in text
    ids = re.findall(r'<(?:section|footer) id="(\w+)"', page)
    assert ids == ["result", "images", "tasks", "curves", "time", "recipe", "environment"]


def test_the_tiles_tell_three_sides(run_dir: Path) -> None:
    _, text = _render(run_dir)
    for tile in (
        "Strict score, mean of tasks .31 → .66 reference .78 · 0 to 1; bars are 95% intervals",
        "Soft score .41 → .76 reference .88 · partial credit",
        "Cleanliness .51 → .86 reference .98",
        "OCR score n/a → n/a no reader",
        "Fréchet distance .0312 → .0121 reference .00880 · lower is better",
        "Reward, shapes_judge −2.07 → −1.02 reference −.66 · mean over the images",
        "Minutes 5.0 5 epochs",
    ):
        assert tile in text, tile


def test_images_stand_in_three_columns_of_one_prompt(run_dir: Path) -> None:
    page, text = _render(run_dir)
    assert page.count('<div class="duo trio">') == 12 and page.count("<img") == 36  # six of each of two tasks
    first = page[page.index('<div class="duo trio">') : page.index("</figure>")]
    assert re.findall(r'alt="(\w+): &lt;prompt 0&gt;"', first) == list(SIDES)
    assert "✗ ✗ ✓ <prompt 0>" in text and "the reference in 8 steps" in text
    assert "Single object .31 → .66" in text


def test_the_task_table_has_three_sides(run_dir: Path) -> None:
    page, text = _render(run_dir)
    assert "Strict before Strict after Strict reference Change" in text
    assert "Counting 60 .31 [.26, .36] .66 [.61, .71] .78 [.73, .83] +.35 .31 .66 .78" in text
    assert "Mean of tasks 120 .31 [.27, .35] .66 [.62, .70] .78 [.74, .82] +.35 .41 .76 .88" in text
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    assert table.count('style="fill:var(--reference)"') == 3 and "--reference: var(--s2)" in page


def test_curves_are_drawn_over_iterations(run_dir: Path) -> None:
    page, text = _render(run_dir)
    for card in ("TA loss", "TA lag", "Gap", "Reward: shapes_judge", "Correction ratio", "Gradient norm", "Skipped"):
        assert card in text, card
    for title in (
        "iter. 50 · after them .400",
        "iter. 10 · TA lag .200",
        "iter. 20 · late third 3.00",
        "iter. 50 · TA 4.00",
        "iter. 40 · shapes_judge −1.70",
    ):
        assert f"<title>{title}</title>" in page, title
    assert "iter. 10 · gap" not in page, "the warm-up has no generator"


def test_the_reward_at_the_endpoint_corrects_no_score(run_dir: Path) -> None:
    config = (run_dir / "config.yaml").read_text().replace("diffused", "endpoint")
    (run_dir / "config.yaml").write_text(config)
    _, text = _render(run_dir)
    assert "reward at endpoint" in text and "Correction" not in text


@pytest.mark.parametrize("evaluated", [SIDES[:0], ("before", "reference")])
def test_an_unfinished_run_shows_what_there_is(run_dir: Path, evaluated: tuple[str, ...]) -> None:
    for name in ("summary.json", "timing.json"):
        (run_dir / name).unlink()
    for side in set(SIDES) - set(evaluated):
        (run_dir / f"evaluation_{side}.json").unlink()
    page, text = _render(run_dir)
    assert "Unfinished: shapes_judge −1.90 → −1.60 after epoch 4 on 2 CPU threads" in text
    assert "Unfinished run." in text
    assert ("Strict score, mean of tasks .31 → n/a reference .78" in text) == bool(evaluated)
    assert page.count('<svg class="chart"') >= 8


def test_a_directory_without_files_has_a_page(tmp_path: Path) -> None:
    _, text = _render(tmp_path)
    for line in ("Unfinished after the start", "No samples recorded.", "No epoch recorded yet.", "No config.yaml"):
        assert line in text, line


def test_without_a_suite_the_reward_is_the_score(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    for side, mean in {"before": 20.1, "after": 22.34, "reference": 21.7}.items():
        summary[side] = {"n": 16, "shapes_judge": mean}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    _images(run_dir, {"before": 19.5, "after": 23.25, "reference": 1.0})
    page, text = _render(run_dir)
    sentence = "shapes_judge in one step 20.10 → 22.34 , reference 21.70 in 8 steps on 16 held-out images"
    assert sentence in text
    assert "Reward, shapes_judge 20.10 → 22.34 reference 21.70 · mean over the images" in text
    assert "19.50 23.25 1.00 <prompt 0>" in text
    assert "✓" not in text and "✗" not in text and "Strict" not in text and 'id="tasks"' not in page


def test_a_run_that_only_distils_promises_no_scores(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"reward": None, "evaluation": {"suite": None, "steps": 8}}))
    summary = json.loads((run_dir / "summary.json").read_text())
    summary |= {side: {"n": 16} for side in SIDES}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    _write_lines(run_dir / "metrics.jsonl", [_epoch(0)])
    page, text = _render(run_dir)
    assert "Reward none the reference as it is" in text and "Samples per second" in text
    for word in ("not evaluated", "Strict", "Numbers, in the same order"):
        assert word not in text, word


def test_a_second_page_is_the_same_bytes_and_loads_nothing(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first
    page = first.decode()
    assert not re.search(r"https?:|@import|url\(|<link|<iframe|href=|<script", page)
    assert not [p for p in run_dir.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"epoch": 0}\n', r"metrics\.jsonl, line 1: no 'iteration'"),
        ("metrics.jsonl", '{"epoch": 0, "iteration": 1, "grad_norm": 3}\n', r"line 1: grad_norm is 3, expected an obj"),
        ("config.yaml", "- a\n", r"config\.yaml: holds a list, expected the sections of a recipe"),
        ("config.yaml", "a: [", r"config\.yaml: not YAML"),
        ("evaluation_after.json", '{"summary": 3}', r"evaluation_after\.json: summary is 3"),
        ("beta.json", "{", r"beta\.json: not JSON"),
    ],
)
def test_a_damaged_file_is_named(run_dir: Path, name: str, content: str, message: str) -> None:
    (run_dir / name).write_text(content)
    with pytest.raises(DataError, match=message):
        write_report(run_dir)


# --- as the command leaves it ---


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_the_command_writes_the_page(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    didr(world / "sd3.yaml", f"run.dir={run}", "train.epochs=1")
    assert f"report {run / 'report.html'}" in capsys.readouterr().out
    page = (run / "report.html").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (run / "samples" / "metadata.jsonl").read_text().splitlines()]
    assert all(isinstance(row[side], float) for row in rows for side in SIDES) and len(rows) == 4
    text = visible_text(page)
    means = {side: json.loads((run / "summary.json").read_text())[side]["clipscore"] for side in SIDES}
    assert f"clipscore in one step {score(means['before'])} → {score(means['after'])}" in text
    assert page.count("<img") == 12 and all(prompt in text for prompt in PROMPTS)
    assert write_report(run).read_text(encoding="utf-8") == page


def test_a_run_that_was_stopped_has_an_index_of_its_images(world: Path, tmp_path: Path) -> None:
    """By steps that are not finite: by then, two sides have been evaluated."""
    run = tmp_path / "run"
    didr(world / "sd3.yaml", f"run.dir={run}", "train.max_skipped=1", "train.lr=1e30", "train.ta_lr=1e30", code=2)
    assert not (run / "summary.json").exists()
    _, text = _render(run)
    assert "Unfinished" in text and "Reward, clipscore" in text and PROMPTS[0] in text


def test_a_suite_has_the_mean_of_the_training_reward(world: Path, tmp_path: Path) -> None:
    """Of the images of prompts that it can score, which a sign's is not."""
    lines = [{"prompt": "a circle", "tag": "single_object", "include": [{"class": "circle", "count": 1}]}]
    lines.append({"prompt": 'a sign "07"', "tag": "text"})
    _write_lines(tmp_path / "test.jsonl", lines)
    train = [{"prompt": "a square", "tag": "single_object", "include": [{"class": "square", "count": 1}]}]
    _write_lines(tmp_path / "train.jsonl", train)
    tree = recipe_tree("sd3", world / "sd3", tmp_path / "train.jsonl", epochs=1, steps=1)
    tree["data"]["test_prompts"] = str(tmp_path / "test.jsonl")
    tree["reward"] = {"name": "shapes_judge"}
    tree["evaluation"] |= {"suite": "shapes", "images": 2}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(tree))
    run = tmp_path / "run"
    didr(tmp_path / "suite.yaml", f"run.dir={run}")
    summary = json.loads((run / "summary.json").read_text())
    reward = registry.build("shapes_judge", registry.options_type("shapes_judge")())
    for side in SIDES:
        kept = [read_image(run / "samples" / side / f"{i:05d}.png") for i in range(2)]
        expected = reward(torch.stack(kept), ["a circle"] * 2, [lines[0]] * 2)["shapes_judge"].mean().item()
        assert summary[side]["shapes_judge"] == pytest.approx(expected, abs=1e-5), side
        assert "tasks" in summary[side]
