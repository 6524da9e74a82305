"""Arithmetic of a training step, counted once on the model at hand, and what share of the device's it reaches."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.snapshots import BASE, ParameterSets

# Dense bf16 operations per second, from the makers' data sheets; the longest name that fits counts.
_PEAK = {
    "A100": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
# Forward, gradient of the activations, and the adapters' own share, which is small; a full model has weight gradients.
TRAINED_PASSES = {"lora": 2.2, "full": 3.0}


def _attention(query: Any, key: Any, value: Any, *others: Any, **settings: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch's counter knows the attention kernels of GPUs alone
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


@torch.no_grad()
def forward_flops(sets: ParameterSets, backbone: Backbone, conditioning: Conditioning) -> float:
    """Floating-point operations of one sample's prediction. conditioning: of one prompt."""
    x = torch.zeros(1, *backbone.latent_shape, device=backbone.device)
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        sets.predict(backbone, [(BASE, 1)], x, torch.full((1,), 0.5, device=backbone.device), conditioning)
    return float(counter.get_total_flops())


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak a second; None where it is not known, as on every CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return max(((len(key), value) for key, value in _PEAK.items() if key in name), default=(0, None))[1]
