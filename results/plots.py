"""The plots of RESULTS.md, from what measured.py loads. Bands: 95 % over training seeds (Student's t)."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from azr.fits import over_runs
from azr.palette import style
from measured import KS, TEMPERATURES, WINDOW, Arms, available, is_full, solved

SHOWN = ("joint", "no-update", "frozen-base", "separate", "rlvr", "sft", "sft-traces")  # what is drawn


def look(name: str) -> dict:
    """Colour and marker of an arm, the same in every plot of the project."""
    return {**style(name)._asdict(), "label": "untrained" if name == "base" else name, "markersize": 5}


def band(axes, x, columns: list, name: str) -> None:
    """columns: at each x the values of the seeds; mean and interval."""
    intervals = [over_runs(column) for column in columns]
    axes.plot(x, [i.mean for i in intervals], **look(name))
    axes.fill_between(x, [i.low for i in intervals], [i.high for i in intervals], alpha=0.12, color=style(name).color)


def shown(arms: Arms, key: str = "sampled") -> list[str]:
    """The arms that have a colour and this measurement."""
    return [name for name in available(arms, key) if name in SHOWN]


def coverage(arms: Arms):
    """pass@k of each arm minus the base."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    base = {k: np.mean([solved(result, k) for result in arms["base"]], axis=0) for k in KS}
    for name in shown(arms):
        band(axes, KS, [[(solved(r, k) - base[k]).mean() for r in arms[name]] for k in KS], name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(KS, [str(k) for k in KS])
    axes.set(xlabel="k, answers a task", ylabel="pass@k minus that of the untrained model", title="Temperature 1")
    axes.legend(fontsize=8)
    return figure


def frontier(arms: Arms):
    """pass@16 against pass@1, a point a temperature."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for name in ("base", *shown(arms)):
        wide = [result for result in arms[name] if set(TEMPERATURES) <= {*result["sampled"], "0"}]
        if wide:
            points = [[np.mean([solved(r, k, t).mean() for r in wide]) for k in (1, 16)] for t in TEMPERATURES[:-1]]
            axes.plot(*zip(*points), **look(name))
            for t, point in zip(TEMPERATURES, points if name in ("base", "joint") else ()):
                axes.annotate(f"T {t}", point, fontsize=7, xytext=(4, 3), textcoords="offset points")
    axes.set(xlabel="pass@1", ylabel="pass@16", title="What decoding reaches, and what training reaches")
    axes.legend(fontsize=8)
    return figure


def curves(arms: Arms, key: tuple[str, str], labels: tuple[str, str], value):
    """Two panels of value(result, name) over the steps."""
    figure, pair = plt.subplots(1, 2, figsize=(9.5, 3.8))
    for axes, name, label in zip(pair, key, labels):
        for arm in shown(arms):
            rows = [values for r in arms[arm] if (values := value(r, name))]
            if rows:
                steps = WINDOW * np.arange(1, len(rows[0]) + 1)
                band(axes, steps, list(np.array(rows, float).T), arm)
        axes.set(xlabel="step", title=label)
    max(pair, key=lambda axes: len(axes.lines)).legend(fontsize=8)
    return figure


def entropy(arms: Arms):
    """Entropy of both roles on their own samples."""
    figure = curves(
        arms,
        ("proposer/all/entropy", "solver/all/entropy"),
        ("Proposer, own samples", "Solver, own samples"),
        lambda result, name: None if result["arm"].startswith("sft") else result["series"].get(name),
    )  # of sft the series is about the given text
    figure.axes[0].set_ylabel("entropy, nats a token")
    return figure


def proposals(arms: Arms):
    """Length of valid programs, and how often the untrained model solves them."""
    names = ("statements", "depth")
    titles = ("Statements of a valid program", "Depth of its syntax tree")
    return curves(arms, names, titles, lambda result, name: (result["proposals"] or {}).get(name))


def sparsity(arms: Arms):
    """Unchanged share against the size of the update: arms of adapters and trainings of every weight."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for name in (*shown(arms, "update"), *filter(is_full, arms)):
        arm = name.removeprefix("full-").rsplit("-", 3)[0] if is_full(name) else name
        color, marker = style(arm)
        filled = "none" if is_full(name) else color
        for r in arms[name]:
            x, y = r["update"]["U1_rms"], 100 * r["update"]["S1"]
            axes.plot(x, y, marker, color=color, markerfacecolor=filled, label=arm)
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1]))
    axes.legend(handles.values(), handles.keys(), fontsize=8)
    axes.set_xscale("log")
    axes.set(xlabel="RMS of the change of a weight", ylabel="same bf16 bits (S1), %")
    axes.set_title("Unchanged weights are a matter of size (hollow: every weight trained)", fontsize=10)
    return figure


def save_all(arms: Arms, directory: Path) -> None:
    """All plots as PNG."""
    directory.mkdir(parents=True, exist_ok=True)
    for make in (coverage, frontier, entropy, proposals, sparsity):
        figure = make(arms)
        figure.tight_layout()
        figure.savefig(directory / f"{make.__name__}.png", dpi=110)
        plt.close(figure)
