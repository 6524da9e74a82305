"""FP8 layers on the CPU's torch._scaled_mm against fp64, within what rounding to e4m3 allows.

e4m3 has 3 bits of mantissa and a smallest normal number of 2^-6. Rounding x = q * scale to it changes x by at most
2^-4 |x|, and where q is below 2^-6 by at most 2^-10 scale (half a step of 2^-9).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from crd_fast.acceleration.fp8 import KEPT, FrozenFP8Linear, quantize_frozen_linears, require_fp8
from crd_fast.acceleration.noise_ratio import gradient_cosine
from crd_fast.errors import ConfigError
from crd_fast.lora import BankLinear, LoRABank
from crd_fast.snapshots import BASE, TRAINED

BF16 = torch.bfloat16
# of a sum of products of which both factors were rounded: each by an error uniform over a step of 2^-3 of the number's
# power of two, so of a standard deviation of at most 2^-3 / sqrt 12 of the number; both are independent
RMS = math.sqrt(2) * 2**-3 / math.sqrt(12)


def linear(k: int = 64, n: int = 48, *, bias: bool = True, dtype: torch.dtype = BF16) -> nn.Linear:
    return nn.Linear(k, n, bias=bias, dtype=dtype).requires_grad_(False)


def uneven(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Rows over eight orders of magnitude, which one scale for the whole tensor cannot hold."""
    return (torch.randn(shape) * torch.logspace(-4, 4, shape[0]).reshape(-1, *[1] * (len(shape) - 1))).to(dtype)


def e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """What rounding the rows of x to e4m3 gives, in fp64, and by how much an element may change, from the format."""
    scale = (x.float().abs().amax(-1, keepdim=True) / 448).clamp(min=2.0**-126)
    q = (x.float() / scale).double()
    step = torch.exp2(torch.floor(torch.log2(q.abs())).clamp(min=-6) - 3)
    error = torch.maximum(2**-4 * x.double().abs(), 2**-10 * scale.double())
    return torch.round(q / step) * step * scale, error  # torch.round is to even


def product_error(x: Tensor, x_error: Tensor, w: Tensor, w_error: Tensor) -> Tensor:
    """By how much each element of x w^T may change when the factors change by their errors."""
    return (x.abs() + x_error) @ (w.abs() + w_error).T - x.abs() @ w.abs().T


