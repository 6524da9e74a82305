"""What a glance at an epoch should tell; the progress display itself is in `crd_fast.progress`."""

from __future__ import annotations

from typing import Any

from crd_fast.progress import Reporter

__all__ = ["Reporter", "epoch_note"]


def epoch_note(row: dict[str, Any]) -> str:
    """What a glance at an epoch should tell."""
    rewards = "  ".join(f"{name} {value:.3f}" for name, value in row["reward"].items())
    return (
        f"reward {rewards}  kl {row['kl']:.4f}  implicit std {row['implicit_reward_std']:.4f}  "
        f"{row['samples_per_second']:.0f} samples/s"
    )
