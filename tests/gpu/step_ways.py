"""One training step in several ways, from the same weights: with phases that overlap and without, and with every sample
scored instead of those that have a gradient.

    before = lambda *given: found.update(ways(bench, *given))      # in a run of train_azr.py, before a step of its own

Nothing is recorded, and weights and moments are put back. Random weights write no program and end no response, so
proposals are made up from what was sampled (two modes of three are valid), a response ends with probability 1 / MEAN
at each token, and a third of the tasks are solved always.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools

from azr.tasks import Parsed
from azr.tasks.task import Proposal
from gpu.bench import Bench, described, patched

MEAN = 250  # tokens of a response that no limit ends
AS_IT_IS, PHASES, ALL_SCORED = "as it is", "phase by phase", "every sample scored"
ORDER = (AS_IT_IS, PHASES, ALL_SCORED, AS_IT_IS)  # twice: the first one also warms up


def in_ways(found: dict) -> dict:
    """What `ways` gave; RuntimeError if it did not come so far, or what went wrong in it."""
    if "each" not in found:
        raise RuntimeError(found.get("error", "the measurement before did not come so far"))
    return found


def ways(bench: Bench, train_step, s, step: int, laps: list[dict]) -> dict:
    """A row for each of ORDER, or the error. laps: see `parts_train.run`."""
    try:
        rows, first = [], None
        for way in ORDER:
            row, ids = one_way(bench, train_step, s, step, laps, way)
            first = first or ids
            same = sum(ids.get(key) == value for key, value in first.items())
            rows.append({**row, "same responses": same / len(first)})
        return {"rewards": "made up", "each": rows}
    except Exception as error:  # the run's own step is still measured
        return described(error)


def one_way(bench: Bench, train_step, s, step: int, laps: list[dict], way: str) -> tuple[dict, dict]:
    """(figures of the step, the token ids of its samples)."""
    import train_azr
    from azr.train import ahead, checkpoint, update

    turn, kept, begun = itertools.count(), [], len(laps)
    sign = lambda *_: float((-1) ** next(turn))  # noqa: E731
    alike = lambda sample, kind: 1.0 if digest(sample.task.hash) % 3 == 0 else sign()  # noqa: E731
    changes = [
        (train_azr, "record", lambda s, step, *rest: kept.extend(rest[3]) or s.clock.metrics()),
        (train_azr, "parse_proposal", made_up_proposal),
        (train_azr, "proposer_reward", sign),
        (train_azr, "solver_reward", alike),
        (type(s.policy), "decode", lambda policy, ids: " ".join(map(str, ids))),
        (s.policy.engine, "eos_ids", frozenset(range(0, s.policy.base.config.vocab_size, MEAN))),
        (s.policy.engine, "tables", {}),
    ]
    if way == PHASES:
        changes.append((ahead, "pays", lambda s: False))
    if way == ALL_SCORED:
        changes.append((update, "has_gradient", lambda s, sample: sample.update and not sample.from_base))
    before = checkpoint.changing(s)[0]
    try:
        with contextlib.ExitStack() as stack:
            for change in changes:
                stack.enter_context(patched(*change))
            bench.clear()
            metrics, _, answers = train_step(s, step)
            scored = sum(update.has_gradient(s, sample) for sample in kept)
    finally:
        update.restore_tensors(s.policy, s.optimizer, before)
    row = {
        "way": way,
        **{f"{name} s": metrics.get(f"time/{name}", 0.0) for name in ("propose", "solve", "update", "step")},
        "sampled tokens": sum(len(sample.completion.ids) for sample in kept),
        "answers": len(answers),
        "scored": f"{scored} of {len(kept)}",
    }
    for name, phases in (("sampling", ("propose", "solve")), ("update", ("update",))):
        peaks = [lap.get("peak GB", 0.0) for lap in laps[begun:] if lap["phase"] in phases]
        row[f"peak GB {name}"] = max(peaks, default=0.0)
    return row, {(sample.group, i): sample.completion.ids for i, sample in enumerate(kept)}


def made_up_proposal(mode: str, response: str, program: str | None = None) -> Parsed:
    """A task that nobody else proposed, from the text of the response; none in induction."""
    if mode == "induction":
        return Parsed(False, None, "no_format", "made up")
    number = digest(response)
    return Parsed(True, Proposal(mode, f"def f(x):\n    return x * {number} + len(str(x))", (str(number % 97),)), "ok")


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
