"""`crd-fast didr` on tiny pipelines: training, resuming, stopping, exporting, and wrong input."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from crd_fast import cli
from crd_fast.didr import trainer as trainer_module
from crd_fast.didr.pictures import Painter
from crd_fast.didr.recipe import load_recipe
from crd_fast.errors import ConfigError
from crd_fast.evaluation import suites
from crd_fast.evaluation.pictures import read_image
from crd_fast.evaluation.shapes_suite import FIRST_SAMPLE_ID
from crd_fast.rollout import initial_noise
from crd_fast.training.models import load_backbone
from tests import pipelines
from tests.didr.tiny import (
    ADAPTER,
    MODEL,
    PROMPTS,
    START,
    didr,
    make_recipe,
    make_world,
    recipe_tree,
    rows,
    save_pipeline,
)

FAMILIES = tuple(MODEL)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = {family: tmp_path_factory.mktemp("runs") / family for family in FAMILIES}
    for family, run in runs.items():
        didr(world / f"{family}.yaml", f"run.dir={run}")
    return runs


def test_a_run_leaves_every_file_of_its_contract(finished: dict[str, Path]) -> None:
    run = finished["sd3"]
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "timing.json", "environment.json", ADAPTER):
        assert (run / name).is_file(), name
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["epoch-000001", "epoch-000002"]
    assert (run / "checkpoints" / "epoch-000001" / "pytorch_lora_weights.safetensors").is_file()
    table = rows(run)
    assert [(row["epoch"], row["step"], row["ta_step"]) for row in table] == [(0, 2, 4), (1, 4, 8)]
    wanted = {"ta_loss", "ta_loss_before", "ta_loss_after", "reward", "correction_ratio", "nonfinite", "grad_norm"}
    assert wanted <= table[0].keys()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["iterations"] == 4 and summary["samples"] == 2 * 2 * 3 * 4
    assert all({"clipscore", "n"} <= summary[side].keys() for side in ("before", "reference", "after"))


def test_tensorboard_has_the_same_numbers(finished: dict[str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished["sd3"] / "tensorboard"))
    events.Reload()
    table = rows(finished["sd3"])
    for name, expected in {
        "ta_loss": [row["ta_loss"] for row in table],
        "reward/clipscore": [row["reward"]["clipscore"] for row in table],
        "grad_norm/generator": [row["grad_norm"]["generator"] for row in table],
    }.items():
        assert [event.value for event in events.Scalars(name)] == pytest.approx(expected, rel=1e-5)


# --- what is exported ---


def start_noise(family: str, folder: Path) -> Tensor:
    backbone = load_backbone(make_recipe(family, folder).model, "fp32", torch.device("cpu"))
    return initial_noise(backbone, FIRST_SAMPLE_ID + torch.arange(len(PROMPTS)), 0)


def one_step(family: str, folder: Path, lora: Path | None, start: Tensor) -> Tensor:
    """The images that users of diffusers get from one step."""
    if family != "sdxl":
        return pipelines.family(family).sample(folder, lora, list(PROMPTS), start, 1, None)
    from diffusers import LCMScheduler, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        list(PROMPTS),
        latents=start,
        timesteps=[round(1000 * START["sdxl"])],
        num_inference_steps=1,
        guidance_scale=0.0,
        height=64,
        width=64,
        output_type="pt",
    ).images


def assert_kept(run: Path, side: str, images: Tensor) -> None:
    for number, image in enumerate(images):
        kept = read_image(run / "samples" / side / f"{number:05d}.png")
        assert (kept - image).abs().max() <= 1.01 / 255, (side, number)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_the_generator_and_draws_the_same(family: str, world: Path, finished: dict[str, Path]) -> None:
    """`samples/after` are one-step samples of the exported adapter, `samples/before` of the model it started from."""
    start = start_noise(family, world / family)
    before = one_step(family, world / family, None, start)
    after = one_step(family, world / family, finished[family] / "lora", start)
    assert_kept(finished[family], "before", before)
    assert_kept(finished[family], "after", after)
    assert (after - before).abs().max() > 2 / 255, "the adapter does nothing"


def test_samples_are_told_apart_by_their_metadata(finished: dict[str, Path]) -> None:
    folder = finished["sd3"] / "samples"
    entries = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [entry["prompt"] for entry in entries] == [*PROMPTS, PROMPTS[0]]
    for entry in entries:
        assert {"seed", "before", "after"} <= entry.keys()
        assert all((folder / side / entry["file_name"]).is_file() for side in ("before", "reference", "after"))


def test_an_adapter_can_be_the_start(world: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    """The generator, not the TA or the reference: images before are those after the run it comes from."""
    run = tmp_path / "run"
    lora = f"generator.lora={finished['sd3'] / 'lora'}"
    didr(world / "sd3.yaml", f"run.dir={run}", lora, "train.epochs=1", "train.steps=1")
    for number in range(4):
        before, after = run / "samples" / "before", finished["sd3"] / "samples" / "after"
        difference = read_image(before / f"{number:05d}.png") - read_image(after / f"{number:05d}.png")
        assert difference.abs().max() <= 1.01 / 255
        references = [r / "samples" / "reference" / f"{number:05d}.png" for r in (run, finished["sd3"])]
        assert references[0].read_bytes() == references[1].read_bytes()
    adapter = load_file(run / ADAPTER)
    assert any(
        (adapter[name] - tensor).abs().max() > 0 for name, tensor in load_file(finished["sd3"] / ADAPTER).items()
    )


def with_transformer(folder: Path, transformer: Path, out: Path) -> Path:
    """The SD3 pipeline of `folder` with another transformer."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    model = SD3Transformer2DModel.from_pretrained(transformer)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, transformer=model, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.save_pretrained(out)
    return out


