"""From a recipe to a run directory: evaluate, train, evaluate again, report. Ctrl-C and SIGTERM leave it resumable."""

from __future__ import annotations

from pathlib import Path

import torch

from crd_fast.data.prompts import assert_disjoint, load_prompts
from crd_fast.errors import ConfigError
from crd_fast.evaluation import shapes_suite
from crd_fast.evaluation.report import write_report
from crd_fast.full_finetuning import FullCopies
from crd_fast.lora import LoRABank
from crd_fast.lora_file import read_adapter
from crd_fast.rewards.custom import changed_code, code_digests
from crd_fast.rewards.scorer import RewardChoice, Scorer
from crd_fast.snapshots import BASE, TRAINED, ParameterSets
from crd_fast.training.checkpoint import CheckpointStore
from crd_fast.training.config import Recipe, dump_recipe
from crd_fast.training.launch import Launch, Session, launch
from crd_fast.training.loop import EpochLoop, LoopSettings
from crd_fast.training.memory import keep_freed_memory, peak_gigabytes
from crd_fast.training.models import embed_prompts, load_backbone
from crd_fast.training.prepare import prepare
from crd_fast.training.progress import Reporter, epoch_note
from crd_fast.training.resume import check_same
from crd_fast.training.summary import kept_indices, summarize
from crd_fast.training.trainer import Trainer
from crd_fast.whole_files import write_json, write_text


def run(recipe: Recipe, *, resume: bool = False, reporter: Reporter | None = None) -> Path:
    """Run a recipe to its report; returns the run directory. Under torchrun, every rank calls it.

    Raises CrdFastError for anything the user can mend, and Interrupted after a signal, when the run has
    saved a checkpoint from which `resume` continues.
    """
    settings = Launch(
        name=recipe.name,
        run=recipe.run,
        dumped=dump_recipe(recipe),
        timeout_minutes=recipe.train.timeout_minutes,
        less_memory=f"train.micro_batch ({recipe.train.micro_batch}) or rollout.batch ({recipe.rollout.batch})",
        check_resumed=lambda directory: check_same(recipe, directory),
    )
    return launch(settings, lambda session: _Job(recipe, session).run(), resume=resume, reporter=reporter)


class _Job:
    def __init__(self, recipe: Recipe, session: Session) -> None:
        self.recipe, self.session = recipe, session
        directory, ranks, device = session.directory, session.ranks, session.device
        self.directory, self.report, self.ranks, self.device = directory, session.report, ranks, device
        self.store = CheckpointStore(directory / "checkpoints", recipe.train.keep_checkpoints, ranks.control)
        with ranks.together("asking for the rewards"):
            self.scorer = Scorer(
                {name: RewardChoice(given.options, given.spec.on_error) for name, given in recipe.rewards.items()},
                timeout_seconds=60 * recipe.train.timeout_minutes,
            )
        self.train_prompts = load_prompts(recipe.data.prompts)
        self.test_prompts = load_prompts(recipe.data.test_prompts) if recipe.data.test_prompts else None
        for reward in self.scorer.rewards.values():
            self.train_prompts.require_for(reward)
        if self.test_prompts is not None:
            assert_disjoint(self.train_prompts, self.test_prompts)
        elif recipe.evaluation.suite is not None:
            raise ConfigError("evaluation.suite is set but data.test_prompts is not: name the held-out prompts")
        with ranks.together("loading the model"):
            self.backbone = load_backbone(recipe.model, recipe.precision.dtype, device)
            self._check_guidance()
        if device.type == "cpu":
            keep_freed_memory()
        self.sets = self._parameter_sets()
        held_out = self.test_prompts.prompts if self.test_prompts is not None else ()
        embedded = embed_prompts(
            self.backbone, recipe.model, ["", *self.train_prompts.prompts, *held_out], directory / "embeddings", ranks
        )
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
            session.stop,
            ranks,
        )

    def _check_guidance(self) -> None:
        """Raises ConfigError for a scale that the family does not know, before anything is sampled."""
        if self.recipe.algorithm.kl_coef > 0:
            self.backbone.is_guided(self.recipe.algorithm.guidance_scale)
        for settings in (self.recipe.rollout, self.recipe.evaluation):
            if settings.guidance_scale is not None:
                self.backbone.is_guided(settings.guidance_scale)

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

    def run(self) -> Path:
        if self.ranks.first:
            write_text(self.directory / "config.yaml", dump_recipe(self.recipe))
            code = code_digests({name: given.options for name, given in self.recipe.rewards.items()})
            for name in self.directory.write_environment(self.device, self.ranks.world, code):
                self.report.say(changed_code(name))
        loop = self._loop()
        if self.session.resume:
            loop.restore()
        self.report.say(f"run directory {self.directory.path}")
        with self.scorer:
            with self.ranks.together("trying the rewards"):
                self._try_rewards()
            self._learn(loop)
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

    def _learn(self, loop: EpochLoop) -> None:
        """Evaluate, train, evaluate again."""
        if self.recipe.evaluation.suite is not None:
            # what training begins with: an adapter that the run goes on with is not of its making
            self._evaluate("before", BASE if self.recipe.lora.path is None else TRAINED)
            if self.recipe.evaluation.reference_guidance is not None:
                self._evaluate("guided", BASE, self.recipe.evaluation.reference_guidance)
        loop.run()
        if self.ranks.first or not self.sets.light:  # adapters are whole on every rank, a sharded model is gathered
            self.sets.save(self.backbone, self.directory / self.sets.folder)
        if self.recipe.evaluation.suite is not None:
            self._evaluate("after", TRAINED)

    def _loop(self) -> EpochLoop:
        def export(folder: Path) -> None:
            if self.sets.light:
                self.sets.save(self.backbone, folder)

        train = self.recipe.train
        settings = LoopSettings(train.epochs, train.max_minutes, train.checkpoint_every)
        return EpochLoop(self.session, self.store, self.trainer, settings, export, epoch_note, self.recipe.run.wandb)

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
            self.session.stop.check(self.ranks)
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
