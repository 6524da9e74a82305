"""Images as 8-bit RGB PNG: lossless on the wire, and read with care."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import torch
from torch import Tensor

from crd_fast.rewards.remote.protocol import ProtocolError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">I4sIIBB")  # of the first chunk: length, type, width, height, bit depth, colour type
_RGB = 2


def encode_png(image: Tensor) -> bytes:
    """A PNG of an image (3, H, W) in [0, 1], rounded to the nearest of 256 levels; the PNG itself loses nothing."""
    from PIL import Image

    pixels = (image.detach().to("cpu", torch.float32) * 255).round().to(torch.uint8).permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def png_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """(height, width) by the header, without decoding. Raises ProtocolError for anything but a PNG that is 8-bit RGB
    and has at most `max_pixels` pixels."""
    start = len(_SIGNATURE)
    if not data.startswith(_SIGNATURE) or len(data) < start + _HEADER.size:
        raise ProtocolError("the image is no PNG: expected 8-bit RGB PNG")
    length, kind, width, height, depth, color = _HEADER.unpack_from(data, start)
    if kind != b"IHDR" or length != 13:
        raise ProtocolError("the PNG does not begin with its header")
    if depth != 8 or color != _RGB:
        raise ProtocolError(f"the PNG has bit depth {depth} and colour type {color}: expected 8 and {_RGB}, RGB")
    if width == 0 or height == 0 or width * height > max_pixels:
        raise ProtocolError(
            f"the PNG is {width}x{height}: expected 1 to {max_pixels} pixels; the server's --max-pixels raises that"
        )
    return height, width


def decode_png(data: bytes, max_pixels: int) -> Tensor:
    """float32 (3, H, W) in [0, 1]. Raises ProtocolError as `png_size` does, and for a PNG that is damaged."""
    from PIL import Image

    height, width = png_size(data, max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
                # a second header chunk would override the first
                if picture.size != (width, height) or picture.mode != "RGB":
                    raise ProtocolError(f"the PNG is {picture.size} {picture.mode}, not what its header says")
                pixels = np.array(picture)
    except ProtocolError:
        raise
    except Exception as error:  # a decoder fed with anything at all raises anything at all
        raise ProtocolError(f"the PNG cannot be decoded: {type(error).__name__}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div_(255).contiguous()
