"""--entropy-control NAME[=VALUE]: which tokens of an update lose their gradient, get a penalty, or a bonus.

    chosen = clip_cov(covariance(advantage, log_prob), 2e-4, generator)      # (tokens,) bool: no gradient here

Tokens are chosen among all tokens of an optimizer step, by the log-probs of the weights that sampled them, so how the
step is cut into micro-batches changes nothing. `advantage`, `log_prob`, `entropy` are flat, (tokens,). VALUE is the one
strength of a control (azr/train/rules.py has the defaults).

Left out: entropy in the reward, temperature schedules (Absolute Zero's own runs have no control at all).
"""

from __future__ import annotations

import math

import torch

from azr.train import ppo, update
from azr.train.arms import Arm
from azr.train.data import tokens

COV_LOW, COV_HIGH = 1.0, 5.0  # Clip-Cov picks among covariances between these (Cui et al. 2025, arXiv 2505.22617)
OPEN_CLIP = 1.0  # and opens PPO's clip to [0, 2] instead
KL_COEFFICIENT = 1.0  # of kl-cov's penalty, as published; its strength is the share of tokens that get it
CONFIDENT = 0.8  # high-advantage-clip: probability above which a token needs no more push
RAMP = 50  # the adaptive coefficient reaches its cap after so many steps (Skywork-OR1: 1e-4 a step, cap 5e-3)
# The share of the first step's entropy that `adaptive` holds. Skywork-OR1 gives nats, which depend on the model; 0.9 is
# what the runs of RESULTS.md have, high enough that the control acts before the entropy is gone.
TARGET = 0.9
MOVED = 1e-3  # nats: below, two log-probs of a token differ by rounding only


# ------------------------------------------------------------------------------------------------------ which tokens


def covariance(advantage: torch.Tensor, log_prob: torch.Tensor) -> torch.Tensor:
    """(tokens,) (A - mean A)(log p - mean log p): its mean is the covariance that drives the entropy down.

    dH ~ -eta Cov(log p, A): Cui et al. 2025, arXiv 2505.22617.
    """
    return (advantage - advantage.mean()) * (log_prob - log_prob.mean())


def clip_cov(cov: torch.Tensor, fraction: float, generator: torch.Generator) -> torch.Tensor:
    """(tokens,) bool: `fraction` of all tokens, drawn at random from those with 1 < cov < 5; they lose their gradient.

    At least one token where the band holds any, fewer than the fraction where it holds too few (arXiv 2505.22617).
    """
    band = ((cov > COV_LOW) & (cov < COV_HIGH)).nonzero().squeeze(-1)
    chosen = band[torch.randperm(len(band), generator=generator)[: count_of(cov, fraction)]]
    return torch.zeros_like(cov, dtype=torch.bool).index_fill(0, chosen, True)


def high_advantage(advantage: torch.Tensor, log_prob: torch.Tensor, fraction: float) -> torch.Tensor:
    """(tokens,) bool: advantage above its (1 - fraction) quantile over tokens, and probability above 0.8.

    What is both rewarded and nearly certain can only sharpen: these tokens lose their gradient. Not from a paper.
    """
    above = advantage > torch.quantile(advantage.double(), 1 - fraction)
    return above & (log_prob.exp() > CONFIDENT)


def count_of(tokens: torch.Tensor, fraction: float) -> int:
    """How many tokens the fraction is, rounded down but at least one."""
    return max(1, int(fraction * len(tokens)))


def largest(values: torch.Tensor, fraction: float) -> torch.Tensor:
    """(tokens,) bool: the fraction of largest values, at least one."""
    chosen = values.topk(min(len(values), count_of(values, fraction))).indices
    return torch.zeros_like(values, dtype=torch.bool).index_fill(0, chosen, True)


# ------------------------------------------------------------------------------------------------------- the controls


