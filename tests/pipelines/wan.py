"""A tiny random Wan: 5 frames of 64x64, 4x2x8x8 latents, an Euler scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from crd_fast.backbones import LoadOptions

FAMILY = "wan"
PIPELINE = WanPipeline
GUIDANCE: float | None = 2.5
OPTIONS = LoadOptions(max_sequence_length=12, resolution=64, frames=5)
TEXT, LATENT = 16, 4


def umt5_tokenizer() -> T5Tokenizer:
    """One token a character."""
    letters = [(chr(c), -3.0) for c in range(33, 127)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters], extra_ids=0)


def save(folder: Path, seed: int = 0, scheduler: Any = None, **settings: Any) -> Path:
    """settings: of the pipeline, such as `expand_timesteps`."""
    torch.manual_seed(seed)
    tokens = umt5_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokens), d_model=TEXT, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=LATENT,
        out_channels=LATENT,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.3, 0.1, 0.2, -0.1],
        latents_std=[1.5, 2.0, 1.2, 0.8],
    )
    WanPipeline(
        transformer=transformer,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokens,
        **settings,
    ).save_pretrained(folder)
    return folder


def sample(
    folder: Path, lora: Path | None, prompts: list[str], start: Tensor, steps: int, guidance: float | None
) -> Tensor:
    """The pipeline's own videos (B, frames, 3, H, W) from `start`, with a LoRA as its users load one."""
    pipeline = WanPipeline.from_pretrained(folder)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts,
        latents=start,
        num_inference_steps=steps,
        guidance_scale=1.0 if guidance is None else guidance,
        max_sequence_length=OPTIONS.max_sequence_length,
        num_frames=OPTIONS.frames,
        height=64,
        width=64,
        output_type="pt",
    ).frames
