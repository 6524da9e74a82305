"""The shapes world's exact detector, speaking the rule engine's language."""

from __future__ import annotations

from torch import Tensor

from crd_fast.rewards.geneval import Detection
from crd_fast.shapes.detector import find_shapes


def detect_shapes(images: Tensor) -> list[list[Detection]]:
    """Detections of images (B, 3, H, W) in [0, 1]; stray paint that is no shape is not reported."""
    return [
        [Detection(blob.shape, 1.0, blob.box, blob.color) for blob in blobs if blob.valid]
        for blobs in find_shapes(images)
    ]
