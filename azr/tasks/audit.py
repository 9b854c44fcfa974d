"""Does the verifier agree with what is meant? Accepted induction answers on inputs that nobody has seen.

An induction answer is accepted when it is right on five hidden inputs that the proposer chose. Here the task's
program is run on fresh inputs, mutations of the known ones, and the accepted answers are run on those: the share that
fails on at least one is the share of verdicts that were bought with too few cases. Left out: inputs of other types
than the known ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from azr.tasks.task import Task
from sandbox import Job, Sandbox, literal

ATTEMPTS = 20  # mutations tried per fresh input that is asked for


def audit_induction(accepted: list[tuple[Task, str]], sandbox: Sandbox, rng: random.Random, fresh: int = 20) -> dict:
    """The share of accepted answers (task, program) that differ from the task's program on one of up to `fresh` fresh
    inputs.

    Returns {"answers", "failing", "share", "low", "high", "fresh_inputs", "skipped"}: `share` with its 95 % Wilson
    interval (NaN without answers), `fresh_inputs` the mean number used, `skipped` the answers of tasks for which no
    fresh input ran.
    """
    tasks = list({task.hash: task for task, _ in accepted}.values())
    tried = [fresh_inputs([given for given, _ in task.visible + task.hidden], 2 * fresh, rng) for task in tasks]
    jobs = [Job(task.program, tuple(inputs)) for task, inputs in zip(tasks, tried)]
    cases = {}  # task hash -> [(input, value)]
    for task, inputs, outcomes in zip(tasks, tried, sandbox.validate(jobs) if jobs else []):
        ran = [(text, literal.parse(o.output)) for text, o in zip(inputs, outcomes) if o.status == "ok"]
        cases[task.hash] = ran[:fresh]
    checked = [(task, program) for task, program in accepted if cases[task.hash]]
    jobs = [Job(program, tuple(text for text, _ in cases[task.hash])) for task, program in checked]
    failing = used = counted = 0
    for (task, _), outcomes in zip(checked, sandbox.run(jobs) if jobs else []):
        judged = [(o, value) for o, (_, value) in zip(outcomes, cases[task.hash]) if o.status != "infra"]
        right = [o.status == "ok" and literal.equal(literal.parse(o.output), value) for o, value in judged]
        failing, used, counted = failing + (not all(right)), used + len(right), counted + bool(right)
    low, high = wilson(failing, counted)
    return {"answers": counted, "failing": failing, "share": failing / counted if counted else math.nan,
            "low": low, "high": high, "fresh_inputs": used / counted if counted else 0.0,
            "skipped": len(accepted) - counted}


def wilson(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927); NaN without trials."""
    if total == 0:
        return math.nan, math.nan
    share, spread = hits / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def fresh_inputs(known: list[str], count: int, rng: random.Random) -> list[str]:
    """Up to `count` argument texts like the known ones but none of them: values mutated, arguments mixed between
    inputs."""
    calls = []
    for text in known:
        try:
            calls.append(literal.parse_args(text))
        except literal.LiteralError:
            continue
    seen, found = {literal.canon_args(*call) for call in calls}, []
    for _ in range(count * ATTEMPTS if calls else 0):
        args, kwargs = _mixed(calls, rng)
        try:
            text = literal.canon_args(args, kwargs)
        except literal.TooLarge:
            continue
        if text not in seen:
            seen.add(text)
            found.append(text)
            if len(found) == count:
                break
    return found


def _mixed(calls: list[tuple[tuple, dict]], rng: random.Random) -> tuple[tuple, dict]:
    """One call's arguments, some taken from another call of the same shape, at least one mutated."""
    args, kwargs = rng.choice(calls)
    others = [call for call in calls if len(call[0]) == len(args) and call[1].keys() == kwargs.keys()]
    other = rng.choice(others)
    mixed = [rng.choice(pair) for pair in zip(args, other[0])]
    named = {name: rng.choice([value, other[1][name]]) for name, value in kwargs.items()}
    places = list(range(len(mixed))) + list(named)
    for place in rng.sample(places, rng.randint(min(1, len(places)), len(places))):
        target = named if isinstance(place, str) else mixed
        target[place] = mutated(target[place], rng)
    return tuple(mixed), named


def mutated(value, rng: random.Random):
    """A value of the same type, changed in one place."""
    if value is None:
        return None
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, -value, value * 2, value + rng.randint(-10, 10), rng.randint(0, 20)])
    if isinstance(value, float):
        return rng.choice([value + 1.0, -value, value / 2, round(value + rng.uniform(-5, 5), 2)])
    if isinstance(value, str):
        return "".join(_mutated_items(list(value), rng, lambda ch: _letter(ch, rng)))
    if isinstance(value, bytes):
        return bytes(_mutated_items(list(value), rng, lambda byte: rng.randrange(256)))
    if isinstance(value, dict):
        items = _mutated_items(list(value.items()), rng, lambda pair: (pair[0], mutated(pair[1], rng)))
        return dict(items)
    items = sorted(value, key=literal.canon) if isinstance(value, (set, frozenset)) else list(value)
    return type(value)(_mutated_items(items, rng, lambda item: mutated(item, rng)))


def _mutated_items(items: list, rng: random.Random, change: Callable) -> list:
    """Items with one dropped, doubled, changed or two exchanged; an empty list stays empty."""
    if not items:
        return items
    i, j = rng.randrange(len(items)), rng.randrange(len(items))
    kind = rng.choice(["drop", "double", "change", "change", "exchange"])
    if kind == "drop":
        del items[i]
    elif kind == "double":
        items.insert(j, items[i])
    elif kind == "change":
        items[i] = change(items[i])
    else:
        items[i], items[j] = items[j], items[i]
    return items


def _letter(ch: str, rng: random.Random) -> str:
    """Another character of the same class."""
    if ch.isdigit():
        return rng.choice("0123456789")
    if ch.isalpha():
        return rng.choice([ch.swapcase(), rng.choice("abcdefghijklmnopqrstuvwxyz")])
    return rng.choice([ch, " ", ",", rng.choice("abcdefghijklmnopqrstuvwxyz")])
