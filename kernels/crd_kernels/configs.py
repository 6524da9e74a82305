"""Launch configurations as data, from sizes alone: the same call is the same launch on every run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Multiply-adds are fused where a kernel says so and nowhere else, as in the C++ extension. Triton's own choice has
# changed between its versions.
ROUNDING = {"enable_fp_fusion": False}

# Programs a multiprocessor should have at hand before rows are no longer split further: enough loads are then in
# flight to reach the memory's bandwidth.
PROGRAMS_PER_PROCESSOR = 8


@dataclass(frozen=True)
class ElementwiseConfig:
    """One program works on `block` neighbouring elements of a row."""

    block: int
    warps: int


@dataclass(frozen=True)
class ReductionConfig:
    """One program sums `tiles` blocks of a row; `splits` programs share a row."""

    block: int
    warps: int
    tiles: int
    splits: int


def elementwise_config(dim: int) -> ElementwiseConfig:
    """1024 elements in 4 warps are 8 a thread: 16 bytes of bf16, two times 16 of fp32."""
    return ElementwiseConfig(block=_block(dim), warps=4)


def reduction_config(batch: int, dim: int, processors: int) -> ReductionConfig:
    """Rows are split until `PROGRAMS_PER_PROCESSOR` programs are there for each of the GPU's multiprocessors."""
    block = _block(dim)
    tiles = -(-dim // block)
    wanted = max(1, -(-processors * PROGRAMS_PER_PROCESSOR // batch))
    splits = min(tiles, wanted)
    per_split = -(-tiles // splits)
    return ReductionConfig(block=block, warps=4, tiles=per_split, splits=-(-tiles // per_split))


def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; one where there is none (the interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _block(dim: int) -> int:
    """A power of two from 16 to 1024 that covers a short row."""
    return min(1024, max(16, 1 << (dim - 1).bit_length()))
