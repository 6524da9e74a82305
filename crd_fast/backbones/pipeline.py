"""What the adapters of flow-matching pipelines do alike: loading, latent sizes, the scheduler's noise levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
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


def shifted_sigmas(scheduler: Any, steps: int, tokens: int, *, linear: bool = False) -> Tensor:
    """Noise levels (steps + 1,) of a flow-matching scheduler, shifted by `tokens` image tokens where it does so.

    linear: start from linspace(1, 1 / steps, steps), as pipelines do that hand their own levels to the scheduler.
    """
    fresh = type(scheduler).from_config(scheduler.config)
    settings: dict[str, Any] = {}
    if fresh.config.get("use_dynamic_shifting", None):
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
