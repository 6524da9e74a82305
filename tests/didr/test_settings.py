"""Settings of a DIDR recipe: what is refused, and what a resumed run may change."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from crd_fast.didr.recipe import dump_recipe
from crd_fast.errors import ConfigError
from crd_fast.training.run_directory import RunDirectory
from tests.didr.tiny import make_recipe


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("algorithm", {"beta": 0.0}, "DIDRConfig.beta"),
        ("algorithm", {"reward_until": 0.0}, "algorithm.reward_until is 0.0: expected a share in"),
        ("algorithm", {"weighting": "dmd"}, "algorithm.weighting is 'dmd': expected one of .*; did you mean 'dmd2'"),
        ("algorithm", {"low": 0.5, "high": 0.5}, "expected 0 < low < high < 1"),
        ("algorithm", {"timestep_strategy": "logitnormal"}, "did you mean 'logit_normal'"),
        ("algorithm", {"max_correction": 0.0}, "DIDRConfig.max_correction: expected a number > 0"),
        ("generator", {"start": 399.0}, "generator.start is 399.0: expected a share"),
        ("train", {"ta_ratio": 0}, "train.ta_ratio is 0"),
        ("train", {"ema": 1.0}, "train.ema is 1.0"),
        ("train", {"ta_lr": float("inf")}, "train.ta_lr is inf: expected more than 0, and finite"),
        ("train", {"max_minutes": 0.0}, "train.max_minutes is 0.0: expected more than 0"),
        ("algorithm", {"timestep_std": float("inf")}, "algorithm.timestep_std is inf"),
        ("algorithm", {"timestep_mean": float("nan")}, "algorithm.timestep_mean is nan: expected a number"),
        ("lora", {"alpha": float("nan")}, "lora.alpha is nan: expected a number"),
        ("train", {"cooldown": 1.5}, "train.cooldown is 1.5: expected a share"),
        ("train", {"towards_start": 1.0}, "train.towards_start is 1.0: expected a share of the way"),
        ("train", {"parameters": "lorra"}, "did you mean 'lora'"),
        ("decode", {"micro_batch": 0}, "decode.micro_batch is 0"),
        ("reward", {"name": "hpsv"}, "unknown reward 'hpsv'; did you mean 'hpsv2'"),
        ("reward", {"weight": 1}, "unknown key reward.weight"),
        ("reward", {"options": {"modle": "x"}}, "unknown key reward.options.modle; did you mean 'model'"),
        ("evaluation", {"suite": "shapes"}, "data.test_prompts is not"),
    ],
)
def test_bad_settings(section: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe("sd3", Path("nowhere"), {section: values})


def test_a_run_whose_rates_fall_keeps_its_length(tmp_path: Path) -> None:
    """Its steps would be others with another end."""
    for cooldown, allowed in ((0.0, True), (0.5, False)):
        recipe = make_recipe("sd3", Path("nowhere"), epochs=4, cooldown=cooldown)
        directory = RunDirectory(tmp_path / f"{cooldown}")
        directory.path.mkdir()
        (directory / "config.yaml").write_text(dump_recipe(recipe))
        longer = make_recipe("sd3", Path("nowhere"), epochs=6, cooldown=cooldown)
        with nullcontext() if allowed else pytest.raises(ConfigError, match="train.epochs was 4, now 6"):
            longer.check_resumed(directory)
