"""Noise schedules x_t = alpha(t) x0 + sigma(t) eps, and what a model may predict of them, in each other's terms.

The four kinds of prediction are eps, v, x0 and the score of the noised distribution,

    eps = (x_t - alpha x0) / sigma,    score = -eps / sigma = (alpha x0 - x_t) / sigma^2,
    v = eps - x0 (rectified flow),     v = alpha eps - sigma x0 (variance preserving, Salimans & Ho 2022).

Adding a score s to a prediction changes x0 by sigma^2/alpha s, eps by -sigma s and v by -sigma/alpha s under both
schedules ("Diff-Instruct with Diffused Reward", arXiv 2605.24001). Coefficients and results are float32, or float64
when an input is: half precision is never subtracted in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from crd_fast import checks
from crd_fast.errors import ConfigError, nearest

KINDS = ("eps", "v", "x0", "score")


class Schedule(ABC):
    """alpha(t) and sigma(t), and conversions at (x_t, t).

    t: (B,), one time a sample. `horizon` is the T that shares of the time range refer to, `last` the largest valid t.
    `kind` is what a model of this schedule predicts where a method's `kind` is None: one of "eps", "v", "x0", "score".
    All conversions are differentiable.

    Raises, in every method:
        ValueError: an unknown kind, a shape, dtype or device that does not fit, a time out of range, or a time at which
            the conversion divides by zero (times are looked at on CPU, elsewhere with CRD_FAST_CHECKS=1).
    """

    kind: ClassVar[str]
    time_dtypes: ClassVar[tuple[torch.dtype, ...]]
    horizon: float
    last: float

    @abstractmethod
    def _levels(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """alpha (B,) and sigma (B,) in `dtype` at checked times."""

    @abstractmethod
    def _velocity(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of v = a eps - b x0, with a alpha + b sigma = 1."""

    def levels(self, t: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """alpha (B,) and sigma (B,), in `dtype`: float32 by default, float64 for float64 times."""
        self.require_times(t)
        if dtype is None:
            dtype = compute_dtype(t)
        return self._levels(t, dtype)

    def alpha(self, t: Tensor) -> Tensor:
        """(B,) factor of x0 in x_t."""
        return self.levels(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        """(B,) standard deviation of the noise in x_t."""
        return self.levels(t)[1]

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps, (B, *latent)."""
        checks.require_like("eps", eps, "x0", checks.require_latents("x0", x0))
        alpha, sigma, x0, eps = self._prepare(t, x0, eps)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor, kind: str | None = None) -> Tensor:
        """What a model of `kind` should predict at add_noise(x0, eps, t), (B, *latent)."""
        checks.require_like("eps", eps, "x0", checks.require_latents("x0", x0))
        kind = self._kind(kind)
        alpha, sigma, x0, eps = self._prepare(t, x0, eps)
        if kind == "x0":
            return x0
        return eps if kind == "eps" else self._from_both(kind, x0, eps, alpha, sigma)

    def to_x0(self, predicted: Tensor, x_t: Tensor, t: Tensor, kind: str | None = None) -> Tensor:
        """The clean sample that a prediction of `kind` at (x_t, t) means, (B, *latent)."""
        return self.convert(predicted, x_t, t, to="x0", kind=kind)

    def to_score(self, predicted: Tensor, x_t: Tensor, t: Tensor, kind: str | None = None) -> Tensor:
        """The score, the gradient of the noised log-density in x_t, that a prediction of `kind` means, (B, *latent)."""
        return self.convert(predicted, x_t, t, to="score", kind=kind)

    def convert(self, predicted: Tensor, x_t: Tensor, t: Tensor, *, to: str, kind: str | None = None) -> Tensor:
        """A prediction of `kind` at (x_t, t) as one of kind `to`, (B, *latent)."""
        checks.require_like("x_t", x_t, "predicted", checks.require_latents("predicted", predicted))
        source, to = self._kind(kind), _known("to", to)
        alpha, sigma, value, x_t = self._prepare(t, predicted, x_t)
        if source == to:
            return value
        if source == "x0":
            x0, eps = value, (x_t - alpha * value) / _divisor("sigma", sigma, t, "x0", to)
        elif source == "v":
            a, b = self._velocity(alpha, sigma)
            x0, eps = a * x_t - sigma * value, b * x_t + alpha * value
        else:
            eps = value if source == "eps" else -sigma * value
            if to in ("eps", "score"):
                x0 = x_t  # not read
            else:
                x0 = (x_t - sigma * eps) / _divisor("alpha", alpha, t, source, to)
        if to == "x0":
            return x0
        return eps if to == "eps" else self._from_both(to, x0, eps, alpha, sigma, t=t, source=source)

    def add_score(self, predicted: Tensor, score: Tensor, t: Tensor, kind: str | None = None) -> Tensor:
        """The prediction of `kind` whose score is larger by `score`, (B, *latent)."""
        checks.require_like("score", score, "predicted", checks.require_latents("predicted", predicted))
        kind = self._kind(kind)
        alpha, sigma, value, added = self._prepare(t, predicted, score)
        if kind == "score":
            return value + added
        if kind == "eps":
            return value - sigma * added
        divisor = _divisor("alpha", alpha, t, "score", kind)
        return value + sigma.square() / divisor * added if kind == "x0" else value - sigma / divisor * added

    def require_times(self, t: object, batch: int | None = None, device: torch.device | None = None) -> Tensor:
        """A (B,) tensor of times of this schedule; B and the device may be prescribed."""
        expected = f"({'B' if batch is None else batch},)"
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.time_dtypes)
        where = "" if device is None else f", on {device}"
        if (
            not isinstance(t, Tensor)
            or t.ndim != 1
            or t.numel() == 0
            or t.dtype not in self.time_dtypes
            or (batch is not None and t.shape[0] != batch)
            or (device is not None and t.device != device)
        ):
            raise ValueError(f"t: expected shape {expected}, {names}{where}, got {checks.describe(t)}")
        if checks.values_are_checked(t.device) and not bool(((t >= 0) & (t <= self.last)).all()):
            raise ValueError(
                f"t: expected times in [0, {self.last:g}] of {self!r}, got values from {t.min().item()} to "
                f"{t.max().item()}"
            )
        return t

    def _kind(self, kind: str | None) -> str:
        return self.kind if kind is None else _known("kind", kind)

    def _prepare(self, t: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha and sigma as (B, 1, ..., 1) and both latents, all in the dtype of the arithmetic."""
        self.require_times(t, first.shape[0], first.device)
        dtype = compute_dtype(first, second)
        alpha, sigma = (per_sample(level, first) for level in self._levels(t, dtype))
        return alpha, sigma, first.to(dtype), second.to(dtype)

    def _from_both(
        self, to: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, t: Tensor | None = None, source: str = ""
    ) -> Tensor:
        """v or score of known x0 and eps."""
        if to == "score":
            return -eps / _divisor("sigma", sigma, t, source, to)
        a, b = self._velocity(alpha, sigma)
        return a * eps - b * x0


class RectifiedFlow(Schedule):
    """alpha = 1 - t, sigma = t, t in [0, 1]; models predict v = eps - x0 (SD3, FLUX, Qwen-Image, Z-Image, Wan)."""

    kind = "v"
    time_dtypes = (torch.float32, torch.float64)
    horizon = 1.0
    last = 1.0

    def _levels(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sigma = t.to(dtype)
        return 1.0 - sigma, sigma

    def _velocity(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(alpha)
        return one, one

    def __repr__(self) -> str:
        return "RectifiedFlow()"


class VP(Schedule):
    """Variance preserving: alpha^2 = alphas_cumprod[t], sigma^2 = 1 - alpha^2; models predict eps (SDXL).

    t is a training timestep, integer or between two integers, in [0, T - 1]; in between, sigma / alpha is linear in t
    (as in the Euler scheduler of such models).

    Args:
        alphas_cumprod: T >= 2 numbers that fall strictly inside (0, 1), as a scheduler of the model holds them.

    Raises:
        ConfigError (a ValueError): anything else. A schedule that ends without signal, alphas_cumprod[-1] = 0, has no
            x0 to read off eps there.
    """

    kind = "eps"
    time_dtypes = (torch.int64, torch.int32, torch.float32, torch.float64)

    def __init__(self, alphas_cumprod: Tensor | Sequence[float]) -> None:
        signal = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        inside = signal.ndim == 1 and signal.numel() >= 2 and bool(((signal > 0) & (signal < 1)).all())
        if not inside or not bool((signal.diff() < 0).all()):
            raise ConfigError(
                "alphas_cumprod: expected at least two numbers that fall strictly inside (0, 1), got "
                f"shape {tuple(signal.shape)} with values {signal.flatten()[:3].tolist()} ..; pass the scheduler's "
                "alphas_cumprod"
            )
        self.alphas_cumprod = signal
        self.horizon = float(signal.numel())
        self.last = float(signal.numel() - 1)
        self._ratios = ((1.0 - signal) / signal).sqrt()  # (T,) sigma / alpha
        self._placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _levels(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        table = self._placed.get((t.device, dtype))
        if table is None:
            table = self._placed[t.device, dtype] = self._ratios.to(t.device, dtype)
        below = t.floor().long() if t.is_floating_point() else t.long()
        ratio = table[below]
        if t.is_floating_point():
            above = (below + 1).clamp(max=table.numel() - 1)
            ratio = ratio + (t - below).to(dtype) * (table[above] - ratio)
        alpha = (1.0 + ratio.square()).rsqrt()
        return alpha, alpha * ratio

    def _velocity(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return alpha, sigma

    def __repr__(self) -> str:
        return f"VP({int(self.horizon)} timesteps)"


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when one of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1), to broadcast over `like` (B, *latent)."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def _known(argument: str, kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"{argument}: expected one of {KINDS}, got {kind!r}{nearest(str(kind), KINDS)}")
    return kind


def _divisor(name: str, level: Tensor, t: Tensor | None, source: str, to: str) -> Tensor:
    """`level`, checked not to be zero where values are looked at."""
    if checks.values_are_checked(level.device) and bool((level == 0).any()):
        times = "" if t is None else f" at t = {t[level.flatten() == 0][0].item():g}"
        raise ValueError(
            f"t: {name} is 0{times}, where {to} cannot be had from {source}; keep times inside of the range, such as "
            "2 to 98 % of it"
        )
    return level
