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
        torch.cuda.reset_peak_memory_stats()
        prose(probe(policy, optimizer, config, sizes))
        torch.cuda.empty_cache()  # sampling comes next and looks at what is free


def probe(policy: Policy, optimizer, config: Config, sizes: Sizes) -> str:
    """Runs it; returns one line with the sizes and the peak. DoesNotFit: not even one sequence fits."""
    context = getattr(policy.base.config, "max_position_embeddings", None) or sys.maxsize
    response = min(config.max_new_tokens, context - 1)
    longest = max(1, min(config.prompt_tokens, context - response)) + response
    parameters, training = policy.trainable_parameters(), policy.model.training
    # the room of both moments, where Adam has made none yet
    held = [torch.empty(2, *p.shape, dtype=p.dtype, device=p.device) for p in parameters if p not in optimizer.state]

    def work() -> list[tuple[int, int]]:
        optimizer.zero_grad(set_to_none=True)
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
        optimizer.zero_grad(set_to_none=True)
        policy.model.train(training)
        del held
    shown, peak = " and ".join(f"{rows} x {length}" for rows, length in batches), memory()
    gb = peak.get("memory/peak_gpu", peak["memory/peak_process"])
    return f"probe: the longest sequences allowed ({shown} tokens) forward and backward take up to {gb:.1f} GB"


def micro_batches(longest: int, token_budget: int) -> list[tuple[int, int]]:
    """(rows, tokens of each): as many of the longest as go together, and what fills the budget if they do not."""
    rows = max(1, token_budget // longest)
    shorter = token_budget // (rows + 1)
    return [(rows, longest)] + [(rows + 1, shorter)] * ((rows + 1) * shorter > rows * longest)
