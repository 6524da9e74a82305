"""The report's training curves: rewards, the implicit reward, losses and what went wrong, over the epochs."""

from __future__ import annotations

from crd_fast.evaluation.plots import SERIES_COLOURS
from crd_fast.evaluation.report_cards import Columns, card, curves_section
from crd_fast.evaluation.run_files import Run


def training_curves(run: Run) -> str:
    """The section with every metric over the epochs."""
    if not run.epochs:
        return curves_section([])
    columns = Columns(run.epochs)
    column = columns.column
    cards = [
        card(
            f"Reward: {reward}",
            "mean; band ± spread within groups",
            [column("reward", None, reward, "reward_std")],
        )
        for reward in columns.names("reward")
    ]
    diagnostics = [column("reward_diagnostics", None, name) for name in columns.names("reward_diagnostics")]
    for start in range(0, len(diagnostics), SERIES_COLOURS):
        cards.append(card("Reward diagnostics", "", diagnostics[start : start + SERIES_COLOURS]))
    decays = [column("old_decay", "old"), column("sampling_decay", "sampling")]
    losses = [column("loss", "total"), column("policy_loss", "policy"), column("kl_loss", "KL")]
    cards += [
        card("Implicit reward", "standard deviation over the batch", [column("implicit_reward_std")]),
        card("KL to the reference", "", [column("kl")]),
        card("Snapshot decay", "", decays, domain=(0.0, 1.0)),
        card("Loss", "", losses),
        card("Gradient norm", "before clipping", [column("grad_norm")]),
        card("Throughput", "samples per second", [column("samples_per_second")]),
    ]
    rates, skipped = column("lr", "learning rate"), column("skipped_steps", "skipped steps")
    if len(set(rates.y)) > 1:
        cards.append(card("Learning rate", "", [rates]))
    if any(skipped.y):
        cards.append(card("Skipped steps", "steps without an update, for gradients that were not finite", [skipped]))
    masked = column("masked_samples", "samples left out")
    if any(masked.y):
        cards.append(card("Masked samples", "left out of an epoch, because a reward could not score them", [masked]))
    return curves_section(cards)
