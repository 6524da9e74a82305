"""The forward process x_t = (1 - sigma) x0 + sigma eps: noising, residual statistics, choice of noise levels.

Noise is never stored. A `Noised` keeps the seed instead, and eps, the velocity target and the residuals are
made from it again, bit for bit, on any device and in any batch composition.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crd_fast import checks, ops
from crd_fast.errors import nearest
from crd_fast.operation import refuse_transforms
from crd_fast.reference import ResidualInputs

PREDICTIONS = ("v", "x0", "eps")
TIMESTEP_STRATEGIES = ("uniform", "logit_normal", "discrete")


Rows = slice | Tensor | Sequence[int]
"""Of a batch: a slice, indices or a bool mask."""


@dataclass(frozen=True, eq=False)
class Noised:
    """One noising of a batch, with what is needed to make its noise again.

    x_t (B, *latent); x0 (B, *latent); sigma (B,) float32, or float64 when x0 is; seed in [0, 2^64);
    sample_ids (B,) int64; stream in [0, 2^31). Made by `noise`. `fwd[rows]` is that of some of the samples, a slice,
    indices or a bool mask.
    """

    x_t: Tensor
    x0: Tensor
    sigma: Tensor
    seed: int
    sample_ids: Tensor
    stream: int

    def epsilon(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The noise of x_t, (B, *latent) contiguous. Its definition is float32; `dtype` rounds that once."""
        return ops.epsilon(self.sample_ids, self.x0.shape, ops.signed_seed(self.seed), self.stream, dtype)

    def target(self) -> Tensor:
        """The velocity y = eps - x0, (B, *latent) in float32 (float64 when x0 is float64)."""
        dtype = torch.float64 if self.x0.dtype == torch.float64 else torch.float32
        return self.epsilon(dtype) - self.x0.to(dtype)

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, rows: Rows) -> Noised:
        x_t, x0, sigma, sample_ids = (_rows(whole, rows) for whole in (self.x_t, self.x0, self.sigma, self.sample_ids))
        return Noised(x_t, x0, sigma, self.seed, sample_ids, self.stream)


@dataclass(frozen=True, eq=False)
class ResidualStats:
    """All of a prediction that a forward-process loss keeps, in velocity units: mse (B,) = E, mae (B,) = M.

    `stats[rows]` is that of some of the samples, `ResidualStats.cat` that of several batches.
    """

    mse: Tensor
    mae: Tensor

    def __len__(self) -> int:
        return len(self.mse)

    def __getitem__(self, rows: Rows) -> ResidualStats:
        return ResidualStats(_rows(self.mse, rows), _rows(self.mae, rows))

    @staticmethod
    def cat(parts: Sequence[ResidualStats]) -> ResidualStats:
        """Of all samples, in the order given."""
        return ResidualStats(torch.cat([part.mse for part in parts]), torch.cat([part.mae for part in parts]))


def _rows(whole: Tensor, rows: Rows) -> Tensor:
    if not isinstance(rows, slice | Tensor | Sequence) or (isinstance(rows, Tensor) and rows.ndim != 1):
        raise TypeError(f"rows of a batch are {rows!r}: expected a slice, indices or a bool mask, as x[2:3] for one")
    return whole[rows]


