"""Tiny random pipelines of the real classes, for tests of everything above the model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

CONTEXT, LATENT, WIDTH = 32, 4, 32


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-level, without merges: any prompt has tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = [chr(c) for c in range(33, 127)]
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)


def text_encoder(tokens: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            projection_dim=16,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )


def save_sd3(folder: Path, seed: int = 0) -> Path:
    """A StableDiffusion3Pipeline of a few thousand parameters: 64x64 images, 4x8x8 latents, no T5."""
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
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=2,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.1,
        shift_factor=0.05,
    )
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
