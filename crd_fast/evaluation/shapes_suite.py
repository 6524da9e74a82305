"""Held-out evaluation on the shapes world: rules, reading, and two metrics that are never trained on.

Images start from noise that depends on (seed, image number) alone, so two models are compared on the same seeds. They
are rounded to 8 bits before they are scored: PNGs of them get the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.data.prompts import PromptSet
from crd_fast.errors import DataError, RewardError
from crd_fast.evaluation.frechet import RandomFeatures, frechet_distance
from crd_fast.evaluation.intervals import clustered_bootstrap, macro_interval
from crd_fast.evaluation.pictures import as_stored
from crd_fast.ranks import Ranks
from crd_fast.rewards.geneval import GenEvalReward
from crd_fast.rewards.ocr import OcrReward
from crd_fast.rewards.shapes import detect_shapes
from crd_fast.rollout import generate, initial_noise
from crd_fast.shapes import world
from crd_fast.shapes.detector import cleanliness

FIRST_SAMPLE_ID = 1 << 40  # far from training's, which count up from 0
DECODE_BATCH = 8


@dataclass(frozen=True)
class Evaluated:
    """One model on the suite. `summary` is a side of summary.json; the rest is row by row, N images.

    images (N, 3, 64, 64) in [0, 1]; prompt_ids into the test set; passed: strict score (exact reading for `text`),
    None where it could not be read; scores: every score of an image by name.
    """

    summary: dict[str, Any]
    images: Tensor
    prompt_ids: list[int]
    passed: list[float | None]
    scores: list[dict[str, float]]


def choose_prompts(test: PromptSet, images: int) -> list[int]:
    """Prompt ids of the suite: `images` for each task in the set, all of a task's prompts in turn."""
    by_task: dict[str, list[int]] = {}
    for index, entry in enumerate(test.metadata):
        by_task.setdefault(str(entry.get("tag")), []).append(index)
    unknown = sorted(set(by_task) - set(world.TASKS))
    if unknown:
        raise DataError(f"{test.name} has tasks {unknown}: the shapes suite knows {', '.join(world.TASKS)}")
    return [by_task[task][i % len(by_task[task])] for task in world.TASKS if task in by_task for i in range(images)]


def generate_images(
    backbone: Backbone,
    test: PromptSet,
    conditioning: Conditioning,
    unconditional: Conditioning,
    ranks: Ranks,
    *,
    images: int,
    steps: int,
    guidance_scale: float | None,
    batch: int,
    seed: int,
    on_batch: Callable[[int], None],
) -> Tensor:
    """`images` per task (N, 3, H, W) with whatever parameters are in use; the ranks share the work.

    conditioning: embeddings of the test prompts. on_batch: called with the images that this rank has made.
    """
    chosen = torch.tensor(choose_prompts(test, images))
    mine = ranks.share(len(chosen))
    latents = generate(
        backbone,
        conditioning[chosen[mine].to(backbone.device)],
        initial_noise(backbone, FIRST_SAMPLE_ID + mine, seed),
        steps=steps,
        guidance_scale=guidance_scale,
        unconditional=unconditional,
        batch=batch,
        on_batch=on_batch,
    )
    pictures = torch.cat([as_stored(backbone.decode(piece)) for piece in latents.split(DECODE_BATCH)])
    return ranks.gather(pictures, len(chosen))


def score(pictures: Tensor, test: PromptSet, *, images: int, seed: int) -> Evaluated:
    """Scores of the pictures that `generate_images` made with the same settings.

    GenEval strict and soft per task and their macro means with prompt-clustered 95 % intervals, `ocr`, `frechet` to
    true renders of the same prompts, `clean`.
    """
    chosen = choose_prompts(test, images)
    metadata = [test.metadata[i] for i in chosen]
    side: dict[str, Any] = {"n": len(chosen), "tasks": {}}
    scores: list[dict[str, float]] = [{} for _ in chosen]
    passed = torch.zeros(len(chosen))
    tags = [str(entry["tag"]) for entry in metadata]
    shapes = [i for i, tag in enumerate(tags) if tag != "text"]
    if shapes:
        found = _score_shapes(side, pictures[shapes], [metadata[i] for i in shapes], test, chosen, shapes, seed)
        passed[shapes] = found["strict"]
        _keep(scores, shapes, found)
    signs = [i for i, tag in enumerate(tags) if tag == "text"]
    if signs:
        read = _score_signs(side, pictures[signs], [test.prompts[chosen[i]] for i in signs])
        # not scored, which is not a failure
        passed[signs] = read["ocr_exact"] if read else torch.full((len(signs),), torch.nan)
        _keep(scores, signs, read)
    kept = [None if value != value else value for value in passed.tolist()]
    return Evaluated(side, pictures, chosen, kept, scores)


def _keep(scores: list[dict[str, float]], rows: list[int], found: Mapping[str, Tensor]) -> None:
    for name, values in found.items():
        for row, value in zip(rows, values.tolist(), strict=True):
            scores[row][name] = value


def _score_shapes(
    side: dict[str, Any],
    pictures: Tensor,
    metadata: list[Mapping[str, Any]],
    test: PromptSet,
    chosen: list[int],
    shapes: list[int],
    seed: int,
) -> dict[str, Tensor]:
    prompts = [test.prompts[chosen[i]] for i in shapes]
    scores = GenEvalReward(detect_shapes)(pictures, prompts, metadata)
    for kind in ("strict", "soft"):
        values = {}
        for task in world.GENEVAL_TASKS:
            members = [k for k, entry in enumerate(metadata) if entry["tag"] == task]
            if members:
                values[task] = ([float(scores[kind][k]) for k in members], [prompts[k] for k in members])
                side["tasks"].setdefault(task, {})[kind] = clustered_bootstrap(*values[task]).as_dict()
        macro = macro_interval(values)
        side[f"geneval_{kind}"] = macro.mean
        side[f"geneval_{kind}_interval"] = [macro.low, macro.high]
    rng = np.random.default_rng([seed, 11])
    true = torch.from_numpy(world.render([world.sample_scene(dict(entry), rng) for entry in metadata], rng))
    features = RandomFeatures()
    if len(pictures) > features.dim:
        side["frechet"] = frechet_distance(features(pictures), features(true))
    else:
        side["frechet"] = None
        side.setdefault("reasons", {})["frechet"] = f"needs more than {features.dim} images, got {len(pictures)}"
    clean = cleanliness(pictures)
    side["clean"] = clean.mean().item()
    return {name: scores[name] for name in ("accuracy", "strict", "soft")} | {"clean": clean}


def _score_signs(side: dict[str, Any], pictures: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Scores of images of signs; none where they cannot be read, with the reason in `side`."""
    try:
        scores = OcrReward()(pictures, prompts, [{}] * len(prompts))
    except RewardError as error:
        side["ocr"] = None
        side.setdefault("reasons", {})["ocr"] = str(error)
        return {}
    side["ocr"] = scores["ocr"].mean().item()
    side["tasks"]["text"] = {
        kind: clustered_bootstrap(scores[name].tolist(), prompts).as_dict()
        for kind, name in (("strict", "ocr_exact"), ("soft", "ocr"))
    }
    return scores
