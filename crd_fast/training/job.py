"""From a recipe to a run directory: evaluate, train, evaluate again, report. Ctrl-C and SIGTERM leave it resumable."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from torch import distributed as dist

from crd_fast import backbones
from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.data.prompts import assert_disjoint, load_prompts
from crd_fast.errors import ConfigError, CrdFastError, NonFiniteError
from crd_fast.evaluation import shapes_suite
from crd_fast.evaluation.report import write_report
from crd_fast.full_finetuning import FullCopies
from crd_fast.lora import LoRABank
from crd_fast.lora_file import read_adapter
from crd_fast.ranks import RankError, Ranks, lost
from crd_fast.rewards.scorer import RewardChoice, Scorer
from crd_fast.snapshots import BASE, TRAINED, ParameterSets
from crd_fast.training.checkpoint import CheckpointStore
from crd_fast.training.config import Recipe, dump_recipe
from crd_fast.training.embeddings import embed, model_key
from crd_fast.training.memory import keep_freed_memory, peak_gigabytes
from crd_fast.training.prepare import prepare
from crd_fast.training.progress import Reporter, epoch_note
from crd_fast.training.resume import EpochStart, check_same
from crd_fast.training.run_directory import RunDirectory
from crd_fast.training.stop import Interrupted, StopRequest
from crd_fast.training.summary import kept_indices, summarize
from crd_fast.training.tensorboard import Scalars
from crd_fast.training.trainer import Trainer
from crd_fast.whole_files import write_json, write_text


def run(recipe: Recipe, *, resume: bool = False, reporter: Reporter | None = None) -> Path:
    """Run a recipe to its report; returns the run directory. Under torchrun, every rank calls it.

    Raises CrdFastError for anything the user can mend, and Interrupted after a signal, when the run has
    saved a checkpoint from which `resume` continues.
    """
    device = _device(recipe.run.device)
    ranks = Ranks.from_environment(device, recipe.train.timeout_minutes)
    try:
        ranks.same("the recipe", dump_recipe(recipe))
        with ranks.together("opening the run directory"):
            directory = _open(recipe, resume, ranks)
        with reporter or (Reporter() if ranks.first else Reporter.silent()) as report, StopRequest() as stop:
            try:
                return _Job(recipe, directory, report, stop, ranks, device, resume).run()
            except Interrupted as stopped:
                report.say(f"{stopped}; continue with --resume run.dir={directory.path}")
                raise
            except torch.OutOfMemoryError as error:
                raise CrdFastError(
                    f"out of memory on {device}: lower train.micro_batch ({recipe.train.micro_batch}) or rollout.batch "
                    f"({recipe.rollout.batch}); {directory.path} can be continued with --resume ({error})"
                ) from error
            except dist.DistError as error:
                raise lost(ranks, error) from error
    finally:
        ranks.close()


def _device(wanted: str | None) -> torch.device:
    """The recipe's, or this rank's GPU, or the CPU."""
    if wanted is not None:
        return torch.device(wanted)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _open(recipe: Recipe, resume: bool, ranks: Ranks) -> RunDirectory:
    """The first rank finds or makes the directory, the others are told of it."""
    name = None
    failure: ConfigError | None = None
    if ranks.first:
        try:
            directory = RunDirectory.open(recipe.run.dir, recipe.name, resume=resume)
            if resume:
                check_same(recipe, directory)
            name = str(directory.path)
        except ConfigError as error:
            failure = error
    name = ranks.tell(name)
    if failure is not None:
        raise failure
    if name is None:
        raise RankError("the first rank could not open the run directory: see its message")
    return RunDirectory(Path(name))


class _Job:
    def __init__(
        self,
        recipe: Recipe,
        directory: RunDirectory,
        report: Reporter,
        stop: StopRequest,
        ranks: Ranks,
        device: torch.device,
        resume: bool,
    ) -> None:
        self.recipe, self.directory, self.report, self.stop = recipe, directory, report, stop
        self.ranks, self.device, self.resume = ranks, device, resume
        self.store = CheckpointStore(directory / "checkpoints", recipe.train.keep_checkpoints, ranks.control)
        with ranks.together("asking for the rewards"):
            self.scorer = Scorer(
                {name: RewardChoice(given.options, given.spec.on_error) for name, given in recipe.rewards.items()},
                timeout_seconds=60 * recipe.train.timeout_minutes,
            )
        self.train_prompts = load_prompts(recipe.data.prompts)
        self.test_prompts = load_prompts(recipe.data.test_prompts) if recipe.data.test_prompts else None
        for reward in self.scorer.rewards.values():
            self.train_prompts.require(reward.requires)
        if self.test_prompts is not None:
            assert_disjoint(self.train_prompts, self.test_prompts)
        elif recipe.evaluation.suite is not None:
            raise ConfigError("evaluation.suite is set but data.test_prompts is not: name the held-out prompts")
        with ranks.together("loading the model"):
            self.backbone = self._load_backbone()
        if device.type == "cpu":
            keep_freed_memory()
        self.sets = self._parameter_sets()
        embedded = self._embed()
        self.unconditional = embedded[:1]
        self.conditioning = embedded[1 : 1 + len(self.train_prompts)]
        self.test_conditioning = embedded[1 + len(self.train_prompts) :]
        prepared = prepare(self.sets, self.backbone, recipe, ranks, self.unconditional)
        self.trainer = Trainer(
            recipe,
            self.backbone,
            self.sets,
            prepared,
            self.train_prompts,
            self.conditioning,
            self.unconditional,
            self.scorer,
            stop,
            ranks,
        )

    def _load_backbone(self) -> Backbone:
        settings = self.recipe.model
        options = backbones.LoadOptions(
            device=self.device,
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[self.recipe.precision.dtype],
            max_sequence_length=settings.max_sequence_length,
            resolution=settings.resolution,
            frames=settings.frames,
            distilled_guidance=settings.distilled_guidance,
        )
        return backbones.load(settings.path, settings.family, options)

    def _parameter_sets(self) -> ParameterSets:
        recipe, lora = self.recipe, self.recipe.lora
        if recipe.train.parameters == "full":
            return FullCopies(self.backbone, empty=recipe.train.sharding != "replicate")
        bank = LoRABank(
            self.backbone.transformer,
            lora.targets or self.backbone.lora_targets,
            rank=lora.rank,
            alpha=lora.alpha,
            seed=recipe.run.seed,
        )
        bank.merges = lora.merge
        if lora.path is not None:
            bank.load(read_adapter(lora.path))
        return bank

    def _embed(self) -> Conditioning:
        model = self.recipe.model
        held_out = self.test_prompts.prompts if self.test_prompts is not None else ()
        prompts = ["", *self.train_prompts.prompts, *held_out]
        key = model_key(model.path, model.max_sequence_length, self.backbone.dtype)
        with self.ranks.together("embedding the prompts"):
            if self.ranks.first:  # the others find the file
                embed(self.backbone, prompts, self.directory / "embeddings", key)
        embedded = embed(self.backbone, prompts, self.directory / "embeddings", key)
        self.backbone.release_text_encoders()
        return embedded

    def run(self) -> Path:
        if self.ranks.first:
            write_text(self.directory / "config.yaml", dump_recipe(self.recipe))
            self.directory.write_environment(self.device, self.ranks.world)
        if self.resume:
            self._restore()
        self.report.say(f"run directory {self.directory.path}")
        with self.scorer:
            with self.ranks.together("trying the rewards"):
                self._try_rewards()
            self._learn()
        if self.ranks.first:
            minutes = summarize(self.directory, self.recipe, self.trainer.epoch, self.test_prompts)
            self.report.say(
                f"trained {self.trainer.epoch} epochs in {minutes:.1f} minutes, peak {peak_gigabytes():.1f} GB"
            )
            page = write_report(self.directory.path)
            self.report.say(f"report {page}")
        self.ranks.wait()
        return self.directory.path

    def _try_rewards(self) -> None:
        """What a reward lacks is better said now than after an evaluation and a rollout."""
        decoded = self.backbone.decode(torch.zeros(1, *self.backbone.latent_shape, device=self.device))
        shades = torch.linspace(0.1, 0.9, decoded.shape[-1]).expand(decoded.shape)
        self.scorer.try_out(shades, self.train_prompts.prompts[0], self.train_prompts.metadata[0])

    def _learn(self) -> None:
        """Evaluate, train, evaluate again."""
        if self.recipe.evaluation.suite is not None:
            self._evaluate("before", BASE)
            if self.recipe.evaluation.reference_guidance is not None:
                self._evaluate("guided", BASE, self.recipe.evaluation.reference_guidance)
        self._train()
        if self.ranks.first or not self.sets.light:  # adapters are whole on every rank, a sharded model is gathered
            self.sets.save(self.backbone, self.directory / self.sets.folder)
        if self.recipe.evaluation.suite is not None:
            self._evaluate("after", TRAINED)

    def _restore(self) -> None:
        epochs = 0
        if self.store.newest_path() is None:
            self.report.say("no checkpoint yet: starting from the beginning")
        else:
            path, values = self.store.latest(self.report.say)
            self.store.load(path, self.trainer.tensors())
            self.trainer.set_values(values)
            epochs = self.trainer.epoch
            self.report.say(f"resumed from {path.name} after {epochs} epochs")
        if self.ranks.first:
            self.directory.truncate_metrics(epochs)
        self.ranks.wait()

    def _train(self) -> None:
        train, trainer = self.recipe.train, self.trainer
        self.report.begin("training", train.epochs, trainer.epoch)
        started, elapsed_before = time.perf_counter(), self._elapsed_before()
        scalars = Scalars(self.directory / "tensorboard", trainer.epoch) if self.ranks.first else None
        start = None
        while trainer.epoch < train.epochs:
            del start  # its copies go before the next are made
            start = EpochStart(trainer)
            try:
                row = trainer.run_epoch()
            except Interrupted:
                self._save_interrupted(start)
                raise
            except NonFiniteError as error:
                self.store.finish()
                last = self.store.newest_path()
                raise NonFiniteError(f"{error}; last good checkpoint: {last or 'none yet'}") from error
            except RankError:
                raise  # a save that waits for a rank that is gone would not finish
            except CrdFastError:
                self.store.finish()
                raise
            row["elapsed_seconds"] = self.ranks.tell(elapsed_before + time.perf_counter() - started)
            if scalars is not None:
                self.directory.append_metrics(row)
                scalars.write(row)
            self.report.update(trainer.epoch, epoch_note(row), line=True)
            over = train.max_minutes is not None and row["elapsed_seconds"] > 60 * train.max_minutes
            if trainer.epoch % train.checkpoint_every == 0 or trainer.epoch == train.epochs or over:
                self._save()
            if over:
                self.report.say(f"train.max_minutes {train.max_minutes} reached after {trainer.epoch} epochs")
                break
        self.store.finish()
        if scalars is not None:
            scalars.close()

    def _elapsed_before(self) -> float:
        """Training seconds of the epochs a resumed run already has."""
        path = self.directory / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        return float(json.loads(rows[-1])["elapsed_seconds"]) if rows else 0.0

    def _save(self, *, wait: bool = False) -> None:
        def export(folder: Path) -> None:
            if self.sets.light:
                self.sets.save(self.backbone, folder)

        trainer = self.trainer
        self.store.save(trainer.epoch, trainer.tensors(), trainer.values(), export, wait=wait)

    def _save_interrupted(self, start: EpochStart) -> None:
        """A stopped epoch is begun again: what is saved is its start, where that is still known."""
        if start.restore(self.trainer):
            self._save(wait=True)
            self.report.say(f"saved after {self.trainer.epoch} epochs")
            return
        self.store.finish()
        last = self.store.newest_path()
        self.report.say(f"stopped inside an epoch's updates; {f'{last.name} is the last checkpoint' if last else ''}")

    def _evaluate(self, side: str, slot: str, guidance_scale: float | None = None) -> None:
        """Evaluate a slot and keep the result, unless an earlier start of this run has it."""
        file = self.directory / f"evaluation_{side}.json"
        if self.ranks.tell(file.exists()) and side != "after":
            return
        settings = self.recipe.evaluation
        assert self.test_prompts is not None  # checked when the job was made
        total = len(shapes_suite.choose_prompts(self.test_prompts, settings.images))
        self.report.begin(f"evaluating {side}", total)

        def advance(done: int) -> None:
            self.stop.check(self.ranks)
            self.report.update(min(done * self.ranks.world, total))

        with self.trainer.prepared.precisions.use("rollout"), self.sets.rollout(self.backbone, slot):
            pictures = shapes_suite.generate_images(
                self.backbone,
                self.test_prompts,
                self.test_conditioning,
                self.unconditional,
                self.ranks,
                images=settings.images,
                steps=settings.steps,
                guidance_scale=settings.guidance_scale if guidance_scale is None else guidance_scale,
                batch=settings.batch,
                seed=self.recipe.run.seed,
                on_batch=advance,
            )
        if not self.ranks.first:
            return
        result = shapes_suite.score(pictures, self.test_prompts, images=settings.images, seed=self.recipe.run.seed)
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
        indices = kept_indices(len(result.images), self.recipe.evaluation.images)
        self.directory.save_images(side, result.images, indices)


def _text(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
