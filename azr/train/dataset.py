"""The tasks that a run invented as a data set for others: one parquet file, and beside it the card that a hub shows.

    python -m azr.tasks make run RUN data/tasks.parquet --near humaneval+=HumanEvalPlus.jsonl.gz cruxeval-o=FILE

A row is a task of the buffers, with the step that it came in (0: the seed stage) and how it was solved. `near` names
problems of public benchmarks with which its program has 13 tokens in a row in common (as in GPT-3's report, arXiv
2005.14165, appendix C), `near_share` the part of its 13-grams that the nearest of them has. Needs pyarrow, which
nothing else here does. Left out: tasks that have left a full buffer, responses, names of variables (a program with
other names is no duplicate here).
"""

from __future__ import annotations

import ast
import json
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from azr.evals.benchmarks import load
from azr.evals.compare_view import table
from azr.jsonl import read_object, replacing
from azr.runs import read_samples
from azr.tasks import Task

GRAM = 13
ROWS = 1000  # in a row group: what a viewer reads at once
MARK = "<!-- written by python -m azr.tasks make run -->"  # a README.md without it is somebody's own
COLUMNS = {
    "hash": "32 hex digits of the content",
    "mode": "`deduction` (find the output), `abduction` (find an input) or `induction` (find the program)",
    "program": "defines `f`",
    "input": "what stands between the parentheses of `f(...)`; null for induction",
    "output": "what `f` returns, a Python literal; null for induction",
    "message": "what is said about the program; induction only",
    "visible": "pairs of input and output that the solver is shown; induction only",
    "hidden": "pairs that its program is judged by; induction only",
    "step": "in which the task came; 0: before the first update",
    "solve_rate": "of the answers in that step; null where none was asked for",
    "answers": "to this task in the whole run, as far as they are logged",
    "correct": "of these",
    "statements": "of the program, also those inside of others and the `def` itself",
    "tokens": "of the program: words, numbers and signs",
    "near": "problems of the benchmarks below with 13 tokens in a row in common",
    "near_share": "part of the program's 13-grams that the nearest problem has",
}
SETTINGS = ("model", "adapter", "algorithm", "recipe", "proposer", "proposer_reward", "seed", "temperature", "answers")
SIZES = ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))  # the hub's names
HEADER = """---
pretty_name: {title}
license: unknown
task_categories: [text-generation]
tags: [code, synthetic, self-play]
size_categories: [{size}]
configs: [{{config_name: default, data_files: {name}}}]
---"""
CLASSES, BELOW = ("never", "up to 1/4", "up to 1/2", "up to 3/4", "below 1", "always"), (0.0, 0.25, 0.5, 0.75, 0.9999)
UNKNOWN = "not measured"


def tokens(text: str) -> list[str]:
    """Words, numbers and signs."""
    return re.findall(r"\w+|[^\w\s]", text)


def grams(words: list[str]) -> set[tuple[str, ...]]:
    """All 13 tokens in a row; none in a shorter text."""
    return {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


def benchmark_grams(names: list[str]) -> dict[tuple[str, ...], set[str]]:
    """13-grams of the problems of these benchmarks, NAME or NAME=FILE: prompts with solutions, programs, or questions.
    ValueError: see `load`."""
    index = defaultdict(set)
    for benchmark in map(load, names):
        for item in benchmark.items:
            task, code = item.task, item.code
            text = f"{code.prompt}\n{code.solution}" if code else task.program or task.question
            for gram in grams(tokens(text)):
                index[gram].add(f"{benchmark.name}/{item.task_id}")
    return index


def nearest(words: list[str], index: dict[tuple[str, ...], set[str]]) -> tuple[list[str], float]:
    """(problems with which a program has 13-grams in common, the nearest first; the share of its 13-grams that that one
    has)."""
    mine = grams(words)
    common = Counter(name for gram in mine for name in index.get(gram, ()))
    names = sorted(common, key=lambda name: (-common[name], name))
    return names, common[names[0]] / len(mine) if names else 0.0


def rows_of(run: Path, tasks: list[tuple[Task, int]], near: list[str]) -> Iterator[dict]:
    """A dict with the keys of COLUMNS for each (task, step)."""
    index, solved = benchmark_grams(near), {task.hash: [None, 0, 0] for task, _ in tasks}
    steps = {task.hash: step for task, step in tasks}
    for line in read_samples(run):
        key = Task.from_json(line["task"]).hash if line.get("task") else None
        if key not in solved:
            continue
        if line["role"] == "solver":
            solved[key][1] += 1
            solved[key][2] += bool(line["reward"].get("correct"))
        elif line["step"] == steps[key]:
            solved[key][0] = line["solve_rate"]
    for task, step in tasks:
        rate, answers, correct = solved[task.hash]
        words = tokens(task.program)
        names, share = nearest(words, index)
        content = {"hash": task.hash, "mode": task.mode, "program": task.program}
        content |= {name: getattr(task, name) or None for name in ("message", "visible", "hidden")}
        content |= {name: None if task.mode == "induction" else getattr(task, name) for name in ("input", "output")}
        for name in ("visible", "hidden"):
            content[name] = content[name] and [{"input": given, "output": output} for given, output in content[name]]
        content |= {"step": step, "solve_rate": rate, "answers": answers, "correct": correct}
        content |= {"near": names, "near_share": share, "tokens": len(words)}
        content["statements"] = sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(task.program)))
        yield {name: content[name] for name in COLUMNS}


