"""The embedded model before and after its default run, over temperatures: first_run.json, the plot, README's tables.

    python results/first_run.py runs/tiny-0 runs/tiny-1 runs/tiny-2     finished runs of train_azr.py, a seed each
    python results/first_run.py                                         plot and README again from first_run.json

PER_CELL held-out tasks of each mode and number of statements; at every temperature --samples answers a task (greedy:
one) of the base and of each run's last checkpoint, by eval_passk.py. And the base made to think: its answers begin with
a thought of the right kind (OPENINGS), at temperatures 0 and 1. Stop it at any time: the same command goes on, from
--work, where a part is kept under a hash of the weights, so that other weights never count as measured.

Intervals are over tasks, paired; what is said of several runs is of the mean of them, task by task.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of this small model, threads that wait for each other cost more

import numpy as np  # noqa: E402

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path[:0] = [str(ROOT), str(RESULTS)]

from experiments import HARDEST, MODES, statements, stratified, write  # noqa: E402
from tables import fill, show, table  # noqa: E402

from azr.heldout import sample_seed  # noqa: E402
from azr.passk import Interval, difference_interval, pass_at_k  # noqa: E402

TEMPERATURES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
THINKING = (1.0, 0.0)  # temperatures of the base made to think
PER_CELL = 10
PART = 10  # steps at both ends of a run whose means are compared
SECTIONS = ("first-run", "first-run-tables")  # markers in README.md
# What the first tokens of a thought are, token by token. A deduction's begins with the value of p or how it is
# computed, an abduction's with an input, an induction's with a program. No style is chosen further than that.
OPENINGS = {"deduction": (r"p", r"=\[?"), "abduction": (r"\d|'|\[(0\])?",), "induction": (r"try ",)}


# ---------------------------------------------------------------- measuring


def measure(runs: list[Path], args: argparse.Namespace) -> dict:
    """What first_run.json holds: settings, tasks, "MODEL/T" for each model and temperature, the training, an example.

    MODEL is base, think (the base made to think) or seedN. ValueError: runs that do not belong together.
    """
    import eval_passk

    runs_by_seed, model, longest = together(runs)
    lines = stratified((Path(model_directory(model)) / "held_out.jsonl").read_text().splitlines(), args.per_cell)
    text = "".join(f"{line}\n" for line in lines)
    work = args.work / digest(text.encode(), str(longest).encode())
    work.mkdir(parents=True, exist_ok=True)
    (work / "held_out.jsonl").write_text(text)
    more = ["--benchmark", f"tiny={work / 'held_out.jsonl'}"]
    base = digest((Path(model_directory(model)) / "model.safetensors").read_bytes())
    weights = {"base": (base, ["--model", model])}
    for seed, checkpoint in runs_by_seed.items():
        adapter = (checkpoint / "adapter_model.safetensors").read_bytes()
        weights[f"seed{seed}"] = (digest(base.encode(), adapter), ["--adapter", str(checkpoint)])
    data: dict = {
        "settings": {"model": model, "samples": args.samples, "per_cell": args.per_cell, "max_new_tokens": longest},
        "tasks": tasks_of(lines),
    }
    answers = {}
    for name, (key, given) in weights.items():
        for t in TEMPERATURES:
            n, out = args.samples if t else 1, work / f"{key}-{t:g}"
            if not finished(out, n):
                command = ["run", *given, *more, "--samples", str(n), "--temperature", str(t), "--top-p", "1"]
                done(eval_passk.main([*command, "--max-new-tokens", str(longest), "--out", str(out)]), out, n)
            data[f"{name}/{t:g}"], answers[name, t] = numbers(out, out / "samples.jsonl", n, data["tasks"])
    for t in THINKING:
        n, out = args.samples if t else 1, work / f"{base}-think-{t:g}"
        if not finished(out, n):
            think(model, lines, n, t, longest, out / "samples.jsonl")
            command = ["score", str(out / "samples.jsonl"), *more, "--out", str(out)]
            done(eval_passk.main(command), out, n)
        data[f"think/{t:g}"], _ = numbers(out, out / "samples.jsonl", n, data["tasks"])
    for seed, checkpoint in runs_by_seed.items():
        data[f"training/seed{seed}"] = training(checkpoint.parent.parent / "metrics.jsonl")
    first = f"seed{next(iter(runs_by_seed))}"
    data["example"] = example(data, lines, first, answers["base", 0.0], answers[first, 0.0])
    return data


def together(runs: list[Path]) -> tuple[dict[int, Path], str, int]:
    """({seed: last checkpoint}, the model that all runs started from, --max-new-tokens)."""
    from azr.evalrun import adapter_directory

    found, settings = {}, set()
    for run in runs:
        try:
            config = json.loads((run / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{run}: no readable config.json; give the directory of a run of train_azr.py") from error
        checkpoint = adapter_directory(run, [])
        if checkpoint == run:
            raise ValueError(f"{run}: has no checkpoint yet")
        if config["seed"] in found:
            raise ValueError(f"{run}: {found[config['seed']].parent.parent} has the same seed, {config['seed']}")
        found[config["seed"]] = checkpoint
        settings.add((config["model"], config["max_new_tokens"]))
    if len(settings) > 1:
        raise ValueError(f"the runs differ in model or --max-new-tokens: {sorted(settings)}")
    ((model, longest),) = settings
    return dict(sorted(found.items())), model, longest


def model_directory(model: str) -> str:
    from azr.plan import model_path

    return model_path(model)


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def finished(out: Path, n: int) -> bool:
    path = out / "result.json"
    return path.exists() and json.loads(path.read_text())["samples_per_problem"] >= n


def done(code: int, out: Path, n: int) -> None:
    """Goes on only if the command did what it was asked for; it says itself why not."""
    if code or not finished(out, n):
        sys.exit(code)


def tasks_of(lines: list[str]) -> dict[str, list]:
    """Columns: id as eval_passk.py has it, mode, statements."""
    from azr.tasks import Task

    tasks = [Task.from_json(json.loads(line)) for line in lines]
    return {
        "id": [f"{task.mode}/{task.hash[:16]}" for task in tasks],
        "mode": [task.mode for task in tasks],
        "statements": [statements(task.program) for task in tasks],
    }


def numbers(graded: Path, samples: Path, n: int, tasks: dict) -> tuple[dict, dict[str, str]]:
    """({correct, thoughts: counts a task; tokens: mean a task}, the first answer to each task) of n answers a task."""
    place = {task: i for i, task in enumerate(tasks["id"])}
    correct, thoughts, tokens = np.zeros((3, len(place)), int)
    first = {}
    for row in map(json.loads, open(graded / "graded.jsonl", encoding="utf-8")):
        if row["sample"] < n:
            correct[place[row["task_id"]]] += row["correct"]
            tokens[place[row["task_id"]]] += row["tokens"]
    for row in map(json.loads, open(samples, encoding="utf-8")):
        if row["sample"] < n:
            thoughts[place[row["task_id"]]] += bool(row["completion"].partition("</think>")[0].strip())
        if row["sample"] == 0:
            first[row["task_id"]] = row["completion"]
    columns = {"correct": correct.tolist(), "thoughts": thoughts.tolist(), "tokens": (tokens / n).tolist()}
    return {"n": n} | columns, first


def think(model: str, lines: list[str], n: int, temperature: float, longest: int, out: Path) -> None:
    """Answers of the base that begin with a thought (OPENINGS), as samples for `eval_passk.py score`."""
    from azr.plan import TINY
    from azr.prompts import solve_prompt
    from azr.rollout import Policy, Sampling
    from azr.tasks import Task

    policy = Policy.load(model_directory(model), "none", max_batch=TINY.max_batch)
    tasks = [Task.from_json(json.loads(line)) for line in lines for _ in range(n)]
    seeds = [sample_seed(0, task.hash, i % n) for i, task in enumerate(tasks)]
    opening = Opening(policy, temperature)
    prompts = [policy.encode(solve_prompt(task, "tiny")) for task in tasks]
    begun = [opening(ids, task.mode, seed) for ids, task, seed in zip(prompts, tasks, seeds)]
    most = max(map(len, begun))
    rows = policy.generate([a + b for a, b in zip(prompts, begun)], 1, Sampling(temperature, max_new_tokens=longest - most),
                           [[seed] for seed in seeds])  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", encoding="utf-8") as file:
        for i, (task, start, (completion,)) in enumerate(zip(tasks, begun, rows)):
            ids = start + completion.ids
            row = {"task_id": f"{task.mode}/{task.hash[:16]}", "sample": i % n, "completion": policy.decode(ids)}
            file.write(json.dumps(row | {"tokens": len(ids), "finish_reason": completion.finish_reason}) + "\n")


class Opening:
    """Draws the first tokens of a thought from the model's own probabilities, among those that OPENINGS allows."""

    def __init__(self, policy, temperature: float):
        self.policy, self.temperature, self.known = policy, temperature, {}
        texts = [policy.tokenizer.decode([i]) for i in range(policy.base.config.vocab_size)]
        patterns = {pattern for opening in OPENINGS.values() for pattern in opening}
        self.allowed = {p: [i for i, text in enumerate(texts) if re.fullmatch(p, text)] for p in patterns}

    def __call__(self, prompt: list[int], mode: str, seed: int) -> list[int]:
        rng, ids = np.random.default_rng(seed), []
        for pattern in OPENINGS[mode]:
            allowed, logits = self.allowed[pattern], self.logits((*prompt, *ids))[self.allowed[pattern]]
            if self.temperature:
                shares = np.exp((logits - logits.max()) / self.temperature)
                ids.append(allowed[rng.choice(len(allowed), p=shares / shares.sum())])
            else:
                ids.append(allowed[int(logits.argmax())])
        return ids

    def logits(self, ids: tuple[int, ...]) -> np.ndarray:
        import torch

        if ids not in self.known:
            with torch.no_grad():
                row = self.policy.base(input_ids=torch.tensor([ids], device=self.policy.device)).logits[0, -1]
            self.known[ids] = row.double().cpu().numpy()
        return self.known[ids]


