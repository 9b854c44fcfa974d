"""The plots of the report page that several runs share: entropy, held-out accuracy, proposer, pass@k, probe.

Left out: the plots of one instrument (dynamics, difficulty), which draw themselves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from azr.analysis import entropy, figures
from azr.analysis.reader import MODES, ROLES, RunData
from azr.evals.held_out import difference
from azr.fits import as_json
from azr.jsonl import tolerant_lines
from azr.passk import Interval, powers_of_two, share_interval

if TYPE_CHECKING:
    from azr.analysis.report import Entry


def draw_overview(entries: list[Entry]):
    """Entropy of both roles and held-out accuracy, over all runs."""
    drawn, axes = figures.figure(1, 3, 3.7, 3.0)
    runs = [entry.run for entry in entries]
    entropy.draw_training(axes[:2], runs)
    for i, run in enumerate(runs):
        color = figures.CYCLE[i % len(figures.CYCLE)]
        modes = MODES if len(runs) == 1 else ("all",)
        for mode in modes:
            values = run.column(f"held_out/{mode}/accuracy")
            logged, tasks = np.isfinite(values), held_out_count(run, mode)
            name = f"{mode}, n {tasks}" if len(runs) == 1 else run.name
            tone = figures.MODE_COLORS[mode] if len(runs) == 1 else color
            if logged.any():
                rows = [as_json(share_of(value, tasks)) for value in values[logged]]
                figures.points(axes[2], run.steps[logged], rows, name, tone, shift=0.6 * (i + modes.index(mode)))
    axes[2].set_xlim(left=0)
    axes[2].set_ylim(bottom=0)
    figures.label(axes[2], "held-out accuracy, greedy", "step", "share solved")
    for run in runs:
        logged = {row["step"] for row in run.rows}
        for one in axes[:2]:
            figures.mark_gaps(one, run.steps, np.array([step in logged for step in run.steps]))
    return drawn


def held_out_count(run: RunData, mode: str) -> int:
    """How many held-out tasks of a mode there are; 0 if unknown."""
    path, notes = run.path / "eval" / "held_out.jsonl", []
    if not path.is_file():
        return 0
    return sum(mode in ("all", row.get("mode")) for row in tolerant_lines(path, notes))


def share_of(value: float, n: int) -> Interval:
    """The interval of a share of n tasks that were each right or wrong; NaN if n is unknown."""
    right = round(value * n)
    return share_interval(np.repeat([1.0, 0.0], [right, n - right])) if n else Interval(value, math.nan, math.nan)


def draw_proposer(entries: list[Entry]):
    """Valid, solved and learnable shares by step."""
    drawn, axes = figures.figure(1, 3, 3.7, 2.8)
    titles = {
        "valid_rate": "valid proposals",
        "solve_rate": "solve rate of own tasks",
        "learnable_rate": "0 < solve rate < 1",
    }
    for one, (key, title) in zip(axes, titles.items()):
        for i, entry in enumerate(entries):
            run, width = entry.run, max(1, len(entry.run.steps) // 20)
            if len(entries) == 1:
                for mode in MODES:
                    values = run.column(f"proposer/{mode}/{key}")
                    figures.curve(one, run.steps, values, mode, figures.MODE_COLORS[mode], width)
            else:
                values = np.mean([run.column(f"proposer/{mode}/{key}") for mode in MODES], axis=0)
                figures.curve(one, run.steps, values, run.name, figures.CYCLE[i % len(figures.CYCLE)], width)
        one.set_ylim(0, 1)
        figures.label(one, title, "step", "share")
    return drawn


def draw_pass_at_k(entries: list[Entry]):
    """pass@k of the base and of every run over k; for one run also by mode. Bands: paired differences from the base."""
    one_run = len(entries) == 1
    panels = [(entries[0], m) for m in [None, *entries[0].passes[0].modes]] if one_run else [(e, None) for e in entries]
    drawn, axes = figures.figure(1, len(panels), 2.8 if one_run else 3.4, 2.8)
    for one, (entry, mode) in zip(axes, panels):
        base, trained, step = entry.passes
        ks = powers_of_two(min(base.settings["samples"], trained.settings["samples"]))
        gap, curve, before = (
            difference(base, trained, ks, mode),
            trained.pass_at_k(ks, mode),
            base.pass_at_k(ks, mode),
        )
        one.plot(ks, before.mean, "o-", color="#333333", markersize=3.5, label="base")
        one.plot(ks, curve.mean, "o-", color=figures.CYCLE[0], markersize=3.5, label=f"step {step}")
        band = [np.clip(before.mean + side, 0, 1) for side in (gap.low, gap.high)]
        one.fill_between(ks, *band, color=figures.CYCLE[0], alpha=0.2, linewidth=0)
        one.set_xscale("log", base=2)
        one.set_xticks(ks, [str(k) for k in ks])
        what = (mode or "all") if one_run else entry.run.name
        figures.label(one, f"{what}: {len(base.of(mode))} held-out tasks", "k (answers a task)", "pass@k")
    return drawn


def draw_probe(entries: list[Entry]):
    """Entropy on the frozen probe by checkpoint, a panel a role: by mode for one run, else by run."""
    drawn, axes = figures.figure(1, 2, 4.2, 2.8)
    for one, role in zip(axes, ROLES):
        for i, entry in enumerate(entries):
            steps = [int(step) for step in entry.extra["probe"]["probe"]]
            groups = list(entry.extra["probe"]["probe"].values())
            for j, mode in enumerate(MODES if len(entries) == 1 else ("all",)):
                rows = [group.get(f"{role}/{mode}", {}).get("token_mean") for group in groups]
                name = mode if len(entries) == 1 else entry.run.name
                color = figures.MODE_COLORS[mode] if len(entries) == 1 else figures.CYCLE[i % len(figures.CYCLE)]
                figures.points(one, steps, rows, name, color, shift=0.3 * (i + j))
        one.set_ylim(bottom=0)
        figures.label(one, f"{role}, frozen probe ({', '.join(e.run.name for e in entries)})", "step", "nats a token")
    return drawn
