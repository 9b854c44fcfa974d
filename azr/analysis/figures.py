"""Small plots for the instruments: curves with gaps, bands, bars; PNG files and PNG bytes. matplotlib is loaded late.

Also the flags that every instrument takes (--json, --out) and what they write.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np

from azr.jsonl import write_json_atomic

MODE_COLORS = {"deduction": "#1b6ca8", "abduction": "#c8553d", "induction": "#3f7d20", "all": "#333333"}
CYCLE = ["#1b6ca8", "#c8553d", "#3f7d20", "#7d4e9e", "#b8860b", "#008b8b", "#8b3a62", "#555555"]


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


def label(axes, title: str, x: str = "", y: str = "", legend: bool = True) -> None:
    """Titles a panel and its axes; the legend is drawn only if something in the panel has a name."""
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel(x, fontsize=8.5)
    axes.set_ylabel(y, fontsize=8.5)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7.5, frameon=False)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` steps; NaN where the value itself is missing, so a gap stays a gap."""
    if width < 2 or len(values) < width:
        return values
    kernel, finite = np.ones(width), np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    count = np.convolve(finite.astype(float), kernel, "same")
    with np.errstate(invalid="ignore"):
        return np.where(finite, total / np.maximum(count, 1), np.nan)


def curve(axes, x, values, name: str, color: str, width: int = 1, style: str = "-") -> None:
    """A curve with the raw values faint behind its running mean. NaN breaks the line."""
    if not np.isfinite(values).any():
        return
    if width > 1:
        axes.plot(x, values, color=color, alpha=0.18, linewidth=0.8)
    shown = smooth(np.asarray(values, float), width)
    marker = "o" if np.isfinite(shown).sum() < 30 else None
    axes.plot(x, shown, style, color=color, linewidth=1.5, label=name, marker=marker, markersize=3)


def points(axes, x, intervals: list, name: str, color: str, connect: bool = True, shift: float = 0.0) -> None:
    """Estimates with their intervals: dicts with mean, low, high; None and NaN are gaps."""
    nan = {"mean": np.nan, "low": np.nan, "high": np.nan}
    rows = [row or nan for row in intervals]
    mean, low, high = (np.array([row[k] if row[k] is not None else np.nan for row in rows], float) for k in nan)
    error = np.maximum(0, np.nan_to_num(np.stack([mean - low, high - mean])))
    axes.errorbar(
        np.asarray(x, float) + shift,
        mean,
        error,
        fmt="o-" if connect else "o",
        color=color,
        markersize=3.5,
        linewidth=1.3,
        elinewidth=0.9,
        capsize=2,
        label=name,
    )


def mark_gaps(axes, steps: np.ndarray, known: np.ndarray) -> None:
    """A grey band over steps whose line is missing."""
    for step in steps[~known]:
        axes.axvspan(step - 0.5, step + 0.5, color="#bbbbbb", alpha=0.5, linewidth=0)


def png(drawn, dpi: int = 110) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------- command lines


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every instrument."""
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    parser.add_argument(
        "--out", metavar="DIR", help="write the plots (PNG) there, and the numbers if --json is not given"
    )


def write_outputs(args, name: str, result: dict, figures: dict) -> None:
    """--json FILE and --out DIR/NAME.json, DIR/FIGURE.png; says where."""
    written = []
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(Path(args.json), result)
        written.append(args.json)
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        if not args.json:
            write_json_atomic(out / f"{name}.json", result)
            written.append(str(out / f"{name}.json"))
        for title, drawn in figures.items():
            (out / f"{title}.png").write_bytes(png(drawn, 150))
            written.append(str(out / f"{title}.png"))
    if written:
        print("\nwritten: " + ", ".join(written))


def shown(interval, digits: int = 3) -> str:
    """An estimate with its interval for the screen; takes an Interval or its dict."""
    row = interval if isinstance(interval, dict) else interval.__dict__
    if row["mean"] is None or row["mean"] != row["mean"]:
        return "-"
    if row["low"] is None or row["low"] != row["low"]:
        return f"{row['mean']:.{digits}f} [no interval]"
    return f"{row['mean']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
