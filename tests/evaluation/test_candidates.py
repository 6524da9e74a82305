"""Which rewards a candidate was trained on, from the config of its run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from crd_fast.evaluation.candidates import Candidate, trained_rewards


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rewards": {"ocr": {}, "geneval": {}}}, {"ocr", "geneval"}),
        ({"rewards": {"remote": {"reward": "ocr"}, "remote:a": {"reward": "hpsv2"}}}, {"ocr", "hpsv2"}),
        ({"rewards": {"legacy_remote:ocr": {"server": "geneval"}, "ocr": {"weight": 0}}}, {"geneval"}),
        ({"rewards": {"ocr": {"weight": 0.0}, "hpsv2": {"weight": 0.5}, "geneval": None}}, {"hpsv2", "geneval"}),
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


def test_a_digest_is_of_the_file_that_was_looked_at_first(tmp_path: Path) -> None:
    """A run that goes on removes checkpoints that are being evaluated."""
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    candidate = Candidate("epoch-1", tmp_path, file)
    digest = candidate.digest
    file.unlink()
    assert candidate.digest == digest == hashlib.sha256(b"weights").hexdigest()
