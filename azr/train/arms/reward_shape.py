"""--proposer-reward: another reward of a valid task than the published 1 - r (azr/train/rewards.py has the shapes)."""

from __future__ import annotations

from azr.train.arms import Arm
from azr.train.rewards import above_chance, task_reward


class RewardShape(Arm):
    """Replaces the published reward of a valid, solved proposal by the one that --proposer-reward names."""

    def reward(self, sample, reward):
        """A shape of the solve rate; `above-chance`: of what guessing leaves of it; `random`: of the task alone."""
        shape, rate = self.config.proposer_reward, sample.solve_rate
        if shape == "above-chance":
            rate = above_chance(rate, sample.task.chance)
        return task_reward(shape, rate, task_hash=sample.task.hash)
