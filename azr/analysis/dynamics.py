"""What happened in a run: validity, solve rates, lengths controlled for correctness, diversity, rewards, time.

    python analyze.py dynamics runs/tiny-0 --out plots --json dynamics.json

Reads metrics.jsonl and samples.jsonl; no model is loaded. Diversity is the pq-gram distance (Augsten et al. 2005,
p = 2, q = 3) of syntax trees without names: 0 for the same tree, 1 for nothing in common. Programs are parsed in a
child process, because a deeply nested one can take an interpreter down. Left out: embeddings.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections import Counter

import numpy as np

from azr import drawing
from azr.analysis import figures
from azr.analysis.figures import STEP, print_change
from azr.analysis.reader import (
    MODES,
    ROLES,
    TREND_STEPS,
    Digest,
    RunData,
    first_and_last,
    mean_row,
    read_run,
    read_samples,
    stages,
)
from azr.command import Number
from azr.console import warn
from azr.fits import as_json, linear_fit
from azr.palette import BLACK, BLUE, COLORS, GRAY, GREEN, PURPLE, SKY, VERMILION, YELLOW
from azr.passk import share_interval, shown

WINDOWS = 10
PROGRAMS = 100  # proposed in a window, whose distances are measured
PARTNERS = 10  # others of the window that each is compared with
REASONS_SHOWN = 6
# The phases of a step, stacked from below in this order.
PHASES = {
    "propose": SKY,
    "validate": BLUE,
    "solve": GRAY,
    "judge": BLACK,
    "reward": GREEN,
    "update": VERMILION,
    "evaluate": YELLOW,
}
NO_SECONDS = ("elapsed", "step", "unjudged", "lanes_lost")  # under time/: totals, and counts that differ by machine
# reads a JSON list of programs, writes for each the hashes of its pq-grams, or null if it does not parse
_PROFILES = """
import ast, json, sys, zlib
sys.setrecursionlimit(5000)
def label(node):
    if isinstance(node, ast.Attribute): return "." + node.attr
    if isinstance(node, ast.Constant): return type(node.value).__name__
    if isinstance(node, ast.Name): return node.id if node.id in dir(__builtins__) else "name"
    return type(node).__name__
def profile(tree):
    found, stack = [], [(None, tree)]
    while stack:
        parent, node = stack.pop()
        own = label(node)
        children = [c for c in ast.iter_child_nodes(node) if not isinstance(c, ast.expr_context)]
        row = ["*", "*"] + [label(c) for c in children] + ["*", "*"]
        for i in range(len(row) - 2 if children else 1):
            found.append(zlib.crc32("/".join([str(parent), own] + row[i:i + 3]).encode()))
        stack.extend((own, c) for c in children)
    return found
