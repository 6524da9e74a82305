"""Copies of a whole model as parameter sets, on a real tiny pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from crd_fast import backbones
from crd_fast.acceleration.float8_training import convert_for_full_finetuning
from crd_fast.acceleration.precision import ROLES, apply_precisions
from crd_fast.backbones import Backbone, Conditioning
from crd_fast.full_finetuning import FullCopies
from crd_fast.snapshots import BASE, OLD, SAMPLING, SLOTS, TRAINED
from tests.pipelines import sd3

PROMPTS = ["2 squares", "3 squares", "2 circles", "a star", "no star"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3.save(tmp_path_factory.mktemp("sd3"))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Backbone:
    return backbones.load(str(folder), options=replace(sd3.OPTIONS, dtype=dtype))


def make(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Backbone, FullCopies]:
    """Copies that all differ."""
    backbone = load(folder, dtype)
    sets = FullCopies(backbone)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for slot in SLOTS:
            for tensor in sets.tensors(slot):
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return backbone, sets


def batch(backbone: Backbone) -> tuple[Tensor, Tensor, Conditioning]:
    x = torch.randn(len(PROMPTS), *backbone.latent_shape, generator=torch.Generator().manual_seed(4))
    return x, torch.linspace(0.1, 0.9, len(PROMPTS)), backbone.encode_prompts(PROMPTS)


def separately(folder: Path, sets: FullCopies, slot: str, rows: slice) -> Tensor:
    """The slot's prediction by a backbone that no parameter sets ever touched."""
    backbone = load(folder)
    backbone.transformer.load_state_dict(sets.modules[slot].state_dict())
    x, sigma, embedded = batch(backbone)
    with torch.no_grad():
        return backbone.predict(x[rows], sigma[rows], embedded[rows])


def test_mixed_rows_equal_separate_passes(folder: Path) -> None:
    backbone, sets = make(folder)
    x, sigma, embedded = batch(backbone)
    with torch.no_grad():
        mixed = sets.predict(backbone, [(OLD, 2), (BASE, 1), (TRAINED, 1), (SAMPLING, 1)], x, sigma, embedded)
    slots = ((OLD, slice(0, 2)), (BASE, slice(2, 3)), (TRAINED, slice(3, 4)), (SAMPLING, slice(4, 5)))
    torch.testing.assert_close(mixed, torch.cat([separately(folder, sets, *each) for each in slots]))
    assert backbone.transformer is sets.modules[BASE]


def test_slots_differ_and_one_slot_takes_every_row(folder: Path) -> None:
    backbone, sets = make(folder)
    x, sigma, embedded = batch(backbone)
    with torch.no_grad():
        results = [sets.predict(backbone, [(slot, 1)], x, sigma, embedded) for slot in (*SLOTS, BASE)]
    for slot, result in zip((*SLOTS, BASE), results, strict=True):
        torch.testing.assert_close(result, separately(folder, sets, slot, slice(None)))
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(results) for b in results[:i])


def test_unknown_slots_are_named(folder: Path) -> None:
    backbone, sets = make(folder)
    with pytest.raises(ValueError, match="'traned'.*did you mean 'trained'"):
        sets.predict(backbone, [("traned", 5)], *batch(backbone))
    with pytest.raises(ValueError, match="'samplng'.*did you mean 'sampling'"), sets.rollout(backbone, "samplng"):
        pass
    with pytest.raises(ValueError, match="'base' holds no tensors"):
        sets.named_tensors(BASE)


