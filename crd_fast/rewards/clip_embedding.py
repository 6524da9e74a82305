"""Images and prompts embedded by a CLIP model of transformers, for the rewards that compare them.

Two ways in for images. The 8-bit path is the model's own image processor on PIL images, and what scores are defined by.
The tensor path does the same to float tensors, so that gradients reach them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crd_fast.errors import ConfigError, RewardError
from crd_fast.rewards.base import Metadata
from crd_fast.rewards.models import ModelOptions, SharedModel, missing_files

# The end-of-text id of configurations older than the fix of it; models with it take the highest id for the end.
_LEGACY_EOS = 2


@dataclass(frozen=True)
class ClipOptions(ModelOptions):
    """processor: folder or hub id of the tokenizer and the image processor; None takes those beside the model."""

    processor: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processor == "":
            raise ConfigError(
                "the reward's processor is '': expected a folder or a hub id, or null for the model's own"
            )

    @property
    def processor_source(self) -> str:
        return self.processor or self.model


class ClipModel(nn.Module):
    """A `transformers.CLIPModel` as a map to embeddings of length 1, float32 whatever its own dtype.

    `logit_scale` is the learned factor exp(s) of the cosine, kept apart from the weights: rounded to bf16, s would
    be off by up to 2 %.
    """

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        self.logit_scale = clip.logit_scale.detach().double().exp().item()
        text = clip.config.text_config
        self.context: int = text.max_position_embeddings
        self.vocabulary: int = text.vocab_size
        self.eos: int = text.eos_token_id
        self.image_size: int = clip.config.vision_config.image_size

    def image_embeddings(self, pixels: Tensor) -> Tensor:
        """(B, D) of normalised pixels (B, 3, S, S)."""
        return F.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    def text_embeddings(self, ids: Tensor) -> Tensor:
        """(B, D) of token ids (B, context)."""
        # attention is causal, so what follows the end of a text does not reach its embedding and needs no mask
        return F.normalize(self.clip.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)

    def ends(self, ids: Tensor) -> Tensor:
        """(B,) the position of each text whose state is its embedding."""
        return (ids if self.eos == _LEGACY_EOS else (ids == self.eos).int()).argmax(-1)


def load_clip(source: str) -> ClipModel:
    """The CLIP model of a folder or hub id. Raises RewardError where weights are missing from its files."""
    from transformers import CLIPModel

    clip, info = CLIPModel.from_pretrained(source, output_loading_info=True)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise RewardError(
            f"{source!r} lacks {len(missing)} weights of a CLIP model, the first is {missing[0]}: expected the files "
            "of a whole CLIPModel, text and image encoder with their projections"
        )
    return ClipModel(clip)


class Preparation(Protocol):
    """How images become a model's pixels; both return (B, 3, S, S)."""

    def eight_bit(self, images: Tensor) -> Tensor:
        """float32 on the CPU, of uint8 images (B, 3, H, W) on the CPU."""
        ...

    def tensor(self, images: Tensor) -> Tensor:
        """With a graph to float32 images (B, 3, H, W) in [0, 1], on their device."""
        ...


