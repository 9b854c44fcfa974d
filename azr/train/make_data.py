"""Writes the files that `train_azr.py --algorithm rlvr|sft` and `--off-policy-source` read: one task as JSON a line.

    python -m azr.tasks make tiny tasks.jsonl --count 3000                  tasks of the embedded model's generator
    python -m azr.tasks make tiny gold.jsonl --count 3000 --solutions       the same with right responses (off-policy)
    python -m azr.tasks make tiny hard.jsonl --statements 5,6 --solutions --style full     of a difficulty, with traces
    python -m azr.tasks make tiny warm.jsonl --count 200 --solutions --proposals     and proposals: a warm start (sft)
    python -m azr.tasks make run RUN tasks.jsonl                            the tasks in a run's buffers
    python -m azr.tasks make run RUN data/tasks.parquet --near humaneval+=FILE      a data set with a card (dataset.py)
    python -m azr.tasks make run RUN own.jsonl --solutions                  own verified answers (rejection sampling)
    python -m azr.tasks make benchmark gsm8k=train.jsonl maths.jsonl        questions and answers of a public file

A file lists each task once; with --solutions, each (task, response). No program of the generator is among the embedded
model's held-out ones or behaves like one. The tasks of a seed are the same with and without responses, in any style.
SFT on gold responses and on a model's own right answers are different experiments: the latter
stays near what the model writes anyway (arXiv 2505.11711: 90 % unchanged weights for it, 6-15 % for the former).

Left out: log-probs of the responses; without them off-policy solutions need --off-policy-weight luffy.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from collections import Counter
from pathlib import Path

from azr.command import MOST, Number, Parser
from azr.jsonl import write_jsonl_atomic
from azr.runs import newest_intact, read_metrics, read_samples
from azr.tasks import MODES, SEED_PROGRAM, Task

STYLES = ("none", "junk", "coarse", "full", "check", "ladder")  # see azr/tiny/documents.py


def tiny_tasks(options: argparse.Namespace) -> list[Task]:
    """`count` distinct tasks a mode of the generator, with right responses in the tiny wording if asked for.

    ValueError: an unknown mode, a number of statements that no program has, or a flag that would do nothing.
    """
    from azr.tiny import documents as recipe
    from azr.tiny.programs import MAX_STATEMENTS

    modes, sizes = options.modes.split(","), options.statements.split(",") if options.statements else []
    if unknown := set(modes) - {*MODES, "math"}:
        raise ValueError(f"--modes {','.join(sorted(unknown))}: there are {', '.join((*MODES, 'math'))}")
    if any(not size.isdecimal() or not 1 <= int(size) <= MAX_STATEMENTS for size in sizes):
        raise ValueError(f"--statements {options.statements}: expected numbers from 1 to {MAX_STATEMENTS}, as in 5,6")
    if options.style and not options.solutions:
        raise ValueError(f"--style {options.style} is about the thoughts of responses: it needs --solutions")
    if options.proposals and not options.solutions:
        raise ValueError("--proposals are responses too: they need --solutions")
    by_hash: dict[str, Task] = {}
    for mode in modes:
        # two streams: what is thought must not change which tasks are drawn
        rng, thoughts = (random.Random(f"{options.seed}/{mode}/{name}") for name in ("task file", "thoughts"))
        before = len(by_hash)
        while len(by_hash) < before + options.count:
            if mode == "math":
                task, drawn = recipe.skill_task(rng), None
            else:
                drawn = recipe.draw_task(mode, rng, count=int(rng.choice(sizes)) if sizes else None)
                task = drawn.task
            if task.hash in by_hash:
                continue
            response = None
            if options.solutions:
                style = options.style or "ladder"
                if drawn and style == "ladder":  # of a style drawn as in the last part of the base's training
                    style = thoughts.choices(recipe.STYLES, recipe.style_weights(1.0))[0]
                thought = recipe.think(drawn, style, thoughts) if drawn else ""
                response = recipe.wrap(thought, recipe.answer(task))
            by_hash[task.hash] = dataclasses.replace(task, response=response)
    return list(by_hash.values()) + (tiny_proposals(options) if options.proposals else [])


def tiny_proposals(options: argparse.Namespace) -> list[Task]:
    """`count` distinct valid proposals a mode of the generator, with the references that they follow; no program has
    more statements than --statements allows."""
    from azr.tiny import documents as recipe

    proposals, most = [], max(map(int, options.statements.split(","))) if options.statements else None
    for mode in MODES:
        rng, by_hash = random.Random(f"{options.seed}/{mode}/proposals"), {}
        while len(by_hash) < options.count:
            drawn = recipe.draw_proposal(mode, rng, most=most)
            if task := drawn.task:
                complete = dataclasses.replace(task, response=drawn.response, references=tuple(drawn.references))
                by_hash.setdefault(task.hash, complete)
        proposals += by_hash.values()
    return proposals


def run_tasks(run: Path) -> list[tuple[Task, int]]:
    """(task, step in which it came) of the buffers of a run's newest checkpoint, the seed program aside."""
    checkpoint, _ = newest_intact(run)
    if checkpoint is None:
        raise ValueError(f"{run}: has no checkpoint with its state; give the directory of a run of train_azr.py")
    rows = json.loads((checkpoint / "state" / "state.json").read_text())["buffers"]["rows"]
    tasks = [(Task.from_json(row), step) for mode in MODES for _, step, row, *_ in rows[mode]]
    return [(task, step) for task, step in tasks if task.program != SEED_PROGRAM]


