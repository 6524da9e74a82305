"""A tiny random FLUX.1: 64x64 images, 4x8x8 latents as 16 tokens, told a guidance number as dev is."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

from crd_fast.backbones import LoadOptions
from tests.pipelines.common import autoencoder, tokenizer

FAMILY = "flux1"
PIPELINE = FluxPipeline
GUIDANCE: float | None = None
OPTIONS = LoadOptions(max_sequence_length=12, resolution=64, distilled_guidance=2.0)
CONTEXT, LATENT, POOLED = 16, 4, 16


def save(folder: Path, seed: int = 0, *, told_guidance: bool = True) -> Path:
    """told_guidance: False makes a schnell."""
    torch.manual_seed(seed)
    words, pieces = tokenizer(folder / "words"), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=CONTEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=told_guidance,
        axes_dims_rope=(4, 6, 6),
    )
    strengthen(transformer, 1.75)
    vae = autoencoder(LATENT, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.4, shift_factor=0.1)
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=POOLED,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=12,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        ),
        tokenizer=words,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(pieces), d_model=CONTEXT, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
        ),
        tokenizer_2=pieces,
    ).save_pretrained(folder)
    return folder


@torch.no_grad()
def strengthen(transformer: nn.Module, by: float) -> None:
    """Larger weights than fresh ones: the images depend clearly on the prompt."""
    for layer in transformer.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.mul_(by)


def t5_tokenizer() -> T5Tokenizer:
    """A piece for every printable character."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [("▁", -2.0), *((chr(c), -2.0) for c in range(33, 127))]
    return T5Tokenizer(vocab=[*special, *pieces], extra_ids=0, model_max_length=OPTIONS.max_sequence_length)


def sample(
    folder: Path, lora: Path | None, prompts: list[str], start: Tensor, steps: int, guidance: float | None
) -> Tensor:
    """The pipeline's own images (B, 3, H, W) from `start`, with a LoRA as its users load one."""
    assert guidance is None
    pipeline = FluxPipeline.from_pretrained(folder)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts,
        latents=start,
        num_inference_steps=steps,
        guidance_scale=OPTIONS.distilled_guidance,
        max_sequence_length=OPTIONS.max_sequence_length,
        height=64,
        width=64,
        output_type="pt",
    ).images
