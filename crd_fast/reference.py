"""Every op in plain PyTorch: the oracle the compiled implementations are tested against.

Nothing here is fast, everything here runs on any device and is exact in float64. The symbols are those of
"Diffusion Reinforcement Learning via Centered Reward Distillation" (arXiv 2603.14128): x_t = (1 - sigma) x0 +
sigma eps, velocity y = eps - x0, and per sample the residual statistics

    E = mean_d (f - y)^2,    M = mean_d |f - y|,    K = mean_d (f - f_ref)^2.

The noise is counter based: eps depends on (seed, stream, sample id, element index) alone, so batch
composition, rank, world size, device and memory layout do not change it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

SIGMA_CLAMP = 1e-3
"""x0-predictions divide by sigma, eps-predictions by 1 - sigma; the divisor is kept at least this large."""

_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10

# Rows are worked on in pieces of about this many elements: temporaries stay small next to the latents.
_CHUNK_ELEMENTS = 1 << 22


class ResidualInputs(NamedTuple):
    """What the two latent-sized residual ops take, in the order of their registered schema.

    predicted (B, *latent), any float dtype. The target is either `target` (B, *latent), or `target` None and
    x0 (B, *latent), sigma (B,), sample_ids (B,) int64, seed (two's-complement int64) and stream, from which
    eps is regenerated. ref, ref_uncond (B, *latent) or None: the anchor u + guidance_scale (c - u), or ref
    alone when ref_uncond is None. mask: bool, as many dimensions as predicted, broadcastable to it, or None.
    prediction: what predicted (and ref, and old) is, "v", "x0" or "eps"; the last two need sigma. old (B, *latent): a
    second prediction of the same target, whose E and M are wanted too, or None.
    """

    predicted: torch.Tensor
    target: torch.Tensor | None
    x0: torch.Tensor | None
    sigma: torch.Tensor | None
    sample_ids: torch.Tensor | None
    seed: int
    stream: int
    ref: torch.Tensor | None
    ref_uncond: torch.Tensor | None
    guidance_scale: float
    mask: torch.Tensor | None
    prediction: str
    old: torch.Tensor | None = None

    def rows(self, start: int, stop: int) -> ResidualInputs:
        """The inputs of samples start..stop-1."""

        def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[start:stop]

        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else self.mask[start:stop]
        return self._replace(
            predicted=self.predicted[start:stop],
            old=cut(self.old),
            target=cut(self.target),
            x0=cut(self.x0),
            sigma=cut(self.sigma),
            sample_ids=cut(self.sample_ids),
            ref=cut(self.ref),
            ref_uncond=cut(self.ref_uncond),
            mask=mask,
        )


# --- noise ------------------------------------------------------------------------------------------------


def _multiply_words(multiplier: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of multiplier * word; int64 holds no 64-bit product, so `word` is halved first."""
    low = multiplier * (word & 0xFFFF)  # < 2^48
    high = multiplier * (word >> 16) + (low >> 16)  # < 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(
    c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor, key: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) of a counter of four int64 tensors of 32-bit words that
    broadcast."""
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        high0, low0 = _multiply_words(_PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_words(_PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _PHILOX_KEY_STEPS[0]) & _WORD
        k1 = (k1 + _PHILOX_KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _box_muller(radius_word: torch.Tensor, angle_word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float64 normals from two words. u1 uses 23 bits plus a half, so it is never 0 nor 1."""
    u1 = ((radius_word >> 9).double() + 0.5) * 2.0**-23
    turn = angle_word >> 8  # in 2^-24 of a full turn
    angle = turn.double() * (2.0 * math.pi * 2.0**-24)
    half_turn, quarter_turn = 1 << 23, 1 << 22
    # At quarter turns the rounded angle misses the zero by 1e-16, which relative to zero is everything.
    cosine = torch.where(turn % half_turn == quarter_turn, 0.0, torch.cos(angle))
    sine = torch.where(turn % half_turn == 0, 0.0, torch.sin(angle))
    radius = torch.sqrt(-2.0 * torch.log(u1))
    return radius * cosine, radius * sine