def result_rounding(exact: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Of a result: fp32 sums of K products, their scaling, and the step to bf16 with its 8 significant bits."""
    return 2**-8 * exact.abs() + (x.shape[-1] + 4) * 2**-24 * (x.abs() @ w.abs().T)


def rms(x: Tensor) -> Tensor:
    return x.double().square().mean(-1).sqrt()


def forward_and_gradient(layer: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, upstream.to(y.dtype))
    return y.detach(), gradient


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_forward_is_the_product_of_the_rounded_factors(rows: int, dtype: torch.dtype) -> None:
    layer = linear(128, 80, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(uneven(80, 128, dtype=dtype))
    x = uneven(rows, 128, dtype=dtype)
    y = FrozenFP8Linear.from_linear(layer)(x)
    assert y.dtype == dtype and y.shape == (rows, 80)

    (rx, x_error), (rw, w_error) = e4m3(x), e4m3(layer.weight)
    exact = rx @ rw.T
    assert ((y.double() - exact).abs() <= result_rounding(exact, rx, rw)).all()
    # and so it is near the product of the factors themselves
    truth = x.double() @ layer.weight.double().T
    bound = product_error(x.double(), x_error, layer.weight.double(), w_error) + result_rounding(exact, rx, rw)
    assert ((y.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_gradient_is_the_product_of_the_rounded_factors(rows: int, dtype: torch.dtype) -> None:
    layer = linear(128, 80, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(uneven(80, 128, dtype=dtype))
    fp8 = FrozenFP8Linear.from_linear(layer)
    upstream = uneven(rows, 80, dtype=dtype)
    _, gradient = forward_and_gradient(fp8, torch.randn(rows, 128, dtype=dtype), upstream)
    assert gradient.dtype == dtype

    # W's scales go into the gradient before it is rounded; W itself is the values without them
    scale = fp8.weight_scale
    rg, g_error = e4m3(upstream * scale)
    values = fp8.weight_e4m3.double()
    exact = rg @ values
    assert ((gradient.double() - exact).abs() <= result_rounding(exact, rg, values.T)).all()
    truth = upstream.double() @ layer.weight.double()
    _, w_error = e4m3(layer.weight)
    scaled = (upstream * scale).double()
    bound = product_error(scaled, g_error, layer.weight.T.double() / scale.double(), w_error.T / scale.double())
    assert ((gradient.double() - truth).abs() <= bound + result_rounding(exact, rg, values.T)).all()


def test_errors_average_out_as_those_of_e4m3_do() -> None:
    layer = linear(512, 512, bias=False)
    x, upstream = uneven(33, 512), uneven(33, 512)
    y, gradient = forward_and_gradient(FrozenFP8Linear.from_linear(layer), x, upstream)
    weight = layer.weight.double()
    for found, truth in ((y, x.double() @ weight.T), (gradient, upstream.double() @ weight)):
        relative = rms(found - truth) / rms(truth)
        # of every row, small or large; 5 % for estimating a standard deviation from 512 numbers, 1 / sqrt(2 * 512)
        assert relative.max() < RMS * 1.05
        assert relative.min() > RMS / 4  # it is FP8


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 5, 64), (0, 64)])
def test_leading_dimensions_and_bias(shape: tuple[int, ...]) -> None:
    layer = linear()
    fp8 = FrozenFP8Linear.from_linear(layer)
    bare = FrozenFP8Linear(fp8.weight_e4m3, fp8.weight_scale, None)
    x = torch.randn(shape, dtype=BF16)
    y = fp8(x)
    assert y.shape == (*shape[:-1], 48)
    assert fp8.bias is layer.bias
    assert torch.equal(y, bare(x) + layer.bias)
    for row, result in zip(x.reshape(-1, 64), bare(x).reshape(-1, 48), strict=True):
        # sums of another order may fall on the next bf16 number
        torch.testing.assert_close(result, bare(row), rtol=2**-7, atol=64 * 2**-24 * 64)


def test_any_memory_order_gives_the_same() -> None:
    fp8 = FrozenFP8Linear.from_linear(linear())
    x, upstream = torch.randn(16, 64, dtype=BF16), torch.randn(16, 48, dtype=BF16)
    turned = (x.T.contiguous().T, upstream.T.contiguous().T)
    for expected, found in zip(forward_and_gradient(fp8, x, upstream), forward_and_gradient(fp8, *turned), strict=True):
        assert torch.equal(expected, found)
    ones = torch.ones_like(upstream)
    expanded = torch.ones((), dtype=BF16).expand(16, 48)
    assert torch.equal(forward_and_gradient(fp8, x, ones)[1], forward_and_gradient(fp8, x, expanded)[1])


def test_every_run_gives_the_same_bits() -> None:
    fp8 = FrozenFP8Linear.from_linear(linear(256, 256))
    x, upstream = torch.randn(37, 256, dtype=BF16), torch.randn(37, 256, dtype=BF16)
    first = forward_and_gradient(fp8, x, upstream)
    for _ in range(3):
        again = forward_and_gradient(fp8, x, upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_and_channels_of_zeros_stay_zero() -> None:
    layer = linear(bias=False)
    with torch.no_grad():
        layer.weight[3] = 0
    fp8 = FrozenFP8Linear.from_linear(layer)
    x, upstream = torch.randn(5, 64, dtype=BF16), torch.randn(5, 48, dtype=BF16)
    x[2], upstream[4] = 0, 0
    y, gradient = forward_and_gradient(fp8, x, upstream)
    assert y[2].eq(0).all() and y[:, 3].eq(0).all() and gradient[4].eq(0).all()
    assert y.isfinite().all() and gradient.isfinite().all()
    assert y[:2].count_nonzero() > 80 and gradient[:4].count_nonzero() > 200
    # numbers whose scale would not be a normal number
    assert fp8(torch.full((1, 64), 2.0**-140)).isfinite().all()
    large = fp8(torch.full((1, 64), 3e38) / 64)
    assert large.isfinite().all() and large.abs().max() > 1e30


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(bad: float, compiled: bool) -> None:
    torch._dynamo.reset()
    layer = linear()
    fp8 = FrozenFP8Linear.from_linear(layer)
    run = torch.compile(fp8, fullgraph=True) if compiled else fp8
    x, upstream = torch.randn(4, 64, dtype=BF16), torch.randn(4, 48, dtype=BF16)
    clean_y, clean_gradient = forward_and_gradient(run, x, upstream)
    x[1, 7], upstream[2, 5] = bad, bad
    y, gradient = forward_and_gradient(run, x, upstream)
    assert not y[1].isfinite().any() and not gradient[2].isfinite().any()
    assert torch.equal(y[[0, 2, 3]], clean_y[[0, 2, 3]])
    assert torch.equal(gradient[[0, 1, 3]], clean_gradient[[0, 1, 3]])
    with torch.no_grad():
        layer.weight[9, 0] = bad
    assert not FrozenFP8Linear.from_linear(layer)(torch.randn(4, 64, dtype=BF16))[:, 9].isfinite().any()


def test_no_gradient_and_no_second_copy_of_the_weight() -> None:
    layer = linear(256, 512)
    fp8 = FrozenFP8Linear.from_linear(layer)

    def size(module: nn.Module) -> int:
        return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))

    # 1 byte a weight instead of 2; then 4 bytes a channel for the scale beside the 2 of the bias
    assert size(fp8) == size(layer) - 256 * 512 + 4 * 512
    assert {name for name, _ in fp8.named_parameters()} == {"bias"}
    assert not any(t.requires_grad for t in (*fp8.parameters(), *fp8.buffers()))
    assert not any(isinstance(value, Tensor) for value in vars(fp8).values())
    x = torch.randn(8, 256, dtype=BF16, requires_grad=True)
    fp8(x).sum().backward()
    assert x.grad is not None and all(t.grad is None for t in (*fp8.parameters(), *fp8.buffers()))


@pytest.mark.parametrize("compiled", [False, True])
def test_backward_keeps_nothing_but_the_weight(compiled: bool) -> None:
    torch._dynamo.reset()
    fp8 = FrozenFP8Linear.from_linear(linear(64, 128))
    run = torch.compile(fp8, fullgraph=True) if compiled else fp8
    saved: list[Tensor] = []
    x = torch.randn(16, 64, dtype=BF16, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        activation = x * 2
        kept = StorageWeakRef(activation.untyped_storage())
        y = run(activation)
    del activation
    assert kept.expired()
    own = {t.untyped_storage().data_ptr() for t in (*fp8.parameters(), *fp8.buffers())}
    assert saved and {t.untyped_storage().data_ptr() for t in saved} <= own
    y.sum().backward()


class Factors(TorchDispatchMode):
    """Records the factors and scales that torch._scaled_mm is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_mm.default:
            assert BF16 in args  # the result's type; the GPU's row-wise kernels have no other everywhere
            self.calls.append(args[:4])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 7, 16])
