"""How fast the old and the sampling snapshot follow the trained parameters.

After each epoch: snapshot <- d * snapshot + (1 - d) * trained. The two are decoupled: a sampler that equals the moving
reference keeps the implicit reward near zero (ratio-signal collapse). Source: arXiv 2603.14128.
"""

from __future__ import annotations

from dataclasses import dataclass

from crd_fast.errors import ConfigError


@dataclass(frozen=True)
class DecaySchedule:
    """Decay per epoch: min(initial + slope * max(0, epoch - start), maximum), and 0 (copy) before `start`.

    initial, maximum: in [0, 1]; slope: per epoch, >= 0; start: epochs, >= 0.

    Raises ConfigError naming the value out of range.
    """

    initial: float = 0.25
    slope: float = 0.005
    start: int = 0
    maximum: float = 0.999

    def __post_init__(self) -> None:
        for name, value, good in (
            ("initial", self.initial, 0 <= self.initial <= 1),
            ("maximum", self.maximum, 0 <= self.maximum <= 1),
            ("slope", self.slope, self.slope >= 0),
            ("start", self.start, self.start >= 0),
        ):
            if not good:
                raise ConfigError(f"snapshot decay {name} is {value}: expected a decay in [0, 1], slope and start >= 0")

    def at(self, epoch: int) -> float:
        """The decay applied after epoch `epoch`, counted from 0."""
        if epoch < self.start:
            return 0.0
        return min(self.initial + self.slope * (epoch - self.start), self.maximum)
