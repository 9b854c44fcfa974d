"""Parts build, leak and cap24: what a policy takes, whether `generate` gives back what it took, 7B under 24 GB."""

from __future__ import annotations

import dataclasses
import gc
import time
from contextlib import contextmanager

import torch

from azr.machine import plan
from gpu.bench import GB, Bench, prompts_of
from gpu.parts_decode import CONTEXT, Replays, decode_figures
from gpu.parts_update import micro_batch, planned

CAP = 24e9


def build(bench: Bench) -> None:
    bench.measure("3B NF4 + LoRA 32", lambda: built(bench, "3B", "nf4"), 25, "build")


def built(bench: Bench, size: str, quantization: str) -> dict:
    bench.drop()
    figures, start = {}, time.perf_counter()
    with bench.peak(figures):
        policy = bench.policy(quantization, size)
    made = plan.memory(bench.shape(size), dataclasses.replace(plan.PRESETS["24gb"], quantization=quantization))
    adapter = sum(p.numel() * p.element_size() for p in policy.trainable_parameters())
    return {
        "seconds to build": time.perf_counter() - start,
        **figures,
        **bench.memory(),
        "planned GB": (made["load"]["weights"] + adapter) / GB,
        "measured GB": bench.memory()["allocated GB"] - figures["before GB"],
        "attention": getattr(policy.engine, "attention_note", ""),
        "page size": policy.engine.page_size,
    }


# ---------------------------------------------------------------- leak, and graphs against no graphs


def leak(bench: Bench) -> None:
    bench.measure("generate, five times", lambda: five_calls(bench), 25, "leak")
    bench.measure("through Policy.generate", lambda: five_calls(bench, retried=True), 25, "leak")
    bench.measure("graph against eager", lambda: graph_against_eager(bench), 15, "graphs")
    bench.measure("prompts that come later", lambda: late_prompts(bench), 10, "late prompts")


def call(bench: Bench, policy, rows: int, tokens: int, length: int = 512, retried: bool = False, salt: int = 0):
    """`rows` samples of different prompts, `tokens` each; (completions in a list)."""
    from azr.policy.sampling import Sampling

    prompts = prompts_of(rows, length, bench.shape("3B").vocabulary, salt)
    sample = policy.generate if retried else policy.engine.generate
    policy.model.eval()
    done = sample(prompts, 1, Sampling(max_new_tokens=tokens, stop=()), [[i] for i in range(rows)])
    return [row[0] for row in done]


def five_calls(bench: Bench, retried: bool = False) -> dict:
    """Memory after each of five calls, with nothing collected in between, as in a run."""
    policy, base = bench.any_policy()
    rows, tokens = (4, 8) if bench.cpu else (64, 32)
    call(bench, policy, 2, 8, 32)  # compiles kernels, makes work spaces
    gc.collect()
    sizes = [(policy.engine.max_batch, policy.engine.pages)]
    allocated, seconds = [bench.memory()["allocated GB"]], []
    for i in range(5):
        start = time.perf_counter()
        call(bench, policy, rows, tokens, 16 if bench.cpu else 512, retried, i)
        bench.sync()
        seconds.append(round(time.perf_counter() - start, 3))
        allocated.append(bench.memory()["allocated GB"])
        sizes.append((policy.engine.max_batch, policy.engine.pages))
    gc.collect()
    after = bench.memory()["allocated GB"]
    grown = allocated[-1] - allocated[0]
    return {
        "base": base,
        "grown GB": grown,
        "freed by gc GB": allocated[-1] - after,
        "allocated GB": allocated,
        "slots and pages": sizes,
        "seconds a call": seconds,
        "ok": grown < 0.05 and len(set(sizes[1:])) == 1,
    }


@contextmanager
def no_graphs():
    """Decode steps are launched kernel by kernel inside."""
    from azr.policy import decoding
    from gpu.bench import patched

    with patched(decoding, "Graphs", lambda *arguments, **more: None):
        yield


def graph_against_eager(bench: Bench) -> dict:
    """The same call with and without graphs: the same tokens? and how far apart are the log-probs until they part."""
    policy, base = bench.any_policy()
    rows, tokens, length = (3, 8, 16) if bench.cpu else (48, 64, 300)
    with Replays() as replays:
        graph = call(bench, policy, rows, tokens, length)
    with no_graphs(), Replays() as none:
        eager = call(bench, policy, rows, tokens, length)
    again = call(bench, policy, rows, tokens, length)
    equal, count, gaps = 0, 0, []
    for a, b in zip(graph, eager):
        same = next((i for i, (x, y) in enumerate(zip(a.ids, b.ids)) if x != y), len(a.ids))
        equal, count = equal + same, count + len(a.ids)
        gaps += [abs(x - y) for x, y in zip(a.log_probs[:same], b.log_probs[:same])]
    repeated = all(a.ids == b.ids and a.log_probs == b.log_probs for a, b in zip(graph, again))
    return {
        "base": base,
        "replays": len(replays),
        "replays without": len(none),
        "tokens": count,
        "share equal": equal / count,
        "max |dlogp|": max(gaps, default=0.0),
        "same call, same bits": repeated,
        "ok": equal == count and repeated and (bench.cpu or len(replays) > 0 and len(none) == 0),
    }


