"""Triton kernels for CUDA tensors, imported as `crd_fast.kernels`.

This room holds jit code, launch configurations and launchers that take and return tensors; it imports torch
and triton only, and nothing of the rest of crd_fast. The directory above it has no `__init__.py`, so that
`import kernels` from the repository root never hides the `kernels` package other libraries probe for.
"""

from .generator import generator_gradient, generator_statistics
from .noise import epsilon, noise
from .objective import objective
from .residual import CLEAN, NOISE, TENSOR, VELOCITY, residual_grad, residual_stats

__all__ = [
    "CLEAN",
    "NOISE",
    "TENSOR",
    "VELOCITY",
    "epsilon",
    "generator_gradient",
    "generator_statistics",
    "noise",
    "objective",
    "residual_grad",
    "residual_stats",
]
