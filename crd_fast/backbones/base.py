"""What the trainer asks of a model, whatever its family, and what all families share."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from crd_fast.errors import ConfigError


@dataclass(frozen=True)
class Conditioning:
    """Prompt embeddings of B prompts by name, every tensor (B, ...): token states, pooled vectors, masks."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        return Conditioning({name: tensor[rows] for name, tensor in self.tensors.items()})

    def expand(self, rows: int) -> Conditioning:
        """One prompt's embeddings repeated for `rows` samples, without a copy."""
        return Conditioning({name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """On a device, floating tensors in `dtype`; masks and counts keep theirs."""
        return Conditioning(
            {
                name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
                for name, tensor in self.tensors.items()
            }
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class LoadOptions:
    """How a pipeline is loaded.

    max_sequence_length: text tokens of encoders that pad; None is the pipeline's default. All prompts have this many,
    so that shapes never change. resolution: image height and width in pixels; frames: of a video; None is the model's
    own. distilled_guidance: what a guidance-distilled model is told (FLUX.1); None is the pipeline's default.
    """

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    max_sequence_length: int | None = None
    resolution: int | None = None
    frames: int | None = None
    distilled_guidance: float | None = None


class Backbone(ABC):
    """A velocity model with its text encoders and autoencoder.

    Velocity is eps - x0 at x_t = (1 - sigma) x0 + sigma eps, sigma in [0, 1]; adapters fix the family's sign, time
    scale and latent layout so that nothing above them has to know. Latents have the layout that the model reads, so
    that a step copies none.
    """

    family: ClassVar[str]
    # linear layers that a LoRA adapts by default: endings of their names
    lora_targets: ClassVar[tuple[str, ...]]
    # the model's lists of repeated blocks: what is compiled, recomputed and sharded one by one
    block_lists: ClassVar[tuple[str, ...]]
    # "linear": u + w (c - u) with w = linear_scale(guidance_scale); "rescaled": `guide` alone combines them;
    # "distilled": the model takes a number instead, there is nothing to combine
    guidance: ClassVar[str] = "linear"
    # what the model was trained to predict, "v" or "eps"; `velocity` is converted from it
    prediction: ClassVar[str] = "v"
    # scale of a pipeline's `guidance_scale` argument at which nothing is combined
    unguided_scale: ClassVar[float] = 1.0
    # attribute of the pipeline that holds the velocity model, and the prefix of its layers in a LoRA file
    component: ClassVar[str] = "transformer"
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    # whether an AutoencoderTiny takes its latents, scaled and shifted by numbers of the autoencoder's config
    has_tiny_decoders: ClassVar[bool] = True

    latent_shape: tuple[int, ...]
    transformer: nn.Module

    def __init__(self, pipeline: Any, options: LoadOptions) -> None:
        self.pipeline = pipeline
        self.options = options
        pipeline.set_progress_bar_config(disable=True)
        self.transformer = getattr(pipeline, self.component).eval().requires_grad_(False)
        self.config: Any = self.transformer.config
        self.device = next(self.transformer.parameters()).device
        self.dtype = options.dtype
        self.tiny_decoder: Any = None
        self.attention: Callable[[], AbstractContextManager[Any]] = nullcontext  # predictions run inside of it
        vae = pipeline.vae.eval().requires_grad_(False)
        if self.device.type == "cpu" and all(parameter.ndim < 5 for parameter in vae.parameters()):
            # CPU convolutions over small channel counts are faster in this layout, which videos do not have
            vae.to(memory_format=torch.channels_last)

    @classmethod
    @abstractmethod
    def from_pretrained(cls, path: str, index: Mapping[str, Any], options: LoadOptions) -> Backbone:
        """The adapter over a saved pipeline; `index` is its model_index.json. Raises ConfigError."""

    # --- text ---

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of the prompts; the empty string gives the unconditional ones."""

    def release_text_encoders(self) -> None:
        """Free the text encoders; `encode_prompts` raises afterwards."""
        for name in self.text_encoders:
            setattr(self.pipeline, name, None)

    def require_text_encoders(self) -> None:
        """Raises RuntimeError when they were released."""
        if all(getattr(self.pipeline, name) is None for name in self.text_encoders):
            raise RuntimeError("the text encoders were released: encode all prompts first")

    # --- velocity ---

    def predict(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity (B, *latent_shape) at noise levels sigma (B,)."""
        with self.attention():
            return self.velocity(x_t, sigma, conditioning)

    @abstractmethod
    def velocity(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """What `predict` returns, whatever computes the attention."""

    def is_guided(self, guidance_scale: float) -> bool:
        """Whether the pipeline's guidance_scale means that two predictions are combined.

        Raises ConfigError where the family has no such guidance and the scale asks for it.
        """
        if self.guidance == "distilled" and guidance_scale != self.unguided_scale:
            raise ConfigError(
                f"guidance_scale is {guidance_scale}, but {self.family} was distilled to run without an unconditional "
                f"prediction: set guidance_scale to {self.unguided_scale}, and model.distilled_guidance to the number "
                "that the model is told"
            )
        return guidance_scale != self.unguided_scale

    def linear_scale(self, guidance_scale: float) -> float:
        """w of u + w (c - u) for the pipeline's guidance_scale, where guidance is linear."""
        return guidance_scale

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        """The two velocities combined as the family's pipeline does it, in fp32."""
        conditional, unconditional = conditional.float(), unconditional.float()
        return unconditional + self.linear_scale(guidance_scale) * (conditional - unconditional)

    # --- sampling ---

    @abstractmethod
    def rollout_sigmas(self, steps: int) -> Tensor:
        """Noise levels (steps + 1,) in fp32, falling to 0, as the pipeline's own scheduler spaces them."""

    def start_scale(self, steps: int) -> float:
        """Standard deviation of x_t at the first of `rollout_sigmas`, where the pipeline starts from Gaussian noise."""
        return 1.0

    def sigma_at(self, share: Tensor) -> Tensor:
        """Noise levels at shares in [0, 1] of the model's training time range, of any shape.

        A flow model's time is its noise level; one that was trained on a schedule of timesteps has its own.
        """
        return share

    def one_step_scale(self, sigma: float) -> float:
        """What unit Gaussian noise is multiplied by, to be the x_t that a one-step generator reads at `sigma`.

        A model that rescales x_t before it reads it is given the noise itself.
        """
        return 1.0

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """float32 in [0, 1]: images (B, 3, H, W), of a video model (B, frames, 3, H, W)."""
        return self.decode_by(self.pipeline.vae, latents)

    def decode_with_graph(self, latents: Tensor) -> Tensor:
        """What `decode` returns, with a graph to the latents where gradients are enabled; by the tiny decoder where
        there is one.

        Pixels outside of [0, 1] are cut off and have no gradient.
        """
        return self.decode_by(self.pipeline.vae if self.tiny_decoder is None else self.tiny_decoder, latents)

    @abstractmethod
    def decode_by(self, vae: Any, latents: Tensor) -> Tensor:
        """What `decode` returns, of an autoencoder for this family's latents."""

    def use_tiny_decoder(self, path: str) -> None:
        """Decode with graphs by an `AutoencoderTiny` (TAESD and its kin), a folder or hub id, frozen.

        Raises ConfigError for a family whose latents these do not decode, and for one that cannot be loaded or is of
        other latents or images than the pipeline's own.
        """
        from diffusers import AutoencoderTiny

        if not self.has_tiny_decoders:
            raise ConfigError(f"{path}: an AutoencoderTiny does not decode the latents of {self.family}: leave it out")
        try:
            loaded: Any = AutoencoderTiny.from_pretrained(
                os.path.expanduser(path), torch_dtype=self.pipeline.vae.dtype, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise ConfigError(f"{path} could not be loaded as an AutoencoderTiny: {error}") from error
        tiny, found = loaded
        lacking = sorted(name for name in found["missing_keys"] if name.startswith("decoder."))
        if lacking:  # diffusers fills them at random
            raise ConfigError(f"{path} lacks {len(lacking)} tensors of an AutoencoderTiny's decoder, as {lacking[0]}")
        tiny = tiny.to(self.device).eval().requires_grad_(False)
        theirs, ours = (tiny.config.latent_channels, self.pipeline.vae.config.latent_channels)
        if theirs != ours:
            raise ConfigError(f"{path} decodes latents of {theirs} channels, expected {ours} as {self.family} has")
        latents = torch.zeros(1, *self.latent_shape, device=self.device)
        with torch.no_grad():
            made, expected = self.decode_by(tiny, latents).shape[1:], self.decode(latents).shape[1:]
        if made != expected:
            raise ConfigError(f"{path} makes images {tuple(made)} of latents that are images {tuple(expected)}")
        self.tiny_decoder = tiny

    @property
    def frames(self) -> int | None:
        """Frames of a decoded video; None for images."""
        return None

    def with_model(self, folder: str) -> Backbone:
        """The same pipeline around another velocity model: one that was saved alone, as full fine-tuning saves it.

        Raises ConfigError when the folder holds no model of this kind and size, or not all of one.
        """
        model_class: Any = type(self.transformer)
        try:
            model, found = model_class.from_pretrained(folder, torch_dtype=self.dtype, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{folder} could not be loaded as a {model_class.__name__}: {error}") from error
        lacking = sorted(found["missing_keys"])
        if lacking:
            raise ConfigError(
                f"{folder} lacks {len(lacking)} tensors of its model, such as {lacking[0]}: save it again"
            )
        ours = {name: tensor.shape for name, tensor in self.transformer.named_parameters()}
        theirs = {name: tensor.shape for name, tensor in model.named_parameters()}
        if ours != theirs:
            name = sorted(set(ours.items()) ^ set(theirs.items()))[0][0]
            raise ConfigError(
                f"{folder} is a {model_class.__name__} of another size: {name} is {theirs.get(name)}, expected "
                f"{ours.get(name)} as in the pipeline"
            )
        other = copy.copy(self)
        other.transformer = model.to(self.device).eval().requires_grad_(False)
        other.config = other.transformer.config
        return other

    # --- adapters ---

    def save_lora(self, folder: str, state: dict[str, Tensor]) -> None:
        """Write `pytorch_lora_weights.safetensors`, loadable by the pipeline's `load_lora_weights`."""
        type(self.pipeline).save_lora_weights(folder, **{f"{self.component}_lora_layers": state})
