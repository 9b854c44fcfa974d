"""Packed scoring: every token sees its own sequence and nothing else, and attention over the tree is attention."""

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from azr.models import model_path
from azr.policy import tree_attention
from azr.policy.packing import LEAST, Segment, pack, packed_batches
from azr.policy.policy import LoraSettings, Policy
from azr.policy.tree_attention import Tree, attend, pieces


def samples(seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses that have much, little and nothing in common, some equal, one empty, one a prefix."""
    rng = random.Random(seed)

    def words(least: int, most: int) -> list[int]:
        return [rng.randrange(9) for _ in range(rng.randint(least, most))]

    heads = [[], words(LEAST + 5, 40), words(2, LEAST - 2)]
    prompts = [p for head in heads for p in [head + words(1, 60) for _ in range(3)] for _ in range(4)]
    responses = [words(0, 130 if i % 5 == 0 else 25) for i in range(len(prompts))]
    responses[5] = responses[4]
    prompts += [prompts[4] + responses[4], [3], [3]]
    responses += [words(3, 3), [1], []]
    order = rng.sample(range(len(prompts)), len(prompts))
    return [prompts[i] for i in order], [responses[i] for i in order]


def sees(segments: list[Segment]) -> torch.Tensor:
    """(tokens, tokens) bool: what the docstring of Segment says."""
    seen = torch.zeros(2 * [max(s.last for s in segments)], dtype=torch.bool)
    for first, end, last in segments:
        seen[first:end, first:end] = torch.ones(end - first, end - first, dtype=torch.bool).tril()
        seen[end:last, first:end] = True
    return seen


@pytest.mark.parametrize("seed", range(5))
def test_a_state_sees_its_own_sequence_up_to_itself(seed):
    prompts, responses = samples(seed)
    packed = pack(prompts, responses)
    seen = sees(packed.segments)
    for prompt, response, states in zip(prompts, responses, packed.states):
        assert len(states) == len(response)
        for t, state in enumerate(states):
            before = seen[state].nonzero()[:, 0]
            assert packed.ids[before].tolist() == (prompt + response)[: len(prompt) + t]
            assert packed.place[before].tolist() == list(range(len(before)))


def test_what_is_equal_is_laid_out_once():
    head, tails = [1] * LEAST, [[2], [3]]
    assert pack([head + t for t in tails], [[5, 6], [5, 6]]).ids.tolist() == [*head, 2, 5, 3, 5]
    assert len(pack([head[1:] + t for t in tails], [[5], [5]]).ids) == 2 * LEAST  # too little to be shared
    assert len(pack([head] * 3, [[5, 6, 7], [5, 6, 7], [5, 6]]).ids) == LEAST + 2


@pytest.mark.parametrize("budget", [1, 60, 150, 10_000])
def test_micro_batches_hold_what_they_may_and_everything_once(budget):
    prompts, responses = samples(0)
    batches = packed_batches(prompts, responses, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(prompts)))
    sizes = [len(pack([prompts[i] for i in b], [responses[i] for i in b]).ids) for b in batches]
    assert all(
        size <= budget or len(set(prompts[i] == prompts[b[0]] for i in b)) == 1 for size, b in zip(sizes, batches)
    )
    alone = {i: len(prompts[i]) + max(0, len(responses[i]) - 1) for i in range(len(prompts))}
    assert all(size <= max(budget, max(alone[i] for i in b)) for size, b in zip(sizes, batches))
    assert sum(sizes) < sum(alone.values()) or budget == 1


def test_long_segments_are_chains():
    assert pieces(Segment(10, 20, 50)) == [Segment(10, 20, 50)]
    chain = pieces(Segment(5, 5 + 2 * tree_attention.PIECE + 1, 400))
    assert len(chain) == 3 and {s.last for s in chain} == {400} and chain[-1].end == 5 + 2 * tree_attention.PIECE + 1
    assert all(a.end == b.first for a, b in zip(chain, chain[1:]))
    assert max(s.end - s.first for s in chain) <= tree_attention.PIECE


@pytest.mark.parametrize(
    "heads, kv_heads, dtype", [(4, 2, torch.float32), (3, 3, torch.float32), (6, 2, torch.bfloat16)]
)
def test_attention_over_the_tree_is_masked_attention(heads, kv_heads, dtype):
    packed = pack(*samples(1))
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, n, len(packed.ids), 16, generator=generator).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads, heads)
    )
    out, _ = attend(None, q, k, v, None, 16**-0.5, tree=Tree(packed.segments, heads // kv_heads, dtype))
    ours = torch.autograd.grad(out, (q, k, v), grad.transpose(1, 2))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in exact[1:])
    expected = scaled_dot_product_attention(exact[0], k, v, attn_mask=sees(packed.segments))
    theirs = torch.autograd.grad(expected, exact, grad.double())
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    for a, b in zip((out, *ours), (expected.transpose(1, 2), *theirs)):
        assert (a - b).norm() / b.norm() < bound


def test_attention_without_a_tree_is_what_it_was():
    policy = Policy.load(model_path("tiny"), "none", LoraSettings(4, 8), device="cpu")
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        ours = policy.model(input_ids=ids, attention_mask=mask).logits
        policy.base.set_attn_implementation("eager")
        eager = policy.model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(ours[0, 2:], eager[0, 2:], atol=1e-5) and torch.allclose(ours[1], eager[1], atol=1e-5)


def test_the_last_layer_computes_what_is_asked_for_and_nothing_else():
    policy = Policy.load(model_path("tiny"), "none", LoraSettings(4, 8), device="cpu")
    seen = []
    policy.backbone.layers[-1].mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    ids, asked = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), torch.tensor([1, 3, 6])
    with torch.no_grad():
        whole = policy.backbone(input_ids=ids).last_hidden_state.flatten(0, 1)
        part = policy.backbone(input_ids=ids, asked=asked).last_hidden_state
    assert torch.allclose(part[0], whole[asked], atol=1e-6) and part.shape[:2] == (1, 3)
    assert [tuple(shape[:2]) for shape in seen] == [(2, 4), (1, 3)]


def test_a_state_that_predicts_many_tokens_has_one_gradient():
    """Equal answers share their states; with two threads the gradient of one is still a sum in one order."""
    policy = Policy.load(model_path("tiny"), "none", lora=LoraSettings(), device="cpu")
    with torch.no_grad():  # or A has no gradient
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    prompt, response = policy.encode("User: solve deduction\n"), policy.encode("p=5+3=8;q=max(8, 9)=9;r=9+9=18;")
    weights, threads = [p for p in policy.model.parameters() if p.requires_grad], torch.get_num_threads()
    # different weights of the samples, or the order would not matter
    share = torch.linspace(0.1, 1.7, 64)[:, None]

    def gradient():
        policy.model.zero_grad()
        for part in policy.score([prompt] * 64, [response] * 64, with_grad=True):
            (share[part.indices] * part.log_prob * part.mask).sum().backward()
        return torch.cat([p.grad.flatten() for p in weights])

    try:
        torch.set_num_threads(2)
        first = gradient()
        assert first.norm() > 0 and all(torch.equal(gradient(), first) for _ in range(10))
    finally:
        torch.set_num_threads(threads)
