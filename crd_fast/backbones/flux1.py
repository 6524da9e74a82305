"""FLUX.1: dev, its fine-tunes, and schnell.

Latents (L, C * 4) as the transformer reads them: L tokens of 2x2 latent pixels, row by row. The transformer returns the
velocity eps - x0 and takes sigma itself as its time. There is no guidance that combines two predictions: the model is
told a number with every prediction, or, as schnell, nothing. Text: T5 tokens, all of them attended to, and CLIP's
pooled vector.
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
_PATCH = 2  # latent pixels along the side of a token
_T5_TOKENS = 512  # the pipeline's default and its limit
_DISTILLED_GUIDANCE = 3.5  # the pipeline's default


class Flux1Backbone(Backbone):
    """Adapter for `FluxPipeline`; see `Backbone`. Raises ConfigError for options that the model cannot use."""

    family = "flux1"
    # to_q, to_k and to_v of both kinds of block; the output of a single-stream block is one matrix with its MLP's
    lora_targets = tuple(f"attn.{name}" for name in _ATTENTION)
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    guidance = "distilled"
    text_encoders = ("text_encoder", "text_encoder_2")

    def __init__(self, pipeline: Any, options: LoadOptions) -> None:
        super().__init__(pipeline, options)
        reject_options(options, "FLUX.1", "frames")
        self._tokens = _T5_TOKENS if options.max_sequence_length is None else options.max_sequence_length
        if not 0 < self._tokens <= _T5_TOKENS:
            raise ConfigError(f"model.max_sequence_length is {self._tokens}: expected 1 to {_T5_TOKENS}")
        side = latent_side(options, pipeline.default_sample_size, pipeline.vae_scale_factor, _PATCH)
        self._side = side // _PATCH  # of the image, in tokens
        self.latent_shape = (self._side**2, self.config.in_channels)
        # (0, row, column) of every token: made once, so that all predictions get the same tensors
        zero, places = torch.zeros(1, device=self.device), torch.arange(self._side, device=self.device).float()
        self._image_ids = torch.cartesian_prod(zero, places, places)
        self._text_ids = torch.zeros(self._tokens, 3, device=self.device)
        self._told = self._guidance_number()

    @classmethod
    def from_pretrained(cls, path: str, index: Mapping[str, Any], options: LoadOptions) -> Flux1Backbone:
        from diffusers import FluxPipeline

        return cls(load_pipeline(FluxPipeline, path, options), options)

    def _guidance_number(self) -> Tensor | None:
        """What the model is told with every prediction, (1,); None where it is told nothing."""
        if not self.config.guidance_embeds:
            reject_options(self.options, "this FLUX.1 (guidance_embeds is false, as in schnell)", "distilled_guidance")
            return None
        given = self.options.distilled_guidance
        return torch.full((1,), _DISTILLED_GUIDANCE if given is None else given, device=self.device)

    def is_guided(self, guidance_scale: float) -> bool:
        if self._told is None and guidance_scale != self.unguided_scale:
            raise ConfigError(
                f"guidance_scale is {guidance_scale}, but this FLUX.1 has no guidance of any kind (guidance_embeds is "
                f"false, as in schnell): set guidance_scale to {self.unguided_scale}"
            )
        return super().is_guided(guidance_scale)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        self.require_text_encoders()
        context, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), prompt_2=None, max_sequence_length=self._tokens, device=self.device
        )
        return Conditioning({"context": context, "pooled": pooled})

    def velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        # rounded to the model's dtype where the pipeline rounds it
        time = (sigma.to(x_t.device, torch.float32) * 1000).to(self.dtype) / 1000
        return self.transformer(
            hidden_states=x_t.to(self.dtype),
            timestep=time,
            guidance=None if self._told is None else self._told.expand(len(x_t)),
            encoder_hidden_states=conditioning.tensors["context"],
            pooled_projections=conditioning.tensors["pooled"],
            txt_ids=self._text_ids,
            img_ids=self._image_ids,
            return_dict=False,
        )[0]

    def decode_by(self, vae: Any, latents: Tensor) -> Tensor:
        return decode_images(vae, unpack(latents, self._side) / vae.config.scaling_factor + vae.config.shift_factor)

    def rollout_sigmas(self, steps: int) -> Tensor:
        return shifted_sigmas(self.pipeline.scheduler, steps, self._side**2, linear=True)
