"""Make `models/shapes-one-step`: the transformer of `models/shapes-sd3`, distilled so that one step is enough.

    python examples/shapes/distil.py --out models/shapes-one-step

This is `crd-fast didr recipes/shapes_distil_didr.yaml`, whose run directory is kept under runs/, and the transformer
that it leaves, in half precision as the base is. It took 15 minutes on one core. An interrupted run goes on where it
was. One seed gives the same weights on one machine and number of threads.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from crd_fast.didr.job import run
from crd_fast.didr.recipe import load_recipe
from crd_fast.errors import CrdFastError
from crd_fast.training.stop import Interrupted

WEIGHTS = "diffusion_pytorch_model.safetensors"


def distil(out: Path, run_dir: Path, recipe: Path, overrides: Sequence[str] = ()) -> None:
    """Run the recipe in run_dir, or continue it there, and put the generator's transformer at `out`.

    Raises CrdFastError and Interrupted as `crd_fast.didr.job.run` does, and FileExistsError when `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: name another folder, or move it away")
    settings = load_recipe(recipe, [*overrides, "train.parameters=full", f"run.dir={run_dir}"])
    finished = run(settings, resume=(run_dir / "config.yaml").exists())
    aside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    made = finished / "transformer"
    tensors = {name: tensor.half() for name, tensor in load_file(made / WEIGHTS).items()}
    save_file(tensors, aside / WEIGHTS, {"format": "pt"})
    shutil.copy(made / "config.json", aside)
    aside.rename(out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, such as run.seed=1")
    parser.add_argument("--out", type=Path, required=True, help="folder for the transformer")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/shapes-distil"))
    parser.add_argument("--recipe", type=Path, default=Path("recipes/shapes_distil_didr.yaml"))
    given = parser.parse_args(arguments)
    try:
        distil(given.out, given.run_dir, given.recipe, given.overrides)
    except (CrdFastError, FileExistsError) as error:
        print(f"distil.py: {error}", file=sys.stderr)
        return 2
    except Interrupted:
        print("stopped; the same command continues", file=sys.stderr)
        return 1
    print(given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
