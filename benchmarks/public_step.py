"""The baseline of `benchmarks.step`: an epoch's updates in the order of the public trainers.

Adapters are peft's. Before the updates, the noise and the old model's prediction of every sample and timestep are made
and stored. In every micro-step parameters are swapped in through host memory, the reference's conditional and
unconditional predictions are passes of their own, and the loss section is plain PyTorch whose weights are fp64.
`fused` replaces the stored tensors and the loss section by ours: noise from seeds, two floats of the old prediction,
one loss call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

import crd_fast
from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.losses.config import CRDConfig


@dataclass(frozen=True)
class StepInputs:
    """What the updates of an epoch learn from: latents (N, *latent), conditioning and advantages of N samples."""

    latents: Tensor
    conditioning: Conditioning
    unconditional: Conditioning
    advantages: Tensor
    group_size: int
    micro_batch: int
    timesteps: int
    guidance_scale: float


class PublicStep:
    """Adapters, snapshots and optimiser of the baseline; `run` is one epoch of one update a timestep."""

    def __init__(self, backbone: Backbone, targets: tuple[str, ...], rank: int, alpha: float, lr: float) -> None:
        self.backbone = backbone
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
        inject_adapter_in_model(config, backbone.transformer)
        self.layers = [m for m in backbone.transformer.modules() if isinstance(m, BaseTunerLayer)]
        self.parameters = [p for n, p in backbone.transformer.named_parameters() if "lora_" in n]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_()
        self.old = [p.detach().to("cpu", copy=True) for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=1e-4)

    def run(self, inputs: StepInputs, *, fused: bool) -> None:
        chunks = torch.arange(len(inputs.latents)).split(inputs.micro_batch)
        stored = {
            (number, t): self._before(inputs, rows, t, fused)
            for number, rows in enumerate(chunks)
            for t in range(inputs.timesteps)
        }
        for t in range(inputs.timesteps):
            for number, rows in enumerate(chunks):
                loss = self._loss(inputs, rows, *stored[number, t], fused=fused)
                (loss / len(chunks)).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _predict(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        with torch.autocast(x.device.type, self.backbone.dtype, enabled=self.backbone.dtype != torch.float32):
            return self.backbone.predict(x, sigma, conditioning)

    @torch.no_grad()
    def _before(self, inputs: StepInputs, rows: Tensor, t: int, fused: bool) -> tuple[Any, ...]:
        """(noised or noise, sigma, old prediction or its statistics) of a micro-batch at a timestep."""
        x0 = inputs.latents[rows.to(inputs.latents.device)]
        sigma = torch.full((len(rows),), (t + 0.5) / inputs.timesteps, device=x0.device)
        if fused:
            made: Any = crd_fast.noise(x0, sigma, seed=t, sample_ids=rows.to(x0.device))
            x_t = made.x_t
        else:
            made = torch.randn_like(x0)
            x_t = torch.lerp(x0, made, sigma.view(-1, *(1,) * (x0.ndim - 1)))
        kept = self._swapped_in(self.old)
        prediction = self._predict(x_t, sigma, inputs.conditioning[rows.to(x0.device)])
        self._swapped_in(kept)
        return made, sigma, crd_fast.residual_stats(prediction, made) if fused else prediction.float()

    def _swapped_in(self, values: list[Tensor]) -> list[Tensor]:
        """Put other values into the parameters; returns the ones that were there, on the host."""
        before = [p.detach().to("cpu", copy=True) for p in self.parameters]
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data.copy_(value)
        return before

    def _loss(
        self, inputs: StepInputs, rows: Tensor, made: Any, sigma: Tensor, old: Any, *, fused: bool
    ) -> Tensor:  # fmt: skip
        x0 = inputs.latents[rows.to(inputs.latents.device)]
        prompts = inputs.conditioning[rows.to(x0.device)]
        x_t = made.x_t if fused else torch.lerp(x0, made, sigma.view(-1, *(1,) * (x0.ndim - 1)))
        with torch.no_grad():
            self._adapters(False)
            conditional = self._predict(x_t, sigma, prompts)
            unconditional = self._predict(x_t, sigma, inputs.unconditional.expand(len(rows)))
            self._adapters(True)
        prediction = self._predict(x_t, sigma, prompts)
        advantages = inputs.advantages[rows.to(inputs.advantages.device)].to(x0.device)
        groups = (rows // inputs.group_size).to(x0.device)
        if fused:
            return crd_fast.loss(
                prediction,
                made,
                old=old,
                advantages=advantages,
                group_ids=groups,
                ref=conditional,
                ref_uncond=unconditional,
                guidance_scale=inputs.guidance_scale,
                config=CRDConfig(),
            ).loss
        return plain_loss(
            prediction, made - x0, old, conditional, unconditional, advantages, groups, inputs.guidance_scale
        )

    def _adapters(self, on: bool) -> None:
        for layer in self.layers:
            layer.enable_adapters(on)


def plain_loss(
    f: Tensor, y: Tensor, old: Tensor, c: Tensor, u: Tensor, advantages: Tensor, groups: Tensor, scale: float
) -> Tensor:
    """The paper's loss section, defaults of `CRDConfig`, groups centered; weights are divided by in fp64."""
    axes = tuple(range(1, f.ndim))

    def weighted(prediction: Tensor) -> Tensor:
        error = prediction.float() - y
        with torch.no_grad():
            weight = error.double().abs().mean(axes, keepdim=True).clamp(min=1e-5)
        return (error.square() / weight).mean(axes)

    reward = weighted(old) - weighted(f)
    mapped = (advantages.clamp(-5, 5) / 10 + 0.5).clamp(0, 1)
    same = (groups[:, None] == groups[None, :]).double()
    same = same / same.sum(1, keepdim=True)
    centered = reward - same @ reward.detach()
    policy = 5 * (centered - (mapped - same @ mapped.double())).square().mean()
    anchor = u.float() + scale * (c.float() - u.float())
    kappa = 1e-3 + mapped * (1 - 1e-3)
    return policy + 0.1 * (kappa * (f.float() - anchor).square().mean(axes)).mean()
