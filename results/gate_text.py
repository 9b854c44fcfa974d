"""Markdown tables of the gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from azr.tasks import MODES
from gate_numbers import LEVELS, STYLES, Counts


def row(values: Iterable) -> str:
    """A line of a table; an Interval as mean [low, high], a float with three digits, None as a dash."""
    texts = [f"{v:.3f}" if isinstance(v, float) else "-" if v is None else str(v) for v in values]
    return f"| {' | '.join(texts)} |"


def table(header: Sequence, rows: Iterable[Sequence]) -> str:
    """A table with an empty line before and after it."""
    return "\n".join(["", row(header), "|---" * len(header) + "|", *map(row, rows), ""])


def grid(title: str, counts: Counts, value: Callable[[Counts], float], form: str = "{:.3f}") -> str:
    """A value by mode and level."""
    rows = []
    for mode in (None, *MODES):
        parts = [*(counts.of(mode, [at]) for at in LEVELS), counts.of(mode)]
        rows.append([mode or "all", *(form.format(value(part)) if len(part) else "-" for part in parts)])
    return table([title, *(f"level {at}" for at in LEVELS), "all"], rows)


def styles_table(counts: Counts) -> str:
    """Share of each style, mean tokens, shares well formed and cut off; by mode and by level."""
    groups = {"all": counts, **{mode: counts.of(mode) for mode in MODES}}
    groups |= {f"level {at}": counts.of(levels=[at]) for at in LEVELS}
    rows = []
    for name, mine in groups.items():
        shares = [float(share) for share in mine.shares().values()]
        ends = [f"{mine.tokens():.1f}", *(float(x.sum() / mine.n.sum()) for x in (mine.formed, mine.cut))]
        rows.append([name, *shares, *ends])
    return table(["answers", *STYLES, "tokens", "well formed", "cut off"], rows)
