"""Images as files: lossless PNG, written whole or not at all, and read only when every byte is right."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from crd_fast.errors import DataError, NonFiniteError
from crd_fast.whole_files import write_whole

if TYPE_CHECKING:
    from PIL import Image

_PNG = b"\x89PNG\r\n\x1a\n"
EMBED_BYTES = 16_384  # larger images are embedded as previews
PREVIEW_SIZE = 160


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) in [0, 1] as a PNG holds them: uint8 (N, H, W, 3).

    Raises NonFiniteError for NaN or infinite pixels, which 8 bits would show as a plausible colour.
    """
    bad = int((~images.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise NonFiniteError(
            f"{bad} of {len(images)} images have NaN or infinite pixels: decode in fp32 or bf16, and look at the "
            "model's last losses"
        )
    return (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()


def from_pixels(pixels: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) as float32 (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).contiguous().float() / 255


def as_stored(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1], rounded to the 8 bits of their PNG, so that both get the same scores."""
    return from_pixels(to_pixels(images))


def write_png(path: Path, pixels: np.ndarray) -> None:
    """One image, uint8 (H, W, 3); equal pixels give equal bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    write_whole(path, buffer.getvalue())


def read_image(path: Path) -> Tensor:
    """float32 (3, H, W) in [0, 1] of an image file.

    Raises DataError when it is missing, cut off, damaged or larger than Pillow reads, and when it is something else
    than one opaque picture of 8 bits.
    """
    from PIL import Image

    try:
        content = path.read_bytes()
        if content.startswith(_PNG):
            _check_png(content)
        with Image.open(io.BytesIO(content)) as image:
            other = _not_one_picture(image)
            pixels = np.array(image.convert("RGB"))
    # Pillow reports a bad PNG as a SyntaxError
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no whole image ({error}): make it again") from error
    if other is not None:
        raise DataError(f"{path} {other}")
    return from_pixels(pixels[None])[0]


def _not_one_picture(image: Image.Image) -> str | None:
    """What an opened file holds that its conversion to RGB would lose, and what to do about it."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        return f"has {frames} frames: expected one picture a file; write those that are to be scored as files"
    if image.mode == "F" or image.mode.startswith("I"):
        return f"has more than 8 bits a pixel (Pillow's mode {image.mode}): scale it to 8 bits"
    transparent = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
    if transparent and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        return "has transparent pixels: lay it on the background that it is to be seen on"
    return None


def _check_png(content: bytes) -> None:
    """Raises ValueError unless every chunk of a PNG has its checksum and the last one ends the file.

    Pillow reads files that lack their end, and does not look at the checksums of pixels.
    """
    position, kind = len(_PNG), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 8 + length
        (checksum,) = struct.unpack_from(">I", content, end)
        if zlib.crc32(content[position + 4 : end]) != checksum:
            raise ValueError(f"wrong checksum at byte {position}")
        position = end + 4
    if position != len(content):
        raise ValueError(f"{len(content) - position} bytes after its end")


def is_whole(path: Path) -> bool:
    """Whether `read_image` can read it."""
    try:
        read_image(path)
    except DataError:
        return False
    return True


def data_uri(path: Path, preview_size: int = PREVIEW_SIZE) -> str:
    """For an HTML page: the PNG itself where it is small, a preview of at most `preview_size` pixels a side if not.

    Raises DataError for a file that is no PNG.
    """
    content, kind = path.read_bytes(), "png"
    if not content.startswith(_PNG):
        raise DataError(f"{path} is not a PNG file: write samples as lossless PNG")
    if len(content) > EMBED_BYTES:
        from PIL import Image  # small runs do not need it

        with Image.open(io.BytesIO(content)) as image:
            preview = image.convert("RGB")
        preview.thumbnail((preview_size, preview_size), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        preview.save(buffer, format="JPEG", quality=88)
        content, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
