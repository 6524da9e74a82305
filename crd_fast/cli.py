"""The `crd-fast` command. Exit code 2 is an error the message tells how to mend."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from crd_fast.errors import ConfigError, CrdFastError, exhausted, nearest


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
    except KeyboardInterrupt:  # where nothing handles it better, such as while libraries are loaded
        print("crd-fast: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        reason = exhausted(error)
        if reason is None:
            raise
        print(f"crd-fast: {reason}", file=sys.stderr)
        return 2


def console() -> NoReturn:
    """`main` as a process of its own, which a thread of a reward can neither keep nor turn into a crash as it ends."""
    code: int | str | None
    try:
        code = main()
    except SystemExit as end:  # of the parser
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    workers = sys.modules.get("crd_fast.rewards.workers")
    if workers is not None and workers.threads_left():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else code is not None)
    sys.exit(code)


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

    didr = commands.add_parser("didr", help="train a one-step generator with a diffused reward")
    didr.add_argument("recipe", help="YAML file, such as recipes/shapes_didr.yaml")
    didr.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.lr=1e-5 algorithm.beta=0.1")
    didr.add_argument("--resume", action="store_true", help="continue from the last whole checkpoint")
    didr.add_argument("--beta", nargs="+", metavar="NUMBER", help="a sweep: one run for each algorithm.beta")
    didr.add_argument("--reward-at", nargs="+", metavar="WAY", help="and for each algorithm.reward_at, with --beta")
    didr.set_defaults(run=_didr)

    sample = commands.add_parser("sample", help="PNGs from a model, with a trained LoRA or without")
    sample.add_argument("--model", required=True, help="pipeline folder or hub id")
    sample.add_argument("--transformer", metavar="FOLDER", help="full fine-tuning's model or run directory")
    sample.add_argument("--lora", help="folder with pytorch_lora_weights.safetensors, or a run directory")
    sample.add_argument("--prompt", required=True, action="append", help="may be given several times")
    sample.add_argument("--out", type=Path, default=Path("samples"), help="folder for the PNGs (default: samples)")
    sample.add_argument("--count", type=int, default=1, help="images per prompt")
    sample.add_argument("--steps", type=int, help="default: 20, and one of what crd-fast didr trained")
    _add_one_step(sample)
    sample.add_argument("--guidance-scale", type=float, default=None, help="as in the pipeline; default: none")
    sample.add_argument("--max-sequence-length", type=int, default=None, help="text tokens of a T5 encoder")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--device", default=None)
    sample.set_defaults(run=_sample)

    serve = commands.add_parser(
        "serve-reward",
        help="compute rewards for other machines",
        description="Serve rewards over HTTP until SIGTERM. A run asks for them with the reward 'remote'.",
    )
    serve.add_argument("rewards", nargs="+", metavar="reward", help="such as ocr jpeg_compressibility")
    serve.add_argument("--options", type=Path, metavar="FILE", help="YAML: a section of options for each reward")
    serve.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="if not loopback, needs a token")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: 8000)")
    serve.add_argument("--token-file", type=Path, metavar="FILE", help="bearer token; else CRD_FAST_REWARD_TOKEN")
    for name, default, text in (
        ("workers", 1, "processes, each with models of its own"),
        ("queue", 256, "requests that may wait; more get 503"),
        ("max-body-mb", 32.0, "of a request, in MiB"),
        ("max-pixels", 2**22, "of an image"),
        ("body-seconds", 30.0, "for sending a request"),
        ("score-seconds", 600.0, "for scoring a request"),
        ("grace-seconds", 30.0, "for work under way at SIGTERM"),
    ):
        text += " (default: %(default)s)"
        serve.add_argument(f"--{name}", type=type(default), default=default, metavar="N", help=text)
    serve.set_defaults(run=_serve_reward)

    score = commands.add_parser("score", help="scores of the images in a folder")
    score.add_argument("rewards", help="names, separated by commas, such as ocr,geneval")
    score.add_argument("folder", type=Path, help="with metadata.jsonl, rows {file_name, prompt, ...}")
    score.add_argument("--json", action="store_true", help="print every score instead of means")
    score.add_argument("--options", type=Path, metavar="FILE", help="YAML: a section of options for each reward")
    score.add_argument("--batch", type=int, default=32, help="images at a time (default: 32)")
    score.set_defaults(run=_score)

    evaluate = commands.add_parser("eval", help="make a suite's images, score them, write tables and a page")
    evaluate.add_argument("--suite", required=True, help="shapes, geneval, ocr or drawbench")
    evaluate.add_argument("--model", help="pipeline folder or hub id")
    evaluate.add_argument("--transformer", metavar="FOLDER", help="full fine-tuning's model or run directory")
    evaluate.add_argument("--lora", help="LoRA folder or file, or a run directory")
    evaluate.add_argument("--run", dest="run_directory", type=Path, help="run directory: its base and its final LoRA")
    evaluate.add_argument("--checkpoints", default="final", help="with --run: final, or all for every checkpoint too")
    evaluate.add_argument("--prompts", help="the suite's prompts, .jsonl or .txt")
    evaluate.add_argument("--out", type=Path, help="default: <run>/eval-<suite>, or evaluations/<suite>")
    evaluate.add_argument("--scorers", help="rewards to score with instead of the suite's, separated by commas")
    evaluate.add_argument("--options", type=Path, metavar="FILE", help="YAML: a section of options for each reward")
    evaluate.add_argument("--guidance-scale", type=float, help="as in the pipeline; default: none")
    evaluate.add_argument("--steps", type=int)
    _add_one_step(evaluate)
    evaluate.add_argument("--resolution", type=int, help="pixels")
    evaluate.add_argument("--max-sequence-length", type=int, help="text tokens of a T5 encoder")
    evaluate.add_argument("--images-per-prompt", type=int)
    evaluate.add_argument("--images-per-task", type=int, help="suite shapes only")
    evaluate.add_argument("--batch", type=int, help="images at a time")
    evaluate.add_argument("--seed", type=int)
    evaluate.add_argument("--dtype", help="fp32 or bf16")
    evaluate.add_argument("--device")
    evaluate.set_defaults(run=_eval)

    doctor = commands.add_parser("doctor", help="device, versions, extension, backends, and what is missing")
    doctor.set_defaults(run=_doctor)
    return parser


def _quiet_libraries() -> None:
    """Keep the model libraries' notices about optional packages out of our output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # torchao warns at its import of kernels for other machines, and of a registration that torch no longer needs
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


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


