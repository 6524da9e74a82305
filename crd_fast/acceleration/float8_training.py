"""FP8 for full fine-tuning, by torchao: weights are rounded anew in every step, because they change.

Not for frozen weights: torchao computes their gradient all the same. See `fp8` for those.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from crd_fast.acceleration.fp8 import KEPT, linears_for_fp8
from crd_fast.errors import ConfigError


def convert_for_full_finetuning(
    model: nn.Module, block_lists: Iterable[str], *, keep: Sequence[str] = KEPT
) -> list[str]:
    """Run the linear layers of the named lists of blocks in FP8 (e4m3, scales per row), in place; returns their names.

    Forward and both gradients are FP8. Parameters stay the same objects with the same names, so optimisers, snapshots
    and checkpoints are not touched. Convert the old model too: it has to round as the trained one does.

    keep: layers stay whose name inside their block contains one of these.

    Raises ConfigError: torchao is missing, or what `quantize_frozen_linears` raises, trained layers excepted.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            f"full fine-tuning in FP8 needs torchao ({error}): pip install 'crd-fast[fp8]', or set precision to bf16"
        ) from error
    names = linears_for_fp8(model, block_lists, keep)
    convert_to_float8_training(
        model,
        module_filter_fn=lambda _, name: name in names,
        config=Float8LinearConfig.from_recipe_name("rowwise"),
    )
    return list(names)