def _normals(sample_ids: torch.Tensor, dim: int, seed: int, stream: int) -> torch.Tensor:
    """Float32 normals (B, dim) of `dim` elements a sample, in row-major order of the sample."""
    key = (seed & _WORD, (seed >> 32) & _WORD)
    block = torch.arange((dim + 3) // 4, device=sample_ids.device) & _WORD  # (blocks,) element index / 4
    ids = sample_ids[:, None]  # (B, 1); int64 shifts keep the sign, the masks below drop it
    w0, w1, w2, w3 = philox_words(
        block[None, :], torch.full_like(block, stream)[None, :], ids & _WORD, (ids >> 32) & _WORD, key
    )  # each (B, blocks)
    normals = torch.stack((*_box_muller(w0, w1), *_box_muller(w2, w3)), dim=-1)  # (B, blocks, 4)
    return normals.flatten(1)[:, :dim].float()


def epsilon(sample_ids: torch.Tensor, shape: Sequence[int], seed: int, stream: int, dtype: torch.dtype) -> torch.Tensor:
    """Standard normal noise of logical `shape` (B, *latent), contiguous, rounded once from float32 to
    `dtype`.

    sample_ids: (B,) int64. seed: 64 bits, signed or unsigned. stream in [0, 2^31).
    """
    out = torch.empty(tuple(shape), dtype=dtype, device=sample_ids.device)
    flat = out.view(shape[0], -1)
    for start, stop in _row_ranges(flat.shape[0], flat.shape[1]):
        flat[start:stop] = _normals(sample_ids[start:stop], flat.shape[1], seed, stream).to(dtype)
    return out


def noise(
    x0: torch.Tensor,
    sigma: torch.Tensor,
    sample_ids: torch.Tensor,
    seed: int,
    stream: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x_t = (1 - sigma) x0 + sigma eps, (B, *latent) contiguous in `dtype`, computed in float32.

    float64 is used instead when x0 or `dtype` is float64. sigma: (B,). eps as in `epsilon`, in float32.
    """
    compute = torch.float64 if torch.float64 in (x0.dtype, dtype) else torch.float32
    out = torch.empty(x0.shape, dtype=dtype, device=x0.device)
    for start, stop in _row_ranges(x0.shape[0], x0[0].numel()):
        rows = x0[start:stop].to(compute)
        level = _per_row(sigma[start:stop].to(compute), rows)
        eps = epsilon(sample_ids[start:stop], rows.shape, seed, stream, torch.float32).to(compute)
        out[start:stop] = ((1.0 - level) * rows + level * eps).to(dtype)
    return out


# --- residual statistics and their gradient ---------------------------------------------------------------


def statistics_dtype(inputs: ResidualInputs) -> torch.dtype:
    """float64 when one of the predictions is, else float32: half precision is never accumulated in."""
    predictions = (inputs.predicted, inputs.ref, inputs.ref_uncond, inputs.old)
    doubled = any(tensor is not None and tensor.dtype == torch.float64 for tensor in predictions)
    return torch.float64 if doubled else torch.float32


def velocity_factor(sigma: torch.Tensor, prediction: str) -> torch.Tensor:
    """(B,) size of the factor that turns a prediction's error into the velocity error on the linear path.

    x_t = (1 - sigma) x0 + sigma eps gives v_hat - v = -(x0_hat - x0) / sigma = (eps_hat - eps) / (1 - sigma);
    every statistic is even in the error, so the sign is dropped. The divisor is at least `SIGMA_CLAMP`.
    """
    if prediction == "x0":
        return 1.0 / sigma.clamp(min=SIGMA_CLAMP)
    if prediction == "eps":
        return 1.0 / (1.0 - sigma).clamp(min=SIGMA_CLAMP)
    return torch.ones_like(sigma)


def residual_stats(inputs: ResidualInputs) -> tuple[torch.Tensor, ...]:
    """E, M, K and the E and M of `old`, each (B,) in `statistics_dtype`; K is zero without a reference, and what is of
    `old` is (0,) without it.

    Means run over the valid elements of a sample; a sample without any has E = M = K = 0.
    """
    dtype = statistics_dtype(inputs)
    batch, device = inputs.predicted.shape[0], inputs.predicted.device
    mse, mae, kl = (torch.zeros(batch, dtype=dtype, device=device) for _ in range(3))
    old_mse, old_mae = (torch.zeros(0 if inputs.old is None else batch, dtype=dtype, device=device) for _ in range(2))
    for start, stop in _row_ranges(batch, inputs.predicted[0].numel()):
        rows = inputs.rows(start, stop)
        factor, count = factor_and_count(rows, dtype)  # (rows,), (rows,)
        target = _target(rows, dtype)

        def squared(difference: torch.Tensor, rows: ResidualInputs = rows) -> torch.Tensor:
            return _masked(difference, rows.mask).flatten(1).square().sum(1)

        def absolute(difference: torch.Tensor, rows: ResidualInputs = rows) -> torch.Tensor:
            return _masked(difference, rows.mask).flatten(1).abs().sum(1)

        error = rows.predicted.to(dtype) - target
        mse[start:stop] = factor.square() * squared(error) / count
        mae[start:stop] = factor * absolute(error) / count
        if rows.old is not None:
            old_error = rows.old.to(dtype) - target
            old_mse[start:stop] = factor.square() * squared(old_error) / count
            old_mae[start:stop] = factor * absolute(old_error) / count
        anchor = _anchor(rows, dtype)
        if anchor is not None:
            kl[start:stop] = factor.square() * squared(rows.predicted.to(dtype) - anchor) / count
    return mse, mae, kl, old_mse, old_mae


def residual_grad(
    inputs: ResidualInputs,
    grad_mse: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    upstream: torch.Tensor | None = None,
) -> torch.Tensor:
    """dL/df = (2/D) factor^2 [ dL/dE (f - y) + dL/dK (f - f_ref) ] in shape, dtype and layout of `predicted`.

    grad_mse, grad_kl: (B,) or None for zero. upstream: () or (B,), multiplies both, or None for 1. A coefficient of
    exactly zero drops its term, so that samples taken out of the loss get a zero gradient even where their predictions
    are not finite.
    """
    dtype = statistics_dtype(inputs)
    out = torch.empty_like(inputs.predicted)
    if upstream is not None:
        # not NaN where upstream is infinite, as it is when a gradient scaler overflows
        grad_mse, grad_kl = (
            None if slope is None else torch.where(slope == 0, 0.0, slope * upstream) for slope in (grad_mse, grad_kl)
        )
    for start, stop in _row_ranges(out.shape[0], inputs.predicted[0].numel()):
        rows = inputs.rows(start, stop)
        predicted = rows.predicted.to(dtype)
        factor, count = factor_and_count(rows, dtype)
        scale = 2.0 * factor.square() / count  # (rows,)
        grad = torch.zeros_like(predicted)
        if grad_mse is not None:
            grad = _weighted(scale * grad_mse[start:stop].to(dtype), predicted - _target(rows, dtype))
        anchor = None if grad_kl is None else _anchor(rows, dtype)
        if anchor is not None and grad_kl is not None:
            grad = grad + _weighted(scale * grad_kl[start:stop].to(dtype), predicted - anchor)
        out[start:stop] = _masked(grad, rows.mask).to(out.dtype)
    return out


def _target(rows: ResidualInputs, dtype: torch.dtype) -> torch.Tensor:
    """What `predicted` should have been: the given target, or eps - x0, x0 or eps made from the seed."""
    if rows.target is not None:
        return rows.target.to(dtype)
    x0, _, sample_ids = seeded_target(rows)
    if rows.prediction == "x0":
        return x0.to(dtype)
    eps = epsilon(sample_ids, x0.shape, rows.seed, rows.stream, torch.float32).to(dtype)
    return eps if rows.prediction == "eps" else eps - x0.to(dtype)


def seeded_target(inputs: ResidualInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x0, sigma and sample_ids of inputs whose target is regenerated from the seed."""
    if inputs.x0 is None or inputs.sigma is None or inputs.sample_ids is None:
        raise ValueError("residual op: expected a target tensor, or all of x0, sigma and sample_ids")
    return inputs.x0, inputs.sigma, inputs.sample_ids


def _anchor(rows: ResidualInputs, dtype: torch.dtype) -> torch.Tensor | None:
    """f_ref = u + w (c - u), or c when there is no unconditional prediction; None without a reference."""
    if rows.ref is None:
        return None
    conditional = rows.ref.to(dtype)
    if rows.ref_uncond is None:
        return conditional
    unconditional = rows.ref_uncond.to(dtype)
    return unconditional + rows.guidance_scale * (conditional - unconditional)


def factor_and_count(rows: ResidualInputs, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows,) velocity factor and (rows,) number of valid elements, at least one."""
    predicted = rows.predicted
    batch, dim = predicted.shape[0], predicted[0].numel()
    if rows.prediction == "v":
        factor = torch.ones(batch, dtype=dtype, device=predicted.device)
    else:
        factor = velocity_factor(seeded_target(rows)[1].to(dtype), rows.prediction)
    if rows.mask is None:
        return factor, torch.full_like(factor, dim)
    valid = rows.mask.flatten(1).sum(1) * (dim // rows.mask[0].numel())  # a broadcast axis repeats its elements
    return factor, valid.clamp(min=1).to(dtype).expand(batch)


def _masked(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zero where the mask is False; padding may hold anything, NaN included."""
    return values if mask is None else torch.where(mask, values, 0.0)


def _weighted(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    per_row = _per_row(weight, values)
    return torch.where(per_row == 0, 0.0, per_row * values)


def _per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) as (B, 1, ..., 1), to broadcast over `like` (B, *latent)."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def _row_ranges(rows: int, elements: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_ELEMENTS // max(elements, 1))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