def training(path: Path) -> dict[str, list[list[float]]]:
    """Means over the first and over the last PART steps: by mode valid proposals and tokens of an answer, entropies."""
    steps = [row for row in map(json.loads, path.read_text().splitlines()) if row["step"] > 0]
    part = min(PART, max(1, len(steps) // 2))
    names = {
        "valid": "proposer/{}/valid_rate", "tokens": "solver/{}/response_tokens",
        "proposer_entropy": "proposer/{}/entropy", "solver_entropy": "solver/{}/entropy",
    }  # fmt: skip
    mean = lambda rows, name: float(np.mean([row[name] for row in rows if row.get(name) is not None] or [np.nan]))  # noqa: E731
    return {
        key: [[mean(rows, name.format(mode)) for mode in MODES] for rows in (steps[:part], steps[-part:])]
        for key, name in names.items()
    }


def example(data: dict, lines: list[str], name: str, before: dict[str, str], after: dict[str, str]) -> dict | None:
    """A deduction task with its greedy answers: the longest program that only the trained model has right."""
    tasks, wrong, right = data["tasks"], data["base/0"]["correct"], data[f"{name}/0"]["correct"]
    fits = [i for i, mode in enumerate(tasks["mode"]) if mode == "deduction" and right[i] > wrong[i]]
    if not fits:
        return None
    i = max(fits, key=lambda i: tasks["statements"][i])
    key = tasks["id"][i]
    return {"task": json.loads(lines[i]), "before": before[key], "after": after[key], "model": name}


# ---------------------------------------------------------------- figures


class Figures:
    """first_run.json, and what the page asks of it. `trained`: the runs."""

    def __init__(self, data: dict):
        self.data = data
        self.n = data["settings"]["samples"]
        self.modes, self.statements = np.array(data["tasks"]["mode"]), np.array(data["tasks"]["statements"])
        self.trained = sorted({key.partition("/")[0] for key in data if key.startswith("seed")})
        # the best for the base over all tasks, chosen on these very tasks: in the base's favour
        self.best = max(TEMPERATURES, key=lambda t: self.solved("base", t, 1).mean())

    def solved(self, name: str, t: float, k: int) -> np.ndarray:
        """(tasks,) pass@k; "after": the mean of the runs."""
        if name == "after":
            return np.mean([self.solved(run, t, k) for run in self.trained], axis=0)
        row = self.data[f"{name}/{t:g}"]
        return pass_at_k(row["n"], row["correct"], k)

    def column(self, name: str, t: float, key: str) -> np.ndarray:
        """(tasks,) share of answers with a thought, or tokens of an answer."""
        if name == "after":
            return np.mean([self.column(run, t, key) for run in self.trained], axis=0)
        row = self.data[f"{name}/{t:g}"]
        return np.array(row[key]) / (row["n"] if key == "thoughts" else 1)

    def has(self, name: str, t: float) -> bool:
        return name == "after" or f"{name}/{t:g}" in self.data

    def gain(self, name: str, other: str, t: float, t_other: float, k: int = 1, part=slice(None)) -> Interval:
        """Of `name` over `other`, each at its temperature, paired over tasks."""
        return difference_interval((self.solved(name, t, k) - self.solved(other, t_other, k))[part])


def short(value: float) -> str:
    """.415, as the README writes shares."""
    return f"{value:.3f}".removeprefix("0")


def named(t: float) -> str:
    return f"T {t:g}".replace("0.", ".") if t else "greedy"


def sentence(f: Figures) -> str:
    """What was measured, in words that follow from the intervals."""
    runs = len(f.trained)
    gain, forced = f.gain("after", "base", 0, f.best), f.gain("after", "think", 0, 0)
    wide = f.gain("after", "base", 1, 1, f.n)
    each = [f.gain(name, "base", 0, f.best).mean for name in f.trained]
    many = f" (mean of {runs} training seeds; {min(each):+.3f} to {max(each):+.3f})" if runs > 1 else " (one seed)"
    says = lambda x: "above" if x.low > 0 else "below" if x.high < 0 else "not told apart from"  # noqa: E731
    return (
        f"After `python train_azr.py` the embedded model's greedy answers to held-out tasks are right in "
        f"{short(f.solved('after', 0, 1).mean())} of all cases{many}: **{says(gain)} the base at its best temperature** "
        f"({named(f.best)}, {short(f.solved('base', f.best, 1).mean())}; {show(gain)}) and {says(forced)} the base made "
        f"to think ({short(f.solved('think', 0, 1).mean())}; {show(forced)}). "
        f"Greedy answers with a thought: {100 * f.column('base', 0, 'thoughts').mean():.0f} % before, "
        f"{100 * f.column('after', 0, 'thoughts').mean():.0f} % after; {f.column('base', 0, 'tokens').mean():.0f} and "
        f"{f.column('after', 0, 'tokens').mean():.0f} tokens. Within {f.n} tries at temperature 1 it is {says(wide)} the "
        f"base: {short(f.solved('base', 1, f.n).mean())} before, {short(f.solved('after', 1, f.n).mean())} after "
        f"({show(wide)})."
    )


def frontier(f: Figures) -> str:
    """Both ends of pass@k, thoughts and lengths at each temperature."""
    columns = sorted(TEMPERATURES)
    after = f"after, mean of {len(f.trained)}" if len(f.trained) > 1 else "after"
    label = {"base": "base", "think": "base made to think", "after": after}
    rows = []
    for k in (1, f.n):
        for name in label:
            cells = [short(f.solved(name, t, k).mean()) if f.has(name, t) and (t or k == 1) else "" for t in columns]
            rows.append([f"pass@{k}, {label[name]}", *cells])
    for key, unit, scale, digits in (("thoughts", "answers with a thought, %", 100, 0), ("tokens", "tokens", 1, 1)):
        for name in ("base", "after"):
            cells = [f"{scale * f.column(name, t, key).mean():.{digits}f}" for t in columns]
            rows.append([f"{unit}, {label[name]}", *cells])
    return table(["", *map(named, columns)], rows)


def changes(f: Figures) -> str:
    """By mode: greedy after, less the base at its best temperature, a column a run."""
    parts = {mode: f.modes == mode for mode in MODES} | {"all": np.full(len(f.modes), True)}
    rows = []
    for name, part in parts.items():
        bases = [f.solved("base", 0, 1), f.solved("base", f.best, 1), f.solved("think", 0, 1)]
        gains = [show(f.gain(run, "base", 0, f.best, part=part)) for run in f.trained]
        rows.append([f"{name} ({part.sum()} tasks)", *(short(values[part].mean()) for values in bases), *gains])
    wide = [show(f.gain(run, "base", 1, 1, f.n)) for run in f.trained]
    rows.append([f"all, pass@{f.n} at temperature 1", "", short(f.solved("base", 1, f.n).mean()), "", *wide])
    head = ["greedy accuracy", "base", f"base, {named(f.best)}: its best", "base made to think"]
    return table([*head, *(run.replace("seed", "seed ") for run in f.trained)], rows)


def lengths(f: Figures) -> str:
    """By number of statements: greedy accuracy and tokens of a greedy answer."""
    parts = [f.statements == n for n in range(1, HARDEST + 1)]
    label = {"base": "base", "think": "base made to think", "after": "after"}
    rows = [[f"greedy, {label[n]}", *(short(f.solved(n, 0, 1)[p].mean()) for p in parts)] for n in label]
    rows += [[f"tokens, {label[n]}", *(f"{f.column(n, 0, 'tokens')[p].mean():.0f}" for p in parts)] for n in label]
    return table(["statements", *map(str, range(1, HARDEST + 1))], rows)


def run_table(f: Figures) -> str:
    """Means over the ends of training, mode by mode."""
    names = {"valid": ("valid proposals, %", 100, 0), "tokens": ("tokens of an answer", 1, 0),
             "proposer_entropy": ("proposer entropy, nats", 1, 2), "solver_entropy": ("solver entropy, nats", 1, 2)}  # fmt: skip
    rows = []
    for key, (label, scale, digits) in names.items():
        ends = [f.data[f"training/{run}"][key] for run in f.trained]
        cells = [" -> ".join(" / ".join(f"{scale * x:.{digits}f}" for x in end) for end in pair) for pair in ends]
        rows.append([label, *cells])
    return table(["", *(run.replace("seed", "seed ") for run in f.trained)], rows)


def shown_example(f: Figures) -> str:
    """A task with the greedy answers before and after, as the model wrote them."""
    found = f.data["example"]
    if found is None:
        return ""
    task = found["task"]
    text = f"{task['program']}\nf({task['input']}) is {task['output']}\n\n"
    text += f"before   <think>{found['before']}\nafter    <think>{found['after']}"
    return f"\n\nOne greedy answer before and after ({found['model'].replace('seed', 'seed ')}):\n\n```\n{text}\n```"


def sections(f: Figures) -> dict[str, str]:
    """What stands between the markers of README.md."""
    tasks = f"{len(f.modes)} held-out tasks, {f.n} answers each (greedy: one)"
    return {
        SECTIONS[0]: "![pass@1 and pass@64 of the embedded model over temperatures, before and after self-play]"
                     f"(results/first_run.png)\n\n{sentence(f)}",
        SECTIONS[1]: f"{tasks}; brackets are 95 % intervals, paired over the tasks.\n\n{frontier(f)}\n\n{changes(f)}\n\n"
                     f"{lengths(f)}\n\nMeans over the first and the last {PART} steps (deduction / abduction / induction):"
                     f"\n\n{run_table(f)}{shown_example(f)}",
    }  # fmt: skip


def filled(page: str, f: Figures) -> str:
    """The page with both sections made anew. ValueError without their markers."""
    for name, text in sections(f).items():
        page = fill(page, name, text)
    return page


def plot(f: Figures, path: Path) -> None:
    """pass@1 against pass@n; a line through the temperatures of each model, greedy accuracy marked on the axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    hot = [t for t in TEMPERATURES if t]
    for color, names in (("C0", ["base"]), ("C3", f.trained)):
        for i, name in enumerate(names):
            x, y = ([f.solved(name, t, k).mean() for t in hot] for k in (1, f.n))
            label = {"base": "base"}.get(name, "after self-play" + (", a line a seed" if len(names) > 1 else ""))
            axes.plot(x, y, marker="o", markersize=4, color=color, alpha=0.9, label=label if not i else None)
            for t, *at in zip(hot, x, y):
                axes.annotate(f"{t:g}", at, xytext=(3, 3), textcoords="offset points", fontsize=7, color=color)
            axes.axvline(f.solved(name, 0, 1).mean(), ymax=0.06, color=color, linewidth=2)
    at = [f.solved("think", 1, k).mean() for k in (1, f.n)]
    axes.plot(*at, marker="^", color="C0", linestyle="", label="base made to think, temperature 1")
    axes.axvline(f.solved("think", 0, 1).mean(), ymax=0.06, color="C0", linewidth=2, linestyle=":")
    axes.plot([], [], color="gray", linewidth=2, label="greedy, on the axis (dotted: base made to think)")
    axes.set(xlabel="pass@1", ylabel=f"pass@{f.n}", title=f"{len(f.modes)} held-out tasks; numbers: temperature")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})


# ---------------------------------------------------------------- the script


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories; none: draw only")
    parser.add_argument("--samples", type=int, default=64, help="answers a task and temperature (64)")
    parser.add_argument("--per-cell", type=int, default=PER_CELL, help="tasks of each mode and length (10)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "first_run", help="where answers are kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of first_run.json and first_run.png")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the page with the markers")
    args = parser.parse_args(arguments)
    try:
        if min(args.samples, args.per_cell) < 1:
            raise ValueError("--samples and --per-cell must be at least 1")
        page, path = args.readme.read_text(), args.out / "first_run.json"
        for name in SECTIONS:
            fill(page, name, "")
        if args.runs:
            data = measure(args.runs, args)
            args.out.mkdir(parents=True, exist_ok=True)
            write(path, data)
        elif not path.exists():
            raise ValueError(f"no {path} yet; give the directories of runs")
        figures = Figures(json.loads(path.read_text()))
    except (ValueError, OSError) as error:
        print(f"first_run.py: {error}", file=sys.stderr)
        return 2
    plot(figures, args.out / "first_run.png")
    args.readme.write_text(filled(page, figures))
    print(sentence(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
