"""The real engine reads sixty words in three fonts, clean and hard."""

from __future__ import annotations

import pytest

from crd_fast.rewards.base import score_batch
from crd_fast.rewards.ocr import OcrReward
from tests.rewards.written_words import pictures

pytest.importorskip("rapidocr", reason="reading needs crd-fast[rewards]")


@pytest.mark.parametrize("hard", [False, True], ids=["clean", "hard"])
def test_of_sixty_words_at_most_one_is_misread(hard: bool) -> None:
    images, prompts = pictures(hard)
    scores = score_batch(OcrReward(), images, prompts, [{}] * len(prompts))
    misread = [p for p, exact in zip(prompts, scores["ocr_exact"].tolist(), strict=True) if not exact]
    assert len(images) == 60 and len(misread) <= 1, misread
