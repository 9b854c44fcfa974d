"""What is kept of a training, a few kilobytes: its answers to held-out tasks, its curves, its proposals, its update.

    python results/experiments.py measure joint/0        results/arms/joint-0.json, after the training
    python results/experiments.py measure base/0         the untrained model, the same tasks

A file has these keys (T: temperature; rows are held-out tasks in the order of held_out.jsonl):

    greedy       right, style: a digit a task, style as an index of gate_numbers.STYLES; tokens: mean at each level
    sampled      T -> {n: answers a task, right: (tasks,), traced: (tasks,) with a worked-out thought, tokens: mean},
                 to the tasks of `few`
    series       name -> mean of each WINDOW steps of a metric
    proposals    of each WINDOW steps: valid programs, their statements and depth; base_rate: how often the untrained
                 model solves those of the first and of the last EDGE steps, with its interval over tasks
    probe        entropy of each role on the frozen probe, before and after
    update       size and sparsity of what was added to the adapted weights
    forgetting   KL to the base (kl_forward/new: on a run's own tasks, where they are unlike the probe's) and the
                 skill that no arm trains, before and after
"""

from __future__ import annotations

import ast
import json
import math
import os
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import analyze
from azr.analysis.divergence import token_divergences
from azr.evals.held_out import sample_seed
from azr.passk import share_interval
from azr.runs import read_metrics, read_samples
from azr.tasks import MODES, Task
from azr.tasks.prompts import solve_prompt
from gate_base import FEW_A_CELL
from gate_lab import Lab
from gate_numbers import LEVELS, STYLES, statements

TEMPERATURES = (1.0, 0.8, 0.6, 0.4, 0.2)  # the colder ones for the frontier of pass@1 against pass@k
ANSWERS, COLDER_ANSWERS = 64, 32  # 64 so that pass@32 has two tries for each of its k
WINDOW, EDGE = 10, 20  # steps
PROPOSALS, TRIES = 128, 8  # proposals at either end of a run that the base tries to solve, and how often each
KL_TASKS = 64  # of each mode
SERIES = [f"{role}/{mode}/entropy" for role in ("proposer", "solver") for mode in (*MODES, "all")]
SERIES += [f"proposer/{mode}/{name}" for mode in MODES for name in ("valid_rate", "solve_rate", "learnable_rate")]
SERIES += [f"solver/{mode}/{name}" for mode in MODES for name in ("accuracy", "response_tokens")]
SERIES += ["train/tokens", "train/grad_norm", "train/control_share", "train/off_policy_ess", "time/step"]


# ---------------------------------------------------------------- answers


def greedy(lab: Lab) -> dict:
    """One greedy answer to every held-out task."""
    rows = lab.answer(lab.part(None), 1, 0.0)
    cells = [next(iter(cells.items())) for _, cells, _, _ in rows]
    counts = lab.counts(rows)
    return {
        "right": "".join(str(cell[1]) for _, cell in cells),
        "style": "".join(str(STYLES.index(style)) for style, _ in cells),
        "tokens": [counts.of(levels=[level]).tokens() for level in LEVELS],
    }


def sampled(lab: Lab, temperature: float, n: int) -> dict:
    """n answers to each of the few tasks."""
    counts = lab.counts(lab.answer(lab.part(FEW_A_CELL), n, temperature))
    traced, _ = counts.given(("full", "check"))
    return {"n": n, "right": counts.right.tolist(), "traced": traced.tolist(), "tokens": counts.tokens()}


def answers(lab: Lab, temperatures: Sequence[float]) -> dict:
    """`greedy`, and `sampled` at each of the temperatures."""
    found: dict = {"greedy": greedy(lab), "sampled": {}}
    for temperature in temperatures:
        n = ANSWERS if temperature == 1 else COLDER_ANSWERS
        found["sampled"][f"{temperature:g}"] = sampled(lab, temperature, n)
    return found


# ---------------------------------------------------------------- the run