def test_factors_have_the_layout_that_a_gpu_asks_for(rows: int) -> None:
    """The CPU takes any: row-major times column-major, contiguous fp32 scales, one for each row and column."""
    fp8 = FrozenFP8Linear.from_linear(linear())
    turned = torch.randn(64, rows, dtype=BF16).T, torch.randn(48, rows, dtype=BF16).T
    with Factors() as factors:
        forward_and_gradient(fp8, *turned)
    assert len(factors.calls) == 2
    for (a, b, scale_a, scale_b), (k, n) in zip(factors.calls, ((64, 48), (48, 64)), strict=True):
        assert a.shape == (rows, k) and a.stride() == (k, 1)
        assert b.shape == (k, n) and b.stride() == (1, k)
        assert scale_a.shape == (rows, 1) and scale_b.shape == (1, n)
        assert all(scale.dtype == torch.float32 and scale.is_contiguous() for scale in (scale_a, scale_b))


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(linear(64, 128), nn.GELU(), linear(128, 64))
    fp8 = nn.Sequential(*(FrozenFP8Linear.from_linear(m) if isinstance(m, nn.Linear) else m for m in model))
    x, upstream = torch.randn(3, 7, 64, dtype=BF16), torch.randn(3, 7, 64, dtype=BF16)
    explanation = torch._dynamo.explain(fp8)(x)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)

    torch._dynamo.reset()
    run = torch.compile(fp8, fullgraph=True, dynamic=False)
    double = copy.deepcopy(model).double()
    truth = forward_and_gradient(double, x.double(), upstream.double())
    for mode in (fp8, run):
        for found, exact in zip(forward_and_gradient(mode, x, upstream), truth, strict=True):
            # two layers, each with the error of one; the GELU's slope is below 1.13
            assert rms((found - exact).flatten()) < 1.13 * math.sqrt(2) * RMS * rms(exact.flatten())
    with torch.no_grad():
        without = run(x)
    assert torch.equal(without, forward_and_gradient(run, x, upstream)[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        forward_and_gradient(run, torch.randn_like(x), upstream)


def test_recomputation_gives_the_same_gradient() -> None:
    layers = nn.Sequential(
        FrozenFP8Linear.from_linear(linear(64, 64)), nn.GELU(), FrozenFP8Linear.from_linear(linear(64, 48))
    )
    x, upstream = torch.randn(9, 64, dtype=BF16), torch.randn(9, 48, dtype=BF16)

    def again(x: Tensor) -> Tensor:
        return checkpoint(layers, x, use_reentrant=False)

    for plain, found in zip(
        forward_and_gradient(layers, x, upstream), forward_and_gradient(again, x, upstream), strict=True
    ):
        assert torch.equal(plain, found)


def test_dequantized_is_the_weight_that_the_forward_pass_uses() -> None:
    layer = linear(64, 64, bias=False, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.copy_(uneven(64, 64, dtype=torch.float32))
    fp8 = FrozenFP8Linear.from_linear(layer)
    weight = fp8.dequantized()
    rounded, error = e4m3(layer.weight)
    assert weight.dtype == torch.float32 and weight.shape == (64, 64)
    torch.testing.assert_close(weight.double(), rounded, rtol=2**-23, atol=0)
    assert ((weight - layer.weight).abs() <= error * (1 + 2**-20)).all()
    one = torch.eye(64)  # its rows are e4m3 numbers
    torch.testing.assert_close(fp8(one), weight.T, rtol=2**-8, atol=0)


@pytest.mark.parametrize("change", ["bfloat16", "half", "double", "float", "cpu"])
def test_conversions_leave_the_weight_and_its_scale(change: str) -> None:
    fp8 = FrozenFP8Linear.from_linear(linear())
    before = copy.deepcopy(fp8)
    getattr(nn.Sequential(fp8), change)()
    assert fp8.weight_e4m3.dtype == torch.float8_e4m3fn and fp8.weight_scale.dtype == torch.float32
    x = torch.randn(4, 64, dtype=torch.float32)
    torch.testing.assert_close(fp8(x), before(x), rtol=2**-23, atol=2**-24)  # the bias may be fp16 now
    assert torch.equal(fp8.weight_scale, before.weight_scale)
    assert torch.equal(fp8.weight_e4m3.view(torch.uint8), before.weight_e4m3.view(torch.uint8))


def test_a_state_can_be_saved_and_loaded() -> None:
    fp8, other = (FrozenFP8Linear.from_linear(linear()) for _ in range(2))
    x = torch.randn(4, 64, dtype=BF16)
    assert not torch.equal(fp8(x), other(x))
    other.load_state_dict(fp8.state_dict())
    assert torch.equal(fp8(x), other(x))


def test_what_a_layer_refuses() -> None:
    fp8 = FrozenFP8Linear.from_linear(linear())
    with pytest.raises(TypeError, match="float16: expected bfloat16 or float32"):
        fp8(torch.randn(4, 64, dtype=torch.float16))
    with pytest.raises((RuntimeError, ValueError)):
        fp8(torch.randn(4, 32, dtype=BF16))  # two rows of 32 are not one of 64
    with pytest.raises(AttributeError):
        fp8.weight  # noqa: B018
    with pytest.raises(ConfigError, match="64 -> 48 cannot be FP8: trained"):
        FrozenFP8Linear.from_linear(nn.Linear(64, 48))
    for k, n in ((64, 40), (40, 64)):
        with pytest.raises(ConfigError, match=f"{k} -> {n} cannot be FP8: with a size not divisible by 16"):
            FrozenFP8Linear.from_linear(linear(k, n))


# --- a whole model ---


def transformer(dtype: torch.dtype = BF16, heads: int = 4, head_dim: int = 16) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        joint_attention_dim=32,
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return model.to(dtype).eval().requires_grad_(False)


def inputs(dtype: torch.dtype = BF16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(4, 4, 8, 8, generator=generator).to(dtype),
        "timestep": torch.tensor([100.0, 400.0, 700.0, 900.0]),
        "encoder_hidden_states": torch.randn(4, 5, 32, generator=generator).to(dtype),
        "pooled_projections": torch.randn(4, 32, generator=generator).to(dtype),
    }


TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj")


def test_attention_and_feed_forward_of_the_blocks_are_replaced_and_nothing_else() -> None:
    model = transformer()
    names = quantize_frozen_linears(model, ("transformer_blocks",))
    streams = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
    context = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    first = (*streams, *context, "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
    last = (*streams, *context)  # the last block does not hand the text on
    expected = {f"transformer_blocks.{i}.{name}" for i, layers in enumerate((first, last)) for name in layers}
    assert set(names) == expected and len(names) == len(expected)
    assert {n for n, m in model.named_modules() if isinstance(m, FrozenFP8Linear)} == expected
    rest = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert "transformer_blocks.0.norm1.linear" in rest and "proj_out" in rest and "context_embedder" in rest

    with torch.no_grad():
        plain, fp8 = transformer()(**inputs()).sample, model(**inputs()).sample
    difference = rms((fp8 - plain).flatten()) / rms(plain.flatten())
    assert 0 < difference < 2 * RMS * math.sqrt(2)  # two blocks


def test_names_to_keep_and_trained_layers_stay() -> None:
    model = transformer()
    model.transformer_blocks[1].attn.to_k.requires_grad_(True)
    names = quantize_frozen_linears(model, ("transformer_blocks",), keep=(*KEPT, "ff"))
    assert names and not any("ff" in name or name == "transformer_blocks.1.attn.to_k" for name in names)
    assert type(model.transformer_blocks[0].ff.net[2]) is nn.Linear
    assert type(model.transformer_blocks[1].attn.to_k) is nn.Linear
    assert "transformer_blocks.0.attn.to_k" in names


def test_sizes_not_divisible_by_16_stay() -> None:
    model = transformer(heads=3, head_dim=8)  # width 24, feed-forward 96
    model.transformer_blocks[0].extra = linear(32, 64)
    model.transformer_blocks[1].extra = linear(32, 72)
    assert quantize_frozen_linears(model, ("transformer_blocks",)) == ["transformer_blocks.0.extra"]


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="keep is empty"):
        quantize_frozen_linears(transformer(), ("transformer_blocks",), keep=())
    with pytest.raises(ConfigError, match="did you mean 'transformer_blocks'"):
        quantize_frozen_linears(transformer(), ("transformer_block",))
    with pytest.raises(ConfigError, match=r"(?s)\d+ with a size not divisible by 16.*use bf16"):
        quantize_frozen_linears(transformer(heads=3, head_dim=8), ("transformer_blocks",))
    with pytest.raises(ConfigError, match="freeze them first"):
        quantize_frozen_linears(transformer().requires_grad_(True), ("transformer_blocks",))
    model = transformer()
    quantize_frozen_linears(model, ("transformer_blocks",))
    with pytest.raises(ConfigError, match="named like 'norm'"):  # a second time
        quantize_frozen_linears(model, ("transformer_blocks",))

    require_fp8(torch.device("cpu"))
    with pytest.raises(ConfigError, match="not on mps: set precision.train and precision.old to bf16"):
        require_fp8(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"capability 8\.9 .* but NVIDIA A100 has 8\.0: set precision"):
        require_fp8(torch.device("cuda", 0))
    for capability in ((8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        require_fp8(torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(ConfigError, match="NVIDIA GPUs"):
        require_fp8(torch.device("cuda", 0))


def lora_gradient(dtype: torch.dtype, fp8: bool) -> tuple[list[Tensor], Tensor]:
    """Of a loss with a random target, for adapters that have left zero."""
    model = transformer(dtype)
    bank = LoRABank(model, TARGETS, rank=4, alpha=8, seed=2)
    if fp8:
        names = quantize_frozen_linears(model, ("transformer_blocks",))
        assert all(isinstance(layer.base, FrozenFP8Linear) for layer in bank.layers.values())
        assert "transformer_blocks.0.attn.to_q.base" in names
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for number, tensor in enumerate(bank.tensors(TRAINED)):
            if number % 2:
                tensor.normal_(std=0.05, generator=generator)
    target = torch.randn(4, 4, 8, 8, generator=generator)
    with bank.use(TRAINED):
        prediction = model(**inputs(dtype)).sample
        (prediction.float() - target).square().mean().backward()
    gradients = [tensor.grad for tensor in bank.tensors(TRAINED) if tensor.grad is not None]
    assert len(gradients) == len(bank.tensors(TRAINED))
    return gradients, prediction.detach()


def test_gradient_of_adapters_points_where_fp32_does() -> None:
    exact, _ = lora_gradient(torch.float32, fp8=False)
    found, _ = lora_gradient(BF16, fp8=True)
    assert 0.99 < gradient_cosine(found, exact) < 1 - 1e-5


def test_adapters_in_a_batch_share_an_fp8_base() -> None:
    model = transformer()
    bank = LoRABank(model, TARGETS, rank=4, alpha=8, seed=2)
    quantize_frozen_linears(model, ("transformer_blocks",))
    layer = bank.layers["transformer_blocks.0.attn.to_q"]
    assert isinstance(layer, BankLinear)
    with torch.no_grad():
        layer.up_trained.normal_()
    x = torch.randn(4, 6, 64, dtype=BF16)
    with torch.no_grad(), bank.use([(TRAINED, 1), (BASE, 3)]):
        mixed = layer(x)
    with torch.no_grad(), bank.use(BASE):
        base = layer(x)
    assert torch.equal(mixed[1:], base[1:]) and not torch.equal(mixed[0], base[0])
    # merged into the unscaled values it would be wrong without a word
    with pytest.raises(AttributeError), bank.merged(TRAINED):
        pass
