"""Verdicts on a machine that has too much to do, against those of the same machine when it is idle.

    python tests/bench_overload.py FILE [--seconds 60] [--busy 6] [--json FILE] [--quick]

FILE: JSON lines with "code" and "input", such as cruxeval.jsonl. Every program runs on ten copies of its input, over
and over while `--busy` other processes loop; once as training does it, where programs may share a process, and once
with a process for each. Every outcome has to be what it was before: a machine that is slow must not cost a program its
verdict. Exit code 1 if one differs; `--quick`: a second of it.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from azr.jsonl import strict_lines
from sandbox import Job, Sandbox

COPIES = 10  # of each input


def overloaded(jobs: list[Job], share: bool, busy: int, seconds: float) -> dict:
    """Inputs run under load, their statuses, and how many outcomes differ from those of an idle machine."""
    with Sandbox(workers=2, share=share) as sandbox:
        idle = sandbox.run(jobs)
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        statuses, different, start = Counter(), 0, time.monotonic()
        try:
            while time.monotonic() - start < seconds:
                rows = sandbox.run(jobs)
                statuses.update(outcome.status for row in rows for outcome in row)
                different += sum(a != b for before, now in zip(idle, rows) for a, b in zip(before, now))
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
    return {"inputs": statuses.total(), "different": different, "statuses": dict(statuses)}


def main() -> int:
    """Prints the figures; returns the exit code."""
    parser = argparse.ArgumentParser(description="Verdicts under load.")
    parser.add_argument("file", help='JSON lines with "code" and "input"')
    parser.add_argument("--seconds", type=float, default=60, help="under load, for each of the two ways")
    parser.add_argument("--busy", type=int, default=6, help="processes that loop beside the sandbox")
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="one second")
    arguments = parser.parse_args()
    jobs = [Job(row["code"], (row["input"],) * COPIES) for _, row in strict_lines(arguments.file)]
    seconds = 1 if arguments.quick else arguments.seconds
    figures = {
        name: overloaded(jobs, share, arguments.busy, seconds)
        for name, share in (("shared processes", True), ("a process for each program", False))
    }
    for name, row in figures.items():
        print(f"{name}: {row['inputs']} inputs, {row['different']} outcomes differ; {row['statuses']}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")
    return int(any(row["different"] for row in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
