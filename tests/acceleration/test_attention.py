"""Attention backends reach every layer, compute what the stock processor computes, or say that they cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from torch import nn
from torch.nn.attention import SDPBackend

from crd_fast.acceleration import attention
from crd_fast.acceleration.attention import BACKENDS, DispatchedJointAttention, assert_backend_applied, use_attention
from crd_fast.errors import ConfigError
from tests.acceleration import adapted, inputs, transformer

MODELS = {"plain": ((), None), "dual": ((0, 1), "rms_norm"), "dual_layer_norm": ((0,), "layer_norm")}


def flags() -> tuple[Any, ...]:
    """Torch's choice of kernels: which are allowed, and in which order."""
    cuda = torch.backends.cuda
    allowed = (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
    return *allowed, tuple(torch._C._get_sdp_priority_order())


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize("backend", ["native", "sdpa"])
def test_our_processor_equals_the_stock_one(config: str, backend: str) -> None:
    dual, qk_norm = MODELS[config]
    model = transformer(3, dual, qk_norm)
    bank = adapted(model)
    x, results = inputs(3), []
    for chosen in (None, backend):
        around = use_attention(model, chosen) if chosen else torch.enable_grad
        with around(), bank.use("trained"):
            prediction = model(**x)[0]
        prediction.square().mean().backward()
        results.append((prediction.detach(), [tensor.grad for tensor in bank.tensors("trained")]))
        for tensor in bank.tensors("trained"):
            tensor.grad = None
    assert type(model.transformer_blocks[0].attn.processor) is DispatchedJointAttention
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_the_chosen_backend_computes_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """xformers is played by a function that counts: it has to be called for both attentions of both layers."""
    calls = []

    def counted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        calls.append(query.shape)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    name = AttentionBackendName.XFORMERS
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, counted)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, name, {"query", "key", "value"})
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    model = transformer(2, dual=(0,))
    x = inputs(2)
    with torch.no_grad():
        expected = model(**x)[0]
        with use_attention(model, "xformers")():
            torch.testing.assert_close(model(**x)[0], expected, rtol=1e-6, atol=1e-6)
    assert [tuple(shape) for shape in calls] == [(2, 21, 4, 16), (2, 16, 4, 16), (2, 21, 4, 16)]


def test_the_order_of_kernels_holds_inside_the_context_alone() -> None:
    around = use_attention(transformer(1), "sdpa")
    before = flags()
    for _ in range(2):
        with around():
            flash, efficient, math, cudnn, order = flags()
            assert (flash, efficient, math, cudnn) == (True, True, False, True)
            preferred = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
            assert list(order[:3]) == [int(kernel) for kernel in preferred]
        assert flags() == before


def test_diffusers_own_switch_does_not_reach_stable_diffusion_3() -> None:
    """What our processor is there for. Were this to change, it could go."""
    model = transformer(2, dual=(0,))
    model.set_attention_backend("native")
    with pytest.raises(ConfigError, match=r"reach 3 of 3.*transformer_blocks.0.attn2 \(JointAttnProcessor2_0\)"):
        assert_backend_applied(model, "native")
    use_attention(model, "sdpa")
    assert_backend_applied(model, "sdpa")


@pytest.mark.parametrize("backend", ["native", "sdpa"])
def test_a_layer_that_is_not_reached_is_named(backend: str) -> None:
    model = transformer(3, dual=(1,))
    use_attention(model, backend)
    model.transformer_blocks[1].attn2.set_processor(JointAttnProcessor2_0())
    with pytest.raises(ConfigError, match=r"reach 1 of 4 .*: transformer_blocks.1.attn2 \(JointAttnProcessor2_0\);"):
        assert_backend_applied(model, backend)
    use_attention(model, backend)
    other = DispatchedJointAttention()
    other._attention_backend = AttentionBackendName.FLASH
    model.transformer_blocks[2].attn.set_processor(other)
    with pytest.raises(ConfigError, match=r"reach 1 of 4 .*: transformer_blocks.2.attn \(Dispatched"):
        assert_backend_applied(model, backend)


