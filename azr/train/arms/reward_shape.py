"""--proposer-reward: another reward of a valid task than the published 1 - r (azr/train/rewards.py has the shapes)."""

from __future__ import annotations

from azr.train.arms import Arm
from azr.train.rewards import SHAPES, above_chance, learnability, random_reward


class RewardShape(Arm):
    """Replaces the published reward of a valid, solved proposal by the one that --proposer-reward names."""

    def reward(self, sample, reward):
        """A shape of the solve rate; `above-chance`: of what guessing leaves of it; `random`: of the task alone."""
        if self.config.proposer_reward == "above-chance":
            return learnability(above_chance(sample.solve_rate, sample.task.chance))
        if self.config.proposer_reward == "random":
            return random_reward(sample.task.hash)
        return SHAPES[self.config.proposer_reward](sample.solve_rate)
