"""What is held out of the embedded model's training text: programs by their skeleton, and whatever behaves like them.

A skeleton is a program with its constants taken out; a fixed part of all skeletons, by hash, is never shown in
training. A program of another skeleton may still compute the same function, so the held-out tasks' programs are also
compared by behaviour: what they return for 24 fixed inputs of their parameters' types. `held_out.jsonl` has one task a
program: TASKS for each mode and number of statements from 1 to 6, and as many of 7 or 8, which no solving document has.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

from azr.tiny.programs import LAST, STAGES, Program, random_value

HELD_OUT_PART = 25  # one skeleton in so many
SHORT, SHORT_PART = 3, 8  # lines of a program of one operation, of which there are few: one skeleton in so many
INPUTS = 24  # on which behaviour is compared
FIRST = 4  # of them looked at first: few programs agree on so many
BEHAVIOURS = Path(__file__).with_name("held_out_behaviours.json")  # of the programs in held_out.jsonl


def skeleton(text: str) -> str:
    """The program's text with every number 0 and every string constant ''."""
    return re.sub(r"\d+", "0", re.sub(r"'[^']*'", "''", text)).strip()


def held_out(text: str) -> bool:
    """Whether a program's (or a question's) skeleton is in the part that no training document shows."""
    lines = skeleton(text)
    part = SHORT_PART if lines.count("\n") < SHORT else HELD_OUT_PART
    return int.from_bytes(hashlib.sha256(lines.encode()).digest()[:4], "big") % part == 0


@functools.cache
def probe_inputs(kinds: str) -> list[tuple]:
    """The fixed inputs of programs whose parameters have these types ("il": an int and a list)."""
    rng = random.Random(f"behaviour/{kinds}")
    return [tuple(random_value(kind, STAGES[LAST], rng) for kind in kinds) for _ in range(INPUTS)]


def first_behaviour(program: Program) -> str:
    """Hash of what the program returns for the first few inputs; an exception is a result too."""
    return _behaviour(program, FIRST)


def behaviour(program: Program) -> str:
    """Hash of what the program returns for all inputs."""
    return _behaviour(program, INPUTS)


def _behaviour(program: Program, count: int) -> str:
    kinds = "".join(program.parameters.values())
    results = [kinds, *(repr(program.output(arguments, None)) for arguments in probe_inputs(kinds)[:count])]
    return hashlib.sha256("\0".join(results).encode()).hexdigest()[:16]


@functools.cache
def known_behaviours() -> tuple[frozenset[str], frozenset[str]]:
    """(first, all) hashes of the held-out tasks' programs, as make.py wrote them; empty before that."""
    if not BEHAVIOURS.exists():
        return frozenset(), frozenset()
    data = json.loads(BEHAVIOURS.read_text())
    return frozenset(data["first"]), frozenset(data["all"])


def twin(program: Program) -> bool:
    """Whether the program behaves like one of a held-out task."""
    first, everywhere = known_behaviours()
    return first_behaviour(program) in first and behaviour(program) in everywhere


def write_behaviours(programs: Iterable[Program]) -> None:
    """Writes what `known_behaviours` reads."""
    programs = list(programs)
    data = {"first": sorted({first_behaviour(p) for p in programs}), "all": sorted({behaviour(p) for p in programs})}
    BEHAVIOURS.write_text(json.dumps(data, indent=0) + "\n")
    known_behaviours.cache_clear()
