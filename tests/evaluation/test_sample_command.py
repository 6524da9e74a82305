"""`crd-fast sample` on a tiny random pipeline: what is written and when, and every wrong input."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crd_fast import cli, sampling
from crd_fast.backbones import Backbone
from crd_fast.evaluation.pictures import read_image
from tests.pipelines import sd3

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3.save(tmp_path_factory.mktemp("pipelines") / "first")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3.save(tmp_path_factory.mktemp("pipelines") / "second", seed=1)


def sample(pipeline: Path, out: Path, *more: str) -> int:
    words = ["sample", "--model", str(pipeline), "--prompt", "2 squares", "--prompt", "3 squares", "--steps", "2"]
    words += ["--guidance-scale", "2", "--max-sequence-length", "1", "--device", "cpu", "--out", str(out)]
    return cli.main([*words, *more])


def images(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_images_do_not_depend_on_how_many_are_made_at_once(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(pipeline, tmp_path / "whole", "--count", "3") == 0
    names = [f"{index:05d}.png" for index in range(6)]
    assert capsys.readouterr().out.split() == [str(tmp_path / "whole" / name) for name in names]
    monkeypatch.setattr(sampling, "BATCH", 2)
    assert sample(pipeline, tmp_path / "parts", "--count", "3") == 0
    whole, parts = (
        torch.stack([read_image(tmp_path / folder / name) for name in names]) for folder in ("whole", "parts")
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1.5 / 255)
    assert min((a - b).abs().max() for i, a in enumerate(whole) for b in whole[:i]) > 0.05


def test_ctrl_c_keeps_what_was_made(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode, decoded = Backbone.decode, []

    def interrupted(backbone: Backbone, latents: Tensor) -> Tensor:
        if len(decoded) == 3:
            raise KeyboardInterrupt
        decoded.append(latents)
        return decode(backbone, latents)

    monkeypatch.setattr(Backbone, "decode", interrupted)
    assert sample(pipeline, tmp_path / "out", "--count", "2") == 130
    assert list(images(tmp_path / "out")) == ["00000.png", "00001.png", "00002.png"]
    assert f"the images that were made stay in {tmp_path / 'out'}" in capsys.readouterr().out


def test_images_that_are_there_stay(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(pipeline, tmp_path) == 0
    before = images(tmp_path)
    assert sample(pipeline, tmp_path, "--seed", "1") == 2
    assert f"{tmp_path} has 00000.png already: give another --out" in capsys.readouterr().err
    assert images(tmp_path) == before


def test_nan_is_not_a_picture(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode = Backbone.decode
    monkeypatch.setattr(Backbone, "decode", lambda backbone, latents: decode(backbone, latents) * torch.nan)
    assert sample(pipeline, tmp_path) == 2
    assert "NaN or infinite pixels" in capsys.readouterr().err
    assert images(tmp_path) == {}


@pytest.mark.parametrize("place", ["file", "file/folder", "/proc/self"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(
    pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(sampling, "load_model", lambda *_: pytest.fail("the work has begun"))
    assert sample(pipeline, tmp_path / place) == 2
    assert "cannot be written to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--guidance-scale", "nan"], "guidance_scale is nan: expected a finite number"),
        (["--guidance-scale", "inf"], "guidance_scale is inf: expected a finite number"),
        (["--seed", "-1"], "seed is -1: expected 0 or more"),
        (["--seed", str(2**64)], "expected 0 or more, and less than 2**64"),
        (["--max-sequence-length", "0"], "max_sequence_length is 0: expected at least 1"),
        (["--steps", "0"], "steps is 0: expected at least 1"),
        (["--count", "0"], "count is 0: expected at least 1"),
        (["--device", "gpu"], "device 'gpu' is not known"),
        (["--device", "cpu:x"], "device 'cpu:x' is not known"),
        (["--lora", "no/such/folder"], "no LoRA at no/such/folder"),
        (["--model", "no/such/folder"], "model no/such/folder is not a folder"),
        (["--transformer", "no/such/folder"], "no model at --transformer no/such/folder: expected a folder with"),
        (
            ["--transformer", str(ROOT / "models" / "shapes-one-step")],
            "shapes-one-step is a SD3Transformer2DModel of another size",
        ),
    ],
)
def test_wrong_input_exits_2(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert sample(pipeline, tmp_path, *more) == 2
    assert message in capsys.readouterr().err
    assert images(tmp_path) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert sample(pipeline, tmp_path, "--device", "cuda") == 2
    assert "device 'cuda' cannot be used" in capsys.readouterr().err


def test_a_transformer_replaces_the_pipelines_own(pipeline: Path, other: Path, tmp_path: Path) -> None:
    """As a pipeline that was saved with it. A run directory has it under transformer/, like `other`."""
    joined = tmp_path / "joined"
    shutil.copytree(pipeline, joined)
    shutil.rmtree(joined / "transformer")
    shutil.copytree(other / "transformer", joined / "transformer")
    assert sample(joined, tmp_path / "expected") == 0
    expected = images(tmp_path / "expected")
    for name, given in (("model", other / "transformer"), ("run", other)):
        assert sample(pipeline, tmp_path / name, "--transformer", str(given)) == 0
        assert images(tmp_path / name) == expected
    assert sample(pipeline, tmp_path / "own") == 0
    assert images(tmp_path / "own") != expected
