"""The networks of a DIDR run: the one-step generator and its moving average, the TA, and the frozen reference.

A LoRA run keeps all of them on one frozen model, as slots of one bank whose base is the reference. Where the generator
starts from another model than the reference, such as a distilled one, there are two frozen models, each with a bank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from crd_fast.acceleration.compilation import CompileCounter
from crd_fast.backbones.base import Backbone, Conditioning
from crd_fast.didr.recipe import DIDRRecipe
from crd_fast.errors import ConfigError
from crd_fast.full_finetuning import FullCopies
from crd_fast.lora import LoRABank
from crd_fast.lora_file import read_adapter
from crd_fast.rollout import one_step
from crd_fast.snapshots import BASE, ParameterSets
from crd_fast.training.prepare import accelerate, modules_of

GENERATOR, EMA, TA = "generator", "ema", "ta"
START = "start"  # the generator's frozen model, as it began


class Networks:
    """backbone: of the reference and the TA, whose parameters are `sets`; origin: of the generator and its average,
    whose parameters are `own`. Both pairs are the same where the generator starts from the reference's model.
    """

    def __init__(self, backbone: Backbone, sets: ParameterSets, origin: Backbone, own: ParameterSets) -> None:
        self.backbone, self.sets, self.origin, self.own = backbone, sets, origin, own
        self.counters: list[CompileCounter] = []

    @classmethod
    def build(cls, recipe: DIDRRecipe, backbone: Backbone, origin: Backbone | None) -> Networks:
        """All networks as they start. origin: the generator's model where it is not the reference's.

        Raises ConfigError for models whose latents differ, or an adapter that does not fit.
        """
        if origin is None:
            sets = _sets(recipe, backbone, (GENERATOR, EMA, TA), (GENERATOR, TA))
            networks = cls(backbone, sets, backbone, sets)
        else:
            if (origin.family, origin.latent_shape) != (backbone.family, backbone.latent_shape):
                raise ConfigError(
                    f"generator.path {recipe.generator.path} is {origin.family} with latents {origin.latent_shape}: "
                    f"expected the reference's, {backbone.family} with {backbone.latent_shape}"
                )
            networks = cls(
                backbone,
                _sets(recipe, backbone, (TA,), (TA,)),
                origin,
                _sets(recipe, origin, (GENERATOR, EMA), (GENERATOR,)),
            )
        if recipe.generator.lora is not None and isinstance(networks.own, LoRABank):
            networks.own.load(read_adapter(recipe.generator.lora), (GENERATOR, EMA))
        networks._accelerate(recipe)
        return networks

    def _accelerate(self, recipe: DIDRRecipe) -> None:
        pairs = {id(sets): (sets, backbone) for sets, backbone in ((self.sets, self.backbone), (self.own, self.origin))}
        for sets, backbone in pairs.values():
            self.counters += accelerate(modules_of(sets, backbone), backbone, recipe.acceleration)

    @property
    def light(self) -> bool:
        return self.sets.light

    def sets_of(self, slot: str) -> ParameterSets:
        """The parameter sets that a slot belongs to."""
        return self.own if slot in (GENERATOR, EMA, START) else self.sets

    def backbone_of(self, slot: str) -> Backbone:
        """The backbone that a slot runs on."""
        return self.origin if slot in (GENERATOR, EMA, START) else self.backbone

    def predict(self, slot: str, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity (B, *latent) of one slot, in fp32."""
        rows = [(BASE if slot == START else slot, len(x_t))]
        return self.sets_of(slot).predict(self.backbone_of(slot), rows, x_t, sigma, conditioning).float()

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """All tensors but the reference's, `<slot>.<name>`."""
        return {
            f"{slot}.{name}": tensor
            for slot in (GENERATOR, EMA, TA)
            for name, tensor in self.sets_of(slot).named_tensors(slot).items()
        }


class OneStep:
    """From noise to a clean sample in one step of a slot, see `rollout.one_step`.

    start: share of the training time range, see `GeneratorSettings`.
    """

    def __init__(self, networks: Networks, start: float) -> None:
        self.networks, self.start = networks, start

    def sample(self, slot: str, z: Tensor, conditioning: Conditioning) -> Tensor:
        """Clean latents (B, *latent) in fp32 of unit Gaussian z, with graph where gradients are enabled."""
        networks = self.networks
        return one_step(lambda x, t: networks.predict(slot, x, t, conditioning), networks.origin, z, self.start)


def _sets(recipe: DIDRRecipe, backbone: Backbone, slots: Sequence[str], trained: Sequence[str]) -> ParameterSets:
    if recipe.train.parameters == "full":
        return FullCopies(backbone, slots=slots, trained=trained)
    lora = recipe.lora
    return LoRABank(
        backbone.transformer,
        lora.targets or backbone.lora_targets,
        rank=lora.rank,
        alpha=lora.alpha,
        seed=recipe.run.seed,
        slots=slots,
        trained=trained,
    )
