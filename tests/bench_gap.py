"""The gap between sampler and trainer, |log p - log p| on the same sampled tokens, and what rounding makes of it.

    python tests/bench_gap.py --model DIR [--json FILE] [--quick] [--only gap|causes|parity]

DIR is a real model (a random one has flat logits, which hide the gap); default: the embedded one. CPU, one thread,
temperature 1, LoRA of rank 16 with B from N(0, 0.02).
  gap      for every dtype and quantization: sampler against trainer, overall and at the first token; and as a floor the
           trainer against itself: with micro-batches of another size, and with matrix products that add in another
           order, as those of a GPU do when they get other shapes (here: computed in fp32, then rounded).
  causes   the noise of one kind of rounding at a time: a forward pass in fp32 in which only that result is rounded to
           bf16, against none.
  parity   greedy completions beside those of `generate`: how many agree, and the logit margin where they part.
`--quick`: a third of the prompts. Figures are means over all tokens; tokens of a sample are not independent. Left out:
a GPU (tests/bench_gpu.py), where products of other shapes add in other orders too.
"""

import argparse
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from azr.models import model_path
from azr.policy.decode_ops import rms_norm
from azr.policy.policy import LoraSettings, Policy, Sampling
from azr.policy.scoring import ChunkedLogProb
from azr.train.ppo import gap_statistics

