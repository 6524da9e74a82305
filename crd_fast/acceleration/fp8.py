"""Frozen linear layers in FP8, for training adapters on top of them.

    bank = LoRABank(model, targets, ...)                 # adapters first: a bank adapts nn.Linear
    quantize_frozen_linears(model, ("transformer_blocks",))
    ...                                                  # train the adapters; gradients pass through as before

Weights are e4m3 with one scale per output channel, made once. Activations and gradients are e4m3 with one scale per
row, made anew in every pass. e4m3 has three bits of mantissa: rounding changes an element by 2^-4 of itself at most,
or, if it is tiny, by 2^-18 of the largest in its row.

Steps are plain PyTorch operations inside one autograd function, not an operator of our own: torch.compile then fuses
the rounding into what comes before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crd_fast.acceleration.compilation import repeated_blocks
from crd_fast.errors import ConfigError

# Parts of names, inside a block, of the layers that stay as they are: adapters, normalisation, modulation, embedders.
# The model's own embedders and its proj_out are outside the blocks.
KEPT = ("lora", "norm", "mod", "emb")

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_ALIGNMENT = 16  # of both sizes of a weight, asked by torch._scaled_mm on CUDA
_CAPABILITY = (8, 9)


class FrozenFP8Linear(nn.Module):
    """y = x W^T + b with a frozen W in e4m3: forward and the gradient of x by torch._scaled_mm, none of W.

    Takes (..., K) in bf16 or fp32 and returns (..., N) in the same dtype; products leave the multiplication in bf16,
    because that is what it offers on every GPU. Nothing is kept for the backward pass but W and its scales. A row of x
    with a NaN or an infinity gives a row without a finite number.

    weight_e4m3: buffer (N, K). weight_scale: buffer (1, N) in fp32; W = weight_e4m3 * weight_scale^T. There is no
    `weight`, so that code that wants one fails instead of reading numbers without their scale: see `dequantized`.
    Neither buffer follows `.to(dtype)`.
    """

    weight_e4m3: Tensor
    weight_scale: Tensor

    def __init__(self, weight_e4m3: Tensor, weight_scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_e4m3.shape
        self.register_buffer("weight_e4m3", weight_e4m3)
        self.register_buffer("weight_scale", weight_scale)
        self.bias = bias

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear) -> FrozenFP8Linear:
        """The layer with `linear`'s weight rounded, and its bias itself.

        Raises ConfigError when the layer is trained, or a size is not divisible by 16.
        """
        obstacle = _obstacle(linear)
        if obstacle is not None:
            raise ConfigError(f"a linear layer {linear.in_features} -> {linear.out_features} cannot be FP8: {obstacle}")
        values, scale = _quantize_rows(linear.weight)
        return cls(values, scale.reshape(1, -1), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"an FP8 layer was given {x.dtype}: expected bfloat16 or float32")
        rows: Tensor = _FrozenProduct.apply(x.reshape(-1, x.shape[-1]), self.weight_e4m3, self.weight_scale)
        y = rows.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantized(self) -> Tensor:
        """W (N, K) in fp32, as the forward pass uses it: to merge an adapter into, or to run in another precision."""
        return self.weight_e4m3.float() * self.weight_scale.t()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenFP8Linear:
        # .to(dtype), .half() and the like convert every floating buffer: these two only ever change their device
        before = {name: getattr(self, name) for name in ("weight_e4m3", "weight_scale")}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = getattr(self, name)
            if after.dtype != tensor.dtype:
                setattr(self, name, tensor.to(after.device))
        return self


class _FrozenProduct(torch.autograd.Function):
    """(M, K) x, (N, K) values and (1, N) scales of W -> x W^T (M, N) in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, weight_scale)
        # The fast accumulator's error, about 2^-13, is far below that of the factors; for gradients, where more
        # cancels, the exact one is used.
        return _product(x, weight.t(), weight_scale, fast=True).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, weight_scale = ctx.saved_tensors
        # W's scales belong to the channels that are summed over here, where no scale can be given to the
        # multiplication. They go into the gradient before it is rounded, so the same W serves both passes.
        # The second factor has to be column-major. On a GPU before Blackwell both factors must have the summed
        # dimension contiguous, so W is transposed for as long as this takes; a second copy would give up the memory
        # that FP8 saves.
        columns = weight.t().contiguous().t()
        ones = torch.ones(1, weight.shape[1], dtype=torch.float32, device=weight.device)
        return _product(grad * weight_scale, columns, ones, fast=False).to(grad.dtype), None, None


