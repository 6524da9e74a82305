"""The suites of `crd-fast eval`: which prompts, how many images, which scores, and what others have published."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crd_fast.data.prompts import PromptSet, load_prompts
from crd_fast.errors import ConfigError, DataError, nearest
from crd_fast.evaluation import shapes_suite
from crd_fast.rewards.base import QUOTED_TEXT


@dataclass(frozen=True)
class Reference:
    """Published numbers, as printed: column -> value, and the paper."""

    method: str
    values: Mapping[str, str]
    source: str


@dataclass(frozen=True)
class Suite:
    """Defaults follow the papers: Stable Diffusion 3.5 Medium at 512 x 512 pixels in 40 steps.

    scorers: rewards by name, with `options` where they differ from the reward's own defaults; empty where the suite
    scores whole sets by itself. headline: the columns that stand first, with their titles; other columns keep their
    names. requires: as a reward's. images: per prompt, of the shapes suite per task. resolution: None is the model's
    own. official: how many prompts the benchmark has.
    """

    name: str
    title: str
    scorers: tuple[str, ...]
    headline: Mapping[str, str]
    images: int
    steps: int = 40
    resolution: int | None = 512
    requires: frozenset[str] = frozenset()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prompts: str | None = None
    official: int | None = None
    where: str = ""
    lower_is_better: frozenset[str] = frozenset()
    references: tuple[Reference, ...] = ()


_CRD = "arXiv 2603.14128"
_FLOW_GRPO = "arXiv 2505.05470"
_NFT = "arXiv 2509.16117"


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "shapes",
            "Shapes world, held-out prompts",
            (),
            {
                "geneval/strict": "strict",
                "geneval/soft": "soft",
                "ocr": "OCR",
                "frechet": "Fréchet",
                "clean": "clean",
            },
            images=60,
            steps=20,
            resolution=None,
            prompts="recipes/prompts/shapes_test.jsonl",
            where="it is in this project's repository",
            lower_is_better=frozenset({"frechet"}),
        ),
        Suite(
            "geneval",
            "GenEval, mean of the six tasks",
            ("geneval",),
            {"geneval": "GenEval", "geneval/strict": "strict", "geneval/soft": "soft"},
            images=4,
            requires=frozenset({"include"}),
            options={"geneval": {"detector": "mask2former", "score": "accuracy"}},
            official=553,
            where="prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval",
            references=(
                Reference("SD3.5-M with guidance", {"geneval": ".63"}, _NFT),
                Reference("Flow-GRPO", {"geneval": ".95"}, _FLOW_GRPO),
                Reference("DiffusionNFT, GenEval only", {"geneval": ".98"}, _NFT),
                Reference("DiffusionNFT, several rewards", {"geneval": ".94"}, _NFT),
                Reference("CRD", {"geneval": ".93"}, _CRD),
            ),
        ),
        Suite(
            "ocr",
            "Text rendering, mean share of the quoted text",
            ("ocr",),
            {"ocr": "OCR", "ocr/ocr_exact": "exact"},
            images=1,
            requires=frozenset({QUOTED_TEXT}),
            official=1018,
            where="dataset/ocr/test.txt of github.com/yifan123/flow_grpo",
            references=(
                Reference("SD3.5-M with guidance", {"ocr": ".59"}, _NFT),
                Reference("Flow-GRPO", {"ocr": ".92"}, _FLOW_GRPO),
                Reference("DiffusionNFT, several rewards", {"ocr": ".91"}, _NFT),
                Reference("CRD", {"ocr": ".92"}, _CRD),
            ),
        ),
        Suite(
            "drawbench",
            "DrawBench, preference scores",
            ("pickscore", "clipscore", "aesthetic", "imagereward", "hpsv2"),
            {
                "pickscore": "PickScore",
                "clipscore": "CLIPScore",
                "aesthetic": "Aesthetic",
                "imagereward": "ImageReward",
                "hpsv2": "HPSv2.1",
            },
            images=1,
            official=200,
            where="dataset/drawbench/test.txt of github.com/yifan123/flow_grpo",
            references=(
                Reference("SD3.5-M with guidance", {"pickscore": "22.34"}, _NFT),
                Reference("DiffusionNFT, several rewards", {"pickscore": "23.80"}, _NFT),
                Reference("CRD", {"pickscore": "23.27", "aesthetic": "5.44"}, _CRD),
            ),
        ),
    )
}


def suite_named(name: str) -> Suite:
    """Raises ConfigError for an unknown suite, naming the nearest."""
    if name not in SUITES:
        raise ConfigError(f"suite is {name!r}{nearest(name, SUITES)}")
    return SUITES[name]


def suite_prompts(suite: Suite, file: str | None) -> PromptSet:
    """The suite's prompts, checked for what its scores need.

    Raises ConfigError when no file is given and none comes with this project, DataError for what is in it.
    """
    chosen = file or suite.prompts
    if chosen is None or (file is None and not Path(chosen).is_file()):
        missing = f"{chosen} is not here: {suite.where}" if chosen else f"get {suite.where}"
        raise ConfigError(f"suite {suite.name} needs its prompts: give --prompts FILE; {missing}")
    prompts = load_prompts(chosen)
    prompts.require(suite.requires)
    return prompts


@dataclass(frozen=True)
class Item:
    """One image to make: the `k`-th of prompt number `prompt`. sample_id: what its noise depends on, with the seed."""

    prompt: int
    k: int
    sample_id: int

    @property
    def file_name(self) -> str:
        """Where it lies in GenEval's folder layout."""
        return f"{self.prompt:05d}/samples/{self.k:05d}.png"


def plan(suite: Suite, prompts: PromptSet, images: int, seed: int) -> list[Item]:
    """Every image of the suite, in order. Which ranks make them, and in how many starts, does not enter.

    images: per prompt; of the shapes suite per task. Raises DataError for shapes prompts without a known task.
    """
    if images < 1:
        raise DataError(f"images is {images}: expected at least 1")
    if suite.name == "shapes":
        counts = [0] * len(prompts)
        items = []
        for position, prompt in enumerate(shapes_suite.choose_prompts(prompts, images)):
            items.append(Item(prompt, counts[prompt], shapes_suite.FIRST_SAMPLE_ID + position))
            counts[prompt] += 1
        return items
    return [Item(p, k, _sample_id(seed, p, k)) for p in range(len(prompts)) for k in range(images)]


def _sample_id(seed: int, prompt: int, k: int) -> int:
    """A number in [0, 2^62) from (base seed, prompt, k): far from training's ids, which count up from 0."""
    digest = hashlib.sha256(f"{seed}/{prompt}/{k}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
