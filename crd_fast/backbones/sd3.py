"""Stable Diffusion 3 and 3.5.

Latents (C, H/8, W/8), not packed. The transformer returns the velocity eps - x0 and takes 1000 * sigma as its time.
Guidance is u + w (c - u). Text: two CLIP encoders side by side, then T5 tokens (zeros where there is no T5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crd_fast.backbones.base import Conditioning
from crd_fast.errors import ConfigError

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_T5_TOKENS = 256  # the pipeline's default


class SD3Backbone:
    """Adapter for `StableDiffusion3Pipeline`; see `Backbone`."""

    family = "sd3"
    lora_targets = tuple(f"attn.{name}" for name in _ATTENTION)

    def __init__(self, pipeline: Any, max_sequence_length: int | None, resolution: int | None) -> None:
        self._pipeline = pipeline
        if max_sequence_length is None:
            longest = pipeline.tokenizer_3.model_max_length if pipeline.tokenizer_3 is not None else _T5_TOKENS
            max_sequence_length = min(_T5_TOKENS, longest)
        self._max_sequence_length = max_sequence_length
        self.transformer = pipeline.transformer.eval().requires_grad_(False)
        pipeline.vae.eval().requires_grad_(False)
        pipeline.set_progress_bar_config(disable=True)
        self.device = self.transformer.device
        if self.device.type == "cpu":
            # CPU convolutions over small channel counts are faster in this layout
            pipeline.vae.to(memory_format=torch.channels_last)
        self.dtype = self.transformer.dtype
        config = self.transformer.config
        side = config.sample_size
        if resolution is not None:
            unit = pipeline.vae_scale_factor * config.patch_size
            if resolution % unit:
                raise ConfigError(f"model.resolution is {resolution}: expected a multiple of {unit}")
            side = resolution // pipeline.vae_scale_factor
        self.latent_shape: tuple[int, ...] = (config.in_channels, side, side)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        index: Mapping[str, Any],
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_sequence_length: int | None,
        resolution: int | None,
    ) -> SD3Backbone:
        from diffusers import StableDiffusion3Pipeline

        # a pipeline saved without T5 loads only when it is told that there is none
        absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None}
        try:
            pipeline = StableDiffusion3Pipeline.from_pretrained(path, dtype=dtype, **absent)
        except OSError as error:
            raise ConfigError(f"model.path {path} could not be loaded: {error}") from error
        return cls(pipeline.to(device), max_sequence_length, resolution)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        if self._pipeline.text_encoder is None:
            raise RuntimeError("the text encoders were released: encode all prompts first")
        context, _, pooled, _ = self._pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self._max_sequence_length,
            device=self.device,
        )
        return Conditioning(context, pooled)

    def release_text_encoders(self) -> None:
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            setattr(self._pipeline, name, None)

    def predict(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self.transformer(
            hidden_states=x_t.to(self.dtype),
            timestep=sigma.to(x_t.device, torch.float32) * 1000,
            encoder_hidden_states=conditioning.context,
            pooled_projections=conditioning.pooled,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self._pipeline.vae
        unscaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return (vae.decode(unscaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def rollout_sigmas(self, steps: int) -> Tensor:
        scheduler = type(self._pipeline.scheduler).from_config(self._pipeline.scheduler.config)
        settings = {}
        if scheduler.config.get("use_dynamic_shifting", None):
            from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

            patch = self.transformer.config.patch_size
            tokens = (self.latent_shape[1] // patch) * (self.latent_shape[2] // patch)
            config = scheduler.config
            settings["mu"] = calculate_shift(
                tokens,
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.16),
            )
        scheduler.set_timesteps(steps, **settings)
        return scheduler.sigmas.to(torch.float32)

    def save_lora(self, folder: str, state: dict[str, Tensor]) -> None:
        type(self._pipeline).save_lora_weights(folder, transformer_lora_layers=state)
