"""`crd-fast eval` on a tiny random pipeline: interrupted, over ranks, with scorers that are not there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crd_fast import cli
from crd_fast.evaluation.pictures import is_whole
from tests.pipelines import sd3

ROOT = Path(__file__).parents[2]
PROMPTS, IMAGES, BATCH = 5, 12, 7  # batches do not end where prompts do


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline and prompts."""
    folder = tmp_path_factory.mktemp("eval")
    sd3.save(folder / "pipeline")
    (folder / "prompts.txt").write_text("".join(f"{n} squares\n" for n in range(PROMPTS)))
    (folder / "signs.txt").write_text('a sign "42"\na sign "17"\n')
    (folder / "options.yaml").write_text("pickscore: {model: no/such/folder}\n")
    (folder / "section.yaml").write_text("pickscor: {model: no/such/folder}\n")
    (folder / "key.yaml").write_text("pickscore: {modle: no/such/folder}\n")
    return folder


def command(folder: Path, out: Path, *more: str) -> list[str]:
    words = ["eval", "--suite", "drawbench", "--model", str(folder / "pipeline"), "--out", str(out)]
    words += ["--prompts", str(folder / "prompts.txt"), "--scorers", "jpeg_compressibility,pickscore"]
    words += ["--options", str(folder / "options.yaml"), "--images-per-prompt", str(IMAGES), "--batch", str(BATCH)]
    words += ["--steps", "2", "--resolution", "64", "--max-sequence-length", "1", "--guidance-scale", "2"]
    return [*words, "--device", "cpu", *more]


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One evaluation from start to end."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli.main(command(folder, out)) == 0
    return out


def assert_equal(out: Path, whole: Path) -> None:
    got, expected = files(out), files(whole)
    assert got.keys() == expected.keys()
    for name, content in expected.items():
        assert got[name] == content, name


def test_everything_is_where_it_belongs(whole: Path) -> None:
    for prompt in range(PROMPTS):
        (row,) = (whole / f"{prompt:05d}" / "metadata.jsonl").read_text().splitlines()
        assert json.loads(row) == {"prompt": f"{prompt} squares"}
        images = sorted((whole / f"{prompt:05d}" / "samples").iterdir())
        assert [image.name for image in images] == [f"{k:05d}.png" for k in range(IMAGES)]
    assert len(set(files(whole)[name] for name in files(whole) if name.endswith(".png"))) == PROMPTS * IMAGES
    rows = [json.loads(line) for line in (whole / "results.jsonl").read_text().splitlines()]
    assert [(row["prompt_id"], row["k"]) for row in rows] == [(p, k) for p in range(PROMPTS) for k in range(IMAGES)]
    assert all(isinstance(row["scores"]["jpeg_compressibility"], float) for row in rows)
    summary = json.loads((whole / "summary.json").read_text())
    column = summary["columns"]["jpeg_compressibility"]
    mean = sum(row["scores"]["jpeg_compressibility"] for row in rows) / len(rows)
    assert column["micro"]["mean"] == pytest.approx(mean) and column["n"] == summary["n"] == PROMPTS * IMAGES
    assert column["micro"]["low"] < mean < column["micro"]["high"]
    assert summary["checkpoint"]["model"].startswith("sha256:") and summary["checkpoint"]["lora"] is None
    assert summary["versions"]["jpeg_compressibility"]["packages"]["crd-fast"]


def test_a_scorer_that_is_not_there_is_not_a_number(whole: Path) -> None:
    column = json.loads((whole / "summary.json").read_text())["columns"]["pickscore"]
    assert column["macro"] is None and column["micro"] is None and "no/such/folder" in column["reason"]
    table = (whole / "table.md").read_text()
    assert "| model | PickScore | jpeg_compressibility |" in table
    assert "| base | n/a | " in table and "n/a, base, PickScore: " in table and "no/such/folder" in table
    assert "| CRD (arXiv 2603.14128) | 23.27 |" in table
    assert "no/such/folder" in (whole / "report.html").read_text()