class Control(Arm):
    """What all share: the strength, and the share of tokens whose gradient the control changes.

    touched(columns) -> (tokens,) bool: the tokens whose gradient is another one than without the control.
    """

    def __init__(self, config) -> None:
        super().__init__(config)
        self.strength = config.control_strength

    def metrics(self, columns):
        """`control_share`: the share of the sampled tokens that the control touched, 0 without tokens."""
        return {"control_share": self.touched(columns).sum().item() / max(1, columns.sampled)}


class Bonus(Control):
    """The loss less c times the entropy of every sampled token, weighted as the token is."""

    @property
    def coefficient(self) -> float:
        """c, what the entropy (nats) of a token is multiplied with: here the strength, at every step."""
        return self.strength

    @property
    def every_token(self) -> bool:
        """True while the bonus acts: the entropy has a gradient even where the advantage is 0."""
        return self.coefficient > 0

    def prepare(self, s, step, samples):
        """`entropy_coefficient`: the c of this step."""
        return {"entropy_coefficient": self.coefficient}

    def term(self, batch):
        """-c x the entropies of the micro-batch's sampled tokens, each times the weight of its sample; a scalar."""
        if not self.coefficient:
            return 0.0
        # a high entropy on text that the policy did not write is not what is to be rewarded
        weight = batch.weight * batch.own[:, 0]
        return -self.coefficient * (batch.entropy.masked_fill(~batch.mask, 0.0) * weight[:, None]).sum()

    def touched(self, columns):
        """All tokens, or none while the coefficient is 0."""
        return torch.full_like(columns.log_prob, self.coefficient > 0, dtype=torch.bool)


class Adaptive(Bonus):
    """The bonus while the entropy is at or below a target; its strength is the cap of the coefficient."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.state = {}

    @property
    def coefficient(self) -> float:
        """The c that `adapt` has reached, 0 while the bonus is not active; 0 in the first step."""
        return self.state["coefficient"] if self.state and self.state["active"] else 0.0

    def after(self, s, samples):
        """Acts on the next step: the exact entropy of a step is known after its update."""
        own = [x for x in samples if x.update and not x.objective]
        entropy = math.fsum(value for x in own for value in x.entropy) / max(1, tokens(own))
        self.state = adapt(self.state, entropy, self.strength)
        return {}


def adapt(state: dict, entropy: float, cap: float) -> dict:
    """The adaptive bonus after a step whose tokens had this mean entropy: {"target", "coefficient", "active"}.

    The first step sets the target, a fraction of its entropy. Then, as in Skywork-OR1 (arXiv 2505.22312):
    c goes up by cap / 50 while the entropy is at or below the target, else down, within [0, cap]; the bonus is active
    at or below the target only.
    """
    target = state["target"] if state else TARGET * entropy
    # the first step is above the target that it sets: the bonus starts switched off, with a coefficient of 0
    low = entropy <= target
    change = cap / RAMP if low else -cap / RAMP
    coefficient = min(cap, max(0.0, (state["coefficient"] if state else 0.0) + change))
    return {"target": target, "coefficient": coefficient, "active": low}


class ClipHigher(Control):
    """DAPO's wider upper bound of the clip (Yu et al. 2025, arXiv 2503.14476); its strength is that bound."""

    def clip(self, low, high):
        """The upper bound becomes the strength."""
        return low, self.strength

    def touched(self, columns):
        """The tokens that PPO's usual upper bound would have clipped and this one does not."""
        flat = columns.log_prob, columns.old, columns.advantage
        # the lower bound is the same in both, so that only the tokens between the two upper bounds are left
        narrow = ppo.clipped(*flat, columns.clip[0], update.CLIP)
        return narrow & ~ppo.clipped(*flat, *columns.clip)


