"""A tiny random Qwen-Image: 64x64 images, 4x8x8 latents; its tokenizer gives the prompt template the real 34 tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from crd_fast.backbones import LoadOptions

FAMILY = "qwen_image"
PIPELINE = QwenImagePipeline
GUIDANCE: float | None = 2.5
OPTIONS = LoadOptions(max_sequence_length=24, resolution=64)
CONTEXT, LATENT, HEAD = 16, 4, 16
SPECIAL = ("<|im_start|>", "<|im_end|>")
# the words of the prompt template, each one token as in the real vocabulary; a space belongs to the word after it
WORDS = (
    *("system", "user", "assistant", "Describe", " the", " image", " by", " detailing", " color", " shape", " size"),
    *(" texture", " quantity", " text", " spatial", " relationships", " of", " objects", " and", " background"),
)


def tokenizer(chat_template: str | None = None) -> Qwen2Tokenizer:
    """Byte-level, with merges for WORDS alone: any prompt has tokens."""
    merges: list[tuple[str, str]] = []
    for word in (word.replace(" ", "Ġ") for word in WORDS):
        steps = [(word[:i], word[i]) for i in range(1, len(word))]
        merges += [step for step in steps if step not in merges]
    symbols = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges), "<|endoftext|>", *SPECIAL]
    return Qwen2Tokenizer(
        vocab={symbol: i for i, symbol in enumerate(symbols)},
        merges=merges,
        additional_special_tokens=list(SPECIAL),
        chat_template=chat_template,
        model_max_length=2048,
    )


def text_encoder(tokens: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokens),
                "hidden_size": CONTEXT,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "initializer_range": 0.5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
                "bos_token_id": None,
                "eos_token_id": tokens.eos_token_id,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": CONTEXT,
                "fullatt_block_indexes": [0],
            },
        )
    )


def save(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    tokens = tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * LATENT,
        out_channels=LATENT,
        num_layers=2,
        attention_head_dim=HEAD,
        num_attention_heads=2,
        joint_attention_dim=CONTEXT,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2 and "time_text_embed" not in name:
                parameter.mul_(2)  # the usual start is so small that the prompt hardly shows in an image
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=LATENT,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.3, 0.2, 0.1, -0.1],
        latents_std=[1.5, 0.8, 1.2, 2.0],
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(4)
    QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=vae,
        text_encoder=text_encoder(tokens),
        tokenizer=tokens,
    ).save_pretrained(folder)
    return folder


def sample(
    folder: Path, lora: Path | None, prompts: list[str], start: Tensor, steps: int, guidance: float | None
) -> Tensor:
    """The pipeline's own images (B, 3, H, W) from `start`, with a LoRA as its users load one."""
    pipeline = QwenImagePipeline.from_pretrained(folder)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts,
        # no guidance without a negative prompt; the pipeline takes as many of them as there are prompts
        negative_prompt=None if guidance is None else [""] * len(prompts),
        latents=start,
        num_inference_steps=steps,
        true_cfg_scale=1.0 if guidance is None else guidance,
        max_sequence_length=OPTIONS.max_sequence_length,
        height=64,
        width=64,
        output_type="pt",
    ).images
