"""The report's training curves: rewards, the implicit reward, losses and what went wrong, over the epochs."""

from __future__ import annotations

from html import escape

from crd_fast.evaluation.plots import SERIES_COLOURS, Series, finite, legend, line_chart, number
from crd_fast.evaluation.run_files import Run


def training_curves(run: Run) -> str:
    """The section with every metric over the epochs."""
    title = '<section id="curves"><h2>Training</h2>'
    if not run.epochs:
        return title + '<p class="none">No epoch recorded yet.</p></section>'
    x = [float(row["epoch"]) for row in run.epochs]

    def column(key: str, name: str | None = None, inner: str | None = None, spread: str | None = None) -> Series:
        """A metric over epochs; `inner` picks an entry of a metric that is a mapping."""

        def values(column_key: str) -> list[float | None]:
            cells = (row.get(column_key) for row in run.epochs)
            return [finite((cell or {}).get(inner) if inner is not None else cell) for cell in cells]

        return Series(name or inner or key, x, values(key), values(spread) if spread else None)

    def names(key: str) -> list[str]:
        return sorted({name for row in run.epochs for name in row.get(key) or {}})

    cards = [
        _card(
            f"Reward: {reward}",
            "mean; band ± spread within groups",
            [column("reward", None, reward, "reward_std")],
        )
        for reward in names("reward")
    ]
    diagnostics = [column("reward_diagnostics", None, name) for name in names("reward_diagnostics")]
    for start in range(0, len(diagnostics), SERIES_COLOURS):
        cards.append(_card("Reward diagnostics", "", diagnostics[start : start + SERIES_COLOURS]))
    decays = [column("old_decay", "old"), column("sampling_decay", "sampling")]
    losses = [column("loss", "total"), column("policy_loss", "policy"), column("kl_loss", "KL")]
    cards += [
        _card("Implicit reward", "standard deviation over the batch", [column("implicit_reward_std")]),
        _card("KL to the reference", "", [column("kl")]),
        _card("Snapshot decay", "", decays, domain=(0.0, 1.0)),
        _card("Loss", "", losses),
        _card("Gradient norm", "before clipping", [column("grad_norm")]),
        _card("Throughput", "samples per second", [column("samples_per_second")]),
    ]
    rates, skipped = column("lr", "learning rate"), column("skipped_steps", "skipped steps")
    if len(set(rates.y)) > 1:
        cards.append(_card("Learning rate", "", [rates]))
    if any(skipped.y):
        cards.append(_card("Skipped steps", "steps without an update, for gradients that were not finite", [skipped]))
    masked = column("masked_samples", "samples left out")
    if any(masked.y):
        cards.append(_card("Masked samples", "left out of an epoch, because a reward could not score them", [masked]))
    return f'{title}<div class="charts">{"".join(cards)}</div></section>'


def _card(title: str, subtitle: str, series: list[Series], domain: tuple[float, float] | None = None) -> str:
    """A chart with its title, last value and legend."""
    last = next((v for v in reversed(series[0].y) if v is not None), None) if len(series) == 1 else None
    value = f"<span>last {number(last)}</span>" if last is not None else ""
    below = legend([s.name for s in series]) or escape(subtitle)
    return (
        f'<figure class="card"><header>{escape(title)}{value}</header><div class="sub">{below}</div>'
        f"{line_chart(series, domain=domain)}</figure>"
    )
