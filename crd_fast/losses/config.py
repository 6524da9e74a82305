"""Settings of the CRD loss."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields

from crd_fast.errors import ConfigError

_CHOICES = {
    "loss_type": ("mse", "bce"),
    "centering": ("prompt", "batch"),
    "prediction": ("v", "x0", "eps"),
    "reduction": ("none", "sum", "mean"),
}


@dataclass(frozen=True)
class CRDConfig:
    """Settings of the CRD loss; defaults are the paper's for SD3.5-M (arXiv 2603.14128).

    beta: weight of the implicit reward against the mapped external one, > 0.
    kl_coef: lambda of the velocity-space KL to the reference, >= 0; 0 needs no reference.
    adv_clip: advantages are clipped to [-adv_clip, adv_clip] before they are mapped to [0, 1], > 0.
    adaptive_weight: divide the squared error by the mean absolute error (without gradient).
    adaptive_kl: weight a sample's KL by its mapped reward.
    temperature: of the centering weights, >= 0: inf uniform, finite softmax in two directions, 0 hard choice.
    loss_type: "mse" or "bce".
    centering: "prompt" (one group per group id) or "batch" (one group).
    prediction: what the model predicts: "v" (velocity eps - x0), "x0" or "eps".
    reduction: "mean" over samples that keep a weight, "sum", or "none" for (B,) losses.

    Raises:
        ConfigError (a ValueError): a value outside its range, naming the field.
    """

    beta: float = 1.0
    kl_coef: float = 0.1
    adv_clip: float = 5.0
    adaptive_weight: bool = True
    adaptive_kl: bool = True
    temperature: float = math.inf
    loss_type: str = "mse"
    centering: str = "prompt"
    prediction: str = "v"
    reduction: str = "mean"

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            expected = _expectation(name, value)
            if expected:
                raise ConfigError(f"CRDConfig.{name}: expected {expected}, got {value!r}")


def _expectation(name: str, value: object) -> str:
    """What the field should have been, or "" when it is fine."""
    if name in _CHOICES:
        return "" if value in _CHOICES[name] else f"one of {', '.join(map(repr, _CHOICES[name]))}"
    if name in ("adaptive_weight", "adaptive_kl"):
        return "" if isinstance(value, bool) else "True or False"
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or math.isnan(value):
        return "a number"
    value = float(value)
    if name == "temperature":
        return "" if value >= 0 else "a number >= 0 (math.inf for uniform centering, 0 for hard selection)"
    if name == "kl_coef":
        return "" if 0 <= value < math.inf else "a finite number >= 0"
    return "" if 0 < value < math.inf else "a finite number > 0"
