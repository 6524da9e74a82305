"""Forward-process objectives. Each is mathematics on (B,) vectors over the ops of `crd_fast.ops`."""

from __future__ import annotations

from crd_fast.losses.centering import GroupMembers
from crd_fast.losses.config import CRDConfig
from crd_fast.losses.crd import CRDLoss, CRDOutput, loss
from crd_fast.losses.members import group_members

__all__ = ["CRDConfig", "CRDLoss", "CRDOutput", "GroupMembers", "group_members", "loss"]
