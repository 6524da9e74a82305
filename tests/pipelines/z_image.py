"""A tiny random Z-Image: 64x64 images, 4x8x8 latents; captions of one and of two units of padding."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from crd_fast.backbones import LoadOptions
from tests.pipelines.common import autoencoder
from tests.pipelines.qwen_image import tokenizer

FAMILY = "z_image"
PIPELINE = ZImagePipeline
GUIDANCE: float | None = 1.5
OPTIONS = LoadOptions(max_sequence_length=64, resolution=64)
CONTEXT, LATENT, WIDTH = 16, 4, 32
# the empty prompt has less than 32 tokens, "2 squares" more
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\nA plain line drawing of {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is false %}<think></think>{% endif %}"
)


def text_encoder(tokens: Qwen2Tokenizer) -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokens),
            hidden_size=CONTEXT,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=tokens.eos_token_id,
        )
    )


def save(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    tokens = tokenizer(CHAT)
    transformer = ZImageTransformer2DModel(
        in_channels=LATENT,
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=CONTEXT,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 16, 16],
    )
    for padding in (transformer.x_pad_token, transformer.cap_pad_token):  # zero until they are trained
        torch.nn.init.normal_(padding)
    vae = autoencoder(LATENT, scaling_factor=0.9, shift_factor=0.05)
    ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoder(tokens),
        tokenizer=tokens,
    ).save_pretrained(folder)
    return folder


def sample(
    folder: Path, lora: Path | None, prompts: list[str], start: Tensor, steps: int, guidance: float | None
) -> Tensor:
    """The pipeline's own images (B, 3, H, W) from `start`, with a LoRA as its users load one."""
    pipeline = ZImagePipeline.from_pretrained(folder)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        list(prompts),  # it writes into the list that it is given
        latents=start.squeeze(2),
        num_inference_steps=steps,
        guidance_scale=0.0 if guidance is None else guidance,
        max_sequence_length=OPTIONS.max_sequence_length,
        height=64,
        width=64,
        output_type="pt",
    ).images
