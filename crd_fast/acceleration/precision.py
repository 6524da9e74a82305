"""Which of a frozen layer's precisions a prediction uses, by what the prediction is for.

Trained and old predictions must round alike: the implicit reward is their difference, and FP8 on one side alone biases
it (measured at +1.7e-3 on a 14 M-parameter model). The reference and the rollout may differ from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from crd_fast.acceleration.fp8 import KEPT, FrozenFP8Linear, linears_for_fp8

ROLES = ("train", "old", "ref", "rollout")
FP8 = "fp8"


class Precisions:
    """The precision of each role on one model; see `apply_precisions`."""

    def __init__(self, roles: Mapping[str, str]) -> None:
        self.roles = dict(roles)
        self.fp8 = False  # read by every SwitchedLinear

    def equal(self, *roles: str) -> bool:
        """Whether predictions of these roles may share a pass."""
        return len({self.roles[role] for role in roles}) == 1

    @contextmanager
    def use(self, role: str | None) -> Iterator[None]:
        """Inside, layers that have both precisions use the role's; None is their own, not FP8."""
        before, self.fp8 = self.fp8, role is not None and self.roles[role] == FP8
        try:
            yield
        finally:
            self.fp8 = before


class SwitchedLinear(nn.Module):
    """A frozen linear layer in its own precision and in FP8, for models whose roles differ."""

    def __init__(self, exact: nn.Linear, precisions: Precisions) -> None:
        super().__init__()
        self.exact = exact
        self.rounded = FrozenFP8Linear.from_linear(exact)
        self.in_features, self.out_features = exact.in_features, exact.out_features
        self._precisions = precisions

    def forward(self, x: Tensor) -> Tensor:
        return self.rounded(x) if self._precisions.fp8 else self.exact(x)

    @property
    def weight(self) -> Tensor:
        """The exact weight, which adapters are merged into."""
        return self.exact.weight

    @property
    def bias(self) -> Tensor | None:
        return self.exact.bias


def apply_precisions(model: nn.Module, block_lists: Iterable[str], roles: Mapping[str, str]) -> Precisions:
    """Give the frozen layers of the named lists of blocks the precisions that the roles need, in place.

    roles: "fp8" or anything else, for each of `ROLES`. Layers hold both, half as much memory again; where every role is
    FP8, `release_exact` gives that back once the reference has been measured.

    Raises ConfigError as `fp8.quantize_frozen_linears` does.
    """
    precisions = Precisions(roles)
    if FP8 in precisions.roles.values():
        for name, linear in linears_for_fp8(model, block_lists, KEPT).items():
            _put(model, name, SwitchedLinear(linear, precisions))
    return precisions


def release_exact(model: nn.Module) -> None:
    """Leave only FP8 in the layers that hold both."""
    switched = {name: module for name, module in model.named_modules() if isinstance(module, SwitchedLinear)}
    for name, module in switched.items():
        _put(model, name, module.rounded)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
