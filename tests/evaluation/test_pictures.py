"""Images as files: the same numbers as the tensor, and no half-written file is taken for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crd_fast.errors import DataError, NonFiniteError
from crd_fast.evaluation.pictures import as_stored, is_whole, read_image, to_pixels, write_png


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))


def test_a_png_holds_what_as_stored_says(tmp_path: Path, image: torch.Tensor) -> None:
    write_png(tmp_path / "a.png", to_pixels(image)[0])
    assert torch.equal(read_image(tmp_path / "a.png"), as_stored(image)[0])
    assert torch.equal(as_stored(as_stored(image)), as_stored(image))
    assert (as_stored(image) - image).abs().max() <= 0.5 / 255 + 1e-7
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_every_cut_and_every_changed_byte_is_noticed(tmp_path: Path, image: torch.Tensor) -> None:
    path = tmp_path / "a.png"
    write_png(path, to_pixels(image[..., :4, :4])[0])
    content = path.read_bytes()
    assert is_whole(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert not is_whole(path), f"{length} of {len(content)} bytes"
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
        assert not is_whole(path), f"byte {position} of {len(content)}"


def test_a_file_that_is_no_image_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png is no whole image .*make it again"):
        read_image(tmp_path / "a.png")


def test_nan_is_not_stored_as_a_colour(image: torch.Tensor) -> None:
    image[0, 1, 2, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="1 of 1 images have NaN"):
        to_pixels(image)


def test_what_is_not_one_opaque_picture_of_eight_bits_is_refused(tmp_path: Path, image: torch.Tensor) -> None:
    """Scores of what is left after a conversion to RGB would be plausible numbers of another picture."""
    path, picture = tmp_path / "a.png", Image.fromarray(to_pixels(image)[0])
    for mode in ("L", "P", "RGBA", "LA"):  # nothing is lost
        picture.convert(mode).save(path)
        assert read_image(path).shape == image.shape[1:]
    clear = picture.convert("RGBA")
    clear.putpixel((3, 2), (9, 9, 9, 254))
    clear.save(path)
    with pytest.raises(DataError, match=r"a\.png has transparent pixels: lay it on the background"):
        read_image(path)
    picture.convert("P").save(path, transparency=picture.convert("P").getpixel((0, 0)))
    with pytest.raises(DataError, match="transparent pixels"):
        read_image(path)
    Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 68).save(path)
    with pytest.raises(DataError, match="more than 8 bits a pixel .*: scale it to 8 bits"):
        read_image(path)
    picture.save(path, save_all=True, append_images=[picture.transpose(Image.Transpose.ROTATE_180)])
    with pytest.raises(DataError, match="has 2 frames: expected one picture a file"):
        read_image(path)


def test_a_picture_larger_than_pillow_reads_is_one_files_failure(
    tmp_path: Path, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_png(tmp_path / "a.png", to_pixels(image)[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 40 // 2 - 1)
    with pytest.raises(DataError, match=r"a\.png is no whole image .*exceeds limit"):
        read_image(tmp_path / "a.png")
