"""At which times is the diffused reward's gradient signal, and where is it noise? Of a DIDR recipe, on its generator:

    python -m benchmarks.reward_signal recipes/shapes_didr.yaml --out benchmarks/results/reward_signal_shapes

Samples of the generator as the recipe starts it are noised several times at each time; alpha s_r is what the exact
gradient of a sample then gets from the reward. Its mean over the noise is the signal, the rest is an estimate's noise.

    signal   |mean|^2 over the mean squared length, without bias, of all samples together
    median   the same of the median sample
    cosine   of the mean with the reward's gradient at the sample itself (the endpoint), mean over samples
    rms      of an element

Above the time at which the signal is lost a reward costs a decode and teaches nothing: algorithm.reward_until.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tables import environment
from crd_fast.data.prompts import load_prompts, shuffled_slice
from crd_fast.didr import diffused_reward
from crd_fast.didr.networks import GENERATOR, Networks, OneStep
from crd_fast.didr.recipe import DIDRRecipe, load_recipe
from crd_fast.errors import ConfigError, CrdFastError
from crd_fast.forward_process import noise
from crd_fast.ranks import choose_device
from crd_fast.rewards import registry
from crd_fast.rollout import initial_noise
from crd_fast.schedules import RectifiedFlow
from crd_fast.snapshots import BASE
from crd_fast.training.models import load_backbone, load_generator

FLOW = RectifiedFlow()
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def signal_of(gradients: Tensor, endpoint: Tensor) -> dict[str, float]:
    """The table's numbers. gradients: (K, B, dim) of K >= 2 noisings; endpoint: (B, dim)."""
    draws = len(gradients)
    products = torch.einsum("ibd,jbd->bij", gradients, gradients)
    own = products.diagonal(dim1=1, dim2=2)  # (B, K)
    paired = (products.sum((1, 2)) - own.sum(1)) / (draws * (draws - 1))  # (B,), |mean|^2 without bias
    length = own.mean(1)
    cosine = torch.nn.functional.cosine_similarity(gradients.mean(0), endpoint, dim=1)
    return {
        "signal": (paired.sum() / length.sum()).item(),
        "median": (paired / length.clamp(min=torch.finfo(length.dtype).tiny)).median().item(),
        "cosine": cosine.mean().item(),
        "rms": gradients.square().mean().sqrt().item(),
    }


def measure(recipe: DIDRRecipe, samples: int, draws: int, shares: Sequence[float]) -> list[dict[str, float]]:
    """A row for each share of the time range. Raises ConfigError for a recipe without a reward."""
    if recipe.reward is None:
        raise ConfigError("reward: expected a recipe with a reward, got null")
    device = choose_device(recipe.run.device)
    backbone = load_backbone(recipe.model, recipe.precision.dtype, device)
    path = recipe.generator.path
    origin = None if path is None else load_generator(path, backbone, recipe.model, recipe.precision.dtype)
    networks = Networks.build(recipe, backbone, origin)
    reward = registry.build(recipe.reward.name, recipe.reward.options)
    prompts = load_prompts(recipe.data.prompts)
    ids = shuffled_slice(len(prompts), samples, 0, recipe.run.seed).tolist()
    texts, metadata = [prompts.prompts[i] for i in ids], [prompts.metadata[i] for i in ids]
    conditioning = backbone.encode_prompts(texts)
    numbers = torch.arange(samples)
    with torch.no_grad():
        z = initial_noise(backbone, numbers, recipe.run.seed)
        x0 = OneStep(networks, recipe.generator.start).sample(GENERATOR, z, conditioning)

    def score(x: Tensor, t: Tensor, denoised: bool) -> Tensor:
        """(B, dim), decoded as many at a time as the recipe says."""
        parts = []
        for rows in numbers.split(recipe.decode.micro_batch):
            prompted = conditioning[rows.to(device)]

            def denoise(y: Tensor, now: Tensor, prompted: object = prompted) -> Tensor:
                return FLOW.to_x0(networks.predict(BASE, y, now, prompted), y, now) if denoised else y

            def rewarded(y: Tensor, rows: Tensor = rows) -> Tensor:
                images = backbone.decode_with_graph(y)
                chosen = rows.tolist()
                return reward.differentiable_scores(images, [texts[i] for i in chosen], [metadata[i] for i in chosen])

            there = rows.to(device)
            parts.append(diffused_reward(x[there], t[there], denoise, rewarded, beta=1.0, schedule=FLOW).score)
        return torch.cat(parts).flatten(1)

    half = torch.full((samples,), 0.5, device=device)
    endpoint = score(x0, half, denoised=False)
    table = []
    for share in shares:
        t = backbone.sigma_at(torch.full((samples,), share)).to(device)
        gradients = []
        for draw in range(draws):
            x_t = noise(x0, t, seed=recipe.run.seed, sample_ids=numbers.to(device), stream=draw).x_t
            gradients.append((1 - t)[:, None] * score(x_t, t, denoised=True))
        table.append({"share": share} | signal_of(torch.stack(gradients), endpoint))
        print("  ".join(f"{name} {value:.3f}" for name, value in table[-1].items()), flush=True)
    return table


def plot(table: Sequence[dict[str, float]], title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label in (
        ("signal", "signal, all samples"),
        ("median", "signal, median sample"),
        ("cosine", "cosine with the endpoint's gradient"),
    ):
        axes.plot([row["share"] for row in table], [row[name] for row in table], marker="o", label=label)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set(xlabel="share of the time range", ylabel="share of the gradient's energy, or cosine", title=title)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file of crd-fast didr")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--draws", type=int, default=6, help="noisings of each sample at each time")
    parser.add_argument("--out", type=Path, help="path without suffix: .json and .png are written")
    given = parser.parse_args(arguments)
    if given.samples < 1 or given.draws < 2:
        parser.error("--samples: expected at least 1, and --draws at least 2, whose mean is compared with each")
    try:
        recipe = load_recipe(given.recipe, given.overrides)
        table = measure(recipe, given.samples, given.draws, SHARES)
    except CrdFastError as error:
        print(f"reward_signal: {error}", file=sys.stderr)
        return 2
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        words = ["python -m benchmarks.reward_signal", given.recipe, *given.overrides]
        command = " ".join([*words, f"--samples {given.samples} --draws {given.draws}"])
        result = {"environment": environment(choose_device(recipe.run.device)), "command": command, "rows": table}
        aside = given.out.with_suffix(".tmp")
        aside.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(aside, given.out.with_suffix(".json"))
        plot(table, f"{recipe.name}: the diffused reward's gradient", given.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
