"""Checks at the public boundary: every message names the argument, what it was and what was expected."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Sequence
from typing import TypeVar

import torch

PREDICTION_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SEED_LIMIT = 2**64
STREAM_LIMIT = 2**31

MaybeTensor = TypeVar("MaybeTensor", torch.Tensor, torch.Tensor | None)


def values_are_checked(device: torch.device) -> bool:
    """Whether tensor *values* are looked at: always on CPU, elsewhere only with `CRD_FAST_CHECKS=1`.

    Looking at a value on an accelerator waits for it, so it is opt-in there. A graph being traced by
    torch.compile has no values to look at.
    """
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get("CRD_FAST_CHECKS") == "1"


def describe(value: object) -> str:
    """A tensor as shape, dtype and device; anything else as its type and value."""
    if isinstance(value, torch.Tensor):
        return f"shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    return f"{type(value).__name__} {value!r}"


def require_latents(name: str, value: object) -> torch.Tensor:
    """A (B, *latent) floating-point tensor with at least one sample and one element a sample."""
    expected = "a (B, *latent) tensor in float16, bfloat16, float32 or float64"
    if not isinstance(value, torch.Tensor) or value.dtype not in PREDICTION_DTYPES or value.ndim < 2:
        raise ValueError(f"{name}: expected {expected}, got {describe(value)}")
    if value.shape[0] == 0:
        raise ValueError(f"{name}: the batch is empty (B = 0), got {describe(value)}; skip the call instead")
    if value.numel() == 0:
        raise ValueError(f"{name}: a sample has no elements, got {describe(value)}; expected {expected}")
    return value


def require_like(name: str, value: object, other_name: str, other: torch.Tensor) -> torch.Tensor:
    """A latent-sized tensor with the shape and device of `other`; its dtype is free."""
    tensor = require_latents(name, value)
    if tensor.shape != other.shape or tensor.device != other.device:
        raise ValueError(
            f"{name}: expected shape {tuple(other.shape)} on {other.device} like {other_name}, got {describe(tensor)}"
        )
    return tensor


def require_per_sample(
    name: str,
    value: object,
    batch: int,
    device: torch.device,
    *,
    dtypes: Sequence[torch.dtype] = PREDICTION_DTYPES,
) -> torch.Tensor:
    """A (B,) tensor of one of `dtypes` on `device`."""
    if (
        not isinstance(value, torch.Tensor)
        or value.dtype not in dtypes
        or value.shape != (batch,)
        or value.device != device
    ):
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: expected shape ({batch},), {allowed}, on {device}, got {describe(value)}")
    return value


def require_mask(mask: object, latents: torch.Tensor) -> torch.Tensor:
    """The bool mask of valid elements, with as many dimensions as `latents` and broadcastable to it.

    (B, tokens) is accepted for packed (B, tokens, channels) latents and gets a trailing axis of one.
    """
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.device != latents.device:
        raise ValueError(
            f"mask: expected a bool tensor on {latents.device} (True = valid), got {describe(mask)}; "
            "convert a 0/1 mask with mask.bool()"
        )
    full = mask.unsqueeze(-1) if mask.ndim == 2 and latents.ndim == 3 else mask  # (B, L) -> (B, L, 1)
    fits = full.ndim == latents.ndim and all(
        have in (1, want) for have, want in zip(full.shape, latents.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"mask: expected (B, tokens) for (B, tokens, channels) latents, or {latents.ndim} dimensions "
            f"that broadcast to {tuple(latents.shape)}, got {describe(mask)}"
        )
    return full


def require_sigma_range(sigma: torch.Tensor) -> None:
    if values_are_checked(sigma.device) and not bool(((sigma >= 0) & (sigma <= 1)).all()):
        raise ValueError(
            f"sigma: expected noise levels in [0, 1], got values from {sigma.min().item()} to "
            f"{sigma.max().item()} in a tensor of shape {tuple(sigma.shape)}; divide scheduler timesteps "
            "by 1000"
        )


def require_finite(name: str, value: torch.Tensor, *, where: torch.Tensor | None = None) -> None:
    """(B,) finite values; with `where` (bool, same shape) only the selected ones count."""
    if not values_are_checked(value.device) or all(map(math.isfinite, value.tolist())):
        return
    bad = ~value.isfinite() if where is None else ~value.isfinite() & where
    if bool(bad.any()):
        raise ValueError(
            f"{name}: expected finite values, got {int(bad.sum())} NaN or infinite of {value.numel()} "
            f"(shape {tuple(value.shape)}); give such samples sample_weights 0 or leave them out"
        )


def require_weights(name: str, value: torch.Tensor) -> None:
    """Finite weights that are not negative."""
    if values_are_checked(value.device) and not bool((value.isfinite() & (value >= 0)).all()):
        raise ValueError(
            f"{name}: expected finite weights >= 0, got values from {value.min().item()} to "
            f"{value.max().item()} in a tensor of shape {tuple(value.shape)}"
        )


def require_seed(seed: object) -> int:
    return _require_count("seed", seed, SEED_LIMIT, "2**64")


def require_stream(stream: object) -> int:
    if isinstance(stream, torch.Tensor) and stream.ndim:
        raise ValueError(
            f"stream: expected one int in [0, 2**31) a call, got {describe(stream)}; where one call has several draws "
            "of a sample, tell them apart by sample_ids, such as ids + (draw << 40)"
        )
    return _require_count("stream", stream, STREAM_LIMIT, "2**31")


def _require_count(name: str, value: object, limit: int, shown: str) -> int:
    # numpy's integers are integers too; a graph that is traced has ints alone, or symbols for them
    whole = value if isinstance(value, int) else int(value) if isinstance(value, numbers.Integral) else -1
    if isinstance(value, bool) or not 0 <= whole < limit:
        raise ValueError(f"{name}: expected an int in [0, {shown}), got {describe(value)}")
    return whole


def require_finite_number(name: str, value: object) -> float:
    if torch.compiler.is_compiling() and isinstance(value, float):
        return value  # may be a symbol, which math.isfinite does not take
    # numpy's scalars are real numbers too
    real = isinstance(value, int | float) or isinstance(value, numbers.Real)
    if not real or isinstance(value, bool) or not math.isfinite(value):  # type: ignore[arg-type]
        raise ValueError(f"{name}: expected a finite number, got {describe(value)}")
    return float(value)  # type: ignore[arg-type]


def savable(given: MaybeTensor) -> MaybeTensor:
    """A copy of what was made under torch.inference_mode, which a gradient cannot keep; anything else as it is."""
    if given is None or torch.compiler.is_compiling() or not given.is_inference():
        return given
    return given.clone()
