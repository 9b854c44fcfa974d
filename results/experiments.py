"""The experiments behind RESULTS.md: one command an arm and seed, results/ARM/SEED.json, what exists is skipped.

    python results/experiments.py list                      the arms, their flags, what is done
    python results/experiments.py run joint/0               one run: data, training, measurements, results/joint/0.json
    python results/experiments.py run --jobs 2              everything that is missing, in the order of the list
    python results/tables.py                                tables and plots from results/*/*.json
    python -m azr.tiny.make --hidden 64 --out runs/experiments/tiny-half --work runs/half    once, for the half-* arms

A run takes some minutes on one CPU core. Stop it at any time: training goes on from its last checkpoint, the
measurements from what they have written. Runs (checkpoints, samples) stay in --runs and can be deleted; the small
JSON files that are committed hold what the tables need. Every arm is a few flags of train_azr.py, the rest is COMMON.

Left out: sharding over machines; give each a list of ARM/SEED instead.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path[:0] = [str(ROOT), str(RESULTS)]

from azr.evals.held_out import answer_key, load_tasks
from azr.jsonl import write_jsonl_atomic
from gate_numbers import BEYOND, level, stratified

STEPS, CHECKPOINTS = 80, (20, 40, 60, 80)
A_CELL = 11  # held-out tasks that are sampled many times, of each mode and number of statements from 1 to 6
COMMON = f"--steps {STEPS} --prompts-per-mode 8 --token-budget 1024 --eval-every 20 --eval-samples 0".split()
STEP_TOKENS = 5400  # response tokens a step of rlvr and sft, as joint has: `python -m azr.tasks make run` tells them
WIDE, NARROW = 512, 128  # answers a held-out task; pass@256 needs at least twice as many
WIDE_SEEDS = 3  # training seeds that get WIDE answers where an arm has them
MODES = ("deduction", "abduction", "induction")


@dataclass(frozen=True)
class Arm:
    """Flags of train_azr.py ({runs} is the --runs directory), training seeds, answers a held-out task; `script`: what
    takes the flags instead, a script that gives train_azr.py one more arm."""

    flags: str
    seeds: int = 3
    samples: int = NARROW
    model: str = "tiny"
    script: str = "train_azr.py"

    def wanted(self, seed: int) -> int:
        """Answers a held-out task of one seed."""
        return self.samples if seed < WIDE_SEEDS else NARROW


GROUPS = [f"{role}/{mode}" for role in ("proposer", "solver") for mode in (*MODES, "all")]
SERIES = [f"{group}/entropy" for group in GROUPS]
SERIES += [f"proposer/{mode}/{name}" for mode in MODES for name in ("valid_rate", "solve_rate", "learnable_rate")]
SERIES += [f"solver/{mode}/{name}" for mode in MODES for name in ("accuracy", "response_tokens")]
SERIES += [
    f"train/{name}"
    for name in (
        "tokens",
        "grad_norm",
        "clip_fraction",
        "control_share",
        "kl_to_base",
        "off_policy_ess",
        "off_policy_truncated",
        "off_policy_solutions",
    )
]
UPDATE = ("U1_rms", "U1_rel_fro", "S0", "S1", "S2", "S5", "S6", "at_rms_3e-5", "R1_effective_rank", "R1_stable_rank")
FIXED_SOLVERS = ("joint", "frozen-base", "no-update", "half-peak")  # whose proposals fixed solvers solve, by stage
# arms of which every checkpoint is measured, not two
CLOSELY = (
    "joint",
    "frozen-base",
    "no-update",
    "no-update-matched",
    "rlvr",
    "sft",
    "off-policy",
    "half-joint",
    "half-frozen-base",
    "half-no-update",
)

OFF = "--off-policy-gamma 0.25 --off-policy-source"
ARMS = {
    "joint": Arm("", 5, WIDE),
    "frozen-base": Arm("--proposer frozen-base", 5, WIDE),
    "no-update": Arm("--proposer no-update", 5),
    "no-update-matched": Arm("--proposer no-update-matched", 5),
    "separate": Arm("--proposer separate", 5),
    "rlvr": Arm(f"--algorithm rlvr --data {{runs}}/tasks.jsonl --step-tokens {STEP_TOKENS}", 5, WIDE),
    "sft": Arm(f"--algorithm sft --data {{runs}}/gold.jsonl --step-tokens {STEP_TOKENS}", 5, WIDE),
    "half-peak": Arm("--proposer-reward half-peak", 5),
    "uniform": Arm("--proposer-reward uniform", 5),
    "off-policy": Arm(f"{OFF} base", 5, WIDE),
    "off-policy-more": Arm(f"{OFF} base --off-policy-control on-policy"),
    "off-policy-shuffled": Arm(f"{OFF} base --off-policy-control shuffled"),
    "off-policy-gold": Arm(f"{OFF} {{runs}}/gold.jsonl --off-policy-weight luffy"),
    "half-joint": Arm("", model="{runs}/tiny-half"),
    "half-frozen-base": Arm("--proposer frozen-base", model="{runs}/tiny-half"),
    "half-no-update": Arm("--proposer no-update", model="{runs}/tiny-half"),
    "variance": Arm("--proposer-reward variance"),
    "gaussian": Arm("--proposer-reward gaussian"),
    "gate": Arm("--proposer-reward gate"),
    "random": Arm("--proposer-reward random"),
    "bonus": Arm("--entropy-control bonus=0.03"),
    "adaptive": Arm("--entropy-control adaptive=0.1"),
    "clip-cov": Arm("--entropy-control clip-cov"),
    "top-entropy": Arm("--entropy-control top-entropy"),
    "high-advantage-clip": Arm("--entropy-control high-advantage-clip"),
    "minibatches": Arm("--minibatches 4"),
    "clip-higher": Arm("--minibatches 4 --entropy-control clip-higher"),
    "kl-cov": Arm("--minibatches 4 --entropy-control kl-cov"),
    "temperature": Arm("--temperature 1.2"),
    "nf4": Arm("", model="{runs}/tiny-nf4"),
    "fresh": Arm("--solver-tasks fresh"),
    "seed-references": Arm("--solver-tasks fresh", script="results/seed_references.py"),
    "answers-4": Arm("--answers 4"),
    "answers-16": Arm("--answers 16"),
}  # answers-8 and backfill are joint; learnability is its reward


def order() -> Iterator[tuple[str, int, int]]:
    """(arm, seed, answers a held-out task): three seeds of the first nine arms, many answers where they are wanted,
    then seed by seed what is left."""
    first, wide = list(ARMS)[:9], [arm for arm in ARMS if ARMS[arm].samples > NARROW]
    yield from ((arm, seed, NARROW) for arm in first for seed in range(3))
    yield from ((arm, seed, WIDE) for seed in range(2) for arm in wide)
    yield from ((arm, seed, NARROW) for seed in range(5) for arm in ARMS if seed < ARMS[arm].seeds)
    yield from ((arm, seed, WIDE) for seed in range(WIDE_SEEDS) for arm in wide)


def done(arm: str, seed: int, samples: int) -> bool:
    """Whether the result of this arm and seed is there, with at least so many answers to each held-out task."""
    path = RESULTS / arm / f"{seed}.json"
    return path.exists() and json.loads(path.read_text())["held_out"]["samples_per_problem"] >= samples


# ---------------------------------------------------------------- what a run is made of


def call(log: Path, *arguments: object) -> None:
    """One command of this project on one core; what it prints goes to the log. RuntimeError with its last line."""
    with open(log, "a", encoding="utf-8") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"{' '.join(command[1:])}: exit code {done.returncode}: {lines[-1] if lines else ''}")


def prepare(runs: Path) -> None:
    """The files the arms share: fixed tasks, right responses to such tasks, the held-out tasks sampled many times."""
    runs.mkdir(parents=True, exist_ok=True)
    log = runs / "prepare.log"
    for name, more in (("tasks", ()), ("gold", ("--solutions",))):
        if not (runs / f"{name}.jsonl").exists():
            call(log, "-m", "azr.tasks", "make", "tiny", runs / f"{name}.jsonl", "--count", 3000, *more)
    tasks = load_tasks(ROOT / "azr" / "tiny" / "held_out.jsonl")
    kept = [tasks[i] for i in stratified(tasks, A_CELL) if level(tasks[i]) < BEYOND]
    write_jsonl_atomic(runs / "held_out.jsonl", [task.to_json() for task in kept])
    if not (runs / "tiny-nf4").exists():
        round_to_nf4(ROOT / "azr" / "tiny", runs / "tiny-nf4")


def round_to_nf4(model: Path, out: Path) -> None:
    """A copy of an unsharded model whose linear layers hold what 4 bits keep of them: noise that no step removes.

    Instead of --quantization nf4, whose products are slow on a CPU: the same noise at the price of bf16.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from azr.weights.nf4 import quantize

    aside = out.with_suffix(".tmp")
    shutil.copytree(model, aside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            weights[name] = quantize(weight.float()).dequantize(torch.float32).view_as(weight).to(weight.dtype)
    save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
    os.replace(aside, out)


def train(arm: str, seed: int, runs: Path) -> Path:
    """The run directory, trained to the end."""
    run, flags = runs / f"{arm}-{seed}", ARMS[arm].flags.format(runs=runs).split()
    if not (run / "checkpoints" / f"step_{STEPS}").exists():
        model = ["--model", ARMS[arm].model.format(runs=runs), "--seed", seed]
        again = ["--resume", "auto"] if any((run / "checkpoints").glob("step_*")) else []
        call(runs / f"{arm}-{seed}.log", ARMS[arm].script, *model, *COMMON, *flags, "--out", run, *again)
    return run


def sample(name: str, runs: Path, samples: int, *model: object, seed: int = 0) -> Path:
    """Graded answers to the held-out tasks at temperature 1, in runs/eval/NAME."""
    out = runs / "eval" / name
    done = out / "result.json"
    if not done.exists() or json.loads(done.read_text())["samples_per_problem"] < samples:
        settings = ["--samples", samples, "--temperature", 1, "--top-p", 1, "--seed", seed, "--out", out]
        out.parent.mkdir(exist_ok=True)
        call(
            runs / f"eval-{name}.log",
            "eval_passk.py",
            "run",
            *model,
            "--benchmark",
            f"tiny={runs / 'held_out.jsonl'}",
            *settings,
        )
    return out


ONE_PROCESS = "import analyze, json, sys; sys.exit(max(analyze.main(command) for command in json.loads(sys.argv[1])))"


def measure(arm: str, seed: int, run: Path, runs: Path) -> dict[str, dict]:
    """What analyze.py says about the run, by subcommand; rlvr and sft propose nothing, so two have nothing to say."""
    out = runs / "measured" / run.name
    out.mkdir(parents=True, exist_ok=True)
    count = len(CHECKPOINTS) if arm in CLOSELY else 2
    commands = {
        "entropy": ["--run", run],
        "forgetting": [run, "--held-out", 0, "--probe", 64, "--checkpoints", count],
        "sparsity": ["--base", ARMS[arm].model.format(runs=runs), "--adapter", run],
    }
    if "--algorithm" not in ARMS[arm].flags:
        commands["dynamics"] = [run, "--windows", 4]
        if arm in FIXED_SOLVERS and seed < 3:
            commands["difficulty"] = [run]
    missing = [
        [name, *map(str, arguments), "--json", str(out / f"{name}.json")]
        for name, arguments in commands.items()
        if not (out / f"{name}.json").exists()
    ]
    if missing:
        call(runs / f"measure-{run.name}.log", "-c", ONE_PROCESS, json.dumps(missing))
    return {name: json.loads((out / f"{name}.json").read_text()) for name in commands}


def one(arm: str, seed: int, samples: int, runs: Path) -> None:
    """Training and measurements of one run, and its file of results."""
    if done(arm, seed, samples):
        return
    run = train(arm, seed, runs)
    model = ["--adapter", run / "checkpoints" / f"step_{STEPS}"]
    graded = sample(run.name, runs, samples, *model)
    result = {"arm": arm, "seed": seed, "flags": " ".join([*COMMON, ARMS[arm].flags.replace("{runs}/", "")])}
    result |= {"model": ARMS[arm].model.replace("{runs}/", ""), "held_out": counts(graded)}
    result |= digest(run, measure(arm, seed, run, runs))
    write(RESULTS / arm / f"{seed}.json", result)


def bases(runs: Path) -> None:
    """The untrained models on the same held-out tasks: base against base is what no training looks like.

    What every gain is measured against four times, for its error is in all of them; the others twice."""
    others = {"half-base": runs / "tiny-half", "nf4-base": runs / "tiny-nf4"}
    for name, model in {"base": "tiny", **others}.items():
        for seed in range(4 if name == "base" else 2):
            path = RESULTS / name / f"{seed}.json"
            if not path.exists() and (model == "tiny" or model.exists()):
                out = sample(f"{name}-{seed}", runs, WIDE if model == "tiny" else NARROW, "--model", model, seed=seed)
                write(path, {"arm": name, "seed": seed, "held_out": counts(out)})


# ---------------------------------------------------------------- what is kept of a run


def counts(out: Path) -> dict:
    """Per held-out task, sorted by id (so by mode): answers, right ones, different right ones of the first NARROW.

    And for each mode the answer that comes most often of all, whatever the task, with its share.
    """
    result, tasks = json.loads((out / "result.json").read_text()), {}
    answers: dict[str, Counter] = {}
    with open(out / "graded.jsonl", encoding="utf-8") as file:
        for row in map(json.loads, file):
            task = tasks.setdefault(row["task_id"], [0, 0, set()])
            task[0] += 1
            task[1] += row["correct"]
            mode = row["task_id"].split("/")[0]
            if row["sample"] < NARROW:
                answers.setdefault(mode, Counter())[row["answer"]] += 1
            if row["correct"] and row["sample"] < NARROW:
                task[2].add(answer_key(mode, row["answer"]))
    columns = zip(*((n, right, len(different)) for _, (n, right, different) in sorted(tasks.items())))
    n, right, different = map(list, columns)
    settings = {name: result[name] for name in ("samples_per_problem", "decoding", "quantization")}
    commonest = {
        mode: [(top := counter.most_common(1)[0])[0], top[1] / counter.total()]
        for mode, counter in sorted(answers.items())
    }
    return {
        "n": n[0] if len(set(n)) == 1 else n,
        "correct": right,
        "distinct_correct": different,
        "commonest": commonest,
        **settings,
    }


def digest(run: Path, measured: dict[str, dict]) -> dict:
    """The run in a few kilobytes: curves, checkpoints, the final update, its proposals at the start and the end."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 0]
    result: dict = {"seconds": steps[-1]["time/elapsed"]}
    result["series"] = {name: [row.get(name) for row in steps] for name in SERIES if any(name in row for row in steps)}
    accuracy = {
        row["step"]: [row[f"held_out/{mode}/accuracy"] for mode in MODES]
        for row in rows
        if "held_out/all/accuracy" in row
    }
    result["greedy"] = {"modes": MODES, "accuracy": accuracy}
    (entry,) = measured["forgetting"]["runs"].values()
    ((_, probed),) = measured["entropy"]["runs"].items()
    result["checkpoints"] = {step: checkpoint(row) for step, row in entry["checkpoints"].items()}
    result["skill_base"] = sum(entry["base"]["skill"]) / len(entry["base"]["skill"])
    result["probe_entropy"] = {
        step: {group: row[group]["token_mean"]["mean"] for group in row if row[group]}
        for step, row in probed["probe"].items()
    }
    update = measured["sparsity"]
    result["update"] = {part: {key: update[part].get(key) for key in UPDATE} for part in ("whole", "adapted")}
    if "dynamics" in measured:
        part = measured["dynamics"]
        result["validity"] = {
            group: [window["ok"]["mean"] for window in windows] for group, windows in part["validity"].items()
        }
        result["solve_rate"] = {name: value["histogram"] for name, value in part["solve_rate"].items()}
        result["diversity"] = [
            {name: value["mean"] if isinstance(value, dict) else value for name, value in window.items()}
            for window in part["diversity"]["windows"]
        ]
    if "difficulty" in measured:
        (table,) = measured["difficulty"]["runs"].values()
        result["difficulty"] = {
            key: table[key]
            for key in (
                "solvers",
                "stages",
                "rate",
                "tokens",
                "logged_rate",
                "tasks",
                "tasks_by_solver",
                "tasks_by_mode",
            )
        }
    return result


def checkpoint(row: dict) -> dict:
    """KL, skill and size of one checkpoint as analyze.py forgetting measured them."""
    kl = {name: value["mean"] for name, value in row.items() if name.startswith("kl_")}
    skill = row["scores"]["skill"]
    return kl | {"skill": sum(skill) / len(skill)} | {key: row[key] for key in ("U1_rms", "U1_rel_fro", "S1", "S5")}


def write(path: Path, value: dict) -> None:
    """One line a key, numbers to four digits; written aside and renamed."""

    def short(x):
        if isinstance(x, float):
            return float(f"{x:.4g}")
        if isinstance(x, dict):
            return {key: short(item) for key, item in x.items()}
        return [short(item) for item in x] if isinstance(x, (list, tuple)) else x

    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(short(item))}" for key, item in value.items())
    path.parent.mkdir(exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(f"{{\n{lines}\n}}\n")
    os.replace(aside, path)


# ---------------------------------------------------------------- the script


def work(names: list[tuple[str, int, int]], runs: Path, jobs: int) -> int:
    """Runs all of them; how many failed."""

    def guarded(name: tuple[str, int, int]) -> int:
        try:
            one(*name, runs)
        except (RuntimeError, OSError) as error:
            print(f"{name[0]}/{name[1]}: {error}", file=sys.stderr, flush=True)
            return 1
        print(f"{name[0]}/{name[1]} done, {name[2]} answers a task", flush=True)
        return 0

    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(guarded, names))


def main() -> int:
    """Lists the arms or runs what is missing; returns the exit code: 1 if a run failed, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("list", "run"))
    parser.add_argument("names", nargs="*", metavar="ARM/SEED", help="default: all that is missing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a core each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "experiments", help="where the runs go")
    arguments = parser.parse_args()
    if arguments.command == "list":
        for arm, settings in ARMS.items():
            count = sum(done(arm, seed, settings.wanted(seed)) for seed in range(settings.seeds))
            print(f"{arm:20s} {count}/{settings.seeds}  {settings.flags}")
        return 0
    given = [name.split("/") for name in arguments.names]
    if bad := [name for name in given if len(name) != 2 or name[0] not in ARMS or not name[1].isdigit()]:
        print(f"experiments.py: {'/'.join(bad[0])} is no ARM/SEED; python results/experiments.py list", file=sys.stderr)
        return 2
    runs = arguments.runs.resolve()
    names = [(arm, int(seed), ARMS[arm].wanted(int(seed))) for arm, seed in given] or list(order())
    try:
        prepare(runs)
        if not given:
            bases(runs)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"experiments.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    missing = [name for name in names if not done(*name)]
    if not missing:
        print(f"nothing is missing in {RESULTS}; remove a file to have it made again")
    return min(1, work(missing, runs, max(1, arguments.jobs)))


if __name__ == "__main__":
    sys.exit(main())
