"""Images of the one-step generator, and of its reference in many steps, from the same noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from crd_fast.backbones.base import Conditioning
from crd_fast.didr.networks import Networks, OneStep
from crd_fast.didr.recipe import DIDRRecipe
from crd_fast.evaluation.pictures import as_stored
from crd_fast.evaluation.shapes_suite import DECODE_BATCH, FIRST_SAMPLE_ID
from crd_fast.ranks import Ranks
from crd_fast.rollout import generate, initial_noise
from crd_fast.snapshots import BASE

Advance = Callable[[int], None]
"""Called with the images that this rank has made."""


class Painter:
    """Image i starts from noise that depends on (seed, i) alone; the ranks share the work.

    conditioning: embeddings of the prompts; unconditional: of one empty prompt.
    """

    def __init__(
        self,
        recipe: DIDRRecipe,
        networks: Networks,
        generator: OneStep,
        conditioning: Conditioning,
        unconditional: Conditioning,
        ranks: Ranks,
    ) -> None:
        self.recipe, self.networks, self.generator = recipe, networks, generator
        self.conditioning, self.unconditional, self.ranks = conditioning, unconditional, ranks

    @torch.no_grad()
    def one_step(self, slot: str, prompt_ids: list[int], advance: Advance) -> Tensor:
        """Images (N, 3, H, W) in [0, 1], as 8 bits hold them, of a slot of the generator."""
        start, prompts = self._begin(prompt_ids)
        size = self.recipe.evaluation.batch
        pieces = []
        for begin in range(0, len(start), size):
            rows = slice(begin, begin + size)
            pieces.append(self.generator.sample(slot, start[rows], prompts[rows]))
            advance(min(begin + size, len(start)))
        return self._finish(torch.cat(pieces), len(prompt_ids))

    def many_steps(self, prompt_ids: list[int], advance: Advance, guidance_scale: float | None) -> Tensor:
        """Images (N, 3, H, W) of the frozen reference, as its own pipeline samples."""
        settings, networks = self.recipe.evaluation, self.networks
        start, prompts = self._begin(prompt_ids)
        with networks.sets.rollout(networks.backbone, BASE):
            latents = generate(
                networks.backbone,
                prompts,
                start,
                steps=settings.steps,
                guidance_scale=guidance_scale,
                unconditional=self.unconditional,
                batch=settings.batch,
                on_batch=advance,
            )
        return self._finish(latents, len(prompt_ids))

    def _begin(self, prompt_ids: list[int]) -> tuple[Tensor, Conditioning]:
        backbone = self.networks.backbone
        mine = self.ranks.share(len(prompt_ids))
        start = initial_noise(backbone, FIRST_SAMPLE_ID + mine, self.recipe.run.seed)
        return start, self.conditioning[torch.tensor(prompt_ids)[mine].to(backbone.device)]

    def _finish(self, latents: Tensor, count: int) -> Tensor:
        backbone = self.networks.backbone
        pictures = torch.cat([as_stored(backbone.decode(piece)) for piece in latents.split(DECODE_BATCH)])
        return self.ranks.gather(pictures, count)
