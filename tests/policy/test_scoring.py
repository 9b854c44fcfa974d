"""Chunked log-probs against the naive form: values, gradients, vocabulary blocks, tied and untied heads, bf16."""

import pytest
import torch

from azr.policy import scoring
from azr.policy.scoring import ChunkedLogProb, head_logits


def naive(hidden, weight, target, temperature=1.0):
    log_p = (hidden @ weight.t() / temperature).log_softmax(-1)
    return log_p.gather(-1, target[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def case(rows=300, width=32, words=500, dtype=torch.float32, scale=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(words, width, generator=generator) * scale).to(dtype)
    return (
        hidden,
        weight,
        torch.randint(0, words, (rows,), generator=generator),
        torch.randn(2, rows, generator=generator),
    )


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("block, chunk", [(64, 128), (64, None), (1, 300), (4096, 1), (499, 7)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_cut_gives_the_naive_values_and_gradients(monkeypatch, block, chunk, temperature):
    monkeypatch.setitem(scoring.BLOCK, "cpu", block)
    hidden, weight, target, (g_y, g_h) = case(rows=60)
    expected = naive(hidden.double(), weight.double(), target, temperature)
    for use_y, use_h, trained in (
        (1, 0, False),
        (0, 1, False),
        (1, 1, False),
        (1, 0, True),
        (0, 1, True),
        (1, 1, True),
    ):
        a, b = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        head, theirs_head = weight.clone().requires_grad_(trained), weight.double().requires_grad_(trained)
        ours = ChunkedLogProb.apply(a, head, target, temperature, chunk)
        for x, y in zip(ours, expected):
            assert torch.allclose(x.double(), y, atol=1e-5)
        theirs = naive(b, theirs_head, target, temperature)
        for (log_prob, entropy), hidden_ in ((ours, a), (theirs, b)):
            parts = [(log_prob * g_y).sum()] * use_y + [(entropy * g_h).sum()] * use_h
            sum(parts).backward()
        assert relative(a.grad, b.grad) < 1e-5
        assert not trained or relative(head.grad, theirs_head.grad) < 1e-5


def test_a_confident_row_keeps_its_small_gradient():
    """p(y) = 1 - 1e-6: the gradient is a difference of nearly equal vectors unless the target is kept apart."""
    hidden, weight, target, _ = case(rows=20, words=50, scale=1.0)
    hidden = 14.0 * torch.nn.functional.normalize(weight[target], dim=1)  # towards the target's own vector
    a, b = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    log_prob, _ = ChunkedLogProb.apply(a, weight, target)
    expected, _ = naive(b, weight.double(), target)
    confident = expected.detach() > -1e-3
    assert confident.sum() > 5 and (log_prob <= 0).all()
    log_prob.sum().backward()
    expected.sum().backward()
    assert relative(a.grad[confident], b.grad[confident]) < 1e-3
    assert torch.allclose(log_prob.double()[confident], expected[confident], rtol=1e-3, atol=1e-9)


def test_extreme_logits_stay_finite():
    weight = torch.eye(4) * 1e4
    hidden = torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0]], requires_grad=True)
    log_prob, entropy = ChunkedLogProb.apply(hidden, weight, torch.tensor([0, 0, 1]))
    (log_prob.sum() + entropy.sum()).backward()
    assert log_prob.tolist() == pytest.approx([0, -1e4 - 1.0986123, -1.3862944])
    assert entropy.tolist() == pytest.approx([0, 1.0986123, 1.3862944], abs=1e-6)
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
def test_bf16_hidden_and_head(monkeypatch, tied):
    """Within 1e-4 of the naive gradient in fp32 of the same numbers, rounded to bf16 once as ours is.

    tied: the hidden states are rows of the head's own table, as of a model whose head is its embedding.
    """
    monkeypatch.setitem(scoring.BLOCK, "cpu", 256)
    hidden, weight, target, (g, _) = case(words=2000, width=64, dtype=torch.bfloat16, scale=0.2)
    if tied:
        hidden = weight[torch.randint(0, 2000, (300,), generator=torch.Generator().manual_seed(1))] * 8
    a, b = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    log_prob, entropy = ChunkedLogProb.apply(a, weight, target)
    expected, expected_entropy = naive(b, weight.double(), target)
    assert torch.allclose(log_prob.double(), expected, atol=1e-5)
    assert torch.allclose(entropy.double(), expected_entropy, atol=1e-5)
    (log_prob * g).sum().backward()
    (expected * g).sum().backward()
    assert a.grad.dtype == torch.bfloat16
    assert relative(a.grad, b.grad.bfloat16()) < 1e-4


def test_what_is_not_needed_is_not_computed_and_a_second_backward_is_refused():
    hidden, weight, target, _ = case(rows=5)
    log_prob, entropy = ChunkedLogProb.apply(hidden, weight, target)
    assert not log_prob.requires_grad and not entropy.requires_grad
    leaf = hidden.clone().requires_grad_()
    log_prob, _ = ChunkedLogProb.apply(leaf, weight, target)
    log_prob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        log_prob.sum().backward()
    log_prob, entropy = ChunkedLogProb.apply(torch.zeros(0, 32, requires_grad=True), weight, target[:0])
    (log_prob.sum() + entropy.sum()).backward()
    assert log_prob.shape == entropy.shape == (0,)


def test_head_logits_are_fp32():
    hidden, weight, _, _ = case(rows=3, dtype=torch.bfloat16)
    z = head_logits(hidden, weight)
    assert z.dtype == torch.float32 and torch.allclose(z, hidden.float() @ weight.float().t(), atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("words", [500, 40_000])
def test_on_a_gpu_in_bf16(words):
    hidden, weight, target, (g, g_h) = case(words=words, width=64, dtype=torch.bfloat16, scale=0.2)
    a, b = hidden.cuda().requires_grad_(), hidden.double().requires_grad_()
    log_prob, entropy = ChunkedLogProb.apply(a, weight.cuda(), target.cuda())
    expected, expected_entropy = naive(b, weight.double(), target)
    assert torch.allclose(log_prob.cpu().double(), expected, atol=1e-4)
    ((log_prob * g.cuda()).sum() + 0.1 * (entropy * g_h.cuda()).sum()).backward()
    ((expected * g).sum() + 0.1 * (expected_entropy * g_h).sum()).backward()
    assert relative(a.grad.cpu(), b.grad.bfloat16()) < 2e-4
