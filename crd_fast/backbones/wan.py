"""Wan 2.1 and Wan 2.2 TI2V-5B, text to video.

Latents (C, F', H', W'): the first frame alone, then one latent frame for every four. The transformer returns the
velocity eps - x0 and takes 1000 * sigma as its time. Guidance is u + w (c - u). Text: UMT5 tokens, then zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crd_fast.backbones.base import Backbone, Conditioning, LoadOptions
from crd_fast.backbones.pipeline import latent_side, load_pipeline, reject_options, shifted_sigmas
from crd_fast.errors import ConfigError

# the pipeline's defaults; its 480 x 832 becomes the square of its height
_TOKENS, _FRAMES, _PIXELS = 512, 81, 480


class WanBackbone(Backbone):
    """Adapter for `WanPipeline` with one transformer; see `Backbone`."""

    family = "wan"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    block_lists = ("blocks",)
    has_tiny_decoders = False

    def __init__(self, pipeline: Any, options: LoadOptions) -> None:
        super().__init__(pipeline, options)
        if pipeline.scheduler.config.get("use_flow_sigmas", True) is False:
            raise ConfigError(
                f"the pipeline's scheduler, {type(pipeline.scheduler).__name__}, has use_flow_sigmas off, but Wan is a "
                "flow model: save the pipeline with use_flow_sigmas on, or with FlowMatchEulerDiscreteScheduler"
            )
        self._tokens = _TOKENS if options.max_sequence_length is None else options.max_sequence_length
        every, scale = pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial
        if self.frames < 1 or (self.frames - 1) % every:
            nearest = max(round((self.frames - 1) / every), 0) * every + 1
            raise ConfigError(
                f"model.frames is {self.frames}: expected one more than a multiple of {every}, such as {nearest}"
            )
        side = latent_side(options, _PIXELS // scale, scale, self.config.patch_size[1])
        self.latent_shape = (self.config.in_channels, (self.frames - 1) // every + 1, side, side)

    @classmethod
    def from_pretrained(cls, path: str, index: Mapping[str, Any], options: LoadOptions) -> WanBackbone:
        from diffusers import WanPipeline

        reject_options(options, "Wan", "distilled_guidance")
        if index.get("transformer_2", [None])[0] is not None or index.get("boundary_ratio") is not None:
            raise ConfigError(
                f"model.path {path} has two transformers, one for high and one for low noise, and an adapter is "
                "trained for one: use Wan2.1-T2V-1.3B, Wan2.1-T2V-14B or Wan2.2-TI2V-5B"
            )
        return cls(load_pipeline(WanPipeline, path, options), options)

    @property
    def frames(self) -> int:
        return _FRAMES if self.options.frames is None else self.options.frames

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        self.require_text_encoders()
        context, _ = self.pipeline.encode_prompt(
            prompt=list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self._tokens,
            device=self.device,
        )
        return Conditioning({"context": context})

    def velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        # A pipeline with `expand_timesteps` gives every token its time. They differ where a first frame is given;
        # from text alone all are equal, and one time a sample means the same without an embedding for each token.
        return self.transformer(
            hidden_states=x_t.to(self.dtype),
            timestep=sigma.to(x_t.device, torch.float32) * 1000,
            encoder_hidden_states=conditioning.tensors["context"],
            return_dict=False,
        )[0]

    def decode_by(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        video = vae.decode((latents.float() * std + mean).to(vae.dtype), return_dict=False)[0]  # (B, 3, frames, H, W)
        return (video.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)

    def rollout_sigmas(self, steps: int) -> Tensor:
        patch = self.config.patch_size
        tokens = (self.latent_shape[1] // patch[0]) * (self.latent_shape[2] // patch[1]) ** 2
        return shifted_sigmas(self.pipeline.scheduler, steps, tokens)
