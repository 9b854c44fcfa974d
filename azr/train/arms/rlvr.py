"""--algorithm rlvr: answers to the fixed tasks of --data, rewarded and trained as in self-play; nothing is proposed.

The seed stage and the probe are those of self-play, so what is held out or probed is the same.
"""

from __future__ import annotations

from functools import partial

from azr.evals.held_out import load_tasks
from azr.tasks import Task
from azr.train.arms import Arm
from azr.train.data import draw, fill, fitting

MODES_OF_SELFPLAY = 3  # a step answers as many tasks as self-play proposes


class FixedTasks(Arm):
    """What rlvr and sft share: the tasks of --data, drawn anew each step, and what self-play has that they have not."""

    proposes = False
    solutions = False  # whether each task must come with a response, which may be a proposal of it

    def __init__(self, config) -> None:
        super().__init__(config)
        self.data = load_tasks(config.data, self.solutions, proposals=self.solutions)

    @classmethod
    def refuses(cls, c):
        """A missing file of tasks, and every setting that is about a proposer or about self-play."""
        name = f"--algorithm {c.algorithm}"
        no_proposer = f"does nothing with {name}: its tasks come from --data, nothing is proposed"
        return [
            (not c.data, f"{name} needs --data FILE; python -m azr.tasks make writes such files"),
            (c.proposer != "joint", f"--proposer {c.proposer} {no_proposer}"),
            (c.proposer_reward != "learnability", f"--proposer-reward {c.proposer_reward} {no_proposer}"),
            (bool(c.ends_penalty), f"--ends-penalty {no_proposer}"),
            (c.solver_tasks == "fresh", f"--solver-tasks fresh {no_proposer}"),
            (c.recipe == "azr", f"--recipe azr is a recipe of self-play; {name} has its answers' groups"),
        ]

    def files(self):
        """The file of --data."""
        return [self.config.data]

    def start(self, s, judge):
        """Leaves out the tasks that do not fit the model's context. ValueError if none fits."""
        self.data = fitting(s, self.data)

    def draw(self, step: int, wave: int | None, count: int) -> list[Task]:
        """`count` tasks of the file for a step, as azr.train.data.draw has them; `wave` counts draws within the
        step."""
        return draw(self.data, step, count, self.config.seed, wave)


class Rlvr(FixedTasks):
    """Answers to fixed tasks, rewarded and trained as those of self-play's solver."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.judged = self.data

    def tasks(self, s, step):
        """As many as self-play proposes; with --step-tokens `answers` decides how many."""
        if self.config.step_tokens:
            return []
        return self.draw(step, None, MODES_OF_SELFPLAY * self.config.prompts_per_mode)

    def answers(self, s, step, solve):
        """With --step-tokens: answers to tasks of the file until they have so many tokens."""
        tokens, n = self.config.step_tokens, self.config.answers
        if not tokens:
            return []
        return fill(tokens, n, partial(self.draw, step), lambda tasks, key: solve(s, step, tasks, n, key))
