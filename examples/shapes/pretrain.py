"""Make `models/shapes-sd3`: a Stable Diffusion 3 pipeline in miniature, from nothing, in one go.

    python examples/shapes/pretrain.py --out models/shapes-sd3

Four stages, each with a fixed seed: (1) an autoencoder on true renders, (2) a bank of latents whose captions are wrong
part of the time, as captions from the web are, (3) the transformer and both text encoders on that bank by flow
matching, with captions dropped now and then so that guidance works, (4) saving with `save_pretrained`.

The wrong captions are what makes the base worth tuning: it has learned every prompt's right picture and shows it a
third of the time, half of the time with guidance, as large models do. It took 41 minutes on 2 cores; an interrupted run
goes on where it was. Needs torch 2.9 or later, for its Muon optimiser.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from crd_fast.shapes import world
from crd_fast.training.memory import keep_freed_memory

PROMPT_TOKENS = 9  # the longest prompt: begin, seven words or `a sign` and a quoted number, end


@dataclass(frozen=True)
class Pretraining:
    """Sizes and schedules; the defaults make the committed model."""

    seed: int = 0
    vae_channels: tuple[int, ...] = (8, 16, 32, 64)
    latent_channels: int = 8
    vae_renders: int = 10_000
    vae_steps: int = 2200
    vae_batch: int = 16
    vae_learning_rate: float = 2e-3
    kl_weight: float = 5e-4
    bank: int = 40_000
    wrong_captions: float = 0.3
    layers: int = 4
    heads: int = 4
    head_dim: int = 32
    text_width: int = 64
    steps: int = 6000
    batch: int = 256
    learning_rate: float = 2e-3
    matrix_learning_rate: float = 0.01
    weight_decay: float = 0.01
    caption_dropout: float = 0.1
    average_decay: float = 0.998
    compiled: bool = True


def autoencoder_renders(count: int, rng: np.random.Generator) -> Tensor:
    """`count` images (count, 3, 64, 64) in [0, 1]: half the world's own, a quarter crowded with shapes, more signs."""
    own, signs = balanced(world.prompts("all")), world.prompts("all", ["text"])
    scenes = []
    for kind in rng.choice(3, size=count, p=(0.5, 0.25, 0.25)):
        if kind == 1:
            scenes.append(world.crowded_scene(rng))
        else:
            prompts = signs if kind == 2 else own
            scenes.append(world.sample_scene(prompts[rng.integers(len(prompts))], rng))
    return torch.from_numpy(world.render(scenes, rng))


def balanced(prompts: list[world.Metadata]) -> list[world.Metadata]:
    """Repeat prompts so that every task is equally likely."""
    by_task = {task: [p for p in prompts if p["tag"] == task] for task in world.TASKS}
    longest = max(len(entries) for entries in by_task.values())
    return [entries[i % len(entries)] for entries in by_task.values() for i in range(longest)]


def warmup_cooldown(step: int, steps: int, warmup: int) -> float:
    """Learning rate factor: linear up, flat, then linear to zero over the last 40 %."""
    cooldown = max(1, int(0.4 * steps))
    return min(1.0, (step + 1) / warmup, (steps - step) / cooldown)


def steps_with_progress(name: str, total: int, done: int = 0) -> Iterator[tuple[int, Progress, int]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} samples/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=total, completed=done, loss=math.nan, rate=0.0)
        for step in range(done, total):
            yield step, progress, task
            progress.advance(task)


