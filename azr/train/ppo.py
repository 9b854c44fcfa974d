"""Advantages, losses and diagnostics of the update: pure functions on tensors, no model, no state.

Shapes: (samples,) for what belongs to a response, (batch, time) for what belongs to its tokens, with a bool `mask` of
the same shape that is True on response tokens. A step's loss is a sum over micro-batches of sums over tokens; each
token already carries its share (`token_weights`, counted over the whole optimizer step), so how the step is cut into
micro-batches does not change the gradient.

    weight = token_weights(group, lengths)                                     # once a step
    for indices, log_prob, entropy, mask in policy.score(..., with_grad=True):
        token_loss = ppo_token_loss(log_prob, old_log_prob, advantage[indices, None])
        weighted_sum(token_loss * importance_weight(old_log_prob, sampler_log_prob), weight[indices], mask).backward()

Left out: a critic, GAE (rewards are per response and gamma is 1, so every token's return is the response's reward).
"""

import math

import torch

GROUPS = 6  # (proposer, solver) x (deduction, abduction, induction)


# ------------------------------------------------------------------------------------------------------- advantages


def lean_advantages(rewards: torch.Tensor, group_ids: torch.Tensor, mode_ids: torch.Tensor) -> torch.Tensor:
    """Solver advantages of the lean recipe, (samples,) fp32: (R - mean of its task's answers) / std of its mode.

    rewards (samples,), group_ids (samples,) name the task, mode_ids (samples,) the mode. The standard deviation
    (unbiased) is that of the rewards of all samples of the mode in this step. A task whose answers all got the same
    reward gives exactly 0. Centring as in RLOO/GRPO (Shao et al. 2024, arXiv 2402.03300); one scale a mode instead of
    one a task, so that nearly solved tasks are not blown up (Liu et al. 2025, arXiv 2503.20783, section 3.1).
    """
    rewards = rewards.double()
    centred = torch.zeros_like(rewards)
    for rows in _groups(group_ids):
        centred[rows] = _centre(rewards[rows])
    for rows in _groups(mode_ids):
        centred[rows] /= _std(rewards[rows])
    return centred.float()


def proposer_advantages(rewards: torch.Tensor, mode_ids: torch.Tensor) -> torch.Tensor:
    """Proposer advantages of the lean recipe, (samples,) fp32: rewards whitened per mode, (R - mean) / std.

    Unbiased standard deviation over the mode's proposals of this step; a mode without variance gives 0.
    REINFORCE with a batch baseline (Hu 2025, REINFORCE++, arXiv 2501.03262), per mode as AZR does per task and role.
    """
    rewards = rewards.double()
    advantage = torch.zeros_like(rewards)
    for rows in _groups(mode_ids):
        advantage[rows] = _centre(rewards[rows]) / _std(rewards[rows])
    return advantage.float()


def trr_advantages(rewards: torch.Tensor, lengths: torch.Tensor, group_key: torch.Tensor) -> torch.Tensor:
    """TRR++ as coded in AZR (arXiv 2505.03335), (samples,) fp32: A = (R - mu) / sqrt(var + 1e-8) per (role, mode).

    mu and the unbiased variance run over the TOKENS of the group: every response counts as often as it has tokens,
        mu = sum_i len_i R_i / sum_i len_i,    var = sum_i len_i (R_i - mu)^2 / (sum_i len_i - 1).
    lengths (samples,) are response lengths; group_key (samples,) names the (role, mode). A group without variance
    gives 0. The paper's eq. 8 writes per-group mean and std without saying that they are token-weighted.
    """
    rewards, lengths = rewards.double(), lengths.double()
    advantage = torch.zeros_like(rewards)
    for rows in _groups(group_key):
        r, n = rewards[rows], lengths[rows]
        tokens = n.sum()
        if tokens < 2 or r.max() == r.min():
            continue
        mu = (n * r).sum() / tokens
        variance = (n * (r - mu) ** 2).sum() / (tokens - 1)
        advantage[rows] = (r - mu) / (variance + 1e-8).sqrt()
    return advantage.float()


def _groups(ids: torch.Tensor) -> list[torch.Tensor]:
    """The row indices of each distinct id."""
    return [(ids == i).nonzero().squeeze(-1) for i in ids.unique()]


def _centre(r: torch.Tensor) -> torch.Tensor:
    # exactly 0 without variance: a rounding error divided by a small std must not become an advantage
    return torch.zeros_like(r) if r.max() == r.min() else r - r.mean()


