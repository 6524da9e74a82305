"""Images of a suite in GenEval's folder layout: shared by the ranks, and continued where an earlier start stopped.

Images are made in batches that settings alone decide, so neither the number of ranks nor an interruption changes a
byte: a batch of which a file is missing or damaged is made again as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.data.prompts import PromptSet
from crd_fast.errors import ConfigError
from crd_fast.evaluation.pictures import is_whole, to_pixels, write_png
from crd_fast.evaluation.shapes_suite import DECODE_BATCH
from crd_fast.evaluation.suites import Item
from crd_fast.lora import LoRABank
from crd_fast.rollout import generate, initial_noise
from crd_fast.snapshots import BASE, TRAINED
from crd_fast.whole_files import write_text

ENCODE_BATCH = 64
T = TypeVar("T")


def batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """The items in the groups they are always worked on in."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def write_metadata(folder: Path, prompts: PromptSet, items: Sequence[Item]) -> None:
    """`<prompt>/metadata.jsonl` of every prompt with an image: its metadata on one line, with the prompt in it."""
    for prompt in sorted({item.prompt for item in items}):
        (folder / f"{prompt:05d}" / "samples").mkdir(parents=True, exist_ok=True)
        entry = {**prompts.metadata[prompt], "prompt": prompts.prompts[prompt]}
        write_text(folder / f"{prompt:05d}" / "metadata.jsonl", json.dumps(entry) + "\n")


def has_all(folder: Path, items: Sequence[Item]) -> bool:
    """Whether every image is there, whole."""
    return all(is_whole(folder / item.file_name) for item in items)


class Images:
    """Makes one rank's share of a suite's images, with one model and adapters of one shape.

    adapted: one of the adapters, as `lora_file.read_adapter` gives it; None where there is none. steps, guidance_scale,
    start_share: of the sampler, see `rollout.generate`. batch: images at a time. seed: with an item's sample id, all
    that its noise depends on. The text encoders are freed once the prompts are embedded.

    Raises ConfigError for a model of videos.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapted: dict[str, Tensor] | None,
        prompts: PromptSet,
        mine: Sequence[Sequence[Item]],
        *,
        steps: int,
        guidance_scale: float | None,
        seed: int,
        start_share: float | None = None,
    ) -> None:
        if backbone.frames is not None:
            raise ConfigError(f"{backbone.family} makes videos, and the suites score images: give another model")
        self._backbone, self._batches = backbone, mine
        self._steps, self._guidance, self._seed, self._start_share = steps, guidance_scale, seed, start_share
        self._embedded = _embed(backbone, prompts, mine)
        backbone.release_text_encoders()
        self._bank = LoRABank.like(backbone.transformer, adapted, backbone.lora_targets)

    def make(self, folder: Path, adapter: dict[str, Tensor] | None, on_images: Callable[[int], None]) -> None:
        """The images under `folder` that are not there whole yet. on_images: called with the number done so far.

        Raises CheckpointError for an adapter of another shape, NonFiniteError for NaN pixels.
        """
        if adapter is not None:
            self._bank.load(adapter)
        done = 0
        with torch.no_grad(), self._bank.merged(BASE if adapter is None else TRAINED):
            for batch in self._batches:
                if not has_all(folder, batch):
                    self._make_batch(folder, batch)
                done += len(batch)
                on_images(done)

    def _make_batch(self, folder: Path, batch: Sequence[Item]) -> None:
        backbone = self._backbone
        latents = generate(
            backbone,
            self._conditioning([1 + item.prompt for item in batch]),
            initial_noise(backbone, torch.tensor([item.sample_id for item in batch]), self._seed),
            steps=self._steps,
            guidance_scale=self._guidance,
            unconditional=self._conditioning([0]),
            start_share=self._start_share,
        )
        for start in range(0, len(batch), DECODE_BATCH):
            rows = slice(start, start + DECODE_BATCH)
            for item, pixels in zip(batch[rows], to_pixels(backbone.decode(latents[rows])), strict=True):
                write_png(folder / item.file_name, pixels)

    def _conditioning(self, texts: Sequence[int]) -> Conditioning:
        """Embeddings of texts by number, on the model's device; 0 is the empty prompt."""
        rows = [divmod(text, ENCODE_BATCH) for text in texts]
        made = Conditioning.cat([self._embedded[group][row : row + 1] for group, row in rows])
        return made.to(self._backbone.device, self._backbone.dtype)


def _embed(
    backbone: Backbone, prompts: PromptSet, mine: Sequence[Sequence[Item]]
) -> dict[int, Conditioning]:  # fmt: skip
    """The groups of texts that the batches need, in host memory; a text is always embedded with the same others."""
    texts = ["", *prompts.prompts]
    needed = {0} | {(1 + item.prompt) // ENCODE_BATCH for batch in mine for item in batch}
    return {
        group: backbone.encode_prompts(texts[group * ENCODE_BATCH : (group + 1) * ENCODE_BATCH]).to(
            torch.device("cpu"), backbone.dtype
        )
        for group in sorted(needed)
    }
