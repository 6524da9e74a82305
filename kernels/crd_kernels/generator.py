"""DIDR's generator stage: its sums, and the gradient of its samples, each latent-sized tensor read once in either.

    p = c + (w - 1)(c - u), or c without u
    gap = slope (ta - p),   correction = level s_r,   D = gap - correction,   g = scale D

Products are rounded before they are subtracted, so both kernels see the same D. Sums are partial per program and added
by a second kernel in a fixed order: no atomics, so a call gives the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import ROUNDING, elementwise_config, processors_of, reduction_config


@triton.jit
def _terms(
    p_ta,
    p_ref,
    p_uncond,
    p_score,
    i_row,
    o_element,
    m_element,
    ta_stride,
    ref_stride,
    uncond_stride,
    score_stride,
    extra_guidance,
    slope,
    level,
    GUIDED: tl.constexpr,
):
    """(BLOCK,) fp32 each: p, gap and correction; 0 beyond the row, as long as slope and level are finite."""
    guided = tl.load(p_ref + i_row * ref_stride + o_element, mask=m_element, other=0.0).to(tl.float32)
    if GUIDED:
        uncond = tl.load(p_uncond + i_row * uncond_stride + o_element, mask=m_element, other=0.0).to(tl.float32)
        guided = tl.fma(extra_guidance + tl.zeros_like(guided), guided - uncond, guided)
    ta = tl.load(p_ta + i_row * ta_stride + o_element, mask=m_element, other=0.0).to(tl.float32)
    score = tl.load(p_score + i_row * score_stride + o_element, mask=m_element, other=0.0).to(tl.float32)
    return guided, slope * (ta - guided), level * score


@triton.jit
def _in_fours(values, BLOCK: tl.constexpr):
    """(BLOCK / 4,) sums of four neighbours, which one thread holds: five sums in full width are too many registers."""
    return tl.sum(tl.reshape(values, [BLOCK // 4, 4]), 1)


@triton.jit
def partial_sums_kernel(
    p_ta,  # (B, D), rows a stride apart; so the ref, uncond, score, x0 and x_t
    p_ref,
    p_uncond,  # unused without GUIDED
    p_score,
    p_x0,  # unused without HAS_X0
    p_x_t,  # unused without SHIFTED
    p_slope,  # (B,) float32
    p_level,
    p_shift,  # unused without SHIFTED
    p_partial,  # (B, splits, 4) float32
    p_invalid,  # (B, splits) int32
    extra_guidance,
    dim,
    splits,
    tiles,
    ta_stride,
    ref_stride,
    uncond_stride,
    score_stride,
    x0_stride,
    x_t_stride,
    GUIDED: tl.constexpr,
    HAS_X0: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = (tl.program_id(0) // splits).to(tl.int64)
    i_split = (tl.program_id(0) % splits).to(tl.int64)
    slope = tl.load(p_slope + i_row)
    level = tl.load(p_level + i_row)
    distances = tl.zeros([BLOCK // 4], tl.float32)
    gaps = tl.zeros([BLOCK // 4], tl.float32)
    corrections = tl.zeros([BLOCK // 4], tl.float32)
    differences = tl.zeros([BLOCK // 4], tl.float32)
    invalid = tl.zeros([BLOCK // 4], tl.int32)
    for i_tile in range(tiles):
        o_element = (i_split * tiles + i_tile) * BLOCK + tl.arange(0, BLOCK)
        m_element = o_element < dim
        guided, gap, correction = _terms(
            p_ta, p_ref, p_uncond, p_score, i_row, o_element, m_element, ta_stride, ref_stride, uncond_stride,
            score_stride, extra_guidance, slope, level, GUIDED,
        )  # fmt: skip
        difference = gap - correction
        m_finite = tl.abs(difference) < float("inf")
        invalid += _in_fours((m_element & (m_finite == 0)).to(tl.int32), BLOCK)
        gaps += _in_fours(tl.where(m_finite, gap * gap, 0.0), BLOCK)
        corrections += _in_fours(tl.where(m_finite, correction * correction, 0.0), BLOCK)
        differences += _in_fours(tl.where(m_finite, difference * difference, 0.0), BLOCK)
        if HAS_X0:
            estimate = slope * guided
            if SHIFTED:
                x_t = tl.load(p_x_t + i_row * x_t_stride + o_element, mask=m_element, other=0.0).to(tl.float32)
                estimate = tl.fma(tl.load(p_shift + i_row) + tl.zeros_like(x_t), x_t, estimate)
            x0 = tl.load(p_x0 + i_row * x0_stride + o_element, mask=m_element, other=0.0).to(tl.float32)
            distances += _in_fours(tl.where(m_finite, tl.abs(x0 - estimate), 0.0), BLOCK)
    i_partial = i_row * splits + i_split
    tl.store(p_partial + i_partial * 4, tl.sum(distances))
    tl.store(p_partial + i_partial * 4 + 1, tl.sum(gaps))
    tl.store(p_partial + i_partial * 4 + 2, tl.sum(corrections))
    tl.store(p_partial + i_partial * 4 + 3, tl.sum(differences))
    tl.store(p_invalid + i_partial, tl.sum(invalid))


@triton.jit
def finalise_kernel(
    p_partial,  # (B, splits, 4) float32
    p_invalid,  # (B, splits) int32
    p_distance,
    p_gap,
    p_correction,
    p_difference,  # (B,) float32
    p_count,  # (B,) int64
    splits,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    distances = tl.zeros([BLOCK], tl.float32)
    gaps = tl.zeros([BLOCK], tl.float32)
    corrections = tl.zeros([BLOCK], tl.float32)
    differences = tl.zeros([BLOCK], tl.float32)
    invalid = tl.zeros([BLOCK], tl.int64)
    for start in range(0, splits, BLOCK):
        i_split = start + tl.arange(0, BLOCK)
        m_split = i_split < splits
        i_partial = i_row * splits + i_split
        distances += tl.load(p_partial + i_partial * 4, mask=m_split, other=0.0)
        gaps += tl.load(p_partial + i_partial * 4 + 1, mask=m_split, other=0.0)
        corrections += tl.load(p_partial + i_partial * 4 + 2, mask=m_split, other=0.0)
        differences += tl.load(p_partial + i_partial * 4 + 3, mask=m_split, other=0.0)
        invalid += tl.load(p_invalid + i_partial, mask=m_split, other=0).to(tl.int64)
    tl.store(p_distance + i_row, tl.sum(distances))
    tl.store(p_gap + i_row, tl.sum(gaps))
    tl.store(p_correction + i_row, tl.sum(corrections))
    tl.store(p_difference + i_row, tl.sum(differences))
    tl.store(p_count + i_row, tl.sum(invalid))


@triton.jit
def gradient_kernel(
    p_ta,
    p_ref,
    p_uncond,
    p_score,
    p_slope,
    p_level,
    p_scale,  # (B,) float32
    p_upstream,  # one float32; unused without HAS_UPSTREAM
    p_grad,  # (B, D) contiguous
    extra_guidance,
    dim,
    ta_stride,
    ref_stride,
    uncond_stride,
    score_stride,
    GUIDED: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(dim, BLOCK)
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    o_element = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_element = o_element < dim
    _, gap, correction = _terms(
        p_ta, p_ref, p_uncond, p_score, i_row, o_element, m_element, ta_stride, ref_stride, uncond_stride, score_stride,
        extra_guidance, tl.load(p_slope + i_row), tl.load(p_level + i_row), GUIDED,
    )  # fmt: skip
    scale = tl.load(p_scale + i_row)
    g = scale * (gap - correction)
    m_finite = tl.abs(g) < float("inf")
    if HAS_UPSTREAM:
        g = tl.load(p_upstream) * g
    g = tl.where(scale != 0.0, tl.where(m_finite, g, 0.0), 0.0)
    tl.store(p_grad + i_row * dim + o_element, g.to(p_grad.dtype.element_ty), mask=m_element)


def generator_statistics(
    ta: torch.Tensor,
    ref: torch.Tensor,
    ref_uncond: torch.Tensor | None,
    guidance_scale: float,
    s_r: torch.Tensor,
    slope: torch.Tensor,
    level: torch.Tensor,
    x0: torch.Tensor | None,
    x_t: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of |x0 - shift x_t - slope p|, gap^2, correction^2 and D^2, (B,) float32 each, over the elements whose D is
    finite, and the count (B,) int64 of the others, in two launches.

    ta, ref, ref_uncond, s_r, x0, x_t (B, *latent); slope, level, shift (B,) contiguous float32. Without x0 the first
    sum is 0; without x_t the shift is.
    """
    call = _Call(ta, ref, ref_uncond, s_r)
    sums = [torch.empty(call.batch, dtype=torch.float32, device=ta.device) for _ in range(4)]
    count = torch.empty(call.batch, dtype=torch.int64, device=ta.device)
    distance, gap, correction, difference = sums
    config = reduction_config(call.batch, call.dim, processors_of(ta.device))
    partial = torch.empty(call.batch, config.splits, 4, dtype=torch.float32, device=ta.device)
    invalid = torch.empty(call.batch, config.splits, dtype=torch.int32, device=ta.device)
    x0_rows, x_t_rows = (None if tensor is None else call.rows(tensor) for tensor in (x0, x_t))
    partial_sums_kernel[(call.batch * config.splits,)](
        *call.tensors,
        partial if x0_rows is None else x0_rows,
        partial if x_t_rows is None else x_t_rows,
        slope,
        level,
        level if shift is None else shift,
        partial,
        invalid,
        guidance_scale - 1.0,
        call.dim,
        config.splits,
        config.tiles,
        *call.strides,
        0 if x0_rows is None else x0_rows.stride(0),
        0 if x_t_rows is None else x_t_rows.stride(0),
        GUIDED=ref_uncond is not None,
        HAS_X0=x0 is not None,
        SHIFTED=x_t is not None,
        BLOCK=config.block,
        num_warps=config.warps,
        **ROUNDING,
    )
    finalise_kernel[(call.batch,)](
        partial,
        invalid,
        distance,
        gap,
        correction,
        difference,
        count,
        config.splits,
        BLOCK=min(1024, max(16, triton.next_power_of_2(config.splits))),
        num_warps=1,
        **ROUNDING,
    )
    return distance, gap, correction, difference, count


