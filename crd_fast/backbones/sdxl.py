"""Stable Diffusion XL, a variance-preserving model that predicts eps, as a rectified flow.

A noise level here is s of x_t = (1 - s) x0 + s eps. The U-Net was trained on alpha x0 + beta eps with
alpha^2 + beta^2 = 1. Scaling does not change what is known of x0, so both are the same point where beta / alpha =
s / (1 - s): the U-Net reads x_t / sqrt((1 - s)^2 + s^2) at the training timestep, mostly a fractional one, of this
ratio. From its eps, x0 = (x_t - s eps) / (1 - s) and the velocity is eps - x0 = (eps - x_t) / (1 - s).

Training ended at a ratio that is not infinite (s = 0.936 for SDXL). Above it an x_t is read as one of that level, since
the velocity from eps has no limit at s = 1; below the first timestep's level the first timestep is used.

Latents (C, H/8, W/8). Guidance is u + w (c - u). Text: two CLIP encoders side by side; pooled, the second alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crd_fast.backbones.base import Backbone, Conditioning, LoadOptions
from crd_fast.backbones.pipeline import latent_side, load_pipeline, reject_options
from crd_fast.errors import ConfigError


class SDXLBackbone(Backbone):
    """Adapter for `StableDiffusionXLPipeline`; see `Backbone`.

    Rollouts use `EulerDiscreteScheduler` with the settings of the pipeline's scheduler, whichever that is.
    """

    family = "sdxl"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    block_lists = ("down_blocks", "up_blocks")
    prediction = "eps"
    component = "unet"
    text_encoders = ("text_encoder", "text_encoder_2")

    def __init__(self, pipeline: Any, options: LoadOptions) -> None:
        from diffusers import EulerDiscreteScheduler

        super().__init__(pipeline, options)
        scheduler = pipeline.scheduler
        prediction = scheduler.config.get("prediction_type")
        if prediction != "epsilon" or scheduler.config.get("beta_schedule") is None:
            raise ConfigError(
                f"the pipeline's scheduler is {type(scheduler).__name__} with prediction_type {prediction!r}: expected "
                "a U-Net that predicts 'epsilon' and a scheduler with a beta_schedule"
            )
        if self.config.time_cond_proj_dim is not None:
            raise ConfigError("the U-Net was distilled to be told its guidance_scale: use the model it was made from")
        self._scheduler = EulerDiscreteScheduler.from_config(scheduler.config, final_sigmas_type="zero")
        signal = self._scheduler.alphas_cumprod.double()
        self._ratios = ((1 - signal) / signal).sqrt().to(self.device, torch.float32)  # beta / alpha by timestep
        # between two timesteps the scheduler interpolates ratios, or, of levels that it respaced, their logarithms
        respaced = any(self._scheduler.config[f"use_{name}_sigmas"] for name in ("karras", "exponential", "beta"))
        self._curve: Callable[[Tensor], Tensor] = torch.log if respaced else torch.clone
        self._uncurve: Callable[[Tensor], Tensor] = torch.exp if respaced else torch.clone
        self._last = float(self._ratios[-1] / (1 + self._ratios[-1]))
        if pipeline.vae.config.force_upcast and options.dtype == torch.float16:
            pipeline.vae.to(torch.float32)  # as the pipeline does: its activations overflow in float16
        scale = pipeline.vae_scale_factor
        side = latent_side(options, self.config.sample_size, scale, 1)
        self.latent_shape = (self.config.in_channels, side, side)
        pixels = side * scale
        self._sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]])  # original size, crop, target size

    @classmethod
    def from_pretrained(cls, path: str, index: Mapping[str, Any], options: LoadOptions) -> SDXLBackbone:
        from diffusers import StableDiffusionXLPipeline

        reject_options(options, "SDXL", "max_sequence_length", "frames", "distilled_guidance")
        return cls(load_pipeline(StableDiffusionXLPipeline, path, options, add_watermarker=False), options)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        self.require_text_encoders()
        context, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), do_classifier_free_guidance=False, device=self.device
        )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            empty = [row for row, prompt in enumerate(prompts) if prompt == ""]
            context[empty] = 0
            pooled[empty] = 0
        return Conditioning({"context": context, "pooled": pooled})

    def velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        level = sigma.to(x_t.device, torch.float32).clamp(max=self._last)
        s = level.view(-1, 1, 1, 1)
        eps = self.transformer(
            (x_t.float() / ((1 - s).square() + s.square()).sqrt()).to(self.dtype),
            self.timestep(level),
            encoder_hidden_states=conditioning.tensors["context"],
            added_cond_kwargs={
                "text_embeds": conditioning.tensors["pooled"],
                "time_ids": self._sizes.to(x_t.device, self.dtype).expand(len(x_t), -1),
            },
            return_dict=False,
        )[0]
        return (eps.float() - x_t.float()) / (1 - s)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Fractional training timesteps (B,) at which the ratio of noise to signal is that of sigma (B,)."""
        ratio = sigma / (1 - sigma)
        high = torch.searchsorted(self._ratios, ratio).clamp(1, len(self._ratios) - 1)
        value, below, above = (self._curve(r) for r in (ratio, self._ratios[high - 1], self._ratios[high]))
        return high - 1 + ((value - below) / (above - below)).clamp(0, 1)

    def sigma_at(self, share: Tensor) -> Tensor:
        # timestep share * T of T, between two timesteps as `timestep` reads it
        position = (share.double() * len(self._ratios)).clamp(max=len(self._ratios) - 1)
        ratios = self._ratios.to(share.device)
        below = position.long().clamp(max=len(ratios) - 2)
        low, high = self._curve(ratios[below]), self._curve(ratios[below + 1])
        ratio = self._uncurve(low + (position - below).to(low.dtype) * (high - low))
        return (ratio / (1 + ratio)).to(torch.float32)

    def one_step_scale(self, sigma: float) -> float:
        # the U-Net reads x_t divided by this
        return ((1 - sigma) ** 2 + sigma**2) ** 0.5

    def decode_by(self, vae: Any, latents: Tensor) -> Tensor:
        unscaled = latents.to(vae.dtype) / vae.config.scaling_factor
        return (vae.decode(unscaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def rollout_sigmas(self, steps: int) -> Tensor:
        # With k = s / (1 - s) the pipeline's x is x_t / (1 - s), and (s' - s) / ((1 - s) (1 - s')) = k' - k: an Euler
        # step of the velocity from s to s' is the pipeline's x + (k' - k) eps, scaled by 1 - s'.
        self._scheduler.set_timesteps(steps)
        ratios = self._scheduler.sigmas
        return (ratios / (1 + ratios)).to(torch.float32)

    def start_scale(self, steps: int) -> float:
        self._scheduler.set_timesteps(steps)
        return float(self._scheduler.init_noise_sigma / (1 + self._scheduler.sigmas[0]))
