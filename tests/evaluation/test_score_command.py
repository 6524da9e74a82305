"""`crd-fast score`: the contract of its output, in the order of the folder's metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crd_fast import cli
from crd_fast.evaluation.pictures import to_pixels, write_png
from crd_fast.rewards import OcrReward
from crd_fast.shapes import world

ROWS: list[dict[str, Any]] = [
    {"prompt": 'a sign that says "42"', "tag": "text", "include": []},
    {"prompt": "two squares", "tag": "counting", "include": [{"class": "square", "count": 2}]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six true renders of two squares; the metadata is not in the order of the names."""
    rng = np.random.default_rng(0)
    entry = ROWS[1]
    images = torch.from_numpy(world.render([world.sample_scene(dict(entry), rng) for _ in range(6)], rng))
    for number, pixels in enumerate(to_pixels(images)):
        write_png(tmp_path / f"{number}.png", pixels)
    names = [f"{number}.png" for number in (5, 0, 4, 1, 3, 2)]
    write_rows(tmp_path, [entry | {"file_name": name} for name in names])
    return tmp_path


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert cli.main(["score", *arguments]) == code
    captured = capsys.readouterr()
    return captured.out if code != 2 else captured.err


def test_scores_come_in_the_order_of_the_metadata(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads(run(capsys, "geneval,jpeg_compressibility", str(folder), "--json"))
    assert set(whole) == {"scores", "diagnostics", "failures", "versions"}
    assert whole["scores"]["geneval"] == [1.0] * 6
    assert set(whole["diagnostics"]["geneval"]) == {"accuracy", "strict", "soft"}
    assert whole["failures"] == {"geneval": [], "jpeg_compressibility": []}
    assert whole["versions"]["geneval"]["options"]["detector"] == "shapes"
    assert {"crd-fast", "torch"} <= set(whole["versions"]["geneval"]["packages"])
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    write_rows(folder, rows[::-1])
    reversed_ = json.loads(run(capsys, "jpeg_compressibility", str(folder), "--json", "--batch", "2"))
    sizes = whole["scores"]["jpeg_compressibility"]
    assert reversed_["scores"]["jpeg_compressibility"] == sizes[::-1] and len(set(sizes)) > 1


def test_sides_of_a_run_share_their_metadata(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = run(capsys, "geneval,jpeg_compressibility", str(folder), "--json")
    side = folder / "after"
    side.mkdir()
    for image in folder.glob("*.png"):
        image.rename(side / image.name)
    assert run(capsys, "geneval,jpeg_compressibility", str(side), "--json") == alone
    write_rows(side, [ROWS[0] | {"file_name": "0.png"}])
    assert (
        len(json.loads(run(capsys, "jpeg_compressibility", str(side), "--json"))["scores"]["jpeg_compressibility"]) == 1
    )


def test_ocr_reads_with_its_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rapidocr", reason="reading needs crd-fast[rewards]")
    rng = np.random.default_rng(1)
    entry = {"tag": "text", "text": "42", "prompt": 'a sign that says "42"'}
    image = torch.from_numpy(world.render([world.sample_scene(dict(entry), rng)], rng))
    write_png(folder / "sign.png", to_pixels(image)[0])
    write_rows(folder, [ROWS[0] | {"file_name": "sign.png"}])
    (folder / "options.yaml").write_text("ocr: {min_confidence: 0.25}\n")
    found = json.loads(run(capsys, "ocr", str(folder), "--json", "--options", str(folder / "options.yaml")))
    expected = OcrReward()(torch.from_numpy(to_pixels(image)).permute(0, 3, 1, 2) / 255, [ROWS[0]["prompt"]], [{}])
    assert found["scores"]["ocr"] == expected["ocr"].tolist()
    assert found["versions"]["ocr"]["options"]["min_confidence"] == 0.25
    assert "rapidocr" in found["versions"]["ocr"]["packages"]


def test_an_image_without_a_score_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:-1])
    found = json.loads(run(capsys, "geneval", str(folder), "--json", code=1))
    assert found["scores"]["geneval"] == [1.0, 1.0, None, 1.0, 1.0, 1.0]
    (failure,) = found["failures"]["geneval"]
    assert failure["index"] == 2 and failure["file_name"] == "4.png" and "no whole image" in failure["reason"]
    text = run(capsys, "geneval", str(folder), code=1)
    assert text.split()[:2] == ["geneval", "n/a"] and "4.png" in text


def test_images_that_are_all_missing_have_no_scores(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(folder, [ROWS[1] | {"file_name": f"missing-{number}.png"} for number in range(2)])
    found = json.loads(run(capsys, "geneval", str(folder), "--json", code=1))
    assert found["scores"]["geneval"] == [None, None] and len(found["failures"]["geneval"]) == 2


def test_means_are_printed_without_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "geneval", str(folder)).splitlines()
    assert [line.split()[:2] for line in lines] == [
        [name, "1.0000"] for name in ("geneval", "geneval/accuracy", "geneval/strict", "geneval/soft")
    ]


@pytest.mark.parametrize(
    ("rewards", "rows", "message"),
    [
        ("orc", [{"file_name": "0.png", "prompt": "p"}], "did you mean 'ocr'"),
        ("ocr,ocr", [{"file_name": "0.png", "prompt": "p"}], "different names"),
        ("geneval", [{"file_name": "0.png", "prompt": "p"}], "requires 'include'"),
        ("ocr", [{"file_name": "0.png", "prompt": "p"}], "double quotes"),
        ("jpeg_compressibility", [{"prompt": "p"}], "'file_name' is None"),
        ("jpeg_compressibility", [{"file_name": "../0.png", "prompt": "p"}], "expected the name of an image"),
        ("pickscore", [{"file_name": "0.png", "prompt": "p"}], "cannot be loaded"),
    ],
)
def test_what_cannot_be_scored_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], rewards: str, rows: list[dict[str, Any]], message: str
) -> None:
    write_rows(folder, rows)
    (folder / "options.yaml").write_text("pickscore: {model: no/such/folder}\n" if rewards == "pickscore" else "")
    assert message in run(capsys, rewards, str(folder), "--options", str(folder / "options.yaml"), code=2)


def test_a_misspelt_section_of_options_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "options.yaml").write_text("genevall: {score: strict}\n")
    error = run(capsys, "geneval", str(folder), "--options", str(folder / "options.yaml"), code=2)
    assert "section 'genevall', which is not among the rewards; did you mean 'geneval'?" in error
