"""The tensor side of the C++ extension's functions for DIDR's generator stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crd_fast.didr.reference import GeneratorInputs, Statistics
from crd_fast.native import _optional_vector, _ordered, _rows, _sizes, _vector, empty, extension


def generator_statistics(
    inputs: GeneratorInputs, x0: Tensor | None, x_t: Tensor | None, shift: Tensor | None
) -> Statistics:
    """`reference.generator_statistics`, summed in the logical order of a sample: its layout changes no bit.

    Latents are float32, bfloat16 or float16 each, in any layout; (B,) vectors are contiguous float32.

    Raises:
        ExtensionMissingError: the extension is not there.
        ValueError: a tensor has another device, dtype or shape.
    """
    batch, dim = _sizes("ta", inputs.ta)
    distance, gap, correction, difference = (empty(batch) for _ in range(4))
    statistics = Statistics(distance, gap, correction, difference, empty(batch, dtype=torch.int64))
    extension().generator_statistics(
        *_arguments(inputs, None),
        None if x0 is None else _rows("x0", x0, inputs.ta),
        None if x_t is None else _rows("x_t", x_t, inputs.ta),
        _optional_vector("shift", shift, batch, torch.float32),
        batch,
        dim,
        *(total.data_ptr() for total in statistics),
        torch.get_num_threads(),
    )
    return statistics


def generator_gradient(inputs: GeneratorInputs, scale: Tensor, upstream: Tensor | None, out: Tensor) -> None:
    """Writes g times upstream, () float32 or None for 1, into `out`, like `ta` in any layout and dtype.

    scale: (B,) contiguous float32. Errors as in `generator_statistics`.
    """
    batch, dim = _sizes("ta", inputs.ta)
    axes = None  # any order is as good: the one in memory
    if not inputs.ta.is_contiguous():
        axes = (0, *sorted(range(1, inputs.ta.ndim), key=inputs.ta.stride, reverse=True))
    _vector("scale", scale, batch, torch.float32)
    extension().generator_gradient(
        *_arguments(inputs, axes),
        scale.data_ptr(),
        _optional_vector("upstream", None if upstream is None else upstream.view(1), 1, torch.float32),
        _rows("gradient", _ordered(out, axes), _ordered(inputs.ta, axes)),
        batch,
        dim,
        torch.get_num_threads(),
    )


def _arguments(inputs: GeneratorInputs, axes: tuple[int, ...] | None) -> tuple[Any, ...]:
    """What sums and gradient share."""
    batch, _ = _sizes("ta", inputs.ta)
    ta = _ordered(inputs.ta, axes)
    uncond = inputs.ref_uncond
    _vector("slope", inputs.slope, batch, torch.float32)
    _vector("level", inputs.level, batch, torch.float32)
    return (
        _rows("ta", ta, ta),
        _rows("ref", _ordered(inputs.ref, axes), ta),
        None if uncond is None else _rows("ref_uncond", _ordered(uncond, axes), ta),
        inputs.guidance_scale - 1.0,
        _rows("s_r", _ordered(inputs.s_r, axes), ta),
        inputs.slope.data_ptr(),
        inputs.level.data_ptr(),
    )
