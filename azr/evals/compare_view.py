"""What `compare` shows: a page of Markdown, which the screen gets too, and a plot as PNG bytes.

markdown(result) -> str     show(page, out)     plot(result) -> bytes      result: what azr/evals/compare.py gives
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from azr import drawing, passk
from azr.console import counted, prose, say
from azr.palette import COMPARISON, GRAY, MODELS, style

COLORS = {name: own.color for name, own in (MODELS | COMPARISON).items()}
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
    return passk.shown(value, sign=sign) + ("*" if value and value.get("all_equal") else "")


def p_value(p: float) -> str:
    """Writes a p value with three digits, and "<.001" below that."""
    return "<.001" if p < 0.001 else f"{p:.3f}"


# ---------------------------------------------------------------- the page


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
    return table(["k", "base", "tuned", "tuned - base", "p", "p, Holm", "ahead"], rows)


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
    return table([f"within {sets['samples']} samples", "tuned", "second base", "tuned - second base"], rows) + (
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
    return table(["answers", "base", "tuned", "tuned - base"], rows) if rows else ""


def markdown(result: dict) -> str:
    """The whole comparison as one page, the sentence first."""
    counts, samples = result["solved_in_n"], result["samples_per_problem"]
    return _page(
        result,
        f", {counted(samples, 'sample')} each",
        curve_table(result),
        "p: sign-flip permutation test on per-problem pass@k, two-sided; Holm: corrected over the k of this table. "
        "A model is called ahead where the corrected p is below 0.05 and the interval excludes 0.",
        f"Within all {samples} samples: both {counts['both']}, base only {counts['base_only']}, tuned only "
        f"{counts['tuned_only']}, neither {counts['neither']} (McNemar, exact: p {p_value(counts['mcnemar_p'])}).",
        set_table(result),
        answer_table(result),
    )


def _page(result: dict, samples: str, *parts: str) -> str:
    """What both pages begin with, the parts between, and the ends: stars, what a claim needs, the plot, the notes."""
    parts = [
        result["sentence"],
        f"{result['benchmark'] or 'benchmark not recorded'}: {result['problems']} problems{samples}. Intervals: "
        f"{result['intervals']}. base: `{result['base']}`, tuned: `{result['tuned']}`.",
        *parts,
        STAR if any(part.startswith("|") and "*" in part for part in parts) else "",
        result.get("needs") or "",
        "![pass@k](compare.png)",
        *(f"Note: {note}." for note in result["notes"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def page_and_plot(result: dict) -> tuple[str, bytes]:
    """The page and the plot of a comparison at one temperature or at several."""
    if "temperatures" not in result:
        return markdown(result), plot(result)
    sides = {
        side: {
            t: {name: (row[name] or {}).get(side) for name in ("pass@1", "pass@k")}
            for t, row in result["temperatures"].items()
        }
        for side in ("base", "tuned")
    }
    return frontier_page(result), frontier_plot(sides, result["k"], result["problems"])


def frontier_page(result: dict) -> str:
    """The comparison of two models over temperatures, the sentence first."""
    k, best, rows = result["k"], result["best"], []
    for t, at in result["temperatures"].items():
        cells = []
        for name in ("pass@1", "pass@k") if k else ("pass@1",):
            row = at[name] or {}
            for side in ("base", "tuned"):
                mark = " best" if row and best[name] and best[name][f"{side}_temperature"] == float(t) else ""
                cells.append(f"{row[side]['mean']:.3f}{mark}" if row.get(side) else "-")
            cells.append(span(row.get("difference"), sign=True))
        rows.append([t if float(t) else "greedy", *cells])
    head = [text for name in (1, k) if name for text in (f"base pass@{name}", "tuned", "tuned - base")]
    several = sum(at["pass@1"]["difference"] is not None for at in result["temperatures"].values()) > 1
    where = "Curves, sets and answers at one temperature: compare its two directories, such as A/T1 and B/T1." * several
    return _page(result, "", table(["T", *head], rows), where)


def frontier_table(frontier: dict) -> str:
    """A row a temperature of one model."""
    k = frontier["k"]
    rows = [
        [
            t if float(t) else "greedy",
            str(row["samples_per_problem"]),
            span(row["pass@1"]),
            *([span(row["pass@k"])] if k else []),
            span(row["greedy_share"]),
        ]
        for t, row in frontier["temperatures"].items()
    ]
    return table(["T", "answers", "pass@1", *([f"pass@{k}"] if k else []), "answers that are the greedy one"], rows)


def table(header: Sequence[str], rows: list[Sequence]) -> str:
    """A Markdown table whose columns stand one below the other as plain text too."""
    header, *rows = ([str(cell) for cell in line] for line in (header, *rows))
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def show(page: str, out: Path, needs: str | None = None) -> None:
    """The page on the screen, its notes aside: tables and `needs` as they are, the rest broken between words."""
    lines = [line for line in page.splitlines() if not line.startswith(("![", "Note: "))]
    for line, before in zip(lines, ["", *lines]):
        if line or before:  # one blank line where some parts are left out
            # a table and a command line are not broken: one could not be read, the other not be pasted
            (say if line.startswith("|") or line == needs else prose)(line)
    say(f"tables and plot: {out / 'compare.md'}, compare.json, compare.png")


# ---------------------------------------------------------------- the plot


def plot(result: dict) -> bytes:
    """PNG: both curves with bands, and their paired difference."""
    drawn, (curves, gap) = drawing.figure(2, 4.0, 3.5)
    rows, x = result["pass@k"], "k, answers per problem"
    ks = [row["k"] for row in rows]
    for name, axes in (("base", curves), ("tuned", curves), ("difference", gap)):
        _band(axes, ks, [row[name] for row in rows], name)
    drawing.zero_line(gap)
    for row in rows:
        if row["ahead"]:
            gap.plot(row["k"], row["difference"]["mean"], "D", color=COLORS["difference"], markersize=7)
    if result["crossing"]:
        k = result["crossing"]["k"]
        gap.axvspan(k["low"], k["high"], color=COLORS["crossing"], alpha=0.2, label="crossing, 95 %")
    drawing.label(curves, "each with its own 95 % band", x, "pass@k, mean over problems")
    drawing.label(gap, "tuned - base, paired; large: established", x, "difference of pass@k")
    for axes in (curves, gap):
        drawing.doubling(axes, ks)
    drawing.legend(drawn, [curves, gap])
    return drawing.png(drawn)


def frontier_plot(sides: dict[str, dict[str, dict]], k: int | None, problems: int) -> bytes:
    """PNG of pass@1 against pass@k. sides: "base" or "tuned" -> temperature -> {"pass@1", "pass@k"}, or None there."""
    drawn, (axes,) = drawing.figure(1, 6.5, 4.6)
    for name, rows in sides.items():
        hot = {t: (row["pass@1"], row["pass@k"]) for t, row in rows.items() if row["pass@1"] and row["pass@k"]}
        greedy = next((row["pass@1"]["mean"] for t, row in rows.items() if not float(t) and row["pass@1"]), None)
        frontier_line(axes, hot, greedy, name, name)
    axes.plot([], [], color=GRAY, linewidth=2, label="greedy, on the axis")
    title, y = f"{problems} problems; small numbers: temperature; bars: 95 %", f"pass@{k}"
    drawing.label(axes, title, "pass@1", y if k else "(too few samples for pass@k)")
    drawing.legend(drawn, [axes])
    return drawing.png(drawn)


def frontier_line(
    axes, points: dict[str, tuple[dict, dict]], greedy: float | None, side: str, label: str | None
) -> None:
    """One model: (pass@1, pass@k) at each temperature above 0, named by it, with 95 % bars where there are intervals;
    greedy accuracy as a stroke on the axis, for it has no pass@k. side: "base" or "tuned", for colour and marker."""
    color, marker = style(side)
    pairs = [[one["mean"] for one in pair] for pair in points.values()]
    axes.plot(*(zip(*pairs) if pairs else ([], [])), color=color, marker=marker, markersize=4, label=label)
    for (t, pair), at in zip(points.items(), pairs):
        axes.annotate(f"{float(t):g}", at, xytext=(3, 3), textcoords="offset points", fontsize=7, color=color)
        if all("low" in one and one["low"] is not None for one in pair):
            bars = [[[one["mean"] - one["low"]], [one["high"] - one["mean"]]] for one in pair]
            axes.errorbar(*at, xerr=bars[0], yerr=bars[1], color=color, alpha=0.35, linewidth=0.8)
    if greedy is not None:
        axes.axvline(greedy, ymax=0.06, color=color, linewidth=2)


def _band(axes, ks: list[int], values: list[dict], name: str) -> None:
    color, marker = style(name)
    low, mean, high = (np.array([value[key] for value in values], dtype=float) for key in ("low", "mean", "high"))
    axes.fill_between(ks, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(ks, mean, color=color, marker=marker, markersize=4, label=name)
