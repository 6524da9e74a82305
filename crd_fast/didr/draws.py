"""Everything random of a step: noise, times and prompts, by the number of the step alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.data.prompts import shuffled_slice
from crd_fast.didr.noising import Seeds
from crd_fast.didr.recipe import DIDRRecipe
from crd_fast.didr.timesteps import sample_times
from crd_fast.ranks import Ranks
from crd_fast.rollout import initial_noise
from crd_fast.schedules import RectifiedFlow


@dataclass(frozen=True)
class Draw:
    """Everything random of one micro-batch of B samples.

    z (B, *latent) unit Gaussian; eps: the noise that is added to samples, by its seeds; t (B,) noise levels on the CPU;
    shares (B,) of the training time range that they are; prompt_ids (B,) on the CPU.
    """

    z: Tensor
    eps: Seeds
    t: Tensor
    shares: Tensor
    prompt_ids: Tensor
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.t)


def draw_step(
    recipe: DIDRRecipe, backbone: Backbone, conditioning: Conditioning, number: int, ranks: Ranks
) -> list[Draw]:
    """This rank's micro-batches of step `number`. A sample's noise depends on the seed and its own number alone.

    conditioning: embeddings of all prompts.

    Raises ConfigError when the batch does not divide into micro-batches over the ranks.
    """
    train, algorithm, seed, device = recipe.train, recipe.algorithm, recipe.run.seed, backbone.device
    prompt_ids = shuffled_slice(len(conditioning), train.batch, number, seed)
    shares = sample_times(
        train.batch,
        schedule=RectifiedFlow(),
        seed=seed,
        step=number,
        strategy=algorithm.timestep_strategy,
        mean=algorithm.timestep_mean,
        std=algorithm.timestep_std,
        shift=algorithm.timestep_shift,
        low=algorithm.low,
        high=algorithm.high,
    )
    sample_ids = number * train.batch + torch.arange(train.batch)
    draws = []
    for micro in range(train.micro_batches(ranks.world)):
        begin = (micro * ranks.world + ranks.rank) * train.micro_batch
        rows = slice(begin, begin + train.micro_batch)
        z = initial_noise(backbone, sample_ids[rows], seed)
        draws.append(
            Draw(
                z=z,
                eps=Seeds(seed, sample_ids[rows].to(device)),
                t=backbone.sigma_at(shares[rows]),
                shares=shares[rows],
                prompt_ids=prompt_ids[rows],
                conditioning=conditioning[prompt_ids[rows].to(device)],
            )
        )
    return draws
