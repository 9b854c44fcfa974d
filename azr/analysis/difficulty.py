"""Does the proposer get harder, or the solver weaker? Proposals of every stage, solved by FIXED solvers.

    python analyze.py difficulty runs/tiny-0                        base, middle and final checkpoint; about a minute
    python analyze.py difficulty runs/qwen-3b-0 --questions 800 --mode deduction     the published analysis (2510.27072)
    python analyze.py difficulty runs/tiny-0 runs/tiny-1 runs/tiny-2    one after the other

The solve rate that training logs falls when tasks get harder and when the solver gets worse. A solver that does not
change tells the two apart: the same one on tasks of the first and the last stage (tasks), and two of them on the same
tasks (solver). Every stage has the same number of tasks of a mode. Rates and settings stay in RUN/eval/difficulty.json
and are used again. Left out: intervals speak of other tasks of this run; only several runs speak of other seeds.
"""

from __future__ import annotations

import argparse
import random
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from azr import drawing
from azr.analysis import figures
from azr.analysis.reader import MODES, TREND_STEPS, RunData, mean_row, read_runs, read_samples, remembered, stages
from azr.command import Number
from azr.console import note, warn
from azr.fits import as_json, difference_of_means, linear_fit
from azr.jsonl import write_json_atomic
from azr.palette import BLACK, GRAY, Style, style
from azr.passk import share_interval, shown
from azr.runs import weights_of

STAGES, ANSWERS = 4, 8
QUESTIONS, QUESTIONS_EMBEDDED = 800, 480
FLOOR = 0.05  # a mean solve rate this near 0 or 1 cannot show much of a change


@dataclass
class Table:
    """What the fixed solvers did: one row a task."""

    stage: np.ndarray  # (tasks,) 0, 1, ...
    step: np.ndarray  # (tasks,) when the task was proposed
    mode: np.ndarray  # (tasks,)
    rates: dict[str, np.ndarray]  # solver -> (tasks,) share of its answers that were right; earliest solver first
    tokens: dict[str, np.ndarray]  # solver -> (tasks,) mean response length
    logged: np.ndarray  # (tasks,) the solve rate of the solver of that step, as logged


# ------------------------------------------------------------------------------------------------------- the sums


def analyse(table: Table) -> dict:
    """Rates by stage and solver, what tasks and solver contribute, and a verdict in words.

    tasks: change of the solve rate from the first to the last stage with the solver held fixed, mean over the solvers;
    solver: change from the first to the last solver on the same tasks, first and last stage. With
    R(stage, solver): R(last, final) - R(first, base) = tasks(base, final) + solver, the two-factor Shapley split.
    """
    names, last = list(table.rates), int(table.stage.max())
    at = {i: table.stage == i for i in range(last + 1)}
    ends = at[0] | at[last]
    every = np.mean(list(table.rates.values()), axis=0)
    pair = np.mean([table.rates[names[0]], table.rates[names[-1]]], axis=0)
    gain = table.rates[names[-1]] - table.rates[names[0]]
    result = {
        "solvers": names,
        "tasks_per_stage": [int(rows.sum()) for rows in at.values()],
        "rate": {n: [mean_row(r[rows], share_interval) for rows in at.values()] for n, r in table.rates.items()},
        "tokens": {n: [mean_row(t[rows]) for rows in at.values()] for n, t in table.tokens.items()},
        "logged_rate": [mean_row(table.logged[rows], share_interval) for rows in at.values()],
        "tasks_by_solver": {n: _change(r, at[0], at[last]) for n, r in table.rates.items()},
        "tasks_by_mode": {m: _change(every, at[0] & (table.mode == m), at[last] & (table.mode == m)) for m in MODES},
        "tasks": _change(every, at[0], at[last]),
        "trend_per_100_steps": as_json(linear_fit(table.step / 100, every).coefficients[1], len(every)),
        "split": {"tasks": _change(pair, at[0], at[last]), "solver": mean_row(gain[ends])},
        # the final solver was trained on the last stage's tasks, the base on none: do they differ more there?
        "lead_grows": _change(gain, at[0], at[last]),
        "logged_change": _change(table.logged, at[0], at[last]),
    }
    result["verdict"] = verdict(result)
    return result