def write_parquet(run: Path, out: Path, tasks: list[tuple[Task, int]], near: list[str]) -> None:
    """Writes `out` and README.md beside it. ValueError, before anything is written: pyarrow is not installed, a
    benchmark that cannot be read, or there is a README.md that is no card of this command. OSError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{out}: needs pip install pyarrow; a name that ends in .jsonl needs nothing") from error
    card = out.with_name("README.md")
    if card.exists() and MARK not in card.read_text(encoding="utf-8"):
        raise ValueError(f"{card} is no data card: give {out.name} a directory of its own, for a card goes beside it")
    text, whole, number = pyarrow.string(), pyarrow.int32(), pyarrow.float32()
    kinds = dict.fromkeys(COLUMNS, text) | dict.fromkeys(("step", "answers", "correct", "statements", "tokens"), whole)
    kinds |= dict.fromkeys(("visible", "hidden"), pyarrow.list_(pyarrow.struct({"input": text, "output": text})))
    kinds |= {"solve_rate": number, "near_share": number, "near": pyarrow.list_(text)}
    rows = list(rows_of(run, tasks, near))
    columns = pyarrow.Table.from_pylist(rows, pyarrow.schema(list(kinds.items())))
    with replacing(out) as file:
        parquet.write_table(columns, file, ROWS, compression="zstd")
    with replacing(card) as file:
        file.write(data_card(rows, read_object(run / "config.json"), out.name, near).encode())


def data_card(rows: list[dict], config: dict, name: str, near: list[str]) -> str:
    """The README.md of a data set on the hub: a header in YAML that its viewer reads, then what `name` holds."""
    modes, sizes = Counter(row["mode"] for row in rows), sorted(row["tokens"] for row in rows) or [0]
    solved = Counter((row["mode"], class_of(row["solve_rate"])) for row in rows)
    seed, last = sum(row["step"] == 0 for row in rows), max((row["step"] for row in rows), default=0)
    short = sum(row["tokens"] < GRAM for row in rows)
    size = next((text for most, text in SIZES if len(rows) < most), "1M<n<10M")
    title = f"Python tasks invented by {Path(config['model']).name} in self-play"
    benchmarks = [each.partition("=")[0] for each in near]
    parts = [
        HEADER.format(title=json.dumps(title), size=size, name=json.dumps(name)),
        MARK,
        f"# {title}",
        f"{len(rows):,} tasks: each a small Python program and a question about it, answered by running the program. "
        f"The model proposed them while it was trained on solving them: {seed:,} before the first update (in step 0), "
        f"the last in step {last}. What did not end, was not deterministic or was there before was refused.",
        table(("setting", "value"), [(key, config[key]) for key in SETTINGS if config.get(key) is not None]),
        "## How they were solved",
        "Tasks by the share of right answers in the step in which they came, by the model as it was then.",
        table(("solved", *modes), [(c, *(solved[mode, c] for mode in modes)) for c in (*CLASSES, UNKNOWN)]),
        "## Size",
        f"Tokens of a program: median {sizes[len(sizes) // 2]}, 90 % below {sizes[len(sizes) * 9 // 10]}, longest "
        f"{sizes[-1]}.",
        "## Near-duplicates of benchmarks",
        f"Programs with {GRAM} tokens in a row in common with a problem (its prompt and solution, or its program). "
        f"{short:,} programs are shorter than that and were not compared; names count as they are.",
        table(
            ("benchmark", "its problems met", "tasks that meet one", "with half of their 13-grams"),
            [(benchmark, *met(rows, f"{benchmark}/")) for benchmark in benchmarks],
        )
        if near
        else "Not looked for: `--near NAME=FILE` was not given.",
        "## Columns",
        table(("column", "what it holds"), [(f"`{key}`", text) for key, text in COLUMNS.items()]),
        "## Licence",
        "Not chosen yet: put yours into the header. The licence of the model may bind what it wrote. Programs have "
        "run in a sandbox and were not read by anyone; run them in one too.",
    ]
    return "\n\n".join(parts) + "\n"


def class_of(rate: float | None) -> str:
    """The one of CLASSES that a solve rate lies in, UNKNOWN for None."""
    return UNKNOWN if rate is None else CLASSES[bisect_left(BELOW, rate)]


def met(rows: list[dict], start: str) -> tuple[int, int, int]:
    """Of a benchmark whose problems' names begin with `start`: how many of them rows meet, how many rows meet one, and
    how many have half of their 13-grams in common with one that is their nearest."""
    problems = [[problem for problem in row["near"] if problem.startswith(start)] for row in rows]
    half = [row["near_share"] >= 0.5 and row["near"][0].startswith(start) for row in rows if row["near"]]
    return len({problem for names in problems for problem in names}), sum(map(bool, problems)), sum(half)
