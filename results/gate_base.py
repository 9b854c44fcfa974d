"""Gates b and d, on the untrained base: what it can do as it is, and what it can do when it is made to think."""

from __future__ import annotations

import argparse

import numpy as np

from azr.passk import share_interval
from azr.tasks import MODES, Task
from gate_lab import DIRECT, Lab, Store
from gate_numbers import LEVELS, STYLES, TRACED, Counts, full_prefix, given_style, paired, style_difference
from gate_text import grid, styles_table, table

TEMPERATURES = {1.0: 16, 0.8: 8, 0.6: 16, 0.4: 8, 0.2: 8}  # and answers a task: styles are looked at in two of them
A_CELL, SAMPLES = 25, 16  # held-out tasks of a mode and level, and answers to each where styles are looked at
FEW_A_CELL = 10  # where a task gets many answers
MANY, FIRST_LOOK = 256, 32  # answers that say whether a task is out of reach, and those that often say that it is not
STYLE_SAMPLES = 64
SURE = 0.95
HARD, EASY = (4, 5, 6), (1,)  # levels
FORCED = ("direct", "full")


def cell(options: argparse.Namespace, a_cell: int) -> int:
    """Held-out tasks of each mode and level: `a_cell`, or 2 with --quick."""
    return 2 if options.quick else a_cell


def samples(options: argparse.Namespace, n: int) -> int:
    """Answers to a task: n, or at most 4 with --quick."""
    return min(4, n) if options.quick else n


# ---------------------------------------------------------------- base


def base(options: argparse.Namespace) -> str:
    """Measures what base.json lacks; the report as Markdown."""
    with Lab(options.model, seed=options.seed) as lab:
        store = base_store(options, lab)
        part = lab.part(cell(options, A_CELL))
        # greedy decoding is cheap, and gains are measured with it: all tasks
        store.get("T0", lab.answer, lab.part(2 if options.quick else None), 1, 0.0)
        for temperature, n in TEMPERATURES.items():
            store.get(f"T{temperature:g}", lab.answer, part, samples(options, n), temperature)
        store.get("reach", reach, lab, lab.part(cell(options, FEW_A_CELL)), samples(options, MANY))
        return base_report(lab, store)


def base_store(options: argparse.Namespace, lab: Lab) -> Store:
    """base.json. ValueError if it was made with another model or other settings."""
    return Store(options.out / "base.json", {"model": lab.digest, "seed": options.seed, "longest": lab.longest})


def reach(lab: Lab, index: list[int], n: int) -> list:
    """[place, answers, right ones] of each task at temperature 1: n answers, or fewer where those say enough.

    With FIRST_LOOK answers of which some but at most three quarters are right, a task is neither below one in 256 (it
    was solved) nor above .95 (whose chance to be right so seldom is 1 in 20,000).
    """
    look = min(FIRST_LOOK, n)
    first_right = {row[0]: right_of(row) for row in lab.answer(index, look, 1.0)}
    open_ = [i for i in index if n > look and (first_right[i] == 0 or first_right[i] > 0.75 * look)]
    more = {row[0]: right_of(row) for row in lab.answer(open_, n - look, 1.0, first=look)} if open_ else {}
    return [[i, n if i in more else look, first_right[i] + more.get(i, 0)] for i in index]


def right_of(row: list) -> int:
    """How many answers of a row of `Lab.answer` are right, over its styles."""
    return sum(cell[1] for cell in row[1].values())


def base_report(lab: Lab, store: Store) -> str:
    """The Markdown about the base as it is: accuracies, styles, lengths, pass@k, tasks out of reach."""
    results = {name: lab.counts(store.parts[name]) for name in ("T0", *(f"T{t:g}" for t in TEMPERATURES))}
    rows = []
    for name, counts in results.items():
        values = [counts.interval(), *(float(counts.of(mode).accuracy.mean()) for mode in MODES)]
        values += [float(counts.of(levels=[at]).accuracy.mean()) for at in LEVELS]
        rows.append([name, len(counts), counts.n[0], *values])
    header = ["accuracy", "tasks", "answers", "all", *MODES, *(f"level {at}" for at in LEVELS)]
    lines = [table(header, rows), grid("greedy accuracy", results["T0"], lambda c: c.accuracy.mean())]
    for name in ("T1", "T0.6", "T0"):
        lines += [f"Styles, {name}:", styles_table(results[name])]
    lines.append(grid("tokens of a response, T1", results["T1"], Counts.tokens, "{:.0f}"))
    ks = [k for k in (1, 2, 4, 8) if 2 * k <= results["T1"].n.min()]
    rows = [[name, *(results[name].pass_at(k) for k in ks)] for name in ("T1", "T0.6")]
    lines.append(table(["pass@k", *(f"k {k}" for k in ks)], rows))
    return "\n".join([*lines, reach_report(lab, store.parts["reach"])])


