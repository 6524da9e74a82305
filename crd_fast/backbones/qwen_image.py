"""Qwen-Image.

Latents (H/16 * W/16, 4C), packed by 2x2 squares as the transformer reads them. The transformer returns the velocity
eps - x0 and takes sigma as its time. Guidance is u + w (c - u), brought back to the norm that c has in every token.
Text: Qwen2.5-VL states of the prompt inside the pipeline's template, padded to one length, with a mask. The
autoencoder is one of videos; an image is its first frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crd_fast.backbones.base import Backbone, Conditioning, LoadOptions
from crd_fast.backbones.pipeline import latent_side, load_pipeline, shifted_sigmas
from crd_fast.errors import ConfigError

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_PATCH = 2  # latent pixels along the side of a token
_TEXT_TOKENS, _MAX_TEXT_TOKENS = 512, 1024  # the pipeline's default and its limit


class QwenImageBackbone(Backbone):
    """Adapter for `QwenImagePipeline`; see `Backbone`. Guidance scales are those of its `true_cfg_scale`."""

    family = "qwen_image"
    lora_targets = tuple(f"attn.{name}" for name in _ATTENTION)
    block_lists = ("transformer_blocks",)
    has_tiny_decoders = False
    guidance = "rescaled"

    def __init__(self, pipeline: Any, options: LoadOptions) -> None:
        # the base lays out an autoencoder of images for the CPU, in a format that 3-D convolutions do not have
        vae, pipeline.vae = pipeline.vae, nn.Identity()
        super().__init__(pipeline, options)
        pipeline.vae = vae.eval().requires_grad_(False)
        self._tokens = _TEXT_TOKENS if options.max_sequence_length is None else options.max_sequence_length
        if not 0 < self._tokens <= _MAX_TEXT_TOKENS:
            raise ConfigError(f"model.max_sequence_length is {self._tokens}: expected 1 to {_MAX_TEXT_TOKENS}")
        side = latent_side(options, pipeline.default_sample_size, pipeline.vae_scale_factor, _PATCH)
        self._tokens_a_side = side // _PATCH
        self.latent_shape = (self._tokens_a_side**2, self.config.in_channels)

    @classmethod
    def from_pretrained(cls, path: str, index: Mapping[str, Any], options: LoadOptions) -> QwenImageBackbone:
        from diffusers import QwenImagePipeline

        return cls(load_pipeline(QwenImagePipeline, path, options), options)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        self.require_text_encoders()
        context, mask = self.pipeline.encode_prompt(
            prompt=list(prompts), device=self.device, max_sequence_length=self._tokens
        )
        if mask is None:  # no prompt is shorter than another
            mask = context.new_ones(context.shape[:2])
        padding = self._tokens - context.shape[1]
        return Conditioning(
            {"context": F.pad(context, (0, 0, 0, padding)), "mask": F.pad(mask, (0, padding)).to(torch.bool)}
        )

    def velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        # rounded to the model's dtype where the pipeline rounds it
        time = (sigma.to(x_t.device, torch.float32) * 1000).to(self.dtype) / 1000
        return self.transformer(
            hidden_states=x_t.to(self.dtype),
            timestep=time,
            encoder_hidden_states=conditioning.tensors["context"],
            encoder_hidden_states_mask=conditioning.tensors["mask"],
            img_shapes=[[(1, self._tokens_a_side, self._tokens_a_side)]] * len(x_t),
            return_dict=False,
        )[0]

    def is_guided(self, guidance_scale: float) -> bool:
        return guidance_scale > self.unguided_scale

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        combined = super().guide(conditional, unconditional, guidance_scale)
        wanted = torch.linalg.vector_norm(conditional.float(), dim=-1, keepdim=True)
        return combined * (wanted / torch.linalg.vector_norm(combined, dim=-1, keepdim=True))

    def decode_by(self, vae: Any, latents: Tensor) -> Tensor:
        scale = self.pipeline.vae_scale_factor
        pixels = self._tokens_a_side * _PATCH * scale
        unpacked = self.pipeline._unpack_latents(latents, pixels, pixels, scale).to(vae.dtype)  # (B, C, 1, H/8, W/8)
        mean, std = (
            torch.tensor(values, device=unpacked.device, dtype=unpacked.dtype).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        frame = vae.decode(unpacked * std + mean, return_dict=False)[0][:, :, 0]
        return (frame.float() / 2 + 0.5).clamp(0, 1)

    def rollout_sigmas(self, steps: int) -> Tensor:
        return shifted_sigmas(self.pipeline.scheduler, steps, self.latent_shape[0], linear=True)
