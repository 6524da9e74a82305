"""Forward-process objectives. Each is mathematics on (B,) vectors over the ops of `crd_fast.ops`."""

from __future__ import annotations

from crd_fast.losses.config import CRDConfig
from crd_fast.losses.crd import CRDLoss, CRDOutput, loss

__all__ = ["CRDConfig", "CRDLoss", "CRDOutput", "loss"]
