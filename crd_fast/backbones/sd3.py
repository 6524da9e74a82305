"""Stable Diffusion 3 and 3.5.

Latents (C, H/8, W/8), not packed. The transformer returns the velocity eps - x0 and takes 1000 * sigma as its time.
Guidance is u + w (c - u). Text: two CLIP encoders side by side, then T5 tokens (zeros where there is no T5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crd_fast.backbones.base import Backbone, Conditioning, LoadOptions
from crd_fast.backbones.pipeline import latent_side, load_pipeline, shifted_sigmas
from crd_fast.errors import ConfigError

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_T5_TOKENS = 256  # the pipeline's default


class SD3Backbone(Backbone):
    """Adapter for `StableDiffusion3Pipeline`; see `Backbone`."""

    family = "sd3"
    lora_targets = tuple(f"attn.{name}" for name in _ATTENTION)
    block_lists = ("transformer_blocks",)
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")

    def __init__(self, pipeline: Any, options: LoadOptions) -> None:
        super().__init__(pipeline, options)
        tokens = options.max_sequence_length
        if tokens is None:
            longest = pipeline.tokenizer_3.model_max_length if pipeline.tokenizer_3 is not None else _T5_TOKENS
            tokens = min(_T5_TOKENS, longest)
        self._tokens = tokens
        config = self.config
        side = latent_side(options, config.sample_size, pipeline.vae_scale_factor, config.patch_size)
        largest = config.pos_embed_max_size * config.patch_size
        if side > largest:
            raise ConfigError(
                f"model.resolution is {side * pipeline.vae_scale_factor}: expected at most "
                f"{largest * pipeline.vae_scale_factor}, the largest that this model has positions for"
            )
        self.latent_shape = (config.in_channels, side, side)

    @classmethod
    def from_pretrained(cls, path: str, index: Mapping[str, Any], options: LoadOptions) -> SD3Backbone:
        from diffusers import StableDiffusion3Pipeline

        # a pipeline saved without T5 loads only when it is told that there is none
        absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None}
        return cls(load_pipeline(StableDiffusion3Pipeline, path, options, **absent), options)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        self.require_text_encoders()
        context, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self._tokens,
            device=self.device,
        )
        return Conditioning({"context": context, "pooled": pooled})

    def velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self.transformer(
            hidden_states=x_t.to(self.dtype),
            timestep=sigma.to(x_t.device, torch.float32) * 1000,
            encoder_hidden_states=conditioning.tensors["context"],
            pooled_projections=conditioning.tensors["pooled"],
            return_dict=False,
        )[0]

    def decode_by(self, vae: Any, latents: Tensor) -> Tensor:
        unscaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return (vae.decode(unscaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def rollout_sigmas(self, steps: int) -> Tensor:
        patch = self.config.patch_size
        tokens = (self.latent_shape[1] // patch) * (self.latent_shape[2] // patch)
        return shifted_sigmas(self.pipeline.scheduler, steps, tokens)