def _didr(options: argparse.Namespace) -> int:
    if options.beta is not None or options.reward_at is not None:
        return _didr_sweep(options)
    from crd_fast.didr.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    _need_training_extra()
    from crd_fast.didr.job import run
    from crd_fast.training.stop import Interrupted

    try:
        run(recipe, resume=options.resume)
    except Interrupted:
        return 0
    return 0


def _didr_sweep(options: argparse.Namespace) -> int:
    if options.beta is None:
        raise ConfigError("--reward-at belongs to a sweep, with --beta; for one run use algorithm.reward_at=...")
    _need_training_extra()
    from crd_fast.didr.sweep import read_betas, read_values, sweep
    from crd_fast.training.stop import Interrupted

    betas = read_betas(read_values(options.beta, options.overrides, "--beta"))
    rewards_at = read_values(options.reward_at, options.overrides, "--reward-at") if options.reward_at else []
    try:
        sweep(options.recipe, options.overrides, betas, rewards_at, resume=options.resume)
    except Interrupted:
        return 0
    return 0


def _add_one_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--one-step",
        type=float,
        nargs="?",
        const=1.0,
        metavar="SHARE",
        help="of a one-step generator: where its step begins in the time range (default: 1, pure noise)",
    )


def _sample(options: argparse.Namespace) -> int:
    _need_training_extra()
    from crd_fast.sampling import sample_to_folder

    files = sample_to_folder(
        model=options.model,
        transformer=options.transformer,
        lora=options.lora,
        prompts=options.prompt,
        out=options.out,
        count=options.count,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        max_sequence_length=options.max_sequence_length,
        seed=options.seed,
        device=options.device,
        one_step=options.one_step,
    )
    try:
        for file in files:
            print(file, flush=True)
    except KeyboardInterrupt:
        print(f"stopped; the images that were made stay in {options.out}")
        return 130
    return 0


def _serve_reward(options: argparse.Namespace) -> int:
    try:
        from crd_fast.rewards.remote.server import serve
    except ImportError as error:
        raise CrdFastError(f'{error}: this command needs pip install "crd-fast[serve]"') from error
    from crd_fast.rewards.remote.serve_settings import ServeSettings, read_token

    names = ("host", "port", "workers", "queue", "max_body_mb", "max_pixels")
    seconds = ("body_seconds", "score_seconds", "grace_seconds")
    settings = ServeSettings(
        rewards=_reward_options(options.rewards, options.options),
        token=read_token(options.token_file),
        **{name: getattr(options, name) for name in names + seconds},
    )
    serve(settings)
    return 0


def _reward_options(names: Sequence[str], file: Path | None) -> dict[str, Any]:
    """Each reward's options, from its section of a YAML file where there is one."""
    from crd_fast import settings
    from crd_fast.rewards import registry

    sections = settings.read_sections(file, "options file")
    for name in sections:
        if name not in names:
            raise ConfigError(f"options file {file} has a section {name!r}, which is not served{nearest(name, names)}")
    return {name: settings.build(registry.options_type(name), sections.get(name, {}), name) for name in names}


def _score(options: argparse.Namespace) -> int:
    from crd_fast.evaluation.commands import run_score

    return run_score(options)


def _eval(options: argparse.Namespace) -> int:
    _need_training_extra()
    from crd_fast.evaluation.commands import run_eval

    return run_eval(options)


def _doctor(options: argparse.Namespace) -> int:
    from crd_fast.doctor import report

    text, healthy = report()
    print(text)
    return 0 if healthy else 2
