"""A tiny random Stable Diffusion XL: 64x64 images, 4x8x8 latents, SDXL's own noise schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from crd_fast.backbones import LoadOptions
from tests.pipelines.common import autoencoder, text_encoder, tokenizer

FAMILY = "sdxl"
PIPELINE = StableDiffusionXLPipeline
GUIDANCE: float | None = 2.5
OPTIONS = LoadOptions()
CONTEXT, POOLED, LATENT, TIME = 32, 16, 4, 8
# of the published scheduler
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def save(
    folder: Path, seed: int = 0, scheduler: Any = None, time_cond_proj_dim: int | None = None, **settings: Any
) -> Path:
    """time_cond_proj_dim: of a U-Net that is told its guidance; settings: of the pipeline."""
    torch.manual_seed(seed)
    tokens = tokenizer(folder / "words")
    second = text_encoder(tokens)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT,
        out_channels=LATENT,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=CONTEXT,
        use_linear_projection=True,
        time_cond_proj_dim=time_cond_proj_dim,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME,
        projection_class_embeddings_input_dim=POOLED + 6 * TIME,
    )
    vae = autoencoder(LATENT, scaling_factor=0.13025)
    StableDiffusionXLPipeline(
        unet=unet,
        scheduler=scheduler or EulerDiscreteScheduler(**SCHEDULE),
        vae=vae,
        text_encoder=CLIPTextModel(second.config),
        tokenizer=tokens,
        text_encoder_2=second,
        tokenizer_2=tokens,
        add_watermarker=False,
        **settings,
    ).save_pretrained(folder)
    return folder


def sample(
    folder: Path, lora: Path | None, prompts: list[str], start: Tensor, steps: int, guidance: float | None
) -> Tensor:
    """The pipeline's own images (B, 3, H, W) from `start`, with a LoRA as its users load one."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts,
        latents=start,
        num_inference_steps=steps,
        guidance_scale=1.0 if guidance is None else guidance,
        height=64,
        width=64,
        output_type="pt",
    ).images
