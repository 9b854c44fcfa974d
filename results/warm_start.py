"""A warm start of a real pretrained model, SmolLM2-135M, and a few steps of self-play after it: docs/real_model.md.

    python tests/bench_smollm2.py DIR --make               its directory (docs/real_model.md)
    python results/warm_start.py train DIR                 sft on tasks and proposals of the generator, then self-play
    python results/warm_start.py measure DIR base small low selfplay    results/smollm2.json; what exists is skipped
    python results/warm_start.py longer DIR                25 steps of RLVR, of self-play: results/smollm2_longer.json

`train` goes on where it was stopped; everything is fp32 on a CPU, 38 CPU s of products a step of the warm start. A
state is measured by its proposals (valid share at temperature 1, references from the generator) and by its greedy
answers to held-out tasks of one and two statements, whose programs neither occur nor have their like in what the warm
start is trained on.

Left out: a seed stage in which the untrained model proposes (not one of its proposals was valid), more than one seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path[:0] = [str(ROOT), str(RESULTS)]

from azr.passk import share_interval
from azr.tasks import MODES, parse_proposal, propose_prompt, validate
from gate_numbers import level

FILE = RESULTS / "smollm2.json"
LONGER = RESULTS / "smollm2_longer.json"
COUNT = 600  # solutions and proposals of each mode: more than are drawn
DATA = f"--count {COUNT} --seed 1 --solutions --proposals --style full"
COMMON = (
    "--allow-cpu --quantization none --dtype fp32 --lora-rank 16 --max-new-tokens 256 --eval-every 0 --eval-samples 0"
)
SFT = "--algorithm sft --step-tokens 900 --save-every 5 --learning-rate"
# Steps: with proposals of up to six statements, then with none of more than two, then at a lower rate, for the
# cross-entropy had stood still.
FIRST, SECOND, THIRD = 56, 121, 40
SELFPLAY = "--prompts-per-mode 4 --answers 4 --references 2 --learning-rate 1e-4 --steps 6 --save-every 1"
# one row a role and mode in the probe instead of 64: on a CPU those would take longer than the training
SCRIPT = "import sys, train_azr as t; t.loop.PROBE = 1; sys.exit(t.main(sys.argv[1:]))"
# Deductions alone: their answers are short, so that a step has many.
RLVR = "--algorithm rlvr --answers 8 --step-tokens 5000 --max-new-tokens 128 --learning-rate 2e-4 --save-every 4"
# As many response tokens in as many steps: 125,000 and 134,000.
JOINT = "--prompts-per-mode 4 --answers 8 --references 2 --learning-rate 2e-4 --save-every 2"
LONGER_STEPS, TEMPERATURES = 25, (0.0, 0.4, 1.0)
DEDUCTIONS = 3000  # tasks to train on, of one and two statements
PROPOSALS = 32  # of each mode
A_CELL, LEVELS = 20, (1, 2)  # held-out tasks of a mode and number of statements


def call(*words: object) -> None:
    """One command; raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def make_data(runs: Path) -> None:
    """small.jsonl: solutions and proposals of at most two statements. mixed.jsonl: the same solutions, proposals of all
    sizes."""
    for name, flags in (("small", "--statements 1,2"), ("all", "")):
        if not (runs / f"{name}.jsonl").exists():
            call("-m", "azr.tasks", "make", "tiny", runs / f"{name}.jsonl", *DATA.split(), *flags.split())
    small, every = ((runs / f"{name}.jsonl").read_text().splitlines(True) for name in ("small", "all"))
    mixed = [row for row in small if not json.loads(row).get("references")]
    mixed += [row for row in every if json.loads(row).get("references")]
    (runs / "mixed.jsonl").write_text("".join(mixed))


def train(model: Path, runs: Path) -> None:
    """The data, the warm start in three parts and self-play from it, each unless it is complete."""
    make_data(runs)
    for name, flags in {
        "mixed": f"{SFT} 1e-3 --steps {FIRST} --data {runs / 'mixed.jsonl'}",
        "small": f"{SFT} 1e-3 --steps {SECOND} --data {runs / 'small.jsonl'} --adapter {runs / 'mixed'}",
        "low": f"{SFT} 3e-4 --steps {THIRD} --data {runs / 'small.jsonl'} --adapter {runs / 'small'}",
        "selfplay": f"{SELFPLAY} --adapter {runs / 'low'}",
    }.items():
        train_one(model, runs, name, flags)


def train_one(model: Path, runs: Path, name: str, flags: str) -> None:
    """A run to its end, from its last checkpoint."""
    out = runs / name
    again = ["--resume", "auto"] if any((out / "checkpoints").glob("step_*")) else []
    call("-c", SCRIPT, "--model", model, *COMMON.split(), *flags.split(), "--out", out, *again)


def adapter_of(state: str, runs: Path) -> Path | None:
    """The checkpoint that a state names: base, RUN (its newest) or RUN/STEP, each perhaps with @TEMPERATURE."""
    from azr.policy.opening import newest_checkpoint

    run, _, step = state.partition("@")[0].partition("/")
    if run == "base":
        return None
    return runs / run / "checkpoints" / f"step_{step}" if step else newest_checkpoint(runs / run)