def verdict(result: dict) -> list[str]:
    """What the numbers say, in sentences; n is in the table."""
    tasks, solver, by = result["tasks"], result["split"]["solver"], result["tasks_by_solver"]
    base = next(iter(by.values()))
    agree = sum(row["mean"] * tasks["mean"] > 0 for row in by.values())
    # only the base was trained on none of these tasks: without its consent nothing is said
    if max(tasks["high"], base["mean"]) < 0 or min(tasks["low"], base["mean"]) > 0:
        start = f"The proposals get {'harder' if base['mean'] < 0 else 'easier'} ({agree} of {len(by)} solvers agree)"
    else:
        start = "No change of difficulty is shown"
    sentences = [f"{start}: share solved by fixed solvers, last stage minus first, {shown(tasks)}."]
    word = "weaker" if solver["high"] < 0 else "stronger" if solver["low"] > 0 else None
    start = f"The solver gets {word}" if word else "No change of the solver is shown"
    sentences.append(f"{start} on these tasks: final minus base, same tasks, {shown(solver)}.")
    lead = result["lead_grows"]
    if lead["low"] > 0:
        sentences.append(
            f"The final solver's lead over the base grows by {shown(lead)} from the first stage's tasks to "
            "the last stage's, which it was trained on; for the base, trained on none, the change is "
            f"{shown(base)}."
        )
    rates = [row["mean"] for rows in result["rate"].values() for row in (rows[0], rows[-1])]
    if min(rates) < FLOOR or max(rates) > 1 - FLOOR:
        sentences.append("Some solve rates are near 0 or 1, where a change of difficulty hardly shows.")
    return sentences


def _change(values: np.ndarray, first: np.ndarray, last: np.ndarray) -> dict | None:
    """Mean of what is finite of (tasks,) at `last` minus that at `first`, both masks (tasks,); None without any."""
    a, b = (values[rows & np.isfinite(values)] for rows in (first, last))
    return as_json(difference_of_means(a, b), min(len(a), len(b))) if len(a) and len(b) else None


# ------------------------------------------------------------------------------------------------------- measuring


