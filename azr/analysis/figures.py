"""Curves of runs, and the flags that every instrument takes (--json, --out) with what they write."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from azr.analysis.reader import MODES, RunData
from azr.drawing import look, png
from azr.jsonl import write_json_atomic
from azr.palette import arm_of, series, style
from azr.passk import shown

STEP = "training step"
LINES = ("-", "--", ":", "-.")  # runs of the same arm


def of_modes(runs: list[RunData], what: str) -> str:
    """The label of what `curves` draws."""
    return f"{what}, mean of modes" if len(runs) > 1 else what


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


# ------------------------------------------------------------------------------------------------- command lines


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every instrument."""
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    parser.add_argument("--out", metavar="DIR", help="write the plots (PNG) there, and without --json the numbers")


def check_outputs(args) -> None:
    """ValueError, before anything is computed: --json names a directory, or --out a file."""
    if (file := getattr(args, "json", None)) and Path(file).is_dir():
        raise ValueError(f"--json {file}: is a directory; give the name of a file, or the directory with --out")
    if (folder := getattr(args, "out", None)) and Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"--out {folder}: is a file; --out takes a directory, --json a file")


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