def test_equal_processors_become_one_object() -> None:
    """torch 2.6 compiles a block again for every other processor; one that differs stays apart."""
    model = transformer(4, dual=(0,))
    special = DispatchedJointAttention()
    special.scale = 2.0  # type: ignore[attr-defined]
    model.transformer_blocks[2].attn.set_processor(special)
    use_attention(model, "native")
    processors = list(model.attn_processors.values())
    assert len(processors) == 5 and len({id(processor) for processor in processors}) == 2
    assert model.transformer_blocks[2].attn.processor is special


def test_layers_that_call_torch_follow_torch_backends_alone() -> None:
    """A UNet's processor has no dispatcher: torch's contexts reach it, xformers does not."""
    model = transformer(1)
    use_attention(model, "native")
    model.transformer_blocks[0].attn.set_processor(AttnProcessor2_0())
    assert_backend_applied(model, "sdpa")
    with pytest.raises(ConfigError, match="AttnProcessor2_0"):
        assert_backend_applied(model, "xformers")


def test_a_mask_is_refused() -> None:
    model = transformer(1)
    use_attention(model, "native")
    layer = model.transformer_blocks[0].attn
    x = torch.randn(1, 3, 64)
    with pytest.raises(ValueError, match="got a mask"):
        layer(x, encoder_hidden_states=x, attention_mask=torch.ones(1, 3))


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown attention backend 'xformer'; did you mean 'xformers'"):
        use_attention(transformer(1), "xformer")


def test_xformers_that_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer(1)
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"crd-fast\[xformers\]"):
        use_attention(model, "xformers")
    # there, but too old or broken
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", False)
    with pytest.raises(ConfigError, match=r"crd-fast\[xformers\].*version is too old"):
        use_attention(model, "xformers")
    assert type(model.transformer_blocks[0].attn.processor) is JointAttnProcessor2_0, "nothing was changed"


class Switch:
    """torch's switch of flash implementations; `available` ones can be activated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *available: str) -> None:
        self.active: str | None = None
        self.available = available
        switch = {
            "activate_flash_attention_impl": self.activate,
            "current_flash_attention_impl": lambda: self.active,
            "restore_flash_attention_impl": lambda: setattr(self, "active", None),
        }
        for name, function in switch.items():
            monkeypatch.setattr(torch.nn.attention, name, function, raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def activate(self, name: str) -> None:
        if name not in self.available:
            raise ModuleNotFoundError("No module named 'flash_attn_interface'")
        self.active = name


def test_flash3_is_switched_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    switch, model = Switch(monkeypatch, "FA3"), transformer(1)
    around = use_attention(model, "flash3")
    assert switch.active == "FA3"
    with around():
        assert flags()[:4] == (True, False, False, False), "flash or nothing"
    with pytest.raises(ConfigError, match="'sdpa' was set, but torch's flash kernels are FA3"):
        assert_backend_applied(model, "sdpa")
    use_attention(model, "sdpa")
    assert switch.active is None
    with pytest.raises(ConfigError, match="'flash3' was set, but torch's flash kernels are None"):
        assert_backend_applied(model, "flash3")


def test_flash3_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer(1)
    with monkeypatch.context() as patched:
        Switch(patched)
        with pytest.raises(ConfigError, match="flash_attn_interface"):
            use_attention(model, "flash3")
        patched.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        with pytest.raises(ConfigError, match="Hopper"):
            use_attention(model, "flash3")
        patched.delattr(torch.nn.attention, "activate_flash_attention_impl")
        with pytest.raises(ConfigError, match="use a newer torch"):
            use_attention(model, "flash3")


def test_every_backend_is_set_on_a_model_without_attention_layers() -> None:
    assert set(BACKENDS) == {"native", "sdpa", "flash3", "xformers"}
    use_attention(nn.Linear(2, 2), "sdpa")
