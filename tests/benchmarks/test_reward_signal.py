"""The command that shows where the diffused reward is signal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import reward_signal

ROOT = Path(__file__).parents[2]


def test_signal_is_the_share_of_the_mean() -> None:
    """A mean of unit length with noise of three times its energy is signal to a quarter, without bias at two draws."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.nn.functional.normalize(torch.randn(4000, 50, generator=generator), dim=1)
    noise = (3 / 50) ** 0.5 * torch.randn(2, 4000, 50, generator=generator)
    found = reward_signal.signal_of(mean + noise, mean)
    assert found["signal"] == pytest.approx(0.25, abs=0.01)
    assert found["median"] == pytest.approx(0.25, abs=0.03)
    assert found["cosine"] == pytest.approx((1 / 2.5) ** 0.5, abs=0.02)
    assert found["rms"] == pytest.approx((4 / 50) ** 0.5, rel=0.02)
    assert reward_signal.signal_of(noise, mean)["signal"] == pytest.approx(0.0, abs=0.01)


def test_the_shapes_reward_is_signal_early_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(reward_signal, "SHARES", (0.02, 0.7))
    out = tmp_path / "signal"
    arguments = ["recipes/shapes_didr.yaml", "run.device=cpu", "--samples", "16", "--draws", "3", "--out", str(out)]
    assert reward_signal.main(arguments) == 0
    early, late = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert early["median"] > 0.9 and early["cosine"] > 0.9
    assert abs(late["median"]) < 0.3 and late["cosine"] < 0.5
    assert out.with_suffix(".png").stat().st_size > 1000
    assert capsys.readouterr().out.count("share") == 2


def test_a_recipe_without_a_reward(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert reward_signal.main(["recipes/shapes_distil_didr.yaml"]) == 2
    assert "expected a recipe with a reward" in capsys.readouterr().err
    assert reward_signal.main(["nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
