"""Parts kernels and gap: every kernel against float64, the trainer's log-probs against the sampler's."""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F

from azr.policy.attention import PAGE_SIZE, paged_decode, unusable
from gpu.bench import Bench, prompts_of

HEADS = ((16, 2, 128), (28, 4, 128), (9, 3, 64), (14, 2, 64), (32, 32, 128))  # 3B, 7B, SmolLM2, 0.5B, no groups
LENGTHS = (1, 63, 64, 65, 256, 257, 600, 2500, 5000)
MOST = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 1e-5}  # relative, of rounding alone


def kernels(bench: Bench) -> None:
    dtypes = (torch.float32,) if bench.cpu else (torch.bfloat16, torch.float16)
    for backend in ("triton", "flash", "sdpa"):
        for dtype in dtypes:
            name = f"attention {backend} {str(dtype)[6:]}"
            case = (backend, dtype)
            bench.measure(name, lambda case=case: attention(bench, *case), 8, "attention against float64")
    bench.measure("NF4 products", lambda: nf4_products(bench), 6, "NF4 product")
    bench.measure("ChunkedLogProb", lambda: chunked(bench), 5, "ChunkedLogProb against float64")
    bench.measure("gradient of a policy", lambda: gradient(bench), 15, "gradient")


def paged(bench: Bench, lengths, heads, kv_heads, dim, page, dtype, seed=0):
    """Arguments of `paged_decode`: pages out of order, what lies beyond a sequence is NaN."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts), generator=generator).add(1).tolist()
    table = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
    pages = torch.full((2, sum(counts) + 1, page, kv_heads, dim), float("nan"), device=bench.device, dtype=dtype)
    made = torch.Generator(bench.device).manual_seed(seed)
    for row, (count, n) in enumerate(zip(counts, lengths)):
        mine = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(mine, dtype=torch.int32)
        values = torch.randn(2, count * page, kv_heads, dim, generator=made, device=bench.device).to(dtype)
        values[:, n:] = float("nan")
        pages[:, mine] = values.view(2, count, page, kv_heads, dim)
    q = torch.randn(len(lengths), heads, dim, generator=made, device=bench.device).to(dtype)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=bench.device)
    return q, pages[0], pages[1], table.to(bench.device), lengths, dim**-0.5


def float64_attention(q, k_pages, v_pages, table, lengths, scale):
    rows = []
    for row, n in enumerate(lengths.tolist()):
        pages = table[row][table[row] >= 0].long()
        k, v = (
            t[pages].flatten(0, 1)[:n].double().repeat_interleave(q.shape[1] // t.shape[2], 1)
            for t in (k_pages, v_pages)
        )
        p = (torch.einsum("hd,nhd->hn", q[row].double(), k) * scale).softmax(-1)
        rows.append(torch.einsum("hn,nhd->hd", p, v))
    return torch.stack(rows)


def attention(bench: Bench, backend: str, dtype) -> dict:
    """The largest relative error (norm by norm) over lengths and groups of heads."""
    if reason := unusable(backend, torch.device(bench.device), dtype, 16, 2, 128):
        expected = backend == "flash" or (bench.cpu and os.environ.get("TRITON_INTERPRET") != "1")
        return {"cannot run": reason, "ok": expected}
    worst, checked = 0.0, 0
    sizes = ((4, 2, 16), (3, 3, 16)) if bench.cpu else HEADS
    lengths = (1, 65, 257) if bench.cpu else LENGTHS
    for heads, kv_heads, dim in sizes:
        case = paged(bench, lengths, heads, kv_heads, dim, PAGE_SIZE[backend], dtype)
        out, expected = paged_decode(backend, *case).double(), float64_attention(*case)
        error = ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
        worst, checked = max(worst, error if math.isfinite(error) else math.inf), checked + len(lengths)
    return {"largest relative error": worst, "bound": MOST[dtype], "cases": checked, "ok": worst < MOST[dtype]}


def nf4_products(bench: Bench) -> dict:
    """Every matrix of a layer at 1 to 384 rows, against its own dequantized matrix in float64."""
    from azr.policy.decoder import dequantized

    policy, worst = bench.policy("nf4"), {}
    layer = policy.backbone.layers[0]
    for rows in (1, 3) if bench.cpu else (1, 2, 4, 8, 16, 32, 48, 64, 128, 192, 384):
        errors = []
        for module in (
            layer.self_attn.q_proj,
            layer.self_attn.k_proj,
            layer.self_attn.o_proj,
            layer.mlp.gate_proj,
            layer.mlp.down_proj,
        ):
            base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            weight = dequantized(base, torch.float32).double()
            dtype = torch.float32 if bench.cpu else torch.bfloat16
            x = torch.randn(rows, base.in_features, device=bench.device).to(dtype)
            with torch.no_grad():
                expected = x.double() @ weight.t() + (0 if base.bias is None else base.bias.double())
                errors.append(((base(x).double() - expected).norm() / expected.norm()).item())
        worst[str(rows)] = max(errors)
    most = max(worst.values())
    return {"largest relative error": most, "by rows": worst, "ok": most < 1e-2}


def chunked(bench: Bench) -> dict:
    """Log-probs, entropies and the gradient of hidden states, logits of a few nats' entropy."""
    from azr.policy.scoring import ChunkedLogProb

    tokens, vocabulary, hidden = (8, 500, 32) if bench.cpu else (256, 151_936, 2048)
    dtype, device = (torch.float32 if bench.cpu else torch.bfloat16), bench.device
    generator = torch.Generator(device).manual_seed(0)
    h = torch.randn(tokens, hidden, device=device, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, hidden, device=device, generator=generator) * 4 / hidden**0.5).to(dtype)
    target = torch.randint(0, vocabulary, (tokens,), device=device, generator=generator)
    leaf, exact = h.clone().requires_grad_(), h.double().requires_grad_()
    log_prob, entropy = ChunkedLogProb.apply(leaf, weight, target)
    log_prob.sum().backward()
    log_p = F.linear(exact, weight.double()).log_softmax(-1)
    picked = log_p.gather(1, target[:, None]).squeeze(1)
    picked.sum().backward()
    true_entropy = -(log_p.exp() * log_p).sum(-1)
    figures = {
        "max |dlogp|": (log_prob.double() - picked).abs().max().item(),
        "max |dentropy|": (entropy.double() - true_entropy).abs().max().item(),
        "gradient, relative": ((leaf.grad.double() - exact.grad).norm() / exact.grad.norm()).item(),
        "mean entropy": true_entropy.mean().item(),
    }
    # the gradient leaves in the dtype of the hidden states: its rounding is what remains
    return {**figures, "ok": figures["max |dlogp|"] < 1e-3 and figures["gradient, relative"] < 5e-3}


