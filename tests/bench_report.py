"""Time and memory of the report page: a synthetic run of 500 steps and 300,000 samples, `analyze.py report` on it.

    python tests/bench_report.py [--json FILE] [--quick]

The run directory has what a real one has (metrics, samples with prompts and responses of a kilobyte a line, pass@k
results), written from a seed. Compared with the limits of 30 s and 2 GB; reading the same samples with json.loads and
doing nothing is timed beside it, as the least that any reader takes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODES = ("deduction", "abduction", "induction")
ANSWERS = 8
LIMIT_SECONDS, LIMIT_GB = 30, 2.0


def synthetic_program(rng: random.Random, difficulty: float) -> str:
    """A small function; more statements with difficulty."""
    lines = ["def f(x):", f"    a = x + {rng.randrange(99)}"]
    for _ in range(1 + int(6 * difficulty * rng.random())):
        operator = rng.choice(["+", "*", "-", "//", "%"])
        lines.append(f"    a = (a {operator} {rng.randrange(1, 99)})" + (" ** 2" if rng.random() < 0.1 else ""))
    return "\n".join([*lines, "    return a"])


def synthetic_task(rng: random.Random, mode: str, difficulty: float) -> dict:
    program = synthetic_program(rng, difficulty)
    if mode != "induction":
        return {"mode": mode, "program": program, "input": str(rng.randrange(999)), "output": str(rng.randrange(999))}
    pairs = [[str(i), str(rng.randrange(999))] for i in range(10)]
    return {"mode": mode, "program": program, "message": "find it", "visible": pairs[:5], "hidden": pairs[5:]}


def step_samples(rng: random.Random, step: int, tasks_per_mode: int, rate: float, padding: str) -> list[dict]:
    """Proposals, one in five refused, and ANSWERS answers to each valid one, right with probability `rate`."""
    rows, answers = [], []
    for mode in MODES:
        for _ in range(tasks_per_mode):
            valid = rng.random() > 0.2
            task = synthetic_task(rng, mode, rate) if valid else None
            right = [rng.random() < rate for _ in range(ANSWERS)]
            common = {"step": step, "mode": mode, "task": task, "prompt": padding, "finish_reason": "stop"}
            reason = "ok" if valid else rng.choice(["syntax", "error", "duplicate", "timeout"])
            reward = {"reward": 0.5 if valid else -1.0, "well_formed": True, "valid": valid}
            solved = sum(right) / ANSWERS if valid else None
            text = task["program"] if task else "nothing"
            rows.append(
                common
                | {
                    "role": "proposer",
                    "response": text,
                    "tokens": 30 + len(text) // 4,
                    "reward": reward,
                    "reason": reason,
                    "solve_rate": solved,
                }
            )
            for ok in right if valid else ():
                response = f"</think><answer>```python\n{text}\n```</answer>"
                reward = {"reward": 1.0 if ok else -0.5, "well_formed": True, "correct": ok}
                answers.append(
                    common
                    | {
                        "role": "solver",
                        "response": response,
                        "tokens": rng.randrange(20, 90),
                        "reward": reward,
                        "reason": "ok" if ok else "wrong",
                        "solve_rate": solved,
                    }
                )
    return rows + answers


def step_metrics(step: int, steps: int, rows: list[dict]) -> dict:
    metrics = {
        "step": step,
        "train/log_prob_gap": 1e-3,
        "train/skipped": 0.0,
        "time/propose": 1.0,
        "time/solve": 3.0,
        "time/update": 5.0,
        "time/step": 9.0,
        "time/elapsed": 9.0 * step,
    }
    for mode in MODES:
        mine = [row for row in rows if row["mode"] == mode]
        proposals, answers = ([r for r in mine if r["role"] == role] for role in ("proposer", "solver"))
        rates = [row["solve_rate"] for row in proposals if row["solve_rate"] is not None]
        metrics |= {
            f"proposer/{mode}/valid_rate": len(rates) / len(proposals),
            f"proposer/{mode}/solve_rate": sum(rates) / max(1, len(rates)),
            f"proposer/{mode}/learnable_rate": sum(0 < r < 1 for r in rates) / max(1, len(rates)),
            f"proposer/{mode}/reward": sum(r["reward"]["reward"] for r in proposals) / len(proposals),
            f"proposer/{mode}/entropy": 0.8 - 0.3 * step / steps,
            f"solver/{mode}/entropy": 0.6 - 0.4 * step / steps,
            f"solver/{mode}/reward": sum(r["reward"]["reward"] for r in answers) / max(1, len(answers)),
            f"solver/{mode}/accuracy": sum(r["reward"]["correct"] for r in answers) / max(1, len(answers)),
            f"solver/{mode}/response_tokens": sum(r["tokens"] for r in answers) / max(1, len(answers)),
        }
        if step % 25 == 0:
            metrics[f"held_out/{mode}/accuracy"] = metrics["held_out/all/accuracy"] = 0.2 + 0.1 * step / steps
            for role in ("proposer", "solver"):
                metrics |= {f"{role}/{name}/probe_kl": 0.1 * step / steps for name in (mode, "all")}
    return metrics


def write_run(
    path: Path, steps: int, tasks_per_mode: int, rate=lambda share: 0.3 + 0.3 * share, padding: int = 400, seed: int = 0
) -> int:
    """Writes a run directory; `rate` gives the solve rate from the share of the run that is done. Returns the lines."""
    rng, count = random.Random(seed), 0
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "model": "tiny",
        "seed": seed,
        "steps": steps,
        "answers": ANSWERS,
        "recipe": "lean",
        "temperature": 1.0,
        "max_new_tokens": 64,
        "learning_rate": 1e-3,
    }
    (path / "config.json").write_text(json.dumps(config))
    with open(path / "metrics.jsonl", "w") as metrics, open(path / "samples.jsonl", "w") as samples:
        for step in range(1, steps + 1):
            rows = step_samples(rng, step, tasks_per_mode, rate(step / steps), "p" * padding)
            samples.writelines(json.dumps(row) + "\n" for row in rows)
            metrics.write(json.dumps(step_metrics(step, steps, rows)) + "\n")
            count += len(rows)
    return count


def measure(run: Path) -> dict:
    """Wall and CPU seconds and peak memory of the command, in a process of its own."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "analyze.py"), "report", str(run)], capture_output=True, text=True
    )
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"the report failed: {done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "peak_gb": after.ru_maxrss * 1024 / 1e9,
        "html_mb": (run / "report.html").stat().st_size / 1e6,
    }


def read_only(run: Path) -> float:
    """CPU seconds of json.loads on every line."""
    begin = time.process_time()
    with open(run / "samples.jsonl", "rb") as file:
        for line in file:
            json.loads(line)
    return time.process_time() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="50 steps, 30,000 samples")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    steps = 50 if args.quick else 500
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "synthetic"
        samples = write_run(run, steps, 28)
        size = (run / "samples.jsonl").stat().st_size / 1e6
        result = {"steps": steps, "samples": samples, "samples_mb": size, **measure(run), "json_only": read_only(run)}
    print(f"{steps} steps, {samples:,} samples, {size:.0f} MB")
    print(
        f"report: {result['wall_seconds']:.1f} s wall, {result['cpu_seconds']:.1f} s CPU (limit {LIMIT_SECONDS} s), "
        f"{result['peak_gb']:.2f} GB (limit {LIMIT_GB} GB), page {result['html_mb']:.1f} MB"
    )
    print(f"json.loads alone: {result['json_only']:.1f} s CPU, {result['cpu_seconds'] / result['json_only']:.1f}x less")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    good = result["cpu_seconds"] < LIMIT_SECONDS and result["peak_gb"] < LIMIT_GB and math.isfinite(result["peak_gb"])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
