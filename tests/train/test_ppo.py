"""Advantages, loss weights and diagnostics against hand-computed values and their defining properties."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_azr
from azr.policy.sampling import Completion
from azr.tasks import Sample
from azr.train import ppo
from azr.train.arms import Arm, Arms
from azr.train.update import Batch


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def sample(role: str, mode: str, reward: float, group: str = "", tokens: int = 1) -> Sample:
    return Sample(role, mode, "", [1], Completion([0] * tokens, [], "stop"), "", group, reward=reward)


def advantages(samples: list[Sample], recipe: str = "lean") -> list[float]:
    train_azr.set_advantages(samples, recipe)
    return [x.advantage for x in samples]


def test_solver_advantages_by_hand():
    rewards, tasks = tensor(1, -0.5, 1, 1, -1, -0.5), "aabbcc"
    modes = ["deduction"] * 4 + ["abduction"] * 2
    std_0, std_1 = rewards[:4].std().item(), rewards[4:].std().item()
    expected = [0.75 / std_0, -0.75 / std_0, 0, 0, -0.25 / std_1, 0.25 / std_1]
    samples = [sample("solver", mode, r, task) for mode, r, task in zip(modes, rewards.tolist(), tasks)]
    assert advantages(samples) == pytest.approx(expected, rel=1e-6)


def test_proposer_advantages_by_hand():
    rewards = tensor(-1, 0.5, 0.25, 0.7, 0.7, -1)
    modes = ["induction"] * 3 + ["deduction"] * 2 + ["abduction"]
    a = advantages([sample("proposer", mode, r, str(i)) for i, (mode, r) in enumerate(zip(modes, rewards.tolist()))])
    assert a[:3] == pytest.approx(((rewards[:3] - rewards[:3].mean()) / rewards[:3].std()).tolist(), rel=1e-5)
    assert a[3:] == [0, 0, 0]  # no variance; a single proposal


def test_the_published_advantages_are_whitened_over_tokens():
    rewards, lengths = tensor(1, -0.5, -1, 0.25, -1), torch.tensor([3, 10, 1, 7, 5])
    roles = ["solver"] * 3 + ["proposer"] * 2
    a = torch.tensor(
        advantages(
            [sample(role, "deduction", r, "", n) for role, r, n in zip(roles, rewards.tolist(), lengths.tolist())],
            "azr",
        )
    )
    for rows in (slice(0, 3), slice(3, 5)):
        tokens = rewards[rows].repeat_interleave(lengths[rows])  # the reward written on every token
        expected = (tokens - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
        assert torch.allclose(a[rows].repeat_interleave(lengths[rows]), expected, atol=1e-5)
        assert (a[rows] * lengths[rows]).sum().item() == pytest.approx(0, abs=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(-2, 2, allow_nan=False), st.integers(1, 9))
def test_groups_without_variance_give_exactly_zero(reward, count):
    for role, recipe in (("solver", "lean"), ("proposer", "lean"), ("solver", "azr")):
        assert not any(advantages([sample(role, "deduction", reward, "g", 3 * i) for i in range(count)], recipe))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([1.0, -0.5, -1.0]), st.integers(0, 5)), min_size=1), st.randoms())
def test_advantages_do_not_depend_on_the_order(rows, rng):
    modes = ("deduction", "abduction", "induction")
    order = rng.sample(range(len(rows)), len(rows))
    for role, recipe in (("solver", "lean"), ("proposer", "lean"), ("solver", "azr")):
        samples = [sample(role, modes[task % 3], reward, str(task), task + 1) for reward, task in rows]
        straight = advantages(samples, recipe)
        shuffled = advantages([samples[i] for i in order], recipe)
        assert [straight[i] for i in order] == pytest.approx(shuffled, abs=1e-5)
        if (role, recipe) == ("solver", "lean"):
            for task in {task for _, task in rows}:
                mine = [value for value, (_, other) in zip(straight, rows) if other == task]
                assert sum(mine) == pytest.approx(0, abs=1e-4)


def batch(log_prob, old, advantage, sampler=None, weight=None, mask=None) -> Batch:
    """A micro-batch of one token per sample unless the tensors are (batch, time)."""
    log_prob, old = (x if x.dim() == 2 else x[:, None] for x in (log_prob, old))
    mask = torch.ones_like(old, dtype=torch.bool) if mask is None else mask
    weight = torch.ones(len(old)) if weight is None else weight
    sampler = old if sampler is None else sampler.reshape(old.shape)
    own = torch.ones(len(old), 1, dtype=torch.bool)
    return Batch([], log_prob, torch.zeros_like(old), mask, old, sampler, advantage[:, None], weight, own)


class WiderClip(Arm):
    def __init__(self, low, high):
        self.bounds = low, high

    def clip(self, low, high):
        return self.bounds


def losses(part: Batch, *arms) -> list[float]:
    """The loss of each sample, by giving all others no weight."""
    s = train_azr.State(None, None, None, arms=Arms(arms))
    rows = torch.eye(len(part.weight)) * part.weight
    return [train_azr.ppo_loss(s, dataclasses.replace(part, weight=row)).item() for row in rows]


def test_ppo_loss_and_its_gradient():
    old = torch.zeros(6)
    log_prob = tensor(1.0, 1.3, 0.7, 1.3, 0.7, 1.0).log().requires_grad_()
    advantage = tensor(2, 2, 2, -2, -2, -2)
    part = batch(log_prob, old, advantage)
    assert losses(part) == pytest.approx([-2, -2.4, -1.4, 2.6, 1.6, 2], rel=1e-5)
    train_azr.ppo_loss(train_azr.State(None, None, None), part).backward()
    assert log_prob.grad.tolist() == pytest.approx([-2, 0, -1.4, 2.6, 0, 2], rel=1e-5)  # 0 where the clip holds
    assert ppo.clipped(log_prob, old, advantage).tolist() == [False, True, False, False, True, False]
    assert losses(part, WiderClip(0.2, 0.28))[1] == pytest.approx(-2.56, rel=1e-5)


def test_group_weights_leave_the_others_alone():
    groups = [("proposer", "deduction", 2), ("proposer", "deduction", 6), ("solver", "deduction", 5)]
    samples = [sample(role, mode, 0.0, "", n) for role, mode, n in [*groups, ("solver", "induction", 20)]]
    weight = train_azr.token_weights(samples)
    assert weight == pytest.approx([1 / 48, 1 / 48, 1 / 30, 1 / 120])
    shares = [w * len(x.completion.ids) for w, x in zip(weight, samples)]
    assert sum(shares) == pytest.approx(3 / 6)  # three of six groups have tokens
    assert train_azr.token_weights(samples[:3]) == weight[:3]
    maths = [*samples, sample("solver", "math", 0.0, "", 10)]  # a seventh group of the same weight
    assert train_azr.token_weights(maths)[-1] == pytest.approx(1 / 70)


def test_the_loss_is_a_weighted_sum_that_ignores_padding_and_its_gradient():
    old = torch.zeros(2, 3)
    log_prob = torch.tensor([[0.0, 0.0, float("nan")], [0.0, float("inf"), float("-inf")]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    part = batch(log_prob, old, tensor(-1, -3), weight=tensor(0.5, 2), mask=mask)
    total = train_azr.ppo_loss(train_azr.State(None, None, None), part)
    assert total.item() == pytest.approx(0.5 * 2 + 2 * 3)
    total.backward()
    assert log_prob.grad[mask].tolist() == [0.5, 0.5, 6]


def test_the_gap_between_sampler_and_trainer_is_a_truncated_weight():
    """The old log-probs are the trainer's: the weight is exp(old - sampler), at most 2, and has no gradient."""
    old, sampler = tensor(0, -1, -1, -3), tensor(0, -1.2, -9, -1)
    log_prob = old.clone().requires_grad_()
    part = batch(log_prob, old, tensor(1, 1, 1, 1), sampler)
    expected = [1, math.exp(0.2), 2, math.exp(-2)]
    assert losses(part) == pytest.approx([-w for w in expected], rel=1e-5)
    train_azr.ppo_loss(train_azr.State(None, None, None), part).backward()
    assert log_prob.grad.tolist() == pytest.approx([-w for w in expected], rel=1e-5)


