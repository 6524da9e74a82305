"""From a recipe to a run directory: evaluate, train, evaluate again, report. Ctrl-C and SIGTERM leave it resumable."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from crd_fast import backbones
from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.data.prompts import assert_disjoint, load_prompts
from crd_fast.errors import ConfigError, CrdFastError, NonFiniteError
from crd_fast.evaluation import shapes_suite
from crd_fast.evaluation.report import write_report
from crd_fast.lora import BASE, TRAINED, LoRABank
from crd_fast.rewards import registry
from crd_fast.training.checkpoint import CheckpointStore
from crd_fast.training.config import Recipe, build_recipe, dump_recipe
from crd_fast.training.embeddings import embed, model_key
from crd_fast.training.memory import keep_freed_memory, peak_gigabytes
from crd_fast.training.progress import Reporter, epoch_note
from crd_fast.training.run_directory import RunDirectory, write_json, write_text
from crd_fast.training.stop import Interrupted, StopRequest
from crd_fast.training.tensorboard import Scalars
from crd_fast.training.trainer import Trainer

# Settings that a resumed run may change: they say how long, not what.
_FREE = (
    "train.epochs",
    "train.max_minutes",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "run.dir",
    "run.device",
)

# Images of each task that are kept as PNG, the same ones before and after.
KEPT_PER_TASK = 12


def run(recipe: Recipe, *, resume: bool = False, reporter: Reporter | None = None) -> Path:
    """Run a recipe to its report; returns the run directory.

    Raises CrdFastError for anything the user can mend, and Interrupted after a signal, when the run has
    saved a checkpoint from which `resume` continues.
    """
    directory = RunDirectory.open(recipe.run.dir, recipe.name, resume=resume)
    if resume:
        _check_same(recipe, directory)
    with reporter or Reporter() as report, StopRequest() as stop:
        try:
            return _Job(recipe, directory, report, stop, resume).run()
        except Interrupted as stopped:
            report.say(f"{stopped}; continue with --resume run.dir={directory.path}")
            raise
        except torch.OutOfMemoryError as error:
            raise CrdFastError(
                f"out of memory on {recipe.run.device or 'the device'}: lower train.micro_batch "
                f"({recipe.train.micro_batch}) or rollout.batch ({recipe.rollout.batch}); {directory.path} can be "
                f"continued with --resume ({error})"
            ) from error


class _Job:
    def __init__(
        self, recipe: Recipe, directory: RunDirectory, report: Reporter, stop: StopRequest, resume: bool
    ) -> None:
        self.recipe, self.directory, self.report, self.stop, self.resume = (
            recipe,
            directory,
            report,
            stop,
            resume,
        )
        self.store = CheckpointStore(directory / "checkpoints", recipe.train.keep_checkpoints)
        self.rewards = {name: registry.build(name, settings.options) for name, settings in recipe.rewards.items()}
        self.train_prompts = load_prompts(recipe.data.prompts)
        self.test_prompts = load_prompts(recipe.data.test_prompts) if recipe.data.test_prompts else None
        for reward in self.rewards.values():
            self.train_prompts.require(reward.requires)
        if self.test_prompts is not None:
            assert_disjoint(self.train_prompts, self.test_prompts)
        elif recipe.evaluation.suite is not None:
            raise ConfigError("evaluation.suite is set but data.test_prompts is not: name the held-out prompts")
        self.backbone = self._load_backbone()
        if self.backbone.device.type == "cpu":
            keep_freed_memory()
        self.bank = LoRABank(
            self.backbone.transformer,
            recipe.lora.targets or self.backbone.lora_targets,
            rank=recipe.lora.rank,
            alpha=recipe.lora.alpha,
            seed=recipe.run.seed,
        )
        embedded = self._embed()
        self.unconditional = embedded[:1]
        self.conditioning = embedded[1 : 1 + len(self.train_prompts)]
        self.test_conditioning = embedded[1 + len(self.train_prompts) :]
        self.trainer = Trainer(
            recipe,
            self.backbone,
            self.bank,
            self.train_prompts,
            self.conditioning,
            self.unconditional,
            self.rewards,
            stop,
        )

    def _load_backbone(self) -> Backbone:
        settings = self.recipe.model
        device = self.recipe.run.device or ("cuda" if torch.cuda.is_available() else "cpu")
        options = backbones.LoadOptions(
            device=torch.device(device),
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[self.recipe.precision.dtype],
            max_sequence_length=settings.max_sequence_length,
            resolution=settings.resolution,
            frames=settings.frames,
            distilled_guidance=settings.distilled_guidance,
        )
        return backbones.load(settings.path, settings.family, options)

    def _embed(self) -> Conditioning:
        model = self.recipe.model
        held_out = self.test_prompts.prompts if self.test_prompts is not None else ()
        prompts = ["", *self.train_prompts.prompts, *held_out]
        key = model_key(model.path, model.max_sequence_length, self.backbone.dtype)
        embedded = embed(self.backbone, prompts, self.directory / "embeddings", key)
        self.backbone.release_text_encoders()
        return embedded

    def run(self) -> Path:
        write_text(self.directory / "config.yaml", dump_recipe(self.recipe))
        self.directory.write_environment(self.backbone.device)
        if self.resume:
            self._restore()
        self.report.say(f"run directory {self.directory.path}")
        if self.recipe.evaluation.suite is not None:
            self._evaluate("before", BASE)
            if self.recipe.evaluation.reference_guidance is not None:
                self._evaluate("guided", BASE, self.recipe.evaluation.reference_guidance)
        self._train()
        self.backbone.save_lora(str(self.directory / "lora"), self.bank.export(TRAINED))
        if self.recipe.evaluation.suite is not None:
            self._evaluate("after", TRAINED)
        self._summarize()
        page = write_report(self.directory.path)
        self.report.say(f"report {page}")
        return self.directory.path

    def _restore(self) -> None:
        if self.store.newest_path() is None:
            self.directory.truncate_metrics(0)
            self.report.say("no checkpoint yet: starting from the beginning")
            return
        path, state = self.store.latest(self.report.say)
        self.trainer.load_state_dict(state)
        self.directory.truncate_metrics(self.trainer.epoch)
        self.report.say(f"resumed from {path.name} after {self.trainer.epoch} epochs")

    def _train(self) -> None:
        train, trainer = self.recipe.train, self.trainer
        self.report.begin("training", train.epochs, trainer.epoch)
        started, elapsed_before = time.perf_counter(), self._elapsed_before()
        scalars = Scalars(self.directory / "tensorboard", trainer.epoch)
        while trainer.epoch < train.epochs:
            at_start = trainer.state_dict()
            try:
                row = trainer.run_epoch()
            except Interrupted:
                trainer.load_state_dict(at_start)  # the exported adapter is that of the saved state
                self._save(at_start)
                self.report.say(f"saved after {at_start['epoch']} epochs")
                raise
            except NonFiniteError as error:
                last = self.store.newest_path()
                raise NonFiniteError(f"{error}; last good checkpoint: {last or 'none yet'}") from error
            row["elapsed_seconds"] = elapsed_before + time.perf_counter() - started
            self.directory.append_metrics(row)
            scalars.write(row)
            self.report.update(trainer.epoch, epoch_note(row), line=True)
            over = train.max_minutes is not None and row["elapsed_seconds"] > 60 * train.max_minutes
            if trainer.epoch % train.checkpoint_every == 0 or trainer.epoch == train.epochs or over:
                self._save(trainer.state_dict())
            if over:
                self.report.say(f"train.max_minutes {train.max_minutes} reached after {trainer.epoch} epochs")
                break
        scalars.close()

    def _elapsed_before(self) -> float:
        """Training seconds of the epochs a resumed run already has."""
        path = self.directory / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        return float(json.loads(rows[-1])["elapsed_seconds"]) if rows else 0.0

    def _save(self, state: dict[str, Any]) -> None:
        exported = self.bank.export(TRAINED)
        self.store.save(state["epoch"], state, lambda folder: self.backbone.save_lora(str(folder), exported))

    def _evaluate(self, side: str, slot: str, guidance_scale: float | None = None) -> None:
        """Evaluate a slot and keep the result, unless an earlier start of this run has it."""
        file = self.directory / f"evaluation_{side}.json"
        if file.exists() and side != "after":
            return
        settings = self.recipe.evaluation
        assert self.test_prompts is not None  # checked when the job was made
        total = len(shapes_suite.choose_prompts(self.test_prompts, settings.images))
        self.report.begin(f"evaluating {side}", total)

        def advance(done: int) -> None:
            self.stop.check()
            self.report.update(done)

        with self.bank.merged(slot):
            result = shapes_suite.evaluate(
                self.backbone,
                self.test_prompts,
                self.test_conditioning,
                self.unconditional,
                images=settings.images,
                steps=settings.steps,
                guidance_scale=settings.guidance_scale if guidance_scale is None else guidance_scale,
                batch=settings.batch,
                seed=self.recipe.run.seed,
                on_batch=advance,
            )
        self._keep_samples(side, result)
        write_json(file, {"summary": result.summary, "passed": result.passed, "prompt_ids": result.prompt_ids})
        strict = result.summary.get("geneval_strict")
        ocr = result.summary.get("ocr")
        self.report.say(
            f"{side}: strict {_text(strict)}  ocr {_text(ocr)}  frechet {_text(result.summary.get('frechet'))}"
        )

    def _keep_samples(self, side: str, result: shapes_suite.Evaluated) -> None:
        """The first images of each task as PNG, the same ones on every side."""
        if side not in ("before", "after"):
            return
        images = self.recipe.evaluation.images
        indices = [i for i in range(len(result.images)) if i % images < KEPT_PER_TASK]
        self.directory.save_images(side, result.images, indices)

    def _summarize(self) -> None:
        """summary.json holds nothing that differs between equal runs; wall time goes to timing.json."""
        rows = [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]
        sides = {}
        for side in ("before", "guided", "after"):
            file = self.directory / f"evaluation_{side}.json"
            if file.exists():
                sides[side] = json.loads(file.read_text())
        train = self.recipe.train
        summary = {
            "name": self.recipe.name,
            "seed": self.recipe.run.seed,
            "model": self.recipe.model.path,
            "minutes": train.max_minutes,
            "epochs": self.trainer.epoch,
            "samples": self.trainer.epoch * train.groups * train.group_size,
            **{side: kept["summary"] for side, kept in sides.items()},
        }
        write_json(self.directory / "summary.json", summary)
        minutes = rows[-1]["elapsed_seconds"] / 60 if rows else 0.0
        write_json(self.directory / "timing.json", {"train_minutes": minutes, "peak_gigabytes": peak_gigabytes()})
        self.report.say(f"trained {self.trainer.epoch} epochs in {minutes:.1f} minutes, peak {peak_gigabytes():.1f} GB")
        if "before" in sides and "after" in sides:
            self._write_sample_index(sides["before"], sides["after"])

    def _write_sample_index(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        assert self.test_prompts is not None
        images = self.recipe.evaluation.images
        lines: list[str] = []
        for index, prompt_id in enumerate(after["prompt_ids"]):
            if index % images >= KEPT_PER_TASK:
                continue
            lines.append(
                json.dumps(
                    {
                        "file_name": f"{len(lines):05d}.png",
                        "prompt": self.test_prompts.prompts[prompt_id],
                        "tag": self.test_prompts.metadata[prompt_id]["tag"],
                        "seed": index,
                        "before": before["passed"][index],
                        "after": after["passed"][index],
                    }
                )
            )
        write_text(self.directory / "samples" / "metadata.jsonl", "\n".join(lines) + "\n")


def _text(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _check_same(recipe: Recipe, directory: RunDirectory) -> None:
    """A resumed run must be the same run. Raises ConfigError naming the keys that differ."""
    saved = build_recipe(yaml.safe_load((directory / "config.yaml").read_text()), recipe.name)

    def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {
            k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()
        }

    old, new = (flat(yaml.safe_load(dump_recipe(r))) for r in (saved, recipe))
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key) and key not in _FREE]
    if changed:
        raise ConfigError(
            f"--resume: {', '.join(f'{key} was {old.get(key)!r}, now {new.get(key)!r}' for key in changed)}: continue "
            "with the same settings, or start a new run"
        )
