"""The embedded model before and after its default run, over temperatures: first_run.json, the plot, two pages.

    python results/first_run.py runs/tiny-0 runs/tiny-1 runs/tiny-2     finished runs of train_azr.py, a seed each
    python results/first_run.py                                         plot and pages again from first_run.json

A_CELL held-out tasks of each mode and number of statements from 1 to 6; --samples answers a task (greedy: one) of the
base and of each run's last checkpoint at every temperature. And the base made to think in full, as gate b does it:
its deductions begin with the first step of their trace, its value left out, its inductions with a hypothesis. No text
makes it search, so an abduction counts as the base answers it: instead of greedily, at its best temperature.

Stop it at any time: the same command goes on, each model and temperature is made once. Intervals are over tasks,
paired; what is said of several runs is of the mean of them, task by task.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of this small model, threads that wait for each other cost more

import numpy as np

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path[:0] = [str(ROOT), str(RESULTS)]

from azr.evals.compare_view import COLORS, frontier_line
from azr.evals.held_out import load_tasks
from azr.models import model_path
from azr.passk import Interval, difference_interval, pass_at_k
from azr.runs import read_metrics, step_directories
from azr.tasks import MODES
from findings import fill
from gate_base import prefix
from gate_lab import Lab, Store
from gate_numbers import BEYOND, TRACED, Counts, level
from measured import show, table

TEMPERATURES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
THINKING = (1.0, 0.0)  # temperatures of the base made to think
A_CELL = 10
WINDOW = 10  # steps at both ends of a run whose means are compared
SECTIONS = {"first-run": "README.md", "first-run-tables": "docs/tiny.md"}  # markers, and the page that has them
FORCED = "made to think"


# ---------------------------------------------------------------- measuring


def together(runs: list[Path]) -> tuple[dict[str, Path], str, int]:
    """({"seed S": last checkpoint}, the model that all runs began with, --max-new-tokens). ValueError: no such runs."""
    checkpoints, settings = {}, set()
    for run in runs:
        try:
            config = json.loads((run / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{run}: no readable config.json; give the directory of a run of train_azr.py") from error
        steps, name = step_directories(run), f"seed {config['seed']}"
        if not steps:
            raise ValueError(f"{run}: has no checkpoint yet")
        if name in checkpoints:
            raise ValueError(f"{run}: {checkpoints[name].parent.parent} has the same seed")
        if config["quantization"] != "none":
            raise ValueError(f"{run}: its base was quantized; the embedded model is measured as it is")
        checkpoints[name] = steps[-1][1]
        settings.add((config["model"], config["max_new_tokens"]))
    if len(settings) > 1:
        raise ValueError(f"the runs differ in model or --max-new-tokens: {sorted(settings)}")
    ((model, longest),) = settings
    return dict(sorted(checkpoints.items())), model, longest


def measure(args: argparse.Namespace) -> None:
    """Makes what first_run.json lacks. ValueError if it is about other runs or settings."""
    seeds, model, longest = together(args.runs)
    labs = {name: Lab(model, checkpoint, longest=longest) for name, checkpoint in seeds.items()}
    base = Lab(model, longest=longest)
    settings = {
        "model": model,
        "base": base.digest,
        "runs": {name: lab.digest for name, lab in labs.items()},
        "samples": args.samples,
        "a_cell": args.a_cell,
        "longest": longest,
    }
    store = Store(args.out / "first_run.json", settings)
    part = [i for i in base.part(args.a_cell) if level(base.tasks[i]) < BEYOND]
    for name, checkpoint in seeds.items():
        store.get(f"{name} training", training, checkpoint.parent.parent)
    with contextlib.ExitStack() as opened:
        for name, lab in ({"base": base} | labs).items():
            opened.enter_context(lab)
            for t in TEMPERATURES:
                store.get(f"{name} T{t:g}", lab.answer, part, args.samples if t else 1, t)
        for t in THINKING:
            store.get(f"{FORCED} T{t:g}", forced, base, part, args.samples if t else 1, t)
        first = next(iter(labs))
        store.get("example", example, base, labs[first], store.parts, first)


def forced(base: Lab, part: list[int], n: int, temperature: float) -> list:
    """Rows of `Lab.answer` of the base made to think in full, where a text makes it do so."""
    begun = {i: prefix(base.tasks[i], "full") for i in part}
    mine = [i for i in part if begun[i] is not None]
    return base.answer(mine, n, temperature, [begun[i] for i in mine])


def training(run: Path) -> dict[str, list]:
    """Means over the first and over the last WINDOW steps, by mode; None where there was nothing to measure."""
    steps = [row for row in read_metrics(run) if row["step"] > 0]
    part = min(WINDOW, max(1, len(steps) // 2))

    def mean(rows: list[dict], name: str) -> float | None:
        values = [row[name] for row in rows if row.get(name) is not None]
        return sum(values) / len(values) if values else None

    return {
        name: [[mean(rows, name.replace("MODE", mode)) for mode in MODES] for rows in (steps[:part], steps[-part:])]
        for name in (
            "proposer/MODE/valid_rate",
            "solver/MODE/response_tokens",
            "proposer/MODE/entropy",
            "solver/MODE/entropy",
        )
    }


def example(base: Lab, trained: Lab, parts: dict, name: str) -> dict | None:
    """A deduction with its greedy answers: the longest program that only the trained model has right."""
    before, after = (base.counts(parts[f"{model} T0"]) for model in ("base", name))
    better = before.index[(after.right > before.right) & (before.modes == "deduction")]
    if not len(better):
        return None
    task = base.tasks[max(better, key=lambda i: level(base.tasks[i]))]
    texts = [lab.respond([task], 1, 0.0)[0][0][0] for lab in (base, trained)]
    return {"model": name, "task": task.to_json(), "before": texts[0], "after": texts[1]}


# ---------------------------------------------------------------- figures


class Figures:
    """first_run.json, and what the page asks of it. Models: base, FORCED, each seed, and "after", their mean."""

    def __init__(self, data: dict):
        self.parts, self.n = data["parts"], data["settings"]["samples"]
        self.seeds = list(data["settings"]["runs"])
        tasks = load_tasks(Path(model_path(data["settings"]["model"])) / "held_out.jsonl")
        self.counts = {name: Counts.from_json(rows, tasks) for name, rows in self.parts.items() if " T" in name}
        self.modes, self.levels = self.counts["base T0"].modes, self.counts["base T0"].levels
        # the best for the base over all tasks, chosen on these very tasks: in the base's favour
        self.best = max(TEMPERATURES, key=lambda t: self.solved("base", t).mean())

    def solved(self, name: str, t: float, k: int = 1) -> np.ndarray:
        """(tasks,) pass@k. Where nothing was forced, FORCED is the base, greedy at its best temperature, else at t."""
        if name == "after":
            return np.mean([self.solved(seed, t, k) for seed in self.seeds], axis=0)
        mine = self.counts[f"{name} T{t:g}"]
        values = pass_at_k(mine.n, mine.right, k)
        if name == FORCED:
            every = self.solved("base", t or self.best, k).copy()
            every[np.isin(self.counts["base T0"].index, mine.index)] = values
            return every
        return values

    def tokens(self, name: str, t: float) -> np.ndarray:
        """(tasks,) mean length of a response."""
        names = self.seeds if name == "after" else [name]
        tables = [self.counts[f"{n} T{t:g}"].table for n in names]
        return np.mean([x[:, :, 2].sum(axis=1) / x[:, :, 0].sum(axis=1) for x in tables], axis=0)

    def share(self, name: str, t: float, styles: tuple[str, ...]) -> float:
        """Of the answers, those with a thought in one of the styles."""
        by_model = [self.counts[f"{n} T{t:g}"].shares() for n in (self.seeds if name == "after" else [name])]
        return float(np.mean([sum(shares[style] for style in styles) for shares in by_model]))

    def gain(self, name: str, t: float, other: str, t_other: float, k: int = 1, part=slice(None)) -> Interval:
        """pass@k of `name` minus that of `other`, each at its temperature, paired over tasks."""
        return difference_interval((self.solved(name, t, k) - self.solved(other, t_other, k))[part])


def short(value: float) -> str:
    """.415: a share as the README writes it."""
    return f"{value:.3f}".removeprefix("0")


def named(t: float) -> str:
    """A temperature as the README writes it: "greedy" for 0, else such as "T .6"."""
    return f"T {t:g}".replace("0.", ".") if t else "greedy"


def verdict(interval: Interval) -> str:
    """How a difference with this interval is put into words: "above" only if the whole interval is above 0."""
    return "above" if interval.low > 0 else "below" if interval.high < 0 else "not told apart from"


def sentence(f: Figures) -> str:
    """What was measured, in words that follow from the intervals."""
    over_best, over_forced = f.gain("after", 0, "base", f.best), f.gain("after", 0, FORCED, 0)
    wide = f.gain("after", 1, "base", 1, f.n)
    each = [f.gain(seed, 0, "base", f.best).mean for seed in f.seeds]
    spread = f"; seed by seed {' / '.join(f'{x:+.3f}'.replace('0.', '.') for x in each)}" if len(each) > 1 else ""
    worked = [f"{100 * f.share(name, 0, TRACED):.0f} %" for name in ("base", "after")]
    tokens = [f"{f.tokens(name, 0).mean():.0f}" for name in ("base", "after")]
    greedy, best, made = (short(f.solved(*of).mean()) for of in (("after", 0), ("base", f.best), (FORCED, 0)))
    many = [short(f.solved(name, 1, f.n).mean()) for name in ("base", "after")]
    seeds = ", ".join(name.removeprefix("seed ") for name in f.seeds)
    return (
        f"After `python train_azr.py --seed S` (S = {seeds}) the embedded model solves {greedy} of the held-out tasks "
        f"greedily: **{verdict(over_best)} the base at its best temperature** ({named(f.best)}: {best}; "
        f"{show(over_best)}{spread}), and **{verdict(over_forced)} the base made to think in full** ({made}; "
        f"{show(over_forced)}). Greedy answers that were worked out step by step: {worked[0]} before, {worked[1]} "
        f"after; tokens an answer: {tokens[0]} and {tokens[1]}. Within {f.n} tries at temperature 1 it is "
        f"{verdict(wide)} the base: {many[0]} before, {many[1]} after ({show(wide)})."
    )


def label(f: Figures, name: str) -> str:
    """The name of a row of the tables; "after" says how many trainings it is the mean of."""
    mean = f", mean of {len(f.seeds)}" if name == "after" and len(f.seeds) > 1 else ""
    return {"base": "base", FORCED: "base made to think"}.get(name, name) + mean


def frontier(f: Figures) -> str:
    """pass@1, pass@n, styles and lengths at each temperature."""
    columns = sorted(TEMPERATURES)
    rows = []
    for k in (1, f.n):
        for name in ("base", FORCED, "after"):
            there = [t for t in (THINKING if name == FORCED else TEMPERATURES) if t or k == 1]
            cells = [short(f.solved(name, t, k).mean()) if t in there else "" for t in columns]
            rows.append([f"pass@{k}, {label(f, name)}", *cells])
    for name in ("base", "after"):
        cells = [f"{100 * f.share(name, t, TRACED):.0f}" for t in columns]
        rows.append([f"worked out step by step, %, {label(f, name)}", *cells])
    for name in ("base", "after"):
        rows.append([f"tokens an answer, {label(f, name)}", *(f"{f.tokens(name, t).mean():.1f}" for t in columns)])
    return table(["", *map(named, columns)], rows)


def changes(f: Figures) -> str:
    """By mode: greedy accuracy of each run, less the base at its best temperature."""
    parts = {mode: f.modes == mode for mode in MODES} | {"all": np.full(len(f.modes), True)}
    rows = []
    for name, part in parts.items():
        bases = [f.solved("base", 0), f.solved("base", f.best), f.solved(FORCED, 0)]
        forced_here = [True, True, name != "abduction"]
        cells = [short(values[part].mean()) if there else "" for values, there in zip(bases, forced_here)]
        rows.append(
            [
                f"{name} ({part.sum()} tasks)",
                *cells,
                *(show(f.gain(seed, 0, "base", f.best, part=part)) for seed in f.seeds),
            ]
        )
    rows.append(
        [
            f"all, pass@{f.n} at temperature 1",
            "",
            short(f.solved("base", 1, f.n).mean()),
            "",
            *(show(f.gain(seed, 1, "base", 1, f.n)) for seed in f.seeds),
        ]
    )
    head = ["greedy", "base", f"base at its best, {named(f.best)}", "base made to think", *f.seeds]
    return table(head, rows)


def lengths(f: Figures) -> str:
    """By number of statements: greedy accuracy, and tokens of a greedy answer."""
    parts = {at: f.levels == at for at in range(1, BEYOND)}
    rows = [
        [f"greedy, {label(f, name)}", *(short(f.solved(name, 0)[part].mean()) for part in parts.values())]
        for name in ("base", FORCED, "after")
    ]
    rows += [
        [f"tokens, {label(f, name)}", *(f"{f.tokens(name, 0)[part].mean():.0f}" for part in parts.values())]
        for name in ("base", "after")
    ]
    return table(["statements", *map(str, parts)], rows)


def ends(f: Figures) -> str:
    """Means over the ends of training, mode by mode."""
    names = {
        "proposer/MODE/valid_rate": ("valid proposals, %", 100, 0),
        "solver/MODE/response_tokens": ("tokens an answer", 1, 0),
        "proposer/MODE/entropy": ("proposer entropy, nats", 1, 2),
        "solver/MODE/entropy": ("solver entropy, nats", 1, 2),
    }
    rows = []
    for key, (title, scale, digits) in names.items():
        shown = [
            ["-" if x is None else f"{scale * x:.{digits}f}" for x in end]
            for seed in f.seeds
            for end in f.parts[f"{seed} training"][key]
        ]
        halves = [" / ".join(end) for end in shown]
        rows.append([title, *(f"{a} -> {b}" for a, b in zip(halves[::2], halves[1::2]))])
    return table(["", *f.seeds], rows)


def shown_example(f: Figures) -> str:
    """A task with the greedy answers before and after, as the model wrote them."""
    entry = f.parts["example"]
    if entry is None:
        return ""
    task = entry["task"]
    text = f"{task['program']}\n\nf({task['input']}) is {task['output']}\n\n"
    text += f"before   <think>{entry['before']}\n\nafter    <think>{entry['after']}"
    return f"\n\nA greedy answer before and after ({entry['model']}):\n\n````\n{text}\n````"


def sections(f: Figures) -> dict[str, str]:
    """{marker: the Markdown that belongs there}: plot and sentence of README.md, tables of docs/tiny.md."""
    image = (
        f"![pass@1 and pass@{f.n} of the embedded model over temperatures, before and after self-play]"
        "(results/first_run.png)"
    )
    tables = (
        f"{len(f.modes)} held-out tasks, {f.n} answers each (greedy: one); 95 % intervals, paired over the tasks.\n\n"
        f"{frontier(f)}\n\n{changes(f)}\n\n{lengths(f)}\n\nMeans over the first and the last {WINDOW} steps "
        f"(deduction / abduction / induction):\n\n{ends(f)}{shown_example(f)}"
    )
    return {"first-run": f"{image}\n\n{sentence(f)}", "first-run-tables": tables}


def fill_pages(root: Path, texts: dict[str, str], write: bool = True) -> None:
    """Puts each text between its markers. ValueError, before anything is written, where a page lacks them."""
    paths = {name: root / SECTIONS[name] for name in texts}
    pages = {paths[name]: fill(paths[name].read_text(), name, text) for name, text in texts.items()}
    for path, page in pages.items():
        if write:
            path.write_text(page)


def plot(f: Figures, path: Path) -> None:
    """pass@1 against pass@n: a line through the temperatures of each model; greedy accuracy marked on the axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.6), layout="constrained")
    axes = figure.subplots()
    hot = [t for t in TEMPERATURES if t]
    for side, names in (("base", ["base"]), ("tuned", f.seeds)):
        text = "base" if side == "base" else "after self-play" + (", a line a seed" if len(names) > 1 else "")
        for i, name in enumerate(names):
            points = {f"{t:g}": [{"mean": f.solved(name, t, k).mean()} for k in (1, f.n)] for t in hot}
            frontier_line(axes, points, f.solved(name, 0).mean(), side, None if i else text)
    axes.plot(
        *(f.solved(FORCED, 1, k).mean() for k in (1, f.n)),
        marker="^",
        color=COLORS["base"],
        linestyle="",
        label="base made to think, temperature 1",
    )
    axes.axvline(f.solved(FORCED, 0).mean(), ymax=0.06, color=COLORS["base"], linewidth=2, linestyle=":")
    axes.plot([], [], color="gray", linewidth=2, label="greedy, on the axis (dotted: base made to think)")
    axes.set(xlabel="pass@1", ylabel=f"pass@{f.n}", title=f"{len(f.modes)} held-out tasks; small numbers: temperature")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})


# ---------------------------------------------------------------- the script


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories; none: draw only")
    parser.add_argument("--samples", type=int, default=64, help="answers a task and temperature (64)")
    parser.add_argument("--a-cell", type=int, default=A_CELL, help="tasks of each mode and number of statements (10)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of first_run.json and first_run.png")
    parser.add_argument("--pages", type=Path, default=ROOT, help="directory of README.md and docs/tiny.md")
    args = parser.parse_args(arguments)
    try:
        if min(args.samples, args.a_cell) < 1:
            raise ValueError("--samples and --a-cell must be at least 1")
        fill_pages(args.pages, dict.fromkeys(SECTIONS, ""), write=False)  # refused before anything is measured
        if args.runs:
            measure(args)
        path = args.out / "first_run.json"
        if not path.exists():
            raise ValueError(f"{path}: no such file yet; give the directories of runs")
        figures = Figures(json.loads(path.read_text()))
    except (ValueError, OSError) as error:
        print(f"first_run.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {args.out / 'first_run.json'}", file=sys.stderr)
        return 0
    plot(figures, args.out / "first_run.png")
    fill_pages(args.pages, sections(figures))
    print(sentence(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