answers = []
for program in json.load(sys.stdin):
    try:
        answers.append(profile(ast.parse(program)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        answers.append(None)
json.dump(answers, sys.stdout)
"""


# ------------------------------------------------------------------------------------------------------- diversity


def profiles(programs: list[str]) -> list[Counter | None]:
    """The pq-grams of every program, None for one that does not parse; for all, with a warning, if the child died."""
    command = [sys.executable, "-I", "-c", _PROFILES]
    try:
        done = subprocess.run(command, input=json.dumps(programs), capture_output=True, text=True, timeout=60)
        return [None if row is None else Counter(row) for row in json.loads(done.stdout)]
    except (subprocess.TimeoutExpired, ValueError):
        warn("the process that parses programs ended; tree distances are left out")
        return [None] * len(programs)


def tree_distance(a: Counter, b: Counter) -> float:
    """1 - 2 |A and B| / (|A| + |B|) of two multisets of pq-grams."""
    return 1 - 2 * (a & b).total() / max(1, a.total() + b.total())


def mean_distances(rows: list[Counter], seed: int) -> np.ndarray:
    """(programs,) mean distance of each to up to PARTNERS others; NaN: no other."""
    rng, result = random.Random(seed), []
    for i, row in enumerate(rows):
        others = [other for j, other in enumerate(rows) if j != i]
        picked = rng.sample(others, min(PARTNERS, len(others)))
        result.append(np.mean([tree_distance(row, other) for other in picked]) if picked else np.nan)
    return np.array(result)


def diversity(digest: Digest, bounds: list[tuple[int, int]]) -> dict:
    """In the first and last window: distances among up to PROGRAMS proposed programs, and the share of duplicates."""
    result = {}
    for name, number in (("first", 0), ("last", len(bounds) - 1)):
        first, last = bounds[number]
        # an induction proposal is about a program that it was given
        proposals = [p for p in digest.proposals if first <= p.step <= last and p.mode != "induction"]
        valid = [p.task["program"] for p in proposals if p.task]
        texts = random.Random(f"diversity/{number}").sample(valid, min(PROGRAMS, len(valid)))
        duplicates = np.array([p.reason == "duplicate" for p in proposals], float)
        result[name] = {
            "duplicate_rate": mean_row(duplicates, share_interval),
            "program_distance": mean_row(mean_distances([tree for tree in profiles(texts) if tree], number)),
        }
    return result


# ------------------------------------------------------------------------------------------------------- the rest


def validity(digest: Digest, bounds: list[tuple[int, int]]) -> dict:
    """Per mode: the share of every reason of its proposals in each window, n, and that of `ok` with its interval."""
    result = {}
    for mode, by_step in digest.reasons.items():
        rows = []
        for a, b in bounds:
            total = sum((by_step[step] for step in range(a, b + 1) if step in by_step), Counter())
            n = total.total()
            ok = np.repeat([1.0, 0.0], [total["ok"], n - total["ok"]])
            shares = {reason: count / n for reason, count in total.most_common()}
            rows.append({"n": n, "shares": shares, "ok": mean_row(ok, share_interval)} if n else None)
        if any(rows):
            result[mode] = rows
    return result


def solve_rates(digest: Digest, bounds: list[tuple[int, int]]) -> dict:
    """Per mode, of its valid proposals in the first and in the last window: the mean solve rate, and the share that is
    solved sometimes but not always."""
    result = {}
    for mode in MODES:
        for name, (a, b) in (("first", bounds[0]), ("last", bounds[-1])):
            rates = [p.solve_rate for p in digest.proposals if p.mode == mode and a <= p.step <= b]
            rates = np.array([r for r in rates if r is not None], float)
            if len(rates):
                learnable = ((rates > 0) & (rates < 1)).astype(float)
                result[f"{mode}/{name}"] = {
                    "mean": mean_row(rates, share_interval),
                    "learnable": mean_row(learnable, share_interval),
                }
    return result


def lengths(digest: Digest) -> dict:
    """Per mode: tokens of an answer = b0 + b1 step / 100 + b2 right.

    b1 is the drift of length that is not explained by answering more or less often right; intervals resample steps.
    """
    result = {}
    for mode, columns in digest.answers.items():
        step, tokens, correct = columns["step"], columns["tokens"], columns["correct"]
        if len(step):
            fit = linear_fit(np.column_stack([step / 100, correct]), tokens, step)
            _, drift, right = fit.coefficients
            result[mode] = {"n": fit.n, "per_100_steps": as_json(drift), "right_minus_wrong": as_json(right)}
    return result


def phases(run: RunData) -> dict:
    """Seconds of a step by phase: mean over steps with interval, and share of the step."""
    total, result = run.column("time/step"), {}
    logged = (key.removeprefix("time/") for row in run.rows for key in row if key.startswith("time/"))
    for name in dict.fromkeys((*PHASES, *logged)):
        values = run.column(f"time/{name}")
        measured = np.isfinite(values) & np.isfinite(total)
        if measured.any() and name not in NO_SECONDS:
            share = float(values[measured].sum() / total[measured].sum())
            result[name] = mean_row(values[measured]) | {"share": share}
    return result


def probe_kl(run: RunData) -> dict:
    """{"role/mode": {step: KL}} of the steps that measured it, mode "all" too: KL(policy at step 0 || policy then) on
    the frozen probe, nats per token (azr/train/loop.py)."""
    columns = {f"{role}/{mode}": run.column(f"{role}/{mode}/probe_kl") for role in ROLES for mode in (*MODES, "all")}
    logged = {name: np.isfinite(values) for name, values in columns.items()}
    return {
        name: dict(zip(run.steps[there].tolist(), columns[name][there].tolist()))
        for name, there in logged.items()
        if there.any()
    }


def dynamics(run: RunData, digest: Digest, windows: int = WINDOWS) -> dict:
    """All of it for one run, ready for JSON."""
    bounds = stages(run.steps, windows)
    gap, outside = run.column("train/log_prob_gap"), run.column("train/gap_outside_10")
    return {
        "windows": bounds,
        "validity": validity(digest, bounds),
        "solve_rate": solve_rates(digest, bounds),
        "lengths": lengths(digest),
        "diversity": diversity(digest, bounds),
        "rewards": first_and_last(run, "reward", MODES),
        "entropy": first_and_last(run, "entropy", MODES),
        "probe_kl": probe_kl(run),
        "log_prob_gap": mean_row(gap) | {"max": float(np.nanmax(gap))} if np.isfinite(gap).any() else None,
        "gap_outside_10": mean_row(outside),
        "time": phases(run),
        "notes": run.notes + digest.notes,
    }


# ------------------------------------------------------------------------------------------------------- the screen


def print_result(run: RunData, result: dict) -> None:
    """Prints the result of `dynamics`, first window against last; "n" counts samples."""
    (a, b), (c, d) = result["windows"][0], result["windows"][-1]
    print(f"{run.path}: steps {a}-{b} -> steps {c}-{d} of {run.steps[0]}-{run.steps[-1]} [95 % intervals]\n")
    if "proposer" in run.roles:
        print_proposals(result)
    print("Answer length in tokens, controlled for being right: drift per 100 steps; right minus wrong:")
    few = len(run.steps) < TREND_STEPS
    for mode, row in result["lengths"].items():
        drift = f"- (of {TREND_STEPS} steps or more)" if few else shown(row["per_100_steps"], 2)
        print(f"  {mode:10s}{drift};  {shown(row['right_minus_wrong'], 2)}  (n {row['n']})")
    for what, key in (("Mean rewards", "rewards"), ("Entropy of its own samples, nats per token", "entropy")):
        print(f"{what}, first and last tenth of the steps:")
        for name, row in result[key].items():
            print_change(name.ljust(22), row["first"], row["last"])
    if moved := result["probe_kl"]:
        a, *_, b = [*(steps := next(iter(moved.values()))), *steps]
        print(f"KL from the policy of step 0, on its text (the probe), nats per token, step {a} -> {b}:")
        for name, rows in moved.items():
            print(f"  {name:22s}{rows[a]:.4f} -> {rows[b]:.4f}")
    if gap := result["log_prob_gap"]:
        print(f"Sampler-trainer gap, mean |log-prob gap|: {gap['mean']:.1e}, worst step {gap['max']:.1e}")
    if result["gap_outside_10"]:
        print(f"Tokens whose ratio of trainer to sampler is outside [0.9, 1.1]: {shown(result['gap_outside_10'])}")
    seconds = (f"{n} {row['mean']:.2f} ({100 * row['share']:.0f} %)" for n, row in result["time"].items())
    print("Seconds per step: " + ", ".join(seconds))


def print_proposals(result: dict) -> None:
    """The part of `print_result` about what was proposed: valid, solved, how different."""
    print("Share of proposals that are valid, and what the others failed on most:")
    for mode in MODES:
        rows = result["validity"].get(mode)
        if rows and rows[0] and rows[-1]:
            why = [(reason, share) for reason, share in rows[-1]["shares"].items() if reason != "ok"][:3]
            causes = ", ".join(f"{reason} {100 * share:.0f} %" for reason, share in why) or "none refused"
            print_change(f"{mode:10s}", rows[0]["ok"], rows[-1]["ok"], f"; last: {causes}")
    for key, title in (
        ("mean", "Solve rate of the valid ones:"),
        ("learnable", "Share of them that teaches anything (neither never nor always solved):"),
    ):
        print(title)
        for mode in MODES:
            first, last = (result["solve_rate"].get(f"{mode}/{end}") for end in ("first", "last"))
            if first and last:
                print_change(f"{mode:10s}", first[key], last[key])
    print("Proposed programs, distance of their syntax trees (0 same, 1 nothing in common), and duplicates:")
    first, last = (result["diversity"][end] for end in ("first", "last"))
    for key, name in (("program_distance", "distance"), ("duplicate_rate", "duplicates")):
        if first[key] and last[key]:
            print_change(f"{name:12s}", first[key], last[key])


# ------------------------------------------------------------------------------------------------------- plots


def draw_validity(result: dict):
    """Stacked shares of the reasons, a panel per mode, all on one scale."""
    drawn, axes = drawing.figure(3, 3.5, 2.9)
    shares = {mode: [row["shares"] if row else {} for row in result["validity"].get(mode, [])] for mode in MODES}
    total = sum((Counter(row) for rows in shares.values() for row in rows), Counter())
    reasons = [reason for reason, _ in total.most_common() if reason != "ok"][:REASONS_SHOWN]
    names, top = [reason.replace("_", " ") for reason in (*reasons, "other")], 0.05
    for one, (mode, rows) in zip(axes, shares.items()):
        stack = [[row.get(reason, 0) for row in rows] for reason in reasons]
        stack.append([sum(v for k, v in row.items() if k not in (*reasons, "ok")) for row in rows])
        if rows:
            middles = [(a + b) / 2 for a, b in result["windows"]]
            one.stackplot(middles, stack, labels=names, colors=[*COLORS[: len(reasons)], GRAY], alpha=0.85)
        top = max([top, *(1.1 * sum(column) for column in zip(*stack))])
        drawing.label(one, f"{mode}: refused, by reason", STEP, "share of proposals")
    for one in axes:
        one.set_ylim(0, top)
    drawing.legend(drawn, axes)
    return drawn


def draw_rewards(run: RunData):
    """Mean reward of each role and mode at every step."""
    drawn, axes = drawing.figure(len(run.roles), 5.2, 3.1)
    for one, role in zip(axes, run.roles):
        figures.curves(one, [run], f"{role}/{{}}/reward")
        drawing.label(one, f"{role}: reward", STEP, "mean reward per sample")
    drawing.legend(drawn, axes)
    return drawn


def draw_time(run: RunData, seconds: dict):
    """The seconds of each phase of a step, stacked; phases that take less than a thousandth of it are left out."""
    drawn, (axes,) = drawing.figure(1, 6.0, 3.3)
    title, names = "time of a step, by phase", [name for name, row in seconds.items() if row["share"] >= 0.001]
    if names:
        values = [np.nan_to_num(run.column(f"time/{name}")) for name in names]
        colors = [PHASES.get(name, PURPLE) for name in names]
        axes.stackplot(run.steps, values, labels=names, colors=colors, alpha=0.85)
        total = np.sum(values, axis=0)
        axes.set_ylim(0, top := 1.2 * np.percentile(total, 97))
        if beyond := int((total > top).sum()):
            title += f" ({beyond} steps go beyond the top, up to {total.max():.0f} s)"
    drawing.label(axes, title, STEP, "seconds")
    drawing.legend(drawn, [axes])
    return drawn


def plots(run: RunData, result: dict) -> dict:
    """Every figure of a run, by the name that its file gets."""
    drawn = {"validity": draw_validity(result)} if "proposer" in run.roles else {}
    return drawn | {"rewards": draw_rewards(run), "time": draw_time(run, result["time"])}


# ------------------------------------------------------------------------------------------------------- flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `analyze.py dynamics` to its parser."""
    parser.add_argument("run", metavar="RUN", help="a run directory")
    what = f"parts of the run (default {WINDOWS})"
    parser.add_argument("--windows", type=Number(int, 1, 10**4), default=WINDOWS, help=what)
    figures.add_output_arguments(parser)


def main(args) -> int:
    """Measures, prints, writes. ValueError, in one line, for bad input."""
    run = read_run(args.run)
    result = dynamics(run, read_samples(run), args.windows)
    for note in result["notes"]:
        warn(f"{run.path}: {note}")
    print_result(run, result)
    figures.write_outputs(args, "dynamics", result, plots(run, result) if args.out else {})
    return 0
