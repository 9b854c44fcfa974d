"""What plots have in common: panels with titles, points with intervals, one legend below, PNG bytes.

    drawn, (left, right) = figure(2, 3.6, 2.9)
    left.plot(x, y, label="base", **look(style("base")))
    label(left, "title", "x", "y, with its unit")
    legend(drawn, [left, right])
    Path("plot.png").write_bytes(png(drawn))

matplotlib is loaded late.
"""

import io

import numpy as np

from azr.palette import BLACK, Style

LEGEND_INCHES = 1.45  # of a column of the legend


def figure(columns: int, width: float, height: float, share: bool = False):
    """(figure, list of its panels, side by side) without pyplot, so that nothing global is kept. width, height: of a
    panel, inches; share: all on one vertical scale."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width * columns, height), layout="constrained")
    axes = list(drawn.subplots(1, columns, squeeze=False, sharey=share)[0])
    for one in axes:
        one.grid(alpha=0.25)
        one.tick_params(labelsize=8)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    return drawn, axes


def label(axes, title: str, x: str, y: str) -> None:
    """Titles a panel and its axes; y: what is plotted, with its unit."""
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel(x, fontsize=8.5)
    axes.set_ylabel(y, fontsize=8.5)


def doubling(axes, ks: list[int]) -> None:
    """A horizontal axis of k = 1, 2, 4, ..., each as far from the next."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()


def legend(drawn, axes: list) -> None:
    """One legend for all panels, below them, where it hides no data; each name once, none without names. To the left,
    where a narrow screen begins."""
    named = {}
    for one in axes:
        for handle, name in zip(*one.get_legend_handles_labels()):
            named.setdefault(name, handle)
    if named:
        columns = min(len(named), max(1, int(drawn.get_figwidth() / LEGEND_INCHES)))
        place = {"loc": "outside lower left", "ncols": columns}
        drawn.legend(named.values(), named, fontsize=8, frameon=False, **place)


def look(own: Style, line: str = "-") -> dict:
    """A style as matplotlib's keywords for a line with markers."""
    return {"color": own.color, "marker": own.marker, "linestyle": line, "markersize": 4, "linewidth": 1.4}


def points(axes, x, intervals: list, name: str, shape: dict, shift: float = 0.0) -> None:
    """Estimates with their intervals: dicts with mean, low, high; None and NaN are gaps. shape: as of `look`."""
    rows = [[(row or {}).get(key) for key in ("mean", "low", "high")] for row in intervals]
    mean, low, high = np.array(rows, float).reshape(-1, 3).T
    error = np.maximum(0, np.nan_to_num(np.stack([mean - low, high - mean])))
    axes.errorbar(np.asarray(x, float) + shift, mean, error, elinewidth=0.9, capsize=2, label=name, **shape)


def zero_line(axes) -> None:
    """A thin line at 0, for differences."""
    axes.axhline(0, color=BLACK, linewidth=0.8)


def png(drawn) -> bytes:
    """A figure as PNG bytes."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
