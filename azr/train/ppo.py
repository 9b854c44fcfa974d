"""What PPO's update is watched by: clipped tokens, KL, the gap between sampler and trainer. Pure functions on tensors.

    clipped(log_prob, old_log_prob, advantage)                     # where the clip takes the gradient away
    gap_statistics(trainer_log_prob, sampler_log_prob, mask)["mean"]

Shapes: (batch, time) with a bool `mask` of the same shape that is True on response tokens. The loss itself, with its
ratio and clip, is in train_azr.py.
"""

import math

import torch


def clipped(log_prob, old_log_prob, advantage, clip_low: float = 0.2, clip_high: float = 0.2) -> torch.Tensor:
    """Where the clip takes the gradient away, bool (batch, time): r above its bound and A > 0, or below and A < 0."""
    ratio = (log_prob.detach() - old_log_prob).exp()
    return ((ratio > 1 + clip_high) & (advantage > 0)) | ((ratio < 1 - clip_low) & (advantage < 0))


def kl_k3(log_prob: torch.Tensor, reference_log_prob: torch.Tensor) -> torch.Tensor:
    """The k3 estimate of KL(policy || reference) per token: exp(d) - d - 1, d = log p_reference - log p_policy.

    Tokens must come from the policy; unbiased and never negative (Schulman 2020, "Approximating KL divergence").
    """
    d = reference_log_prob - log_prob
    return d.exp() - d - 1


def gap_statistics(trainer_log_prob, sampler_log_prob, mask, cap: float = 2.0) -> dict[str, float]:
    """The sampler-trainer gap over response tokens, of difference d = log p_trainer - log p_sampler and ratio exp(d).

    mean, p99 and max of |d| in nats; outside_10: share of tokens whose ratio is not in [0.9, 1.1]; capped: share whose
    ratio exceeds `cap`; k3: estimate of KL(sampler || trainer). All NaN where the mask leaves no token.
    """
    trainer, sampler = trainer_log_prob.detach()[mask].double(), sampler_log_prob[mask].double()
    if not (count := len(trainer)):
        return dict.fromkeys(("mean", "p99", "max", "outside_10", "capped", "k3"), math.nan)
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
