"""--proposer no-update, frozen-base, no-update-matched: what self-play is worth when its proposer learns nothing.

All three take the proposals out of the gradient, and their advantages count as if they were in it, so that the weights
of the solver's samples stay what they are. frozen-base proposes with the adapter off. no-update-matched replaces the
tokens that drop out by answers to tasks of the buffers: the same number of trained tokens as the default.
"""

from __future__ import annotations

from functools import partial

from azr.train.arms import Arm
from azr.train.data import FILL, fill, from_buffers, tokens


class NoUpdate(Arm):
    """The policy proposes as always; its proposals are not trained on."""

    from_base = False  # whether the base proposes, adapter off

    @classmethod
    def refuses(cls, c):
        """Settings of the proposer's reward, which would have no effect."""
        rewarded = c.proposer_reward != "learnability" or bool(c.ends_penalty)
        flags = "--proposer-reward and --ends-penalty"
        return [(rewarded, f"{flags} do nothing with --proposer {c.proposer}: its proposals are not trained")]

    def prepare(self, s, step, samples):
        """Takes the proposals out of the update; what is dropped and what stands in for it becomes two metrics."""
        for sample in samples:
            if sample.role == "proposer":
                sample.update, sample.from_base, sample.advantage = False, self.from_base, 0.0
        return {
            "tokens_dropped": tokens([sample for sample in samples if not sample.update]),
            "tokens_added": tokens([sample for sample in samples if FILL in sample.group]),
        }


class FrozenBase(NoUpdate):
    """The base proposes, adapter off; its proposals are not trained on."""

    from_base = True

    def proposing(self, s):
        """Sampling with the adapter off."""
        return s.policy.disable_adapter()


class Matched(NoUpdate):
    """As no-update, with as many more answers as make up for the tokens of the proposals."""

    def samples(self, s, step, proposals, answers, solve):
        """Answers to tasks of the buffers, as many tokens as the proposals have."""
        n = self.config.answers if self.config.recipe == "lean" else 1
        draw = partial(from_buffers, s.buffers, self.config.seed, step)
        return fill(tokens(proposals), n, draw, lambda tasks, key: solve(s, step, tasks, n, key))
