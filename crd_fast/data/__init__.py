"""Prompt sets and the order in which they are trained on."""

from __future__ import annotations

from crd_fast.data.prompts import GroupSampler, PromptSet, assert_disjoint, load_prompts

__all__ = ["GroupSampler", "PromptSet", "assert_disjoint", "load_prompts"]