def proposed(policy, sandbox, temperature: float) -> dict[str, dict[str, int]]:
    """The reasons of PROPOSALS proposals of each mode; "ok" are the valid ones."""
    from azr.evals.held_out import sample_seed
    from azr.policy.sampling import Sampling
    from azr.tasks.prompts import STOP
    from azr.tiny.documents import draw_proposal

    reasons, sampling = {}, Sampling(temperature=temperature, max_new_tokens=256, stop=(STOP,))
    for mode in MODES:
        rng = random.Random(f"warm start/{mode}")
        references = [draw_proposal(mode, rng, most=max(LEVELS)).references[:2] for _ in range(PROPOSALS)]
        prompts = [policy.encode(propose_prompt(mode, shown, "azr")) for shown in references]
        seeds = [[sample_seed(0, f"{mode}/{i}", 0)] for i in range(PROPOSALS)]
        texts = [policy.decode(row[0].ids) for row in policy.generate(prompts, 1, sampling, seeds)]
        program = [shown[0].program if mode == "induction" else None for shown in references]
        parsed = [parse_proposal(mode, text, known) for text, known in zip(texts, program)]
        usable = [p.value for p in parsed if p.value is not None]
        verdicts = iter(validate(usable, sandbox))
        reasons[mode] = dict(Counter(p.reason if p.value is None else next(verdicts).reason for p in parsed))
    return reasons


def measured(model: Path, adapter: Path | None, temperature: str) -> dict:
    """Proposals at a temperature and greedy answers to held-out tasks; at a temperature given, proposals alone."""
    from azr.evals.held_out import evaluate, load_tasks
    from azr.policy import Policy, Sampling
    from azr.tasks.prompts import STOP
    from sandbox import Sandbox

    policy = Policy.load(model, "none", adapter=adapter, device="cpu")
    if temperature:
        with Sandbox() as sandbox:
            return {"proposals": proposed(policy, sandbox, float(temperature)), "right": {}}
    held_out = load_tasks(ROOT / "azr" / "tiny" / "held_out.jsonl")
    tasks = []
    for mode in MODES:
        for size in LEVELS:
            tasks += [task for task in held_out if task.mode == mode and level(task) == size][:A_CELL]
    greedy = Sampling(temperature=0.0, max_new_tokens=256, stop=(STOP,))
    with Sandbox() as sandbox:
        reasons = proposed(policy, sandbox, 1.0)
        answers = evaluate(policy, tasks, 1, greedy, "azr", sandbox, seed=0).tasks
    return {
        "proposals": reasons,
        "right": {mode: "".join(str(r.correct) for r in answers if r.mode == mode) for mode in MODES},
        "well_formed": sum(r.well_formed for r in answers),
    }


def longer(model: Path, runs: Path) -> None:
    """RLVR on deductions and self-play from the end of the warm start, unless they are complete; then what is right
    before and after, of all held-out deductions of one and two statements, at each temperature, as "0110..." (LONGER).
    """
    from azr.evals.held_out import evaluate, load_tasks
    from azr.policy import Policy, Sampling
    from azr.policy.opening import newest_checkpoint
    from azr.tasks.prompts import STOP
    from sandbox import Sandbox

    tasks = runs / "deductions.jsonl"
    if not tasks.exists():
        made, small = runs / "all_modes.jsonl", ["--statements", "1,2"]
        call("-m", "azr.tasks", "make", "tiny", made, "--count", DEDUCTIONS, "--seed", 7, *small)
        tasks.write_text("".join(x for x in made.read_text().splitlines(True) if '"mode": "deduction"' in x))
    from_low = f"--steps {LONGER_STEPS} --adapter {runs / 'low'}"
    train_one(model, runs, "rlvr", f"{RLVR} --data {tasks} {from_low}")
    train_one(model, runs, "joint", f"{JOINT} {from_low}")
    asked = [t for t in load_tasks(ROOT / "azr" / "tiny" / "held_out.jsonl") if t.mode == "deduction"]
    asked = [task for task in asked if level(task) in LEVELS]
    for state in ("low", "rlvr", "joint"):
        policy = Policy.load(model, "none", adapter=newest_checkpoint(runs / state), device="cpu")
        found = json.loads(LONGER.read_text()) if LONGER.exists() else {}
        for temperature in TEMPERATURES:
            settings = Sampling(temperature=temperature, max_new_tokens=128, stop=(STOP,))
            with Sandbox() as sandbox:
                answers = evaluate(policy, asked, 1, settings, "azr", sandbox, seed=0).tasks
            right = "".join(str(answer.correct) for answer in answers)
            found.setdefault(state, {})[f"{temperature:g}"] = right
        LONGER.write_text(json.dumps(found, indent=1) + "\n")


def table(found: dict[str, dict]) -> str:
    """Markdown: valid proposals and right answers of each state, with 95 % intervals."""

    def share(right: int, n: int) -> str:
        interval = share_interval(np.arange(n) < right)
        return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"

    lines = ["| | valid proposals | deduction | abduction | induction |", "|---|---|---|---|---|"]
    for state, row in found.items():
        valid = sum(reasons.get("ok", 0) for reasons in row["proposals"].values())
        cells = [share(valid, len(MODES) * PROPOSALS)]
        right = [row["right"].get(mode) for mode in MODES]
        cells += [share(bits.count("1"), len(bits)) if bits else "-" for bits in right]
        lines.append(f"| {state} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Trains or measures; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "measure", "longer"))
    parser.add_argument("model", type=Path, help="the directory of SmolLM2")
    parser.add_argument("states", nargs="*", help="base, RUN or RUN/STEP; RUN@0.4: its proposals there")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "warm", help="where the runs go")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    model, runs = options.model.resolve(), options.runs.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    if options.command != "measure":
        {"train": train, "longer": longer}[options.command](model, runs)
        return 0
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    for state in options.states:
        if state not in found:
            row = measured(model, adapter_of(state, runs), state.partition("@")[2])
            found = (json.loads(FILE.read_text()) if FILE.exists() else {}) | {state: row}
            FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