def gradient(bench: Bench) -> dict:
    policy, base = bench.any_policy()
    length, vocabulary = (12 if bench.cpu else 256), policy.base.config.vocab_size
    policy.checkpoint_activations()
    texts = prompts_of(4, 2 * length, vocabulary)
    for scored in policy.score([t[:length] for t in texts], [t[length:] for t in texts], with_grad=True):
        scored.log_prob.mean().backward()
    grads = [p.grad for p in policy.trainable_parameters()]
    missing = sum(g is None for g in grads)
    finite = all(bool(g.isfinite().all()) for g in grads if g is not None)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads if g is not None))
    for p in policy.trainable_parameters():
        p.grad = None
    return {
        "base": base,
        "norm": norm,
        "matrices": len(grads),
        "without gradient": missing,
        "ok": finite and not missing and norm > 0,
    }


# ---------------------------------------------------------------- the gap between sampler and trainer


def gap(bench: Bench) -> None:
    """By dtype, quantization and rollout weights, with logits as sharp as those of a trained model."""
    if bench.cpu:
        cases = [(dtype, "none", "stored") for dtype in (torch.float32, torch.bfloat16)]
        cases.append((torch.float32, "nf4", "stored"))
    else:
        half, full = (torch.bfloat16, torch.float16), torch.float32
        cases = [
            (half[0], "nf4", "stored"),
            (half[0], "nf4", "bf16"),
            (half[1], "nf4", "stored"),
            (half[0], "none", "stored"),
            (half[1], "none", "stored"),
            (full, "none", "stored"),
            (full, "nf4", "stored"),
            (half[1], "nf4", "bf16"),
        ]
    held: dict = {}
    try:
        for dtype, quantization, weights in cases:
            name = f"{str(dtype)[6:]} {quantization} {weights}"
            case = (dtype, quantization, weights)
            bench.measure(name, lambda case=case: random_gap(bench, held, *case), 12, "gap, random weights")
    finally:
        held.clear()
        bench.clear()


