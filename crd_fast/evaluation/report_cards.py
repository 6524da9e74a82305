"""A report's charts of metrics over training: columns of the epochs' rows, and cards that hold a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from crd_fast.evaluation.plots import Series, finite, legend, line_chart, number
from crd_fast.evaluation.run_files import Row


@dataclass(frozen=True)
class Columns:
    """The metrics of `rows` over the one named `over`, which every row has."""

    rows: Sequence[Row]
    over: str = "epoch"

    def column(self, key: str, name: str | None = None, inner: str | None = None, spread: str | None = None) -> Series:
        """A metric; `inner` picks an entry of a metric that is a mapping, `spread` names a metric of the band."""
        x = [float(row[self.over]) for row in self.rows]
        band = self._values(spread, inner) if spread else None
        return Series(name or inner or key, x, self._values(key, inner), band)

    def _values(self, key: str, inner: str | None) -> list[float | None]:
        cells = (row.get(key) for row in self.rows)
        return [finite((cell or {}).get(inner) if inner is not None else cell) for cell in cells]

    def names(self, key: str) -> list[str]:
        """Entries that a metric which is a mapping has in some row."""
        return sorted({name for row in self.rows for name in row.get(key) or {}})


def card(
    title: str,
    subtitle: str,
    series: Sequence[Series],
    domain: tuple[float, float] | None = None,
    x_name: str = "epoch",
) -> str:
    """A chart with its title, last value and legend."""
    last = next((v for v in reversed(series[0].y) if v is not None), None) if len(series) == 1 else None
    value = f"<span>last {number(last)}</span>" if last is not None else ""
    below = legend([s.name for s in series]) or escape(subtitle)
    return (
        f'<figure class="card"><header>{escape(title)}{value}</header><div class="sub">{below}</div>'
        f"{line_chart(series, domain=domain, x_name=x_name)}</figure>"
    )


def curves_section(cards: Sequence[str]) -> str:
    """The section of all charts; none of them where no epoch was recorded."""
    title = '<section id="curves"><h2>Training</h2>'
    if not cards:
        return title + '<p class="none">No epoch recorded yet.</p></section>'
    return f'{title}<div class="charts">{"".join(cards)}</div></section>'
