"""Which rewards a candidate was trained on, from the config of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from crd_fast.evaluation.candidates import trained_rewards


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rewards": {"ocr": {}, "geneval": {}}}, {"ocr", "geneval"}),
        ({"rewards": {"remote:ocr": {}, "legacy_remote:aesthetic": {}, "remote": {}}}, {"ocr", "aesthetic", "remote"}),
        ({"rewards": {"custom:colorfulness": {}}}, {"custom:colorfulness"}),
        ({"reward": {"name": "shapes_judge", "options": {}}}, {"shapes_judge"}),
        ({"reward": None}, set()),
    ],
)
def test_trained_rewards_have_the_names_that_scorers_have(
    config: dict[str, Any], expected: set[str], tmp_path: Path
) -> None:
    assert trained_rewards((), config) == expected
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"model": {"path": "x"}}))
    (tmp_path / "metrics.jsonl").write_text("")
    assert trained_rewards([tmp_path / "lora" / "pytorch_lora_weights.safetensors"], None) == expected