def random_gap(bench: Bench, held: dict, dtype, quantization: str, weights: str) -> dict:
    """One case; the policy of the last one is in `held`."""
    from random_weights import random_policy

    key = (dtype, quantization)
    if key not in held:
        held.clear()
        bench.drop()
        policy = random_policy(bench.shape("3B"), quantization, bench.device, 32, dtype=dtype, max_batch=64)
        held[key] = policy, sharpen(bench, policy)
    policy, scale = held[key]
    policy.engine.rollout_weights = weights
    config = policy.base.config
    prompts, tokens = prompts_of(8, 16 if bench.cpu else 200, config.vocab_size), 8 if bench.cpu else 128
    return {
        "dtype": str(dtype)[6:],
        "base": quantization,
        "rollout weights": weights,
        "layers": config.num_hidden_layers,
        **gap_figures(policy, prompts, tokens),
        "norm x": scale,
    }


def sharpen(bench: Bench, policy, wanted: float = 1.0) -> float:
    """Scales the final norm so that the mean entropy is about `wanted` nats; returns the factor.

    Random weights give flat logits, where a difference between sampler and trainer would hardly show.
    """
    length, vocabulary = (8 if bench.cpu else 48), policy.base.config.vocab_size
    texts = prompts_of(8, 2 * length, vocabulary, 5)

    def entropy(scale: float) -> float:  # a norm that is `scale` times as large is a temperature of 1 / scale
        rows = policy.score_lists([t[:length] for t in texts], [t[length:] for t in texts], 1.0 / scale)[1]
        return sum(map(sum, rows)) / sum(map(len, rows))

    low, high = 0.5, 512.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if entropy(middle) > wanted else (low, middle)
    scale = math.sqrt(low * high)
    with torch.no_grad():
        policy.backbone.norm.weight.mul_(scale)
    return scale


def gap_figures(policy, prompts: list[list[int]], tokens: int, n: int = 4, stop: tuple = ()) -> dict:
    """log p of the trainer less that of the sampler over sampled tokens; k3 = mean(r - 1 - log r), r their ratio."""
    from azr.policy.sampling import Sampling

    seeds = [[100 * i + j for j in range(n)] for i in range(len(prompts))]
    rows = policy.generate(prompts, n, Sampling(max_new_tokens=tokens, stop=stop), seeds)
    pairs = [(prompt, c) for prompt, row in zip(prompts, rows) for c in row if c.ids]
    scored, entropies = policy.score_lists([p for p, _ in pairs], [c.ids for _, c in pairs])
    d = torch.tensor([a - b for (_, c), row in zip(pairs, scored) for a, b in zip(row, c.log_probs)]).double()
    ratio, entropy = d.exp(), [x for row in entropies for x in row]
    return {
        "tokens": len(d),
        "mean entropy": sum(entropy) / len(entropy),
        "mean |d|": d.abs().mean().item(),
        "p99": d.abs().quantile(0.99).item() if len(d) < 1_000_000 else None,
        "max": d.abs().max().item(),
        "k3": (ratio - 1 - d).mean().item(),
        "% outside 0.9-1.1": 100 * ((ratio < 0.9) | (ratio > 1.1)).double().mean().item(),
        "mean d": d.mean().item(),
        "ok": bool(d.isfinite().all()),
    }
