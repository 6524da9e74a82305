"""Training curves of a DIDR run over its iterations: does the TA follow, does the reward rule, were steps lost."""

from __future__ import annotations

from crd_fast.didr.metrics import THIRDS
from crd_fast.didr.networks import GENERATOR, TA
from crd_fast.didr.report_files import DIDRRun
from crd_fast.evaluation.plots import Series, finite
from crd_fast.evaluation.report_cards import Columns, card, curves_section

_NAMES = {GENERATOR: "generator", TA: "TA"}


def training_curves(found: DIDRRun) -> str:
    """The section with every metric over the iterations."""
    run = found.run
    if not run.epochs:
        return curves_section([])
    columns = Columns(run.epochs, over="iteration")
    column = columns.column

    def chart(title: str, subtitle: str, *series: Series, domain: tuple[float, float] | None = None) -> str:
        return card(title, subtitle, series, domain, x_name="iter.")

    def both(key: str) -> list[Series]:
        return [column(key, _NAMES[slot], slot) for slot in _NAMES]

    corrections = []
    if found.reward_at != "endpoint":  # which corrects no score
        ratios = [column("correction_ratio", f"{third} third", third) for third in THIRDS]
        corrections = [
            chart("Correction ratio", "", *ratios),
            chart("Correction", "length of the reward's part of the score", column("correction")),
        ]
    cards = [
        chart(
            "TA loss",
            "",
            column("ta_loss", "mean of the epoch"),
            column("ta_loss_before", "before an iteration's steps"),
            column("ta_loss_after", "after them"),
        ),
        chart("TA lag", "share of its loss that an iteration's steps of the TA remove", _lag(columns)),
        chart("Gap", "between the TA's and the reference's estimates; 0 is the reference", column("gap")),
        *(
            chart(f"Reward: {name}", "of the estimates that are rewarded, not of images", column("reward", None, name))
            for name in columns.names("reward")
        ),
        *corrections,
        *(
            [chart("Distance from the start", "of samples from the same noise", column("start_distance"))]
            if any("start_distance" in row for row in run.epochs)
            else []
        ),
        chart("Gradient norm", "before clipping", *both("grad_norm")),
        chart("Skipped steps", "", *both("skipped_steps"), domain=(0.0, 1.0)),
        chart("Throughput", "samples per second", column("samples_per_second")),
    ]
    replaced = column("nonfinite", "elements")
    if any(replaced.y):
        cards.append(chart("Elements replaced", "whose gradient was not finite and became zero", replaced))
    rates = [column("lr", "generator"), column("ta_lr", "TA")]
    if any(len(set(rate.y)) > 1 for rate in rates):
        cards.append(chart("Learning rate", "", *rates))
    return curves_section(cards)


def _lag(columns: Columns) -> Series:
    """(before - after) / before of the samples that the TA's loss was measured on before and after its steps."""
    before, after = columns.column("ta_loss_before"), columns.column("ta_loss_after")
    shares = [
        None if start is None or end is None or start <= 0 else (start - end) / start
        for start, end in zip(map(finite, before.y), map(finite, after.y), strict=True)
    ]
    return Series("TA lag", before.x, shares)
