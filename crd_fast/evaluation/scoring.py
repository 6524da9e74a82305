"""Scores of images on disk: a reward's numbers, what failed and why, and which versions made them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata as distributions
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crd_fast import settings
from crd_fast.data.prompts import PromptSet, load_prompts
from crd_fast.errors import CrdFastError, DataError, RewardError
from crd_fast.evaluation.pictures import read_image
from crd_fast.rewards import registry
from crd_fast.rewards.base import Metadata, PartialRewardError, Reward, check_images, score_batch
from crd_fast.rewards.custom import code_digests

# what a reward raises that cannot be used here: no package, no model, no memory
UNUSABLE = (CrdFastError, ImportError, OSError, torch.OutOfMemoryError)
_PACKAGES = {"ocr": ("rapidocr", "onnxruntime")}  # of other rewards: torch and transformers


@dataclass
class Scores:
    """One reward's scores of N images: `values` by key, the score itself under the reward's name.

    A value is None where the image could not be scored, and `failures` says why. reason: why the reward could not be
    used at all; nothing else is there then.
    """

    values: dict[str, list[float | None]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    reason: str | None = None


def build_options(name: str, given: Mapping[str, Any]) -> Any:
    """The options of the registered reward `name`. Raises ConfigError for an unknown reward, key or wrong value."""
    return settings.build(registry.options_type(name), given, name)


def version_of(name: str, options: Any) -> dict[str, Any]:
    """What a reward's numbers depend on besides the images: its options and the packages it is made of."""
    packages = {}
    for package in ("crd-fast", *_PACKAGES.get(name, ("torch", "transformers"))):
        try:
            packages[package] = distributions.version(package)
        except distributions.PackageNotFoundError:
            packages[package] = "not installed"
    version = {"options": settings.plain(dataclasses.asdict(options)), "packages": packages}
    code = code_digests({name: options})
    return version | ({"code": code[name]} if code else {})


def score_files(
    reward: Reward,
    files: Sequence[Path],
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
    batch: int,
    on_images: Callable[[int], None] = lambda done: None,
) -> Scores:
    """A reward's scores of image files, `batch` at a time. on_images: called with the number done.

    A file that cannot be read or is all black, and an item that the reward cannot score, are failures of their own. A
    reward that raises without naming an item has failed at all items of the batch; where that is the first batch, the
    reward cannot be used, and the rest is not tried.
    """
    scores = Scores()
    for start in range(0, len(files), batch):
        rows = range(start, min(start + batch, len(files)))
        images: dict[int, Tensor] = {}
        for row in rows:
            try:
                image = read_image(files[row])
                check_images(image[None])
                images[row] = image
            except (DataError, RewardError) as error:
                scores.failures[row] = str(error)
        # images of one size go together
        for _, group in groupby(images, key=lambda row: images[row].shape):
            members = list(group)
            reason = _score(reward, images, members, prompts, metadata, scores, len(files))
            if reason is not None and not scores.values:
                return Scores(reason=reason)
            if reason is not None:
                scores.failures |= dict.fromkeys(members, reason)
        on_images(rows.stop)
    if not scores.values:
        scores.values[reward.name] = [None] * len(files)
    return scores


def _score(
    reward: Reward,
    images: Mapping[int, Tensor],
    rows: list[int],
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
    scores: Scores,
    total: int,
) -> str | None:
    """Put the scores of `rows` in their place; returns why there are none."""
    batch = torch.stack([images[row] for row in rows])
    try:
        found = score_batch(reward, batch, [prompts[row] for row in rows], [metadata[row] for row in rows])
    except PartialRewardError as error:
        found = error.scores
        scores.failures |= {rows[item]: why for item, why in error.failures.items()}
    except UNUSABLE as error:
        return str(error)
    for key, values in found.items():
        column = scores.values.setdefault(key, [None] * total)
        for row, value in zip(rows, values.tolist(), strict=True):
            column[row] = value if math.isfinite(value) else None
    return None


def folder_prompts(folder: Path) -> tuple[PromptSet, list[Path]]:
    """Prompts and image files of a folder with `metadata.jsonl`, rows {"file_name", "prompt", ...}, in its order.

    The file may lie one folder up, where `before` and `after` of a run's `samples` share one.

    Raises DataError for a missing file, a row without a name, or a name that leads out of the folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: expected images and metadata.jsonl in it")
    own, shared = folder / "metadata.jsonl", folder.resolve().parent / "metadata.jsonl"
    prompts = load_prompts(shared if shared.is_file() and not own.is_file() else own)
    files = []
    for index, entry in enumerate(prompts.metadata):
        name = entry.get("file_name")
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts or not name:
            raise DataError(
                f"{prompts.where(index)}: 'file_name' is {name!r}: expected the name of an image in {folder}"
            )
        files.append(folder / name)
    return prompts, files
