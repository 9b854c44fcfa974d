"""--algorithm sft: cross-entropy on the responses of --data, through the same update; nothing is sampled.

With proposals among the responses it is a warm start, for a model that does not keep the form of a proposal by itself.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from azr.tasks import Sample, Task
from azr.train.arms.off_policy import given_sample
from azr.train.arms.rlvr import MODES_OF_SELFPLAY, FixedTasks
from azr.train.data import fill

# Metrics of the update that compare with a sampler, which there is none of.
UNSAMPLED = ("log_prob_gap", "log_prob_gap_max", "gap_p99", "gap_outside_10", "gap_k3", "gap_capped", "clip_fraction")


class Sft(FixedTasks):
    """Cross-entropy on given responses; nothing is sampled, judged or rewarded."""

    solutions = True

    @classmethod
    def refuses(cls, c):
        """What FixedTasks refuses, and every setting that is about sampled answers."""
        return super().refuses(c) + [
            (c.solver_reward != "graded", "--solver-reward does nothing with --algorithm sft: nothing is rewarded"),
            (c.temperature != 1, "--temperature would only rescale the loss of --algorithm sft: nothing is sampled"),
            (c.control != "none", f"--entropy-control {c.control} acts on sampled answers; sft samples none"),
        ]

    def start(self, s, judge):
        """As FixedTasks. The tasks of proposals take the place of the seed stage's, in which a model that needs a warm
        start would propose next to nothing that is valid, for all of its rounds."""
        super().start(s, judge)
        for task in self.data:
            if task.references:
                s.buffers.add(replace(task, response=None, references=()), 0)

    def given(self, s, step):
        """The responses of as many tasks as self-play has answers, or of --step-tokens tokens: advantage 1."""

        def respond(tasks: list[Task], key: str) -> list[Sample]:
            samples = [given_sample(s.policy, task, s.template, task.hash) for task in tasks]
            for sample in samples:
                sample.objective, sample.reason, sample.advantage, sample.reward = "sft", "given", 1.0, math.nan
            return samples

        if tokens := self.config.step_tokens:
            return fill(tokens, 1, partial(self.draw, step), respond)
        # as many as self-play has answers; what proposals the file has are among them
        count = MODES_OF_SELFPLAY * self.config.prompts_per_mode * self.config.answers
        return respond(self.draw(step, None, count), "")

    def token_loss(self, batch, loss):
        """Nobody sampled the responses: their log-probs are noted as they are before the update."""
        for sample, row in zip(batch.samples, batch.log_prob.tolist()):
            sample.old_log_prob = row[: len(sample.completion.ids)]
        return -batch.advantage * batch.log_prob  # A = 1: cross-entropy

    def after(self, s, samples):
        """NaN for the metrics that compare with a sampler."""
        return dict.fromkeys(UNSAMPLED, math.nan)