class ClipPreparation:
    """The image processor of a CLIP model: shortest side resized (bicubic), centre cropped, normalised.

    The tensor path differs from PIL by its 8-bit steps alone, less than 2 of 255 levels in a pixel: like PIL it resizes
    rows, then columns, and cuts off after each what bicubic weights overshoot. Pillow 13 begins with the columns where
    the height is more than twice the width, which is further off at hard edges, up to 16 levels.

    Raises RewardError for an image processor that does anything else, or whose images are not the model's.
    """

    def __init__(self, source: str, model: ClipModel) -> None:
        with missing_files(source):
            self._processor = _image_processor_class().from_pretrained(source)
        settings = self._processor.to_dict()
        expected = {
            "do_resize": True,
            "do_center_crop": True,
            "do_rescale": True,
            "do_normalize": True,
            "resample": 3,  # bicubic
            "crop_size": {"height": model.image_size, "width": model.image_size},
        }
        unlike = {key: settings.get(key) for key, value in expected.items() if settings.get(key) != value}
        self._side, self._crop = (settings.get("size") or {}).get("shortest_edge", 0), model.image_size
        if unlike or self._side < self._crop:
            raise RewardError(
                f"the image processor of {source!r} has size {settings.get('size')} and {unlike}: expected the CLIP "
                f"model's, with size.shortest_edge at least {self._crop} and {expected}"
            )
        if abs(settings["rescale_factor"] * 255 - 1) > 1e-6:
            raise RewardError(
                f"the image processor of {source!r} has rescale_factor {settings['rescale_factor']}: expected 1/255"
            )
        self._mean, self._std = settings["image_mean"], settings["image_std"]

    def eight_bit(self, images: Tensor) -> Tensor:
        from PIL import Image

        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        return self._processor(images=pictures, return_tensors="pt")["pixel_values"]

    def tensor(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        short, long = sorted((height, width))
        longer = int(self._side * long / short)
        size = (longer, self._side) if height > width else (self._side, longer)
        images = resize(images, (height, size[1])).clamp(0, 1)
        images = resize(images, size).clamp(0, 1)
        top, left = ((side - self._crop) // 2 for side in size)
        images = images[..., top : top + self._crop, left : left + self._crop]
        return normalize(images, self._mean, self._std)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) at `size` (height, width): bicubic, with the wider filter of PIL where they get smaller.

    A product with one matrix an axis, so that its gradient is deterministic, which that of torch's resampling is not
    on a GPU.
    """
    with torch.autocast(images.device.type, enabled=False):
        for axis, length in ((-2, size[0]), (-1, size[1])):
            if images.shape[axis] != length:
                matrix = _resampling(images.shape[axis], length).to(images.device, images.dtype)
                images = matrix @ images if axis == -2 else images @ matrix.mT
    return images


@lru_cache(maxsize=64)
def _resampling(old: int, new: int) -> Tensor:
    """(new, old): what each new position takes of the old ones."""
    unit = torch.eye(old)[None, None]
    return F.interpolate(unit, size=(new, old), mode="bicubic", antialias=True, align_corners=False)[0, 0]


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (B, 3, H, W) less `mean`, divided by `std`, both one number a channel."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def to_eight_bit(images: Tensor) -> Tensor:
    """uint8 on the CPU of images (B, 3, H, W) in [0, 1], rounded to the nearest of 256 levels."""
    return (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)


class ClipEmbedder:
    """Embeddings for the reward called `name`.

    load: of the model; `kind` names what it loads, so that rewards share it. prepare: of images, given where the
    processor is and the model.
    """

    def __init__(
        self,
        name: str,
        options: ClipOptions,
        kind: str = "clip",
        load: Callable[[str], ClipModel] = load_clip,
        prepare: Callable[[str, ClipModel], Preparation] = ClipPreparation,
    ) -> None:
        self._name, self._options = name, options
        self._model = SharedModel(kind, options, load)
        self._prepare = prepare
        self._preparation: Preparation | None = None
        self._tokenizer: Any = None

    @property
    def model(self) -> ClipModel:
        """The model, wherever it is, loaded if it is not yet."""
        return self._model.module()

    def image_embeddings(self, images: Tensor) -> Tensor:
        """float32 (B, D) of length 1 on the CPU, by the 8-bit path, of images (B, 3, H, W) in [0, 1]."""
        pieces = []
        with torch.no_grad(), self._model.on_device() as model:
            for part in to_eight_bit(images).split(self._options.batch_size):
                pixels = self._pixels(model).eight_bit(part).to(self._options.torch_device)
                pieces.append(model.image_embeddings(pixels).cpu())
        return torch.cat(pieces)

    def differentiable_image_embeddings(self, images: Tensor) -> Tensor:
        """float32 (B, D) of length 1 by the tensor path, on the images' device, with a graph to them.

        ConfigError under offload: the model would be gone before the backward pass.
        """
        if self._options.offload:
            raise ConfigError(
                f"rewards.{self._name}.offload is true: expected false where gradients of its scores are needed"
            )
        pieces = []
        with self._model.on_device() as model:
            for part in images.to(self._options.torch_device, torch.float32).split(self._options.batch_size):
                pieces.append(model.image_embeddings(self._pixels(model).tensor(part)))
        return torch.cat(pieces).to(images.device)

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """float32 (B,) on the CPU: the cosine of each image, by the 8-bit path, with its own prompt."""
        with self._model.on_device():
            return (self.image_embeddings(images) * self.text_embeddings(prompts)).sum(-1)

    def differentiable_cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """float32 (B,) on the images' device, by the tensor path, with a graph to the images.

        Raises ConfigError as `differentiable_image_embeddings` does.
        """
        embeddings = self.differentiable_image_embeddings(images)
        return (embeddings * self.text_embeddings(prompts).to(images.device)).sum(-1)

    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """float32 (B, D) of length 1 on the CPU, without a graph; prompts are cut at the model's context.

        Raises RewardError for a tokenizer that is not the model's.
        """
        distinct = list(dict.fromkeys(prompts))  # a group's samples share their prompt
        pieces = []
        with torch.no_grad(), self._model.on_device() as model:
            ids = self._ids(distinct, model)
            for part in ids.split(self._options.batch_size):
                pieces.append(model.text_embeddings(part.to(self._options.torch_device)).cpu())
        place = {prompt: row for row, prompt in enumerate(distinct)}
        return torch.cat(pieces)[[place[prompt] for prompt in prompts]]

    def _ids(self, prompts: list[str], model: ClipModel) -> Tensor:
        source = self._options.processor_source
        if self._tokenizer is None:
            with missing_files(source):
                from transformers import CLIPTokenizer

                self._tokenizer = CLIPTokenizer.from_pretrained(source)
        ids: Tensor = self._tokenizer(
            prompts,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=model.context,
            return_tensors="pt",
        ).input_ids
        last = ids.gather(1, model.ends(ids)[:, None])
        if ids.max() >= model.vocabulary or (last != self._tokenizer.eos_token_id).any():
            raise RewardError(
                f"reward {self._name!r}: the tokenizer of {source!r} has ids up to {len(self._tokenizer) - 1} and ends "
                f"texts with {self._tokenizer.eos_token_id}, the model {self._options.model!r} has {model.vocabulary} "
                f"tokens and eos_token_id {model.eos}: expected the tokenizer that the model was trained with"
            )
        return ids

    def _pixels(self, model: ClipModel) -> Preparation:
        if self._preparation is None:
            self._preparation = self._prepare(self._options.processor_source, model)
        return self._preparation


def check_counts(name: str, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    """Raises RewardError unless there are as many prompts and metadata entries as images."""
    if not len(images) == len(prompts) == len(metadata):
        raise RewardError(
            f"reward {name!r} was given {len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata "
            "entries: expected equal numbers"
        )


def _image_processor_class() -> Any:
    """PIL's, whether or not torchvision is there: its resizing would score a little differently."""
    import transformers

    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
