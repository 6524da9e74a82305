"""Text rendering: how much of the text quoted in the prompt can be read in the image.

Scoring and reading are apart: `OcrReward` takes any reader, `RapidOcrReader` is the one used by default.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata as distributions
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crd_fast.errors import ConfigError, DataError, RewardError
from crd_fast.rewards.base import QUOTED_TEXT, Metadata

Reader = Callable[[Tensor], Sequence[Sequence[str]]]

_QUOTES = str.maketrans(
    dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u2036\u301d\u301e\u301f\uff02", '"')
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u2035\uff07", "'")
)


def normalize(text: str) -> str:
    """The form in which texts are compared: quotes mapped to ASCII, NFKC, no white space, lower case."""
    mapped = unicodedata.normalize("NFKC", text.translate(_QUOTES))
    return "".join(mapped.split()).lower()


def quoted_text(prompt: str) -> str:
    """The text between the two double quotes of a prompt; typographic double quotes count as double quotes.

    Raises DataError unless there are exactly two and something readable between them.
    """
    pieces = prompt.translate(_QUOTES).split('"')
    if len(pieces) != 3:
        raise DataError(
            f"prompt {prompt!r} has {len(pieces) - 1} double quotes: expected exactly two, around the text to be shown"
        )
    if not normalize(pieces[1]):
        raise DataError(f"prompt {prompt!r} has nothing between its double quotes: expected the text to be shown")
    return pieces[1]


def levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions of one character that turn `a` into `b`."""
    row = list(range(len(b) + 1))  # distances from the empty prefix of a to every prefix of b
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            substituted = diagonal + (x != y)
            diagonal = row[j]
            row[j] = min(substituted, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def text_score(target: str, lines: Sequence[str]) -> tuple[float, bool]:
    """(score in [0, 1], exact match) of the lines read against the target text.

    With g and t the normalised target and joined lines: d = 0 if g occurs in t, else min(lev(t, g), len g),
    and the score is 1 - d / len g. Raises DataError when nothing of the target is left after normalising.
    """
    wanted, read = normalize(target), normalize("".join(lines))
    if not wanted:
        raise DataError(f"target text {target!r} is empty: expected at least one visible character")
    distance = 0 if wanted in read else min(levenshtein(read, wanted), len(wanted))
    return 1 - distance / len(wanted), wanted == read


class OcrReward:
    """Share of the quoted text that can be read. `reader` maps images (B, 3, H, W) to B lists of lines."""

    differentiable = False

    def __init__(self, reader: Reader | None = None, name: str = "ocr") -> None:
        self.reader: Reader = RapidOcrReader() if reader is None else reader
        self.name = name
        self.requires: frozenset[str] = frozenset({QUOTED_TEXT})
        self.range: tuple[float, float] | None = (0.0, 1.0)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        """float32 (B,) CPU tensors: the score under `name`, exact matches (0 or 1) under `name`_exact.

        An image in which nothing is read scores 0. Raises DataError for a prompt without its quoted text and
        RewardError when the reader does not return one list an image.
        """
        targets = [quoted_text(prompt) for prompt in prompts]
        read = self.reader(images)
        if len(read) != len(targets):
            raise RewardError(f"reward {self.name!r}: the reader returned {len(read)} lists for {len(targets)} prompts")
        scored = [text_score(target, lines) for target, lines in zip(targets, read, strict=True)]
        return {
            self.name: torch.tensor([score for score, _ in scored], dtype=torch.float32, device="cpu"),
            f"{self.name}_exact": torch.tensor([exact for _, exact in scored], dtype=torch.float32, device="cpu"),
        }


@dataclass(frozen=True)
class OcrSettings:
    """How images are read.

    - mode: "detect" finds lines and reads each. "line" reads the image as one line without looking for it:
      faster on small signs, but it also reads text into images that have none.
    - min_side: images with a shorter side below this many pixels are enlarged (bicubic). Enlarging 64-pixel
      signs makes reading slower and not better.
    - detection_side: longest side in pixels at which lines are looked for; larger images are reduced for
      that. It decides the time, and how small a text is still found.
    - band: (top, bottom) as shares of the height, what "line" reads. The recogniser works at 48 pixels of
      height, so a band that fits the text tightly reads better.
    - min_confidence: lines below it are dropped.
    - workers: that read side by side, each with an engine of its own that uses one core: processes beside a rollout,
      threads where images are scored at once. 0 is the caller alone.
    """

    mode: str = "detect"
    min_side: int = 64
    detection_side: int = 512
    band: tuple[float, float] = (0.0, 1.0)
    min_confidence: float = 0.5
    workers: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("detect", "line"):
            raise ConfigError(f"OCR mode is {self.mode!r}: expected 'detect' or 'line'")
        for field in ("min_side", "detection_side"):
            if getattr(self, field) < 32:
                raise ConfigError(f"OCR {field} is {getattr(self, field)}: expected at least 32 pixels")
        if self.workers < 0:
            raise ConfigError(f"OCR workers is {self.workers}: expected 0 or more")
        if not 0 <= self.min_confidence <= 1:
            raise ConfigError(f"OCR min_confidence is {self.min_confidence}: expected a number in [0, 1]")
        if len(self.band) != 2 or not 0 <= self.band[0] < self.band[1] <= 1:
            raise ConfigError(f"OCR band is {self.band}: expected (top, bottom) with 0 <= top < bottom <= 1")
        if self.mode == "detect" and tuple(self.band) != (0.0, 1.0):
            raise ConfigError(f"OCR band is {self.band} with mode 'detect': only mode 'line' reads a band")


class RapidOcrReader:
    """Reads images with rapidocr (PP-OCRv6 small) on onnxruntime, loaded at the first call, offline.

    Every image is read on its own, so its text does not depend on its batch; results keep the order of the
    images whatever the number of workers. Raises RewardError when the package or its model files are missing.
    """

    def __init__(self, settings: OcrSettings | None = None) -> None:
        self.settings = settings or OcrSettings()
        self._engines: SimpleQueue[Any] = SimpleQueue()
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, images: Tensor) -> list[list[str]]:
        """The lines read in each image of (B, 3, H, W) in [0, 1]: B lists, empty where nothing is read."""
        if self._pool is None:
            workers = max(self.settings.workers, 1)
            for _ in range(workers):
                self._engines.put(_load_engine(self.settings))
            self._pool = ThreadPoolExecutor(workers, thread_name_prefix="ocr")
        return list(self._pool.map(self._read, self._prepare(images)))

    def _prepare(self, images: Tensor) -> np.ndarray:
        """8-bit BGR images (B, H', W', 3), the layout the engine's models were trained on."""
        images = images.detach().to("cpu", torch.float32)
        height, width = images.shape[-2:]
        if min(height, width) < self.settings.min_side:
            factor = self.settings.min_side / min(height, width)
            size = (round(height * factor), round(width * factor))
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
        height = images.shape[-2]
        top, bottom = (round(edge * height) for edge in self.settings.band)
        pixels = (images[..., top : max(bottom, top + 1), :].clamp(0, 1) * 255).round().to(torch.uint8)
        return np.ascontiguousarray(pixels.flip(1).permute(0, 2, 3, 1).numpy())

    def _read(self, image: np.ndarray) -> list[str]:
        engine = self._engines.get()
        try:
            result = engine(image)
        finally:
            self._engines.put(engine)
        if result.txts is None:  # nothing found
            return []
        pairs = zip(result.txts, result.scores, strict=True)
        return [text for text, score in pairs if text.strip() and score >= self.settings.min_confidence]


