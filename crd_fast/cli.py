"""The `crd-fast` command. Exit code 2 is an error the message tells how to mend."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from crd_fast.errors import CrdFastError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest:
        # overrides may also follow an option; everything else is a mistake
        stray = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]
        if stray:
            parser.error(f"unrecognized arguments: {' '.join(stray)}")
        options.overrides += rest
    _quiet_libraries()
    try:
        return options.run(options)
    except CrdFastError as error:
        print(f"crd-fast: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="crd-fast",
        description="Reinforcement learning of diffusion and flow models from the forward process.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser("train", help="train a recipe and write its report")
    train.add_argument("recipe", help="YAML file, such as recipes/shapes.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.lr=1e-4 run.seed=1")
    train.add_argument("--resume", action="store_true", help="continue from the last whole checkpoint")
    train.set_defaults(run=_train)

    sample = commands.add_parser("sample", help="PNGs from a model, with a trained LoRA or without")
    sample.add_argument("--model", required=True, help="pipeline folder or hub id")
    sample.add_argument("--lora", help="folder with pytorch_lora_weights.safetensors, or a run directory")
    sample.add_argument("--prompt", required=True, action="append", help="may be given several times")
    sample.add_argument("--out", type=Path, default=Path("samples"), help="folder for the PNGs (default: samples)")
    sample.add_argument("--count", type=int, default=1, help="images per prompt")
    sample.add_argument("--steps", type=int, default=20)
    sample.add_argument("--guidance-scale", type=float, default=None, help="as in the pipeline; default: none")
    sample.add_argument("--max-sequence-length", type=int, default=None, help="text tokens of a T5 encoder")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--device", default=None)
    sample.set_defaults(run=_sample)

    doctor = commands.add_parser("doctor", help="device, versions, extension, backends, and what is missing")
    doctor.set_defaults(run=_doctor)
    return parser


def _quiet_libraries() -> None:
    """Keep the model libraries' notices about optional packages out of our output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _need_training_extra() -> None:
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise CrdFastError(f'{error}: this command needs pip install "crd-fast[train]"') from error
    from diffusers.utils import logging

    logging.disable_progress_bar()


def _train(options: argparse.Namespace) -> int:
    from crd_fast.training.config import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    _need_training_extra()
    from crd_fast.training.job import run
    from crd_fast.training.stop import Interrupted

    try:
        run(recipe, resume=options.resume)
    except Interrupted:
        return 0
    return 0


def _sample(options: argparse.Namespace) -> int:
    _need_training_extra()
    from crd_fast.sampling import sample_to_folder

    files = sample_to_folder(
        model=options.model,
        lora=options.lora,
        prompts=options.prompt,
        out=options.out,
        count=options.count,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        max_sequence_length=options.max_sequence_length,
        seed=options.seed,
        device=options.device,
    )
    for file in files:
        print(file)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from crd_fast.doctor import report

    text, healthy = report()
    print(text)
    return 0 if healthy else 2
