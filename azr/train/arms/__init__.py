"""Arms: what a run does differently from plain self-play, one file each; the default run has none.

    arms = Arms.of(config)                       # those that the settings ask for, in the order of REGISTRY
    tasks += arms.tasks(s, step)                 # each hook of `Arm` does nothing unless an arm overrides it

A new arm is a class with the hooks that it needs, in a file of this folder, and one line of REGISTRY (docs/icepop.py is
a whole one). The files are imported when a run asks for them: reading settings needs no torch.

The hooks in the order of a step: `tasks`, `answers`, `samples`, `given` (what else is solved and trained on), `reward`,
`prepare`, `mark`, `weights`, `clip`, `token_loss`, `term` (what the update minimizes), `metrics`, `after`. `s` is the
State of train_azr.py; its functions `solve` and `judge` come as arguments, since nothing here imports the script.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import reduce
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from azr.tasks import Sample, Task
    from azr.train.config import Config

# (whether the settings ask for it, its file and class, or the class itself). Hooks run in this order.
REGISTRY: list[tuple[Callable[[Config], bool], str | type[Arm]]] = [
    (lambda c: c.algorithm == "rlvr", "rlvr.Rlvr"),
    (lambda c: c.algorithm == "sft", "sft.Sft"),
    (lambda c: c.proposer_reward != "learnability", "reward_shape.RewardShape"),
    (lambda c: c.control == "bonus", "entropy_control.Bonus"),
    (lambda c: c.control == "adaptive", "entropy_control.Adaptive"),
    (lambda c: c.control == "clip-higher", "entropy_control.ClipHigher"),
    (lambda c: c.control == "clip-cov", "entropy_control.ClipCov"),
    (lambda c: c.control == "kl-cov", "entropy_control.KlCov"),
    (lambda c: c.control == "top-entropy", "entropy_control.TopEntropy"),
    (lambda c: c.control == "high-advantage-clip", "entropy_control.HighAdvantageClip"),
    (lambda c: c.proposer == "no-update", "untrained_proposer.NoUpdate"),
    (lambda c: c.proposer == "frozen-base", "untrained_proposer.FrozenBase"),
    (lambda c: c.proposer == "no-update-matched", "untrained_proposer.Matched"),
    (lambda c: c.proposer == "separate", "separate.Separate"),
    (lambda c: c.off_policy_gamma > 0, "off_policy.OffPolicy"),
]


class Arm:
    """The hooks, all of which do nothing. Made before the model is loaded; ValueError for a file it cannot read."""

    proposes = True  # False: a step has no proposals, its tasks come from a file
    every_token = False  # True: samples without an advantage have a gradient too
    judged: list[Task] = []  # of its files: what will be judged, which tells whether mathematics is among it
    state: dict = {}  # what it learned from earlier steps, JSON; saved with a checkpoint, replaced at a resume

    def __init__(self, config: Config) -> None:
        self.config = config

    @classmethod
    def refuses(cls, config: Config) -> list[tuple[bool, str]]:
        """(whether it is so, the reason in one line) for settings that contradict this arm."""
        return []

    def files(self) -> list[str]:
        """Paths whose content a resumed run must find unchanged."""
        return []

    def start(self, s, judge) -> None:
        """Once the model is loaded. judge(s, samples) -> the samples with their verdicts. May raise ValueError."""

    def adapter(self, role: str, name: str) -> str:
        """The adapter that a role samples with and is trained in; `name` is the policy's own, "default"."""
        return name

    def proposing(self, s) -> AbstractContextManager:
        """What proposals are sampled in."""
        return nullcontext()

    def tasks(self, s, step: int) -> list[Task]:
        """More tasks for the solver; its n answers to each measure their solve rates and are trained on."""
        return []

    def answers(self, s, step: int, solve) -> list[Sample]:
        """More answers of the same kind, from solve(s, step, tasks, n, key)."""
        return []

    def samples(self, s, step: int, proposals: list[Sample], answers: list[Sample], solve) -> list[Sample]:
        """Answers that are rewarded and trained on, but measure no solve rate."""
        return []

    def given(self, s, step: int) -> list[Sample]:
        """Samples that are trained on as they are: they bring their advantage."""
        return []

    def reward(self, sample: Sample, reward: float) -> float:
        """The reward of a proposal that made a valid, solved task; `reward` is the published one."""
        return reward

    def prepare(self, s, step: int, samples: list[Sample]) -> dict[str, float]:
        """Before the first optimizer step, on all samples with their advantages; returns metrics of the step."""
        return {}

    def mark(self, s, samples: list[Sample], seed: int) -> None:
        """Before each optimizer step, on its samples."""

    def weights(self, samples: list[Sample], weights: list[float]) -> list[float]:
        """What every token of each sample weighs in the loss."""
        return weights

    def clip(self, low: float, high: float) -> tuple[float, float]:
        """The bounds of PPO's clip, as distances from 1."""
        return low, high

    def token_loss(self, batch, loss):
        """(batch, time) the loss of every token; `batch` is an update.Batch, `loss` PPO's."""
        return loss

    def term(self, batch):
        """A scalar that a micro-batch adds to the loss, weighted like it (`batch.weight`)."""
        return 0.0

    def metrics(self, columns) -> dict[str, float]:
        """Of one optimizer step, from its tokens (update.Columns)."""
        return {}

    def after(self, s, samples: list[Sample]) -> dict[str, float]:
        """After the last optimizer step; what it returns replaces or adds to the metrics of the step."""
        return {}


