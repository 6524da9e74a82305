"""What the adapters of flow-matching pipelines do alike: loading, latent sizes, the scheduler's noise levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crd_fast.backbones.base import LoadOptions
from crd_fast.errors import ConfigError


def load_pipeline(pipeline: Any, path: str, options: LoadOptions, **components: Any) -> Any:
    """`pipeline.from_pretrained` on the device, in the dtype. Raises ConfigError naming what could not be loaded."""
    try:
        loaded = pipeline.from_pretrained(path, dtype=options.dtype, **components)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path {path} could not be loaded: {error}") from error
    return loaded.to(options.device)


def latent_side(options: LoadOptions, default: int, vae_scale: int, patch: int) -> int:
    """Latent height and width: of `options.resolution` pixels, or `default`.

    Raises ConfigError when the resolution is not a multiple of what one token covers.
    """
    if options.resolution is None:
        return default
    unit = vae_scale * patch
    if options.resolution < unit or options.resolution % unit:
        raise ConfigError(f"model.resolution is {options.resolution}: expected a multiple of {unit}")
    return options.resolution // vae_scale


def shifted_sigmas(scheduler: Any, steps: int, tokens: int, *, linear: bool = False, mu: float | None = None) -> Tensor:
    """Noise levels (steps + 1,) of a flow-matching scheduler, shifted by `tokens` image tokens where it does so.

    linear: start from linspace(1, 1 / steps, steps), as pipelines do that hand their own levels to the scheduler.
    mu: the shift's exponent where the pipeline has a formula of its own for it.
    """
    fresh = type(scheduler).from_config(scheduler.config)
    settings: dict[str, Any] = {}
    dynamic = fresh.config.get("use_dynamic_shifting", None)
    if dynamic and mu is not None:
        settings["mu"] = mu
    elif dynamic:
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        config = fresh.config
        settings["mu"] = calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )
    if linear:
        fresh.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), **settings)
    else:
        fresh.set_timesteps(steps, **settings)
    return fresh.sigmas.to(torch.float32)


def reject_options(options: LoadOptions, family: str, *names: str) -> None:
    """Raises ConfigError when one of the named options is set, for a family whose pipeline has no such setting."""
    for name in names:
        value = getattr(options, name)
        if value is not None:
            raise ConfigError(f"model.{name} is {value}, but {family} has no such setting: leave it out")


def unpack(tokens: Tensor, side: int) -> Tensor:
    """(B, side * side, C * 4) tokens, each a 2x2 patch of every channel, as the latent image (B, C, 2 side, 2 side)."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), 2)


def decode_images(vae: Any, latents: Tensor) -> Tensor:
    """float32 images (B, 3, H, W) in [0, 1] of latents (B, C, h, w) in the autoencoder's own scale."""
    return (vae.decode(latents.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
