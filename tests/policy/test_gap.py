"""Sampler against trainer in half precision: the same bits where the order of sums is the same, little else besides."""

import pytest
import torch
import torch.nn.functional as F

from azr.models import model_path
from azr.policy.cpu_attention import ByPage
from azr.policy.policy import LoraSettings, Policy, Sampling
from random_weights import with_values_in_B

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
BASES = pytest.mark.parametrize("quantization", ["none", "nf4"])


def load(quantization: str = "none", dtype=torch.bfloat16) -> Policy:
    policy = Policy.load(model_path("tiny"), quantization, LoraSettings(rank=8, alpha=16), dtype=dtype, device="cpu")
    return with_values_in_B(policy, 0.05)


def texts(count: int) -> list[list[int]]:
    return [[1 + (i * 31 + j * 7) % 300 for j in range(30)] for i in range(count)]


@HALF
@BASES
def test_with_the_trainers_attention_the_sampler_computes_the_trainers_bits(dtype, quantization):
    """Norms, rotary, LoRA, SwiGLU and the residual: one rounding at another place would change most of the bits."""
    policy = load(quantization, dtype)
    decoder, ids = policy.engine.decoder, torch.tensor(texts(4))
    rows, time = ids.shape
    cache, position = torch.zeros(2, 8, 32, decoder.kv_heads, decoder.head_dim, dtype=dtype), torch.arange(time)

    def attend(layer, q, k, v, cos, sin, scale):
        where = torch.arange(rows).repeat_interleave(time), position.repeat(rows)
        q, k = decoder.ops.rotate_store(q, k, v, cos, sin, cache, *where)
        q, k, v = (t.reshape(rows, time, -1, decoder.head_dim).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    policy.model.eval()
    with torch.no_grad():
        decoder.prepare("stored", time)
        ours = decoder.forward(ids.flatten(), position.repeat(rows), attend)
        decoder.release()
        theirs = policy.backbone(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    assert ours.dtype == theirs.dtype == dtype
    # In fp16 LoRA's product with zeros between the blocks of its B adds in another order: 17 % on the CPU of its author
    assert (ours != theirs).float().mean() < 0.3


@HALF
def test_attention_by_page_rounds_where_sdpa_rounds(dtype):
    """Scores stay in fp32, probabilities are rounded before the product; SDPA's own exp leaves a few per cent."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(8, 4, 1 + 40 * later, 32, generator=generator).to(dtype) for later in (0, 1, 1))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(1, 41, dtype=torch.bool))[:, :, 0]
    pages = torch.zeros(2, 17, 32, 4, 32, dtype=dtype)
    for part, values in zip(pages, (k, v)):
        part[1:].view(8, 64, 4, 32)[:, :41] = values.transpose(1, 2)
    table, lengths = torch.arange(1, 17).view(8, 2), torch.full((8,), 41)
    by_head = pages.transpose(2, 3).flatten(1, 2)
    got = ByPage(table, lengths, 32, 4, 4, 32)(q[:, :, 0], *by_head, 32**-0.5)
    assert (got != expected).float().mean() < 0.2  # with scores rounded too: 0.6


def sampled_gap(policy: Policy) -> tuple[float, float]:
    """(mean |log p of the sampler - of the trainer|, share with a ratio outside [0.9, 1.1]) of about 1,000 tokens."""
    prompts = texts(24)
    seeds = [[9 * i, 9 * i + 1] for i in range(24)]
    out = policy.generate(prompts, 2, Sampling(max_new_tokens=24, stop=()), seeds)
    flat = [(prompt, c) for prompt, row in zip(prompts, out) for c in row]
    scores, _ = policy.score_lists([prompt for prompt, _ in flat], [c.ids for _, c in flat])
    gap = torch.tensor([b - a for (_, c), row in zip(flat, scores) for a, b in zip(c.log_probs, row)])
    assert len(gap) > 500
    return gap.abs().mean().item(), ((gap.exp() - 1).abs() > 0.1).float().mean().item()


@BASES
def test_gap_in_bf16_stays_below_what_it_was(quantization):
    """On this base: .0077 and .0086 nats. On the one before it 5e-3, and 9.8e-3 with a residual stream in bf16 and
    roundings at other places: a base that is surer of its tokens has larger logits, which bf16 rounds more."""
    mean, outside = sampled_gap(load(quantization))
    assert mean < 0.012 and outside < 0.01


def test_gap_in_fp16_is_several_times_smaller():
    """Below .0015 nats on one kind of CPU (Zen 3), .00153 on another (Zen 5)."""
    mean, outside = sampled_gap(load(dtype=torch.float16))
    assert mean < 1.6e-3 and outside == 0


def test_the_residual_is_fp32_in_half_precision_only():
    seen = []
    for dtype in (torch.bfloat16, torch.float32):
        policy = load(dtype=dtype)
        layers = policy.backbone.layers
        hooks = [
            part.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
            for part in (layers[-1].input_layernorm, layers[-1].mlp)
        ]
        again = Policy(policy.model, policy.tokenizer, policy.info, policy.eos_ids)  # hooks are not added twice
        again.score_lists(texts(1), [[5, 6]])
        for hook in hooks:
            hook.remove()
        assert getattr(again.backbone, "residual_in_fp32", False) == (dtype != torch.float32)
    assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.float32]


def test_recomputed_layers_give_the_same_gradient_in_bf16():
    policy, gradients = load(), []
    for recompute in (False, True):
        policy.checkpoint_activations(recompute)
        for p in policy.trainable_parameters():
            p.grad = None
        for scored in policy.score(texts(2), [[5, 6, 7], [8, 9]], with_grad=True):
            (scored.log_prob * scored.mask).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable_parameters()]))
    assert gradients[0].abs().sum() > 0 and torch.equal(*gradients)