def choose(run: RunData, bounds: list[tuple[int, int]], modes: list[str], questions: int) -> list[dict]:
    """[{"stage", "step", "logged", "task"}]: the same number of valid proposals of a mode from every stage.

    A mode without valid proposals in some stage is left out with a warning; ValueError if none remains.
    """
    from azr.tasks import Task

    numbers, digest = range(len(bounds)), read_samples(run)
    candidates: dict[tuple[int, str], dict] = {(i, mode): {} for i in numbers for mode in modes}
    for line in digest.notes:
        warn(f"{run.path}: {line}")
    for proposal in digest.proposals:
        stage = next((i for i, (a, b) in enumerate(bounds) if a <= proposal.step <= b), None)
        if stage is not None and proposal.task and proposal.mode in modes:
            task = Task.from_json(proposal.task)
            entry = {"stage": stage, "step": proposal.step, "logged": proposal.solve_rate, "task": task}
            candidates[stage, proposal.mode].setdefault(task.hash, entry)
    present = [mode for mode in modes if all(candidates[i, mode] for i in numbers)]
    for mode in set(modes) - set(present):
        warn(f"{run.path}: some stage has no valid {mode} proposal; {mode} is left out")
    if not present:
        raise ValueError(f"{run.path}: no mode has valid proposals in all {len(bounds)} stages; try fewer --stages")
    chosen, per_cell = [], max(1, questions // (len(bounds) * len(present)))
    for mode in present:
        size = min(per_cell, *(len(candidates[i, mode]) for i in numbers))
        for i in numbers:
            pool = [candidates[i, mode][key] for key in sorted(candidates[i, mode])]
            chosen += random.Random(f"difficulty/{i}/{mode}").sample(pool, size)
    return chosen


def fixed_solvers(run: RunData) -> dict[str, Path | None]:
    """{"base": None, "step_60": DIR, "step_120": DIR}: base, the checkpoint nearest to the middle, the last."""
    checkpoints = run.trained()
    middle = min(checkpoints, key=lambda item: abs(item[0] - checkpoints[-1][0] / 2))
    return {"base": None} | {f"step_{step}": path for step, path in (middle, checkpoints[-1])}


def solve(run: RunData, tasks: list, solvers: dict[str, Path | None], settings: dict) -> dict:
    """{solver: {"correct": [...], "tokens": [...]}}, answers sampled with seeds that all solvers share."""
    from azr.analysis.divergence import open_run, use
    from azr.evals.held_out import evaluate
    from azr.policy.policy import Sampling
    from azr.tasks import STOP
    from sandbox import Sandbox

    policy, results = open_run(run), {}
    sampling = Sampling(settings["temperature"], max_new_tokens=settings["max_new_tokens"], stop=(STOP,))
    with Sandbox() as sandbox:
        for name, checkpoint in solvers.items():
            if checkpoint:
                use(policy, checkpoint)
            with policy.disable_adapter() if checkpoint is None else nullcontext():
                done = evaluate(policy, tasks, settings["answers"], sampling, settings["template"], sandbox, 0).tasks
            tokens = [float(np.mean(task.tokens)) for task in done]
            results[name] = {"correct": [task.correct for task in done], "tokens": tokens}
            note(f"{run.path}: {len(tasks)} tasks solved by {name}, {len(results)} of {len(solvers)} solvers")
    return results


def measure(run: RunData, args) -> dict:
    """One run: choose, solve, analyse. The analysis is kept in RUN/eval/difficulty_result.json for the report."""
    bounds = stages(run.steps, args.stages)
    if len(bounds) < 2:
        raise ValueError(f"{run.path} has {len(run.steps)} step: two stages need two")
    embedded = run.base().get("template") == "tiny"
    questions = args.questions or (QUESTIONS_EMBEDDED if embedded else QUESTIONS)
    chosen = choose(run, bounds, args.mode or list(MODES), questions)
    settings = {
        "answers": args.answers,
        "temperature": run.config.get("temperature", 1.0),
        "max_new_tokens": run.config.get("max_new_tokens", 512),
        "template": run.base()["template"],
    }
    solvers, tasks = fixed_solvers(run), [c["task"] for c in chosen]
    adapters = [weights_of(path) for path in solvers.values() if path]
    key = [settings, [task.hash for task in tasks], *adapters]
    where = run.path / "eval" / "difficulty.json"
    done = remembered(where, key, args.fresh, lambda: solve(run, tasks, solvers, settings))
    table = Table(
        np.array([c["stage"] for c in chosen]),
        np.array([c["step"] for c in chosen]),
        np.array([c["task"].mode for c in chosen]),
        {n: np.array(row["correct"]) / args.answers for n, row in done.items()},
        {n: np.array(row["tokens"], float) for n, row in done.items()},
        np.array([np.nan if c["logged"] is None else c["logged"] for c in chosen], float),
    )
    result = analyse(table) | {"stages": bounds, "settings": settings}
    write_json_atomic(run.path / "eval" / "difficulty_result.json", result)
    return result


# ------------------------------------------------------------------------------------------------------- the screen


def print_result(run: RunData, result: dict) -> None:
    """Prints one run's result: rates and answer lengths a stage, the split into tasks and solver, the trend."""
    n, answers = result["tasks_per_stage"][0], result["settings"]["answers"]
    print(f"{run.path}: share of right answers of solvers that do not change, on proposals of each stage")
    print(f"({n} tasks a stage, {answers} answers each; [95 % intervals over tasks]; 'logged': by the solver of then)")
    for line in result["verdict"]:
        print(f"  {line}")
    print(f"\n{'':17s}" + "".join(f"{f'steps {a}-{b}':24s}" for a, b in result["stages"]))
    rows = [*result["rate"].items(), ("logged", result["logged_rate"])]
    for name, row in rows:
        print(f"{name:17s}" + "".join(f"{shown(cell):24s}" for cell in row))
    for name, row in result["tokens"].items():
        print(f"{name + ' length':17s}" + "".join(f"{shown(cell, 1):24s}" for cell in row))
    split = result["split"]
    print("\nlast stage and final solver minus first stage and base:", end=" ")
    print(f"tasks {shown(split['tasks'])}, solver {shown(split['solver'])}")
    modes = (f"{m} {shown(row)} (n {row['n']})" for m, row in result["tasks_by_mode"].items() if row)
    print("tasks, by mode: " + "; ".join(modes))
    if result["stages"][-1][1] - result["stages"][0][0] + 1 >= TREND_STEPS:
        print(f"trend of the fixed solvers' rate per 100 steps: {shown(result['trend_per_100_steps'])}")
    print()


def draw(run_name: str, result: dict):
    """The figure of one run: share solved per stage, the change split into tasks and solver, answer lengths in
    tokens."""
    drawn, (rates, split, tokens) = drawing.figure(3, 3.7, 3.2)
    x, last = np.arange(len(result["stages"])), len(result["solvers"]) - 1
    styles = {0: style("base"), last: style("tuned")}  # the checkpoint between them has none of its own
    for axes, key in ((rates, "rate"), (tokens, "tokens")):
        for i, name in enumerate(result["solvers"]):
            shape = drawing.look(styles.get(i, Style(GRAY, "v")))
            drawing.points(axes, x, result[key][name], name.replace("_", " "), shape, shift=0.06 * (i - 1))
        axes.set_xticks(x, [f"{a}-{b}" for a, b in result["stages"]])
        axes.set_ylim(bottom=0)
    logged = [row["mean"] if row else np.nan for row in result["logged_rate"]]
    rates.plot(x, logged, "--", color=BLACK, linewidth=1, label="solver of that step, as logged in training")
    drawing.label(rates, f"{run_name}: fixed solvers on proposals", "steps they were proposed in", "share solved")
    drawing.label(tokens, "length of their answers", "steps they were proposed in", "tokens per answer")
    drawing.zero_line(split)
    for i, row in enumerate((result["split"]["tasks"], result["split"]["solver"], result["logged_change"])):
        drawing.points(split, [i], [row], "", drawing.look(Style(BLACK, "o"), ""))
    split.set_xticks(range(3), ["tasks\n(solver fixed)", "solver\n(tasks fixed)", "as logged"], fontsize=7.5)
    split.set_xlim(-0.5, 2.5)
    drawing.label(split, "change, first to last stage", "", "difference of the share solved")
    drawing.legend(drawn, [rates])
    return drawn


# ------------------------------------------------------------------------------------------------------- flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `analyze.py difficulty` to its parser."""
    parser.add_argument("run", nargs="+", metavar="RUN", help="run directories of one model")
    stages, some = Number(int, 2, 1000), Number(int, 1, 10**6)
    parser.add_argument("--stages", type=stages, default=STAGES, help=f"equal parts of the run (default {STAGES})")
    parser.add_argument("--questions", type=some, help=f"in all (default {QUESTIONS}; tiny {QUESTIONS_EMBEDDED})")
    parser.add_argument("--answers", type=some, default=ANSWERS, help=f"of each solver to a task (default {ANSWERS})")
    parser.add_argument("--mode", nargs="+", choices=MODES, help="only these modes (default all)")
    parser.add_argument("--fresh", action="store_true", help="sample again instead of using RUN/eval/difficulty.json")
    figures.add_output_arguments(parser)


def main(args) -> int:
    """Measures, prints, writes. ValueError, in one line, for bad input."""
    runs = read_runs(args.run)
    for run in runs:
        fixed_solvers(run)  # refused before anything is sampled
    results, drawn = {}, {}
    for run in runs:
        results[str(run.path)] = result = measure(run, args)
        print_result(run, result)
        drawn[f"difficulty_{run.name}" if len(runs) > 1 else "difficulty"] = draw(run.name, result)
    figures.write_outputs(args, "difficulty", {"runs": results}, drawn)
    return 0
