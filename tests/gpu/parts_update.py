"""Parts update and chunked: forward, recomputed forward and backward of a micro-batch, as it is and in variants."""

from __future__ import annotations

import dataclasses
import statistics
import time
from contextlib import contextmanager, nullcontext

import torch

from azr.machine import plan
from gpu.bench import GB, Bench, activities, kernel_table, prompts_of
from gpu.lora import by_peft, errors


def update(bench: Bench) -> None:
    small, large, length = (64, 128, 16) if bench.cpu else (8192, 32768, 2048)

    def run(tokens, **options):
        policy, base = bench.any_policy()
        figures = micro_batch(bench, policy, tokens, length, **options)
        return {"base": base, **figures, **planned(bench, figures, "3B", base, tokens)}

    bench.measure("8k tokens", lambda: run(small), 10, "update")
    bench.measure("8k tokens, TF32", lambda: run(small, precision="high"), 8, "update")
    bench.measure("8k tokens, PEFT's LoRA", lambda: run(small, peft=True), 7, "update")
    bench.measure("LoRA layers against float64", lambda: layer_errors(bench, small // 4), 6, "LoRA layers")
    bench.measure("32k tokens", lambda: run(large, repeats=1), 14, "update")
    bench.measure("32k tokens, PEFT's LoRA", lambda: run(large, repeats=1, peft=True), 10, "update")
    for tokens in (0, 64 if bench.cpu else 4096):
        name = f"8 answers a prompt, {'shared' if tokens else 'each alone'}"
        bench.measure(name, lambda tokens=tokens: shared(bench, tokens), 10, "shared prompts")
    bench.measure("kernels of 8k tokens", lambda: profiled(bench, small, length), 12, "kernels of an update")
    bench.measure("AdamW", lambda: adamw(bench), 5, "AdamW")


def chunked(bench: Bench) -> None:
    bench.measure("ChunkedLogProb, 8k x 151,936", lambda: chunked_cost(bench), 5, "ChunkedLogProb")
    bench.measure("log_softmax over all, 8k", lambda: chunked_cost(bench, naive=True), 5, "ChunkedLogProb")


@contextmanager
def precision_of(name: str | None):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name or before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def backward(policy, prompts, responses, token_budget: int) -> None:
    for scored in policy.score(prompts, responses, token_budget=token_budget, with_grad=True):
        scored.log_prob.sum().backward()


def no_gradient(policy) -> None:
    for p in policy.trainable_parameters():
        p.grad = None


def micro_batch(
    bench: Bench, policy, tokens: int, length: int, repeats: int = 3, precision=None, peft: bool = False
) -> dict:
    """tokens / length samples, half of each is the response; activations recomputed, as on every GPU."""
    texts = prompts_of(max(1, tokens // length), length, policy.base.config.vocab_size)
    prompts, responses = [t[: length // 2] for t in texts], [t[length // 2 :] for t in texts]
    policy.checkpoint_activations()
    before, policy.shared_row = policy.shared_row, 0
    figures: dict = {"tokens": len(texts) * length, "samples": len(texts)}
    try:
        with by_peft(policy.model) if peft else nullcontext(), precision_of(precision):
            backward(policy, prompts, responses, tokens)  # work spaces, and the gradients' own memory
            seconds = []
            with bench.peak(figures):
                for _ in range(repeats):
                    start = time.perf_counter()
                    backward(policy, prompts, responses, tokens)
                    bench.sync()
                    seconds.append(time.perf_counter() - start)
    finally:
        policy.shared_row = before
        no_gradient(policy)
    return {**figures, "tokens/s": len(texts) * length / statistics.median(seconds), "s": statistics.median(seconds)}


def planned(bench: Bench, figures: dict, size: str, base: str, tokens: int) -> dict:
    """What azr/machine/plan.py says of a micro-batch, less Adam's moments, which this measurement has not."""
    preset = dataclasses.replace(
        plan.PRESETS["24gb"],
        quantization=base,
        token_budget=tokens,
        lora_rank=32,
        prompt_tokens=tokens // 2,
        max_new_tokens=tokens // 2,
    )
    shape = bench.shape(size)
    parts = plan.memory(shape, preset, "cuda")["training"]
    return {
        "planned GB": (sum(parts.values()) - 8 * shape.lora_parameters(32)) / GB,
        "measured GB": figures["peak reserved GB"],
    }


def layer_errors(bench: Bench, tokens: int) -> dict:
    """Errors of single adapted layers, ours and PEFT's, against float64: through 36 layers of random weights roundings
    grow until two gradients by the same code, summed in another order, are as far apart."""
    policy, base = bench.any_policy()
    dtype = policy.engine.decoder.dtype
    found: dict = {"base": base, "tokens": tokens}
    ok = True
    for path in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"):
        module = policy.backbone.layers[0].get_submodule(path)
        x = torch.randn(tokens, module.in_features, device=bench.device).to(dtype)
        grad = torch.randn(tokens, module.out_features, device=bench.device).to(dtype)
        ours = errors(module, x, grad)
        with by_peft(policy.model):
            peft = errors(module, x, grad)
        found |= {f"{path} {part}": [ours[part], peft[part]] for part in ours}
        ok = ok and all(ours[part] < max(1.5 * peft[part], 0.01) for part in ours)
    return {**found, "ok": ok}


def shared(bench: Bench, shared_row: int) -> dict:
    """Eight answers to each of four prompts, every sample in a row of its own or the prompt once."""
    policy, base = bench.any_policy()
    prompt, answer, tokens, count = (8, 6, 64, 1) if bench.cpu else (400, 400, 16384, 4)
    vocabulary = policy.base.config.vocab_size
    prompts = [p for p in prompts_of(count, prompt, vocabulary) for _ in range(8)]
    responses = prompts_of(len(prompts), answer, vocabulary, 9)
    policy.checkpoint_activations()
    before, policy.shared_row = policy.shared_row, shared_row
    figures: dict = {"base": base, "shared row": shared_row}
    try:
        backward(policy, prompts, responses, tokens)
        with bench.peak(figures):
            seconds = bench.time(lambda: backward(policy, prompts, responses, tokens), 2, 0)
    finally:
        policy.shared_row = before
        no_gradient(policy)
    return {**figures, "s": seconds, "response tokens/s": len(prompts) * answer / seconds}


def profiled(bench: Bench, tokens: int, length: int) -> dict:
    policy, base = bench.any_policy()
    texts = prompts_of(max(1, tokens // length), length, policy.base.config.vocab_size)
    prompts, responses = [t[: length // 2] for t in texts], [t[length // 2 :] for t in texts]
    policy.checkpoint_activations()
    backward(policy, prompts, responses, tokens)
    bench.sync()
    with torch.profiler.profile(activities=activities()) as profile:
        backward(policy, prompts, responses, tokens)
        bench.sync()
    no_gradient(policy)
    return {"base": base, "tokens": tokens, "kernels": kernel_table(profile)}


def adamw(bench: Bench) -> dict:
    """The optimizer step beside it: first and later ones, with clipping."""
    import train_azr
    from azr.train import update as updates

    policy, _ = bench.any_policy()
    optimizer = updates.make_optimizer(policy, 1e-5)
    state = train_azr.State(None, policy, optimizer)

    def step() -> None:
        for p in policy.trainable_parameters():
            p.grad = torch.full_like(p, 1e-4)
        train_azr.apply_gradient(state, 1.0)
        bench.sync()

    before = bench.memory()["allocated GB"]
    first = bench.time(step, 1, 0)
    later = bench.time(step, 3, 0)
    parameters = sum(p.numel() for p in policy.trainable_parameters())
    return {
        "parameters": parameters,
        "first s": first,
        "later s": later,
        "moments GB": bench.memory()["allocated GB"] - before,
    }


def chunked_cost(bench: Bench, naive: bool = False) -> dict:
    from azr.policy.scoring import ChunkedLogProb

    tokens, vocabulary, hidden = (16, 500, 32) if bench.cpu else (8192, 151_936, 2048)
    dtype, device = (torch.float32 if bench.cpu else torch.bfloat16), bench.device
    h = torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, device=device) * 0.05).to(dtype)
    target = torch.randint(0, vocabulary, (tokens,), device=device)

    def forward():
        if not naive:
            return ChunkedLogProb.apply(h, weight, target)[0]
        return (h @ weight.t()).float().log_softmax(-1).gather(1, target[:, None])

    def both():
        h.grad = None
        forward().sum().backward()

    both()
    figures: dict = {"tokens": tokens, "vocabulary": vocabulary}
    with bench.peak(figures):
        seconds = bench.time(both, 3, 1)
    with torch.no_grad():
        alone = bench.time(forward, 3, 1)
    figures["above GB"] = figures["peak GB"] - figures["before GB"]
    block = min(1024, tokens) * 16384 * 16
    plan_ = {} if naive else {"planned above GB": (block + tokens * 8 * hidden) / GB}
    products = (3 if not naive else 2) * 2 * tokens * vocabulary * hidden  # the gradient goes in as two halves
    return {**figures, **plan_, "s": seconds, "forward s": alone, "TFLOP/s": products / seconds / 1e12}
