"""The experiments behind RESULTS.md: one command an arm and seed, results/arms/ARM-SEED.json, what exists is skipped.

    python results/experiments.py list                      the arms, their flags, what is done
    python results/experiments.py run joint/0               one run: data, training, measurements
    python results/experiments.py measure joint/5 --temperature 1.2     one more temperature of a run that is measured
    python results/experiments.py run --jobs 2              everything that is missing, in the order of the list
    python results/findings.py                              tables and plots of RESULTS.md from results/arms/*.json
    python -m azr.tiny.make --hidden 64 --out runs/experiments/tiny-half --work runs/half    once, for the half-* arms

A run takes two to six minutes on one CPU core and its measurements one to three. Stop it at any time: training goes on
from its last checkpoint. Runs (adapters, samples) stay in --runs, so that later questions need no new training, and can
be deleted; the small JSON files that are committed hold what the tables need (measure.py says what). Every arm is a few
flags of train_azr.py, the rest is COMMON. base/SEED is the untrained model: another seed is another sample of its
answers.

Left out: sharding over machines; give each a list of ARM/SEED instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path[:0] = [str(ROOT), str(RESULTS)]

STEPS = 80  # of the default run of the embedded model
COMMON = "--eval-samples 0".split()
LONG = 160  # steps: is what tells self-play from rlvr the method, or how far a run has come?
STEP_TOKENS = 5400  # response tokens a step of rlvr and sft, as joint has: `python -m azr.tasks make run` tells them
BASES = 2  # samples of the untrained model


@dataclass(frozen=True)
class Arm:
    """Flags of train_azr.py ({runs} is the --runs directory) and how many training seeds, from `first` on; `wide`:
    seeds whose answers are sampled at colder temperatures too; `light`: only greedy answers, curves and proposals are
    measured; `script`: what takes the flags instead, a script with one more arm."""

    flags: str
    seeds: int = 3
    wide: int = 0
    model: str = "tiny"
    steps: int = STEPS
    light: bool = False
    script: str = "train_azr.py"
    first: int = 0

    def all_seeds(self) -> range:
        """The training seeds."""
        return range(self.first, self.first + self.seeds)


OFF = "--off-policy-gamma 0.25 --off-policy-source"
FOUR = "--minibatches 4 --learning-rate 2.5e-4"  # four steps of AdamW, so that they add up to one
RLVR = f"--algorithm rlvr --step-tokens {STEP_TOKENS} --data {{runs}}"
SFT = f"--algorithm sft --step-tokens {STEP_TOKENS} --data {{runs}}"
ARMS = {
    "joint": Arm("", 10, 3),
    "no-update": Arm("--proposer no-update", 10),
    "frozen-base": Arm("--proposer frozen-base", 10),
    "separate": Arm("--proposer separate", 10),
    "rlvr": Arm(f"{RLVR}/tasks.jsonl", 10, 3),
    # on what joint of the same seed proposed: the seeds are the latest of joint's, whose runs were still there
    "rlvr-proposed": Arm(f"{RLVR}/proposed-{{seed}}.jsonl", first=5),
    "joint-long": Arm("", 6, steps=LONG),
    "rlvr-long": Arm(f"{RLVR}/tasks.jsonl", 6, steps=LONG),
    "no-update-long": Arm("--proposer no-update", steps=LONG),
    "frozen-base-long": Arm("--proposer frozen-base", steps=LONG),
    "separate-long": Arm("--proposer separate", steps=LONG),
    "sft-traces-long": Arm(f"{SFT}/traces.jsonl", steps=LONG),
    "sft": Arm(f"{SFT}/gold.jsonl", 3, 3),
    "sft-traces": Arm(f"{SFT}/traces.jsonl"),
    "sft-worded": Arm(f"{SFT}/worded.jsonl"),
    "sft-operations": Arm(f"{SFT}/operations.jsonl"),
    "rlvr-easy": Arm(f"{RLVR}/easy.jsonl", 5, light=True),
    "rlvr-hard": Arm(f"{RLVR}/hard.jsonl", 5, light=True),
    "uniform": Arm("--proposer-reward uniform", 5, light=True),
    "half-peak": Arm("--proposer-reward half-peak", 5, light=True),
    "ends": Arm("--ends-penalty 0.5", light=True),
    "half-peak-ends": Arm("--proposer-reward half-peak --ends-penalty 0.5", light=True),
    "uniform-ends": Arm("--proposer-reward uniform --ends-penalty 0.5", light=True),
    "azr": Arm("--recipe azr", 5, light=True),
    # azr trains on a third of joint's tokens: is it behind at its best rate too, and after twice the steps?
    "azr-5e-4": Arm("--recipe azr --learning-rate 5e-4", light=True),
    "azr-2e-3": Arm("--recipe azr --learning-rate 2e-3", light=True),
    "azr-3e-3": Arm("--recipe azr --learning-rate 3e-3", 1, light=True),
    "azr-long": Arm("--recipe azr", steps=LONG, light=True),
    "joint-5e-4": Arm("--learning-rate 5e-4", light=True),
    "joint-2e-3": Arm("--learning-rate 2e-3", light=True),
    "fresh": Arm("--solver-tasks fresh", light=True),
    "seed-references": Arm("--solver-tasks fresh", script="results/seed_references.py", light=True),
    "no-update-matched": Arm("--proposer no-update-matched", 5),
    "off-policy": Arm(f"{OFF} base"),
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
    "bonus": Arm("--entropy-control bonus=0.03", light=True),
    "adaptive": Arm("--entropy-control adaptive=0.1"),
    "clip-cov": Arm("--entropy-control clip-cov"),
    "top-entropy": Arm("--entropy-control top-entropy"),
    "high-advantage-clip": Arm("--entropy-control high-advantage-clip"),
    "minibatches": Arm(FOUR, light=True),
    "clip-higher": Arm(f"{FOUR} --entropy-control clip-higher", light=True),
    "kl-cov": Arm(f"{FOUR} --entropy-control kl-cov", light=True),
    "temperature": Arm("--temperature 1.2"),
    "nf4": Arm("", model="{runs}/tiny-nf4"),
    "answers-4": Arm("--answers 4"),
    "answers-16": Arm("--answers 16"),
}  # answers-8 and backfill are joint; learnability is its reward
FULL_STEPS = 40  # of a training of every weight, whose weights alone are looked at
FULL = {
    f"full-{name}-{rate}-{dtype}": Arm(
        f"{ARMS[name].flags} --train full --dtype {dtype} --learning-rate {rate}".strip(), 3, steps=FULL_STEPS
    )
    for dtype in ("bf16", "fp32")
    for rate in ("1e-6", "1e-5", "1e-4")
    for name in ("joint", "rlvr", "sft", "sft-worded")
}
EARLY_STEPS = 25  # by step 80 every arm has learned the one skill that there is: who has it sooner?
EARLY = {
    f"{name}-{EARLY_STEPS}": replace(ARMS[name], seeds=5, wide=0, steps=EARLY_STEPS, light=True)
    for name in ("joint", "rlvr", "rlvr-easy", "rlvr-hard", "half-peak", "uniform")
}
ALL = ARMS | EARLY | FULL


def order() -> Iterator[tuple[str, int]]:
    """(arm, seed): the base, then arm by arm as they are listed."""
    yield from (("base", seed) for seed in range(BASES))
    yield from ((arm, seed) for arm, settings in ALL.items() for seed in settings.all_seeds())


def result(arm: str, seed: int) -> Path:
    """The file of one run."""
    return RESULTS / "arms" / f"{arm}-{seed}.json"


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


FILES = {
    "tasks": "",  # tasks of the generator
    "gold": "--solutions",  # with responses as the base's own documents have them: its distribution, without its errors
    "traces": "--solutions --style full",  # a teacher that always works everything out
    "easy": "--statements 1",  # tasks of an oracle that proposes easy ones, and of one that proposes hard ones
    "hard": "--statements 4,5",
}


def prepare(runs: Path) -> None:
    """The files the arms share: fixed tasks, right responses to such tasks in three distributions, a coarser base."""
    runs.mkdir(parents=True, exist_ok=True)
    for name, more in FILES.items():
        if not (runs / f"{name}.jsonl").exists():
            file = runs / f"{name}.jsonl"
            call(runs / "prepare.log", "-m", "azr.tasks", "make", "tiny", file, "--count", 3000, *more.split())
    if not (runs / "operations.jsonl").exists():
        make = ["results/other_operations.py", "make", "tiny", runs / "operations.jsonl", "--count", 3000]
        call(runs / "prepare.log", *make, "--solutions")
    if not (runs / "worded.jsonl").exists():
        reword(runs / "traces.jsonl", runs / "worded.jsonl")
    if not (runs / "tiny-nf4").exists():
        round_to_nf4(ROOT / "azr" / "tiny", runs / "tiny-nf4")


def reword(traces: Path, out: Path) -> None:
    """The same traces in a wording that the base never saw: each step says its value first, `8=5+3=p;`."""
    from azr.jsonl import write_jsonl_atomic

    rows = []
    for line in traces.read_text().splitlines():
        row = json.loads(line)
        thought, end, rest = row["response"].partition("</think>")
        steps = ["=".join(reversed(step.split("="))) if step.count("=") > 1 else step for step in thought.split(";")]
        rows.append(row | {"response": ";".join(steps) + end + rest})
    write_jsonl_atomic(out, rows)


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
    run, settings = runs / f"{arm}-{seed}", ALL[arm]
    if not (run / "checkpoints" / f"step_{settings.steps}").exists():
        model = ["--model", settings.model.format(runs=runs), "--seed", seed, "--steps", settings.steps]
        flags = settings.flags.format(runs=runs, seed=seed).split()
        if (proposed := str(runs / f"proposed-{seed}.jsonl")) in flags and not Path(proposed).exists():
            call(runs / "prepare.log", "-m", "azr.tasks", "make", "run", train("joint", seed, runs), proposed)
        again = ["--resume", "auto"] if any((run / "checkpoints").glob("step_*")) else []
        call(runs / f"{arm}-{seed}.log", settings.script, *model, *COMMON, *flags, "--out", run, *again)
    return run


def one(arm: str, seed: int, runs: Path, trained: bool = True) -> None:
    """Training (unless `trained` is False: it is there) and measurements of one run, and its file of results."""
    path = result(arm, seed)
    if path.exists():
        return
    if arm != "base" and trained:
        train(arm, seed, runs)
    call(runs / f"measure-{arm}-{seed}.log", "results/experiments.py", "measure", f"{arm}/{seed}", "--runs", runs)


def measured(arm: str, seed: int, runs: Path) -> None:
    """Writes the file of results of a run that is trained, in this process."""
    import measure

    if arm == "base":
        found = {"arm": arm, "seed": seed, **measure.of_base("tiny", seed)}
    else:
        settings, run = ALL[arm], runs / f"{arm}-{seed}"
        model, aside = settings.model.format(runs=runs), runs / "measured" / run.name
        flags = settings.flags.replace("{runs}/", "")
        found = {"arm": arm, "seed": seed, "steps": settings.steps, "flags": flags}
        found["model"] = settings.model.replace("{runs}/", "")
        if arm in FULL:
            found |= measure.of_full(run, model, settings.steps, aside)
        else:
            temperatures = () if settings.light else measure.TEMPERATURES[: None if seed < settings.wide else 1]
            foreign = runs / "operations.jsonl" if "operations.jsonl" in settings.flags else None
            found |= measure.of_run(run, model, settings.steps, temperatures, aside, foreign)
    measure.write(result(arm, seed), found)


def hotter(arm: str, seed: int, runs: Path, temperature: float) -> None:
    """Adds answers at one more temperature to the file of results of a run that is measured."""
    import measure
    from gate_lab import Lab

    found = json.loads(result(arm, seed).read_text())
    run = runs / f"{arm}-{seed}" / "checkpoints" / f"step_{found.get('steps')}"
    with Lab("tiny", None if arm == "base" else run, seed=seed if arm == "base" else 0) as lab:
        found["sampled"][f"{temperature:g}"] = measure.sampled(lab, temperature, measure.ANSWERS)
    measure.write(result(arm, seed), found)


# ---------------------------------------------------------------- the script


def work(names: list[tuple[str, int]], runs: Path, jobs: int) -> int:
    """Runs all of them; how many failed."""

    def guarded(name: tuple[str, int]) -> int:
        try:
            one(*name, runs)
        except (RuntimeError, OSError) as error:
            print(f"{name[0]}/{name[1]}: {error}", file=sys.stderr, flush=True)
            return 1
        print(f"{name[0]}/{name[1]} done", flush=True)
        return 0

    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(guarded, names))


def main() -> int:
    """Lists the arms or runs what is missing; returns the exit code: 1 if a run failed, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("list", "run", "measure"))
    parser.add_argument("names", nargs="*", metavar="ARM/SEED", help="default: all that is missing")
    parser.add_argument("--temperature", type=float, help="measure: only this one, beside what is measured")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a core each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "experiments", help="where the runs go")
    arguments = parser.parse_args()
    if arguments.command == "list":
        with contextlib.suppress(BrokenPipeError):  # `| head`
            for arm, settings in ALL.items():
                count = sum(result(arm, seed).exists() for seed in settings.all_seeds())
                print(f"{arm:20s} {count}/{settings.seeds}  {settings.flags}", flush=True)
        return 0
    given = [name.split("/") for name in arguments.names]
    known = {*ALL, "base"}
    if bad := [name for name in given if len(name) != 2 or name[0] not in known or not name[1].isdigit()]:
        print(f"experiments.py: {'/'.join(bad[0])} is no ARM/SEED; python results/experiments.py list", file=sys.stderr)
        return 2
    runs = arguments.runs.resolve()
    names = [(arm, int(seed)) for arm, seed in given] or list(order())
    try:
        if arguments.command == "measure":
            for name in names:
                measured(*name, runs) if arguments.temperature is None else hotter(*name, runs, arguments.temperature)
            return 0
        prepare(runs)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"experiments.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    missing = [name for name in names if not result(*name).exists()]
    if not missing:
        print(f"nothing is missing in {RESULTS / 'arms'}; remove a file to have it made again")
    return min(1, work(missing, runs, max(1, arguments.jobs)))


if __name__ == "__main__":
    sys.exit(main())
