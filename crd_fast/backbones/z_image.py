"""Z-Image.

Latents (C, 1, H/8, W/8): one frame, not packed. The transformer returns x0 - eps, the negated velocity, and takes
1 - sigma as its time. Guidance is c + g (c - u), so that g = 0 is none. Text: Qwen3 states of the prompt in a chat
template.

The transformer takes a list of captions and pads each to a multiple of 32 with tokens of its own, which take part in
attention and move the image's positions. A longer padding would be another function, so captions keep their lengths:
they are stored padded with the length beside them, and cut to it again for every prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.weak import WeakTensorKeyDictionary

from crd_fast.backbones.base import Backbone, Conditioning, LoadOptions
from crd_fast.backbones.pipeline import latent_side, load_pipeline, shifted_sigmas
from crd_fast.errors import ConfigError

_PATCH = 2  # latent pixels along the side of a token
_LATENT_SIDE = 128  # of the pipeline's default size, 1024 pixels
_TEXT_TOKENS = 512  # the pipeline's default
_CAPTION_UNIT = 32  # the transformer pads captions to multiples of this


class ZImageBackbone(Backbone):
    """Adapter for `ZImagePipeline`; see `Backbone`."""

    family = "z_image"
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    block_lists = ("noise_refiner", "context_refiner", "layers")
    unguided_scale = 0.0

    def __init__(self, pipeline: Any, options: LoadOptions) -> None:
        super().__init__(pipeline, options)
        self._tokens = _TEXT_TOKENS if options.max_sequence_length is None else options.max_sequence_length
        # positions: 0 is padding, captions count from 1, the image comes right after
        longest = (self.config.axes_lens[0] - 2) // _CAPTION_UNIT * _CAPTION_UNIT
        if not 0 < self._tokens <= longest:
            raise ConfigError(f"model.max_sequence_length is {self._tokens}: expected 1 to {longest}")
        side = latent_side(options, _LATENT_SIDE, pipeline.vae_scale_factor, _PATCH)
        self.latent_shape = (self.config.in_channels, 1, side, side)
        self._known_lengths = WeakTensorKeyDictionary()

    @classmethod
    def from_pretrained(cls, path: str, index: Mapping[str, Any], options: LoadOptions) -> ZImageBackbone:
        from diffusers import ZImagePipeline

        return cls(load_pipeline(ZImagePipeline, path, options), options)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        self.require_text_encoders()
        captions, _ = self.pipeline.encode_prompt(
            prompt=list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self._tokens,
            device=self.device,
        )
        lengths = torch.tensor([len(caption) for caption in captions], device=self.device)
        whole = captions[0].new_zeros(self._tokens, captions[0].shape[1])  # makes all as long as the longest allowed
        return Conditioning({"context": pad_sequence([whole, *captions], batch_first=True)[1:], "length": lengths})

    def velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        lengths = self._lengths(conditioning.tensors["length"])
        captions = conditioning.tensors["context"].unbind()
        negated = self.transformer(
            list(x_t.to(self.dtype).unbind()),
            1 - sigma.to(x_t.device, torch.float32),
            [caption[:length] for caption, length in zip(captions, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(negated)

    def _lengths(self, lengths: Tensor) -> list[int]:
        """On the host: read from the device once for a conditioning, not once for each of its predictions."""
        known = self._known_lengths.get(lengths)
        if known is None:
            known = self._known_lengths[lengths] = lengths.tolist()
        return known

    def is_guided(self, guidance_scale: float) -> bool:
        return guidance_scale > self.unguided_scale

    def linear_scale(self, guidance_scale: float) -> float:
        return 1 + guidance_scale

    def decode_by(self, vae: Any, latents: Tensor) -> Tensor:
        unscaled = latents.squeeze(2).to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return (vae.decode(unscaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def rollout_sigmas(self, steps: int) -> Tensor:
        tokens = (self.latent_shape[2] // _PATCH) * (self.latent_shape[3] // _PATCH)
        return shifted_sigmas(self.pipeline.scheduler, steps, tokens, linear=True)
