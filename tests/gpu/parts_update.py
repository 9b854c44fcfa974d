"""Parts update and chunked: forward, recomputed forward and backward of a micro-batch, as it is and in variants."""

from __future__ import annotations

import dataclasses
import statistics
import time
from contextlib import contextmanager, nullcontext

import torch

from azr import plan
from gpu.bench import GB, Bench, activities, kernel_table, prompts_of
from gpu.lora import fused


def update(bench: Bench) -> None:
    small, large, length = (64, 128, 16) if bench.cpu else (8192, 32768, 2048)

    def run(tokens, **options):
        policy, base = bench.any_policy()
        figures = micro_batch(bench, policy, tokens, length, **options)
        return {"base": base, **figures, **planned(bench, figures, "3B", base, tokens)}

    bench.measure("8k tokens", lambda: run(small), 10, "update")
    bench.measure("8k tokens, TF32", lambda: run(small, precision="high"), 8, "update")
    bench.measure("8k tokens, fused LoRA", lambda: run(small, with_fused=True), 7, "update")
    bench.measure("fused LoRA against PEFT", lambda: same_gradient(bench, small // 4, length), 6, "fused LoRA")
    bench.measure("32k tokens", lambda: run(large, repeats=1), 14, "update")
    bench.measure("32k tokens, fused LoRA", lambda: run(large, repeats=1, with_fused=True), 10, "update")
    for tokens in (0, 64 if bench.cpu else 4096):
        name = f"8 answers a prompt, {'shared' if tokens else 'each alone'}"
        bench.measure(name, lambda tokens=tokens: shared(bench, tokens), 10, "shared prompts")
    bench.measure("kernels of 8k tokens", lambda: profiled(bench, small, length), 12, "kernels of an update")
    bench.measure("kernels, fused LoRA", lambda: profiled(bench, small, length, True), 12, "kernels of an update")
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


def micro_batch(bench: Bench, policy, tokens: int, length: int, repeats: int = 3, precision=None,
                with_fused: bool = False) -> dict:  # fmt: skip
    """tokens / length samples, half of each is the response; activations recomputed, as on every GPU."""
    texts = prompts_of(max(1, tokens // length), length, policy.base.config.vocab_size)
    prompts, responses = [t[: length // 2] for t in texts], [t[length // 2 :] for t in texts]
    policy.checkpoint_activations()
    before, policy.shared_row = policy.shared_row, 0
    figures: dict = {"tokens": len(texts) * length, "samples": len(texts)}
    try:
        with fused(policy.model) if with_fused else nullcontext(), precision_of(precision):
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
    """What azr/plan.py says of a micro-batch, less Adam's moments, which this measurement has not."""
    preset = dataclasses.replace(plan.PRESETS["24gb"], quantization=base, token_budget=tokens, lora_rank=32,
                                 prompt_tokens=tokens // 2, max_new_tokens=tokens // 2)  # fmt: skip
    shape = bench.shape(size)
    parts = plan.memory(shape, preset, "cuda")["training"]
    return {"planned GB": (sum(parts.values()) - 8 * shape.lora_parameters(32)) / GB,
            "measured GB": figures["peak reserved GB"]}  # fmt: skip


def same_gradient(bench: Bench, tokens: int, length: int) -> dict:
    """Relative difference of the gradients of PEFT's chain and of the fused function, on the same samples; and of
    PEFT's with TF32, for scale."""
    policy, base = bench.any_policy()
    texts = prompts_of(max(1, tokens // length), length, policy.base.config.vocab_size)
    prompts, responses = [t[: length // 2] for t in texts], [t[length // 2 :] for t in texts]
    policy.checkpoint_activations()

    def gradient(context) -> list:
        no_gradient(policy)
        with context as count:
            backward(policy, prompts, responses, tokens)
        grads = [p.grad.clone() for p in policy.trainable_parameters()]
        return grads, count

    (peft, _), (again, _) = gradient(nullcontext()), gradient(nullcontext())
    (tf32, _), (ours, count) = gradient(precision_of("high")), gradient(fused(policy.model))
    no_gradient(policy)

    def apart(a: list) -> float:
        return (sum(float((x - y).double().square().sum()) for x, y in zip(a, peft))
                / sum(float(y.double().square().sum()) for y in peft)) ** 0.5  # fmt: skip

    worst = max(float((x - y).norm() / y.norm().clamp(min=1e-30)) for x, y in zip(ours, peft))
    return {"base": base, "modules": count, "fused, relative": apart(ours), "worst matrix": worst,
            "TF32, relative": apart(tf32), "PEFT again, relative": apart(again), "ok": apart(ours) < 0.05}  # fmt: skip


def shared(bench: Bench, shared_row: int) -> dict:
    """Eight answers to each of four prompts, every sample in a row of its own or the prompt once."""
    policy, base = bench.any_policy()
    prompt, answer, tokens = (8, 6, 64) if bench.cpu else (400, 400, 16384)
    vocabulary = policy.base.config.vocab_size
    prompts = [p for p in prompts_of(4, prompt, vocabulary) for _ in range(8)]
    responses = prompts_of(32, answer, vocabulary, 9)
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
    return {**figures, "s": seconds, "response tokens/s": 32 * answer / seconds}


def profiled(bench: Bench, tokens: int, length: int, with_fused: bool = False) -> dict:
    policy, base = bench.any_policy()
    texts = prompts_of(max(1, tokens // length), length, policy.base.config.vocab_size)
    prompts, responses = [t[: length // 2] for t in texts], [t[length // 2 :] for t in texts]
    policy.checkpoint_activations()
    with fused(policy.model) if with_fused else nullcontext():
        backward(policy, prompts, responses, tokens)
        bench.sync()
        with torch.profiler.profile(activities=activities()) as profile:
            backward(policy, prompts, responses, tokens)
            bench.sync()
    no_gradient(policy)
    return {"base": base, "tokens": tokens, "kernels": kernel_table(profile)}


def adamw(bench: Bench) -> dict:
    """The optimizer step beside it: first and later ones, clipping, copies that a step goes back to."""
    from azr import update as updates

    policy, _ = bench.any_policy()
    optimizer = updates.make_optimizer(policy, 1e-5)

    def step() -> None:
        for p in policy.trainable_parameters():
            p.grad = torch.full_like(p, 1e-4)
        updates.apply_gradient(policy, optimizer, 1.0)
        bench.sync()

    before = bench.memory()["allocated GB"]
    first = bench.time(step, 1, 0)
    later = bench.time(step, 3, 0)
    parameters = sum(p.numel() for p in policy.trainable_parameters())
    return {"parameters": parameters, "first s": first, "later s": later,
            "moments GB": bench.memory()["allocated GB"] - before}  # fmt: skip


def chunked_cost(bench: Bench, naive: bool = False) -> dict:
    from azr.scoring import ChunkedLogProb

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