def test_a_generator_with_a_model_of_its_own(world: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    """It starts as that model and its adapter belongs to it; the reference stays as it was."""
    transformer = pipelines.family("sd3").save(tmp_path / "seed1", seed=1) / "transformer"
    other = with_transformer(world / "sd3", transformer, tmp_path / "other")
    run = tmp_path / "run"
    didr(world / "sd3.yaml", f"run.dir={run}", f"generator.path={other}", "train.epochs=1")
    start = start_noise("sd3", world / "sd3")
    before, after = one_step("sd3", other, None, start), one_step("sd3", other, run / "lora", start)
    assert (after - before).abs().max() > 2 / 255
    assert_kept(run, "before", before)
    assert_kept(run, "after", after)
    for name in ("00000.png", "00001.png"):
        same, different = (
            [(r / "samples" / side / name).read_bytes() for r in (run, finished["sd3"])]
            for side in ("reference", "before")
        )
        assert same[0] == same[1] and different[0] != different[1]


def test_all_of_the_generators_parameters(world: Path, tmp_path: Path) -> None:
    """Full fine-tuning: the saved model draws `samples/after`."""
    run = tmp_path / "run"
    didr(world / "sd3.yaml", f"run.dir={run}", "train.parameters=full", "train.lr=3e-3", "train.ta_lr=1e-3")
    start = start_noise("sd3", world / "sd3")
    trained = with_transformer(world / "sd3", run / "transformer", tmp_path / "trained")
    before, after = one_step("sd3", world / "sd3", None, start), one_step("sd3", trained, None, start)
    assert (after - before).abs().max() > 2 / 255
    assert_kept(run, "after", after)


def test_a_reward_of_the_users_own(world: Path, tmp_path: Path) -> None:
    own = Path(__file__).parents[2] / "examples" / "rewards" / "colorfulness.py"
    reward = {"name": "custom:color", "options": {"source": f"{own}:colorfulness", "arguments": {"scale": 2.0}}}
    didr(world / "sd3.yaml", f"run.dir={tmp_path / 'run'}", f"reward={json.dumps(reward)}")
    assert all(row["reward"]["custom:color"] > 0 for row in rows(tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["custom:color"] != summary["before"]["custom:color"]


# --- stopping and continuing ---


def same_adapters(first: Path, second: Path) -> bool:
    return (first / ADAPTER).read_bytes() == (second / ADAPTER).read_bytes()


def test_resuming_repeats_the_uninterrupted_run(world: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    didr(world / "sd3.yaml", f"run.dir={run}", "train.epochs=1")
    assert len(rows(run)) == 1 and not same_adapters(run, finished["sd3"])
    didr(world / "sd3.yaml", f"run.dir={run}", "--resume")
    assert rows(run) == rows(finished["sd3"])
    assert same_adapters(run, finished["sd3"])
    assert (run / "summary.json").read_bytes() == (finished["sd3"] / "summary.json").read_bytes()


def test_sigterm_leaves_a_run_that_continues(
    world: Path, finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes inside the second epoch's Stage I; the epoch is done again."""
    run, draw_step = tmp_path / "run", trainer_module.draw_step

    def interrupted(*arguments: Any) -> Any:
        if arguments[3] == 8:  # the number of the step
            os.kill(os.getpid(), signal.SIGTERM)
        return draw_step(*arguments)

    monkeypatch.setattr(trainer_module, "draw_step", interrupted)
    didr(world / "sd3.yaml", f"run.dir={run}")
    assert not (run / "lora").exists() and len(rows(run)) == 1
    monkeypatch.setattr(trainer_module, "draw_step", draw_step)
    didr(world / "sd3.yaml", f"run.dir={run}", "--resume")
    assert rows(run) == rows(finished["sd3"]) and same_adapters(run, finished["sd3"])


MEASURED = ("algorithm.beta=null", "algorithm.beta_prompts=2", "algorithm.beta_images=2", "train.epochs=1")


def test_a_stop_while_beta_is_measured_can_be_resumed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run, many_steps = tmp_path / "whole", tmp_path / "run", Painter.many_steps
    didr(world / "sd3.yaml", f"run.dir={whole}", *MEASURED)

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return many_steps(*arguments)

    monkeypatch.setattr(Painter, "many_steps", interrupted)
    didr(world / "sd3.yaml", f"run.dir={run}", *MEASURED)
    assert not (run / "beta.json").exists() and not (run / "metrics.jsonl").exists()
    monkeypatch.setattr(Painter, "many_steps", many_steps)
    didr(world / "sd3.yaml", f"run.dir={run}", *MEASURED, "--resume")
    assert rows(run) == rows(whole) and same_adapters(run, whole)
    assert (run / "beta.json").read_bytes() == (whole / "beta.json").read_bytes()


def test_a_new_run_measures_its_own_beta(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever another start has left; and settings that are wrong are told before it is measured."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "beta.json").write_text('{"beta": 123.0}')
    didr(world / "sd3.yaml", f"run.dir={run}", *MEASURED, "algorithm.guidance_scale=-1", code=2)
    assert "guidance_scale: expected a number >= 0, got -1" in capsys.readouterr().err
    assert json.loads((run / "beta.json").read_text()) == {"beta": 123.0}
    didr(world / "sd3.yaml", f"run.dir={run}", *MEASURED)
    assert 0 < json.loads((run / "beta.json").read_text())["beta"] < 1


def test_where_beta_cannot_be_measured_it_can_be_set(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same directory."""
    run = tmp_path / "run"
    with monkeypatch.context() as alike:
        alike.setattr(Painter, "many_steps", lambda self, ids, *_: torch.full((len(ids), 3, 64, 64), 0.5))
        didr(world / "sd3.yaml", f"run.dir={run}", *MEASURED, code=2)
    assert "algorithm.beta cannot be measured: clipscore is the same" in capsys.readouterr().err
    didr(world / "sd3.yaml", f"run.dir={run}", *MEASURED, "algorithm.beta=0.05")
    assert (run / ADAPTER).is_file()


def test_a_finished_run_is_moved_back_towards_its_start(world: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    """Nothing is trained again, the images after are those of the moved adapter, and it can be undone."""
    run = tmp_path / "run"
    shutil.copytree(finished["sd3"], run)
    didr(world / "sd3.yaml", f"run.dir={run}", "--resume", "train.towards_start=0.5")
    assert rows(run) == rows(finished["sd3"])
    moved, whole = load_file(run / ADAPTER), load_file(finished["sd3"] / ADAPTER)
    for name, tensor in whole.items():
        assert torch.equal(moved[name], tensor / 2 if ".lora_B." in name else tensor), name
    assert_kept(run, "after", one_step("sd3", world / "sd3", run / "lora", start_noise("sd3", world / "sd3")))
    assert "moved .50 back to the start" in (run / "report.html").read_text()
    didr(world / "sd3.yaml", f"run.dir={run}", "--resume")
    assert same_adapters(run, finished["sd3"])
    assert (run / "summary.json").read_bytes() == (finished["sd3"] / "summary.json").read_bytes()


def test_an_adapter_is_no_start_to_go_back_to(world: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    lora = f"generator.lora={finished['sd3'] / 'lora'}"
    with pytest.raises(ConfigError, match="Merge it into the model first"):
        load_recipe(world / "sd3.yaml", [lora, "train.towards_start=0.5"])


def test_an_adapter_is_no_start_to_be_anchored_at(world: Path, finished: dict[str, Path]) -> None:
    lora = f"generator.lora={finished['sd3'] / 'lora'}"
    with pytest.raises(ConfigError, match=r"algorithm.anchor is 0.1 but generator.lora is .*Merge it into the model"):
        load_recipe(world / "sd3.yaml", [lora, "algorithm.anchor=0.1"])


UNSCORED = """
import torch
seen = [0]

def picky(images, prompts, metadata):
    seen[0] += len(images)
    scores = images.mean((1, 2, 3))
    return torch.where(torch.arange(len(scores)) == 1, torch.nan, scores) if len(scores) == 4 else scores

picky.differentiable = True
"""


def test_an_image_without_a_score_costs_its_side_the_mean_and_not_the_run(world: Path, tmp_path: Path) -> None:
    """The custom reward has no number for the second of the four images of an evaluation."""
    source = tmp_path / "picky.py"
    source.write_text(UNSCORED)
    run = tmp_path / "run"
    reward = json.dumps({"name": "custom:picky", "options": {"source": f"{source}:picky"}})
    didr(world / "sd3.yaml", f"run.dir={run}", f"reward={reward}", "train.epochs=1")
    summary = json.loads((run / "summary.json").read_text())
    for side in ("before", "reference", "after"):
        assert summary[side]["custom:picky"] is None
        assert summary[side]["custom:picky_failed"].startswith("1 of 4 images have no score")
        passed = json.loads((run / f"evaluation_{side}.json").read_text())["passed"]
        assert [value is None for value in passed] == [False, True, False, False]
    assert "1 of 4 images have no score" in (run / "report.html").read_text()


def test_an_autoencoder_that_cannot_recompute_itself(tmp_path: Path) -> None:
    """Qwen-Image's; the default asks for it, and its scheduler has no noise levels for one step."""
    folder = save_pipeline("qwen_image", tmp_path / "qwen")
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    tree = recipe_tree("sd3", folder, tmp_path / "prompts.txt", epochs=1, steps=1)
    tree["model"] = {"path": str(folder), "max_sequence_length": 24, "resolution": 64}
    tree["reward"] = {"name": "custom:red", "options": {"source": f"{__file__}:red"}}
    tree["algorithm"]["guidance_scale"] = 1.0
    (tmp_path / "qwen.yaml").write_text(yaml.safe_dump(tree))
    run = tmp_path / "run"
    didr(tmp_path / "qwen.yaml", f"run.dir={run}", "decode.recompute=true")
    assert rows(run)[0]["grad_norm"]["generator"] > 0
    assert_sampled(run, folder, tmp_path, "--max-sequence-length", "24")


def assert_sampled(run: Path, model: Path, tmp_path: Path, *more: str) -> None:
    """`crd-fast sample` of a run draws in one step, unless it is told otherwise."""
    words = ["sample", "--model", str(model), "--lora", str(run), "--prompt", PROMPTS[0], "--device", "cpu", *more]
    outs = {name: tmp_path / name for name in ("told", "found")}
    assert cli.main([*words, "--out", str(outs["found"])]) == 0
    assert cli.main([*words, "--out", str(outs["told"]), "--one-step"]) == 0
    assert (outs["found"] / "00000.png").read_bytes() == (outs["told"] / "00000.png").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_eval_of_a_run_draws_its_generator_in_one_step(
    family: str, world: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    """What users of diffusers get from one step of the same noise."""
    run = tmp_path / "run"
    shutil.copytree(finished[family], run)
    (tmp_path / "drawbench.txt").write_text(f"{PROMPTS[1]}\n")
    words = ["eval", "--run", str(run), "--suite", "drawbench", "--prompts", str(tmp_path / "drawbench.txt")]
    words += ["--scorers", "jpeg_compressibility", "--images-per-prompt", "1", "--device", "cpu"]
    words += ["--resolution", "64"]
    assert cli.main(words) == 0
    settings = json.loads((run / "eval-drawbench" / "final" / "settings.json").read_text())
    assert settings["steps"] == 1 and settings["start_share"] == START[family] and settings["guidance_scale"] is None
    drawn, base = (
        read_image(run / "eval-drawbench" / label / "00000" / "samples" / "00000.png") for label in ("final", "base")
    )
    assert (drawn - base).abs().max() > 2 / 255, "the adapter does nothing"
    prompts = suites.suite_prompts(suites.suite_named("drawbench"), str(tmp_path / "drawbench.txt"))
    (item,) = suites.plan(suites.suite_named("drawbench"), prompts, 1, 0)
    backbone = load_backbone(make_recipe(family, world / family).model, "fp32", torch.device("cpu"))
    start = initial_noise(backbone, torch.tensor([item.sample_id] * len(PROMPTS)), 0)
    for lora, image in ((None, base), (run / "lora", drawn)):
        assert (one_step(family, world / family, lora, start)[1] - image).abs().max() <= 1.01 / 255


def test_eval_takes_the_generators_own_model(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = pipelines.family("sd3").save(tmp_path / "other", seed=1)
    run = tmp_path / "run"
    didr(world / "sd3.yaml", f"run.dir={run}", f"generator.path={other}", "train.epochs=1")
    (tmp_path / "drawbench.txt").write_text(f"{PROMPTS[1]}\n")
    words = ["eval", "--run", str(run), "--suite", "drawbench", "--prompts", str(tmp_path / "drawbench.txt")]
    words += ["--scorers", "jpeg_compressibility", "--images-per-prompt", "1", "--device", "cpu", "--resolution", "64"]
    assert cli.main(words) == 0
    settings = json.loads((run / "eval-drawbench" / "final" / "settings.json").read_text())
    assert settings["model"] == str(other)
    assert "one step" in (run / "eval-drawbench" / "report.html").read_text()
    model = ["eval", "--model", str(other), "--lora", str(run), *words[3:], "--out", str(tmp_path / "by-model")]
    assert cli.main([*model, "--max-sequence-length", "1"]) == 0
    settings = json.loads((tmp_path / "by-model" / "settings.json").read_text())
    assert settings["steps"] == 1 and settings["start_share"] == 1.0
    assert cli.main([*words, "--steps", "8"]) == 2
    assert "--steps does not go with one-step generators" in capsys.readouterr().err
    assert cli.main([*words, "--guidance-scale", "4"]) == 2
    assert "--guidance-scale does not go with one-step generators" in capsys.readouterr().err


def test_a_time_limit(world: Path, tmp_path: Path) -> None:
    """A run that has used up its time has no epoch left when it continues, unless it gets more time."""
    run = tmp_path / "run"
    settings = (f"run.dir={run}", "train.epochs=2", "evaluation.images=1")
    didr(world / "sd3.yaml", *settings, "train.max_minutes=1e-6")
    assert len(rows(run)) == 1 and (run / ADAPTER).is_file()
    trained = (run / ADAPTER).read_bytes()
    didr(world / "sd3.yaml", *settings, "train.max_minutes=1e-6", "--resume")
    assert len(rows(run)) == 1 and (run / ADAPTER).read_bytes() == trained
    didr(world / "sd3.yaml", *settings, "train.max_minutes=60", "--resume")
    assert len(rows(run)) == 2


# --- wrong input ---


def plain(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.mean((1, 2, 3))


def graphless(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.detach().mean((1, 2, 3))


def red(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images[:, 0].mean((1, 2))


red.differentiable = True  # type: ignore[attr-defined]
graphless.differentiable = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward={name: jpeg_compressibility}"], "jpeg_compressibility', which has no gradient"),
        ([f"reward={{name: custom, options: {{source: '{__file__}:graphless'}}}}"], "have no gradient in the images"),
        ([f"reward={{name: custom, options: {{source: '{__file__}:plain'}}}}"], "attribute, differentiable = True"),
        (["train.batch=3"], "train.batch is 3, which 1 ranks with train.micro_batch 2 cannot share out"),
        (["algorithm.beta=-1"], "beta: expected a number > 0"),
        (["generator.path=nowhere/at/all"], "generator.path nowhere/at/all is not a folder"),
        (["run.device=gpu"], "device 'gpu' is not known: this machine has cpu"),
        (["train.parameters=full", "generator.lora=x"], "merge it into the model first"),
        (["algorithm.gidance_scale=2"], "did you mean 'guidance_scale'"),
    ],
)
def test_wrong_input_is_named(
    overrides: list[str], message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    didr(world / "sd3.yaml", f"run.dir={tmp_path / 'run'}", *overrides, code=2)
    assert message in capsys.readouterr().err


def test_another_recipe_cannot_resume_a_run(
    world: Path, finished: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    didr(world / "sd3.yaml", f"run.dir={finished['sd3']}", "--resume", "algorithm.beta=0.5", code=2)
    assert "algorithm.beta was 0.05, now 0.5" in capsys.readouterr().err
