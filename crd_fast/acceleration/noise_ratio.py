"""How much FP8 may disturb training: measured on the model at hand, before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from crd_fast.errors import ConfigError

Batch = TypeVar("Batch")

# of the squared distance between trained model and reference; beyond it the reference stays in bf16
NOISE_LIMIT = 0.05


@torch.no_grad()
def reference_noise_ratio(
    predict_bf16: Callable[[Batch], Tensor],
    predict_fp8: Callable[[Batch], Tensor],
    predict_trained: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    *,
    samples: int = 64,
) -> float:
    """E|v_ref in FP8 - v_ref in bf16|^2 / E|v_theta - v_ref in bf16|^2 over the first `samples` samples of the batches.

    The three functions give velocities (B, ...) of one batch. The reference's are those that the loss is given, so
    guided where it is: guidance multiplies the noise.

    Infinite while the trained model still equals the reference, NaN when a prediction is NaN or infinite.

    Raises ValueError: no sample, or velocities of different shapes.
    """
    noise = distance = 0.0
    seen = 0
    for batch in batches:
        if seen >= samples:
            break
        reference, noisy, trained = (
            predict(batch)[: samples - seen].double() for predict in (predict_bf16, predict_fp8, predict_trained)
        )
        if not reference.shape == noisy.shape == trained.shape:
            shapes = ", ".join(str(tuple(velocity.shape)) for velocity in (reference, noisy, trained))
            raise ValueError(f"velocities in bf16, in FP8 and of the trained model have shapes {shapes}: expected one")
        noise += (noisy - reference).square().sum().item()
        distance += (trained - reference).square().sum().item()
        seen += len(reference)
    if not seen:
        raise ValueError("no sample to measure the noise of FP8 on")
    if not math.isfinite(noise + distance):
        return math.nan
    if distance == 0:
        return 0.0 if noise == 0 else math.inf
    return noise / distance


def check_reference_noise(ratio: float, limit: float = NOISE_LIMIT) -> None:
    """Raises ConfigError unless `reference_noise_ratio` is under `limit`; it says what to set."""
    if ratio < limit:
        return
    if math.isinf(ratio):
        found = "the trained model equals the reference so far, and FP8 alone makes them differ"
    elif math.isnan(ratio):
        found = "a prediction is NaN or infinite"
    else:
        found = (
            f"FP8 moves the reference by {ratio:.1%} of its squared distance from the trained model, "
            f"of which {limit:.1%} is the limit"
        )
    raise ConfigError(f"{found}: set precision.ref=bf16")


def gradient_cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Cosine between two gradients, each the tensors of all parameters in one order; computed in fp64.

    Raises ValueError: different numbers or shapes of tensors, or a gradient of zeros, which has no direction.
    """
    if [tensor.shape for tensor in a] != [tensor.shape for tensor in b]:
        raise ValueError(f"gradients of {len(a)} and {len(b)} tensors: expected the same tensors, in one order")
    products = [(x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True)]
    lengths = [math.sqrt(sum(tensor.double().square().sum().item() for tensor in side)) for side in (a, b)]
    if 0 in lengths:
        raise ValueError("a gradient of zeros has no direction: train a step first, or look for a missing backward")
    return sum(products) / (lengths[0] * lengths[1])
