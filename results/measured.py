"""What measure.py has written, read for tables and plots: numbers of a run, arms compared, intervals as text.

No torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent
sys.path[:0] = [str(RESULTS.parent), str(RESULTS)]

from azr.evals.held_out import load_tasks
from azr.fits import over_runs
from azr.passk import Interval, pass_at_k
from gate_numbers import STYLES, TRACED, Counts, stratified

MODES = ("deduction", "abduction", "induction")
KS = (1, 2, 4, 8, 16, 32)
WINDOW = 10  # steps, as measure.py has them
FEW_A_CELL = 10  # of each mode and level, as gate_base.py has it
LONG = "-long"  # ends the name of an arm that has twice the steps of the others
ASIDE = ("off-policy", "rlvr-proposed")  # begin the name of an arm that is only compared with joint
EARLY = "-25"  # and of one that has so many steps
RATES = ("5e-4", "1e-3", "2e-3", "3e-3")  # that end the name of an arm; every other has 1e-3
# Arms that are to keep entropy, between what half the rate keeps and what the last two build on.
HELD = ("joint-5e-4", "bonus", "minibatches", "clip-higher", "kl-cov")
TEMPERATURES = ("1", "0.8", "0.6", "0.4", "0.2", "0")
Arms = dict[str, list[dict]]


def load(folder: Path = RESULTS / "arms") -> Arms:
    """Results of each arm, in the order of their seeds."""
    arms: Arms = {}
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text())
        arms.setdefault(result["arm"], []).append(result)
    return {arm: sorted(results, key=lambda result: result["seed"]) for arm, results in sorted(arms.items())}


# ---------------------------------------------------------------- numbers of a run


def greedy(result: dict) -> np.ndarray:
    """(tasks,) 1 where the greedy answer is right."""
    return np.array([int(digit) for digit in result["greedy"]["right"]])


def accuracy(result: dict) -> float:
    """Share of the held-out tasks that the greedy answer solves."""
    return float(greedy(result).mean())


def traced(result: dict) -> float:
    """Share of the greedy answers whose thought is worked out."""
    worked_out = {str(STYLES.index(style)) for style in TRACED}
    return float(np.mean([digit in worked_out for digit in result["greedy"]["style"]]))


def solved(result: dict, k: int, temperature: str = "1") -> np.ndarray:
    """(few tasks,) pass@k of each; at temperature 0 the greedy answer whatever k."""
    if temperature == "0":
        few = few_tasks()
        return greedy(result)[few].astype(float)
    part = result["sampled"][temperature]
    return pass_at_k(part["n"], part["right"], k)


def solved_or_none(result: dict, k: int) -> float | None:
    """Mean pass@k at temperature 1; None where it was not measured."""
    return solved(result, k).mean() if result["sampled"] else None


@cache
def tasks() -> list:
    """The held-out tasks, in order."""
    return load_tasks(RESULTS.parent / "azr" / "tiny" / "held_out.jsonl")


@cache
def few_tasks() -> list[int]:
    """Places of the tasks that are answered many times."""
    return stratified(tasks(), FEW_A_CELL)


@cache
def gate(name: str, part: str) -> Counts:
    """What the gates measured of the untrained model (results/tiny): base or forced."""
    return Counts.from_json(json.loads((RESULTS / "tiny" / f"{name}.json").read_text())["parts"][part], tasks())


def best_temperature() -> tuple[str, Counts]:
    """The temperature at which the untrained model is best, and its answers there."""
    found = {t: gate("base", f"T{t}") for t in TEMPERATURES}
    index = found["1"].index
    best = max(found, key=lambda t: float(found[t].among(index).accuracy.mean()))
    return best, found[best]


def less(result: dict, counts: Counts) -> float:
    """Greedy accuracy less that of the untrained model in `counts`, over the tasks that it answered."""
    return float(np.mean(greedy(result)[counts.index] - counts.accuracy))


def paired(arms: Arms, name: str, other: str, value: Callable[[dict], float | None]) -> Interval:
    """value of an arm minus that of another, over the seeds that both have."""
    a, b = ({result["seed"]: value(result) for result in arms[arm]} for arm in (name, other))
    both = [a[seed] - b[seed] for seed in a if seed in b and None not in (a[seed], b[seed])]
    return over_runs(both) if both else Interval(np.nan, np.nan, np.nan)


def last(name: str) -> Callable[[dict], float | None]:
    """The mean of a metric over the last window of steps."""
    return lambda result: result["series"][name][-1] if name in result["series"] else None


# ---------------------------------------------------------------- text


def show(interval: Interval, digits: int = 3, sign: bool = True) -> str:
    """`+.045 [+.031, +.058]`, bold where the interval leaves zero out and `sign` says that this matters."""
    form = f"{{:+.{digits}f}}" if sign else f"{{:.{digits}f}}"
    short = lambda x: form.format(x).replace("0.", ".", 1) if abs(x) < 1 else form.format(x)  # noqa: E731
    if not np.isfinite(interval.mean):
        return "-"
    if not np.isfinite(interval.low):
        return short(interval.mean)
    text = f"{short(interval.mean)} [{short(interval.low)}, {short(interval.high)}]"
    return f"**{text}**" if sign and (interval.low > 0 or interval.high < 0) else text


def over_seeds(results: Sequence[dict], value: Callable[[dict], float | None], digits: int = 3, sign=True) -> str:
    """The mean over seeds with its interval; a dash without values."""
    values = [x for x in map(value, results) if x is not None]
    return show(over_runs(values), digits, sign) if values else "-"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def available(arms: Arms, key: str = "greedy", aside: bool = False) -> list[str]:
    """Arms in which this was measured, joint and what it is compared with first. Not those on another base, whose own
    untrained model is not measured, nor those of other steps (`longer`, `early`), of another rate (`rates`) or with a
    control of entropy (`held`); those of ASIDE only if `aside`."""
    first = ("joint", "no-update", "frozen-base", "separate", "rlvr", "sft")
    mine = {name: results[0] for name, results in arms.items() if name != "base" and not is_full(name)}
    names = [name for name, result in mine.items() if result.get(key) and result["model"] == "tiny"]
    names.sort(key=lambda name: (first.index(name) if name in first else len(first), name))
    return [
        name
        for name in names
        if not name.endswith((LONG, EARLY, *RATES, *HELD)) and (aside or not name.startswith(ASIDE))
    ]


def is_full(name: str) -> bool:
    """Whether every weight was trained."""
    return name.startswith("full-")


def titled(arms: Arms, name: str) -> str:
    """The arm with its seeds."""
    return f"{name} ({len(arms[name])})"