def test_k3_estimates_the_kl_divergence():
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.randn(2, 20, generator=generator) * 0.5).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    drawn = torch.multinomial(log_p.exp(), 200_000, replacement=True, generator=generator)
    k3 = ppo.kl_k3(log_p[drawn], log_q[drawn])
    assert k3.min() >= 0 and k3.mean().item() == pytest.approx(kl.item(), abs=5 * k3.std().item() / 200_000**0.5)


def test_gap_statistics():
    trainer, sampler = torch.tensor([[-1.0, -2.0, 9.0]]), torch.tensor([[-1.1, -4.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    stats = ppo.gap_statistics(trainer, sampler, mask)
    assert stats["mean"] == pytest.approx(1.05) and stats["max"] == pytest.approx(2.0) and stats["capped"] == 0.5
    assert stats["k3"] == pytest.approx((math.exp(0.1) - 1.1 + math.exp(2) - 3) / 2, rel=1e-5)
    none = ppo.gap_statistics(trainer, sampler, mask & False)
    assert none.keys() == stats.keys() and all(map(math.isnan, none.values()))


def test_the_gap_as_a_distribution():
    """Differences of -0.02 to +0.02, and four of a hundred beyond: two ratios below 0.9, two above 1.1."""
    gap = torch.cat([torch.linspace(-0.02, 0.02, 96), tensor(-0.11, -0.5, 0.1, 0.3)])
    stats = ppo.gap_statistics(gap - 1, torch.full_like(gap, -1.0), torch.ones_like(gap, dtype=torch.bool))
    assert stats["outside_10"] == pytest.approx(0.04) and stats["capped"] == 0
    assert stats["p99"] == pytest.approx(0.3, rel=1e-5) and stats["max"] == pytest.approx(0.5)
    inside = tensor(math.log(0.91), math.log(1.09))
    assert ppo.gap_statistics(inside, inside * 0, inside < 9)["outside_10"] == 0
