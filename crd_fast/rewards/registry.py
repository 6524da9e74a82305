"""Rewards by the name a recipe uses, each with its options as a dataclass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from crd_fast.errors import ConfigError, nearest
from crd_fast.rewards.base import Reward
from crd_fast.rewards.geneval import GenEvalReward
from crd_fast.rewards.jpeg import JpegCompressibility, JpegSettings
from crd_fast.rewards.ocr import OcrReward, OcrSettings, RapidOcrReader
from crd_fast.rewards.shapes import detect_shapes


@dataclass(frozen=True)
class GenEvalOptions:
    """detector: what finds objects ("shapes" is exact on the shapes world); score: see `GenEvalReward`."""

    detector: str = "shapes"
    score: str = "soft"


_DETECTORS = {"shapes": detect_shapes}


def _geneval(options: GenEvalOptions) -> Reward:
    if options.detector not in _DETECTORS:
        raise ConfigError(f"rewards.geneval.detector is {options.detector!r}{nearest(options.detector, _DETECTORS)}")
    return GenEvalReward(_DETECTORS[options.detector], score=options.score)


def _ocr(options: OcrSettings) -> Reward:
    return OcrReward(RapidOcrReader(options))


_REWARDS: dict[str, tuple[type, Callable[[Any], Reward]]] = {
    "geneval": (GenEvalOptions, _geneval),
    "jpeg_compressibility": (JpegSettings, JpegCompressibility),
    "ocr": (OcrSettings, _ocr),
}


def available() -> list[str]:
    """Names a recipe can give under `rewards`."""
    return sorted(_REWARDS)


def options_type(name: str) -> type:
    """The dataclass of a reward's options. Raises ConfigError for an unknown reward, naming the nearest."""
    if name not in _REWARDS:
        raise ConfigError(f"unknown reward {name!r}{nearest(name, _REWARDS)}")
    return _REWARDS[name][0]


def build(name: str, options: Any) -> Reward:
    """The reward of that name with its options."""
    expected = options_type(name)
    if not isinstance(options, expected):
        raise ConfigError(f"options of reward {name!r} are {type(options).__name__}: expected {expected.__name__}")
    return _REWARDS[name][1](options)
