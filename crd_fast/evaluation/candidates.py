"""What is evaluated: a model by itself, with a LoRA, or the states that a training run went through."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from crd_fast.errors import CheckpointError, ConfigError
from crd_fast.lora_file import WEIGHTS, find_adapter


@dataclass(frozen=True)
class Candidate:
    """One state of a model. folder: of its images; lora: adapter file, None for the model alone; epoch: after which
    the run was in this state, None where that is not known.
    """

    label: str
    folder: Path
    lora: Path | None = None
    epoch: int | None = None

    @cached_property
    def digest(self) -> str | None:
        """SHA-256 of the adapter file when it was first asked for: a run that goes on may remove it."""
        return None if self.lora is None else hashlib.sha256(self.lora.read_bytes()).hexdigest()


def run_config(folder: Path) -> dict[str, Any]:
    """A run directory's config.yaml. Raises ConfigError where there is none, or it is no recipe."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{folder} is no run directory (no config.yaml): give the folder that crd-fast train wrote")
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict) or "path" not in tree["model"]:
        raise ConfigError(f"{file} is no recipe: expected a model section with its path")
    return tree


@dataclass(frozen=True)
class OneStepGenerator:
    """What a run of crd-fast didr trained. path: of its model where that is not the run's `model.path`; start: share of
    the time range where its step begins.
    """

    path: str | None
    start: float


def generator_of(config: dict[str, Any]) -> OneStepGenerator | None:
    """Of a run's config.yaml; None where the run trained no one-step generator."""
    settings = config.get("generator")
    if not isinstance(settings, dict):
        return None
    return OneStepGenerator(settings.get("path"), float(settings.get("start", 1.0)))


def start_of_run(weights: Iterable[str | None]) -> float | None:
    """Where the step of the one-step generator begins that a run of crd-fast didr trained, of which `weights` are;
    None for other weights.
    """
    for path in weights:
        generator = None if path is None or not Path(path).exists() else generator_of(config_above(Path(path) / "any"))
        if generator is not None:
            return generator.start
    return None


def started_from(config: dict[str, Any]) -> Path | None:
    """The adapter that a run began with, of a one-step generator or of the model."""
    section, key = ("lora", "path") if generator_of(config) is None else ("generator", "lora")
    lora = (config.get(section) or {}).get(key)
    return None if lora is None else find_adapter(lora)


def run_candidates(run: Path, base: str, out: Path, which: str, start: Path | None = None) -> tuple[Candidate, ...]:
    """The base, the run's checkpoints where `which` is "all", and its final LoRA, with folders under `out`.

    base: the model that the run started from, with the adapter `start` where there was one. A last checkpoint
    that is equal to the final LoRA is left out.

    Raises CheckpointError for a run without adapters.
    """
    if which not in ("final", "all"):
        raise ConfigError(f"--checkpoints is {which!r}: expected 'final' or 'all'")
    found = [Candidate("base" if start is None else "start", out / "base", start, 0)]
    final = run / "lora" / WEIGHTS
    last = Candidate("final", out / "final", final, _epochs(run)) if final.is_file() else None
    if which == "all":
        for folder in sorted((run / "checkpoints").glob("epoch-*")):
            number = re.fullmatch(r"epoch-(\d+)", folder.name)
            if number is None or not (folder / WEIGHTS).is_file():
                continue
            candidate = Candidate(folder.name, out / folder.name, folder / WEIGHTS, int(number[1]))
            if last is None or candidate.digest != last.digest:
                found.append(candidate)
    if last is not None:
        found.append(last)
    if len(found) == 1:
        raise CheckpointError(
            f"{run} has no LoRA to evaluate: expected lora/{WEIGHTS} of a finished run, or checkpoints with "
            f"--checkpoints all; for the model that full fine-tuning leaves, give --model {base} --transformer {run}"
        )
    return tuple(found)


_SERVED_AS = {"remote": "reward", "legacy_remote": "server"}  # the option that says what a server scores


def trained_rewards(weights: Iterable[Path], config: dict[str, Any] | None) -> frozenset[str]:
    """Rewards that were trained on: from a run's config, or from those of the run directories that `weights` lie in.

    OCR is OCR, wherever it was computed. Rewards of weight 0 were looked at, not trained on. A DIDR run has one reward,
    under `reward`.
    """
    configs = [config or {}, *(config_above(path) for path in weights)]
    sections = [(str(name), section or {}) for tree in configs for name, section in (tree.get("rewards") or {}).items()]
    names = [_scorer_of(name, section) for name, section in sections if section.get("weight") != 0]
    names += [str(tree["reward"]["name"]) for tree in configs if tree.get("reward")]
    return frozenset(names)


def _scorer_of(name: str, section: Mapping[str, Any]) -> str:
    """The registered reward that a section of `rewards` trains on, whose label after a colon is free."""
    option = _SERVED_AS.get(name.partition(":")[0])
    return name if option is None else str(section.get(option, name))


def config_above(path: Path) -> dict[str, Any]:
    """Of the run directory that weights lie in, also those of a checkpoint; empty where they lie in none."""
    for folder in path.resolve().parents[:3]:
        if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file():
            return run_config(folder)
    return {}


def _epochs(run: Path) -> int | None:
    """Epochs of a run, from its metrics; a torn last line does not count."""
    file = run / "metrics.jsonl"
    epochs = None
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            epochs = int(json.loads(line)["epoch"]) + 1
        except (ValueError, KeyError, TypeError):
            break
    return epochs