def late_prompts(bench: Bench) -> dict:
    """Prompts that enter a running batch, as answers do beside proposals: twice the same bits, and nothing is left."""
    from azr.policy.sampling import Sampling

    policy, base = bench.any_policy()
    rows, tokens, length = (3, 24, 16) if bench.cpu else (32, 96, 300)
    first, *later = (prompts_of(rows, length, policy.base.config.vocab_size, salt) for salt in (1, 2, 3))
    sampling, took = Sampling(max_new_tokens=tokens, stop=()), []
    policy.model.eval()

    def once() -> list:
        brought = iter([[(prompt, [7, 8], tokens) for prompt in prompts] for prompts in later])
        start, more = time.perf_counter(), lambda: next(brought, None)
        done = policy.engine.generate(first, 1, sampling, [[i] for i in range(rows)], more=more, most=4 * rows)
        bench.sync()
        took.append(time.perf_counter() - start)
        return [sample for row in done for sample in row]

    once()
    before = bench.memory()["allocated GB"]
    with Replays() as replays:
        pair = once(), once()
    grown = bench.memory()["allocated GB"] - before
    same = all(a == b for a, b in zip(*pair))
    whole = {len(samples) for samples in pair} == {5 * rows} and all(len(x.ids) == tokens for x in pair[0])
    return {
        "base": base,
        "samples": len(pair[0]),
        "tokens": sum(len(sample.ids) for sample in pair[0]),
        "s a call": took,
        "replays": len(replays),
        "captures": len(replays.captures),
        "grown GB": grown,
        "same call, same bits": same,
        "ok": same and whole and grown < 0.05 and (bench.cpu or len(replays) > 0),
    }


# ---------------------------------------------------------------- 7B under a cap


def cap24(bench: Bench) -> None:
    """7B in NF4 as if the card had 24 GB: its sizes are the planner's, and each peak stands beside the plan's."""
    bench.drop()
    total = 1.0 if bench.cpu else torch.cuda.get_device_properties(0).total_memory
    try:
        if not bench.cpu:
            torch.cuda.set_per_process_memory_fraction(min(1.0, (CAP - plan.CUDA_CONTEXT) / total))
        made = plan.plan_memory(bench.shape("7B"), plan.PRESETS["24gb"], CAP - plan.CUDA_CONTEXT)
        bench.measure("build 7B NF4", lambda: built(bench, "7B", "nf4"), 20, "cap24")
        bench.measure("decode 7B, 128 rows", lambda: capped_decode(bench, made), 20, "cap24")
        bench.measure("update 7B, a micro-batch", lambda: capped_update(bench, made), 12, "cap24")
    finally:
        bench.drop()
        if not bench.cpu:
            torch.cuda.set_per_process_memory_fraction(1.0)


def capped_decode(bench: Bench, made) -> dict:
    policy = bench.policy("nf4", "7B")
    engine, rows, tokens = policy.engine, 4 if bench.cpu else 128, 8 if bench.cpu else 40
    engine.max_batch, engine.pages = rows, None
    working = engine.working_bytes() if hasattr(engine, "working_bytes") else 3e9
    # the engine looks at what the whole card has free
    engine.cache_bytes = int(1e7 if bench.cpu else CAP - plan.CUDA_CONTEXT - torch.cuda.memory_reserved() - working)
    figures = {"rows": rows, "slots planned": made.preset.max_batch}
    with bench.peak(figures):
        figures |= decode_figures(bench, policy, rows, "stored", tokens)
    shape = bench.shape("7B")
    preset = dataclasses.replace(
        made.preset, max_batch=rows, prompts_per_mode=rows, prompt_tokens=CONTEXT, max_new_tokens=tokens
    )
    phases = plan.memory(shape, preset, "cuda", CAP - plan.CUDA_CONTEXT)["rollout"]
    no_moments = sum(phases.values()) - 8 * shape.lora_parameters(32)  # Adam's do not exist here
    return {
        **figures,
        "planned GB": no_moments / GB,
        "measured GB": figures["peak reserved GB"],
        "planned cache GB": phases["KV cache"] / GB,
        "cache given GB": engine.cache_bytes / GB,
        "pages": engine.pages,
    }


def capped_update(bench: Bench, made) -> dict:
    policy = bench.policy("nf4", "7B")
    policy.engine.pages = 1  # a cache of no consequence
    tokens = 64 if bench.cpu else made.preset.token_budget
    figures = micro_batch(bench, policy, tokens, 16 if bench.cpu else min(2048, tokens), repeats=1)
    return {**figures, **planned(bench, figures, "7B", "nf4", tokens)}