def noise(
    x0: Tensor,
    sigma: Tensor,
    *,
    seed: int,
    sample_ids: Tensor | None = None,
    stream: int = 0,
    dtype: torch.dtype | None = None,
) -> Noised:
    """x_t = (1 - sigma) x0 + sigma eps in one pass, computed in float32 (float64 for float64 latents).

    eps is Philox4x32-10 and Box-Muller with key `seed` and counter (element index / 4, stream, sample id), so
    it depends on (seed, stream, sample id, element) alone. Differentiable in x0.

    Args:
        x0: clean latents (B, *latent), float16, bfloat16, float32 or float64, any layout.
        sigma: (B,) floating-point noise levels in [0, 1]; scheduler timesteps are divided by 1000 first.
        seed: int in [0, 2^64).
        sample_ids: (B,) int64 identities of the samples, default 0..B-1. One id, one noise.
        stream: int in [0, 2^31), tells apart several draws for one sample (timestep, inner epoch). Where one call
            has several timesteps of a sample, tell them apart by their ids, such as ids + (timestep << 40).
        dtype: floating dtype of x_t, default that of x0.

    Raises:
        ValueError: shape, dtype or device mismatch, an empty batch, seed or stream out of range, sigma
            outside [0, 1] (values are looked at on CPU, elsewhere with CRD_FAST_CHECKS=1).
        ExtensionMissingError: CPU latents, neither the C++ extension nor CRD_FAST_BACKEND=reference.
    """
    checks.require_latents("x0", x0)
    if not torch.compiler.is_compiling():
        refuse_transforms(x0)
    batch, device = x0.shape[0], x0.device
    checks.require_per_sample("sigma", sigma, batch, device)
    checks.require_sigma_range(sigma)
    seed, stream = checks.require_seed(seed), checks.require_stream(stream)
    if sample_ids is None:
        sample_ids = torch.arange(batch, device=device)
    checks.require_per_sample("sample_ids", sample_ids, batch, device, dtypes=(torch.int64,))
    if dtype is None:
        dtype = x0.dtype
    if dtype not in checks.PREDICTION_DTYPES:
        raise ValueError(f"dtype: expected float16, bfloat16, float32 or float64, got {dtype!r}")
    sigma = sigma.to(torch.float64 if x0.dtype == torch.float64 else torch.float32)
    x_t = ops.noise(x0, sigma, sample_ids, ops.signed_seed(seed), stream, dtype)
    return Noised(x_t, x0, sigma, seed, sample_ids, stream)


def residual_stats(
    predicted: Tensor, target: Noised | Tensor, *, mask: Tensor | None = None, prediction: str = "v"
) -> ResidualStats:
    """E = mean (f - y)^2 and M = mean |f - y| of each sample: all of an old model's prediction worth keeping.

    Equivalent to::

        error = predicted.float() - fwd.target()
        ResidualStats(error.square().flatten(1).mean(1), error.abs().flatten(1).mean(1))

    Args:
        predicted: (B, *latent), any float dtype. Gradients flow to it, through mse only.
        target: the `Noised` that was predicted from, or the velocity y like `predicted`.
        mask: bool, True where valid: (B, tokens) for (B, tokens, channels) latents, else broadcastable to
            `predicted` with as many dimensions. Give the mask that the loss gets.
        prediction: "v", "x0" or "eps". The last two are converted to velocity error, which divides by sigma
            or 1 - sigma, kept at least `crd_fast.reference.SIGMA_CLAMP`; they need a `Noised`.

    Returns:
        float32 statistics, float64 when `predicted` is float64.

    Raises:
        ValueError: shape, dtype or device mismatch, or a prediction type that cannot be converted.
    """
    mse, mae, *_ = ops.residual_stats(*residual_inputs("predicted", predicted, target, mask, prediction))
    return ResidualStats(mse, mae)


def residual_inputs(
    name: str,
    predicted: Tensor,
    target: Noised | Tensor,
    mask: Tensor | None,
    prediction: str,
    *,
    ref: Tensor | None = None,
    ref_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    old: Tensor | None = None,
) -> ResidualInputs:
    """Checked arguments of the residual ops. `name` is what the caller's user calls `predicted`."""
    checks.require_latents(name, predicted)
    if not torch.compiler.is_compiling():
        refuse_transforms(predicted)
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: expected one of {PREDICTIONS}, got {prediction!r}")
    velocity: Tensor | None = None
    x0: Tensor | None = None
    sigma: Tensor | None = None
    sample_ids: Tensor | None = None
    seed, stream = 0, 0
    if isinstance(target, Noised):
        checks.require_like("target.x0", target.x0, name, predicted)
        x0, sigma, sample_ids = target.x0.detach(), target.sigma, target.sample_ids
        seed, stream = ops.signed_seed(target.seed), target.stream
    else:
        velocity = checks.require_like("target", target, name, predicted).detach()
        if prediction != "v":
            raise ValueError(
                f"target: prediction={prediction!r} is converted with sigma, which a tensor does not carry; "
                "pass the Noised of crd_fast.noise, or convert the predictions to velocity and use "
                "prediction='v'"
            )
    for other_name, other in (("ref", ref), ("ref_uncond", ref_uncond), ("old", old)):
        if other is not None:
            checks.require_like(other_name, other, name, predicted)
    if mask is not None:
        mask = checks.require_mask(mask, predicted)
    if torch.is_grad_enabled() and predicted.requires_grad:
        velocity, x0, sigma, sample_ids = (checks.savable(given) for given in (velocity, x0, sigma, sample_ids))
        ref, ref_uncond, mask = (checks.savable(given) for given in (ref, ref_uncond, mask))
    return ResidualInputs(
        predicted=predicted,
        target=velocity,
        x0=x0,
        sigma=sigma,
        sample_ids=sample_ids,
        seed=seed,
        stream=stream,
        ref=None if ref is None else ref.detach(),
        ref_uncond=None if ref_uncond is None else ref_uncond.detach(),
        guidance_scale=float(guidance_scale),
        mask=mask,
        prediction=prediction,
        old=None if old is None else old.detach(),
    )