QUESTIONS = (
    "The capital of France is",
    "Write a Python function that reverses a list.",
    "Explain why the sky is blue.",
    "List three animals that live in the sea.",
    "What is 17 times 23? Think step by step.",
    "Write a short poem about autumn.",
    "Translate to French: good morning, my friend.",
    "Tell me how a bicycle works.",
    "Summarize the story of Little Red Riding Hood.",
    "Name the planets of the solar system.",
    "How do I make a cup of tea?",
    "def fibonacci(n):",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = (("fp32", "none"), ("bf16", "none"), ("bf16", "nf4"), ("fp16", "none"), ("fp16", "nf4"))
ROUNDED = (
    "residual",
    "norm",
    "rotary",
    "qkv",
    "probabilities",
    "attention",
    "attention output",
    "gate and up",
    "activation",
    "mlp output",
    "last norm",
)


def load(model: str, dtype: str, quantization: str) -> Policy:
    policy = Policy.load(model, quantization, LoraSettings(16, 32.0), dtype=DTYPES[dtype], device="cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.empty(p.shape).normal_(0, 0.02, generator=generator))
    return policy


def texts(policy: Policy, count: int, n: int = 2, new: int = 64):
    """(prompts, responses, the sampler's log-probs) of n samples each."""
    prompts = [policy.encode(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n") for q in QUESTIONS[:count]]
    seeds = [[100 * i + j for j in range(n)] for i in range(count)]
    out = policy.generate(prompts, n, Sampling(max_new_tokens=new, stop=()), seeds)
    flat = [(prompt, c) for prompt, row in zip(prompts, out) for c in row]
    return [p for p, _ in flat], [c.ids for _, c in flat], [c.log_probs for _, c in flat]


def compared(ours: list[list[float]], theirs: list[list[float]]) -> dict:
    a, b = (torch.tensor([x for row in rows for x in row]) for rows in (ours, theirs))
    figures = gap_statistics(a, b, torch.ones(len(a), dtype=torch.bool))
    figures["outside_20"] = (((a - b).double().exp() - 1).abs() > 0.2).double().mean().item()
    first = sum(abs(x[0] - y[0]) for x, y in zip(ours, theirs)) / len(ours)
    return {"tokens": len(a), **figures, "first": first}


def gap(model: str, dtype: str, quantization: str, count: int) -> dict:
    policy = load(model, dtype, quantization)
    prompts, responses, sampled = texts(policy, count)
    scored, _ = policy.score_lists(prompts, responses)
    smaller, _ = policy.score_lists(prompts, responses, token_budget=300)
    with other_order():
        reordered, _ = policy.score_lists(prompts, responses)
    return {
        "sampler": compared(scored, sampled),
        "other micro-batches": compared(scored, smaller),
        "other order of sums": compared(scored, reordered),
    }


@contextmanager
def other_order():
    """Matrix products of half-precision numbers add in fp32, in the order of fp32 products; then they are rounded."""
    linear = F.linear

    def wide(x, weight, bias=None):
        return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    F.linear = wide
    try:
        yield
    finally:
        F.linear = linear


# ------------------------------------------------------------------------------------------------------- the causes


def rounded_forward(policy: Policy, ids: list[int], rounded: set[str]) -> torch.Tensor:
    """(tokens, hidden) of one text in fp32, with what `rounded` names rounded to bf16 wherever it occurs."""
    decoder, count = policy.engine.decoder, len(ids)

    def at(name: str, x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().float() if name in rounded else x

    def norm(module, x, name="norm"):
        return at(name, rms_norm(x, module.weight, module.variance_epsilon))

    cos, sin = (at("rotary", table[:count]) for table in (decoder.cos, decoder.sin))
    seen = torch.ones(count, count, dtype=torch.bool).tril()
    x = F.embedding(torch.tensor(ids), policy.backbone.embed_tokens.weight)
    for layer in decoder.layers:
        q, k, v = (at("qkv", t).view(count, -1, layer.head_dim) for t in layer.qkv(norm(layer.norm, x)))
        if layer.q_norm is not None:
            q, k = norm(layer.q_norm, q), norm(layer.k_norm, k)
        half = layer.head_dim // 2
        q, k = (at("rotary", at("rotary", t * cos) + at("rotary", t.roll(half, -1) * sin)) for t in (q, k))
        k, v = (t.repeat_interleave(decoder.heads // decoder.kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k).mul(layer.scale).masked_fill(~seen, -torch.inf)
        p = (scores - scores.amax(-1, keepdim=True)).exp()
        attended = torch.einsum("hqk,khd->qhd", at("probabilities", p), v) / p.sum(-1).t()[..., None]
        added = layer.out(at("attention", attended).reshape(count, -1))[0]
        x = at("residual", x + at("attention output", added))
        gate, up = (at("gate and up", t) for t in layer.gate_up(norm(layer.mlp_norm, x)))
        added = layer.down(at("activation", at("activation", F.silu(gate)) * up))[0]
        x = at("residual", x + at("mlp output", added))
    return norm(policy.backbone.norm, x, "last norm")


@torch.no_grad()
def causes(model: str, count: int) -> dict:
    policy = load(model, "fp32", "none")
    prompts, responses, _ = texts(policy, count)
    policy.engine.decoder.prepare("stored", max(len(p) + len(r) for p, r in zip(prompts, responses)))

    def scores(rounded: set[str]) -> list[list[float]]:
        rows = []
        for prompt, ids in zip(prompts, responses):
            hidden = rounded_forward(policy, prompt + ids, rounded)[len(prompt) - 1 : -1]
            log_prob, _ = ChunkedLogProb.apply(hidden, policy.head.weight, torch.tensor(ids), 1.0, None)
            rows.append(log_prob.tolist())
        return rows

    exact = scores(set())
    out = {"everything": compared(scores(set(ROUNDED)), exact)}
    out["all but residual"] = compared(scores(set(ROUNDED) - {"residual"}), exact)
    return out | {name: compared(scores({name}), exact) for name in ROUNDED}


# ------------------------------------------------------------------------------------------------------ greedy parity


@torch.no_grad()
def parity(model: str, dtype: str, count: int, new: int = 64) -> dict:
    """Completions that equal those of `generate`, and the fp32 margin of the two best logits where others part."""
    policy, exact = load(model, dtype, "none"), load(model, "fp32", "none")
    prompts = [policy.encode(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n") for q in QUESTIONS[:count]]
    ours = policy.generate(prompts, 1, Sampling(temperature=0, max_new_tokens=new, stop=()), [[0]] * count)
    margins, tokens = [], 0
    for prompt, [completion] in zip(prompts, ours):
        ids = torch.tensor([prompt])
        theirs = policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            pad_token_id=policy.pad_id,
        )[0, len(prompt) :].tolist()
        mine = completion.ids
        at = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), None)
        tokens += len(mine) if at is None else at
        if at is not None:
            hidden = exact.backbone(input_ids=torch.tensor([prompt + mine[:at]])).last_hidden_state[0, -1]
            best = (exact.head.weight.float() @ hidden.float()).topk(2).values
            margins.append((best[0] - best[1]).item())
    return {"prompts": count, "equal": count - len(margins), "tokens until they part": tokens, "margins": margins}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a directory or tiny")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("gap", "causes", "parity"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of gap and parity; default all")
    parser.add_argument("--quantization", choices=("none", "nf4"), help="of gap; default both")
    arguments = parser.parse_args()
    if arguments.model != "tiny" and not (Path(arguments.model) / "config.json").is_file():
        print(f"{arguments.model}: no model directory; give one that holds config.json, or tiny", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    model, count, result = model_path(arguments.model), 4 if arguments.quick else len(QUESTIONS), {}
    wanted = [arguments.dtype] if arguments.dtype else list(DTYPES)

    def measured(name: str, figures: dict) -> None:
        result[name] = figures
        print(json.dumps({name: figures}), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")

    for dtype, quantization in CASES:
        if arguments.only in (None, "gap") and dtype in wanted and arguments.quantization in (None, quantization):
            measured(f"gap {dtype} {quantization}", gap(model, dtype, quantization, count))
    if arguments.only in (None, "causes"):
        for name, figures in causes(model, count).items():
            measured(f"rounded: {name}", figures)
    for dtype in ("fp32", "bf16"):
        if arguments.only in (None, "parity") and dtype in wanted:
            measured(f"parity {dtype}", parity(model, dtype, count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
