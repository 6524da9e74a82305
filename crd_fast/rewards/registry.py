"""Rewards by the name a recipe uses, each with its options as a dataclass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from crd_fast.errors import ConfigError, nearest
from crd_fast.rewards.aesthetic import Aesthetic, AestheticOptions
from crd_fast.rewards.base import Reward
from crd_fast.rewards.clipscore import ClipScore, ClipScoreOptions
from crd_fast.rewards.custom import CustomOptions, CustomReward
from crd_fast.rewards.geneval import GenEvalReward, Vocabulary
from crd_fast.rewards.geneval_detector import CLASSES, COLORS, ClipColors, Mask2FormerDetector, Mask2FormerOptions
from crd_fast.rewards.hpsv2 import HPSv2, HPSv2Options
from crd_fast.rewards.imagereward import ImageReward, ImageRewardOptions
from crd_fast.rewards.jpeg import JpegCompressibility, JpegSettings
from crd_fast.rewards.ocr import OcrReward, OcrSettings, RapidOcrReader
from crd_fast.rewards.pickscore import PickScore, PickScoreOptions
from crd_fast.rewards.remote.client import RemoteOptions, RemoteReward
from crd_fast.rewards.remote.legacy import LegacyOptions, LegacyReward
from crd_fast.rewards.shapes import detect_shapes
from crd_fast.rewards.shapes_judge import ShapesJudge, ShapesJudgeOptions
from crd_fast.shapes import world


@dataclass(frozen=True)
class GenEvalOptions(Mask2FormerOptions):
    """detector: what finds objects; score: see `GenEvalReward`.

    The detector "shapes" is exact on the shapes world. "mask2former" is the benchmark's, with the other options.
    """

    detector: str = "shapes"
    score: str = "soft"

    def __post_init__(self) -> None:
        super().__post_init__()
        own = [f.name for f in fields(Mask2FormerOptions) if getattr(self, f.name) != f.default]
        if own and self.detector == "shapes":
            raise ConfigError(
                f"rewards.geneval.{own[0]} is set, but the detector 'shapes' has no model: set the detector "
                "to 'mask2former', or leave it out"
            )


# name -> what finds objects, what names their colours where that is not the same, and the names that there are
_DETECTORS: dict[str, Callable[[GenEvalOptions], tuple[Callable[..., Any], Callable[..., Any] | None, Vocabulary]]] = {
    "mask2former": lambda options: (Mask2FormerDetector(options), ClipColors(options), Vocabulary(CLASSES, COLORS)),
    "shapes": lambda options: (detect_shapes, None, Vocabulary(world.SHAPES, tuple(world.COLORS))),
}


def _geneval(options: GenEvalOptions) -> Reward:
    if options.detector not in _DETECTORS:
        raise ConfigError(f"rewards.geneval.detector is {options.detector!r}{nearest(options.detector, _DETECTORS)}")
    detector, colors, vocabulary = _DETECTORS[options.detector](options)
    return GenEvalReward(detector, score=options.score, colors=colors, vocabulary=vocabulary)


def _ocr(options: OcrSettings) -> Reward:
    return OcrReward(RapidOcrReader(options))


_REWARDS: dict[str, tuple[type, Callable[[Any], Reward]]] = {
    "aesthetic": (AestheticOptions, Aesthetic),
    "clipscore": (ClipScoreOptions, ClipScore),
    "custom": (CustomOptions, CustomReward),
    "geneval": (GenEvalOptions, _geneval),
    "hpsv2": (HPSv2Options, HPSv2),
    "imagereward": (ImageRewardOptions, ImageReward),
    "jpeg_compressibility": (JpegSettings, JpegCompressibility),
    "legacy_remote": (LegacyOptions, LegacyReward),
    "ocr": (OcrSettings, _ocr),
    "pickscore": (PickScoreOptions, PickScore),
    "remote": (RemoteOptions, RemoteReward),
    "shapes_judge": (ShapesJudgeOptions, ShapesJudge),
}

_SEVERAL: dict[str, Callable[[Any, str], Reward]] = {
    "custom": CustomReward,
    "legacy_remote": LegacyReward,
    "remote": RemoteReward,
}


@dataclass(frozen=True)
class Placement:
    """Where a reward runs beside a rollout: "process", "thread", or "here", on the caller's own thread.

    tried: whether one image is scored before a run begins; a server has been asked when its reward was built.
    """

    kind: str
    workers: int = 1
    tried: bool = True


def placement(name: str, options: Any) -> Placement:
    """Where the reward of that name runs: reading text in processes, waiting for a server in threads, and code of the
    user's own where it says."""
    if isinstance(options, OcrSettings) and options.workers > 0:
        return Placement("process", options.workers)
    if isinstance(options, RemoteOptions | LegacyOptions):
        return Placement("thread", tried=False)
    if isinstance(options, CustomOptions):
        return Placement(options.runs, options.workers)
    return Placement("here")


def build_for_worker(name: str, options: Any) -> Reward:
    """`build` for one of several processes: it does not share its work out again."""
    return build(name, replace(options, workers=0) if isinstance(options, OcrSettings) else options)


def available() -> list[str]:
    """Names a recipe can give under `rewards`."""
    return sorted(_REWARDS)


def options_type(name: str) -> type:
    """The dataclass of a reward's options. Raises ConfigError for an unknown reward, naming the nearest."""
    if _kind(name) not in _REWARDS:
        raise ConfigError(f"unknown reward {name!r}{nearest(name, _REWARDS)}")
    return _REWARDS[_kind(name)][0]


def _kind(name: str) -> str:
    """What "remote:ocr" is: "remote". A run can have several of these, told apart by what follows the colon."""
    kind, _, label = name.partition(":")
    return kind if label and kind in _SEVERAL else name


def build(name: str, options: Any) -> Reward:
    """The reward of that name with its options."""
    expected = options_type(name)
    if not isinstance(options, expected):
        raise ConfigError(f"options of reward {name!r} are {type(options).__name__}: expected {expected.__name__}")
    if _kind(name) in _SEVERAL:
        return _SEVERAL[_kind(name)](options, name)
    return _REWARDS[name][1](options)