class Marking(Control):
    """A control that chooses tokens before each optimizer step; these lose their gradient.

    choose(advantage, log_prob, samples, generator) -> (tokens,) bool, from what the tokens of the samples have, flat
    and in their order.
    """

    def __init__(self, config) -> None:
        super().__init__(config)
        self.marks: dict[int, list[float]] = {}  # id of a sample of this optimizer step -> 1 where a token is chosen

    def mark(self, s, samples, seed):
        """Off-policy samples and proposals that are not trained are left alone."""
        # by id: samples cannot be hashed, and two equal answers are still two rows of the update
        self.marks = {id(sample): [0.0] * len(sample.completion.ids) for sample in samples}
        mine = [x for x in samples if x.update and not x.objective and len(x.completion.ids)]
        if not mine:
            return
        lengths = [len(x.completion.ids) for x in mine]
        advantage = torch.tensor([x.advantage for x in mine]).repeat_interleave(torch.tensor(lengths))
        log_prob = torch.cat([torch.tensor(x.old_log_prob or x.completion.log_probs) for x in mine])
        chosen = self.choose(advantage, log_prob, mine, torch.Generator().manual_seed(seed % 2**63))
        for sample, row in zip(mine, chosen.float().split(lengths)):
            self.marks[id(sample)] = row.tolist()

    def token_loss(self, batch, loss):
        """(batch, time) no loss and no gradient where a token is marked."""
        return self.controlled(batch, loss, update.padded([self.marks[id(x)] for x in batch.samples], loss) > 0)

    def controlled(self, batch, loss, marked: torch.Tensor) -> torch.Tensor:
        """(batch, time) the loss with the effect of the control on the marked tokens: here they lose theirs."""
        return loss.masked_fill(marked, 0.0)

    def marked(self, columns) -> torch.Tensor:
        """(tokens,) bool: the marks of the samples of the columns, in the order of the columns."""
        rows = [value for sample in columns.samples for value in self.marks[id(sample)]]
        return torch.tensor(rows, device=columns.log_prob.device) > 0

    def touched(self, columns):
        """The marked tokens that had a gradient to lose: where the advantage is 0 there was none."""
        return self.marked(columns) & (columns.advantage != 0)


class ClipCov(Marking):
    """Takes the gradient from random tokens of high covariance (Clip-Cov, Cui et al. 2025, arXiv 2505.22617)."""

    def choose(self, advantage, log_prob, samples, generator):
        """The tokens of `clip_cov`; the strength is their share of all tokens."""
        return clip_cov(covariance(advantage, log_prob), self.strength, generator)

    def clip(self, low, high):
        """A clip to [0, 2] instead of PPO's."""
        return OPEN_CLIP, OPEN_CLIP


class KlCov(Marking):
    """A KL penalty on the tokens of largest covariance (arXiv 2505.22617). Unlike the published one PPO's clip stays,
    so that the penalty is all that differs from `none`."""

    def choose(self, advantage, log_prob, samples, generator):
        """The tokens of largest covariance; the strength is their share of all tokens."""
        return largest(covariance(advantage, log_prob), self.strength)

    def controlled(self, batch, loss, marked):
        """+ beta |log p - log p_old| on the marked tokens; its gradient is 0 while the two are equal."""
        return loss + KL_COEFFICIENT * (batch.log_prob - batch.old_log_prob).abs().masked_fill(~marked, 0.0)

    def touched(self, columns):
        """The marked tokens whose log-prob has moved: before that the penalty has no gradient."""
        return self.marked(columns) & ((columns.log_prob - columns.old).abs() > MOVED)


class TopEntropy(Marking):
    """Only the tokens of highest entropy are trained (Wang et al. 2025, arXiv 2506.01939)."""

    def choose(self, advantage, log_prob, samples, generator):
        """All but the tokens of highest entropy; the strength is the share that is trained."""
        return ~largest(torch.cat([torch.tensor(x.entropy) for x in samples]), self.strength)


class HighAdvantageClip(Marking):
    """Takes the gradient from tokens that are both rewarded and nearly certain. Not from a paper."""

    def choose(self, advantage, log_prob, samples, generator):
        """The tokens of `high_advantage`; its quantile is 1 - strength."""
        return high_advantage(advantage, log_prob, self.strength)
