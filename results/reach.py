"""Leaving the leash: does training solve tasks that the untrained model does not solve in 1,024 tries?

    python results/reach.py                                   the tasks; the untrained model again, at other
                                                              temperatures too, and made to think
    python results/reach.py joint-long/0=CHECKPOINT ...       a trained model, 256 answers to each of those tasks

Held-out tasks: all deductions and abductions, ten inductions of each number of statements (nothing learns those).
Answers are sampled at temperature 1 where no other is named. results/reach.json holds a part for each: [place in
held_out.jsonl, answers, right ones] of every task, and the mean tokens of an answer; what is there is not made again.
`python results/findings.py` makes the table of it. One core: an hour for the base, four minutes a trained model.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
RESULTS = Path(__file__).resolve().parent
sys.path[:0] = [str(RESULTS.parent), str(RESULTS)]

from gate_base import prefix, right_of
from gate_lab import Lab, Store

LOOKS = [16, 64, 256, 1024]  # a task that is solved in the first answers needs no more of them
TRIES = 256  # of a trained model, whose answers are some four times as long
OTHERS = (0.6, 1.3)  # temperatures at which the untrained model gets as many answers once more
INDUCTIONS = 10  # of each number of statements


def asked(lab: Lab) -> list[int]:
    """Places of the tasks that are tried."""
    return lab.part(None, "deduction") + lab.part(None, "abduction") + lab.part(INDUCTIONS, "induction")


def search(lab: Lab) -> dict:
    """Tries until a task is solved, or LOOKS[-1] times."""
    found, left, done = {}, asked(lab), 0
    for look in LOOKS:
        rows = lab.answer(left, look - done, 1.0, first=done)
        found |= {row[0]: [row[0], look, right_of(row)] for row in rows}
        left, done = [i for i in left if not found[i][2]], look
    return {"rows": list(found.values())}


def tries(lab: Lab, index: list[int], n: int, prefixes: Sequence[str] = (), temperature: float = 1.0) -> dict:
    """n answers to each of these tasks."""
    rows = lab.answer(index, n, temperature, prefixes)
    tokens = sum(cell[2] for row in rows for cell in row[1].values())
    return {"rows": [[row[0], n, right_of(row)] for row in rows], "tokens": round(tokens / (n * len(rows)), 1)}


def measure(adapters: dict[str, Path], path: Path) -> None:
    """Fills the file. ValueError if it is about another model or an adapter lacks its weights."""
    with Lab("tiny") as lab, Lab("tiny", seed=1) as again:
        store = Store(path, {"model": lab.digest, "looks": LOOKS, "tries": TRIES, "longest": lab.longest})
        chosen = store.get("base", search, lab)["rows"]
        never = [place for place, _, right in chosen if not right]
        store.get("base again", tries, again, never, LOOKS[-1])
        for temperature in OTHERS:
            name = f"base at temperature {temperature}"
            store.get(name, tries, again, never, LOOKS[-1], (), temperature)
        begun = {i: prefix(lab.tasks[i], "full") for i in never if lab.tasks[i].mode == "deduction"}
        store.get("base made to think", tries, again, list(begun), LOOKS[-1], list(begun.values()))
    for name, adapter in adapters.items():
        with Lab("tiny", adapter, seed=1) as lab:
            store.get(name, tries, lab, never, TRIES)


def main() -> int:
    """Measures what is missing; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="*", metavar="ARM/SEED=CHECKPOINT")
    parser.add_argument("--out", type=Path, default=RESULTS / "reach.json")
    arguments = parser.parse_args()
    try:
        pairs = [given.partition("=")[::2] for given in arguments.adapters]
        if bad := [name for name, path in pairs if not path or "/" not in name]:
            raise ValueError(f"{bad[0]}: give ARM/SEED=CHECKPOINT")
        measure({name: Path(path) for name, path in pairs}, arguments.out)
    except (ValueError, OSError) as error:
        print(f"reach.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
