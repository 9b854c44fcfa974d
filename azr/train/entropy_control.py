"""Entropy controls: which tokens of an update lose their gradient, get a penalty, or a bonus. Functions on tensors.

    marks = clip_cov(covariance(advantage, log_prob), 2e-4, generator)      # (tokens,) bool: no gradient here
    mark(samples, config, seed)                                             # the same on the samples of one update
    token_loss = controlled(token_loss, marks, log_prob, old, config)

Tokens are chosen among all tokens of an optimizer step, by the log-probs of the weights that sampled them, so how the
step is cut into micro-batches changes nothing. `advantage`, `log_prob`, `entropy` are flat, (tokens,).

Left out: entropy in the reward, temperature schedules (Absolute Zero's own runs have no control at all).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from azr.train import ppo
from azr.tasks import Sample

if TYPE_CHECKING:
    from azr.train.config import Config

COV_LOW, COV_HIGH = 1.0, 5.0  # Clip-Cov picks among covariances between these (Cui et al. 2025, arXiv 2505.22617)
OPEN_CLIP = 1.0  # and opens PPO's clip to [0, 2] instead
CLIP_HIGHER = 0.28  # DAPO (Yu et al. 2025, arXiv 2503.14476)
CONFIDENT = 0.8  # high-advantage-clip: probability above which a token needs no more push
RAMP = 50  # the adaptive coefficient reaches its cap after so many steps (Skywork-OR1: 1e-4 a step, cap 5e-3)
MARKING = ("clip-cov", "kl-cov", "top-entropy", "high-advantage-clip")
BONUS = ("bonus", "adaptive")
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


def kl_cov(cov: torch.Tensor, fraction: float) -> torch.Tensor:
    """(tokens,) bool: the `fraction` of tokens of largest covariance, which get a KL penalty (arXiv 2505.22617)."""
    return largest(cov, fraction)


def below_top_entropy(entropy: torch.Tensor, fraction: float) -> torch.Tensor:
    """(tokens,) bool: all but the `fraction` of highest entropy; they lose their gradient (arXiv 2506.01939)."""
    return ~largest(entropy, fraction)


def high_advantage(advantage: torch.Tensor, log_prob: torch.Tensor, fraction: float) -> torch.Tensor:
    """(tokens,) bool: advantage above its (1 - fraction) quantile over tokens, and probability above 0.8.

    What is both rewarded and nearly certain can only sharpen: these tokens lose their gradient. Not from a paper.
    """
    above = advantage > torch.quantile(advantage.double(), 1 - fraction)
    return above & (log_prob.exp() > CONFIDENT)


def count_of(tokens: torch.Tensor, fraction: float) -> int:
    return max(1, int(fraction * len(tokens)))


def largest(values: torch.Tensor, fraction: float) -> torch.Tensor:
    """(tokens,) bool: the fraction of largest values, at least one."""
    chosen = values.topk(min(len(values), count_of(values, fraction))).indices
    return torch.zeros_like(values, dtype=torch.bool).index_fill(0, chosen, True)


def mark(samples: list[Sample], config: Config, seed: int) -> None:
    """Sets `marks` of the samples of one optimizer step: the tokens that the control acts on.

    Samples need their advantages, and for top-entropy the entropy of each token. Off-policy samples and proposals that
    are not trained are left alone.
    """
    if config.entropy_control not in MARKING:
        return
    for sample in samples:
        sample.marks = [0.0] * len(sample.completion.ids)
    mine = [s for s in samples if s.update and not s.objective and len(s.completion.ids)]
    if not mine:
        return
    lengths = [len(s.completion.ids) for s in mine]
    advantage = torch.tensor([s.advantage for s in mine]).repeat_interleave(torch.tensor(lengths))
    log_prob = torch.cat([torch.tensor(s.old_log_prob or s.completion.log_probs) for s in mine])
    chosen = choose(config, advantage, log_prob, mine, torch.Generator().manual_seed(seed % 2**63))
    for sample, row in zip(mine, chosen.float().split(lengths)):
        sample.marks = row.tolist()


def choose(config: Config, advantage, log_prob, samples: list[Sample], generator) -> torch.Tensor:
    """(tokens,) bool for the control of the config."""
    if config.entropy_control == "top-entropy":
        return below_top_entropy(torch.cat([torch.tensor(s.entropy) for s in samples]), config.control_fraction)
    if config.entropy_control == "high-advantage-clip":
        return high_advantage(advantage, log_prob, config.control_fraction)
    cov = covariance(advantage, log_prob)
    if config.entropy_control == "kl-cov":
        return kl_cov(cov, config.control_fraction)
    return clip_cov(cov, config.control_fraction, generator)


# ---------------------------------------------------------------------------------------------------------- the loss


def clip_bounds(control: str, low: float, high: float) -> tuple[float, float]:
    """PPO's clip under a control: DAPO's wider upper bound; Clip-Cov has its own way of clipping."""
    return {"clip-higher": (low, CLIP_HIGHER), "clip-cov": (OPEN_CLIP, OPEN_CLIP)}.get(control, (low, high))


def controlled(token_loss, marks: torch.Tensor, log_prob, old, config: Config) -> torch.Tensor:
    """(batch, time) the loss where the control acts on the marked tokens.

    kl-cov: + beta |log p - log p_old|, whose gradient is 0 while the two are equal; the others: no loss, no gradient.
    Unlike the published kl-cov, PPO's clip stays, so that the penalty is all that differs from `none`.
    """
    marked = marks > 0
    if config.entropy_control == "kl-cov":
        return token_loss + config.kl_coefficient * (log_prob - old).abs().masked_fill(~marked, 0.0)
    return token_loss.masked_fill(marked, 0.0)


def touched_share(config: Config, log_prob, old, advantage, marks, clip_low: float, clip_high: float) -> float:
    """Share of tokens (all arguments flat) whose gradient the control changes; 0 without tokens."""
    if not len(log_prob):
        return 0.0
    control = config.entropy_control
    if control in BONUS:
        return float(config.entropy_coefficient > 0)
    if control == "clip-higher":
        freed = ppo.clipped(log_prob, old, advantage, clip_low, clip_high)
        touched = freed & ~ppo.clipped(log_prob, old, advantage, clip_low, CLIP_HIGHER)
    elif control == "kl-cov":
        touched = (marks > 0) & ((log_prob - old).abs() > MOVED)
    else:
        touched = (marks > 0) & (advantage != 0)
    return touched.double().mean().item()


# ---------------------------------------------------------------------------------------------------------- adaptive


def adapt(state: dict, entropy: float, config: Config) -> dict:
    """The adaptive bonus after a step whose tokens had this mean entropy: {"target", "coefficient", "active"}.

    The first step sets the target, a fraction of its entropy. Then, as in Skywork-OR1 (arXiv 2505.22312):
    c goes up by cap / 50 while the entropy is at or below the target, else down, within [0, cap]; the bonus is active
    at or below the target only. It acts on the next step, since a step's exact entropy is known after its update.
    """
    target = state["target"] if state else config.entropy_target * entropy
    cap, low = config.entropy_coefficient, entropy <= target
    change = cap / RAMP if low else -cap / RAMP
    coefficient = min(cap, max(0.0, (state["coefficient"] if state else 0.0) + change))
    return {"target": target, "coefficient": coefficient, "active": low}


def coefficient(control: str, fixed: float | None, state: dict) -> float:
    """Of the entropy bonus in the loss of the coming step."""
    if control == "adaptive":
        return state["coefficient"] if state and state["active"] else 0.0
    return fixed if control == "bonus" else 0.0
