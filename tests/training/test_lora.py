from __future__ import annotations

import pytest
import torch
from torch import nn

from crd_fast.errors import CheckpointError, ConfigError
from crd_fast.lora import LoRABank
from crd_fast.snapshots import BASE, OLD, SAMPLING, SLOTS, TRAINED


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 5, bias=False)
        self.other = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.second(torch.tanh(self.first(x))))


def make(rank: int = 3, alpha: float = 6.0) -> tuple[Model, Model, LoRABank]:
    torch.manual_seed(0)
    plain, model = Model(), Model()
    model.load_state_dict(plain.state_dict())
    bank = LoRABank(model, ["first", "second"], rank=rank, alpha=alpha, seed=1)
    with torch.no_grad():
        for number, slot in enumerate(SLOTS):
            for tensor in bank.tensors(slot):
                tensor.normal_(generator=torch.Generator().manual_seed(number + 1)).mul_(0.3)
    return plain, model, bank


def by_hand(plain: Model, bank: LoRABank, slot: str, x: torch.Tensor) -> torch.Tensor:
    copy = Model()
    copy.load_state_dict(plain.state_dict())
    if slot != BASE:
        for name in ("first", "second"):
            down, up = bank.layers[name].pair(slot)
            getattr(copy, name).weight.data += bank.alpha / bank.rank * up.detach() @ down.detach()
    return copy(x)


@pytest.mark.parametrize("slot", [*SLOTS, BASE])
def test_each_slot_is_the_base_plus_its_update(slot: str) -> None:
    plain, model, bank = make()
    x = torch.randn(4, 3, 6)
    with bank.use(slot), torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(plain, bank, slot, x))
    with bank.merged(slot):
        torch.testing.assert_close(model(x), by_hand(plain, bank, slot, x))


def test_mixed_rows_equal_separate_passes() -> None:
    plain, model, bank = make()
    x = torch.randn(7, 6)
    with bank.use([(OLD, 2), (BASE, 4), (TRAINED, 1)]), torch.no_grad():
        mixed = model(x)
    separate = [by_hand(plain, bank, s, x[rows]) for s, rows in ((OLD, slice(2)), (BASE, slice(2, 6)), (TRAINED, [6]))]
    torch.testing.assert_close(mixed, torch.cat(separate), rtol=1e-6, atol=1e-6)


def test_rows_that_do_not_add_up_are_an_error() -> None:
    _, model, bank = make()
    with bank.use([(OLD, 2), (BASE, 1)]), pytest.raises(ValueError, match="4 rows.*was told of 3"):
        model(torch.randn(4, 6))


def test_a_slot_must_be_chosen_and_known() -> None:
    _, model, bank = make()
    with pytest.raises(RuntimeError, match="LoRABank.use"):
        model(torch.randn(4, 6))
    with pytest.raises(ValueError, match="did you mean 'sampling'"), bank.use("samplng"):
        pass


def test_gradients_reach_the_trained_slot_alone() -> None:
    _, model, bank = make()
    with bank.use(TRAINED):
        model(torch.randn(4, 6)).square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in bank.tensors(TRAINED))
    assert all(t.grad is None for slot in (OLD, SAMPLING) for t in bank.tensors(slot))
    assert model.first.base.weight.grad is None and model.other.weight.grad is None


def test_merging_leaves_nothing_behind() -> None:
    _, model, bank = make()
    x = torch.randn(4, 6)
    with bank.use(TRAINED), torch.no_grad():
        before = model(x)
    with bank.merged(OLD):
        model(x)
    with bank.use(TRAINED), torch.no_grad():
        assert torch.equal(model(x), before)


def test_snapshots_move_by_their_decay() -> None:
    _, _, bank = make()
    old = [t.detach().clone() for t in bank.tensors(OLD)]
    bank.update_snapshot(OLD, 0.75)
    for after, was, trained in zip(bank.tensors(OLD), old, bank.tensors(TRAINED), strict=True):
        torch.testing.assert_close(after.detach(), 0.75 * was + 0.25 * trained.detach())
    bank.update_snapshot(SAMPLING, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(bank.tensors(SAMPLING), bank.tensors(TRAINED), strict=True))
    with pytest.raises(ValueError, match="decay 1.5"):
        bank.update_snapshot(OLD, 1.5)


def test_a_slot_moves_towards_the_base() -> None:
    """The update shrinks by the share, which is the straight way between the weights; other slots stay."""
    _, model, bank = make()
    x = torch.randn(4, 6)

    def outputs() -> dict[str, torch.Tensor]:
        found = {}
        for slot in (TRAINED, OLD, BASE):
            with bank.use(slot), torch.no_grad():
                found[slot] = model.first(x)
        return found

    before = outputs()
    assert (before[OLD] - before[BASE]).abs().max() > 0.01
    bank.towards_base(OLD, 0.25)
    after = outputs()
    torch.testing.assert_close(after[OLD] - after[BASE], 0.75 * (before[OLD] - before[BASE]))
    assert torch.equal(after[TRAINED], before[TRAINED]) and torch.equal(after[BASE], before[BASE])
    bank.towards_base(OLD, 1.0)
    assert torch.equal(outputs()[OLD], before[BASE])
    for slot, share in ((OLD, 1.5), (OLD, -0.1), (BASE, 0.5)):
        with pytest.raises(ValueError, match="and a share in"):
            bank.towards_base(slot, share)


def test_a_fresh_bank_is_the_base_and_seeded() -> None:
    banks = [LoRABank(Model(), ["first"], rank=2, alpha=2.0, seed=seed) for seed in (5, 5, 6)]
    downs = [bank.layers["first"].pair(TRAINED)[0] for bank in banks]
    assert torch.equal(downs[0], downs[1]) and not torch.equal(downs[0], downs[2])
    assert all(bank.layers["first"].pair(TRAINED)[1].abs().sum() == 0 for bank in banks)


def test_export_and_load_round_trip() -> None:
    _, model, bank = make()
    state = bank.export(TRAINED)
    assert sorted(state) == [f"{n}.lora_{s}.weight" for n in ("first", "second") for s in "AB"]
    _, other_model, other = make(rank=3, alpha=3.0)
    other.load(state)
    x = torch.randn(4, 6)
    for slot in SLOTS:
        with torch.no_grad(), bank.use(TRAINED), other.use(slot):
            torch.testing.assert_close(other_model(x), model(x))


def test_loading_another_adapter_is_an_error() -> None:
    _, _, bank = make()
    state = bank.export()
    with pytest.raises(CheckpointError, match="first.lora_A.weight is missing"):
        bank.load({k: v for k, v in state.items() if k != "first.lora_A.weight"})
    with pytest.raises(CheckpointError, match="rank 2.*expected rank 3"):
        bank.load(LoRABank(Model(), ["first", "second"], rank=2, alpha=1.0, seed=0).export())


def test_targets_that_match_nothing_name_the_nearest_layer() -> None:
    with pytest.raises(ConfigError, match="did you mean 'second'"):
        LoRABank(Model(), ["secnd"], rank=2, alpha=1.0, seed=0)
