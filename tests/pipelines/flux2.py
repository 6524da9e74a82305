"""A tiny random FLUX.2 klein: 64x64 images, 4x8x8 latents as 16 tokens, a base model with guidance."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from crd_fast.backbones import LoadOptions
from tests.pipelines.flux1 import strengthen

FAMILY = "flux2"
PIPELINE = Flux2KleinPipeline
GUIDANCE: float | None = 2.5
OPTIONS = LoadOptions(max_sequence_length=12, resolution=64)
LATENT, WORD = 4, 8
LAYERS = 28  # the pipeline reads the states after 9, 18 and 27 of them


def save(folder: Path, seed: int = 0, *, distilled: bool = False) -> Path:
    """distilled: a model that has no guidance."""
    torch.manual_seed(seed)
    tokens = qwen_tokenizer()
    transformer = Flux2Transformer2DModel(
        in_channels=4 * LATENT,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WORD,
        timestep_guidance_channels=32,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    strengthen(transformer, 2)
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=2,
        sample_size=64,
        mid_block_add_attention=False,
        batch_norm_eps=0.1,
    )
    vae.bn.running_mean.normal_(0, 0.5)
    vae.bn.running_var.uniform_(0.5, 2)
    Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokens),
                hidden_size=WORD,
                intermediate_size=WORD,
                num_hidden_layers=LAYERS,
                num_attention_heads=1,
                num_key_value_heads=1,
                head_dim=WORD,
                max_position_embeddings=64,
                initializer_range=0.3,
                tie_word_embeddings=True,
            )
        ),
        tokenizer=tokens,
        is_distilled=distilled,
    ).save_pretrained(folder)
    return folder


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level, without merges, and with a chat template of one token before the prompt and one after."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        extra_special_tokens=special[1:],
        chat_template="{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}",
    )


def sample(
    folder: Path, lora: Path | None, prompts: list[str], start: Tensor, steps: int, guidance: float | None
) -> Tensor:
    """The pipeline's own images (B, 3, H, W) from `start`, with a LoRA as its users load one."""
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=prompts,
        latents=start.transpose(1, 2).unflatten(2, (4, 4)),  # the pipeline takes a grid of tokens, channels first
        num_inference_steps=steps,
        guidance_scale=1.0 if guidance is None else guidance,
        max_sequence_length=OPTIONS.max_sequence_length,
        height=64,
        width=64,
        output_type="pt",
    ).images