def joined(hook: str) -> Callable[..., list]:
    """A hook of `Arms`: the lists of all arms, one after the other."""
    return lambda self, *given: [item for arm in self.arms for item in getattr(arm, hook)(*given)]


def united(hook: str) -> Callable[..., dict]:
    """A hook of `Arms`: the metrics of all arms; of two with the same name the later one stays."""
    return lambda self, *given: {k: v for arm in self.arms for k, v in getattr(arm, hook)(*given).items()}


def handed_on(hook: str) -> Callable:
    """A hook of `Arms`: each arm gets, as the last argument, what the arm before it returned."""
    return lambda self, *given: reduce(lambda value, arm: getattr(arm, hook)(*given[:-1], value), self.arms, given[-1])


class Arms(Arm):
    """Several arms as one, in the order of REGISTRY. Without arms it does nothing."""

    def __init__(self, arms: list[Arm] | tuple = ()) -> None:
        self.arms = list(arms)

    @classmethod
    def of(cls, config: Config) -> Arms:
        """The arms that the settings ask for. ValueError for a file that one of them cannot read."""
        return cls([kind(config) for kind in chosen(config)])

    files, tasks, answers = joined("files"), joined("tasks"), joined("answers")
    samples, given = joined("samples"), joined("given")
    prepare, metrics, after = united("prepare"), united("metrics"), united("after")
    reward, weights, token_loss = handed_on("reward"), handed_on("weights"), handed_on("token_loss")
    adapter = handed_on("adapter")

    @property
    def proposes(self) -> bool:
        """False as soon as one arm takes its tasks from a file."""
        return all(arm.proposes for arm in self.arms)

    @property
    def every_token(self) -> bool:
        """True as soon as one arm gives samples without an advantage a gradient."""
        return any(arm.every_token for arm in self.arms)

    @property
    def state(self) -> dict:
        """The states of all arms in one dictionary; of two arms with the same key the later one would win."""
        return {key: value for arm in self.arms for key, value in arm.state.items()}

    @state.setter
    def state(self, state: dict) -> None:
        """Gives every arm the whole dictionary, its own keys among those of the others."""
        for arm in self.arms:
            arm.state = state

    def start(self, s, judge):
        """Starts every arm."""
        for arm in self.arms:
            arm.start(s, judge)

    def proposing(self, s):
        """The contexts of all arms, one inside the other, already entered; leaving the result leaves all of them."""
        stack = ExitStack()
        for arm in self.arms:
            stack.enter_context(arm.proposing(s))
        return stack

    def mark(self, s, samples, seed):
        """Lets every arm mark the samples."""
        for arm in self.arms:
            arm.mark(s, samples, seed)

    def clip(self, low, high):
        """Each arm gets the bounds that the arm before it returned."""
        for arm in self.arms:
            low, high = arm.clip(low, high)
        return low, high

    def term(self, batch):
        """The sum of the terms of all arms, a scalar."""
        return sum(arm.term(batch) for arm in self.arms)


def chosen(config: Config) -> Iterator[type[Arm]]:
    """The classes of the arms that the settings ask for; one that is given as "file.Class" is imported."""
    for asked, kind in REGISTRY:
        if asked(config) and isinstance(kind, str):
            module, name = kind.split(".")
            yield getattr(importlib.import_module(f"azr.train.arms.{module}"), name)
        elif asked(config):
            yield kind
