"""What `compare` shows: a page of Markdown, which the screen gets too, and a plot as PNG bytes.

markdown(result) -> str     show(page, out)     plot(result) -> bytes      result: what azr/evals/compare.py gives
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from azr.console import prose, say

# Of Okabe and Ito's palette, which colour-blind readers tell apart.
COLORS = {"base": "#0072B2", "tuned": "#D55E00", "difference": "#009E73", "crossing": "#E69F00"}
MARKERS = {"base": "o", "tuned": "s", "difference": "."}
STAR = (
    "*: all problems have the same value, so nothing can be resampled. The interval is Wilson's at 0 and 1, Agresti "
    "and Min's for no difference, else the rule of three's (of as many other problems, at most about 3.7 differ)."
)
SET_NAMES = {
    "both": "solved by both",
    "base_only": "base only",
    "tuned_only": "tuned only",
    "neither": "neither",
    "SRR": "SRR: kept, of what the base solves",
    "NDR": "NDR: new, of what tuned solves",
}


def span(value: dict | None, sign: bool = False) -> str:
    """mean [low, high], with a star where all problems are equal; "-" where undefined."""
    if value is None or value["mean"] is None:
        return "-"
    form = "{:+.3f}" if sign else "{:.3f}"
    if value["low"] is None:
        return form.format(value["mean"])
    star = "*" if value.get("all_equal") else ""
    return f"{form} [{form}, {form}]{star}".format(value["mean"], value["low"], value["high"])


def p_value(p: float) -> str:
    """Writes a p value with three digits, and "<.001" below that."""
    return "<.001" if p < 0.001 else f"{p:.3f}"


# ---------------------------------------------------------------- the page


def solved_line(result: dict) -> str:
    """Says how many problems each model solved at least once in all its samples, with McNemar's exact p."""
    counts = result["solved_in_n"]
    return (
        f"Within all {result['samples_per_problem']} samples: both {counts['both']}, base only {counts['base_only']}, "
        f"tuned only {counts['tuned_only']}, neither {counts['neither']} "
        f"(McNemar, exact: p {p_value(counts['mcnemar_p'])})."
    )


def curve_table(result: dict) -> str:
    """A row a k: both models, their difference, its p and who is ahead."""
    rows = [
        [
            str(row["k"]),
            span(row["base"]),
            span(row["tuned"]),
            span(row["difference"], sign=True),
            p_value(row["p"]),
            p_value(row["p_holm"]),
            row["ahead"] or "-",
        ]
        for row in result["pass@k"]
    ]
    return _table(["k", "base", "tuned", "tuned - base", "p", "p, Holm", "ahead"], rows)


def set_table(result: dict) -> str:
    """The shares of problems in each set, with SRR and NDR, and what two samples of the base give."""
    sets = result["sets"]
    if "SRR" not in sets:
        return "With one sample a problem there is no second base to set beside it."
    rows = [
        [
            name,
            *("-" if sets[key][side] is None else f"{sets[key][side]:.3f}" for side in ("tuned", "second_base")),
            span(sets[key]["difference"], sign=True),
        ]
        for key, name in SET_NAMES.items()
    ]
    return _table([f"within {sets['samples']} samples", "tuned", "second base", "tuned - second base"], rows) + (
        f"\n\nSecond base: {sets['second_base']}, averaged over all ways to split them; base against tuned likewise at "
        "half the samples. Two samples of one model differ too, so only the last column is a claim."
    )


def answer_table(result: dict) -> str:
    """What the answers are like, as far as it is recorded."""
    answers = result["answers"]
    pairs = [
        ("distinct correct answers per problem", answers["distinct_correct"]),
        ("entropy of a problem's answers, nats", answers["entropy"]),
        ("answers cut by the length limit", answers["truncated"]),
    ]
    rows = [[name, span(v["base"]), span(v["tuned"]), span(v["difference"], sign=True)] for name, v in pairs if v]
    return _table(["answers", "base", "tuned", "tuned - base"], rows) if rows else ""


def markdown(result: dict) -> str:
    """The whole comparison as one page, the sentence first."""
    tables = curve_table(result), answer_table(result)
    parts = [
        result["sentence"],
        f"{result['benchmark'] or 'benchmark not recorded'}: {result['problems']} problems, "
        f"{result['samples_per_problem']} samples each. Intervals: {result['intervals']}. base: `{result['base']}`, "
        f"tuned: `{result['tuned']}`.",
        tables[0],
        "p: sign-flip permutation test on per-problem pass@k, two-sided; Holm: corrected over the k of this table. "
        "A model is called ahead where the corrected p is below 0.05 and the interval excludes 0.",
        solved_line(result),
        set_table(result),
        tables[1],
        STAR if "*" in "".join(tables) else "",
        "![pass@k](compare.png)",
        *(f"Note: {note}." for note in result["notes"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns stand one below the other as plain text too."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def show(page: str, out: Path) -> None:
    """The page on the screen, its notes aside: tables as they are, the rest broken between words."""
    for line in page.splitlines():
        if not line.startswith(("![", "Note: ")):
            (say if line.startswith("|") else prose)(line)
    say(f"tables and plot: {out / 'compare.md'}, compare.json, compare.png")


# ---------------------------------------------------------------- the plot


def plot(result: dict) -> bytes:
    """PNG: both curves with bands, their paired difference, and the histogram of per-problem accuracy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.5), layout="constrained")
    curves, difference, histogram = figure.subplots(1, 3)
    ks = [row["k"] for row in result["pass@k"]]
    for name in ("base", "tuned"):
        _band(curves, ks, [row[name] for row in result["pass@k"]], COLORS[name], name)
    curves.set_ylabel("pass@k")
    curves.set_title("each with its own 95 % band", loc="left", fontsize=9.5)
    curves.legend(frameon=False, fontsize=8)
    _band(difference, ks, [row["difference"] for row in result["pass@k"]], COLORS["difference"], None)
    difference.axhline(0, color="black", linewidth=0.8)
    for row in result["pass@k"]:
        if row["ahead"]:
            difference.plot(row["k"], row["difference"]["mean"], "o", color=COLORS["difference"], markersize=6)
    if result["crossing"]:
        k = result["crossing"]["k"]
        difference.axvspan(k["low"], k["high"], color=COLORS["crossing"], alpha=0.2, label="crossing, 95 %")
        difference.legend(frameon=False, fontsize=8)
    difference.set_title("tuned - base, paired; dots: established", loc="left", fontsize=9.5)
    for axes in (curves, difference):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.set_xlabel("k")
    _bars(histogram, result["histogram"])
    for axes in (curves, difference, histogram):
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _band(axes, ks: list[int], values: list[dict], color: str, name: str | None) -> None:
    low, mean, high = (np.array([value[key] for value in values], dtype=float) for key in ("low", "mean", "high"))
    axes.fill_between(ks, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(ks, mean, color=color, marker=".", label=name)


def _bars(axes, histogram: dict) -> None:
    place = np.arange(len(histogram["bins"]))
    for shift, name in ((-0.2, "base"), (0.2, "tuned")):
        axes.bar(place + shift, histogram[name], width=0.4, color=COLORS[name], label=name)
    axes.set_xticks(place, histogram["bins"], rotation=60)
    axes.set_title("problems by share of right answers", loc="left", fontsize=9.5)
    axes.legend(frameon=False, fontsize=8)
