"""Gates a, b2, e and f: trainings with train_azr.py, and what the adapter does that the base did not.

A training goes on from its last checkpoint; run directories (--runs) can be deleted once the results are written.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from azr.jsonl import write_jsonl_atomic
from azr.passk import difference_interval, pass_at_k
from azr.runs import read_metrics, read_samples
from azr.tasks import MODES, Task
from azr.tiny import documents
from azr.train.config import parse, resolve
from gate_base import A_CELL, FEW_A_CELL, FORCED, SAMPLES, STYLE_SAMPLES, base, cell, forced, samples
from gate_lab import Lab, Store
from gate_numbers import (
    LEVELS,
    STYLES,
    TRACED,
    Counts,
    paired,
    spearman_interval,
    split_gain,
    statements,
    style_difference,
    style_of,
    thought_of,
)
from gate_text import table

ROOT = Path(__file__).resolve().parents[1]
STEPS = 150
WINDOW = 10  # steps of a training that are looked at together
QUICK = "--steps 3 --prompts-per-mode 2 --answers 4 --max-new-tokens 64 --eval-every 0 --eval-samples 0".split()
EASY, HARD = (1,), (4, 5)  # statements of the tasks of an oracle proposer
PHASES = ("propose", "validate", "solve", "judge", "reward", "update", "evaluate", "step")
BASE_RUNS = ("T0", "T0.2", "T0.4", "T0.6", "T0.8", "T1")
FORCED_RUNS = (*(f"{style} {at}" for style in FORCED for at in ("T0", "T0.6")), "own T1")


# ---------------------------------------------------------------- trainings


def task_file(path: Path, count: int, seed: int, sizes: Sequence[int] | None = None) -> Path:
    """`count` distinct tasks of each mode from the generator, of `sizes` statements (None: as in its documents)."""
    if path.exists():
        return path
    by_hash: dict[str, Task] = {}
    for mode in MODES:
        rng, before = random.Random(f"{seed}/{mode}/{sizes}"), len(by_hash)
        while len(by_hash) < before + count:
            drawn = documents.draw_task(mode, rng, count=rng.choice(sizes) if sizes else None)
            by_hash.setdefault(drawn.task.hash, drawn.task)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl_atomic(path, [task.to_json() for task in by_hash.values()])
    return path


def rlvr_flags(options: argparse.Namespace, lab: Lab, name: str, sizes: Sequence[int] | None) -> list[str]:
    """Flags of a training on fixed tasks, with a file in which no task comes twice; held-out tasks: the stratified
    part, greedy, now and then."""
    flags = ["--steps", str(options.steps), "--eval-every", "50", "--eval-samples", "0", *options.flags.split()]
    flags += QUICK if options.quick else []
    held_out = lab.write(lab.part(cell(options, A_CELL)), options.runs / "held_out.jsonl")
    flags += ["--algorithm", "rlvr", "--eval-data", str(held_out), "--data"]
    config, _ = resolve(parse(["--model", options.model, *flags, "-"], ""))
    count = config.steps * config.prompts_per_mode
    return [*flags, str(task_file(options.runs / f"tasks-{name}-{count}.jsonl", count, options.seed, sizes))]


def train(options: argparse.Namespace, name: str, flags: Sequence[str]) -> dict:
    """Trains runs/NAME to its end; its directory, last step, wall seconds (null if it went on after a stop), flags.

    ValueError with the last line of its log if it fails.
    """
    run = options.runs / name
    again = ["--resume", "auto"] if any((run / "checkpoints").glob("step_*")) else []
    command = ["train_azr.py", "--model", options.model, "--seed", str(options.seed), *flags, "--out", str(run)]
    run.parent.mkdir(parents=True, exist_ok=True)
    start, log = time.monotonic(), run.with_suffix(".log")
    with open(log, "a", encoding="utf-8") as file:
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.run(
            [sys.executable, *command, *again],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise ValueError(f"{' '.join(command)}: exit code {done.returncode}: {lines[-1] if lines else ''}")
    config = json.loads((run / "config.json").read_text())
    wall = None if again else round(time.monotonic() - start, 1)
    kept = ("prompts_per_mode", "answers", "learning_rate", "max_new_tokens", "lora_rank", "lora_alpha", "temperature")
    return {
        "run": str(run),
        "steps": config["steps"],
        "wall": wall,
        "flags": " ".join(flags),
        "config": {name: config[name] for name in kept},
    }


def adapter_of(trained: dict) -> Path:
    """The last checkpoint. ValueError if the training was stopped before."""
    path = Path(trained["run"]) / "checkpoints" / f"step_{trained['steps']}"
    if not path.is_dir():
        raise ValueError(f"{path}: no such checkpoint; the training was stopped or its directory deleted")
    return path


def training_store(options: argparse.Namespace, lab: Lab, name: str) -> Store:
    """NAME-SEED.json. ValueError if it was made with another model or other settings."""
    settings = {"model": lab.digest, "seed": options.seed, "longest": lab.longest, "flags": options.flags}
    settings["steps"] = getattr(options, "steps", None)
    return Store(options.out / f"{name}-{options.seed}.json", settings)


def measure(options: argparse.Namespace, store: Store, trained: dict, temperatures: Sequence[float]) -> None:
    """Greedy answers to all held-out tasks, answers at the temperatures, many to a few tasks: parts as of the base."""
    n, names = samples(options, SAMPLES), [f"T{t:g}" for t in temperatures]
    if all(name in store.parts for name in ("T0", *names, "many")):
        return
    with Lab(options.model, adapter_of(trained), 0) as lab:  # the base's seed: the answers are paired with its own
        store.get("T0", lab.answer, lab.part(2 if options.quick else None), 1, 0.0)
        for name, temperature in zip(names, temperatures):
            store.get(name, lab.answer, lab.part(cell(options, A_CELL)), n, temperature)
        many = samples(options, STYLE_SAMPLES)
        store.get("many", lab.answer, lab.part(cell(options, FEW_A_CELL)), many, 1.0)


def solver_curve(run: Path) -> list[list]:
    """[last step of a window, answers, right ones, tokens, {style: answers}] of the solver's training samples."""
    windows: dict[int, list] = {}
    for row in read_samples(run):
        if row["role"] != "solver":
            continue
        end = -(-row["step"] // WINDOW) * WINDOW
        window = windows.setdefault(end, [end, 0, 0, 0, {}])
        window[1], window[2] = window[1] + 1, window[2] + bool(row["reward"].get("correct"))
        window[3] += row["tokens"]
        style = style_of(row["mode"], thought_of(row["response"]))
        window[4][style] = window[4].get(style, 0) + 1
    return [windows[end] for end in sorted(windows)]


# ---------------------------------------------------------------- the base, measured once for all seeds


def of_base(options: argparse.Namespace, make) -> None:
    """What `base` or `forced` measures with seed 0, made if it is missing."""
    make(argparse.Namespace(**{**vars(options), "seed": 0}))


def base_counts(options: argparse.Namespace, lab: Lab) -> dict[str, Counts]:
    """Name -> answers of the base: T0 ... T1, "many" (T 1), "direct T0", "full T0.6", ... ValueError if not made."""
    result = {}
    for name, parts_needed in (("base", BASE_RUNS), ("forced", FORCED_RUNS)):
        settings = {"model": lab.digest, "seed": 0, "longest": lab.longest}
        parts = Store(options.out / f"{name}.json", settings).parts
        if missing := [part for part in parts_needed if part not in parts]:
            raise ValueError(f"{options.out / name}.json lacks {missing[0]}: run tiny_gates.py {name} first")
        result |= {part.replace("own T1", "many"): lab.counts(parts[part]) for part in parts_needed}
    return result


# ---------------------------------------------------------------- rlvr


def rlvr(options: argparse.Namespace) -> str:
    """One training on fixed tasks, and the base beside it; the report as Markdown."""
    of_base(options, base)
    of_base(options, forced)
    with Lab(options.model) as lab:
        store = training_store(options, lab, "rlvr")
        if "train" not in store.parts:
            name = f"rlvr-{options.seed}"
            store.get("train", train, options, name, rlvr_flags(options, lab, name, None))
        trained = store.parts["train"]
        store.get("curve", lambda: solver_curve(Path(trained["run"])))
        measure(options, store, trained, (0.6, 1.0))
        return rlvr_report(lab, base_counts(options, lab), store)


def trained_counts(lab: Lab, store: Store) -> dict[str, Counts]:
    """Name of a decoding -> answers of the trained model, for those that were measured."""
    return {name: lab.counts(store.parts[name]) for name in ("T0", "T0.6", "T1", "many") if name in store.parts}


def rlvr_report(lab: Lab, before: dict[str, Counts], store: Store) -> str:
    """The Markdown of one training on fixed tasks beside the base (gates a and b2)."""
    after = trained_counts(lab, store)
    lines = [training_line(store.parts["train"]), "Trained, greedy, less the base (gates a and b2):"]
    lines.append(table(GAINS, greedy_gains(before, after)))
    lines += [
        "The gain, split (gate b2):",
        table(["decoding", "tasks", "gain", "elicitation", "execution"], splits(before, after)),
    ]
    lines.append("Accuracy given a thought that is worked out (full or check), trained less base:")
    lines.append(table(["decoding", "mode", "difference", "tasks without both"], execution(before, after)))
    lines += [shares_report(before, after), pass_report(before, after), curve_report(store.parts["curve"])]
    return "\n".join(lines)


def training_line(trained: dict) -> str:
    """One line about a training: its steps, minutes and settings."""
    settings = ", ".join(f"{name} {value}" for name, value in trained["config"].items())
    wall = f"{trained['wall'] / 60:.1f} minutes" if trained["wall"] else "a time unknown, as it was interrupted"
    return f"{trained['steps']} steps in {wall}: {settings}."


def best_of(before: dict[str, Counts]) -> str:
    """The base's best decoding on the tasks that all of them have."""
    index = before["T1"].index
    return max(BASE_RUNS, key=lambda name: float(before[name].among(index).accuracy.mean()))


GAINS = ["base", "tasks", "levels 1-6", "all", *MODES]


def greedy_gains(before: dict[str, Counts], after: dict[str, Counts]) -> list[list]:
    """Rows of GAINS: trained greedy minus the base greedy, at its best temperature, and made to think or not to."""
    best = best_of(before)
    named = {
        "greedy": "T0",
        f"at its best, {best}": best,
        "forced full, greedy": "full T0",
        "forced full, T0.6": "full T0.6",
        "forced direct, greedy": "direct T0",
    }
    rows = []
    for name, key in named.items():
        a, b = before[key], after["T0"]
        values = [gain(a.of(mode), b.of(mode)) for mode in MODES]
        over_all = [gain(a.of(levels=levels), b.of(levels=levels)) for levels in (LEVELS[:-1], LEVELS)]
        if None in values:  # a style that cannot be forced in some mode
            over_all = [None, None]
        rows.append([name, len(np.intersect1d(a.index, b.index)), *over_all, *values])
    return rows


def gain(a: Counts, b: Counts):
    """The paired difference; None where one of them has no tasks."""
    return paired(a, b) if len(a) and len(b) else None


def splits(before: dict[str, Counts], after: dict[str, Counts]) -> list[list]:
    """Rows of the accuracy gain, split by `split_gain` into elicitation and execution, a decoding and mode each."""
    rows = []
    for at in ("T0.6", "T1"):
        for mode in (None, *MODES):
            a, b = before[at].of(mode), after[at].of(mode)
            rows.append([f"{at}, {mode or 'all'}", len(a), *split_gain(a, b).values()])
    return rows


def execution(before: dict[str, Counts], after: dict[str, Counts]) -> list[list]:
    """Rows of the accuracy of worked-out thoughts, trained minus base, and how many tasks lack one on either side."""
    return [
        [at, mode, *style_difference(before[at].of(mode), TRACED, after[at].of(mode), TRACED)]
        for at in ("T0.6", "T1")
        for mode in MODES
    ]


def shares_report(before: dict[str, Counts], after: dict[str, Counts]) -> str:
    """Styles and lengths, base and trained."""
    rows = []
    for at in ("T0", "T0.6", "T1"):
        for name, results in (("base", before), ("trained", after)):
            if at in results:
                counts = results[at]
                shares = [float(share) for share in counts.shares().values()]
                tokens = [f"{counts.of(levels=[level]).tokens():.0f}" for level in LEVELS]
                rows.append([f"{at}, {name}", *shares, f"{counts.tokens():.1f}", *tokens])
    header = ["answers", *STYLES, "tokens", *(f"level {level}" for level in LEVELS)]
    return "Styles and tokens of a response:\n" + table(header, rows)


def pass_report(before: dict[str, Counts], after: dict[str, Counts]) -> str:
    """pass@k at temperature 1 on the few tasks with many answers."""
    rows = []
    for k in (1, 4, 16, 64):
        a, b = before["many"], after["many"]
        if k <= min(a.n.min(), b.n.min()):
            values = pass_at_k(b.n, b.right, k) - pass_at_k(a.n, a.right, k)
            rows.append([k, len(a), a.pass_at(k), b.pass_at(k), difference_interval(values)])
    return table(["pass@k, T1", "tasks", "base", "trained", "difference"], rows)


def curve_report(curve: list) -> str:
    """The Markdown table of `solver_curve`: accuracy, tokens and styles over the training."""
    rows = [
        [end, n, right / n, f"{tokens / n:.1f}", *(styles.get(style, 0) / n for style in STYLES)]
        for end, n, right, tokens, styles in curve
    ]
    return table(["training samples up to step", "answers", "right", "tokens", *STYLES], rows)


# ---------------------------------------------------------------- oracle


def oracle(options: argparse.Namespace) -> str:
    """Two trainings on tasks of an easy and of a hard proposer; the report as Markdown."""
    of_base(options, base)
    with Lab(options.model) as lab:
        store = training_store(options, lab, "oracle")
        for kind, sizes in (("easy", EASY), ("hard", HARD)):
            name = f"oracle-{kind}-{options.seed}"
            if f"train {kind}" not in store.parts:
                store.get(f"train {kind}", train, options, name, rlvr_flags(options, lab, name, sizes))
            if kind not in store.parts:
                with Lab(options.model, adapter_of(store.parts[f"train {kind}"])) as tuned:
                    store.get(kind, tuned.answer, lab.part(2 if options.quick else None), 1, 0.0)
        greedy = Store(options.out / "base.json", {"model": lab.digest, "seed": 0}).parts["T0"]
        return oracle_report(lab, lab.counts(greedy), store)


def oracle_report(lab: Lab, before: Counts, store: Store) -> str:
    """The Markdown of the easy and the hard training beside the base, greedy (gate e)."""
    easy, hard = (lab.counts(store.parts[kind]) for kind in ("easy", "hard"))
    rows = []
    pairs = {"hard less easy": (easy, hard), "easy less base": (before, easy), "hard less base": (before, hard)}
    for name, (a, b) in pairs.items():
        groups = [(None, None), *((mode, None) for mode in MODES), (None, (1, 2, 3)), (None, (4, 5, 6))]
        rows.append([name, len(a), *(paired(a.of(*group), b.of(*group)) for group in groups)])
    header = ["greedy accuracy", "tasks", "all", *MODES, "levels 1-3", "levels 4-6"]
    lines = [f"{kind}: {training_line(store.parts[f'train {kind}'])}" for kind in ("easy", "hard")]
    return "\n".join([*lines, table(header, rows)])


# ---------------------------------------------------------------- self-play


def selfplay(options: argparse.Namespace) -> str:
    """The default run, measured before and after; the report as Markdown."""
    of_base(options, base)
    of_base(options, forced)
    with Lab(options.model) as lab:
        store = training_store(options, lab, "selfplay")
        flags = [*options.flags.split(), *(QUICK if options.quick else [])]
        trained = store.get("train", train, options, f"selfplay-{options.seed}", flags)
        store.get("proposals", lambda: proposal_sizes(Path(trained["run"])))
        store.get("times", lambda: times(Path(trained["run"])))
        store.get("curve", lambda: solver_curve(Path(trained["run"])))
        measure(options, store, trained, (0.6, 1.0))
        return selfplay_report(lab, base_counts(options, lab), store)


def proposal_sizes(run: Path) -> list[list]:
    """[step, statements] of each valid proposal of a program."""
    return [
        [row["step"], statements(row["task"]["program"])]
        for row in read_samples(run)
        if row["role"] == "proposer" and row["task"] and row["mode"] != "induction"
    ]


def times(run: Path) -> dict[str, float]:
    """Median seconds of each phase of a step."""
    rows = [row for row in read_metrics(run) if row["step"] > 0]
    seconds = {phase: [row[f"time/{phase}"] for row in rows if row.get(f"time/{phase}")] for phase in PHASES}
    return {phase: round(float(np.median(values)), 3) for phase, values in seconds.items() if values}


def selfplay_report(lab: Lab, before: dict[str, Counts], store: Store) -> str:
    """The Markdown of one self-play training beside the base (gates f and b2)."""
    after = trained_counts(lab, store)
    lines = [training_line(store.parts["train"]), "Trained, greedy, less the base (gate f):"]
    lines.append(table(GAINS, greedy_gains(before, after)))
    rows = [
        [level, *(gain(before["T0"].of(mode, [level]), after["T0"].of(mode, [level])) for mode in (None, *MODES))]
        for level in LEVELS
    ]
    lines.append(table(["greedy gain at level", "all", *MODES], rows))
    lines += [
        "The gain, split (gate b2):",
        table(["decoding", "tasks", "gain", "elicitation", "execution"], splits(before, after)),
    ]
    lines += [shares_report(before, after), pass_report(before, after), sizes_report(store.parts["proposals"])]
    lines.append(curve_report(store.parts["curve"]))
    seconds = ", ".join(f"{phase} {value:.2f}" for phase, value in store.parts["times"].items())
    return "\n".join([*lines, f"Median seconds of a step: {seconds}."])


def sizes_report(sizes: list) -> str:
    """Statements of valid proposals over the training."""
    if len(sizes) < 3:
        return "Fewer than three proposals of programs were valid."
    steps, counts = (np.array(column) for column in zip(*sizes))
    ends = -(-steps // WINDOW) * WINDOW
    rows = [[end, int((ends == end).sum()), f"{counts[ends == end].mean():.2f}"] for end in np.unique(ends)]
    text = table(["valid proposals up to step", "programs", "statements"], rows)
    return f"{text}\nSpearman of step and statements: {spearman_interval(steps, counts)}"
