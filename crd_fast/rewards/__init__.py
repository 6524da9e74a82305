"""Rewards: scorers of images, and how their scores become advantages."""

from __future__ import annotations

from crd_fast.rewards.aggregate import AdvantageResult, RewardSpec, RewardStats, advantages
from crd_fast.rewards.base import QUOTED_TEXT, Reward, check_images, check_scores, score_batch
from crd_fast.rewards.geneval import Detection, GenEvalReward, GenEvalScore, evaluate
from crd_fast.rewards.ocr import OcrReward, OcrSettings, RapidOcrReader, quoted_text

__all__ = [
    "QUOTED_TEXT",
    "AdvantageResult",
    "Detection",
    "GenEvalReward",
    "GenEvalScore",
    "OcrReward",
    "OcrSettings",
    "RapidOcrReader",
    "Reward",
    "RewardSpec",
    "RewardStats",
    "advantages",
    "check_images",
    "check_scores",
    "evaluate",
    "quoted_text",
    "score_batch",
]
