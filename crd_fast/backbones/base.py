"""What the trainer asks of a model, whatever its family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioning:
    """Prompt embeddings of B prompts: token states (B, L, D) and a pooled vector (B, P)."""

    context: Tensor
    pooled: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        return Conditioning(*(getattr(self, field.name)[rows] for field in fields(self)))

    def expand(self, rows: int) -> Conditioning:
        """One prompt's embeddings repeated for `rows` samples, without a copy."""
        return Conditioning(
            *(getattr(self, f.name).expand(rows, *getattr(self, f.name).shape[1:]) for f in fields(self))
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        return Conditioning(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Conditioning)))


class Backbone(Protocol):
    """A velocity model with its text encoders and autoencoder.

    Velocity is eps - x0 at x_t = (1 - sigma) x0 + sigma eps, sigma in [0, 1]; adapters fix the family's sign, time
    scale and latent layout so that nothing above them has to know.
    """

    family: str
    transformer: nn.Module
    latent_shape: tuple[int, ...]
    lora_targets: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of the prompts; the empty string gives the unconditional ones."""
        ...

    def release_text_encoders(self) -> None:
        """Free the text encoders; `encode_prompts` raises afterwards."""
        ...

    def predict(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity (B, *latent) at noise levels sigma (B,)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32 in [0, 1]."""
        ...

    def rollout_sigmas(self, steps: int) -> Tensor:
        """Noise levels (steps + 1,) from 1 to 0 as the pipeline's own scheduler spaces them."""
        ...

    def save_lora(self, folder: str, state: dict[str, Tensor]) -> None:
        """Write `pytorch_lora_weights.safetensors`, loadable by the pipeline's `load_lora_weights`."""
        ...
