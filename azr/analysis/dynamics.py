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

from azr.analysis import figures
from azr.analysis.figures import shown
from azr.analysis.reader import MODES, ROLES, Digest, RunData, read_run, read_samples, stages
from azr.console import warn
from azr.fits import as_json, difference_of_means, linear_fit, ratio_of_sums
from azr.passk import bootstrap_interval, share_interval

WINDOWS = 10
PROGRAMS = 100  # a window, whose distances are measured
PARTNERS = 10  # others of the window that each is compared with
REASONS_SHOWN = 6

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


def profiles(programs: list[str]) -> list[Counter | None] | None:
    """The pq-grams of every program, None for one that does not parse; None for all if the child process died."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROFILES],
            input=json.dumps(programs),
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            return None
        return [None if row is None else Counter(row) for row in json.loads(done.stdout)]
    except (subprocess.TimeoutExpired, ValueError):
        return None


def tree_distance(a: Counter, b: Counter) -> float:
    """1 - 2 |A and B| / (|A| + |B|) of two multisets of pq-grams."""
    return 1 - 2 * (a & b).total() / max(1, a.total() + b.total())


def mean_distances(rows: list[Counter], keys: list, same: bool, seed: int) -> np.ndarray:
    """(programs,) mean distance of each to up to PARTNERS others whose key is equal (same) or not; NaN: no other."""
    rng, result = random.Random(seed), []
    for i, row in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i and (keys[j] == keys[i]) == same]
        picked = rng.sample(others, min(PARTNERS, len(others)))
        result.append(np.mean([tree_distance(row, rows[j]) for j in picked]) if picked else np.nan)
    return np.array(result)


def diversity(digest: Digest, bounds: list[tuple[int, int]]) -> dict:
    """Per window: distances among proposed programs and among induction answers, distinct programs, duplicates."""
    samples = [_sampled(digest, first, last, number) for number, (first, last) in enumerate(bounds)]
    flat = [text for proposed, _, _ in samples for text in proposed]
    flat += [text for _, answered, _ in samples for _, text in answered]
    rows = profiles(flat)
    if rows is None:
        warn("the process that parses programs ended; tree distances are left out")
        rows = [None] * len(flat)
    rest = iter(rows)  # in the order of `flat`: None for what is no program
    windows = []
    for number, (proposed, _, counts) in enumerate(samples):
        trees = [row for row in (next(rest) for _ in proposed) if row is not None]
        values = mean_distances(trees, list(range(len(trees))), False, number)
        windows.append(counts | {"program_distance": _mean(values)})
    for number, (_, answered, _) in enumerate(samples):
        pairs = [(key, row) for (key, _), row in zip(answered, (next(rest) for _ in answered)) if row is not None]
        keys, trees = [key for key, _ in pairs], [row for _, row in pairs]
        for name, same in (("answer_distance_same_task", True), ("answer_distance_other_task", False)):
            windows[number][name] = _mean(mean_distances(trees, keys, same, number))
    return {"windows": windows, "distance": "pq-gram, p = 2, q = 3"}


def _sampled(digest: Digest, first: int, last: int, number: int) -> tuple[list[str], list[tuple[str, str]], dict]:
    """Up to PROGRAMS valid programs and as many induction answers (task, program) of a window, and its counts."""
    from azr.tasks import parse_answer
    from azr.tasks.program import read_program

    rng = random.Random(f"diversity/{number}")
    # an induction proposal is about a program that it was given
    proposals = [p for p in digest.proposals if first <= p.step <= last and p.mode != "induction"]
    valid = [p.program for p in proposals if p.task]
    proposed = rng.sample(valid, min(PROGRAMS, len(valid)))
    texts = [item for step in range(first, last + 1) for item in digest.programs.get(step, [])]
    texts = sorted(rng.sample(texts, min(PROGRAMS, len(texts))))
    parsed = [(key, parse_answer("induction", text).value) for key, text in texts]
    repeats = np.array([p.reason == "duplicate" for p in proposals], float)
    counts = {
        "distinct_share": len({read_program(text).form for text in proposed}) / len(proposed) if proposed else None,
        "distinct_n": len(proposed),
        "duplicate_rate": as_json(share_interval(repeats), len(proposals)) if proposals else None,
    }
    return proposed, [(key, text) for key, text in parsed if text], counts


def _mean(values: np.ndarray) -> dict | None:
    values = values[np.isfinite(values)]
    return as_json(bootstrap_interval(values), len(values)) if len(values) > 1 else None


# ------------------------------------------------------------------------------------------------------- the rest


def validity(digest: Digest, bounds: list[tuple[int, int]]) -> dict:
    """Per role and mode: the share of every reason in each window, n, and the share of `ok` with its interval."""
    result = {}
    for (role, mode), by_step in digest.reasons.items():
        rows = []
        for a, b in bounds:
            total = sum((by_step[step] for step in range(a, b + 1) if step in by_step), Counter())
            n = total.total()
            ok = np.repeat([1.0, 0.0], [total["ok"], n - total["ok"]])
            shares = {reason: count / n for reason, count in total.most_common()}
            rows.append({"n": n, "shares": shares, "ok": as_json(share_interval(ok), n)} if n else None)
        if any(rows):
            result[f"{role}/{mode}"] = rows
    return result


def solve_rates(digest: Digest, bounds: list[tuple[int, int]], answers: int) -> dict:
    """Per mode: how many of `answers` were right, as shares of the valid proposals, in the first and last window."""
    result = {}
    for mode in MODES:
        for name, (a, b) in (("first", bounds[0]), ("last", bounds[-1])):
            rates = [p.solve_rate for p in digest.proposals if p.mode == mode and a <= p.step <= b]
            rates = np.array([r for r in rates if r is not None], float)
            if len(rates):
                histogram = np.bincount(np.rint(rates * answers).astype(int), minlength=answers + 1) / len(rates)
                result[f"{mode}/{name}"] = {
                    "n": len(rates),
                    "histogram": histogram.tolist(),
                    "mean": as_json(share_interval(rates), len(rates)),
                    "learnable": as_json(share_interval(((rates > 0) & (rates < 1)).astype(float)), len(rates)),
                }
    return result


def lengths(digest: Digest, bounds: list[tuple[int, int]]) -> dict:
    """Per mode: answer tokens of right and wrong answers by window, and tokens = b0 + b1 step / 100 + b2 right.

    b1 is the drift of length that is not explained by answering more or less often right; intervals resample steps.
    """
    result = {}
    for mode, columns in digest.answers.items():
        step, tokens, correct = columns["step"], columns["tokens"], columns["correct"]
        if not len(step):
            continue
        windows = []
        for a, b in bounds:
            row = {}
            for name, chosen in (("right", correct), ("wrong", ~correct)):
                pick = (step >= a) & (step <= b) & chosen
                row[name] = None
                if pick.sum() > 1:
                    each = ratio_of_sums(tokens[pick], np.ones(pick.sum()), step[pick])
                    row[name] = as_json(each, int(pick.sum()))
            windows.append(row)
        fit = linear_fit(np.column_stack([step / 100, correct]), tokens, step)
        names = ("tokens_at_start", "per_100_steps", "right_minus_wrong")
        result[mode] = {"windows": windows, "n": fit.n, "steps": fit.groups}
        result[mode] |= {name: as_json(value, fit.n) for name, value in zip(names, fit.coefficients)}
    return result


def phases(run: RunData) -> dict:
    """Seconds of a step by phase: mean over steps with interval, and share of the step."""
    total = run.column("time/step")
    result = {}
    for key in run.keys("time/"):
        if key in ("time/elapsed", "time/step"):
            continue
        values = run.column(key)
        measured = np.isfinite(values) & np.isfinite(total)
        if measured.any():
            row = as_json(bootstrap_interval(values[measured]), int(measured.sum()))
            result[key.removeprefix("time/")] = row | {"share": float(values[measured].sum() / total[measured].sum())}
    return result


def ends(run: RunData, key: str, part: int) -> dict | None:
    """A metric over the first and the last `part` steps, with the difference; None if it was not logged."""
    values = run.column(key)
    a, b = (x[np.isfinite(x)] for x in (values[:part], values[-part:]))
    if not len(a) or not len(b):
        return None
    rows = {name: as_json(bootstrap_interval(x), len(x)) for name, x in (("first", a), ("last", b))}
    return rows | {"change": as_json(difference_of_means(a, b), min(len(a), len(b)))}


def dynamics(run: RunData, digest: Digest, windows: int = WINDOWS) -> dict:
    """All of it for one run, ready for JSON."""
    bounds, tenth = stages(run.steps, windows), max(1, len(run.steps) // 10)
    gap, outside = run.column("train/log_prob_gap"), run.column("train/gap_outside_10")
    keys = [f"{role}/{mode}/reward" for role in ROLES for mode in MODES]
    answers = run.config.get("answers") or 8
    return {
        "windows": bounds,
        "validity": validity(digest, bounds),
        "solve_rate": solve_rates(digest, bounds, answers),
        "answers_a_task": answers,
        "lengths": lengths(digest, bounds),
        "diversity": diversity(digest, bounds),
        "rewards": {key: row for key in keys if (row := ends(run, key, tenth))},
        "log_prob_gap": _mean(gap) | {"max": float(np.nanmax(gap))} if np.isfinite(gap).sum() > 1 else None,
        "gap_outside_10": _mean(outside) if np.isfinite(outside).sum() > 1 else None,
        "time": phases(run),
        "notes": run.notes + digest.notes,
    }


# ------------------------------------------------------------------------------------------------------- the screen


def print_result(run: RunData, result: dict) -> None:
    """Prints the result of `dynamics`, first window against last; "n" counts samples."""
    (a, b), (c, d) = result["windows"][0], result["windows"][-1]
    print(
        f"{run.path}: steps {run.steps[0]} to {run.steps[-1]}. Below: steps {a}-{b} -> steps {c}-{d} [95 % intervals]\n"
    )
    print("Share of proposals that are valid, and what the others failed on most:")
    for mode in MODES:
        rows = result["validity"].get(f"proposer/{mode}")
        if rows and rows[0] and rows[-1]:
            why = [(reason, share) for reason, share in rows[-1]["shares"].items() if reason != "ok"][:3]
            causes = ", ".join(f"{reason} {100 * share:.0f} %" for reason, share in why) or "none refused"
            counts = f"(n {rows[0]['n']}, {rows[-1]['n']})"
            print(f"  {mode:10s}{shown(rows[0]['ok'])} -> {shown(rows[-1]['ok'])}  {counts}; last: {causes}")
    print("Solve rate of the valid ones, and the share that teaches anything (neither never nor always solved):")
    for mode in MODES:
        first, last = (result["solve_rate"].get(f"{mode}/{end}") for end in ("first", "last"))
        if first and last:
            print(
                f"  {mode:10s}{shown(first['mean'])} -> {shown(last['mean'])};  {shown(first['learnable'])} -> "
                f"{shown(last['learnable'])}  (n {first['n']}, {last['n']})"
            )
    print("Answer length in tokens, controlled for being right: drift per 100 steps, right minus wrong:")
    for mode, row in result["lengths"].items():
        print(f"  {mode:10s}{shown(row['per_100_steps'], 2)};  {shown(row['right_minus_wrong'], 2)}  (n {row['n']})")
    first, last = result["diversity"]["windows"][0], result["diversity"]["windows"][-1]
    print("Distance of syntax trees (0 same, 1 nothing in common) and duplicates:")
    for key, name in (
        ("program_distance", "between proposed programs"),
        ("answer_distance_other_task", "between induction answers, other tasks"),
        ("answer_distance_same_task", "between induction answers, same task"),
        ("duplicate_rate", "proposals refused as duplicates"),
    ):
        if first.get(key) and last.get(key):
            print(f"  {name:40s}{shown(first[key])} -> {shown(last[key])}  (n {first[key]['n']}, {last[key]['n']})")
    print("Mean rewards:")
    for key, row in result["rewards"].items():
        print(f"  {key.removesuffix('/reward'):22s}{shown(row['first'])} -> {shown(row['last'])}")
    if result["log_prob_gap"]:
        gap = result["log_prob_gap"]
        print(
            f"Sampler-trainer gap, mean |log-prob gap|: {gap['mean']:.1e} [{gap['low']:.1e}, {gap['high']:.1e}]"
            f", worst step {gap['max']:.1e}"
        )
    if result["gap_outside_10"]:
        print(f"Tokens whose ratio of trainer to sampler is outside [0.9, 1.1]: {shown(result['gap_outside_10'])}")
    print(
        "Seconds a step: "
        + ", ".join(f"{n} {row['mean']:.2f} ({100 * row['share']:.0f} %)" for n, row in result["time"].items())
    )


# ------------------------------------------------------------------------------------------------------- plots


def middles(bounds) -> list[float]:
    """The step in the middle of each window (first step, last step): where its point is drawn."""
    return [(a + b) / 2 for a, b in bounds]


def draw_validity(result: dict):
    """Stacked shares of the reasons, a panel a mode."""
    drawn, axes = figures.figure(1, 3, 3.5, 2.9)
    total = Counter()
    for mode in MODES:
        for row in result["validity"].get(f"proposer/{mode}", []):
            total.update({reason: share for reason, share in (row or {"shares": {}})["shares"].items()})
    reasons = [reason for reason, _ in total.most_common() if reason != "ok"][:REASONS_SHOWN]
    for one, mode in zip(axes, MODES):
        rows = [row or {"shares": {}} for row in result["validity"].get(f"proposer/{mode}", [])]
        x = middles(result["windows"])[: len(rows)]
        stack = [[row["shares"].get(reason, 0) for row in rows] for reason in reasons]
        stack.append([sum(v for k, v in row["shares"].items() if k not in (*reasons, "ok")) for row in rows])
        if rows:
            names = [reason.replace("_", " ") for reason in (*reasons, "other")]
            one.stackplot(x, stack, labels=names, colors=figures.CYCLE[: len(stack)], alpha=0.85)
        top = max((sum(column) for column in zip(*stack)), default=0)
        one.set_ylim(0, max(0.05, 1.1 * top))
        figures.label(one, f"{mode}: why proposals are refused", "step", "share of proposals", legend=False)
    handles, names = axes[0].get_legend_handles_labels()
    if handles:
        drawn.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=7.5, frameon=False)
    return drawn


def draw_solve_rates(result: dict):
    """How many of the n answers to a valid proposal are right, first window beside last, a panel a mode."""
    drawn, axes = figures.figure(1, 3, 3.5, 2.7)
    n = result["answers_a_task"]
    for one, mode in zip(axes, MODES):
        for i, end in enumerate(("first", "last")):
            row = result["solve_rate"].get(f"{mode}/{end}")
            if row:
                bounds = result["windows"][-i]
                text = f"steps {bounds[0]}-{bounds[1]}, n {row['n']}"
                one.bar(np.arange(n + 1) + 0.4 * (i - 0.5), row["histogram"], 0.4, color=figures.CYCLE[i], label=text)
        figures.label(one, f"{mode}: right answers of {n}", "", "share of valid proposals")
    return drawn


def draw_lengths(result: dict):
    """The length of right and of wrong answers in tokens over the windows, a panel a mode."""
    drawn, axes = figures.figure(1, 3, 3.5, 2.7)
    x = middles(result["windows"])
    for one, mode in zip(axes, MODES):
        rows = result["lengths"].get(mode, {}).get("windows", [])
        for i, name in enumerate(("right", "wrong")):
            if any(row[name] for row in rows):
                figures.points(one, x, [row[name] for row in rows], f"{name} answers", figures.CYCLE[i])
        one.set_ylim(bottom=0)
        figures.label(one, f"{mode}: answer length", "step", "tokens")
    return drawn


def draw_diversity(result: dict):
    """Tree distances of proposed programs and of induction answers, and the duplicates, over the windows."""
    drawn, (left, middle, right) = figures.figure(1, 3, 3.5, 2.7)
    x, windows = middles(result["windows"]), result["diversity"]["windows"]
    figures.points(left, x, [w["program_distance"] for w in windows], "proposed programs", figures.CYCLE[0])
    names = ("answer_distance_other_task", "answer_distance_same_task")
    for i, (key, name) in enumerate(zip(names, ("answers to other tasks", "answers to the same task"))):
        figures.points(middle, x, [w.get(key) for w in windows], name, figures.CYCLE[i])
    figures.points(right, x, [w["duplicate_rate"] for w in windows], "refused as duplicates", figures.CYCLE[1])
    for one, title in zip((left, middle, right), ("tree distance of proposals", "of induction answers", "duplicates")):
        one.set_ylim(0, 1 if one is not right else None)
        figures.label(one, title, "step", "0 same, 1 nothing in common" if one is not right else "share of proposals")
    return drawn


def draw_rewards(run: RunData):
    """Mean reward of each role and mode at every step, gaps marked, and the seconds of each phase of a step."""
    drawn, axes = figures.figure(1, 3, 3.5, 2.7)
    width = max(1, len(run.steps) // 20)
    for one, role in zip(axes, ROLES):
        for mode in MODES:
            values = run.column(f"{role}/{mode}/reward")
            figures.curve(one, run.steps, values, mode, figures.MODE_COLORS[mode], width)
        figures.label(one, f"{role}: mean reward", "step")
    known = {row["step"] for row in run.rows}
    for one in axes[:2]:
        figures.mark_gaps(one, run.steps, np.array([step in known for step in run.steps]))
    names = [n for n in phases(run)]
    values = [np.nan_to_num(run.column(f"time/{n}")) for n in names]
    if names:
        axes[2].stackplot(run.steps, values, labels=names, colors=figures.CYCLE[: len(names)], alpha=0.85)
        axes[2].set_ylim(0, 1.2 * np.nanpercentile(np.sum(values, axis=0), 97))
        axes[2].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7.5, frameon=False, reverse=True)
    figures.label(axes[2], "seconds a step, by phase", "step", "s", legend=False)
    return drawn


def plots(run: RunData, result: dict) -> dict:
    """Every figure of a run, by the name that its file gets."""
    return {
        "validity": draw_validity(result),
        "solve_rates": draw_solve_rates(result),
        "lengths": draw_lengths(result),
        "diversity": draw_diversity(result),
        "rewards": draw_rewards(run),
    }


# ------------------------------------------------------------------------------------------------------- flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `analyze.py dynamics` to its parser."""
    parser.add_argument("run", metavar="RUN", help="a run directory")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"parts of the run (default {WINDOWS})")
    figures.add_output_arguments(parser)


def main(args) -> int:
    """Measures, prints, writes. ValueError, in one line, for bad input."""
    if args.windows < 1:
        raise ValueError(f"--windows must be at least 1, not {args.windows}")
    run = read_run(args.run)
    result = dynamics(run, read_samples(run), args.windows)
    for note in result["notes"]:
        warn(f"{run.path}: {note}")
    print_result(run, result)
    figures.write_outputs(args, "dynamics", result, plots(run, result) if args.out else {})
    return 0
