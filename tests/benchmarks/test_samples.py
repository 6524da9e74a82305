"""Samples of a run in one picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import samples
from benchmarks.samples import RIGHT, WRONG

PROMPTS = (("a square", "single_object"), ("one circle", "single_object"), ("two circles", "counting"))
COLOURS = {"before": (255, 0, 255), "after": (0, 255, 255)}


def sampled(folder: Path) -> Path:
    """A run with a plain magenta image before and a cyan one after; the second prompt is wrong afterwards."""
    rows = []
    for number, (prompt, task) in enumerate(PROMPTS):
        row = {"file_name": f"{number:05d}.png", "prompt": prompt, "tag": task, "seed": number}
        for side, colour in COLOURS.items():
            images = folder / "samples" / side
            images.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), colour).save(images / row["file_name"])
            row[side] = float((side, number) != ("after", 1))
        rows.append(row)
    (folder / "samples" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rgb(name: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(name[1:]))


def drawn(file: Path, colour: tuple[int, ...]) -> int:
    """How many pixels have a colour."""
    with Image.open(file) as picture:
        return int((np.asarray(picture.convert("RGB")) == colour).all(-1).sum())


def test_every_task_comes_first_and_frames_say_what_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(sampled(tmp_path))
    two, three = tmp_path / "new" / "two.png", tmp_path / "new" / "three.png"
    assert samples.main([run, "--out", str(two), "--columns", "2"]) == 0
    assert capsys.readouterr().out == "a square: before 1  after 1\ntwo circles: before 1  after 1\n"
    assert samples.main([run, "--out", str(three), "--columns", "9"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "one circle: before 1  after 0"
    for colour in (*COLOURS.values(), rgb(RIGHT)):
        assert 0 < drawn(two, colour) < drawn(three, colour)
    assert drawn(two, rgb(WRONG)) == 0 < drawn(three, rgb(WRONG))


def test_samples_without_scores_have_no_frames(tmp_path: Path) -> None:
    metadata = sampled(tmp_path) / "samples" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    metadata.write_text("".join(json.dumps({k: r[k] for k in ("file_name", "prompt")}) + "\n" for r in rows))
    out = tmp_path / "out.png"
    assert samples.main([str(tmp_path), "--out", str(out)]) == 0
    assert drawn(out, COLOURS["after"]) and not drawn(out, rgb(RIGHT)) and not drawn(out, rgb(WRONG))


def test_a_run_without_samples_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert samples.main([str(tmp_path), "--out", str(tmp_path / "out.png")]) == 2
    assert f"{tmp_path} has no samples" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
