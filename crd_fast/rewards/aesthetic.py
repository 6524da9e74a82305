"""How pleasing people would rate an image, whatever it shows.

Source: the LAION aesthetic predictor, github.com/christophschuhmann/improved-aesthetic-predictor: a linear map of the
CLIP ViT-L/14 image embedding, trained on ratings of the SAC, LOGOS and AVA1 collections.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crd_fast.errors import ConfigError, RewardError
from crd_fast.rewards.base import Metadata
from crd_fast.rewards.clip_embedding import ClipEmbedder, ClipOptions, check_counts

HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"
HEAD_SOURCE = "https://github.com/christophschuhmann/improved-aesthetic-predictor"

_WIDTHS = (768, 1024, 128, 64, 16, 1)
# Where the published list of layers has its linear ones; dropout is between them.
_POSITIONS = (0, 2, 4, 6, 7)
_SHAPES = {
    f"layers.{position}.{kind}": shape
    for position, wide, narrow in zip(_POSITIONS, _WIDTHS[:-1], _WIDTHS[1:], strict=True)
    for kind, shape in (("weight", (narrow, wide)), ("bias", (narrow,)))
}


@dataclass(frozen=True)
class AestheticOptions(ClipOptions):
    """head: file of the rating layers, as published or the same tensors as .safetensors. See `ClipOptions`."""

    model: str = "openai/clip-vit-large-patch14"
    head: str = HEAD_FILE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.head:
            raise ConfigError(f"rewards.aesthetic.head is '': expected the path of {HEAD_FILE} from {HEAD_SOURCE}")


class Aesthetic:
    """The rating, about 1 to 10, of an image's embedding of length 1; the prompt plays no part. See `Reward`.

    The rating layers run in float32 whatever the model's dtype. A missing `head` raises RewardError at the first use.
    """

    name = "aesthetic"
    requires: frozenset[str] = frozenset()
    differentiable = True
    range: tuple[float, float] | None = None

    def __init__(self, options: AestheticOptions) -> None:
        self.embedder = ClipEmbedder(self.name, options)
        self._path = Path(options.head)
        self._head: tuple[Tensor, Tensor] | None = None

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        check_counts(self.name, images, prompts, metadata)
        return {self.name: self._rate(lambda: self.embedder.image_embeddings(images))}

    def differentiable_scores(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        check_counts(self.name, images, prompts, metadata)
        return self._rate(lambda: self.embedder.differentiable_image_embeddings(images))

    def _rate(self, embed: Callable[[], Tensor]) -> Tensor:
        if self._head is None:  # a missing file is found before the model is loaded
            self._head = load_head(self._path)
        embeddings = embed()
        weight, bias = (part.to(embeddings.device) for part in self._head)
        return (embeddings * weight).sum(-1) + bias


def load_head(path: Path) -> tuple[Tensor, Tensor]:
    """Weight (768,) and bias () of the rating, float32: the layers 768-1024-128-64-16-1, multiplied out in float64,
    as nothing is between them.

    Raises RewardError for a file that is missing or unreadable, or holds other tensors.
    """
    if not path.is_file():
        raise RewardError(
            f"the aesthetic reward's head {str(path)!r} is missing: download {HEAD_FILE} from {HEAD_SOURCE} and give "
            "its path as rewards.aesthetic.head"
        )
    tensors = _read(path)
    for key, shape in _SHAPES.items():
        if key not in tensors or tuple(tensors[key].shape) != shape:
            found = f"{key} {tuple(tensors[key].shape)}" if key in tensors else f"{sorted(tensors)} and no {key}"
            raise RewardError(
                f"the aesthetic reward's head {str(path)!r} has {found}: expected {key} {shape}, as in {HEAD_FILE} "
                f"from {HEAD_SOURCE}"
            )
    if extra := sorted(set(tensors) - set(_SHAPES)):
        raise RewardError(
            f"the aesthetic reward's head {str(path)!r} has {extra} besides its five layers: expected {HEAD_FILE} from "
            f"{HEAD_SOURCE}"
        )
    weight, bias = torch.eye(_WIDTHS[0], dtype=torch.float64), torch.zeros(_WIDTHS[0], dtype=torch.float64)
    for position in _POSITIONS:
        layer = tensors[f"layers.{position}.weight"].double()
        weight, bias = layer @ weight, layer @ bias + tensors[f"layers.{position}.bias"].double()
    return weight[0].float(), bias[0].float()


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
        raise RewardError(
            f"the aesthetic reward's head {str(path)!r} cannot be read, it is cut off or holds more than tensors: "
            f"download {HEAD_FILE} from {HEAD_SOURCE}"
        ) from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise RewardError(
            f"the aesthetic reward's head {str(path)!r} is no dictionary of tensors: expected {HEAD_FILE} from "
            f"{HEAD_SOURCE}"
        )
    return loaded