def series(run: Path) -> dict[str, list[float | None]]:
    """Means over windows of steps; None where no step of a window has a value."""
    rows = [row for row in read_metrics(run) if row["step"] > 0]
    windows = [rows[start : start + WINDOW] for start in range(0, len(rows), WINDOW)]

    def mean(name: str, window: list[dict]) -> float | None:
        values = [row[name] for row in window if row.get(name) is not None]
        return math.fsum(values) / len(values) if values else None

    return {name: [mean(name, window) for window in windows] for name in SERIES if any(name in row for row in rows)}


def depth(program: str) -> int:
    """Levels of the syntax tree."""

    def below(node: ast.AST) -> int:
        return 1 + max(map(below, ast.iter_child_nodes(node)), default=0)

    return below(ast.parse(program))


def proposals(run: Path, base: Lab) -> dict | None:
    """Valid deductions and abductions (an induction's program is given); None of a run that proposes nothing."""
    by_step: dict[int, list[Task]] = defaultdict(list)
    for row in read_samples(run):
        if row["role"] == "proposer" and row["reason"] == "ok" and row["mode"] != "induction" and row["step"] > 0:
            by_step[row["step"]].append(Task.from_json(row["task"]))
    if not by_step:
        return None
    last = max(by_step)
    windows: dict[str, list] = {"programs": [], "statements": [], "depth": []}
    for start in range(1, last + 1, WINDOW):
        programs = [task.program for step in range(start, start + WINDOW) for task in by_step.get(step, [])]
        windows["programs"].append(len(programs))
        windows["statements"].append(float(np.mean([statements(p) or 0 for p in programs])) if programs else None)
        windows["depth"].append(float(np.mean([depth(p) for p in programs])) if programs else None)
    ends = [range(1, EDGE + 1), range(last - EDGE + 1, last + 1)]
    rates = [solve_rate([task for step in end for task in by_step.get(step, [])], base) for end in ends]
    return {**windows, "base_rate": rates}


def solve_rate(tasks: Sequence[Task], lab: Lab) -> dict | None:
    """How often a fixed model solves them at temperature 1; None without tasks."""
    tasks = random.Random(0).sample(list(tasks), min(PROPOSALS, len(tasks)))
    if not tasks:
        return None
    shares = [np.mean([answer[2] for answer in row]) for row in lab.respond(list(tasks), TRIES, 1.0)]
    interval = share_interval(np.array(shares, dtype=float))
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "n": len(tasks)}


# ---------------------------------------------------------------- what analyze.py says


def analysed(run: Path, model: str, aside: Path) -> dict[str, dict]:
    """JSON of the subcommands, by name; each is made once, into `aside`. RuntimeError if one fails."""
    aside.mkdir(parents=True, exist_ok=True)
    commands = {
        "entropy": ["--run", run],
        "forgetting": [run, "--held-out", 0, "--probe", 64, "--checkpoints", 2],
        "sparsity": ["--base", model, "--adapter", run],
    }
    found = {}
    for name, arguments in commands.items():
        path = aside / f"{name}.json"
        if not path.exists() and analyze.main([name, *map(str, arguments), "--json", str(path)]):
            raise RuntimeError(f"analyze.py {name} {run} failed")
        found[name] = json.loads(path.read_text())
    return found


def digest(found: dict[str, dict]) -> dict:
    """probe, update and forgetting of what `analysed` gives."""
    (probed,) = found["entropy"]["runs"].values()
    steps = sorted(probed["probe"], key=int)
    groups = {}
    for step in (steps[0], steps[-1]):
        groups[step] = {group: row["token_mean"]["mean"] for group, row in probed["probe"][step].items() if row}
    (entry,) = found["forgetting"]["runs"].values()
    last = entry["checkpoints"][max(entry["checkpoints"], key=int)]
    kl = {name: value["mean"] for name, value in last.items() if name.startswith("kl_")}
    skill = {"skill_base": float(np.mean(entry["base"]["skill"])), "skill": float(np.mean(last["scores"]["skill"]))}
    return {"probe": groups, "update": update(found["sparsity"]), "forgetting": kl | skill}


