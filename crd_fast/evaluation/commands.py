"""What the options of `crd-fast score` and `crd-fast eval` become."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from crd_fast.errors import ConfigError, RewardError, nearest
from crd_fast.evaluation import suites
from crd_fast.evaluation.candidates import (
    Candidate,
    generator_of,
    run_candidates,
    run_config,
    start_of_run,
    started_from,
    trained_rewards,
)
from crd_fast.evaluation.evaluate import evaluate
from crd_fast.evaluation.models import find_transformer
from crd_fast.evaluation.scoring import build_options, folder_prompts, score_files, version_of
from crd_fast.evaluation.settings import Evaluation, Settings
from crd_fast.lora_file import find_adapter
from crd_fast.ranks import choose_device
from crd_fast.rewards import registry
from crd_fast.settings import read_sections


def run_score(options: argparse.Namespace) -> int:
    """Print the scores; 1 when there are images without one."""
    if options.batch < 1:
        raise ConfigError(f"--batch is {options.batch}: expected at least 1")
    names = _names(options.rewards)
    given = _sections(options.options, names)
    built = {name: build_options(name, given.get(name, {})) for name in names}
    prompts, files = folder_prompts(options.folder)
    rewards = {name: registry.build(name, built[name]) for name in names}
    for reward in rewards.values():
        prompts.require_for(reward)
    result: dict[str, Any] = {"scores": {}, "diagnostics": {}, "failures": {}, "versions": {}}
    for name, reward in rewards.items():
        scores = score_files(reward, files, prompts.prompts, prompts.metadata, options.batch)
        if scores.reason is not None:
            raise RewardError(scores.reason)
        result["scores"][name] = scores.values[name]
        result["diagnostics"][name] = {key: values for key, values in scores.values.items() if key != name}
        result["failures"][name] = [
            {"index": index, "file_name": prompts.metadata[index]["file_name"], "reason": why}
            for index, why in sorted(scores.failures.items())
        ]
        result["versions"][name] = version_of(name, built[name])
    print(json.dumps(result) if options.json else _listed(result))
    return 1 if any(result["failures"].values()) else 0


def _listed(result: dict[str, Any]) -> str:
    """Means and failures as text; a column with an image that has no score has no mean."""
    lines = []
    for name, values in result["scores"].items():
        columns = {name: values} | {f"{name}/{key}": column for key, column in result["diagnostics"][name].items()}
        for column, numbers in columns.items():
            whole = None not in numbers
            mean = f"{sum(numbers) / len(numbers):.4f}" if whole else "n/a"
            lines.append(f"{column:32} {mean:>9}  of {len(numbers)} images")
        lines += [f"  {failure['file_name']}: {failure['reason']}" for failure in result["failures"][name]]
    return "\n".join(lines)


def run_eval(options: argparse.Namespace) -> int:
    """Evaluate; 130 after Ctrl-C, when the same command goes on."""
    evaluation = _evaluation(options)
    try:
        evaluate(evaluation, choose_device(options.device))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here")
        return 130
    if int(os.environ.get("RANK", "0")) == 0:
        print((evaluation.out / "table.md").read_text(encoding="utf-8"), end="")
    return 0


def _evaluation(options: argparse.Namespace) -> Evaluation:
    """The evaluation that the options ask for. Raises ConfigError for those that do not go together."""
    suite = suites.suite_named(options.suite)
    run: Path | None = options.run_directory
    if (run is None) == (options.model is None):
        raise ConfigError("give either --model, with --lora or without, or --run with a run directory")
    if run is not None and options.lora is not None:
        raise ConfigError("--lora goes with --model: --run has the LoRAs of the run")
    if run is not None and options.transformer is not None:
        raise ConfigError("--transformer goes with --model, the pipeline that it belongs to")
    if run is None and options.checkpoints != "final":
        raise ConfigError("--checkpoints goes with --run")
    config = run_config(run) if run is not None else None
    settings = _settings(options, suite, config or {})
    file = options.prompts
    if file is None and config is not None and suite.name == "shapes":
        file = (config.get("data") or {}).get("test_prompts")
    prompts = suites.suite_prompts(suite, file)
    for name in ("scorers", "options"):
        if suite.name == "shapes" and getattr(options, name):
            raise ConfigError(f"--{name} does not go with suite shapes, which has scorers of its own")
    scorers = tuple(_names(options.scorers)) if options.scorers else suite.scorers
    out = options.out or (run / f"eval-{suite.name}" if run is not None else Path("evaluations") / suite.name)
    if run is not None:
        candidates = run_candidates(run, settings.model, out, options.checkpoints, started_from(config or {}))
    else:
        candidates = (_candidate(options, out),)
    weights = [] if run is not None else [candidate.lora for candidate in candidates if candidate.lora is not None]
    if settings.transformer is not None:
        weights.append(find_transformer(settings.transformer))
    return Evaluation(
        suite=suite,
        prompts=prompts,
        settings=settings,
        candidates=candidates,
        out=out,
        scorers=scorers,
        options=_sections(options.options, scorers),
        trained=trained_rewards(weights, config),
        run=run,
    )


def _candidate(options: argparse.Namespace, out: Path) -> Candidate:
    """The model with what goes with it, labelled by that."""
    if options.lora is not None:
        return Candidate("LoRA", out, find_adapter(options.lora))
    return Candidate("base" if options.transformer is None else "fine-tuned", out)


def _settings(options: argparse.Namespace, suite: suites.Suite, config: dict[str, Any]) -> Settings:
    """Options first, then the run's own settings, then the suite's."""
    shapes = suite.name == "shapes"
    if shapes and options.images_per_prompt is not None:
        raise ConfigError("suite shapes counts its images by task: give --images-per-task")
    if not shapes and options.images_per_task is not None:
        raise ConfigError(f"suite {suite.name} counts its images by prompt: give --images-per-prompt")
    model = config.get("model") or {}
    generator = generator_of(config)
    start_share = first(options.one_step, None if generator is None else generator.start)
    if start_share is None and options.steps is None:
        start_share = start_of_run([options.lora, options.transformer])
    if start_share is not None:
        for name in ("steps", "guidance_scale"):
            if getattr(options, name) is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} does not go with one-step generators, such as those of crd-fast didr"
                )
    held_out = (config.get("evaluation") or {}) if shapes else {}
    on_gpu = (options.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")

    images = options.images_per_task if shapes else options.images_per_prompt
    return Settings(
        model=first(options.model, None if generator is None else generator.path, model.get("path")),
        steps=1 if start_share is not None else first(options.steps, held_out.get("steps"), suite.steps),
        images=first(images, held_out.get("images"), suite.images),
        transformer=options.transformer,
        guidance_scale=None
        if start_share is not None
        else first(options.guidance_scale, held_out.get("guidance_scale")),
        resolution=first(options.resolution, model.get("resolution"), suite.resolution),
        max_sequence_length=first(options.max_sequence_length, model.get("max_sequence_length")),
        distilled_guidance=model.get("distilled_guidance"),
        batch=first(options.batch, held_out.get("batch"), 64 if shapes else 16),
        seed=first(options.seed, (config.get("run") or {}).get("seed") if shapes else None, 0),
        dtype=first(options.dtype, (config.get("precision") or {}).get("dtype"), "bf16" if on_gpu else "fp32"),
        start_share=start_share,
    )


def first(*values: Any) -> Any:
    """The first that is given."""
    return next((value for value in values if value is not None), None)


def _sections(file: Path | None, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The options file's sections. Raises ConfigError for one of a reward that is not scored with."""
    sections = read_sections(file, "options file")
    for name in sections:
        if name not in names:
            raise ConfigError(
                f"options file {file} has a section {name!r}, which is not among the rewards{nearest(name, names)}"
            )
    return sections


def _names(text: str) -> list[str]:
    """Names of rewards. Raises ConfigError for one that is not known, naming the nearest."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"rewards are {text!r}: expected different names, separated by commas")
    for name in names:
        registry.options_type(name)
    return names
