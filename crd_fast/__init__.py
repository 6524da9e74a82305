"""Reinforcement learning for diffusion and flow models from the forward process, with fused kernels.

Importing this package imports PyTorch and nothing else of weight. The trainer, rewards and backbones live in
subpackages that are imported by name.
"""

from __future__ import annotations

from crd_fast import didr, schedules
from crd_fast.forward_process import Noised, ResidualStats, noise, residual_stats
from crd_fast.losses import CRDConfig, CRDLoss, CRDOutput, GroupMembers, group_members, loss

__version__ = "0.1.0"

__all__ = [
    "CRDConfig",
    "CRDLoss",
    "CRDOutput",
    "GroupMembers",
    "Noised",
    "ResidualStats",
    "__version__",
    "didr",
    "group_members",
    "loss",
    "noise",
    "residual_stats",
    "schedules",
]
