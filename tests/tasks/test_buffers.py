"""azr/tasks/buffers.py: what is held, what leaves, what is drawn, and that a state restores exactly."""

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azr import tasks
from azr.tasks import MODES, SEED_PROGRAM, SEED_TASKS, Buffers, Task
from azr.tasks.buffers import PER_PROGRAM
from azr.tasks.duplicates import instance_key, program_key


def number_task(i, mode="deduction"):
    """The i-th of many different tasks."""
    return Task(mode, f"def f(x):\n    return x + {i}", str(i), str(2 * i))


def test_the_oldest_leaves_and_nothing_comes_twice():
    buffers = Buffers(capacity=3)
    assert [buffers.add(number_task(i), i) for i in (0, 1, 1, 2, 3)] == [True, True, False, True, True]
    assert [step for _, step in buffers.tasks("deduction")] == [1, 2, 3] and buffers.size("deduction") == len(
        buffers
    ) == 3
    assert not buffers.add(Task("deduction", "def f(n):  # renamed\n    return n + 3", "3", "6"), 9)
    assert buffers.add(number_task(0), 4), "a task that has left may come back"
    held = [number_task(i) for i in (2, 3, 0)]
    keys = {key(task) for key in (tasks.duplicate_key, instance_key) for task in held}
    assert buffers.keys("deduction") == keys, "nothing of what has left"
    assert buffers.sample("abduction", 4, random.Random(0)) == []
    with pytest.raises(ValueError):
        Buffers(capacity=0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["deduction", "abduction"])), max_size=40),
    st.integers(1, 8),
    st.integers(0, 9),
)
def test_buffer_state_restores_exactly(added, capacity, seed):
    buffers = Buffers(capacity)
    for step, (i, mode) in enumerate(added):
        buffers.add(number_task(i, mode), step)
    restored = Buffers()
    restored.load_state_dict(json.loads(json.dumps(buffers.state_dict())))
    assert restored.state_dict() == buffers.state_dict() and restored.capacity == capacity
    for mode in MODES:
        assert restored.keys(mode) == buffers.keys(mode) and len(buffers.keys(mode)) == 2 * buffers.size(mode)
        assert buffers.size(mode) <= capacity
        drawn = buffers.sample(mode, 4, random.Random(seed))
        assert drawn == restored.sample(mode, 4, random.Random(seed))
        assert len({task.hash for task in drawn}) == len(drawn) == min(4, buffers.size(mode))


def test_a_program_with_as_many_tasks_as_are_allowed_is_a_key_until_one_leaves():
    buffers = Buffers(capacity=PER_PROGRAM)
    doubles = [Task("deduction", "def f(x):\n    return x * 2", str(i), str(2 * i)) for i in range(PER_PROGRAM)]
    for i, task in enumerate(doubles):
        assert program_key(task) not in buffers.keys()
        buffers.add(task, i)
    assert program_key(doubles[0]) in buffers.keys("deduction") and program_key(doubles[0]) not in buffers.keys(
        "abduction"
    )
    restored = Buffers()
    restored.load_state_dict(json.loads(json.dumps(buffers.state_dict())))
    assert restored.keys() == buffers.keys()
    buffers.add(number_task(1), 9)  # the oldest double leaves
    assert program_key(doubles[0]) not in buffers.keys()


def test_what_a_program_does_is_kept_with_its_task_and_old_states_are_read():
    task = replace(number_task(1), behaviour="0123")
    buffers, restored = Buffers(), Buffers()
    buffers.add(task, 0)
    state = json.loads(json.dumps(buffers.state_dict()))
    restored.load_state_dict(state)
    assert restored.tasks("deduction")[0][0].behaviour == "0123" and restored.keys() == buffers.keys()
    state["rows"] = {mode: [row[:3] for row in rows] for mode, rows in state["rows"].items()}
    restored.load_state_dict(state)
    assert restored.size("deduction") == 1 and restored.tasks("deduction")[0][0].behaviour == ""


def test_a_broken_state_changes_nothing():
    buffers = Buffers()
    buffers.add(number_task(1), 0)
    state = json.loads(json.dumps(buffers.state_dict()))
    state["rows"]["abduction"] = state["rows"]["deduction"]
    with pytest.raises(ValueError, match="misplaced"):
        buffers.load_state_dict(state)
    assert buffers.size("deduction") == 1 and buffers.size("abduction") == 0


def test_induction_programs_come_from_both_buffers_and_the_seed_only_when_alone():
    buffers, rng = Buffers(), random.Random(0)
    for task in SEED_TASKS.values():
        assert buffers.add(task, 0)
    assert buffers.sample_program(rng).program == SEED_PROGRAM
    buffers.add(number_task(1), 1)
    buffers.add(number_task(2, "abduction"), 1)
    drawn = {buffers.sample_program(rng).program for _ in range(50)}
    assert drawn == {number_task(1).program, number_task(2).program}
