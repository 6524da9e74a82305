"""FLUX.2 klein: base models, and those distilled to a few steps.

Latents (L, C * 4) as the transformer reads them: L tokens of 2x2 latent pixels, row by row, each channel normalised by
the autoencoder's batch norm. The transformer returns the velocity eps - x0 and takes sigma itself as its time. Guidance
of a base model is u + w (c - u); a distilled one has none. Text: the states of three layers of Qwen3 side by side, a
fixed number of tokens, all of them attended to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crd_fast.backbones.base import Backbone, Conditioning, LoadOptions
from crd_fast.backbones.pipeline import (
    decode_images,
    latent_side,
    load_pipeline,
    reject_options,
    shifted_sigmas,
    unpack,
)
from crd_fast.errors import ConfigError

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# in a single-stream block the attention's matrices are one with the MLP's
_FUSED = ("to_qkv_mlp_proj", "to_out")
_PATCH = 2  # latent pixels along the side of a token


class Flux2Backbone(Backbone):
    """Adapter for `Flux2KleinPipeline`; see `Backbone`. Raises ConfigError for options that it has not."""

    family = "flux2"
    lora_targets = tuple(f"attn.{name}" for name in (*_ATTENTION, *_FUSED))
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    has_tiny_decoders = False

    def __init__(self, pipeline: Any, options: LoadOptions) -> None:
        super().__init__(pipeline, options)
        reject_options(options, "FLUX.2 klein", "frames", "distilled_guidance")
        given = options.max_sequence_length
        self._tokens = pipeline.tokenizer_max_length if given is None else given
        if self._tokens < 1:
            raise ConfigError(f"model.max_sequence_length is {self._tokens}: expected at least 1")
        side = latent_side(options, pipeline.default_sample_size, pipeline.vae_scale_factor, _PATCH)
        self._side = side // _PATCH  # of the image, in tokens
        self.latent_shape = (self._side**2, self.config.in_channels)
        # (0, row, column, 0) of an image token, (0, 0, 0, place) of a text token: made once, so that all predictions
        # get the same tensors
        zero, places = torch.zeros(1, device=self.device), torch.arange(self._side, device=self.device).float()
        self._image_ids = torch.cartesian_prod(zero, places, places, zero)
        words = torch.arange(self._tokens, device=self.device).float()
        self._text_ids = torch.cartesian_prod(zero, zero, zero, words)

    @classmethod
    def from_pretrained(cls, path: str, index: Mapping[str, Any], options: LoadOptions) -> Flux2Backbone:
        from diffusers import Flux2KleinPipeline

        return cls(load_pipeline(Flux2KleinPipeline, path, options), options)

    def is_guided(self, guidance_scale: float) -> bool:
        if self.pipeline.config.is_distilled and guidance_scale != self.unguided_scale:
            raise ConfigError(
                f"guidance_scale is {guidance_scale}, but this FLUX.2 klein was distilled to run without guidance "
                f"(is_distilled in model_index.json): set guidance_scale to {self.unguided_scale}, or model.path to a "
                "base model"
            )
        return super().is_guided(guidance_scale)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        self.require_text_encoders()
        context, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), max_sequence_length=self._tokens, device=self.device
        )
        return Conditioning({"context": context})

    def velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        # rounded to the model's dtype where the pipeline rounds it
        time = (sigma.to(x_t.device, torch.float32) * 1000).to(self.dtype) / 1000
        return self.transformer(
            hidden_states=x_t.to(self.dtype),
            timestep=time,
            encoder_hidden_states=conditioning.tensors["context"],
            txt_ids=self._text_ids,
            img_ids=self._image_ids,
            return_dict=False,
        )[0]

    def decode_by(self, vae: Any, latents: Tensor) -> Tensor:
        deviation = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()
        return decode_images(vae, unpack(latents * deviation + vae.bn.running_mean, self._side))

    def rollout_sigmas(self, steps: int) -> Tensor:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        tokens = self._side**2
        return shifted_sigmas(
            self.pipeline.scheduler, steps, tokens, linear=True, mu=compute_empirical_mu(tokens, steps)
        )
