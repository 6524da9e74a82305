"""From a DIDR recipe to a run directory: images before, training, images after. A stop leaves it resumable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.data.prompts import PromptSet, assert_disjoint, load_prompts, shuffled_slice
from crd_fast.didr.networks import EMA, GENERATOR, Networks, OneStep
from crd_fast.didr.pictures import Advance, Painter
from crd_fast.didr.recipe import DIDRRecipe, dump_recipe
from crd_fast.didr.report import write_report
from crd_fast.didr.report_files import SWEEP
from crd_fast.didr.trainer import DIDRTrainer, stage_two_config
from crd_fast.errors import ConfigError, DataError, RewardError
from crd_fast.evaluation import shapes_suite
from crd_fast.progress import Reporter
from crd_fast.rewards import registry
from crd_fast.rewards.base import (
    BrokenRewardError,
    DifferentiableReward,
    PartialRewardError,
    score_batch,
    unknown_scores,
)
from crd_fast.rewards.custom import changed_code, code_digests
from crd_fast.training.checkpoint import CheckpointStore
from crd_fast.training.launch import Launch, Session, launch
from crd_fast.training.loop import EpochLoop, LoopSettings
from crd_fast.training.memory import keep_freed_memory, peak_gigabytes
from crd_fast.training.models import embed_prompts, load_backbone, load_generator
from crd_fast.training.run_directory import RunDirectory
from crd_fast.training.summary import kept_indices, read_sides, write_sample_index, write_timing
from crd_fast.whole_files import write_json, write_text

Paint = Callable[[list[int], Advance], torch.Tensor]
"""Prompt ids, and what to tell of images done -> images (N, 3, H, W)."""
FOLDERS = {"lora": "lora", "full": "transformer"}  # of the run directory, where the generator is saved


def run(recipe: DIDRRecipe, *, resume: bool = False, reporter: Reporter | None = None) -> Path:
    """Run a recipe to its summary; returns the run directory. Under torchrun, every rank calls it.

    Raises CrdFastError for anything the user can mend, and Interrupted after a signal, when the run has
    saved a checkpoint from which `resume` continues.
    """
    return launch(launch_settings(recipe), lambda session: work(recipe, session), resume=resume, reporter=reporter)


def launch_settings(recipe: DIDRRecipe) -> Launch:
    """What `launch` has to know of a recipe."""
    return Launch(
        name=recipe.name,
        run=recipe.run,
        dumped=dump_recipe(recipe),
        timeout_minutes=recipe.train.timeout_minutes,
        less_memory=f"train.micro_batch ({recipe.train.micro_batch}) or decode.micro_batch "
        f"({recipe.decode.micro_batch}), or set decode.recompute and acceleration.recompute",
        check_resumed=lambda directory: _check_resumed(recipe, directory),
    )


def work(recipe: DIDRRecipe, session: Session) -> Path:
    """A recipe to its summary and report in a session that has begun; returns the run directory."""
    return _Job(recipe, session).run()


def _check_resumed(recipe: DIDRRecipe, directory: RunDirectory) -> None:
    if (directory / SWEEP).exists():
        raise ConfigError(f"--resume: {directory.path} holds a sweep, not a run: continue it with --beta")
    recipe.check_resumed(directory)


class _Job:
    def __init__(self, recipe: DIDRRecipe, session: Session) -> None:
        self.recipe, self.session = recipe, session
        self.directory, self.ranks, self.report = session.directory, session.ranks, session.report
        recipe.train.micro_batches(self.ranks.world)
        self.reward = _differentiable(recipe)
        self.prompts = load_prompts(recipe.data.prompts)
        if self.reward is not None:
            self.prompts.require_for(self.reward)
        self.test_prompts = load_prompts(recipe.data.test_prompts) if recipe.data.test_prompts else None
        if self.test_prompts is not None:
            assert_disjoint(self.prompts, self.test_prompts)
            if self.reward is not None and recipe.evaluation.suite is None:
                self.test_prompts.require_for(self.reward)
        with self.ranks.together("loading the model"):
            backbone = load_backbone(recipe.model, recipe.precision.dtype, session.device)
            if backbone.frames is not None:
                raise ConfigError(f"model.path {recipe.model.path} makes videos: rewards with gradients see images")
            origin = None
            if recipe.generator.path is not None:
                origin = load_generator(recipe.generator.path, backbone, recipe.model, recipe.precision.dtype)
        if session.device.type == "cpu":
            keep_freed_memory()
        if recipe.decode.tiny is not None:
            with self.ranks.together("loading the tiny decoder"):
                backbone.use_tiny_decoder(recipe.decode.tiny)
        decoder = backbone.tiny_decoder or backbone.pipeline.vae
        # where it cannot do that itself, the pass as a whole is computed again all the same
        if recipe.decode.recompute and decoder._supports_gradient_checkpointing:
            decoder.enable_gradient_checkpointing()
        self.networks = Networks.build(recipe, backbone, origin)
        stage_two_config(recipe, self.networks, beta=1.0)  # a setting that the model does not allow is better said now
        held_out = self.test_prompts.prompts if self.test_prompts is not None else ()
        embedded = embed_prompts(
            backbone, recipe.model, ["", *self.prompts.prompts, *held_out], self.directory / "embeddings", self.ranks
        )
        self.unconditional, self.trained_on = embedded[:1], embedded[1 : 1 + len(self.prompts)]
        with self.ranks.together("trying the reward"):
            self._try_reward(backbone)
        # the prompts of the images before and after
        self.shown, self.painter = self.prompts, self._painter(self.trained_on)
        if self.test_prompts is not None:
            self.shown, self.painter = self.test_prompts, self._painter(embedded[1 + len(self.prompts) :])
        self.store = CheckpointStore(self.directory / "checkpoints", recipe.train.keep_checkpoints, self.ranks.control)

    def _painter(self, conditioning: Conditioning) -> Painter:
        generator = OneStep(self.networks, self.recipe.generator.start)
        return Painter(self.recipe, self.networks, generator, conditioning, self.unconditional, self.ranks)

    def _trainer(self, beta: float) -> DIDRTrainer:
        return DIDRTrainer(
            self.recipe,
            self.networks,
            self.prompts,
            self.trained_on,
            self.unconditional,
            self.reward,
            beta,
            self.session.stop,
            self.ranks,
        )

    def _try_reward(self, backbone: Backbone) -> None:
        """What a reward lacks is better said now than after the TA has warmed up."""
        if self.reward is None:
            return
        with torch.no_grad():
            decoded = backbone.decode_with_graph(torch.zeros(1, *backbone.latent_shape, device=self.session.device))
        shades = torch.linspace(0.1, 0.9, decoded.shape[-1], device=decoded.device).repeat(*decoded.shape[:-1], 1)
        shades.requires_grad_()
        self.reward.differentiable_scores(shades, self.prompts.prompts[:1], self.prompts.metadata[:1])

    def _beta(self) -> float:
        """The recipe's, or what an earlier start of this run has measured, or what is measured now; 1 without a reward,
        which it then weighs nothing."""
        algorithm, file = self.recipe.algorithm, self.directory / "beta.json"
        if self.reward is None:
            return 1.0
        if algorithm.beta is not None:
            return algorithm.beta
        if self.session.resume and self.ranks.tell(file.exists()):
            return self.ranks.tell(json.loads(file.read_text())["beta"] if self.ranks.first else 0.0)
        chosen = shuffled_slice(len(self.prompts), algorithm.beta_prompts, 0, self.recipe.run.seed)
        ids = chosen.repeat_interleave(algorithm.beta_images).tolist()
        painter, scale = self._painter(self.trained_on), algorithm.guidance_scale
        images = self._paint("measuring beta", ids, lambda ids, done: painter.many_steps(ids, done, scale))
        with self.ranks.together("measuring beta"):
            scores = self._rewards(self.prompts, images, ids)
            deviation = scores.view(-1, algorithm.beta_images).std(1).mean().item()
            beta = algorithm.beta_share * deviation
            if beta == 0:
                raise ConfigError(
                    f"algorithm.beta cannot be measured: {self.reward.name} is the same for all images of a prompt; "
                    "set it"
                )
        beta = self.ranks.tell(beta)
        if self.ranks.first:
            write_json(file, {"beta": beta, "deviation": deviation, "mean": scores.mean().item(), "images": len(ids)})
        self.report.say(f"beta {beta:.4g}: {algorithm.beta_share:g} of {self.reward.name}'s deviation {deviation:.4g}")
        return beta

    def run(self) -> Path:
        recipe, train = self.recipe, self.recipe.train
        if self.ranks.first:
            write_text(self.directory / "config.yaml", dump_recipe(recipe))
            code = code_digests({recipe.reward.name: recipe.reward.options} if recipe.reward is not None else {})
            for name in self.directory.write_environment(self.session.device, self.ranks.world, code):
                self.report.say(changed_code(name))
        try:
            beta = self._beta()
        except ConfigError:  # it has to be set, and a run that has begun keeps its settings: this one has not
            if self.ranks.first and not self.session.resume:
                (self.directory / "config.yaml").unlink()
            raise
        trainer = self._trainer(beta)
        loop = EpochLoop(
            self.session,
            self.store,
            trainer,
            LoopSettings(train.epochs, train.max_minutes, train.checkpoint_every),
            self._export,
            epoch_note,
            recipe.run.wandb,
        )
        if self.session.resume:
            loop.restore()
        self.report.say(f"run directory {self.directory.path}")
        self._evaluate("before", lambda ids, done: self.painter.one_step(GENERATOR, ids, done))
        scale = recipe.evaluation.guidance_scale
        self._evaluate("reference", lambda ids, done: self.painter.many_steps(ids, done, scale))
        loop.run()
        if train.towards_start:
            self.networks.own.towards_base(EMA, train.towards_start)
        if self.ranks.first or not self.networks.light:
            self._save(self.directory / FOLDERS[train.parameters])
        self._evaluate("after", lambda ids, done: self.painter.one_step(EMA, ids, done))
        if self.ranks.first:
            minutes = self._summarize(trainer)
            self.report.say(f"trained {trainer.epoch} epochs in {minutes:.1f} minutes, peak {peak_gigabytes():.1f} GB")
            self.report.say(f"report {write_report(self.directory.path)}")
        self.ranks.wait()
        return self.directory.path

    def _export(self, folder: Path) -> None:
        if self.networks.light:
            self._save(folder)

    def _save(self, folder: Path) -> None:
        """The moving average of the generator, in a form that diffusers loads."""
        self.networks.own.save(self.networks.origin, folder, EMA)

    # --- images before and after ---

    def _evaluate(self, side: str, paint: Paint) -> None:
        """Make a side's images, keep some, and score them, unless an earlier start of this run has done it.

        paint: prompt ids, and what to tell of images done.
        """
        file = self.directory / f"evaluation_{side}.json"
        if self.ranks.tell(file.exists()) and side != "after":
            return
        settings = self.recipe.evaluation
        if settings.suite is not None:
            ids = shapes_suite.choose_prompts(self.shown, settings.images)
        else:
            ids = [i % len(self.shown) for i in range(settings.images)]
        images = self._paint(f"images {side}", ids, paint)
        if not self.ranks.first:
            return
        scored = self._score(images, ids)
        self.directory.save_images(side, images, self._kept(len(ids)))
        write_json(file, scored)
        write_sample_index(self.directory, self.shown, self._kept(len(ids)), read_sides(self.directory))
        numbers = {name: value for name, value in scored["summary"].items() if isinstance(value, float)}
        self.report.say(f"{side}: " + "  ".join(f"{name} {value:.3f}" for name, value in numbers.items()))

    def _paint(self, name: str, ids: list[int], paint: Paint) -> torch.Tensor:
        """`paint(ids, ..)` under the progress display, on all ranks."""
        self.report.begin(name, len(ids))

        def advance(done: int) -> None:
            self.session.stop.check(self.ranks)
            self.report.update(min(done * self.ranks.world, len(ids)))

        return paint(ids, advance)

    def _score(self, images: torch.Tensor, ids: list[int]) -> dict[str, Any]:
        """What is written of a side: a summary, and of every image its prompt and whether it passed, or its score.

        With a suite, the summary has the training reward's mean too, of the images whose prompts it can score.
        """
        settings = self.recipe.evaluation
        if settings.suite is not None:
            found = shapes_suite.score(images, self.shown, images=settings.images, seed=self.recipe.run.seed)
            able = [i for i, prompt_id in enumerate(ids) if self.reward is not None and self._can_score(prompt_id)]
            if self.reward is not None and able:
                rewards, failed = self._rewards_or_reasons(images[able], [ids[i] for i in able])
                found.summary.update(self._mean(rewards, failed))
            return {"summary": found.summary, "passed": found.passed, "prompt_ids": found.prompt_ids}
        if self.reward is None:
            return {"summary": {"n": len(ids)}, "passed": [None] * len(ids), "prompt_ids": ids}
        rewards, failed = self._rewards_or_reasons(images, ids)
        scores = [None if row in failed else value for row, value in enumerate(rewards.tolist())]
        return {"summary": {"n": len(ids)} | self._mean(rewards, failed), "passed": scores, "prompt_ids": ids}

    def _mean(self, rewards: torch.Tensor, failed: dict[int, str]) -> dict[str, Any]:
        """For a summary: the mean of a side's rewards, or why there is none, as some of its images have no score."""
        assert self.reward is not None
        name = self.reward.name
        if not failed:
            return {name: rewards.mean().item()}
        reason = f"{len(failed)} of {len(rewards)} images have no score: {next(iter(failed.values()))}"
        self.report.say(f"{name}: {reason}")
        return {name: None, f"{name}_failed": reason}

    def _rewards_or_reasons(self, images: torch.Tensor, ids: list[int]) -> tuple[torch.Tensor, dict[int, str]]:
        """The training reward (N,) of shown prompts, and for each image without one why: a trained run is not lost for
        it. An error in a reward's own code is raised."""
        assert self.reward is not None
        try:
            return self._rewards(self.shown, images, ids), {}
        except BrokenRewardError:
            raise
        except PartialRewardError as error:
            return error.scores[self.reward.name], error.failures
        except RewardError as error:
            return unknown_scores(len(ids)), dict.fromkeys(range(len(ids)), str(error))

    def _can_score(self, prompt_id: int) -> bool:
        """Whether the training reward can score images of a prompt; a suite's signs have no shapes to judge."""
        assert self.reward is not None
        one = PromptSet((self.shown.prompts[prompt_id],), (self.shown.metadata[prompt_id],), self.shown.name)
        try:
            one.require_for(self.reward)
        except DataError:
            return False
        return True

    def _rewards(self, prompts: PromptSet, images: torch.Tensor, ids: list[int]) -> torch.Tensor:
        """The training reward (N,) of images (N, 3, H, W) of these prompts."""
        assert self.reward is not None
        texts, metadata = [prompts.prompts[i] for i in ids], [prompts.metadata[i] for i in ids]
        return score_batch(self.reward, images, texts, metadata)[self.reward.name]

    def _kept(self, count: int) -> list[int]:
        settings = self.recipe.evaluation
        return list(range(count)) if settings.suite is None else kept_indices(count, settings.images)

    def _summarize(self, trainer: DIDRTrainer) -> float:
        """summary.json, timing.json and the index of the images; returns the minutes of training."""
        recipe, sides = self.recipe, read_sides(self.directory)
        summary = {
            "name": recipe.name,
            "seed": recipe.run.seed,
            "model": recipe.model.path,
            "minutes": recipe.train.max_minutes,
            "epochs": trainer.epoch,
            "iterations": trainer.iteration,
            "samples": trainer.draws * recipe.train.batch,
            "towards_start": recipe.train.towards_start,
            **{side: kept["summary"] for side, kept in sides.items()},
        }
        write_json(self.directory / "summary.json", summary)
        return write_timing(self.directory)


def epoch_note(row: dict[str, Any]) -> str:
    """What a glance at an epoch should tell."""
    parts = [f"TA {row['ta_loss']:.4f} ({row['ta_loss_before']:.4f} to {row['ta_loss_after']:.4f})"]
    if "gap" in row:
        parts.append(f"gap {row['gap']:.4f}")
    for name, value in row.get("reward", {}).items():
        parts.append(f"{name} {value:.4f}  correction {row['correction']:.4f}")
    return "  ".join([*parts, f"{row['samples_per_second']:.1f} samples/s"])


def _differentiable(recipe: DIDRRecipe) -> DifferentiableReward | None:
    """The recipe's reward, if it has one. Raises ConfigError when it has no gradient."""
    if recipe.reward is None:
        return None
    reward = registry.build(recipe.reward.name, recipe.reward.options)
    if not reward.differentiable or not isinstance(reward, DifferentiableReward):
        raise ConfigError(
            f"reward.name is {recipe.reward.name!r}, which has no gradient in the image: use one that has, such as "
            "hpsv2, pickscore, imagereward, clipscore or aesthetic; one of your own says that it has by an attribute, "
            "differentiable = True"
        )
    return reward