def _load_engine(settings: OcrSettings) -> Any:
    hint = 'pip install "crd-fast[rewards]"'
    try:
        import rapidocr
    except ImportError as error:
        raise RewardError(f"the OCR reward needs rapidocr >= 3.10 and onnxruntime ({error}): {hint}") from error
    version = distributions.version("rapidocr")
    if tuple(int(piece) for piece in version.split(".")[:2]) < (3, 10):
        raise RewardError(f"the OCR reward needs rapidocr >= 3.10, found {version}: {hint}")
    models = Path(rapidocr.__file__).parent / "models"
    detector, recognizer = models / "PP-OCRv6_det_small.onnx", models / "PP-OCRv6_rec_small.onnx"
    for model in (detector, recognizer):
        # scores are comparable only between runs with the same models, and a given path is never downloaded
        if not model.is_file():
            raise RewardError(
                f"rapidocr {version} has no {model.name} in {models}: expected the models inside its wheel; "
                f"pip install --force-reinstall 'rapidocr>=3.10,<4'"
            )
    return rapidocr.RapidOCR(
        params={
            "Global.use_det": settings.mode == "detect",
            "Global.use_cls": False,
            "Global.text_score": settings.min_confidence,
            "Global.log_level": "critical",
            "Det.limit_type": "max",
            "Det.limit_side_len": settings.detection_side,
            "Det.model_path": str(detector),
            "Rec.model_path": str(recognizer),
            # lines are padded to at least this width: the default of 320 costs more than the reading of a
            # short line
            "Rec.rec_img_shape": [3, 48, 48],
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