def run_solutions(run: Path, a_task: int) -> list[Task]:
    """Right and well-formed answers from samples.jsonl, up to `a_task` different ones a task, earliest first."""
    by_task: dict[str, dict[str, Task]] = {}
    for row in read_samples(run):
        if row["role"] == "solver" and row["reward"].get("correct") and row["reward"].get("well_formed"):
            task = Task.from_json({**row["task"], "response": row["response"]})
            mine = by_task.setdefault(task.hash, {})
            if len(mine) < a_task:
                mine.setdefault(task.response, task)
    if not by_task:
        raise ValueError(f"{run}: nothing to write, no answer was right and well-formed yet")
    return [task for mine in by_task.values() for task in mine.values()]


def benchmark_tasks(name: str) -> list[Task]:
    """The problems of a public benchmark's file, NAME or NAME=FILE, that are tasks (code benchmarks are none)."""
    from azr.evals.benchmarks import load

    benchmark = load(name)
    if benchmark.kind == "code":
        raise ValueError(f"{name}: its problems are tests on code, which train_azr.py cannot reward")
    return list({item.task.hash: item.task for item in benchmark.items}.values())


def collect(options: argparse.Namespace) -> tuple[list[Task], str]:
    """(the tasks that the command asks for, what to add to the line about them: for a run how many tokens a step of its
    own trained on, so that another algorithm can be given as many). ValueError or OSError where they cannot be had."""
    if options.command == "tiny":
        return tiny_tasks(options), ""
    if options.command == "benchmark":
        return benchmark_tasks(options.name), ""
    if options.near:
        raise ValueError(f"--near is for the card of a data set, {options.out} is none; take a name with .parquet")
    own = options.solutions and run_solutions(options.run, options.per_task)
    tasks = own or [task for task, _ in run_tasks(options.run)]
    counts = [row["train/tokens"] for row in read_metrics(options.run) if row.get("train/tokens")]
    mean = round(sum(counts) / len(counts)) if counts else 0
    return tasks, f"; --step-tokens {mean} makes steps as large as its own" if counts else ""


def data_set(options: argparse.Namespace) -> tuple[list[Task], str]:
    """Writes the .parquet file and the card; returns what `collect` does. ValueError, OSError."""
    if options.command != "run" or options.solutions:
        raise ValueError(f"{options.out}: only the tasks of a run are written as parquet, all else as JSON lines")
    from azr.train.dataset import write_parquet  # imports the benchmarks and their grading

    tasks = run_tasks(options.run)
    write_parquet(options.run, options.out, tasks, options.near)
    return [task for task, _ in tasks], f"; what it holds: {options.out.with_name('README.md')}"


def main(arguments: list[str] | None = None) -> int:
    """Writes the file and says what is in it; returns the exit code, 2 with one line on stderr for bad input."""
    parser = Parser(
        prog="python -m azr.tasks make", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tiny = commands.add_parser("tiny", help="tasks of the embedded model's generator")
    tiny.add_argument("--count", type=Number(int, 1, 10**7), default=1000, help="tasks a mode (default 1000)")
    tiny.add_argument("--modes", default=",".join(MODES), help=f"default {','.join(MODES)}; math sorts digits")
    tiny.add_argument("--seed", type=Number(int, 0, MOST), default=0, help="another one gives other tasks (default 0)")
    tiny.add_argument(
        "--statements", metavar="N[,N...]", help="of the programs, in proposals at most; default: as in training"
    )
    tiny.add_argument("--proposals", action="store_true", help="as many proposals a mode too, for a warm start by sft")
    tiny.add_argument("--style", choices=STYLES, help="of the thoughts; default ladder: as in training")
    run = commands.add_parser("run", help="tasks, or verified answers, of a run of train_azr.py")
    run.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    run.add_argument("--per-task", type=Number(int, 1, 10**6), default=4, help="different answers a task (default 4)")
    run.add_argument(
        "--near", nargs="+", default=[], metavar="NAME=FILE", help=".parquet: benchmarks to look for near-duplicates of"
    )
    for command in (tiny, run):
        command.add_argument("--solutions", action="store_true", help="with responses, for sft and off-policy")
    benchmark = commands.add_parser("benchmark", help="problems of a public benchmark's file")
    benchmark.add_argument("name", metavar="NAME=FILE", help="as eval_passk.py --benchmark takes it")
    for command in (tiny, run, benchmark):
        command.add_argument("out", type=Path, metavar="FILE", help="the file to write, .jsonl; of a run also .parquet")
    options = parser.parse_args(arguments)
    try:
        if options.out.is_dir():
            raise ValueError(
                f"{options.out} is a directory; give the name of a file, such as {options.out / 'tasks.jsonl'}"
            )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.out.suffix == ".parquet":
            tasks, hint = data_set(options)
        else:
            tasks, hint = collect(options)
            write_jsonl_atomic(options.out, [task.to_json() for task in tasks])
    except (ValueError, OSError) as error:
        print(f"python -m azr.tasks make: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m azr.tasks make: stopped, nothing written", file=sys.stderr)
        return 130
    what = "solutions" if getattr(options, "solutions", False) else "tasks"
    if getattr(options, "proposals", False):
        what += ", half of them proposals"
    modes = ", ".join(f"{mode} {count}" for mode, count in Counter(task.mode for task in tasks).items())
    print(f"{options.out}: {len(tasks)} {what} ({modes}){hint}")
    return 0
