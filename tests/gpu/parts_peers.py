"""Part peers: the same model by transformers' `generate` and its continuous batching, beside the engine."""

from __future__ import annotations

import time

from gpu.bench import Bench, first_line, prompts_of


def peers(bench: Bench) -> None:
    bench.measure("engine", lambda: system(bench, "engine"), 8, "peers")
    bench.measure("generate", lambda: system(bench, "generate"), 20, "peers")
    bench.measure("continuous batching", lambda: system(bench, "continuous"), 30, "peers")


def system(bench: Bench, name: str, policy=None) -> dict:
    """64 requests of 64 to 96 tokens, forced, after a short call that compiles; log-probs by the engine only."""
    import bench_rollout

    policy, base = bench.any_policy() if policy is None else (policy, policy.info.get("quantization"))
    bench_rollout.no_checkpoint_settings(policy)
    policy.engine.max_batch, policy.engine.pages, policy.engine.cache_bytes = 384, None, None
    rows, most = (4, 8) if bench.cpu else (64, 96)
    prompts = prompts_of(rows, 12 if bench.cpu else 256, policy.base.config.vocab_size)
    lengths = [most - (i * 5) % (most // 3) for i in range(rows)]
    runs = {
        "engine": lambda p, n: bench_rollout.run_engine(policy, p, n),
        "generate": lambda p, n: bench_rollout.run_generate(policy, rows, p, n),
        "continuous": lambda p, n: bench_rollout.run_continuous(policy, rows, p, n),
    }
    try:
        runs[name](prompts[:4], [4] * 4)
    except TypeError as error:  # transformers 5.17 has another name for a setting that only a CPU needs
        if not bench.cpu:
            raise
        return {"base": base, "cannot run": first_line(error)}
    bench.sync()
    start = time.perf_counter()
    runs[name](prompts, lengths)
    bench.sync()
    seconds = time.perf_counter() - start
    return {"base": base, "rows": rows, "tokens": sum(lengths), "s": seconds, "tokens/s": sum(lengths) / seconds}
