"""Before training: the longest sequences that are allowed, once forward and backward, so that memory runs out now.

    at_start(policy, optimizer, config, sizes)      # prints one line; sizes are lowered if memory ran out

A micro-batch of sequences of the longest prompt and the longest response, and one of shorter ones if those leave room
in the token budget, through the scoring of an update; the memory of Adam's moments is held meanwhile, if they do not
exist yet. Memory that runs out lowers `sizes`, as in an update. Nothing else changes: no weight, no moment, no random
number; the gradient is thrown away. Left out: sampling, whose cache takes what is free and is halved when it was too
much.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import torch

from azr.console import prose
from azr.policy.backoff import Sizes, retry
from azr.train.metrics import memory

if TYPE_CHECKING:
    from azr.policy.policy import Policy
    from azr.train.config import Config

BONUS = ("bonus", "adaptive")  # entropy controls whose gradient goes through the entropies too


def at_start(policy: Policy, optimizer, config: Config, sizes: Sizes) -> None:
    """The probe and its line, on a GPU. A CPU's system ends a process that takes too much: nothing to back off from."""
    if policy.device.type == "cuda":
        prose(probe(policy, optimizer, config, sizes))


def probe(policy: Policy, optimizer, config: Config, sizes: Sizes) -> str:
    """Runs it; returns one line with the sizes and the peak. DoesNotFit: not even one sequence fits."""
    prompt, response = lengths(config, policy)
    longest, start = prompt + response, time.perf_counter()
    parameters, training = policy.trainable_parameters(), policy.model.training
    # the room of both moments, where Adam has made none yet
    held = [torch.empty(2, *p.shape, dtype=p.dtype, device=p.device) for p in parameters if p not in optimizer.state]
    on_gpu = policy.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def work() -> list[tuple[int, int]]:
        discard(parameters)
        batches = micro_batches(longest, sizes.token_budget)
        for rows, length in batches:
            after = min(length - 1, response)
            # different prompts: equal ones would share a row, which takes less
            prompts = [[row, *[0] * (length - after - 1)] for row in range(rows)]
            scored = policy.score(prompts, [[0] * after] * rows, config.temperature, rows * length, True, sizes.chunk)
            for _, log_prob, entropy, _ in scored:
                (log_prob.sum() + (entropy.sum() if config.control in BONUS else 0)).backward()
        return batches

    try:
        batches = retry(work, lambda: sizes.halve(longest), "the probe of the longest sequences")
    finally:
        discard(parameters)
        policy.model.train(training)
        del held
    if on_gpu:
        torch.cuda.synchronize()
    return described(batches, time.perf_counter() - start, on_gpu)


def lengths(config: Config, policy: Policy) -> tuple[int, int]:
    """Tokens of the longest prompt and the longest response, within the model's context."""
    context = getattr(policy.base.config, "max_position_embeddings", None) or sys.maxsize
    response = min(config.max_new_tokens, context - 1)
    return max(1, min(config.prompt_tokens, context - response)), response


def micro_batches(longest: int, token_budget: int) -> list[tuple[int, int]]:
    """(rows, tokens of each): as many of the longest as go together, and what fills the budget if they do not."""
    rows = max(1, token_budget // longest)
    shorter = token_budget // (rows + 1)
    return [(rows, longest)] + [(rows + 1, shorter)] * ((rows + 1) * shorter > rows * longest)


def discard(parameters: list[torch.nn.Parameter]) -> None:
    """Removes the gradients that the probe left, and the memory that they take."""
    for parameter in parameters:
        parameter.grad = None


def described(batches: list[tuple[int, int]], seconds: float, on_gpu: bool) -> str:
    """The line for the screen: what was run, its seconds, the peak of memory in GB (1e9). Frees a GPU's cache."""
    shown = " and ".join(f"{rows} x {length}" for rows, length in batches)
    what = f"probe: the longest sequences allowed ({shown} tokens) forward and backward"
    if not on_gpu:
        return f"{what}: {seconds:.1f} s, peak of the process {memory()['memory/peak_process']:.1f} GB"
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()  # sampling comes next and looks at what is free
    return f"{what}: {seconds:.1f} s, peak {peak / 1e9:.1f} of {total / 1e9:.1f} GB"