def update(sparsity: dict) -> dict:
    """Size of the change of the adapted weights and what of them is unchanged, also after scaling to one RMS."""
    part = sparsity["adapted"] if "adapted" in sparsity else sparsity["whole"]
    return {key: part.get(key) for key in ("U1_rms", "U1_rel_fro", "S0", "S1", "S2", "S5", "at_rms_3e-5")}


# ---------------------------------------------------------------- the file


def of_base(model: str, seed: int) -> dict:
    """The untrained model on the tasks of all arms."""
    with Lab(model, seed=seed) as lab:
        return answers(lab, TEMPERATURES)


def of_run(
    run: Path, model: str, steps: int, temperatures: Sequence[float], aside: Path, foreign: Path | None = None
) -> dict:
    """Everything about a finished training; without temperatures the cheap part alone. `foreign`: its tasks, where they
    are unlike those of the probe. ValueError if its last checkpoint is missing."""
    adapter = run / "checkpoints" / f"step_{steps}"
    if not adapter.is_dir():
        raise ValueError(f"{adapter}: no such checkpoint; train it first")
    with Lab(model, adapter) as lab:
        found = answers(lab, temperatures)
    found["proposals"] = None
    if steps >= 2 * EDGE:  # or the first and the last proposals are the same
        with Lab(model) as base:
            found["proposals"] = proposals(run, base)
    found["series"] = series(run)
    found |= digest(analysed(run, model, aside)) if temperatures else {}
    if temperatures and foreign:
        found["forgetting"]["kl_forward/new"] = kl_on(model, adapter, foreign)
    return found


def kl_on(model: str, adapter: Path, file: Path) -> float:
    """KL(base || policy) a token, on what the base answers to the first KL_TASKS of each mode."""
    tasks = [Task.from_json(json.loads(line)) for line in file.read_text().splitlines()]
    tasks = [task for mode in MODES for task in [t for t in tasks if t.mode == mode][:KL_TASKS]]
    with Lab(model) as base, Lab(model, adapter) as tuned:
        prompts = [base.policy.encode(solve_prompt(task, base.template)) for task in tasks]
        seeds = [[sample_seed(0, task.hash, 0)] for task in tasks]
        responses = [row[0].ids for row in base.generate(prompts, 1, 1.0, seeds)]
        forward, _ = token_divergences(tuned.policy, prompts, responses)
    return float(np.concatenate(forward).mean())


def of_full(run: Path, model: str, steps: int, aside: Path) -> dict:
    """What a training of every weight did to the weights, and its greedy accuracy as the run itself measured it."""
    path = aside / "sparsity.json"
    aside.mkdir(parents=True, exist_ok=True)
    tuned = run / "checkpoints" / f"step_{steps}"
    if analyze.main(["sparsity", "--base", model, "--tuned", str(tuned), "--spectral", "--json", str(path)]):
        raise RuntimeError(f"analyze.py sparsity of {tuned} failed")
    rows = [row for row in read_metrics(run) if row.get("held_out/all/accuracy") is not None]
    accuracy = {row["step"]: row["held_out/all/accuracy"] for row in rows}
    return {"accuracy": accuracy, "series": series(run), "update": update(json.loads(path.read_text()))}


def write(path: Path, value: dict) -> None:
    """One line a key, numbers to four digits; written aside and renamed."""

    def short(x):
        if isinstance(x, float):
            return float(f"{x:.4g}") if math.isfinite(x) else None
        if isinstance(x, dict):
            return {key: short(item) for key, item in x.items()}
        return [short(item) for item in x] if isinstance(x, (list, tuple)) else x

    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(short(item))}" for key, item in value.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(f"{{\n{lines}\n}}\n")
    os.replace(aside, path)


if __name__ == "__main__":
    sys.exit("measure.py is a part of experiments.py: python results/experiments.py measure ARM/SEED")
