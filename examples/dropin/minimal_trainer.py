"""Centered Reward Distillation in one file: a flow model of points in the plane learns what a reward prefers.

    python examples/dropin/minimal_trainer.py

A small network is pretrained on eight clusters around a circle, for two prompts. The reward of prompt 0 is how far to
the right a point lies, of prompt 1 how far up. Seconds of training move the samples there, and the anchor to the
pretrained network keeps them on the circle; with a weaker one (kl_coef=0.1) they leave it, where the reward is higher
still. Every line between `rollout` and `optimizer.step` is what a trainer of a large model does too: replace the
network, the solver and the reward.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import crd_fast

PROMPTS = 2


@dataclass
class Settings:
    """Of the run; the loss has its own, `crd_fast.CRDConfig`."""

    epochs: int = 40
    prompts_per_epoch: int = 16
    samples_per_prompt: int = 24
    timesteps: int = 4  # noise levels a sample is trained at, per epoch
    solver_steps: int = 10
    learning_rate: float = 1e-3
    pretraining_steps: int = 1500
    seed: int = 0


class Velocity(nn.Module):
    """v(x_t, sigma, prompt): (B, 2), (B,), (B,) int64 -> (B, 2)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.prompt = nn.Embedding(PROMPTS, width)
        self.enter = nn.Linear(2 + 8, width)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x_t: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        angles = sigma[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])  # (B, 4)
        features = torch.cat((x_t, angles.sin(), angles.cos()), dim=1)
        return self.body(self.enter(features) + self.prompt(prompt))


def clusters(count: int) -> Tensor:
    """(count, 2) points of eight clusters on the unit circle."""
    angle = torch.randint(8, (count,)) * (math.pi / 4)
    return torch.stack((angle.cos(), angle.sin()), dim=1) + 0.08 * torch.randn(count, 2)


def reward(points: Tensor, prompt: Tensor) -> Tensor:
    """(B,) the coordinate that the prompt asks for."""
    return torch.where(prompt == 0, points[:, 0], points[:, 1])


def pretrain(steps: int) -> Velocity:
    model = Velocity()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        x0, sigma = clusters(256), torch.rand(256)
        noise = torch.randn_like(x0)
        x_t = torch.lerp(x0, noise, sigma[:, None])
        loss = (model(x_t, sigma, torch.randint(PROMPTS, (256,))) - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def rollout(model: Velocity, prompt: Tensor, steps: int) -> Tensor:
    """(B, 2) samples by Euler steps from sigma 1 to 0."""
    x = torch.randn(len(prompt), 2)
    for step in range(steps):
        sigma = torch.full((len(prompt),), 1.0 - step / steps)
        x = x - model(x, sigma, prompt) / steps
    return x


@torch.no_grad()
def blend(snapshot: nn.Module, model: nn.Module, decay: float) -> None:
    for kept, current in zip(snapshot.parameters(), model.parameters(), strict=True):
        kept.lerp_(current, 1.0 - decay)


def train(settings: Settings, config: crd_fast.CRDConfig) -> list[tuple[float, float]]:
    """Of every epoch's samples: mean reward, and mean distance from the circle."""
    torch.manual_seed(settings.seed)
    reference = pretrain(settings.pretraining_steps)  # the anchor, never changed
    model, old, sampler = (copy.deepcopy(reference) for _ in range(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    batch = settings.prompts_per_epoch * settings.samples_per_prompt
    history = []
    for epoch in range(settings.epochs):
        # Samples of a prompt stand together; two groups of one prompt are two groups.
        group = torch.arange(settings.prompts_per_epoch).repeat_interleave(settings.samples_per_prompt)  # (B,)
        prompt = group % PROMPTS
        x0 = rollout(sampler, prompt, settings.solver_steps)
        rewards = reward(x0, prompt)
        per_group = rewards.view(settings.prompts_per_epoch, -1)
        centered = per_group - per_group.mean(1, keepdim=True)
        advantages = (centered / (per_group.std(1, keepdim=True) + 1e-4)).flatten()  # (B,)

        for timestep in range(settings.timesteps):
            # One noise level for the batch: a group's residuals can be compared. The noise is a function of the seed,
            # the sample and the stream; it is never stored.
            sigma = ((timestep + torch.rand(())) / settings.timesteps).expand(batch)
            ids = torch.arange(batch) + epoch * batch
            noised = crd_fast.noise(x0, sigma, seed=settings.seed, sample_ids=ids, stream=timestep)
            with torch.no_grad():
                kept = crd_fast.residual_stats(old(noised.x_t, sigma, prompt), noised)  # two floats a sample
                anchor = reference(noised.x_t, sigma, prompt)
            out = crd_fast.loss(
                model(noised.x_t, sigma, prompt),
                noised,
                old=kept,
                advantages=advantages,
                group_ids=group,
                ref=anchor,
                config=config,
            )
            optimizer.zero_grad()
            out.loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        blend(old, model, decay=min(0.25 + 0.005 * epoch, 0.999))
        blend(sampler, model, decay=0.0)
        mean_reward, distance = float(rewards.mean()), float((x0.norm(dim=1) - 1.0).abs().mean())
        history.append((mean_reward, distance))
        print(
            f"epoch {epoch + 1:3d}/{settings.epochs}  reward {mean_reward:+.3f}  off the circle {distance:.3f}  "
            f"loss {out.loss.item():.4f}"
        )
    return history


if __name__ == "__main__":
    settings = Settings(epochs=int(sys.argv[1])) if len(sys.argv) > 1 else Settings()
    train(settings, crd_fast.CRDConfig(kl_coef=2.0))
