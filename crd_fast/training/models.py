"""The model of a recipe, loaded, and its prompts, embedded once for all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from crd_fast import backbones
from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.ranks import Ranks
from crd_fast.training.config import ModelSettings
from crd_fast.training.embeddings import embed, model_key

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_backbone(settings: ModelSettings, dtype: str, device: torch.device, key: str = "model.path") -> Backbone:
    """The model behind its family's adapter. dtype: a key of `DTYPES`; key: what messages call the path.

    Raises ConfigError as `backbones.load` does.
    """
    options = backbones.LoadOptions(
        device=device,
        dtype=DTYPES[dtype],
        max_sequence_length=settings.max_sequence_length,
        resolution=settings.resolution,
        frames=settings.frames,
        distilled_guidance=settings.distilled_guidance,
    )
    return backbones.load(settings.path, settings.family, options, key=key)


def load_generator(path: str, reference: Backbone, settings: ModelSettings, dtype: str) -> Backbone:
    """A model that takes the reference's place: another pipeline's, or one that was saved without its pipeline.

    path: pipeline folder, hub id, or folder of a model alone such as a run of full fine-tuning leaves. settings, dtype:
    of the reference. Raises ConfigError as `load_backbone` does.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        return reference.with_model(str(folder))
    loaded = load_backbone(replace(settings, path=path), dtype, reference.device, "generator.path")
    loaded.release_text_encoders()
    loaded.pipeline.vae = None
    return loaded


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
