from __future__ import annotations

from typing import Any

import pytest
import torch

from crd_fast.errors import RewardError
from crd_fast.evaluation import shapes_suite


def test_signs_that_could_not_be_read_are_not_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreadable:
        def __call__(self, *arguments: Any) -> dict[str, torch.Tensor]:
            raise RewardError("rapidocr is not installed")

    monkeypatch.setattr(shapes_suite, "OcrReward", Unreadable)
    side: dict[str, Any] = {"tasks": {}}
    scores = shapes_suite._score_signs(side, torch.full((2, 3, 64, 64), 0.5), ['a sign "42"', 'a sign "17"'])
    assert scores == {}
    assert side["ocr"] is None and side["reasons"] == {"ocr": "rapidocr is not installed"}
    assert side["tasks"] == {}
