"""Part decode: a decode step at 1 to 384 rows, the graph alone and the whole call, beside the roofline."""

from __future__ import annotations

import statistics
import time

import torch

from gpu.bench import Bench, activities, kernel_table, patched, prompts_of
from gpu.parts_hardware import bandwidth

ROWS = (128, 16, 64, 384, 1, 192)  # what matters most comes first: the time may run out
CONTEXT, NEW = 560, 72  # prompt and new tokens: a mean context of about 600


class Replays:
    """Every replay and every capture of a CUDA graph inside: when it was asked for, how long the device took."""

    def __init__(self, profile_at: int | None = None, profile_steps: int = 8):
        self.asked: list[float] = []  # perf_counter
        self.events: list = []
        self.captures: list[float] = []  # seconds
        self.first_capture: float | None = None
        self.profile_at, self.profile_steps, self.profile, self.running = profile_at, profile_steps, None, False

    def __len__(self) -> int:
        return len(self.asked)

    def __enter__(self):
        replay, replays = torch.cuda.CUDAGraph.replay, self
        enter, leave = torch.cuda.graph.__enter__, torch.cuda.graph.__exit__

        def timed_replay(graph):
            replays._profiling()
            replays.asked.append(time.perf_counter())
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = replay(graph)
            end.record()
            replays.events.append((start, end))
            return result

        def timed_enter(context, *arguments):
            context._asked_at = time.perf_counter()
            replays.first_capture = replays.first_capture or context._asked_at
            return enter(context, *arguments)

        def timed_leave(context, *arguments):
            result = leave(context, *arguments)
            replays.captures.append(time.perf_counter() - context._asked_at)
            return result

        self.patches = [
            patched(torch.cuda.CUDAGraph, "replay", timed_replay),
            patched(torch.cuda.graph, "__enter__", timed_enter),
            patched(torch.cuda.graph, "__exit__", timed_leave),
        ]
        for patch in self.patches:
            patch.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        for patch in reversed(self.patches):
            patch.__exit__(None, None, None)
        if self.running:
            self._stop()

    def _profiling(self) -> None:
        if self.profile_at is None:
            return
        if len(self) == self.profile_at:
            torch.cuda.synchronize()
            self.profile = torch.profiler.profile(activities=activities())
            self.profile.__enter__()
            self.running = True
        elif self.running and len(self) == self.profile_at + self.profile_steps:
            self._stop()

    def _stop(self) -> None:
        torch.cuda.synchronize()
        self.profile.__exit__(None, None, None)
        self.running = False

    def graph_seconds(self) -> float:
        """Median seconds of a replay on the device, over the later half."""
        return statistics.median(s.elapsed_time(e) for s, e in self.events[len(self.events) // 2 :]) / 1e3

    def step_seconds(self) -> float:
        """Seconds from replay to replay, sampling and the host's work included, over the later half."""
        half = len(self.asked) // 2
        whole = (len(self.asked) - half - 1) // 8 * 8  # whole blocks: the host waits once a block
        return (self.asked[half + whole] - self.asked[half]) / whole


def decode(bench: Bench) -> None:
    for rows in ROWS if not bench.cpu else ROWS[:2]:
        for weights in ("stored", "bf16"):
            takes = 3 + rows / 40
            bench.measure(f"{weights}, {rows} rows", lambda: one(bench, rows, weights), takes, "decode")
    for weights in ("stored", "bf16"):
        bench.measure(f"kernels, {weights}, 128 rows", lambda: kernels(bench, weights), 10, "kernels of a decode step")


def one(bench: Bench, rows: int, weights: str) -> dict:
    policy, base = bench.any_policy()
    rows = min(rows, 4) if bench.cpu else rows
    engine = policy.engine
    engine.max_batch, engine.cache_bytes, engine.pages = max(rows, 384), None, None
    return {"base": base, **decode_figures(bench, policy, rows, weights, NEW if not bench.cpu else 16)}


def generated(bench: Bench, policy, rows: int, tokens: int, salt: int = 0) -> float:
    """Seconds of a call of so many samples of different prompts."""
    from azr.policy.sampling import Sampling

    length, vocabulary = (24 if bench.cpu else CONTEXT), policy.base.config.vocab_size
    policy.model.eval()
    start = time.perf_counter()
    done = policy.engine.generate(
        prompts_of(rows, length, vocabulary, salt),
        1,
        Sampling(max_new_tokens=tokens, stop=()),
        [[i] for i in range(rows)],
    )
    bench.sync()
    short = [len(row[0].ids) for row in done if len(row[0].ids) != tokens]
    if short:
        raise RuntimeError(f"{len(short)} of {rows} samples have {short[0]} tokens instead of {tokens}")
    return time.perf_counter() - start


def decode_figures(bench: Bench, policy, rows: int, weights: str, tokens: int) -> dict:
    """One call of `rows` samples: ms a step, the graph's share, tokens/s, % of the roofline, prefill, captures."""
    before = policy.engine.rollout_weights
    policy.engine.rollout_weights = weights
    try:
        start = time.perf_counter()
        with Replays() as replays:
            whole = generated(bench, policy, rows, tokens)
        if len(replays) >= 32:
            step, timed = replays.step_seconds(), "stamps"
        else:  # no graphs: two calls of different lengths, prefill cancels
            step, timed = (whole - generated(bench, policy, rows, tokens // 2)) / (tokens - tokens // 2), "difference"
    finally:
        policy.engine.rollout_weights = before
    context = (24 if bench.cpu else CONTEXT) + tokens // 2
    kv = rows * context * kv_bytes(policy)
    least = (weight_bytes(policy, weights) + kv) / bandwidth(bench)
    figures = {
        "rows": rows,
        "weights": weights,
        "ms a step": 1e3 * step,
        "tokens/s": rows / step,
        "timed by": timed,
        "% of roofline": 100 * least / step,
        "roofline ms": 1e3 * least,
        "call s": whole,
    }
    if len(replays):
        figures |= {"ms a graph": 1e3 * replays.graph_seconds(), "replays": len(replays)}
    if replays.captures:
        figures |= {
            "s a capture": statistics.median(replays.captures),
            "captures": len(replays.captures),
            "prefill s": replays.first_capture - start,
        }
    return figures


def kv_bytes(policy) -> int:
    """Of one token in the cache of this policy."""
    config, decoder = policy.base.config, policy.engine.decoder
    return 2 * config.num_hidden_layers * decoder.kv_heads * decoder.head_dim * decoder.dtype.itemsize


def weight_bytes(policy, weights: str) -> int:
    """Of all weights that a decode step reads, with 4-bit matrices as they are stored or as copies."""
    unread = policy.base.get_input_embeddings().weight
    total = 0
    for parameter in policy.model.parameters():
        if parameter is unread and unread is not policy.base.get_output_embeddings().weight:
            continue
        state = getattr(parameter, "quant_state", None)
        if state is not None and weights == "bf16":
            total += state.shape.numel() * 2
            continue
        total += parameter.numel() * parameter.element_size()
        if state is not None:
            total += sum(v.numel() * v.element_size() for v in state.as_dict(packed=True).values())
    return total


def kernels(bench: Bench, weights: str) -> dict:
    """Profile of eight steps late in a call; on a CPU of the whole call."""
    policy, base = bench.any_policy()
    engine = policy.engine
    engine.max_batch, engine.cache_bytes, engine.pages, engine.rollout_weights = 384, None, None, weights
    try:
        if bench.cpu:
            with torch.profiler.profile(activities=activities()) as profile:
                generated(bench, policy, 1, 3)
            return {"base": base, "steps": 3, "kernels": kernel_table(profile)}
        with torch.profiler.profile(activities=activities()):
            torch.ones(8, device=bench.device).add_(1)  # the profiler is awake before a graph is made
        with Replays(profile_at=16, profile_steps=8) as replays:
            generated(bench, policy, 128, 40)
    finally:
        engine.rollout_weights = "stored"
    table = kernel_table(replays.profile)
    rest = {"base": base, "steps": 8, "kernels a step": table[0]["count"] / 8, "ms a step": table[0]["us"] / 8e3}
    return {**rest, "kernels": table}
