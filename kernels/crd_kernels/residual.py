"""Residual statistics and their gradient: every latent-sized tensor is read once, the noise is made in registers.

Sums are partial per program and added by a second kernel in a fixed order: no atomics, so a call gives the same bits
every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import ROUNDING, elementwise_config, processors_of, reduction_config
from .normals import normals

# What the target is made of.
TENSOR, VELOCITY, CLEAN, NOISE = 0, 1, 2, 3
_TENSOR, _CLEAN, _NOISE = tl.constexpr(TENSOR), tl.constexpr(CLEAN), tl.constexpr(NOISE)


@triton.jit
def _target(
    p_target,
    p_ids,
    i_row,
    first,
    o_element,
    m_element,
    row_stride,
    seed,
    stream,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(BLOCK,) fp32: the given target, eps - x0, x0 or eps; 0 beyond the row for a tensor."""
    if TARGET == _NOISE:
        target = normals(seed, stream, tl.load(p_ids + i_row), first, BLOCK)
    else:
        target = tl.load(p_target + i_row * row_stride + o_element, mask=m_element, other=0.0).to(tl.float32)
        if TARGET != _TENSOR and TARGET != _CLEAN:
            target = normals(seed, stream, tl.load(p_ids + i_row), first, BLOCK) - target
    return target


@triton.jit
def _anchor(p_ref, p_uncond, i_row, o_element, m_element, ref_stride, uncond_stride, scale, GUIDED: tl.constexpr):
    """(BLOCK,) fp32: u + scale (c - u), or c."""
    anchor = tl.load(p_ref + i_row * ref_stride + o_element, mask=m_element, other=0.0).to(tl.float32)
    if GUIDED:
        uncond = tl.load(p_uncond + i_row * uncond_stride + o_element, mask=m_element, other=0.0).to(tl.float32)
        anchor = tl.fma(scale + tl.zeros_like(anchor), anchor - uncond, uncond)
    return anchor


@triton.jit
def _valid(p_mask, i_row, o_element, m_element, row_stride, size1, size2, stride0, stride1, stride2):
    """(BLOCK,) whether an element counts; the mask has axes (rows, ?, size1, size2), any of stride 0."""
    i2 = o_element % size2
    i1 = o_element // size2 % size1
    i0 = o_element // size2 // size1
    o_mask = i_row * row_stride + i0 * stride0 + i1 * stride1 + i2 * stride2
    return m_element & (tl.load(p_mask + o_mask, mask=m_element, other=0) != 0)


