"""DIDR: reinforcement learning of one-step generators with a diffused reward (arXiv 2605.24001).

Two stages alternate. Stage I: the TA network psi learns the generator's own samples (`ta_loss`). Stage II: the
generator moves along the difference of three scores, of the TA, of the frozen reference and of the diffused reward
(`reference_x0`, `diffused_reward_score`, `generator_loss`; or `generator_loss_of_predictions`, which makes the clean
estimates on the way). `stage_one` and `stage_two` put them together, and
`DIDRTrainer` trains with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crd_fast.didr.diffused_reward import (
    DiffusedReward,
    GaussianDamping,
    diffused_reward,
    diffused_reward_score,
    proxy_steps,
)
from crd_fast.didr.generator import GeneratorOutput, generator_loss, generator_loss_of_predictions
from crd_fast.didr.guidance import reference_x0
from crd_fast.didr.noising import Seeds
from crd_fast.didr.stages import DIDRConfig, StageTwoOutput, stage_one, stage_two
from crd_fast.didr.ta import TAOutput, ta_loss, ta_loss_of_noised
from crd_fast.didr.timesteps import sample_times

if TYPE_CHECKING:
    from crd_fast.didr.trainer import DIDRTrainer

__all__ = [
    "DIDRConfig",
    "DIDRTrainer",
    "DiffusedReward",
    "GaussianDamping",
    "GeneratorOutput",
    "Seeds",
    "StageTwoOutput",
    "TAOutput",
    "diffused_reward",
    "diffused_reward_score",
    "generator_loss",
    "generator_loss_of_predictions",
    "proxy_steps",
    "reference_x0",
    "sample_times",
    "stage_one",
    "stage_two",
    "ta_loss",
    "ta_loss_of_noised",
]


def __getattr__(name: str) -> Any:
    """The trainer is imported when it is asked for: the losses need PyTorch alone."""
    if name == "DIDRTrainer":
        from crd_fast.didr.trainer import DIDRTrainer

        return DIDRTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
