"""What the options of `crd-fast score` and `crd-fast eval` become."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from crd_fast.errors import ConfigError, RewardError
from crd_fast.evaluation import suites
from crd_fast.evaluation.candidates import Candidate, run_candidates, run_config, trained_rewards
from crd_fast.evaluation.evaluate import evaluate
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
    given = read_sections(options.options, "options file")
    prompts, files = folder_prompts(options.folder)
    built = {name: build_options(name, given.get(name, {})) for name in names}
    rewards = {name: registry.build(name, built[name]) for name in names}
    for reward in rewards.values():
        prompts.require(reward.requires)
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
    if run is None and options.checkpoints != "final":
        raise ConfigError("--checkpoints goes with --run")
    config = run_config(run) if run is not None else None
    settings = _settings(options, suite, config or {})
    file = options.prompts
    if file is None and config is not None and suite.name == "shapes":
        file = (config.get("data") or {}).get("test_prompts")
    prompts = suites.suite_prompts(suite, file)
    if suite.name == "shapes" and options.scorers:
        raise ConfigError("--scorers does not go with suite shapes, which has its own")
    out = options.out or (run / f"eval-{suite.name}" if run is not None else Path("evaluations") / suite.name)
    if run is not None:
        candidates = run_candidates(run, out, options.checkpoints)
    else:
        lora = None if options.lora is None else find_adapter(options.lora)
        candidates = (Candidate("base" if lora is None else "LoRA", out, lora),)
    return Evaluation(
        suite=suite,
        prompts=prompts,
        settings=settings,
        candidates=candidates,
        out=out,
        scorers=tuple(_names(options.scorers)) if options.scorers else suite.scorers,
        options=read_sections(options.options, "options file"),
        trained=trained_rewards(options.lora, config),
        run=run,
    )


def _settings(options: argparse.Namespace, suite: suites.Suite, config: dict[str, Any]) -> Settings:
    """Options first, then the run's own settings, then the suite's."""
    shapes = suite.name == "shapes"
    if shapes and options.images_per_prompt is not None:
        raise ConfigError("suite shapes counts its images by task: give --images-per-task")
    if not shapes and options.images_per_task is not None:
        raise ConfigError(f"suite {suite.name} counts its images by prompt: give --images-per-prompt")
    model = config.get("model") or {}
    held_out = (config.get("evaluation") or {}) if shapes else {}
    on_gpu = (options.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")

    def first(*values: Any) -> Any:
        return next((value for value in values if value is not None), None)

    images = options.images_per_task if shapes else options.images_per_prompt
    return Settings(
        model=first(options.model, model.get("path")),
        steps=first(options.steps, held_out.get("steps"), suite.steps),
        images=first(images, held_out.get("images"), suite.images),
        guidance_scale=first(options.guidance_scale, held_out.get("guidance_scale")),
        resolution=first(options.resolution, model.get("resolution"), suite.resolution),
        max_sequence_length=first(options.max_sequence_length, model.get("max_sequence_length")),
        distilled_guidance=model.get("distilled_guidance"),
        batch=first(options.batch, held_out.get("batch"), 64 if shapes else 16),
        seed=first(options.seed, (config.get("run") or {}).get("seed") if shapes else None, 0),
        dtype=first(options.dtype, (config.get("precision") or {}).get("dtype"), "bf16" if on_gpu else "fp32"),
    )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"rewards are {text!r}: expected different names, separated by commas")
    return names