def generator_gradient(
    ta: torch.Tensor,
    ref: torch.Tensor,
    ref_uncond: torch.Tensor | None,
    guidance_scale: float,
    s_r: torch.Tensor,
    slope: torch.Tensor,
    level: torch.Tensor,
    scale: torch.Tensor,
    upstream: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """g times upstream in `dtype` and the layout of `ta`, in one launch; 0 where g is not finite or its scale is 0.

    scale: (B,) contiguous float32. upstream: () float32, or None for 1. The others as in `generator_statistics`.
    """
    call = _Call(ta, ref, ref_uncond, s_r)
    out = torch.empty_like(ta, dtype=dtype)
    ordered = out.permute(call.axes)
    direct = ordered.is_contiguous()
    rows = ordered if direct else torch.empty(ordered.shape, dtype=dtype, device=out.device)
    config = elementwise_config(call.dim)
    gradient_kernel[(call.batch * triton.cdiv(call.dim, config.block),)](
        *call.tensors,
        slope,
        level,
        scale,
        scale if upstream is None else upstream,
        rows,
        guidance_scale - 1.0,
        call.dim,
        *call.strides,
        GUIDED=ref_uncond is not None,
        HAS_UPSTREAM=upstream is not None,
        BLOCK=config.block,
        num_warps=config.warps,
        **ROUNDING,
    )
    if not direct:
        ordered.copy_(rows)
    return out


class _Call:
    """The arguments that both launches share.

    Elements are walked in the memory order of `ta`. A tensor whose rows are not contiguous in that order is copied.
    """

    def __init__(self, ta: torch.Tensor, ref: torch.Tensor, ref_uncond: torch.Tensor | None, s_r: torch.Tensor) -> None:
        self.batch, self.dim = ta.shape[0], ta.shape[1:].numel()
        self.axes = [0, *sorted(range(1, ta.ndim), key=ta.stride, reverse=True)]
        first, conditional, score = (self.rows(tensor) for tensor in (ta, ref, s_r))
        uncond = first if ref_uncond is None else self.rows(ref_uncond)
        self.tensors = (first, conditional, uncond, score)
        self.strides = tuple(tensor.stride(0) for tensor in self.tensors)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, D) with neighbouring elements side by side: a view where rows are dense in the order of the walk."""
        flat = tensor.permute(self.axes).reshape(self.batch, -1)
        return flat if self.dim < 2 or flat.stride(1) == 1 else flat.contiguous()
