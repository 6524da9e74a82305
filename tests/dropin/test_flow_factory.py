"""The Flow-Factory trainer against the published loss, written out again here, on a tiny adapter.

Flow-Factory is not needed: the few names that the example takes from it are made below. Hard centering (weight_temp 0)
is left out of the parity, because crd-fast departs from the published code there on purpose; the loss's own tests have
it. The published code rounds the noise to the dtype of the latents; the formula below does not, so that bf16 is held to
the rounding of the predictions alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn

import crd_fast

EXAMPLES = Path(__file__).parents[2] / "examples"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}
STEPS, BATCH, SAMPLES, SHAPE = 3, 4, 8, (2, 3, 5)
RANK, RANKS = 1, 3

# --- what the example takes from Flow-Factory -------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class Arguments:
    trainer_type: str = "crd"
    seed: int = 42
    per_device_batch_size: int = BATCH
    num_inner_epochs: int = 1
    max_grad_norm: float = math.inf
    crd_beta: float = 1.3
    crd_loss_type: str = "mse"
    use_old_for_loss: bool = True
    adaptive_logp: bool = True
    weight_temp: float = -1.0
    adv_clip_range: tuple[float, float] = (-4.0, 4.0)
    kl_beta: float = 0.2
    kl_cfg: float = 3.0
    reward_adaptive_kl: bool = True

    def __post_init__(self):
        pass


class Sample:
    def __init__(self, unique_id, latents, advantage):
        self.unique_id, self.latents, self.advantage = unique_id, latents, advantage

    @staticmethod
    def stack(samples):
        return {
            "all_latents": torch.stack([s.latents for s in samples]),
            "advantage": torch.stack([s.advantage for s in samples]),
        }


class Trainer:
    _OLD_PARAMS_NAME = "_crd_old"
    show_progress_bar = False
    autocast = staticmethod(contextlib.nullcontext)

    def __init__(self, *, accelerator, training_args, adapter):
        self.accelerator, self.training_args, self.adapter = accelerator, training_args, adapter
        self.use_old_for_loss, self.kl_beta, self.kl_cfg = (
            training_args.use_old_for_loss,
            training_args.kl_beta,
            training_args.kl_cfg,
        )
        self.num_train_timesteps, self.epoch, self.step, self.logs = STEPS, 2, 0, []
        self.optimizer = torch.optim.SGD(adapter.get_trainable_parameters(), lr=0.0)

    @property
    def enable_kl_loss(self):
        return self.kl_beta > 0

    def _sample_timesteps(self, batch_size):
        return (torch.rand(STEPS) * 900 + 50)[:, None].expand(-1, batch_size)

    def _compute_crd_output(self, batch, timestep, noised_latents, guidance_scale=None):
        return {"noise_pred": self.adapter.forward(noised_latents, timestep, guidance_scale)}

    def log_data(self, data, step):
        self.logs.append(data)


class Accelerator:
    device, process_index, num_processes = torch.device("cpu"), RANK, RANKS

    def __init__(self, accumulation=1):
        self.accumulation, self.calls = accumulation, 0

    @contextlib.contextmanager
    def accumulate(self, *models):
        self.calls += 1
        yield

    @property
    def sync_gradients(self):
        return self.calls % self.accumulation == 0

    def backward(self, loss):
        (loss / self.accumulation).backward()

    def clip_grad_norm_(self, parameters, limit):
        return nn.utils.clip_grad_norm_(parameters, limit)


class Adapter:
    """A 1x1 convolution of x_t; guidance scales its output. Counts its forwards and its swaps of parameters."""

    def __init__(self, dtype):
        generator = torch.Generator().manual_seed(3)
        self.weights = {
            name: torch.randn(2, 2, 1, 1, generator=generator).to(dtype) for name in ("now", "_crd_old", "ref")
        }
        self.weight = nn.Parameter(self.weights["now"].clone())
        self.inside, self.swaps, self.forwards = "now", [], []
        self.trainable_components = [self]

    def get_trainable_parameters(self):
        return [self.weight]

    def rollout(self):
        self.mode = "rollout"

    def train(self):
        self.mode = "train"

    @contextlib.contextmanager
    def use_named_parameters(self, name):
        self.swaps.append(name)
        self.inside, kept = name, self.weight.data
        self.weight.data = self.weights[name]
        yield
        self.inside, self.weight.data = "now", kept

    def use_ref_parameters(self):
        return self.use_named_parameters("ref")

    def forward(self, x_t, timestep, guidance_scale):
        self.forwards.append((self.inside, x_t.dtype, self.mode))
        return predict(self.weight, x_t, timestep, guidance_scale)


def predict(weight, x_t, timestep, guidance_scale=None):
    out = F.conv2d(x_t, weight) + (timestep / 1000).to(x_t.dtype)[:, None, None, None]
    return out * (guidance_scale or 1.0)


@pytest.fixture(scope="module")
def dropin():
    """`dropin.flow_factory`, imported as its docstring says, with the names above in place of the project."""
    modules = {
        "flow_factory": {},
        "flow_factory.hparams": {"CRDTrainingArguments": Arguments},
        "flow_factory.samples": {"BaseSample": Sample},
        "flow_factory.trainers": {},
        "flow_factory.trainers.crd": {"CRDTrainer": Trainer},
        "flow_factory.utils": {},
        "flow_factory.utils.dist": {"reduce_loss_info": reduce_loss_info},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, members in modules.items():
            module = types.ModuleType(name)
            vars(module).update(members)
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "dropin", raising=False)  # this folder of tests, as pytest names it
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("dropin.flow_factory")
        for name in ("dropin.flow_factory", "dropin"):
            del sys.modules[name]


def reduce_loss_info(accelerator, info):
    return {name: torch.stack(values).mean() for name, values in info.items()}


# --- the published loss -----------------------------------------------------------------------------------


def published_loss(args, f, y, f_old, ref, advantages, groups):
    """(loss, policy part before its factor, KL part) of one timestep. `groups`: lists of indices centered together."""
    low, high = args.adv_clip_range
    a = ((advantages.double().clamp(low, high) / high) / 2 + 0.5).clamp(0, 1)

    def error(prediction):  # elementwise, over a double weight that has no gradient
        squared = (prediction - y) ** 2
        if not args.adaptive_logp:
            return squared
        size = (prediction.detach().double() - y.double()).abs().mean((1, 2, 3), keepdim=True)
        return squared / size.clamp(min=1e-5)

    r = (error(f_old) - error(f)).mean((1, 2, 3))
    terms = []
    for members in groups:
        own, reward = r[members], a[members]
        if args.weight_temp < 0:
            directions = [torch.full_like(reward, 1 / len(members))]
        else:
            directions = [torch.softmax(sign * reward / args.weight_temp, 0) for sign in (1, -1)]
        for p in directions:
            implicit = args.crd_beta * (own - (p * own.detach()).sum())
            external = reward - (p * reward).sum()
            if args.crd_loss_type == "mse":
                term = (implicit - external) ** 2
            else:
                term = F.binary_cross_entropy_with_logits(implicit.double(), torch.sigmoid(external), reduction="none")
            terms.append(term / len(directions))
    policy = torch.cat(terms).sum() / len(a)
    if args.kl_beta == 0:
        return policy * high / args.crd_beta, policy, torch.zeros(())
    kl = ((f - ref) ** 2).mean((1, 2, 3))
    floor = 1e-4 / args.kl_beta
    scale = floor + a * (1 - floor) if args.reward_adaptive_kl else 1.0
    kl_loss = args.kl_beta * (scale * kl).mean()
    return policy * high / args.crd_beta + kl_loss, policy, kl_loss


def samples(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    prompts = [7, -(2**62) - 1, 7, 7, -(2**62), -(2**62) - 1, -(2**62), 9]
    return [
        Sample(
            prompt,
            torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64).to(dtype),
            2.5 * torch.randn((), generator=generator, dtype=torch.float64),
        )
        for prompt in prompts
    ]


def published_run(args, given, dtype, epoch, per_prompt=False):
    """(summed gradient, losses, policy losses, KL losses), over all batches, inner epochs and timesteps."""
    adapter = Adapter(dtype)
    weight = adapter.weights["now"].double().requires_grad_()
    kept = ([], [], [])
    for inner in range(args.num_inner_epochs):
        timesteps = [Trainer._sample_timesteps(None, BATCH) for _ in range(0, SAMPLES, BATCH)]
        for index, first in enumerate(range(0, SAMPLES, BATCH)):
            members = given[first : first + BATCH]
            x0 = torch.stack([s.latents[-1] for s in members])
            advantages = torch.stack([s.advantage for s in members])
            ids = torch.tensor([RANK + RANKS * i for i in range(first, first + BATCH)])
            keys = [s.unique_id for s in members] if per_prompt else [0] * BATCH
            groups = [[i for i in range(BATCH) if keys[i] == key] for key in dict.fromkeys(keys)]
            for step in range(STEPS):
                t = timesteps[index][step]
                stream = inner * STEPS + step
                fwd = crd_fast.noise(x0, t / 1000, seed=args.seed + epoch, sample_ids=ids, stream=stream)
                eps = fwd.epsilon(torch.float64 if dtype == torch.float64 else torch.float32).double()
                s = (t / 1000).double()[:, None, None, None]
                x_t = ((1 - s) * x0.double() + s * eps).to(dtype).double()
                y = eps - x0.double()
                old_name = "_crd_old" if args.use_old_for_loss else "ref"
                f_old, ref = (adapter.weights[name].double() for name in (old_name, "ref"))
                parts = published_loss(
                    args,
                    predict(weight, x_t, t),
                    y,
                    predict(f_old, x_t, t),
                    predict(ref, x_t, t, args.kl_cfg if args.kl_cfg > 1 else None),
                    advantages,
                    groups,
                )
                parts[0].backward()
                for values, part in zip(kept, parts, strict=True):
                    values.append(part.detach())
    return (weight.grad, *(torch.stack(values) for values in kept))


def fast_run(dropin, given, dtype, accumulation=1, trainer=None, **settings):
    """(trainer, summed gradient): the drop-in's `optimize`; its optimiser adds the gradients up instead of stepping."""
    args = dropin.CRDFastTrainingArguments(**settings)
    adapter = Adapter(dtype)
    trainer = (trainer or dropin.CRDFastTrainer)(
        accelerator=Accelerator(accumulation), training_args=args, adapter=adapter
    )
    total = torch.zeros_like(adapter.weight, dtype=torch.float64)
    trainer.optimizer.step = lambda: total.add_(adapter.weight.grad.double())
    torch.manual_seed(1)
    trainer.optimize(given)
    return trainer, total


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def logged(trainer, name):
    return torch.stack([row[f"train/{name}"] for row in trainer.logs])