def train_autoencoder(config: Pretraining, device: torch.device) -> AutoencoderKL:
    torch.manual_seed(config.seed)
    rng = np.random.default_rng([config.seed, 1])
    depth = len(config.vae_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=config.vae_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=2,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.vae_learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    renders = autoencoder_renders(config.vae_renders, rng)
    started = time.perf_counter()
    for step, progress, task in steps_with_progress("autoencoder", config.vae_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.vae_learning_rate * warmup_cooldown(step, config.vae_steps, 100)
        images = renders[torch.from_numpy(rng.integers(len(renders), size=config.vae_batch))].to(device) * 2 - 1
        images = images.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = decoded - images
        loss = error.abs().mean() + error.square().mean() + config.kl_weight * posterior.kl().mean() / 512
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            rate = (step + 1) * config.vae_batch / (time.perf_counter() - started)
            progress.update(task, loss=loss.item(), rate=rate)
    return vae.eval().requires_grad_(False)


def _split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The byte-pair tokens of a word: of all adjacent pairs the earliest rule is applied first."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while True:
        pairs = [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in merges]
        if not pairs:
            return pieces
        best = min(pairs, key=merges.index)
        at = next(i for i in range(len(pieces)) if (pieces[i], pieces[i + 1]) == best)
        pieces[at : at + 2] = [best[0] + best[1]]


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer in which every word of the world is one token and numbers are spelled in digits."""
    words = sorted({w for p in world.prompts("all") for w in p["prompt"].split('"')[0].split()})
    symbols = [chr(c) for c in range(33, 127)]
    vocabulary = [*symbols, *(s + "</w>" for s in symbols)]
    merges: list[tuple[str, str]] = []
    for word in words:
        # later rules have lower priority, so a word that is one token stays one
        pieces = _split(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            vocabulary.append(pieces[0] + pieces[1])
            pieces = _split(word, merges)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    tokens = dict.fromkeys(vocabulary)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=PROMPT_TOKENS)
    longest = max(len(tokenizer(p["prompt"]).input_ids) for p in world.prompts("all"))
    if longest > PROMPT_TOKENS:
        raise ValueError(f"a prompt has {longest} tokens: PROMPT_TOKENS is {PROMPT_TOKENS}")
    return tokenizer


def make_text_encoder(config: Pretraining, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=2 * config.text_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_TOKENS,
            projection_dim=config.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_t5_tokenizer() -> T5Tokenizer:
    words = sorted({w for p in world.prompts("all") for w in p["prompt"].split('"')[0].split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -1.0) for word in words)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=1)


def make_silent_t5(config: Pretraining, tokenizer: T5Tokenizer) -> T5EncoderModel:
    """The third encoder that the pipeline class requires; its final norm is zero, so its tokens say nothing."""
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=2 * config.text_width,
            d_kv=16,
            d_ff=config.text_width,
            num_layers=1,
            num_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder.eval()


@dataclass(frozen=True)
class Bank:
    """Latents (N, C, 8, 8), unit standard deviation, with the index of the caption shown beside each."""

    latents: Tensor
    captions: Tensor  # (N,) int64 into `prompts`
    prompts: list[str]
    shift: float
    scale: float


@torch.no_grad()
def make_bank(config: Pretraining, vae: AutoencoderKL, device: torch.device) -> Bank:
    rng = np.random.default_rng([config.seed, 2])
    generator = torch.Generator().manual_seed(config.seed)
    catalogue = world.prompts("all")
    index = {p["prompt"]: i for i, p in enumerate(catalogue)}
    drawn = balanced(catalogue)
    captions = [drawn[i] for i in rng.integers(len(drawn), size=config.bank)]
    latents = []
    for start in range(0, config.bank, 500):
        shown = [
            world.corrupt(p, rng) if rng.random() < config.wrong_captions else p for p in captions[start : start + 500]
        ]
        images = torch.from_numpy(world.render([world.sample_scene(p, rng) for p in shown], rng))
        posterior = vae.encode(images.to(device) * 2 - 1).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        latents.append(posterior.mean + posterior.std * noise)
    stacked = torch.cat(latents)
    shift, scale = stacked.mean().item(), 1 / stacked.std().item()
    ids = torch.tensor([index[p["prompt"]] for p in captions], device=device)
    return Bank((stacked - shift) * scale, ids, [p["prompt"] for p in catalogue], shift, scale)


def make_transformer(config: Pretraining) -> SD3Transformer2DModel:
    width = config.heads * config.head_dim
    transformer = SD3Transformer2DModel(
        sample_size=world.SIZE // 8,
        patch_size=2,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        num_layers=config.layers,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        joint_attention_dim=2 * config.text_width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * config.text_width,
        pos_embed_max_size=world.SIZE // 16,
        qk_norm="rms_norm",
    )
    # residual branches start closed and the velocity at zero, as in DiT: it learns faster
    for name, module in transformer.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def make_optimizers(config: Pretraining, trained: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention, feed-forward and modulation layers, AdamW for all else."""
    matrices, others = [], []
    for name, parameter in trained.named_parameters():
        inner = parameter.ndim == 2 and min(parameter.shape) >= 64 and "token_embedding" not in name
        (matrices if inner else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices,
            lr=config.matrix_learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def train_transformer(
    config: Pretraining, bank: Bank, tokenizer: CLIPTokenizer, device: torch.device, kept: Path
) -> tuple[SD3Transformer2DModel, list[CLIPTextModelWithProjection]]:
    torch.manual_seed(config.seed + 1)
    generator = torch.Generator().manual_seed(config.seed + 2)
    transformer = make_transformer(config).to(device)
    encoders = [make_text_encoder(config, tokenizer).to(device) for _ in range(2)]
    trained = nn.ModuleList([transformer, *encoders])
    average = [p.detach().clone() for p in trained.parameters()]
    optimizers = make_optimizers(config, trained)
    ids = tokenizer([*bank.prompts, ""], padding="max_length", max_length=PROMPT_TOKENS, return_tensors="pt").input_ids
    ids = ids.to(device)
    empty = len(bank.prompts)
    t5_token = torch.zeros(config.batch, 1, 2 * config.text_width, device=device)
    done = 0
    if kept.exists():  # an interrupted run goes on where it was
        state = torch.load(kept, weights_only=True)
        done = state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        generator.set_state(state["generator"])
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in trained.parameters()], state["parameters"])
            torch._foreach_copy_(average, state["average"])

    def flow_matching_loss(tokens: Tensor, noised: Tensor, sigma: Tensor, target: Tensor) -> Tensor:
        encoded = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
        context = torch.cat([out.hidden_states[-2] for out in encoded], dim=-1)  # (B, L, 2W)
        pooled = torch.cat([out.text_embeds for out in encoded], dim=-1)  # (B, 2W)
        context = torch.cat([context, t5_token], dim=1)
        return F.mse_loss(transformer(noised, context, pooled, sigma * 1000, return_dict=False)[0], target)

    loss_of = torch.compile(flow_matching_loss) if config.compiled else flow_matching_loss
    started = time.perf_counter()
    for step, progress, task in steps_with_progress("transformer", config.steps, done):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * warmup_cooldown(step, config.steps, 200)
        rows = torch.randint(len(bank.latents), (config.batch,), generator=generator).to(device)
        noise = torch.randn(config.batch, *bank.latents.shape[1:], generator=generator).to(device)
        sigma = torch.randn(config.batch, generator=generator).sigmoid().to(device)
        dropped = (torch.rand(config.batch, generator=generator) < config.caption_dropout).to(device)
        tokens = ids[bank.captions[rows].masked_fill(dropped, empty)]
        latents = bank.latents[rows]
        noised = torch.lerp(latents, noise, sigma[:, None, None, None])
        loss = loss_of(tokens, noised, sigma, noise - latents)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            decay = min(config.average_decay, (step + 1) / (step + 10))
            torch._foreach_lerp_(average, [p.detach() for p in trained.parameters()], 1 - decay)
        if step % 20 == 0:
            rate = (step + 1 - done) * config.batch / (time.perf_counter() - started)
            progress.update(task, loss=loss.item(), rate=rate)
        if (step + 1) % 200 == 0:
            state = {"step": step + 1, "average": average, "parameters": [p.detach() for p in trained.parameters()]}
            state |= {"optimizers": [o.state_dict() for o in optimizers], "generator": generator.get_state()}
            torch.save(state, kept.with_suffix(".tmp"))
            kept.with_suffix(".tmp").replace(kept)
    with torch.no_grad():
        for parameter, averaged in zip(trained.parameters(), average, strict=True):
            parameter.copy_(averaged)
    return transformer.eval(), [encoder.eval() for encoder in encoders]


def save(
    out: Path,
    config: Pretraining,
    vae: AutoencoderKL,
    bank: Bank,
    tokenizer: CLIPTokenizer,
    transformer: SD3Transformer2DModel,
    encoders: list[CLIPTextModelWithProjection],
) -> None:
    """Write the pipeline, the large parts in half precision, with the latent statistics in the autoencoder's config.

    Text encoders stay in single precision: transformers loads weights as they were stored and diffusers as fp32, and
    a pipeline loaded without a dtype must be of one kind.
    """
    vae.register_to_config(scaling_factor=bank.scale, shift_factor=bank.shift)
    t5_tokenizer = make_t5_tokenizer()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=make_silent_t5(config, t5_tokenizer),
        tokenizer_3=t5_tokenizer,
    )
    pipeline.to("cpu")
    transformer.half()
    vae.half()
    pipeline.save_pretrained(out)


def pretrain(out: Path, config: Pretraining, device: torch.device) -> None:
    """All stages. An interrupted run continues with what it kept in `.pretraining`."""
    unfinished = out / ".pretraining"
    if (unfinished / "vae").is_dir():
        vae = AutoencoderKL.from_pretrained(unfinished / "vae").to(device).eval().requires_grad_(False)
    else:
        vae = train_autoencoder(config, device)
        vae.save_pretrained(unfinished / "vae")
    bank = make_bank(config, vae, device)
    tokenizer = make_tokenizer(out / "tokenizer")
    transformer, encoders = train_transformer(config, bank, tokenizer, device, unfinished / "transformer.pt")
    save(out, config, vae, bank, tokenizer, transformer, encoders)
    shutil.rmtree(unfinished)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=Pretraining.seed)
    arguments = parser.parse_args()
    started = time.perf_counter()
    keep_freed_memory()
    pretrain(arguments.out, Pretraining(seed=arguments.seed), torch.device(arguments.device))
    print(f"saved {arguments.out} after {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