# --- noise levels -----------------------------------------------------------------------------------------


def sample_timesteps(
    strategy: str,
    count: int,
    *,
    seed: int,
    epoch: int,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    schedule: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """`count` noise levels of one epoch: random, stratified, and the same on every rank and machine.

    [0, 1) is cut into `count` strata with one uniform number u in each, so an epoch covers the whole range;
    the levels come in random order. They depend on (seed, epoch) alone, and PyTorch's global generators are
    left as they are.

    Args:
        strategy: "uniform": sigma = u. "logit_normal": sigma = sigmoid(mean + std * Phi^-1(u)) (Esser et al.
            2024, arXiv 2403.03206). "discrete": schedule[floor(u * len(schedule))].
        count: number of levels, at least 1.
        seed: int in [0, 2^64).
        epoch: int >= 0.
        mean, std: of the logit, for "logit_normal".
        shift: s > 0 of sigma -> s sigma / (1 + (s - 1) sigma), for "uniform" and "logit_normal".
        schedule: the noise levels in [0, 1] at which the rollout calls the model; required by "discrete" and
            wanted by it alone. Leave a final 0 out, the model is not called there. Every entry can be drawn,
            the last included.

    Returns:
        sigma (count,), float32, on the CPU.

    Raises:
        ValueError: an unknown strategy, a number out of range, or a schedule that is missing or not wanted.
    """
    _check_timestep_arguments(strategy, count, seed, epoch, std, shift)
    checks.require_finite_number("mean", mean)
    # The CPU generator takes 32 bits of a seed; hashing keeps neighbouring (seed, epoch) pairs unrelated.
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=4).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
    stratum = torch.randperm(count, generator=generator, device="cpu")  # (count,)
    u = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")  # (count,)
    u = (stratum + u) / count
    if strategy == "discrete":
        levels = _check_schedule(schedule)
        index = (u * levels.numel()).long().clamp(max=levels.numel() - 1)  # u may round up to 1
        return levels[index].float()
    if schedule is not None:
        raise ValueError(f"schedule: expected None for strategy={strategy!r}, only 'discrete' draws from a schedule")
    sigma = u if strategy == "uniform" else torch.sigmoid(mean + std * torch.special.ndtri(u))
    return (shift * sigma / (1.0 + (shift - 1.0) * sigma)).float()


def _check_timestep_arguments(strategy: str, count: int, seed: int, epoch: int, std: float, shift: float) -> None:
    if strategy not in TIMESTEP_STRATEGIES:
        raise ValueError(
            f"strategy: expected one of {TIMESTEP_STRATEGIES}, got {strategy!r}{nearest(strategy, TIMESTEP_STRATEGIES)}"
        )
    checks.require_seed(seed)
    for name, value, least in (("count", count, 1), ("epoch", epoch, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
    for name, scale in (("std", std), ("shift", shift)):
        if checks.require_finite_number(name, scale) <= 0:
            raise ValueError(f"{name}: expected a number > 0, got {scale!r}")


def _check_schedule(schedule: Sequence[float] | Tensor | None) -> Tensor:
    if schedule is None:
        raise ValueError("schedule: strategy='discrete' draws from the rollout's noise levels; pass them as schedule")
    levels = torch.as_tensor(schedule, dtype=torch.float64, device="cpu")
    if levels.ndim != 1 or levels.numel() == 0 or not bool(((levels >= 0) & (levels <= 1)).all()):
        raise ValueError(f"schedule: expected a non-empty list of noise levels in [0, 1], got {schedule!r}")
    return levels
