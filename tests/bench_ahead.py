"""A step whose phases overlap (azr/train/ahead.py) against the same step phase by phase.

    python tests/bench_ahead.py [--steps 8] [--slow 50] [--json FILE]    the embedded model on this CPU, by turns
    python tests/bench_ahead.py --card 4090 --preset 24gb                sampling of a step on a card, computed

On the CPU: runs of `train_azr.py`, seed 0, by turns as they are and with phases that wait for each other; samples must
be equal, reasons and rewards included (exit code 1). --slow 50: every program takes the sandbox 50 ms more. Seconds are
medians over the steps by the clock, so a busy machine shows in them; CPU seconds are those of the whole process.

On a card: the engine's slots and looks are followed, response by response, with lengths and decode times as in
simulated_ranks.py: log-normal lengths around the planner's means, and the planner's time of a decode step.

Left out: prefill that is split into smaller pieces, the processor's part of validation.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from azr.machine import cost
from azr.machine.plan import capacity, choose_preset, plan_memory, shape_of
from azr.policy.decoding import LOOK
from azr.train import ahead
from simulated_ranks import Step

PHASES = ("propose", "validate", "solve", "judge", "update", "step")


def run(way: str, out: Path, steps: int, slow: float) -> int:
    """One run in this process, phase by phase or as it is; the exit code of train_azr.py."""
    import train_azr

    ahead.pays = lambda s: way == "overlapped"
    honest = ahead.RememberingSandbox._remembered

    def slowed(self, kind, work, jobs):
        def slow_work(jobs):
            time.sleep(slow / 1000 * len(jobs))
            return work(jobs)

        return honest(self, kind, slow_work, jobs)

    ahead.RememberingSandbox._remembered = slowed
    return train_azr.main(f"--steps {steps} --eval-every 0 --eval-samples 0 --out {out}".split())


def measured(way: str, out: Path, steps: int, slow: float) -> tuple[dict, list]:
    """(median seconds of each phase, CPU seconds of the run; what its samples say)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, "--run", way, str(out), "--steps", str(steps), "--slow", str(slow)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figures = {name: statistics.median(row[f"time/{name}"] for row in rows) for name in PHASES}
    figures["CPU"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return figures, [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def on_this_cpu(steps: int, slow: float, rounds: int) -> tuple[dict, bool]:
    """({way: figures}, whether all runs have the same samples); each figure the median over the rounds."""
    found: dict[str, list[dict]] = {"overlapped": [], "phases": []}
    samples = []
    for _ in range(rounds):
        for way, rows in found.items():
            with tempfile.TemporaryDirectory() as folder:
                figures, said = measured(way, Path(folder, "run"), steps, slow)
            rows.append(figures)
            samples.append(said)
    medians = {way: {k: statistics.median(row[k] for row in rows) for k in rows[0]} for way, rows in found.items()}
    return medians, all(said == samples[0] for said in samples)


def walked(plan, card: cost.Card, step: Step, overlapped: bool) -> dict[str, float]:
    """Sampling of a step, one decode step after the other: its seconds, decode steps and mean rows."""
    slots, rng = plan.preset.max_batch, random.Random(0)
    valid = set(rng.sample(range(len(step.proposals)), len(step.answers)))
    answers = iter(step.answers)
    queue = deque((row[0], step.prompt, i in valid) for i, row in enumerate(step.proposals))
    running: list[list] = []  # [tokens to come, tokens in the cache, whether it is a valid proposal]
    proposing, fresh, on_the_way = len(queue), 0, deque()
    seconds, steps, rows = 0.0, 0, 0
    while queue or running or fresh or on_the_way:
        while queue and len(running) < slots:
            running.append(list(queue.popleft()))
            seconds += running[-1][1] * 2 * plan.shape.parameters / (card.tflops * 1e12)  # of one prompt
        if running:
            context = sum(row[1] for row in running) / len(running)
            seconds += cost.decode_time(plan, card, len(running), context)
            steps, rows = steps + 1, rows + len(running)
        for row in running:
            row[0], row[1] = row[0] - 1, row[1] + 1
        proposing -= sum(row[0] == 0 and row[2] is not None for row in running)
        fresh += sum(row[0] == 0 and bool(row[2]) for row in running)
        running = [row for row in running if row[0]]
        # Phase by phase all answers come when the last proposal has ended, and nothing of it is seen before.
        look = steps % LOOK == 0 if overlapped else not proposing
        if look or not running:
            ready = fresh >= ahead.VALIDATED or not proposing
            on_the_way.append(fresh if ready else 0)
            fresh -= on_the_way[-1]
            while len(on_the_way) > (ahead.LAG if running or queue else 0):
                for _ in range(on_the_way.popleft()):
                    queue += [(n, cost.SOLVE_PROMPT if j == 0 else 0, None) for j, n in enumerate(next(answers))]
    return {"seconds": seconds, "decode steps": steps, "mean rows": rows / steps}


def on_a_card(name: str, preset: str, count: int) -> dict[str, dict[str, float]]:
    """{way: figures of `walked`, the mean over so many steps} at the planner's middle pace."""
    settings, _ = choose_preset(preset, "qwen-3b", None)
    plan, pace, card = plan_memory(shape_of("qwen-3b"), settings, capacity(settings)), cost.PACES[0], cost.CARDS[name]
    card = replace(card, bandwidth=card.bandwidth * pace.bandwidth, tflops=card.tflops * pace.products)
    steps = [Step(plan, f"0/{i}") for i in range(count)]
    found = {}
    for way in ("overlapped", "phases"):
        rows = [walked(plan, card, step, way == "overlapped") for step in steps]
        found[way] = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
    return found


def main() -> int:
    """Prints a line for each way; 1 if the samples differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each way")
    parser.add_argument("--slow", type=float, default=0.0, metavar="MS", help="more time in the sandbox per program")
    parser.add_argument("--card", choices=sorted(cost.CARDS), help="compute the sampling of a step on this card")
    parser.add_argument("--preset", default="24gb", help="of the card's run (default 24gb)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--run", nargs=2, metavar=("WAY", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return run(options.run[0], Path(options.run[1]), options.steps, options.slow)
    if options.card:
        found, equal = on_a_card(options.card, options.preset, options.steps), True
    else:
        found, equal = on_this_cpu(options.steps, options.slow, options.rounds)
    for way, figures in found.items():
        print(f"{way:12}" + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    if options.json:
        options.json.write_text(json.dumps({"settings": vars(options) | {"json": None}, "figures": found}, indent=1))
    if not equal:
        print("the samples differ")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
