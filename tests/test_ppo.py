"""Advantages, loss weights and diagnostics against hand-computed values and their defining properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from azr.train import ppo


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_lean_advantages_by_hand():
    rewards = tensor(1, -0.5, 1, 1, -1, -0.5)
    tasks = torch.tensor([0, 0, 1, 1, 2, 2])
    modes = torch.tensor([0, 0, 0, 0, 1, 1])
    std_0, std_1 = rewards[:4].std().item(), rewards[4:].std().item()
    expected = [0.75 / std_0, -0.75 / std_0, 0, 0, -0.25 / std_1, 0.25 / std_1]
    assert ppo.lean_advantages(rewards, tasks, modes).tolist() == pytest.approx(expected, rel=1e-6)


def test_proposer_advantages_by_hand():
    rewards = tensor(-1, 0.5, 0.25, 0.7, 0.7, -1)
    modes = torch.tensor([2, 2, 2, 0, 0, 1])
    a = ppo.proposer_advantages(rewards, modes)
    assert a[:3].tolist() == pytest.approx(((rewards[:3] - rewards[:3].mean()) / rewards[:3].std()).tolist(), rel=1e-5)
    assert a[3:].tolist() == [0, 0, 0]  # no variance; a single proposal


def test_trr_is_whitening_over_tokens():
    rewards, lengths = tensor(1, -0.5, -1, 0.25, -1), torch.tensor([3, 10, 1, 7, 5])
    group = torch.tensor([4, 4, 4, 1, 1])
    a = ppo.trr_advantages(rewards, lengths, group)
    for g in (4, 1):
        rows = group == g
        tokens = rewards[rows].repeat_interleave(lengths[rows])  # the reward written on every token
        expected = (tokens - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
        assert torch.allclose(a[rows].repeat_interleave(lengths[rows]), expected, atol=1e-5)
        assert (a[rows] * lengths[rows]).sum().item() == pytest.approx(0, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.floats(-2, 2, allow_nan=False), st.integers(1, 9))
def test_groups_without_variance_give_exactly_zero(reward, count):
    rewards, ids = torch.full((count,), reward), torch.zeros(count, dtype=torch.int64)
    lengths = torch.arange(count) * 3
    assert not ppo.lean_advantages(rewards, ids, ids).any()
    assert not ppo.proposer_advantages(rewards, ids).any()
    assert not ppo.trr_advantages(rewards, lengths, ids).any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1.0, -0.5, -1.0]), st.integers(0, 5)), min_size=1), st.randoms())
def test_advantages_do_not_depend_on_the_order(samples, rng):
    rewards, tasks = torch.tensor([s[0] for s in samples]), torch.tensor([s[1] for s in samples])
    modes, lengths = tasks % 3, torch.tensor([rng.randint(1, 30) for _ in samples])
    order = torch.tensor(rng.sample(range(len(samples)), len(samples)))
    for f in (lambda o: ppo.lean_advantages(rewards[o], tasks[o], modes[o]),
              lambda o: ppo.proposer_advantages(rewards[o], modes[o]),
              lambda o: ppo.trr_advantages(rewards[o], lengths[o], modes[o])):
        assert torch.allclose(f(torch.arange(len(samples)))[order], f(order), atol=1e-5)
    lean = ppo.lean_advantages(rewards, tasks, modes)
    for task in tasks.unique():
        assert lean[tasks == task].sum().item() == pytest.approx(0, abs=1e-4)


def test_ppo_loss_and_its_gradient():
    old = torch.zeros(6)
    log_prob = tensor(1.0, 1.3, 0.7, 1.3, 0.7, 1.0).log().requires_grad_()
    advantage = tensor(2, 2, 2, -2, -2, -2)
    loss = ppo.ppo_token_loss(log_prob, old, advantage, 0.2, 0.2)
    assert loss.tolist() == pytest.approx([-2, -2.4, -1.4, 2.6, 1.6, 2], rel=1e-5)
    loss.sum().backward()
    assert log_prob.grad.tolist() == pytest.approx([-2, 0, -1.4, 2.6, 0, 2], rel=1e-5)  # 0 where the clip holds
    assert ppo.clipped(log_prob, old, advantage).tolist() == [False, True, False, False, True, False]
    assert ppo.ppo_token_loss(log_prob, old, advantage, 0.2, 0.28)[1].item() == pytest.approx(-2.56, rel=1e-5)
    mask = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool)
    assert ppo.clip_fraction(log_prob, old, advantage, mask) == 0.25
    assert ppo.clip_fraction(log_prob, old, advantage, mask & False) == 0


def test_group_weights_leave_the_others_alone():
    group, lengths = torch.tensor([0, 0, 3, 5]), torch.tensor([2, 6, 5, 20])
    weight = ppo.token_weights(group, lengths)
    assert weight.tolist() == pytest.approx([1 / 48, 1 / 48, 1 / 30, 1 / 120])
    assert (weight * lengths).sum().item() == pytest.approx(3 / 6)  # three of six groups have tokens
    without = ppo.token_weights(group[:3], lengths[:3])
    assert without.tolist() == weight[:3].tolist()
    dropped = ppo.token_weights(group, lengths, group_weight=torch.tensor([1, 1, 1, 0, 1, 1]) / 6)
    assert dropped.tolist() == pytest.approx([1 / 48, 1 / 48, 0, 1 / 120])
    assert ppo.group_token_counts(group, lengths).tolist() == [8, 0, 0, 5, 0, 20]
    assert ppo.token_weights(group, lengths, "token").tolist() == pytest.approx([1 / 33] * 4)
    with pytest.raises(ValueError, match="group or token"):
        ppo.token_weights(group, lengths, "sample")


def test_weighted_sum_ignores_padding_and_its_gradient():
    values = torch.tensor([[1.0, 2.0, float("nan")], [3.0, float("inf"), float("-inf")]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    total = ppo.weighted_sum(values, tensor(0.5, 2), mask)
    assert total.item() == pytest.approx(7.5)
    total.backward()
    assert values.grad.tolist() == [[0.5, 0.5, 0], [2, 0, 0]]


def test_importance_weight_is_truncated_and_detached():
    old = tensor(0, -1, -1, -3).requires_grad_()
    weight = ppo.importance_weight(old, tensor(0, -1.2, -9, -1), cap=2.0)
    assert weight.tolist() == pytest.approx([1, math.exp(0.2), 2, math.exp(-2)], rel=1e-5)
    assert not weight.requires_grad


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
    assert ppo.gap_statistics(trainer, sampler, mask & False) == dict.fromkeys(stats, 0.0)


def test_the_gap_as_a_distribution():
    """Differences of -0.02 to +0.02, and four of a hundred beyond: two ratios below 0.9, two above 1.1."""
    gap = torch.cat([torch.linspace(-0.02, 0.02, 96), tensor(-0.11, -0.5, 0.1, 0.3)])
    stats = ppo.gap_statistics(gap - 1, torch.full_like(gap, -1.0), torch.ones_like(gap, dtype=torch.bool))
    assert stats["outside_10"] == pytest.approx(0.04) and stats["capped"] == 0
    assert stats["p99"] == pytest.approx(0.3, rel=1e-5) and stats["max"] == pytest.approx(0.5)
    inside = tensor(math.log(0.91), math.log(1.09))
    assert ppo.gap_statistics(inside, inside * 0, inside < 9)["outside_10"] == 0
