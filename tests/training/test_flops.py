"""The arithmetic of a prediction against a count by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from crd_fast import backbones
from crd_fast.backbones import Backbone
from crd_fast.full_finetuning import FullCopies
from crd_fast.lora import LoRABank
from crd_fast.training.flops import forward_flops, peak_flops
from tests.pipelines import sd3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3.save(tmp_path_factory.mktemp("sd3"))


def load(folder: Path, resolution: int | None = None) -> Backbone:
    return backbones.load(str(folder), options=replace(sd3.OPTIONS, resolution=resolution))


def by_hand(backbone: Backbone, text: int) -> int:
    """Two operations a multiplication: linear layers by the rows they see, attention, the patches' convolution.

    Patches are 2x2. Layers named for the context see the text's tokens, those of the time and pooled text one row.
    """
    image = backbone.latent_shape[1] * backbone.latent_shape[2] // 4
    one_row = ("time_text_embed", "norm1.linear", "norm1_context.linear", "norm_out.linear")
    context = ("context_embedder", "ff_context", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    total = 0
    for name, module in backbone.transformer.named_modules():
        if isinstance(module, nn.Linear):
            rows = 1 if any(n in name for n in one_row) else text if any(n in name for n in context) else image
            total += 2 * rows * module.in_features * module.out_features
    blocks = len(backbone.transformer.transformer_blocks)  # type: ignore[arg-type]
    attention = blocks * 2 * 2 * (image + text) ** 2 * sd3.WIDTH  # scores, and values
    patches = 2 * image * sd3.LATENT * 4 * sd3.WIDTH
    return total + attention + patches


@pytest.mark.parametrize("resolution", [None, 32])
def test_a_prediction_is_counted_as_by_hand(folder: Path, resolution: int | None) -> None:
    backbone = load(folder, resolution)
    embedded = backbone.encode_prompts(["2 squares"])
    expected = by_hand(backbone, embedded.tensors["context"].shape[1])
    assert forward_flops(FullCopies(backbone), backbone, embedded) == pytest.approx(expected, rel=0.01)


def test_an_adapter_that_is_not_used_adds_nothing(folder: Path) -> None:
    full, adapted = load(folder), load(folder)
    embedded = full.encode_prompts(["2 squares"])
    bank = LoRABank(adapted.transformer, adapted.lora_targets, rank=2, alpha=2.0, seed=0)
    assert forward_flops(bank, adapted, embedded) == forward_flops(FullCopies(full), full, embedded)


def test_counting_leaves_no_gradients(folder: Path) -> None:
    backbone = load(folder)
    sets = FullCopies(backbone)
    forward_flops(sets, backbone, backbone.encode_prompts(["2 squares"]))
    assert torch.is_grad_enabled() and all(p.grad is None for m in sets.modules.values() for p in m.parameters())


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("Tesla T4", None),
    ],
)
def test_the_longest_name_that_fits_is_the_device(
    name: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == expected