MODES = [
    {"crd_loss_type": loss, "weight_temp": temperature, "adaptive_logp": weight, "reward_adaptive_kl": kl}
    for loss in ("mse", "bce")
    for temperature in (-1.0, 0.3)
    for weight in (True, False)
    for kl in (True, False)
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=lambda m: "-".join(map(str, m.values())))
def test_loss_and_gradient_are_the_published_ones(dropin, mode, dtype):
    given = samples(dtype)
    trainer, grad = fast_run(dropin, given, dtype, num_inner_epochs=2, **mode)
    torch.manual_seed(1)
    want, losses, policy, kl = published_run(trainer.training_args, given, dtype, trainer.epoch)
    assert relative(grad, want) < TOLERANCE[dtype]
    assert relative(logged(trainer, "loss"), losses) < TOLERANCE[dtype]
    assert relative(logged(trainer, "unweighted_policy_loss"), policy) < TOLERANCE[dtype]
    assert relative(logged(trainer, "kl_loss"), kl) < TOLERANCE[dtype]


@pytest.mark.parametrize("settings", [{"kl_beta": 0.0}, {"use_old_for_loss": False}, {"kl_cfg": 1.0}], ids=str)
def test_other_settings_are_the_published_ones(dropin, settings):
    given = samples()
    trainer, grad = fast_run(dropin, given, torch.float32, **settings)
    torch.manual_seed(1)
    want, losses, *_ = published_run(trainer.training_args, given, torch.float32, trainer.epoch)
    assert relative(grad, want) < 1e-4
    assert relative(logged(trainer, "loss"), losses) < 1e-4