def _product(x: Tensor, weight: Tensor, weight_scale: Tensor, *, fast: bool) -> Tensor:
    """x (M, K), rounded, times a column-major weight (K, N) in e4m3 with scales (1, N), in bf16."""
    values, scale = _quantize_rows(x)
    return torch._scaled_mm(values, weight, scale, weight_scale, out_dtype=torch.bfloat16, use_fast_accum=fast)


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> e4m3 values (M, K) and fp32 scales (M, 1), x = values * scale; the largest of a row becomes 448.

    A row of zeros has the smallest scale, not 0, and stays zero. A NaN or an infinity makes the scale NaN or infinite,
    and NaN of the element: also where the conversion to e4m3 would have made the largest number of an infinity.
    """
    scale = (x.abs().amax(dim=1, keepdim=True).float() / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return (x / scale).to(_E4M3).contiguous(), scale


def quantize_frozen_linears(model: nn.Module, block_lists: Iterable[str], *, keep: Sequence[str] = KEPT) -> list[str]:
    """Replace the frozen linear layers of the named lists of blocks by FrozenFP8Linear, in place; returns their names.

    Layers outside the blocks, trained ones, and those with a size not divisible by 16 stay. Call it when the adapters
    are in place and the model is on its device, before compiling or sharding.

    keep: layers stay whose name inside their block contains one of these; `KEPT` and more, as a rule.

    Raises ConfigError: an empty `keep`, an unknown list of blocks, no layer left to replace (the reasons are counted),
    or a device that cannot multiply in FP8.
    """
    linears = {name: linear for name, linear in linears_for_fp8(model, block_lists, keep).items() if _frozen(linear)}
    if not linears:
        raise ConfigError("no linear layer of the blocks is frozen: FP8 weights cannot be trained, freeze them first")
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, FrozenFP8Linear.from_linear(linear))
    return list(linears)


def linears_for_fp8(model: nn.Module, block_lists: Iterable[str], keep: Sequence[str]) -> dict[str, nn.Linear]:
    """Linear layers of the named lists of blocks, by name in the model, that can and may run in FP8, trained or frozen.

    Layers that have no memory yet are not asked for their device.

    Raises ConfigError as `quantize_frozen_linears` does, except for trained layers.
    """
    lists = list(block_lists)
    repeated_blocks(model, lists)  # for its error
    if not keep:
        raise ConfigError(f"keep is empty: modulation and normalisation lose too much in FP8; give {KEPT} or more")
    chosen: dict[str, nn.Linear] = {}
    stay: Counter[str] = Counter()
    for list_name in lists:
        for number, block in model.get_submodule(list_name).named_children():
            for name, module in block.named_modules():
                # subclasses have a forward pass or a weight of their own
                if type(module) is not nn.Linear:
                    continue
                kept = next((word for word in keep if word in name), None)
                reason = _misfit(module) if kept is None else f"named like {kept!r}"
                if reason is None:
                    chosen[".".join(filter(None, (list_name, number, name)))] = module
                else:
                    stay[reason] += 1
    if not chosen:
        reasons = ", ".join(f"{count} {reason}" for reason, count in stay.items()) or "they have none"
        raise ConfigError(f"no linear layer of {', '.join(lists)} can be FP8: {reasons}; use bf16")
    device = next(iter(chosen.values())).weight.device
    if device.type != "meta":
        require_fp8(device)
    return chosen


def require_fp8(device: torch.device) -> None:
    """Raises ConfigError unless torch._scaled_mm runs there: NVIDIA GPUs from capability 8.9, and CPUs, slowly."""
    advice = "set precision.train and precision.old to bf16"
    if device.type == "cpu":
        return
    if device.type != "cuda" or torch.version.hip is not None:
        raise ConfigError(f"FP8 runs on NVIDIA GPUs and, for tests, on the CPU, not on {device}: {advice}")
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        raise ConfigError(
            f"FP8 needs compute capability {'.'.join(map(str, _CAPABILITY))} (Ada, Hopper, Blackwell), but "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}: {advice}"
        )


def _misfit(linear: nn.Linear) -> str | None:
    """Why the layer's shape or dtype rules FP8 out."""
    if linear.in_features % _ALIGNMENT or linear.out_features % _ALIGNMENT:
        return f"with a size not divisible by {_ALIGNMENT}"
    if not linear.weight.is_floating_point() or linear.weight.itemsize < 2:
        return f"with a weight in {linear.weight.dtype}"
    return None


def _frozen(linear: nn.Linear) -> bool:
    return not any(parameter.requires_grad for parameter in linear.parameters())


def _obstacle(linear: nn.Linear) -> str | None:
    return _misfit(linear) if _frozen(linear) else "trained"
