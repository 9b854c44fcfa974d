"""Small plots for the instruments: curves with gaps, bands, bars; PNG files and PNG bytes. matplotlib is loaded late.

Also the flags that every instrument takes (--json, --out) and what they write.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np

from azr.analysis.reader import MODES, RunData
from azr.jsonl import write_json_atomic
from azr.palette import BLACK, Style, arm_of, series, style
from azr.passk import shown

STEP = "training step"
LINES = ("-", "--", ":", "-.")  # runs of the same arm
LEGEND_INCHES = 1.45  # of a column of the legend


def figure(rows: int = 1, columns: int = 1, width: float = 3.6, height: float = 2.9):
    """(figure, list of axes) without pyplot, so that nothing global is kept."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(drawn.subplots(rows, columns, squeeze=False).ravel())
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


def of_modes(runs: list[RunData], what: str) -> str:
    """The label of what `curves` draws."""
    return f"{what}, mean of modes" if len(runs) > 1 else what


def look(own: Style, line: str = "-") -> dict:
    """A style as matplotlib's keywords for a line with markers."""
    return {"color": own.color, "marker": own.marker, "linestyle": line, "markersize": 4, "linewidth": 1.4}


def looks(runs: list[RunData]) -> list[dict]:
    """The look of each run: of its arm (a further run of an arm is dashed), but by number if several are all of one
    arm."""
    arms = [arm_of(run.config) for run in runs]
    if len(runs) > 1 and len(set(arms)) == 1:
        return [look(series(i)) for i in range(len(runs))]
    return [look(style(arm), LINES[arms[:i].count(arm) % len(LINES)]) for i, arm in enumerate(arms)]


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` steps; NaN where the value itself is missing, so a gap stays a gap."""
    if width < 2 or len(values) < width:
        return values
    kernel, finite = np.ones(width), np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    count = np.convolve(finite.astype(float), kernel, "same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def curves(axes, runs: list[RunData], key: str) -> None:
    """A metric at every step, faint, and its running mean: by mode for one run, for several the mean of their modes.

    key: of metrics.jsonl with {} for the mode, such as "solver/{}/entropy". NaN breaks a line.
    """
    for run, own in zip(runs, looks(runs)):
        rows = {mode: (run.column(key.format(mode)), look(style(mode))) for mode in MODES}
        if len(runs) > 1:
            rows = {run.name: (np.mean([values for values, _ in rows.values()], axis=0), own)}
        for name, (values, shape) in rows.items():
            if np.isfinite(values).any():
                axes.plot(run.steps, values, color=shape["color"], alpha=0.2, linewidth=0.8)
                every = max(1, len(run.steps) // 8)
                axes.plot(run.steps, smooth(values, len(run.steps) // 20), label=name, markevery=every, **shape)


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


# ------------------------------------------------------------------------------------------------- command lines


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every instrument."""
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    parser.add_argument("--out", metavar="DIR", help="write the plots (PNG) there, and without --json the numbers")


def write_outputs(args, name: str, result: dict, figures: dict) -> None:
    """--json FILE and --out DIR/NAME.json, DIR/FIGURE.png; says where. figures: name -> a figure or its PNG bytes."""
    numbers = args.json or (args.out and Path(args.out) / f"{name}.json")
    if not numbers:
        return
    for folder in (Path(numbers).parent, *([Path(args.out)] if args.out else [])):
        folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(numbers, result)
    written = [numbers]
    for title, drawn in figures.items() if args.out else ():
        written.append(Path(args.out) / f"{title}.png")
        written[-1].write_bytes(drawn if isinstance(drawn, bytes) else png(drawn))
    print("\nwritten: " + ", ".join(map(str, written)))


def print_change(name: str, first: dict, last: dict, more: str = "") -> None:
    """A line: an estimate at the start and at the end of a run, with n of both; name: filled up to its column."""
    print(f"  {name}{shown(first)} -> {shown(last)}  (n {first['n']}, {last['n']}){more}")
