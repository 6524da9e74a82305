"""A tiny random Stable Diffusion 3: 64x64 images, 4x8x8 latents, no T5."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from crd_fast.backbones import LoadOptions
from tests.pipelines.common import autoencoder, text_encoder, tokenizer

FAMILY = "sd3"
PIPELINE = StableDiffusion3Pipeline
GUIDANCE: float | None = 2.5
OPTIONS = LoadOptions(max_sequence_length=1)
CONTEXT, LATENT, WIDTH = 32, 4, 32


def save(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    tokens = tokenizer(folder / "words")
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT,
        out_channels=LATENT,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        joint_attention_dim=CONTEXT,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=CONTEXT,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    vae = autoencoder(LATENT, scaling_factor=1.1, shift_factor=0.05)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5),
        vae=vae,
        text_encoder=text_encoder(tokens),
        tokenizer=tokens,
        text_encoder_2=text_encoder(tokens),
        tokenizer_2=tokens,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)
    return folder


def sample(
    folder: Path, lora: Path | None, prompts: list[str], start: Tensor, steps: int, guidance: float | None
) -> Tensor:
    """The pipeline's own images (B, 3, H, W) from `start`, with a LoRA as its users load one."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts,
        latents=start,
        num_inference_steps=steps,
        guidance_scale=1.0 if guidance is None else guidance,
        max_sequence_length=OPTIONS.max_sequence_length,
        height=64,
        width=64,
        output_type="pt",
    ).images
