"""The forward process x_t = (1 - sigma) x0 + sigma eps with eps made in registers: one read, one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import ROUNDING, elementwise_config
from .normals import normals


@triton.jit(do_not_specialize=["seed", "stream"])
def noise_kernel(
    p_x0,  # (B, D), rows x0_row_stride elements apart; unused without HAS_X0
    p_sigma,  # (B,) float32; unused without HAS_X0
    p_ids,  # (B,) int64
    p_out,  # (B, D) contiguous
    seed,
    stream,
    dim,
    x0_row_stride,
    HAS_X0: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(dim, BLOCK)
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    o_element = first + tl.arange(0, BLOCK)
    m_element = o_element < dim
    value = normals(seed, stream, tl.load(p_ids + i_row), first, BLOCK)
    if HAS_X0:
        sigma = tl.load(p_sigma + i_row)
        x0 = tl.load(p_x0 + i_row * x0_row_stride + o_element, mask=m_element, other=0.0).to(tl.float32)
        value = tl.fma(sigma + tl.zeros([BLOCK], tl.float32), value, (1.0 - sigma) * x0)
    tl.store(p_out + i_row * dim + o_element, value.to(p_out.dtype.element_ty), mask=m_element)


def noise(
    x0: torch.Tensor, sigma: torch.Tensor, sample_ids: torch.Tensor, seed: int, stream: int, dtype: torch.dtype
) -> torch.Tensor:
    """x_t, contiguous, in `dtype`: x0 (B, *latent), sigma (B,) float32, sample_ids (B,) int64, seed as int64."""
    out = torch.empty(x0.shape, dtype=dtype, device=x0.device)
    rows = x0.reshape(len(x0), -1)
    if rows.shape[1] and rows.stride(1) != 1:
        rows = rows.contiguous()
    _launch(rows, sigma.contiguous(), sample_ids.contiguous(), out, seed, stream)
    return out


def epsilon(
    sample_ids: torch.Tensor, shape: tuple[int, ...], seed: int, stream: int, dtype: torch.dtype
) -> torch.Tensor:
    """The normals that `noise` adds, contiguous (B, *latent) in `dtype`."""
    out = torch.empty(shape, dtype=dtype, device=sample_ids.device)
    _launch(None, None, sample_ids.contiguous(), out, seed, stream)
    return out


def _launch(
    rows: torch.Tensor | None,
    sigma: torch.Tensor | None,
    sample_ids: torch.Tensor,
    out: torch.Tensor,
    seed: int,
    stream: int,
) -> None:
    batch = out.shape[0]
    dim = out.shape[1:].numel()
    if batch == 0 or dim == 0:
        return
    config = elementwise_config(dim)
    noise_kernel[(batch * triton.cdiv(dim, config.block),)](
        out if rows is None else rows,
        sample_ids if sigma is None else sigma,
        sample_ids,
        out,
        seed,
        stream,
        dim,
        0 if rows is None else rows.stride(0),
        HAS_X0=rows is not None,
        BLOCK=config.block,
        num_warps=config.warps,
        **ROUNDING,
    )
