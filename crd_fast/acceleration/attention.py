"""Which kernels compute attention: chosen by name, and checked layer by layer.

    attention = use_attention(model, "sdpa")
    with attention():
        prediction = model(...)

"native"    what torch chooses for its scaled_dot_product_attention
"sdpa"      the same function with an order of preference: cuDNN, flash, memory-efficient; nothing slower
"flash3"    the same function with FlashAttention 3 behind it, for Hopper GPUs
"xformers"  memory-efficient attention of the xformers package

diffusers' own `set_attention_backend` does nothing, and says nothing, for layers whose processor calls torch itself, as
those of Stable Diffusion 3 do. These get a processor that can be told. Whatever then does not carry the choice is an
error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from crd_fast.errors import ConfigError, nearest

# ours -> the name in diffusers' dispatcher; contexts make the difference between those that are torch's
_DISPATCHED = {"native": "native", "sdpa": "native", "flash3": "native", "xformers": "xformers"}
BACKENDS = tuple(_DISPATCHED)
_PREFERENCE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
_SHOWN = 5  # layers that an error names


def use_attention(model: nn.Module, backend: str) -> Callable[[], AbstractContextManager[Any]]:
    """Set the backend of every attention layer, and return what makes the context to run predictions in.

    Where the backend cannot run an input, such as a mask or a head size, the prediction raises torch's error and takes
    no other. "flash3" replaces torch's flash kernels in the whole process, until another backend is set.

    Raises ConfigError: an unknown backend, one that is not installed, or layers that it does not reach.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"unknown attention backend {backend!r}{nearest(backend, BACKENDS)}")
    if backend == "xformers":
        _require_xformers()
    _set_flash3(backend == "flash3")
    _install(model, _DISPATCHED[backend])
    assert_backend_applied(model, backend)
    if backend == "sdpa":
        return partial(sdpa_kernel, _PREFERENCE, set_priority=True)
    if backend == "flash3":
        return partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
    return nullcontext


def assert_backend_applied(model: nn.Module, backend: str) -> None:
    """Raises ConfigError naming the layers whose processor does not run `backend`."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    layers, wanted = _attention_layers(model), _DISPATCHED[backend]
    missed = []
    for name, layer in layers.items():
        calls_torch = wanted == "native" and type(layer.processor) is AttnProcessor2_0
        if not calls_torch and getattr(layer.processor, "_attention_backend", None) != wanted:
            missed.append(f"{name} ({type(layer.processor).__name__})")
    if missed:
        more = f" and {len(missed) - _SHOWN} more" if len(missed) > _SHOWN else ""
        raise ConfigError(
            f"attention backend {backend!r} does not reach {len(missed)} of {len(layers)} attention layers of "
            f"{type(model).__name__}: {', '.join(missed[:_SHOWN])}{more}; their processors choose for themselves: use "
            "'native'"
        )
    if (backend == "flash3") != (_active_flash() == "FA3"):
        raise ConfigError(f"attention backend {backend!r} was set, but torch's flash kernels are {_active_flash()}")


class DispatchedJointAttention:
    """Attention of Stable Diffusion 3 over image and text tokens together, by diffusers' dispatcher.

    Computes what diffusers' `JointAttnProcessor2_0` computes. Without text tokens the image attends to itself.
    """

    # the dispatcher's names, which diffusers' own set_attention_backend and enable_parallelism set
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self) -> None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        self._attend = dispatch_attention_fn

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # (B, image tokens, width)
        encoder_hidden_states: Tensor | None = None,  # (B, text tokens, width)
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise ValueError("joint attention got a mask: Stable Diffusion 3 attends to all tokens, leave it out")
        image = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = _heads(hidden_states, image, attn.norm_q, attn.norm_k, attn.heads)
        if encoder_hidden_states is not None:
            text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            added = _heads(encoder_hidden_states, text, attn.norm_added_q, attn.norm_added_k, attn.heads)
            query, key, value = (torch.cat(pair, dim=1) for pair in zip((query, key, value), added, strict=True))
        mixed = self._attend(query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config)
        mixed = mixed.flatten(2).to(query.dtype)  # (B, tokens, width)
        project, dropout = attn.to_out
        if encoder_hidden_states is None:
            return dropout(project(mixed))
        tokens = hidden_states.shape[1]
        seen, told = mixed[:, :tokens], mixed[:, tokens:]
        return dropout(project(seen)), told if attn.context_pre_only else attn.to_add_out(told)


def _heads(
    x: Tensor, projections: tuple[nn.Module, ...], norm_q: nn.Module | None, norm_k: nn.Module | None, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (B, tokens, heads, width of a head), the first two normalised where the layer does so."""
    query, key, value = (project(x).unflatten(-1, (heads, -1)) for project in projections)
    if norm_q is not None:
        query = norm_q(query)
    if norm_k is not None:
        key = norm_k(key)
    return query, key, value


def _attention_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "set_processor")}


def _install(model: nn.Module, dispatched: str) -> None:
    """Tell every processor that listens to diffusers' dispatcher; joint attention gets one that does.

    Equal processors become one object: torch 2.6 compiles a block again for every other processor.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    kinds: list[Any] = []
    for layer in _attention_layers(model).values():
        processor = layer.processor
        if type(processor) is JointAttnProcessor2_0:
            processor = DispatchedJointAttention()
        if not hasattr(processor, "_attention_backend"):
            continue
        processor._attention_backend = AttentionBackendName(dispatched)
        same = [kind for kind in kinds if type(kind) is type(processor) and vars(kind) == vars(processor)]
        if isinstance(processor, nn.Module) or not same:
            kinds.append(processor)
        layer.set_processor(kinds[-1] if not same or isinstance(processor, nn.Module) else same[0])


def _require_xformers() -> None:
    from diffusers.models.attention_dispatch import attention_backend

    missing = "attention backend 'xformers' needs the package: install crd-fast[xformers], or use 'sdpa'"
    if find_spec("xformers") is None:
        raise ConfigError(missing)
    try:
        with attention_backend("xformers"):  # checks its version, and that it could be imported
            pass
    except RuntimeError as error:
        raise ConfigError(f"{missing} ({error})") from error


def _active_flash() -> str | None:
    """The implementation that replaces torch's own flash kernels."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current() if current is not None else None


def _set_flash3(wanted: bool) -> None:
    """Put FlashAttention 3 behind torch's flash attention, or take it away again."""
    if not wanted:
        if _active_flash() == "FA3":
            torch.nn.attention.restore_flash_attention_impl()
        return
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        raise ConfigError(
            "attention backend 'flash3' needs torch.nn.attention.activate_flash_attention_impl, which torch "
            f"{torch.__version__} does not have: use a newer torch, or 'sdpa'"
        )
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise ConfigError("attention backend 'flash3' needs a Hopper GPU (compute capability 9.x): use 'sdpa'")
    try:
        activate("FA3")
    except (ImportError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"attention backend 'flash3' could not be activated ({error}): install FlashAttention 3, whose module is "
            "flash_attn_interface, or use 'sdpa'"
        ) from error
