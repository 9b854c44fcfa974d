"""The valid tasks of a run, per mode, with the step in which each came.

    buffers = Buffers(capacity=16_384)
    buffers.add(task, step=3)                                   # False: there is an equal one
    references = buffers.sample("deduction", 6, random.Random("seed/step/propose"))

A program may stand in PER_PROGRAM tasks of a mode: a proposer that has one good program would otherwise be paid for
every input it can think of. Imports duplicates.py and task.py. Left out: weights by difficulty or age; every draw is
uniform.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import replace

from azr.tasks.duplicates import duplicate_key, instance_key, program_key
from azr.tasks.task import MODES, SEED_PROGRAM, SEED_TASKS, Task

PER_PROGRAM = 8  # tasks of a mode whose programs do the same


class Buffers:
    """Per mode its tasks, oldest first, each with the step in which it came. When a mode has `capacity` tasks, the
    oldest leaves for a new one. No duplicates. Raises ValueError for a capacity below 1."""

    def __init__(self, capacity: int = 16_384):
        if capacity < 1:
            raise ValueError(f"a buffer of {capacity} tasks holds nothing; give a capacity of at least 1")
        self.capacity = capacity
        # Keys are stored, not computed again: reading a program costs more than anything else here.
        self._rows: dict[str, deque[tuple[str, int, Task]]] = {mode: deque() for mode in MODES}
        self._keys: dict[str, set[str]] = {mode: set() for mode in MODES}
        self._programs: dict[str, Counter[str]] = {mode: Counter() for mode in MODES}
        self._instances: dict[str, Counter[str]] = {mode: Counter() for mode in MODES}

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def size(self, mode: str) -> int:
        """Tasks of a mode."""
        return len(self._rows[mode])

    def add(self, task: Task, step: int) -> bool:
        """Appends the task; False, and nothing changes, when an equal one (duplicate_key) is there."""
        return self._append(duplicate_key(task), step, task)

    def _append(self, key: str, step: int, task: Task) -> bool:
        rows, keys = self._rows[task.mode], self._keys[task.mode]
        if key in keys:
            return False
        if len(rows) == self.capacity:
            oldest, _, left = rows.popleft()
            keys.remove(oldest)
            self._count(left, -1)
        rows.append((key, step, task))
        keys.add(key)
        self._count(task, 1)
        return True

    def _count(self, task: Task, change: int) -> None:
        for counts, key in ((self._programs, program_key(task)), (self._instances, instance_key(task))):
            counts[task.mode][key] += change
            if not counts[task.mode][key]:
                del counts[task.mode][key]

    def keys(self, mode: str | None = None) -> set[str]:
        """What makes a task a duplicate, of a mode or of all (keys of two modes never coincide): duplicate_key and
        instance_key of every task, program_key of the programs that stand in PER_PROGRAM tasks already."""
        keys: set[str] = set()
        for m in [mode] if mode else MODES:
            keys |= self._keys[m] | self._instances[m].keys()
            keys |= {key for key, count in self._programs[m].items() if count >= PER_PROGRAM}
        return keys

    def tasks(self, mode: str) -> list[tuple[Task, int]]:
        """(task, step), oldest first."""
        return [(task, step) for _, step, task in self._rows[mode]]

    def sample(self, mode: str, k: int, rng: random.Random) -> list[Task]:
        """Up to k distinct tasks, uniformly, in random order."""
        rows = self._rows[mode]
        return [rows[i][2] for i in rng.sample(range(len(rows)), min(k, len(rows)))]

    def sample_program(self, rng: random.Random) -> Task:
        """A task of the deduction and abduction buffers together, uniformly: the induction proposer is asked about
        its program. The seed is drawn only while there is nothing else, since tasks about it are trivial."""
        tasks = [task for mode in ("deduction", "abduction") for _, _, task in self._rows[mode]]
        rows = [task for task in tasks if task.program != SEED_PROGRAM]
        return rng.choice(rows) if rows else SEED_TASKS["deduction"]

    def state_dict(self) -> dict:
        """Everything, as JSON; order and steps included."""
        rows = {
            mode: [[key, step, task.to_json(), task.behaviour] for key, step, task in self._rows[mode]]
            for mode in MODES
        }
        return {"capacity": self.capacity, "rows": rows}

    def load_state_dict(self, state: dict) -> None:
        """Restores what state_dict gave, exactly. Raises ValueError where it is broken; the buffers are then
        unchanged."""
        # Into new buffers first: a state that is broken in its last line must not leave half of it here.
        fresh = Buffers(state["capacity"])
        for mode in MODES:
            for key, step, row, *behaviour in state["rows"][mode]:  # a run of before has no behaviours
                task = replace(Task.from_json(row), behaviour="".join(behaviour))
                if task.mode != mode or not fresh._append(key, step, task):
                    raise ValueError(f"buffer state: a repeated or misplaced {task.mode} task among the {mode} tasks")
        vars(self).update(vars(fresh))