@triton.jit(do_not_specialize=["seed", "stream"])
def partial_sums_kernel(
    p_predicted,  # (B, D), rows a stride apart; so the target, ref, uncond and old
    p_target,
    p_ids,  # (B,) int64
    p_ref,
    p_uncond,
    p_mask,  # uint8
    p_old,  # unused without HAS_OLD
    p_partial,  # (B, splits, 5) float32
    seed,
    stream,
    scale,
    dim,
    splits,
    tiles,
    predicted_stride,
    target_stride,
    ref_stride,
    uncond_stride,
    mask_row,
    mask_size1,
    mask_size2,
    mask_stride0,
    mask_stride1,
    mask_stride2,
    old_stride,
    TARGET: tl.constexpr,
    ANCHORED: tl.constexpr,
    GUIDED: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_OLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = (tl.program_id(0) // splits).to(tl.int64)
    i_split = (tl.program_id(0) % splits).to(tl.int64)
    squared = tl.zeros([BLOCK], tl.float32)
    absolute = tl.zeros([BLOCK], tl.float32)
    gap = tl.zeros([BLOCK], tl.float32)
    old_squared = tl.zeros([BLOCK], tl.float32)
    old_absolute = tl.zeros([BLOCK], tl.float32)
    for i_tile in range(tiles):
        first = (i_split * tiles + i_tile) * BLOCK
        o_element = first + tl.arange(0, BLOCK)
        m_element = o_element < dim
        m_valid = m_element
        if MASKED:
            m_valid = _valid(
                p_mask, i_row, o_element, m_element, mask_row, mask_size1, mask_size2,
                mask_stride0, mask_stride1, mask_stride2,
            )  # fmt: skip
        o_predicted = i_row * predicted_stride + o_element
        predicted = tl.load(p_predicted + o_predicted, mask=m_element, other=0.0).to(tl.float32)
        target = _target(
            p_target, p_ids, i_row, first, o_element, m_element, target_stride, seed, stream, TARGET, BLOCK
        )
        error = tl.where(m_valid, predicted - target, 0.0)
        squared = tl.fma(error, error, squared)
        absolute += tl.abs(error)
        if HAS_OLD:
            old = tl.load(p_old + i_row * old_stride + o_element, mask=m_element, other=0.0).to(tl.float32)
            old_error = tl.where(m_valid, old - target, 0.0)
            old_squared = tl.fma(old_error, old_error, old_squared)
            old_absolute += tl.abs(old_error)
        if ANCHORED:
            anchor = _anchor(p_ref, p_uncond, i_row, o_element, m_element, ref_stride, uncond_stride, scale, GUIDED)
            difference = tl.where(m_valid, predicted - anchor, 0.0)
            gap = tl.fma(difference, difference, gap)
    o_partial = (i_row * splits + i_split) * 5
    tl.store(p_partial + o_partial, tl.sum(squared))
    tl.store(p_partial + o_partial + 1, tl.sum(absolute))
    tl.store(p_partial + o_partial + 2, tl.sum(gap))
    if HAS_OLD:
        tl.store(p_partial + o_partial + 3, tl.sum(old_squared))
        tl.store(p_partial + o_partial + 4, tl.sum(old_absolute))


@triton.jit
def finalise_kernel(
    p_partial,  # (B, splits, 5) float32
    p_factor,  # (B,) float32; unused without SCALED
    p_count,  # (B,) float32; unused without COUNTED
    p_mse,
    p_mae,
    p_kl,  # (B,) float32
    p_old_mse,  # (B,) float32; unused without HAS_OLD
    p_old_mae,
    splits,
    dim,
    SCALED: tl.constexpr,
    COUNTED: tl.constexpr,
    HAS_OLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    squared = tl.zeros([BLOCK], tl.float32)
    absolute = tl.zeros([BLOCK], tl.float32)
    gap = tl.zeros([BLOCK], tl.float32)
    old_squared = tl.zeros([BLOCK], tl.float32)
    old_absolute = tl.zeros([BLOCK], tl.float32)
    for start in range(0, splits, BLOCK):
        i_split = start + tl.arange(0, BLOCK)
        m_split = i_split < splits
        o_partial = (i_row * splits + i_split) * 5
        squared += tl.load(p_partial + o_partial, mask=m_split, other=0.0)
        absolute += tl.load(p_partial + o_partial + 1, mask=m_split, other=0.0)
        gap += tl.load(p_partial + o_partial + 2, mask=m_split, other=0.0)
        if HAS_OLD:
            old_squared += tl.load(p_partial + o_partial + 3, mask=m_split, other=0.0)
            old_absolute += tl.load(p_partial + o_partial + 4, mask=m_split, other=0.0)
    count = tl.full([], 1.0, tl.float32) * dim
    if COUNTED:
        count = tl.load(p_count + i_row)
    factor = tl.full([], 1.0, tl.float32)
    if SCALED:
        factor = tl.load(p_factor + i_row)
    tl.store(p_mse + i_row, factor * factor * tl.sum(squared) / count)
    tl.store(p_mae + i_row, factor * tl.sum(absolute) / count)
    tl.store(p_kl + i_row, factor * factor * tl.sum(gap) / count)
    if HAS_OLD:
        tl.store(p_old_mse + i_row, factor * factor * tl.sum(old_squared) / count)
        tl.store(p_old_mae + i_row, factor * tl.sum(old_absolute) / count)


@triton.jit(do_not_specialize=["seed", "stream"])
def grad_kernel(
    p_predicted,
    p_target,
    p_ids,
    p_ref,
    p_uncond,
    p_mask,
    p_grad_mse,  # (B,) float32: dL/dE; unused without HAS_ERROR
    p_grad_kl,  # (B,) float32: dL/dK; unused without ANCHORED
    p_upstream,  # float32, multiplies both: one number, or (B,) with UPSTREAM_PER_SAMPLE; unused without HAS_UPSTREAM
    p_factor,
    p_count,
    p_grad,  # (B, D) contiguous
    seed,
    stream,
    scale,
    dim,
    predicted_stride,
    target_stride,
    ref_stride,
    uncond_stride,
    mask_row,
    mask_size1,
    mask_size2,
    mask_stride0,
    mask_stride1,
    mask_stride2,
    TARGET: tl.constexpr,
    ANCHORED: tl.constexpr,
    GUIDED: tl.constexpr,
    MASKED: tl.constexpr,
    SCALED: tl.constexpr,
    COUNTED: tl.constexpr,
    HAS_ERROR: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    UPSTREAM_PER_SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(dim, BLOCK)
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    o_element = first + tl.arange(0, BLOCK)
    m_element = o_element < dim
    count = tl.full([], 1.0, tl.float32) * dim
    if COUNTED:
        count = tl.load(p_count + i_row)
    common = 2.0 / count
    if SCALED:
        factor = tl.load(p_factor + i_row)
        common = common * factor * factor
    if HAS_UPSTREAM:
        common = common * tl.load(p_upstream + i_row if UPSTREAM_PER_SAMPLE else p_upstream)
    predicted = tl.load(p_predicted + i_row * predicted_stride + o_element, mask=m_element, other=0.0).to(tl.float32)
    grad = tl.zeros([BLOCK], tl.float32)
    # a slope of zero drops its term, whatever the tensors hold
    if HAS_ERROR:
        slope = tl.load(p_grad_mse + i_row)
        target = _target(
            p_target, p_ids, i_row, first, o_element, m_element, target_stride, seed, stream, TARGET, BLOCK
        )
        grad = tl.where(slope != 0.0, common * slope * (predicted - target), 0.0)
    if ANCHORED:
        slope = tl.load(p_grad_kl + i_row)
        anchor = _anchor(p_ref, p_uncond, i_row, o_element, m_element, ref_stride, uncond_stride, scale, GUIDED)
        grad += tl.where(slope != 0.0, common * slope * (predicted - anchor), 0.0)
    if MASKED:
        m_valid = _valid(
            p_mask,
            i_row,
            o_element,
            m_element,
            mask_row,
            mask_size1,
            mask_size2,
            mask_stride0,
            mask_stride1,
            mask_stride2,
        )
        grad = tl.where(m_valid, grad, 0.0)
    tl.store(p_grad + i_row * dim + o_element, grad.to(p_grad.dtype.element_ty), mask=m_element)


def residual_stats(
    predicted: torch.Tensor,
    target: torch.Tensor | None,
    target_kind: int,
    sample_ids: torch.Tensor | None,
    seed: int,
    stream: int,
    ref: torch.Tensor | None,
    ref_uncond: torch.Tensor | None,
    guidance_scale: float,
    mask: torch.Tensor | None,
    factor: torch.Tensor | None,
    count: torch.Tensor | None,
    old: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """E, M, K and the E and M of `old`, (B,) float32 each, the last two (0,) without it, in two launches.

    predicted, ref, ref_uncond (B, *latent); target: the target (TENSOR), x0 (VELOCITY, CLEAN) or None (NOISE);
    sample_ids (B,) int64 and the seed's 64 bits as int64 for VELOCITY and NOISE. mask: bool,
    broadcastable to predicted. factor (B,) float32: velocity factor, None for 1. count (B,) float32: valid elements,
    None for all. old: a second prediction of the same target, like predicted.
    """
    call = _Call(predicted, target, target_kind, sample_ids, seed, stream, ref, ref_uncond, guidance_scale, mask)
    of_old = 0 if old is None else call.batch
    mse, mae, kl = (torch.empty(call.batch, dtype=torch.float32, device=predicted.device) for _ in range(3))
    old_mse, old_mae = (torch.empty(of_old, dtype=torch.float32, device=predicted.device) for _ in range(2))
    if call.batch == 0 or call.dim == 0:
        return mse.zero_(), mae.zero_(), kl.zero_(), old_mse.zero_(), old_mae.zero_()
    old_rows = None if old is None else call.rows(old)
    config = reduction_config(call.batch, call.dim, processors_of(predicted.device))
    partial = torch.empty(call.batch, config.splits, 5, dtype=torch.float32, device=predicted.device)
    partial_sums_kernel[(call.batch * config.splits,)](
        *call.tensors,
        partial if old_rows is None else old_rows,
        partial,
        *call.numbers,
        config.splits,
        config.tiles,
        *call.strides,
        0 if old_rows is None else old_rows.stride(0),
        **call.flags,
        HAS_OLD=old is not None,
        BLOCK=config.block,
        num_warps=config.warps,
        **ROUNDING,
    )
    finalise_kernel[(call.batch,)](
        partial,
        mse if factor is None else factor.contiguous(),
        mse if count is None else count.contiguous(),
        mse,
        mae,
        kl,
        old_mse,
        old_mae,
        config.splits,
        call.dim,
        SCALED=factor is not None,
        COUNTED=count is not None,
        HAS_OLD=old is not None,
        BLOCK=min(1024, max(16, triton.next_power_of_2(config.splits))),
        num_warps=1,
        **ROUNDING,
    )
    return mse, mae, kl, old_mse, old_mae


def residual_grad(
    predicted: torch.Tensor,
    target: torch.Tensor | None,
    target_kind: int,
    sample_ids: torch.Tensor | None,
    seed: int,
    stream: int,
    ref: torch.Tensor | None,
    ref_uncond: torch.Tensor | None,
    guidance_scale: float,
    mask: torch.Tensor | None,
    factor: torch.Tensor | None,
    count: torch.Tensor | None,
    grad_mse: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    upstream: torch.Tensor | None = None,
) -> torch.Tensor:
    """dL/dpredicted in its dtype and layout from dL/dE and dL/dK, (B,) float32 or None, in one launch.

    upstream: () or (B,) float32, multiplies both, or None for 1.
    """
    if grad_kl is None:
        ref = ref_uncond = None  # the anchor is not read
    call = _Call(predicted, target, target_kind, sample_ids, seed, stream, ref, ref_uncond, guidance_scale, mask)
    out = torch.empty_like(predicted)
    if call.batch == 0 or call.dim == 0:
        return out
    ordered = out.permute(call.axes)
    direct = ordered.is_contiguous()
    rows = ordered if direct else torch.empty(ordered.shape, dtype=out.dtype, device=out.device)
    config = elementwise_config(call.dim)
    grad_kernel[(call.batch * triton.cdiv(call.dim, config.block),)](
        *call.tensors,
        predicted if grad_mse is None else grad_mse.contiguous(),
        predicted if grad_kl is None else grad_kl.contiguous(),
        predicted if upstream is None else upstream.contiguous(),
        predicted if factor is None else factor.contiguous(),
        predicted if count is None else count.contiguous(),
        rows,
        *call.numbers,
        *call.strides,
        **call.flags,
        SCALED=factor is not None,
        COUNTED=count is not None,
        HAS_ERROR=grad_mse is not None,
        HAS_UPSTREAM=upstream is not None,
        UPSTREAM_PER_SAMPLE=upstream is not None and upstream.ndim == 1,
        BLOCK=config.block,
        num_warps=config.warps,
        **ROUNDING,
    )
    if not direct:
        ordered.copy_(rows)
    return out


class _Call:
    """The arguments that both launches share.

    Elements are walked in memory order where their order is free, that is when the target is a tensor; noise belongs to
    an element's place in the logical order. A tensor whose rows are not contiguous in that order is copied.
    """

    def __init__(
        self,
        predicted: torch.Tensor,
        target: torch.Tensor | None,
        target_kind: int,
        sample_ids: torch.Tensor | None,
        seed: int,
        stream: int,
        ref: torch.Tensor | None,
        ref_uncond: torch.Tensor | None,
        guidance_scale: float,
        mask: torch.Tensor | None,
    ) -> None:
        self.batch, self.dim = predicted.shape[0], predicted.shape[1:].numel()
        self.axes = list(range(predicted.ndim))
        if target_kind == TENSOR:
            self.axes[1:] = sorted(self.axes[1:], key=predicted.stride, reverse=True)
        first = self.rows(predicted)
        given = [None if tensor is None else self.rows(tensor) for tensor in (target, ref, ref_uncond)]
        flat_target, flat_ref, flat_uncond = given
        sizes, strides, mask_row, mask_bytes = [1, 1, 1], [0, 0, 0], 0, first
        if mask is not None:
            sizes, strides, mask_row, mask_bytes = _mask_axes(mask.expand(predicted.shape).permute(self.axes))
        self.tensors = (
            first,
            first if flat_target is None else flat_target,
            first if sample_ids is None else sample_ids.contiguous(),
            first if flat_ref is None else flat_ref,
            first if flat_uncond is None else flat_uncond,
            mask_bytes,
        )
        self.numbers = (seed, stream, guidance_scale, self.dim)
        self.strides = (
            first.stride(0),
            *(0 if tensor is None else tensor.stride(0) for tensor in given),
            mask_row,
            sizes[1],
            sizes[2],
            *strides,
        )
        self.flags = {
            "TARGET": target_kind,
            "ANCHORED": ref is not None,
            "GUIDED": ref_uncond is not None,
            "MASKED": mask is not None,
        }

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, D) with neighbouring elements side by side: a view where rows are dense in the order of the walk."""
        flat = tensor.permute(self.axes).reshape(self.batch, -1)
        return flat if self.dim < 2 or flat.stride(1) == 1 else flat.contiguous()


def _mask_axes(mask: torch.Tensor) -> tuple[list[int], list[int], int, torch.Tensor]:
    """Sizes and strides of a row's axes, outermost first, three of them; the batch stride; the mask as bytes."""
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(mask.shape[1:], mask.stride()[1:], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 3:
        return _mask_axes(mask.contiguous())
    missing = 3 - len(sizes)
    return [1] * missing + sizes, [0] * missing + strides, mask.stride(0), mask.view(torch.uint8)