def test_gradients_reach_the_trained_copy_alone(folder: Path) -> None:
    backbone, sets = make(folder)
    rows = [(TRAINED, 2), (OLD, 1), (SAMPLING, 1), (BASE, 1)]
    sets.predict(backbone, rows, *batch(backbone)).square().sum().backward()
    gradients = {name: tensor.grad for name, tensor in sets.named_tensors(TRAINED).items()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert sum(gradient.abs().sum() > 0 for gradient in gradients.values() if gradient is not None) > 50
    for slot in (OLD, SAMPLING, BASE):
        assert all(p.grad is None and not p.requires_grad for p in sets.modules[slot].parameters())


def test_the_slots_share_no_memory(folder: Path) -> None:
    _, sets = make(folder)
    places = [tensor.data_ptr() for module in sets.modules.values() for tensor in module.parameters()]
    assert len(set(places)) == len(places)


def test_a_slot_moves_towards_the_base(folder: Path) -> None:
    _, sets = make(folder)
    base = [tensor.detach().float().clone() for tensor in sets.modules[BASE].parameters()]
    before = {slot: [t.detach().clone() for t in sets.tensors(slot)] for slot in (TRAINED, OLD)}
    assert any(not torch.equal(old, b) for old, b in zip(before[OLD], base, strict=True))
    sets.towards_base(OLD, 0.25)
    for after, old, start in zip(sets.tensors(OLD), before[OLD], base, strict=True):
        torch.testing.assert_close(after.detach(), 0.75 * old + 0.25 * start)
    sets.towards_base(OLD, 1.0)
    assert all(torch.equal(after, start) for after, start in zip(sets.tensors(OLD), base, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sets.tensors(TRAINED), before[TRAINED], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sets.modules[BASE].parameters(), base, strict=True))
    with pytest.raises(ValueError, match="and a share in"):
        sets.towards_base(BASE, 0.5)


def test_snapshots_move_by_their_decay(folder: Path) -> None:
    _, sets = make(folder)
    before = {slot: [t.detach().clone() for t in sets.tensors(slot)] for slot in SLOTS}
    sets.update_snapshot(OLD, 0.75)
    for after, old, trained in zip(sets.tensors(OLD), before[OLD], before[TRAINED], strict=True):
        torch.testing.assert_close(after.detach(), 0.75 * old + 0.25 * trained)
    assert all(torch.equal(a, b) for a, b in zip(sets.tensors(SAMPLING), before[SAMPLING], strict=True))
    sets.update_snapshot(SAMPLING, 0.0)
    for sampling, trained, was in zip(sets.tensors(SAMPLING), sets.tensors(TRAINED), before[TRAINED], strict=True):
        assert torch.equal(sampling, trained) and torch.equal(trained, was)
        assert sampling.data_ptr() != trained.data_ptr()


@pytest.mark.parametrize("slot", [TRAINED, SAMPLING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rollout_leaves_nothing_behind(folder: Path, dtype: torch.dtype, slot: str) -> None:
    backbone, sets = make(folder, dtype)
    given = batch(backbone)
    trained = sets.predict(backbone, [(TRAINED, 5)], *given).detach()
    expected = sets.predict(backbone, [(slot, 5)], *given)
    with sets.rollout(backbone, slot):
        inside = backbone.predict(*given)
        assert backbone.transformer is sets.modules[slot] and not inside.requires_grad
        assert torch.equal(inside, expected)
    assert backbone.transformer is sets.modules[BASE]
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    again = sets.predict(backbone, [(TRAINED, 5)], *given)
    assert again.requires_grad and torch.equal(again.detach(), trained)


def test_a_rollout_that_fails_leaves_nothing_behind(folder: Path) -> None:
    backbone, sets = make(folder, torch.bfloat16)
    x, sigma, embedded = batch(backbone)
    with pytest.raises(RuntimeError), sets.rollout(backbone, OLD):
        backbone.predict(x[:, :1], sigma, embedded)
    assert backbone.transformer is sets.modules[BASE]
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("slot", [TRAINED, OLD])
def test_diffusers_loads_what_is_saved(folder: Path, tmp_path: Path, slot: str) -> None:
    backbone, sets = make(folder)
    given = batch(backbone)
    sets.save(backbone, tmp_path / "transformer", slot)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    expected = sets.modules[slot].state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    fresh = load(folder)
    fresh.transformer = loaded
    with torch.no_grad():
        assert torch.equal(fresh.predict(*given), sets.predict(backbone, [(slot, 5)], *given))


# --- a backbone in bf16 ---


def test_bf16_is_saved_as_bf16(folder: Path, tmp_path: Path) -> None:
    backbone, sets = make(folder, torch.bfloat16)
    sets.save(backbone, tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(saved[name], tensor.bfloat16()) for name, tensor in sets.named_tensors(TRAINED).items())
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert all(torch.equal(t, sets.named_tensors(TRAINED)[n].bfloat16()) for n, t in loaded.named_parameters())


def test_trained_parameters_are_fp32_and_predictions_bf16(folder: Path) -> None:
    """Both predictions are off the fp32 one by bf16's rounding, and neither more than the other's order."""
    backbone = load(folder, torch.bfloat16)
    sets = FullCopies(backbone)
    assert {t.dtype for slot in SLOTS for t in sets.tensors(slot)} == {torch.float32}
    assert {t.dtype for t in sets.modules[BASE].parameters()} == {torch.bfloat16}
    x, sigma, embedded = batch(backbone)
    with torch.no_grad():
        mixed = sets.predict(backbone, [(TRAINED, 2), (BASE, 2), (OLD, 1)], x, sigma, embedded)
        trained, base = (sets.predict(backbone, [(slot, 5)], x, sigma, embedded) for slot in (TRAINED, BASE))
        exact = load(folder)
        exact.transformer.load_state_dict({n: t.float() for n, t in sets.modules[BASE].state_dict().items()})
        truth = exact.predict(x, sigma, Conditioning({n: t.float() for n, t in embedded.tensors.items()}))
    assert mixed.shape == x.shape and mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, torch.cat([trained[:2], base[2:4], trained[4:]]), rtol=2e-2, atol=2e-2)
    off_trained, off_base = ((p.float() - truth).abs().max() for p in (trained, base))
    assert 0 < off_trained <= 2 * off_base < 0.1 * truth.abs().max()


def test_updates_smaller_than_bf16_can_add_are_kept(folder: Path) -> None:
    lr = 1e-6
    backbone = load(folder, torch.bfloat16)
    sets = FullCopies(backbone)
    name = "transformer_blocks.0.attn.to_q.weight"
    weight, old = sets.named_tensors(TRAINED)[name], sets.named_tensors(OLD)[name]
    before = weight.detach().clone()
    rounded = torch.nn.Parameter(before.bfloat16())
    assert torch.equal(rounded.float(), before)
    sets.predict(backbone, [(TRAINED, 5)], *batch(backbone)).float().square().mean().backward()
    assert weight.grad is not None
    rounded.grad = weight.grad.bfloat16()
    torch.optim.Adam([weight, rounded], lr=lr).step()
    large = (weight.grad.abs() > 1e-5) & (before.abs() > 1e-2)  # Adam's first step is lr there, and bf16's far more
    assert large.float().mean() > 0.5
    moved = (weight.detach() - before)[large]
    torch.testing.assert_close(moved, -lr * weight.grad[large].sign(), rtol=2e-2, atol=0)
    assert torch.equal(rounded.float()[large], before[large]), "bf16 parameters would have stayed"
    sets.update_snapshot(OLD, 0.5)
    torch.testing.assert_close((old.detach() - before)[large], moved / 2, rtol=2e-2, atol=0)


def test_empty_copies_take_no_memory_until_they_are_filled(folder: Path) -> None:
    backbone = load(folder, torch.bfloat16)
    sets = FullCopies(backbone, empty=True)
    assert {t.device.type for slot in SLOTS for t in sets.modules[slot].state_dict().values()} == {"meta"}
    sets.fill()
    whole = FullCopies(load(folder, torch.bfloat16))
    for slot in SLOTS:
        filled, copied = sets.modules[slot], whole.modules[slot]
        assert [n for n, _ in filled.named_buffers()] == [n for n, _ in copied.named_buffers()]
        for own, expected in zip(_all(filled), _all(copied), strict=True):
            assert own.dtype == expected.dtype and own.requires_grad == expected.requires_grad
            assert torch.equal(own, expected)
    for slot in (OLD, SAMPLING):
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(sets.tensors(TRAINED), sets.tensors(slot), strict=True))


def _all(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_empty_copies_become_fp8_and_are_filled_from_a_base_that_is_rounded_too(folder: Path) -> None:
    backbone = load(folder)
    x, sigma, embedded = batch(backbone)
    whole = FullCopies(backbone)
    for slot in (TRAINED, OLD):
        convert_for_full_finetuning(whole.modules[slot], backbone.block_lists)
    expected = whole.predict(backbone, [(OLD, len(x))], x, sigma, embedded)
    backbone = load(folder)
    sets = FullCopies(backbone, empty=True)
    for slot in (TRAINED, OLD):
        convert_for_full_finetuning(sets.modules[slot], backbone.block_lists)
    precisions = apply_precisions(
        backbone.transformer, backbone.block_lists, dict.fromkeys(ROLES, "bf16") | {"ref": "fp8"}
    )
    sets.fill()
    assert torch.equal(sets.predict(backbone, [(OLD, len(x))], x, sigma, embedded), expected)
    exact = sets.predict(backbone, [(BASE, len(x))], x, sigma, embedded)
    with precisions.use("ref"):
        assert not torch.equal(sets.predict(backbone, [(BASE, len(x))], x, sigma, embedded), exact)
