"""A reward's scores of many images on disk, in parts that are there whole or not at all, made by any rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crd_fast.evaluation.scoring import Scores, score_files
from crd_fast.rewards.base import Metadata, Reward
from crd_fast.whole_files import write_text


class ScoreStore:
    """`<folder>/<part>.json`: the scores of one part of the images, with the version and the images they belong to.

    parts: the images of each part, as indices into `files`. A part whose version or images have changed is scored
    again, and so is one that the reward could not be used for.
    """

    def __init__(self, folder: Path, version: dict[str, Any], parts: Sequence[Sequence[int]], files: Sequence[Path]):
        self.version = version
        self._folder, self._parts, self._files = folder, parts, files

    def fill(
        self,
        reward: Reward,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        rank: int,
        world: int,
        on_images: Callable[[int], None],
    ) -> None:
        """Score this rank's parts that are not there. The first that the reward cannot be used for ends it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for number in range(rank, len(self._parts), world):
            part = self._parts[number]
            images = [_digest(self._files[row]) for row in part]
            found = self._load(number)
            if found is None or found["images"] != images or found["reason"] is not None:
                scores = score_files(
                    reward,
                    [self._files[row] for row in part],
                    [prompts[row] for row in part],
                    [metadata[row] for row in part],
                    len(part),
                )
                self._keep(number, images, scores)
                if scores.reason is not None:
                    return
            on_images(min(part[-1] + 1 + (world - 1) * len(part), len(self._files)))

    def read(self) -> Scores:
        """The scores of all images, once every rank has filled its parts. What only says why there are none goes."""
        parts = [self._load(number) for number in range(len(self._parts))]
        reasons = {number: found["reason"] for number, found in enumerate(parts) if found and found["reason"]}
        for number in reasons:
            self._path(number).unlink()
        if reasons:
            return Scores(reason=reasons[min(reasons)])
        scores = Scores()
        for part, found in zip(self._parts, parts, strict=True):
            if found is None:
                return Scores(reason="a part of the scores is missing: start the same command again")
            for key, values in found["values"].items():
                column = scores.values.setdefault(key, [None] * len(self._files))
                for row, value in zip(part, values, strict=True):
                    column[row] = value
            scores.failures |= {part[int(index)]: why for index, why in found["failures"].items()}
        return scores

    def _keep(self, number: int, images: list[str], scores: Scores) -> None:
        kept = {
            "version": self.version,
            "images": images,
            "values": scores.values,
            "failures": {str(index): why for index, why in sorted(scores.failures.items())},
            "reason": scores.reason,
        }
        write_text(self._path(number), json.dumps(kept, sort_keys=True) + "\n")

    def _load(self, number: int) -> dict[str, Any] | None:
        """A part as it was kept; None where it is missing, damaged or of another version."""
        try:
            found = json.loads(self._path(number).read_text())
            return found if found["version"] == self.version and {"images", "values", "reason"} <= set(found) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.json"


def _digest(file: Path) -> str:
    """Of an image file; of a missing one, nothing."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
