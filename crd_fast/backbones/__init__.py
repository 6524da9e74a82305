"""One adapter per model family: prompts to conditioning, latents to velocity, latents to images."""

from __future__ import annotations

from crd_fast.backbones.base import Backbone, Conditioning, LoadOptions
from crd_fast.backbones.load import available, load

__all__ = ["Backbone", "Conditioning", "LoadOptions", "available", "load"]