def test_prompts_are_centered_apart_when_asked(dropin):
    given = samples(torch.float64)
    trainer, grad = fast_run(dropin, given, torch.float64, crd_centering="prompt")
    torch.manual_seed(1)
    want, losses, *_ = published_run(trainer.training_args, given, torch.float64, trainer.epoch, per_prompt=True)
    assert relative(grad, want) < 1e-9
    assert relative(logged(trainer, "loss"), losses) < 1e-9
    assert logged(trainer, "singleton_groups").tolist() == [1] * STEPS + [2] * STEPS


def test_gradients_accumulate_over_timesteps_and_batches(dropin):
    _, each = fast_run(dropin, samples(), torch.float32)
    trainer, together = fast_run(dropin, samples(), torch.float32, accumulation=2 * STEPS)
    torch.testing.assert_close(together, each / (2 * STEPS))
    assert trainer.step == len(trainer.logs) == 1
    names = "policy_loss unweighted_policy_loss kl_div kl_loss r_theta_mean loss singleton_groups grad_norm".split()
    assert set(trainer.logs[0]) == {f"train/{name}" for name in names}


def test_parameters_are_swapped_in_once_a_pass(dropin):
    batches = SAMPLES // BATCH
    trainer, _ = fast_run(dropin, samples(), torch.float32, num_inner_epochs=2)
    assert trainer.adapter.swaps == (["_crd_old"] + ["ref"] * batches) * 2
    trainer, _ = fast_run(dropin, samples(), torch.float32, kl_beta=0.0)
    assert trainer.adapter.swaps == ["_crd_old"]
    assert [name for name, *_ in trainer.adapter.forwards] == ["_crd_old"] * batches * STEPS + ["now"] * batches * STEPS
    assert "train/kl_div" not in trainer.logs[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_model_gets_the_dtype_of_the_latents(dropin, dtype):
    trainer, _ = fast_run(dropin, samples(dtype), dtype)
    assert {given for _, given, _ in trainer.adapter.forwards} == {dtype}


def test_between_the_passes_two_floats_a_sample_are_kept(dropin):
    class Kept(dropin.CRDFastTrainer):
        def _train(self, batches):
            self.kept = batches
            super()._train(batches)

    trainer, _ = fast_run(dropin, samples(), torch.float32, trainer=Kept)
    for batch in trainer.kept:
        assert set(batch.inputs) == {"all_latents", "advantage"}
        assert [(old.mse.shape, old.mae.shape) for old in batch.old] == [((BATCH,), (BATCH,))] * STEPS
        sizes = [value.numel() for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        assert max(sizes) == STEPS * BATCH


def test_autocast_sees_that_weights_were_swapped(dropin):
    class Autocast(dropin.CRDFastTrainer):
        autocast = staticmethod(lambda: torch.autocast("cpu", dtype=torch.bfloat16))

    # Weights cast once for a whole pass would make the reference the trained model, whose KL to itself is 0.
    plain, _ = fast_run(dropin, samples(), torch.float32)
    cast, _ = fast_run(dropin, samples(), torch.float32, trainer=Autocast)
    assert relative(logged(cast, "kl_loss"), logged(plain, "kl_loss")) < 2e-2


def test_all_ranks_center_together(dropin, monkeypatch, tmp_path):
    given, groups = samples(), []
    original = crd_fast.loss
    monkeypatch.setattr(crd_fast, "loss", lambda *a, **k: (groups.append(k["process_group"]), original(*a, **k))[1])
    fast_run(dropin, given, torch.float32)
    assert set(groups) == {None}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        groups.clear()
        fast_run(dropin, given, torch.float32)
        assert groups and all(group is dist.group.WORLD for group in groups)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("centering", "draws"), [("prompt", 2), ("batch", 0)])
def test_ranks_share_timesteps_only_when_prompts_are_centered(dropin, monkeypatch, centering, draws):
    sources = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast", lambda t, src: (sources.append(src), t.fill_(500.0)))
    args = dropin.CRDFastTrainingArguments(crd_centering=centering)
    trainer = dropin.CRDFastTrainer(accelerator=Accelerator(), training_args=args, adapter=Adapter(torch.float32))
    batches = trainer._batches(samples(), 0)
    assert sources == [0] * draws
    assert all(bool((batch.timesteps == 500).all()) == bool(draws) for batch in batches)


# --- the pure functions -----------------------------------------------------------------------------------


def test_names_are_mapped(dropin):
    args = dropin.CRDFastTrainingArguments(
        crd_beta=2.0,
        kl_beta=0.3,
        adv_clip_range=(-3.0, 3.0),
        adaptive_logp=False,
        reward_adaptive_kl=False,
        weight_temp=0.5,
        crd_loss_type="bce",
        crd_centering="prompt",
    )
    assert dropin.crd_config(args) == crd_fast.CRDConfig(
        beta=2.0,
        kl_coef=0.3,
        adv_clip=3.0,
        adaptive_weight=False,
        adaptive_kl=False,
        temperature=0.5,
        loss_type="bce",
        centering="prompt",
    )
    default = dropin.crd_config(dropin.CRDFastTrainingArguments())
    assert default.temperature == math.inf and default.centering == "batch"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adv_clip_range": (-5.0, 4.0)}, "adv_clip_range: expected a symmetric pair"),
        ({"crd_centering": "group"}, "centering: expected one of 'prompt', 'batch', got 'group'"),
        ({"crd_beta": 0.0}, "beta: expected a finite number > 0"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_before_a_model_is_loaded(dropin, settings, message):
    with pytest.raises(ValueError, match=message):
        dropin.CRDFastTrainingArguments(**settings)


def test_the_arguments_name_the_trainer(dropin):
    given = "dropin.flow_factory.CRDFastTrainingArguments"
    module, _, name = given.rpartition(".")
    arguments = getattr(importlib.import_module(module), name)
    module, _, name = arguments(trainer_type=given).trainer_type.rpartition(".")
    assert getattr(importlib.import_module(module), name) is dropin.CRDFastTrainer


def test_no_two_samples_share_an_id_and_no_two_epochs_a_seed(dropin):
    ranks = [dropin.sample_ids(count, rank, 3) for rank, count in enumerate((5, 8, 2))]
    everyone = torch.cat(ranks)
    assert everyone.dtype == torch.int64 and everyone.unique().numel() == 15
    assert len({dropin.noise_seed(42, epoch) for epoch in range(9)}) == 9
    assert dropin.noise_seed(-1, 0) == 2**64 - 1


def test_no_two_draws_of_a_sample_are_alike(dropin):
    args = dropin.CRDFastTrainingArguments()
    trainer = dropin.CRDFastTrainer(accelerator=Accelerator(), training_args=args, adapter=Adapter(torch.float32))
    draws = []
    for trainer.epoch in range(2):
        for inner in range(2):
            for batch in trainer._batches(samples(), inner):
                draws += [row for step in range(STEPS) for row in batch.noised(step).epsilon().flatten(1)]
    assert torch.stack(draws).unique(dim=0).shape[0] == 2 * 2 * SAMPLES * STEPS


def test_a_group_is_a_prompt_at_a_timestep(dropin):
    prompts = torch.tensor([2**62, 2**62 + 1, 2**62, 2**62, -5, -5])
    timesteps = torch.tensor([500.0, 500.0, 500.0, 500.0001, 500.0, 0.0])
    ids = dropin.group_ids(prompts, timesteps).tolist()
    assert ids[0] == ids[2]
    assert len(set(ids)) == 5


def test_a_later_layout_of_the_project_is_told(dropin, monkeypatch):
    """Its CRD has moved, and predicts dicts of components."""
    monkeypatch.setitem(sys.modules, "flow_factory.trainers.crd", None)
    with pytest.raises(ImportError, match=r"up to commit a0b2bc5 .*trainers/rl/crd.py"):
        importlib.reload(dropin)