def reach_report(lab: Lab, rows: list) -> str:
    """Gate d: shares of tasks out of reach, and of tasks that are nearly sure."""
    index, n, right = (np.array(column) for column in zip(*rows))
    modes = np.array([lab.tasks[i].mode for i in index])
    shares = []
    for mode in (None, *MODES):
        mine = np.ones(len(index), bool) if mode is None else modes == mode
        never, sure = right[mine] == 0, right[mine] / n[mine] > SURE
        shares.append([mode or "all", mine.sum(), share_interval(never * 1.0), share_interval(sure * 1.0)])
    return table([f"T1, {n.max()} answers", "tasks", "none right", f"above {SURE}"], shares)


# ---------------------------------------------------------------- forced


def forced(options: argparse.Namespace) -> str:
    """Measures what forced.json lacks; the report as Markdown."""
    with Lab(options.model, seed=options.seed) as lab:
        store = forced_store(options, lab)
        for style in FORCED:
            begun = {i: prefix(lab.tasks[i], style) for i in lab.part(cell(options, A_CELL))}
            part = [i for i, text in begun.items() if text is not None]
            begun = [begun[i] for i in part]
            store.get(f"{style} T0", lab.answer, part, 1, 0.0, begun)
            store.get(f"{style} T0.6", lab.answer, part, samples(options, SAMPLES), 0.6, begun)
        few = lab.part(cell(options, FEW_A_CELL))
        for temperature in (1.0, 0.6):
            store.get(f"own T{temperature:g}", lab.answer, few, samples(options, STYLE_SAMPLES), temperature)
        return forced_report(lab, store)


def forced_store(options: argparse.Namespace, lab: Lab) -> Store:
    """forced.json. ValueError if it was made with another model or other settings."""
    return Store(options.out / "forced.json", {"model": lab.digest, "seed": options.seed, "longest": lab.longest})


def prefix(task: Task, style: str) -> str | None:
    """How a response to the task begins in the style; None: no text makes it do so.

    Abduction has no full one: a search begins with arguments, and giving them would give the answer away or spoil it.
    """
    if style == "direct":
        return DIRECT
    if task.mode == "deduction":
        return full_prefix(task.program, task.input)
    return "try " if task.mode == "induction" else None


def forced_report(lab: Lab, store: Store) -> str:
    """The Markdown about the base made to think: accuracies by style, full minus direct, by own style."""
    results = {name: lab.counts(rows) for name, rows in store.parts.items()}
    rows = []
    for name, counts in results.items():
        for mode in MODES if not name.startswith("own") else ():
            if len(mine := counts.of(mode)):
                values = [float(mine.of(levels=[at]).accuracy.mean()) for at in LEVELS]
                rows.append([name, mode, *values, mine.interval(), mine.n[0]])
    header = ["accuracy, forced", "mode", *(f"level {at}" for at in LEVELS), "all", "answers"]
    lines = [table(header, rows), "Full minus direct (gate b):"]
    lines.append(table(["mode", "decoding", "levels", "tasks", "difference"], forced_differences(results)))
    for name in ("own T1", "own T0.6"):
        lines += [f"Accuracy given the style of its own thought (tasks with such an answer), {name[4:]}:"]
        lines.append(given_table(results[name]))
    return "\n".join(lines)


def forced_differences(results: dict[str, Counts]) -> list[list]:
    """[mode, decoding, levels, tasks, full minus direct]"""
    rows = []
    for mode in ("deduction", "induction"):
        for at in ("T0", "T0.6"):
            for name, levels in (("1", EASY), ("4-6", HARD), ("4-7", (*HARD, LEVELS[-1]))):
                direct, full = (results[f"{style} {at}"].of(mode, levels) for style in FORCED)
                rows.append([mode, at, name, len(full), paired(direct, full)])
    return rows


def given_table(counts: Counts) -> str:
    """Accuracy given each style by mode and level group, and a worked-out thought against none, paired."""
    rows = []
    for mode in MODES:
        for name, levels in (("1", EASY), ("2-3", (2, 3)), ("4-6", HARD), ("7", LEVELS[-1:]), ("all", LEVELS)):
            mine = counts.of(mode, levels)
            cells = []
            for style in STYLES:
                value, lacking = given_style(mine, [style])
                cells.append("-" if value is None else f"{value.mean:.3f} ({len(mine) - lacking})")
            rows.append([mode, name, len(mine), *cells, *style_difference(mine, ["none"], mine, TRACED)])
    return table(["mode", "levels", "tasks", *STYLES, "full or check less none", "tasks without both"], rows)