def _std(r: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(r[0]) if r.max() == r.min() else (r.var() + 1e-8).sqrt()


# ------------------------------------------------------------------------------------------------------------- loss


def ppo_token_loss(log_prob, old_log_prob, advantage, clip_low: float = 0.2, clip_high: float = 0.2) -> torch.Tensor:
    """Clipped surrogate of PPO per token, (batch, time): -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    r = exp(log_prob - old_log_prob). Schulman et al. 2017, arXiv 1707.06347, eq. 7; separate bounds as in DAPO (Yu et
    al. 2025, arXiv 2503.14476). With one update on fresh log-probs r is 1 and the gradient is -A grad log_prob.
    """
    ratio = (log_prob - old_log_prob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def importance_weight(old_log_prob, sampler_log_prob, cap: float = 2.0) -> torch.Tensor:
    """Truncated importance weight for the gap between sampler and trainer, (batch, time), detached.

    min(exp(log p_trainer,old - log p_sampler), cap), both of the weights that sampled. TIS: Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training". With shared modules it stays near 1: a guard.
    """
    return (old_log_prob - sampler_log_prob).exp().clamp(max=cap).detach()


def group_token_counts(group: torch.Tensor, lengths: torch.Tensor, groups: int = GROUPS) -> torch.Tensor:
    """Tokens of each (role, mode) group in the whole optimizer step, (groups,); group (samples,) holds 0..groups-1."""
    return torch.zeros(groups, dtype=torch.float64, device=group.device).scatter_add_(0, group, lengths.double())


def token_weights(group, lengths, weighting: str = "group", group_weight=None, groups: int = GROUPS) -> torch.Tensor:
    """The weight of every token of a sample in the step's loss, (samples,) fp32.

    "group": w_g / (tokens of g in the whole optimizer step), w_g = 1 / groups, or group_weight (groups,). An empty
    group adds nothing and leaves the other weights as they are; a weight of 0 drops a group. This is the equal weight
    of the six groups that AZR has by its micro-batch order (each micro-batch of its trainer holds one role and mode).
    "token": 1 / (tokens of the whole step), every token counts the same (DAPO's token-level loss).
    """
    if weighting == "token":
        total = lengths.double().sum().clamp(min=1)
        return torch.ones_like(lengths, dtype=torch.float64).div(total).float()
    if weighting != "group":
        raise ValueError(f"loss weighting must be group or token, not {weighting!r}")
    counts = group_token_counts(group, lengths, groups).clamp(min=1)
    share = torch.full_like(counts, 1 / groups) if group_weight is None else group_weight.to(counts)
    return (share / counts)[group].float()


def weighted_sum(values: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over response tokens of values (batch, time) times the weight of their sample (batch,): a part of the loss.

    What padding holds is ignored, infinities and NaN included.
    """
    return (values.masked_fill(~mask, 0.0) * weight[:, None]).sum()


# ------------------------------------------------------------------------------------------------------ diagnostics


def clipped(log_prob, old_log_prob, advantage, clip_low: float = 0.2, clip_high: float = 0.2) -> torch.Tensor:
    """Where the clip takes the gradient away, bool (batch, time): r above its bound and A > 0, or below and A < 0."""
    ratio = (log_prob.detach() - old_log_prob).exp()
    return ((ratio > 1 + clip_high) & (advantage > 0)) | ((ratio < 1 - clip_low) & (advantage < 0))


def clip_fraction(log_prob, old_log_prob, advantage, mask, clip_low: float = 0.2, clip_high: float = 0.2) -> float:
    """Share of response tokens whose gradient the clip takes away; 0 without tokens."""
    hits = clipped(log_prob, old_log_prob, advantage, clip_low, clip_high) & mask
    return (hits.sum() / mask.sum().clamp(min=1)).item()


def kl_k3(log_prob: torch.Tensor, reference_log_prob: torch.Tensor) -> torch.Tensor:
    """The k3 estimate of KL(policy || reference) per token: exp(d) - d - 1, d = log p_reference - log p_policy.

    Tokens must come from the policy; unbiased and never negative (Schulman 2020, "Approximating KL divergence").
    """
    d = reference_log_prob - log_prob
    return d.exp() - d - 1


def gap_statistics(trainer_log_prob, sampler_log_prob, mask, cap: float = 2.0) -> dict[str, float]:
    """The sampler-trainer gap over response tokens, of difference d = log p_trainer - log p_sampler and ratio exp(d).

    mean, p99 and max of |d| in nats; outside_10: share of tokens whose ratio is not in [0.9, 1.1]; capped: share whose
    ratio exceeds `cap`; k3: estimate of KL(sampler || trainer).
    """
    trainer, sampler = trainer_log_prob.detach()[mask].double(), sampler_log_prob[mask].double()
    if not (count := len(trainer)):
        return dict.fromkeys(("mean", "p99", "max", "outside_10", "capped", "k3"), 0.0)
    gap = trainer - sampler
    size, ratio = gap.abs(), gap.exp()
    return {
        "mean": size.mean().item(),
        "p99": size.kthvalue(math.ceil(0.99 * count)).values.item(),
        "max": size.max().item(),
        "outside_10": ((ratio < 0.9) | (ratio > 1.1)).double().mean().item(),
        "capped": (ratio > cap).double().mean().item(),
        "k3": kl_k3(sampler, trainer).mean().item(),
    }
