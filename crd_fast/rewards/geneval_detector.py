"""The detector of the GenEval benchmark through transformers: Mask2Former finds objects, CLIP names their colours.

Ghosh et al., arXiv 2310.11513; Cheng et al., "Masked-attention Mask Transformer", arXiv 2112.01527; Radford et al.,
arXiv 2103.00020. What is as in the benchmark: classes and their names, the size at which Mask2Former sees an image, the
score of an object and its box, no suppression of overlapping objects, the crops and the classifier of colours. What is
not: the weights of Mask2Former are those of its authors, where the benchmark takes mmdetection's training of the same
model on the same data; an image that is not square is stretched by less than 32 pixels to a size the backbone can
divide, where mmdetection pads it; and precision is fp32 unless chosen otherwise, where the benchmark's CLIP runs in
mixed precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crd_fast.errors import ConfigError, RewardError
from crd_fast.rewards.clip_embedding import (
    ClipEmbedder,
    ClipOptions,
    ClipPreparation,
    load_clip,
    normalize,
    to_eight_bit,
)
from crd_fast.rewards.geneval import THRESHOLD, Detection
from crd_fast.rewards.models import ModelOptions, SharedModel

# COCO's classes in COCO's order, as the benchmark calls them
CLASSES = tuple(
    (
        "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, "
        "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, "
        "backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, "
        "baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, "
        "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, "
        "potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, "
        "cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, "
        "hair drier, toothbrush"
    ).split(", ")
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_TEMPLATES = (
    "a photo of a {color} {label}",
    "a photo of a {color}-colored {label}",
    "a photo of a {color} object",
)
BACKGROUND = 0x99  # of all three channels, behind an object whose colour is asked
MAX_INSTANCES = 100  # an image's most probable pairs of a query and a class
ASPECT = 1333 / 800  # the longest side over the shortest of what Mask2Former sees
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of what Mask2Former sees
_MASKS_AT_ONCE = 8  # masks enlarged together: 8 of 800 x 1333 pixels take 34 MB


@dataclass(frozen=True)
class Mask2FormerOptions:
    """The models of the detector "mask2former", folders or hub ids, and how they run.

    model: Mask2Former of COCO's 80 classes. color_model: CLIP, names colours. device: None takes the GPU if there
    is one. dtype: "fp32", "bf16" or "fp16". batch_size: images, or crops, in one forward pass. offload: a model
    waits in host memory while it is not used. short_side: to which images are scaled before they are searched; a
    smaller one is faster and misses small objects.
    """

    model: str = "facebook/mask2former-swin-small-coco-instance"
    color_model: str = "openai/clip-vit-large-patch14"
    device: str | None = None
    dtype: str = "fp32"
    batch_size: int = 4
    offload: bool = False
    short_side: int = 800

    def __post_init__(self) -> None:
        if self.short_side < 64:
            raise ConfigError(f"the detector's short_side is {self.short_side}: expected at least 64 pixels")
        _ = self.detection, self.colors

    @property
    def detection(self) -> ModelOptions:
        return ModelOptions(self.model, self.device, self.dtype, self.batch_size, self.offload)

    @property
    def colors(self) -> ClipOptions:
        return ClipOptions(self.color_model, self.device, self.dtype, self.batch_size, self.offload)


def instances(
    class_logits: Tensor, mask_logits: Tensor, seen: tuple[int, int], size: tuple[int, int]
) -> list[Detection]:
    """The objects of one image, in order of class probability, from what Mask2Former says about Q queries.

    class_logits (Q, 81), no object last; mask_logits (Q, h, w); seen: height and width of the model's input; size:
    those of the image, in whose pixels boxes are. As mmdetection has it: the 100 most probable pairs of query and
    class, each with the score p(class) * mean(sigmoid(mask) over the object's pixels), which are those with a positive
    logit after bilinear scaling to `seen` and then to `size`; the box touches the outermost of them. A query may be
    two objects, and objects may overlap. Pairs that no rule keeps, as p(class) alone is at most 0.3, are left out.
    """
    if class_logits.shape[-1] != len(CLASSES) + 1 or class_logits.shape[0] != mask_logits.shape[0]:
        raise RewardError(
            f"class logits {tuple(class_logits.shape)} and mask logits {tuple(mask_logits.shape)}: expected "
            f"(Q, {len(CLASSES) + 1}) and (Q, h, w)"
        )
    probabilities = class_logits.float().softmax(-1)[:, :-1].flatten()  # (Q * 80,)
    top, pairs = probabilities.topk(min(MAX_INSTANCES, len(probabilities)))
    top, pairs = top[top > THRESHOLD], pairs[top > THRESHOLD]
    found: list[Detection] = []
    for chances, part in zip(top.split(_MASKS_AT_ONCE), pairs.split(_MASKS_AT_ONCE), strict=True):
        logits = mask_logits[part // len(CLASSES), None].float()  # (n, 1, h, w)
        for target in (seen, size):
            logits = F.interpolate(logits, size=target, mode="bilinear", align_corners=False)
        masks = logits[:, 0] > 0  # (n, H, W)
        certainty = (logits[:, 0].sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
        for score, pair, mask in zip((chances * certainty).tolist(), part.tolist(), masks.cpu(), strict=True):
            if score > THRESHOLD:  # so the mask is not empty
                rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
                y0, y1, x0, x1 = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
                box = (float(x0), float(y0), float(x1), float(y1))
                found.append(Detection(CLASSES[pair % len(CLASSES)], score, box, mask=mask[y0:y1, x0:x1].clone()))
    return found


class Mask2FormerDetector:
    """Finds COCO's 80 classes with their masks. The model is loaded at the first call."""

    def __init__(self, options: Mask2FormerOptions) -> None:
        self.short_side = options.short_side
        self._options = options.detection
        self._model = SharedModel("mask2former", self._options, _load_mask2former)

    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """Detections of images (B, 3, H, W) in [0, 1], RGB, without colours; all above 0.3 in score.

        Raises RewardError when the model's files are missing or are not those of such a model.
        """
        size = (images.shape[-2], images.shape[-1])
        found: list[list[Detection]] = []
        with self._model.on_device() as model, torch.no_grad():
            for part in to_eight_bit(images).split(self._options.batch_size):
                resized = _resize(self.short_side, part).to(self._options.torch_device)  # uint8 (b, 3, h, w)
                seen = (resized.shape[-2], resized.shape[-1])
                pixels = normalize(resized.float() / 255, *IMAGENET)
                output = model(pixel_values=pixels.to(self._options.torch_dtype))
                logits = zip(output.class_queries_logits, output.masks_queries_logits, strict=True)
                found += [instances(classes, masks, seen, size) for classes, masks in logits]
        return found


def color_crop(image: Tensor, detection: Detection) -> Tensor:
    """What is shown of an object to name its colour: its box of the image, (3, h, w), all but its mask in #999.

    image: uint8 (3, H, W). Raises RewardError for a detection without a mask.
    """
    if detection.mask is None:
        raise RewardError(
            f"detection of {detection.label!r} has no mask: its colour cannot be told from what is behind"
        )
    x0, y0, x1, y1 = map(int, detection.box)
    return image[:, y0:y1, x0:x1].masked_fill(~detection.mask, BACKGROUND)


class ClipColors:
    """Names the colours of objects by CLIP: ten colours, each the mean of three texts about the object's class.

    The benchmark's open_clip gives OpenAI's weights the activation they were trained with, QuickGELU; so does
    transformers.
    """

    def __init__(self, options: Mask2FormerOptions) -> None:
        self.options = options.colors
        self._model = SharedModel("clip", self.options, load_clip)
        self._texts = ClipEmbedder("geneval", self.options)
        self._preparation: ClipPreparation | None = None
        self._classifiers: dict[str, Tensor] = {}

    def __call__(self, images: Tensor, objects: Sequence[tuple[int, Detection]]) -> list[str]:
        """The colour of each of N objects, given images (B, 3, H, W) in [0, 1] and N pairs (index of image, object).

        Of equally likely colours it is the first in the order of `COLORS`. Raises RewardError for an object without a
        mask, and when the model's files are missing or are not those of a CLIP.
        """
        indices = sorted({index for index, _ in objects})
        pictures = dict(zip(indices, to_eight_bit(images[indices]), strict=True))
        names: list[str] = []
        with self._model.on_device() as model, torch.no_grad():
            if self._preparation is None:
                self._preparation = ClipPreparation(self.options.processor_source, model)
            for start in range(0, len(objects), self.options.batch_size):
                part = objects[start : start + self.options.batch_size]
                crops = [color_crop(pictures[index], detection) for index, detection in part]
                pixels = torch.cat([self._preparation.eight_bit(crop[None]) for crop in crops])  # (n, 3, S, S)
                seen = model.image_embeddings(pixels.to(self.options.torch_device)).cpu()  # (n, D)
                for vector, (_, detection) in zip(seen, part, strict=True):
                    names.append(COLORS[int((self._classifier(detection.label) @ vector).argmax())])
        return names

    def _classifier(self, label: str) -> Tensor:
        """One normalised embedding a colour, float32 (10, D) on the CPU."""
        if label not in self._classifiers:
            texts = [template.format(color=color, label=label) for color in COLORS for template in COLOR_TEMPLATES]
            each = self._texts.text_embeddings(texts).view(len(COLORS), len(COLOR_TEMPLATES), -1)
            self._classifiers[label] = F.normalize(each.mean(1), dim=-1)
        return self._classifiers[label]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise RewardError(
            f'the detector "mask2former" needs transformers ({error}): pip install "crd-fast[rewards]"'
        ) from error
    return transformers


def _load_mask2former(source: str) -> torch.nn.Module:
    """Raises RewardError for other classes than COCO's, and where weights are missing, which would be random."""
    kind = _transformers().Mask2FormerForUniversalSegmentation
    model, report = kind.from_pretrained(source, output_loading_info=True)
    missing = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing or model.config.num_labels != len(CLASSES):
        raise RewardError(
            f"{source!r} lacks {len(missing)} weights of a Mask2Former ({', '.join(missing[:2])}) and has "
            f"{model.config.num_labels} classes: expected a whole one of COCO's {len(CLASSES)}, such as "
            f"{Mask2FormerOptions.model}"
        )
    return model


def _resize(short_side: int, images: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) as uint8 (B, 3, h, w), h and w multiples of 32, on the CPU.

    The size is that of the benchmark's configuration; the one published with the weights has 384 x 384 pixels. By PIL,
    so the same with and without torchvision; normalising on the model's device saves most of the time on the CPU.
    """
    processor = _transformers().Mask2FormerImageProcessorPil(
        size={"shortest_edge": short_side, "longest_edge": round(short_side * ASPECT)},
        size_divisor=32,
        do_rescale=False,
        do_normalize=False,
    )
    pictures = list(images.permute(0, 2, 3, 1).numpy())
    return processor(images=pictures, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