def test_killed_it_goes_on_to_the_same_files(folder: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # the tests' own settings of torch, so that both make the same bits
    start = "import sys, torch; torch.set_num_threads(2); torch.use_deterministic_algorithms(True); "
    start += "from crd_fast import cli; sys.exit(cli.main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", start, *command(folder, out)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*/samples/*.png"))) < 10:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = sorted(out.glob("*/samples/*.png"))
    assert 10 <= len(made) < PROMPTS * IMAGES, "killed before the images were done"
    assert all(is_whole(path) for path in made), "half an image is never under an image's name"
    made[0].write_bytes(made[0].read_bytes()[:-9])
    made[5].write_bytes(made[5].read_bytes()[:60] + b"\0\0\0" + made[5].read_bytes()[63:])
    assert cli.main(command(folder, out)) == 0
    assert_equal(out, whole)


def test_scores_go_on_from_disk_and_follow_their_images(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for name, content in files(whole).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    scores = out / "scores" / "jpeg_compressibility"
    parts = sorted(scores.iterdir())
    assert len(parts) == 2
    parts[1].write_text(parts[1].read_text()[:40])
    (out / "results.jsonl").unlink()
    before = parts[0].stat().st_mtime_ns
    assert cli.main(command(folder, out)) == 0
    assert_equal(out, whole)
    assert parts[0].stat().st_mtime_ns == before, "what was scored is not scored again"
    # an image that was changed and made again, and scores that belong to another image
    kept = json.loads(parts[0].read_text())
    kept["images"][0] = "0" * 64
    kept["values"]["jpeg_compressibility"][0] = 1e6
    parts[0].write_text(json.dumps(kept))
    assert cli.main(command(folder, out)) == 0
    assert_equal(out, whole)


def test_two_ranks_make_what_one_makes(folder: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, "tests/evaluation/rank_worker.py", *command(folder, out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_equal(out, whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "3"], "steps was 2, now 3; give another --out"),
        (["--seed", "1"], "seed was 0, now 1"),
        (["--prompts", "{folder}/signs.txt"], "holds images of other settings: prompts was"),
        (["--dtype", "bf16"], "dtype was 'fp32', now 'bf16'"),
        (["--dtype", "fp8"], "dtype is 'fp8': expected one of"),
        (["--steps", "0"], "steps is 0: expected at least 1"),
        (["--run", "{folder}"], "give either --model"),
        (["--checkpoints", "all"], "--checkpoints goes with --run"),
        (["--images-per-task", "3"], "suite drawbench counts its images by prompt"),
        (["--lora", "{folder}"], "no LoRA at"),
        (["--transformer", "{folder}"], "no model at --transformer"),
        (["--transformer", "{folder}/pipeline"], "model_digest was"),
        (["--scorers", "jpg"], "unknown reward 'jpg'; valid names: aesthetic,"),
        (["--options", "{folder}/section.yaml"], "has a section 'pickscor', which is not among the rewards; did you"),
        (["--options", "{folder}/key.yaml"], "unknown key pickscore.modle; did you mean 'model'?"),
        (["--guidance-scale", "nan"], "guidance_scale is nan: expected a finite number"),
        (["--max-sequence-length", "0"], "max_sequence_length is 0: expected at least 1"),
        (["--seed", "-1"], "seed is -1: expected 0 or more"),
        (["--device", "gpu"], "device 'gpu' is not known"),
        (["--out", "{folder}/prompts.txt"], "prompts.txt cannot be written to"),
    ],
)
def test_wrong_settings_are_errors(
    folder: Path, whole: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert cli.main(command(folder, whole, *(word.format(folder=folder) for word in more))) == 2
    assert message in capsys.readouterr().err


def test_a_missing_model_is_not_looked_for_on_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert cli.main(command(folder, tmp_path / "out", "--model", "models/nope")) == 2
    assert "model models/nope is not a folder" in capsys.readouterr().err


def test_the_shapes_suite_takes_no_scorers_options(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["eval", "--suite", "shapes", "--model", str(folder / "pipeline")]
    assert cli.main([*words, "--options", str(folder / "options.yaml")]) == 2
    assert "--options does not go with suite shapes" in capsys.readouterr().err


def test_a_model_of_full_finetuning_stands_beside_its_base(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run, joined = folder / "pipeline", tmp_path / "run", tmp_path / "joined"
    shutil.copytree(sd3.save(tmp_path / "other", seed=1) / "transformer", run / "transformer")
    (run / "config.yaml").write_text(f"model: {{path: {base}}}\nrewards: {{jpeg_compressibility: {{}}}}\n")
    (run / "metrics.jsonl").write_text("")
    shutil.copytree(base, joined)
    shutil.rmtree(joined / "transformer")
    shutil.copytree(run / "transformer", joined / "transformer")
    few = ["--images-per-prompt", "1", "--scorers", "jpeg_compressibility", "--options", os.devnull]
    assert cli.main(command(folder, tmp_path / "tuned", "--transformer", str(run), *few)) == 0
    assert cli.main(command(folder, tmp_path / "expected", "--model", str(joined), *few)) == 0
    tuned, expected = files(tmp_path / "tuned"), files(tmp_path / "expected")
    pictures = [name for name in expected if name.endswith(".png")]
    assert len(pictures) == PROMPTS and all(tuned[name] == expected[name] for name in pictures)
    summary = json.loads(tuned["summary.json"])
    assert summary["label"] == "fine-tuned" and summary["trained_on"] == ["jpeg_compressibility"]
    alone = json.loads(expected["summary.json"])
    assert " with sha256:" in summary["checkpoint"]["model"] and " with " not in alone["checkpoint"]["model"]
    capsys.readouterr()
    words = ["eval", "--suite", "drawbench", "--run", str(run), "--prompts", str(folder / "prompts.txt")]
    assert cli.main(words) == 2
    assert f"give --model {base} --transformer {run}" in capsys.readouterr().err
    assert cli.main([*words, "--transformer", str(run)]) == 2
    assert "--transformer goes with --model" in capsys.readouterr().err


def test_signs_are_read(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("rapidocr", reason="reading needs crd-fast[rewards]")
    words = ["eval", "--suite", "ocr", "--model", str(folder / "pipeline"), "--prompts", str(folder / "signs.txt")]
    words += ["--steps", "1", "--resolution", "64", "--max-sequence-length", "1", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--device", "cpu"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {"ocr", "ocr/ocr_exact"} == set(summary["columns"])
    assert summary["columns"]["ocr"]["micro"]["mean"] == 0, "a random model writes nothing"
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| model | OCR | exact |" in table and "2 of the benchmark's 1018 prompts" in table


def test_geneval_is_the_mean_of_its_tasks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    rows = [{"tag": "counting", "include": [{"class": "square", "count": n}], "prompt": f"{n} squares"} for n in (2, 3)]
    rows.append({"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a circle"})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "options.yaml").write_text("geneval: {detector: shapes}\n")
    words = ["eval", "--suite", "geneval", "--model", str(folder / "pipeline"), "--out", str(tmp_path / "out")]
    words += ["--prompts", str(tmp_path / "prompts.jsonl"), "--options", str(tmp_path / "options.yaml")]
    words += ["--steps", "1", "--resolution", "64", "--max-sequence-length", "1", "--device", "cpu"]
    assert cli.main(words) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    column = summary["columns"]["geneval"]
    assert summary["n"] == 12 and column["n"] == 12, "four images a prompt"
    means = [task["mean"] for task in column["tasks"].values()]
    assert set(column["tasks"]) == {"counting", "single_object"}
    assert column["macro"]["mean"] == pytest.approx(sum(means) / 2)
    assert column["micro"]["mean"] == pytest.approx(
        (8 * column["tasks"]["counting"]["mean"] + 4 * column["tasks"]["single_object"]["mean"]) / 12
    )
    assert summary["versions"]["geneval"]["options"]["score"] == "accuracy", "the benchmark's rule"
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert all(line["scores"]["geneval"] == line["scores"]["geneval/accuracy"] for line in lines)
    assert json.loads((tmp_path / "out" / "00002" / "metadata.jsonl").read_text()) == rows[2]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.startswith("| model | GenEval | strict | soft |")
    assert "| DiffusionNFT, GenEval only (arXiv 2509.16117) | .98 |" in table
    (tmp_path / "options.yaml").write_text("geneval: {detector: shapes, score: soft}\n")
    assert cli.main(words) == 2
    assert "geneval ask for score 'soft', but the column of suite geneval is 'accuracy'" in capsys.readouterr().err
    # the benchmark's own detector is a model that has to be there, and knows no squares
    row = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "options.yaml").write_text("geneval: {model: no/such/folder}\n")
    assert cli.main([*words, "--out", str(tmp_path / "dogs")]) == 0
    column = json.loads((tmp_path / "dogs" / "summary.json").read_text())["columns"]["geneval"]
    assert column["macro"] is None and "no/such/folder" in column["reason"]
