"""The model of a recipe, loaded, and its prompts, embedded once for all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from crd_fast import backbones
from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.ranks import Ranks
from crd_fast.training.config import ModelSettings
from crd_fast.training.embeddings import embed, model_key

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_backbone(settings: ModelSettings, dtype: str, device: torch.device) -> Backbone:
    """The model behind its family's adapter. dtype: a key of `DTYPES`. Raises ConfigError as `backbones.load` does."""
    options = backbones.LoadOptions(
        device=device,
        dtype=DTYPES[dtype],
        max_sequence_length=settings.max_sequence_length,
        resolution=settings.resolution,
        frames=settings.frames,
        distilled_guidance=settings.distilled_guidance,
    )
    return backbones.load(settings.path, settings.family, options)


def embed_prompts(
    backbone: Backbone, settings: ModelSettings, prompts: Sequence[str], folder: Path, ranks: Ranks
) -> Conditioning:
    """Embeddings of the prompts, which the first rank makes and the others find. The text encoders are released."""
    key = model_key(settings.path, settings.max_sequence_length, backbone.dtype)
    with ranks.together("embedding the prompts"):
        if ranks.first:
            embed(backbone, prompts, folder, key)
    embedded = embed(backbone, prompts, folder, key)
    backbone.release_text_encoders()
    return embedded
