"""The judge of this project as tasks of the package `verifiers` (tried with 0.4), for the tasks of a file.

    python -m azr.tasks make tiny tasks.jsonl --count 100          # or: make run RUN tasks.jsonl, tasks that a run made
    JudgedTasks(JudgedConfig(path="tasks.jsonl")).load()           # what an environment of verifiers iterates over

An example to copy, with docs/trl_judge.py, azr/jsonl.py, azr/tasks and sandbox.
"""

from __future__ import annotations

from functools import cache

import verifiers.v1 as vf

from sandbox import Sandbox
from trl_judge import JudgeReward, rows_of


@cache
def reward() -> JudgeReward:
    """The judge, with a sandbox that lives as long as the process."""
    return JudgeReward(Sandbox().__enter__())


class JudgedData(vf.TaskData):
    """`row` is the task with its answer as a line of JSON, which the model never sees."""

    row: str


class JudgedTask(vf.Task[JudgedData]):
    """One prompt, one answer, the reward of Absolute Zero's eq. 6; 0 where the machine failed."""

    @vf.reward
    async def judged(self, trace) -> float:
        """1 correct, -0.5 wrong, -1 malformed."""
        return reward()([trace.last_reply], [self.data.row])[0] or 0.0


class JudgedConfig(vf.TasksetConfig):
    """Which file, and the wording of its prompts."""

    path: str = "tasks.jsonl"
    template: str = "azr"


class JudgedTasks(vf.Taskset[JudgedTask, JudgedConfig]):
    """The tasks of the file, in order."""

    def load(self) -> list[JudgedTask]:
        """One task a line."""
        rows = rows_of(self.config.path, self.config.template)
        return [JudgedTask(JudgedData(prompt=row["prompt"], row=row["task"])) for row in rows]
