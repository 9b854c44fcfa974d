"""The plots of RESULTS.md, from what tables.py loads. Bands and bars: 95 % over training seeds (Student's t)."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from azr.fits import over_runs
from azr.passk import pass_at_k

KS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def band(axes, x, columns: list, label: str) -> None:
    """columns: at each x the values of the seeds; mean and interval."""
    intervals = [over_runs(column) for column in columns]
    (line,) = axes.plot(x, [i.mean for i in intervals], marker=".", label=label)
    low, high = [i.low for i in intervals], [i.high for i in intervals]
    axes.fill_between(x, low, high, alpha=0.15, color=line.get_color())


def sharpening(arms: dict, names: list[str]):
    """pass@k of each arm minus the base."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    base = {k: np.mean([rates(result, k) for result in arms["base"]], axis=0) for k in KS}
    for name in names:
        wide = {k: [result for result in arms[name] if result["held_out"]["n"] >= 2 * k] for k in KS}
        columns = [[(rates(result, k) - base[k]).mean() for result in wide[k]] for k in KS if wide[k]]
        band(axes, [k for k in KS if wide[k]], columns, name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(KS, [str(k) for k in KS])
    axes.set(xlabel="k", ylabel="pass@k minus that of the base", title="Gain over the base")
    axes.legend(fontsize=8)
    return figure


def rates(result: dict, k: int) -> np.ndarray:
    """(tasks,) pass@k of each held-out task in one result."""
    return pass_at_k(result["held_out"]["n"], result["held_out"]["correct"], k)


def entropy(arms: dict, names: list[str], probe):
    """The solver's entropy on the frozen probe, against steps and against the norm of the update."""
    figure, pair = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True)
    for name in names:
        curves = [probe(result, "solver") for result in arms[name]]
        steps = [0, *sorted(map(int, arms[name][0]["checkpoints"]))]
        change = np.array([values - values[0] for values, _ in curves])
        band(pair[0], steps, list(change.T), name)
        pair[1].plot(np.mean([norm for _, norm in curves], axis=0), change.mean(axis=0), marker=".", label=name)
    pair[0].set(xlabel="step", ylabel="entropy minus that of the base, nats", title="solver, frozen probe")
    pair[1].set(xlabel="norm of the update / norm of the base", title="the same against the size of the update")
    pair[1].legend(fontsize=8)
    return figure


def sparsity(arms: dict, names: list[str]):
    """S1 of every checkpoint against the size of its update, with the null of the same spectrum."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for name in names:
        rows = [row for result in arms[name] for row in result["checkpoints"].values()]
        axes.scatter([row["U1_rms"] for row in rows], [100 * row["S1"] for row in rows], s=14, label=name)
    every = sorted(
        (row["U1_rms"], 100 * row["S5"]["null"])
        for name in names
        for result in arms[name]
        for row in result["checkpoints"].values()
    )
    axes.plot(*zip(*every), color="black", linewidth=0.7, label="random update, same spectrum")
    axes.set_xscale("log")
    axes.set(
        xlabel="RMS of the update", ylabel="S1: unchanged in bf16, %", title="Sparsity reads the size of the update"
    )
    axes.legend(fontsize=8)
    return figure


def rewards(arms: dict, names: dict[str, str]):
    """Held-out pass@1 and pass@64 of the seven proposer rewards; a point a seed, the interval of several."""
    figure, pair = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True)
    shown = {label: name for label, name in names.items() if arms.get(name)}
    for axes, k in zip(pair, (1, 64)):
        base = np.mean([rates(result, k) for result in arms["base"]], axis=0)
        for y, (label, name) in enumerate(shown.items()):
            values = [(rates(result, k) - base).mean() for result in arms[name]]
            interval = over_runs(values)
            axes.plot([interval.low, interval.high], [y, y], color="tab:blue")
            axes.plot(values, [y] * len(values), ".", color="tab:blue", markersize=5)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlabel=f"pass@{k} minus that of the base", yticks=range(len(shown)), yticklabels=list(shown))
    return figure


def forgetting(points: list[dict]):
    """The drop of the untrained skill against KL, norm and sparsity."""
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.6), sharey=True)
    keys = {
        "kl_forward/untrained": "forward KL on that text, nats",
        "U1_rel_fro": "norm of the update / base",
        "S1": "unchanged share S1",
    }
    names = [name for name in ("joint", "rlvr", "sft", "off-policy") if any(p["arm"] == name for p in points)]
    for part, (key, label) in zip(axes, keys.items()):
        for name in (*names, "others"):
            chosen = [p for p in points if p["arm"] == name or name == "others" and p["arm"] not in names]
            color = {"color": "lightgray", "zorder": 0} if name == "others" else {}
            drops = [100 * p["drop"] for p in chosen]
            part.scatter([p[key] for p in chosen], drops, s=12, label=name, **color)
        part.set(xlabel=label)
    axes[0].set(ylabel="untrained skill lost, points")
    axes[-1].legend(fontsize=8)
    return figure


def save(figure, path: Path) -> None:
    """Writes a figure without matplotlib's version, so that equal figures are equal files, and closes it."""
    path.parent.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
