"""Tiny random pipelines of the real classes, one module a family, for tests of everything above the model.

A module gives FAMILY, its diffusers PIPELINE class, GUIDANCE (a guidance_scale at which the pipeline combines two
predictions, None where the family has no such thing), OPTIONS (how the tests load it), `save(folder, seed)` and
`sample(folder, lora, prompts, start, steps, guidance)`, the pipeline's own images.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

NAMES = ("flux1", "flux2", "qwen_image", "sd3", "sdxl", "wan", "z_image")


def family(name: str) -> ModuleType:
    return import_module(f"tests.pipelines.{name}")
