"""An exact detector for the shapes world: colour segmentation, connected components, shape by fill and moments.

All images of a batch are labelled at once, so a thousand images take a fraction of a second on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from crd_fast.shapes.world import BACKGROUND, COLORS, PANEL, SHAPES

MIN_AREA = 40  # pixels; the smallest true shape covers about 150
# (area / bounding box, polar moment / area^2) of the ideal circle, square and upright triangle
_IDEAL = np.array([[np.pi / 4, 1 / (2 * np.pi)], [1.0, 1 / 6], [0.5, 1 / (3 * np.sqrt(3))]])
_SPREAD = np.array([0.11, 0.012])  # one unit of distance; fill separates well, the moment tells blobs from shapes
_MAX_DISTANCE = 1.0


@dataclass(frozen=True)
class FoundShape:
    """One connected blob of a palette colour. `valid` blobs look like `shape`; others are stray paint."""

    shape: str
    color: str
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, exclusive at the right and bottom
    area: int
    valid: bool


_BITS = 6  # colour resolution of the look-up table: 64 levels a channel


@cache
def _table() -> np.ndarray:
    """Palette index of every quantised colour: 0 for ground or sign, 1.. for the colours in order. int8 (2^18,)."""
    levels = (torch.arange(1 << _BITS, dtype=torch.float32) + 0.5) / (1 << _BITS)
    flat = torch.cartesian_prod(levels, levels, levels)  # (2^18, 3)
    ground = torch.tensor(BACKGROUND, dtype=torch.float32) / 255
    directions = torch.tensor([PANEL, *COLORS.values()], dtype=torch.float32) / 255 - ground  # (P, 3)
    length = directions.square().sum(1)
    # an anti-aliased pixel lies on the line from ground to its colour; coverage is how far along, 1 on full colour
    coverage = (flat - ground) @ directions.T / length  # (2^18, P)
    residual = (flat - ground).square().sum(1, keepdim=True) - coverage.square() * length
    nearest = residual.argmin(1)  # 0 is the sign's panel
    covered = coverage.gather(1, nearest[:, None]).squeeze(1) > 0.5
    off_line = residual.gather(1, nearest[:, None]).squeeze(1) > 0.06
    return torch.where(covered & ~off_line, nearest, 0).to(torch.int8).numpy()


def _segment(images: Tensor) -> np.ndarray:
    """Palette index per pixel, int8 (N, H, W)."""
    levels = (images * (1 << _BITS)).clamp_(0, (1 << _BITS) - 1).to(torch.int32)
    index = (levels[:, 0] << 2 * _BITS) | (levels[:, 1] << _BITS) | levels[:, 2]
    return _table()[index.numpy()]


def find_shapes(images: Tensor) -> list[list[FoundShape]]:
    """Blobs of palette colour in each image of (N, 3, H, W) float in [0, 1], largest first."""
    from scipy import ndimage

    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images is {images.dtype} {tuple(images.shape)}: expected float (N, 3, H, W) in [0, 1]")
    segments = _segment(images.detach().to("cpu", torch.float32))
    count, height, width = segments.shape
    masks = segments[:, None] == np.arange(1, len(COLORS) + 1, dtype=np.int8)[None, :, None, None]
    flat_masks = masks.reshape(-1, height, width)
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1] = True
    labels, total = ndimage.label(flat_masks, structure=in_plane)
    found: list[list[FoundShape]] = [[] for _ in range(count)]
    if total == 0:
        return found
    planes, ys, xs = np.nonzero(labels)
    ids = labels[planes, ys, xs]
    area = np.bincount(ids, minlength=total + 1).astype(np.float64)[1:]
    mean_x = np.bincount(ids, xs, minlength=total + 1)[1:] / area
    mean_y = np.bincount(ids, ys, minlength=total + 1)[1:] / area
    square = np.bincount(ids, (xs.astype(np.float64) ** 2 + ys.astype(np.float64) ** 2), minlength=total + 1)[1:]
    moment = (square / area - mean_x**2 - mean_y**2 + 1 / 6) / area  # 1/6: a pixel's own polar moment
    boxes = ndimage.find_objects(labels)
    names = list(COLORS)
    for i, slices in enumerate(boxes):
        if area[i] < 4:
            continue
        plane, rows, columns = slices
        box_height, box_width = rows.stop - rows.start, columns.stop - columns.start
        fill = area[i] / (box_height * box_width)
        distance = np.abs((np.array([fill, moment[i]]) - _IDEAL) / _SPREAD).max(1)
        kind = int(distance.argmin())
        aspect = box_width / box_height
        upright = 0.72 < aspect < 1.39
        image, color = divmod(plane.start, len(COLORS))
        found[image].append(
            FoundShape(
                shape=SHAPES[kind],
                color=names[color],
                box=(columns.start, rows.start, columns.stop, rows.stop),
                area=int(area[i]),
                valid=bool(area[i] >= MIN_AREA and distance[kind] < _MAX_DISTANCE and upright),
            )
        )
    for blobs in found:
        blobs.sort(key=lambda blob: (-blob.area, blob.box))
    return found


def cleanliness(images: Tensor) -> Tensor:
    """Share (N,) of painted pixels that belong to a valid shape; 0 for an image with none."""
    values = []
    for blobs in find_shapes(images):
        painted = sum(blob.area for blob in blobs)
        values.append(sum(blob.area for blob in blobs if blob.valid) / painted if painted else 0.0)
    return torch.tensor(values, dtype=torch.float32)
