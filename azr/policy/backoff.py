"""When memory runs out: free what is cached and do the failed part again; then with less at once, say so, remember it.

    sizes = Sizes(token_budget=8192)
    metrics = retry(lambda: optimizer_step(..., sizes), lambda: sizes.halve(longest_sample), "update")

What is repeated must begin from nothing (a gradient from zero), and what is lowered must not change the result: the
gradient does not depend on the micro-batch, nor a sample on what else is decoded with it (beyond rounding). Left out:
raising a size again; memory that ran out once does so again.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

LEAST_ROWS = 16  # of logits at once; below, memory is not spent on them
T = TypeVar("T")


class DoesNotFit(RuntimeError):
    """Memory ran out with the smallest sizes; one line that says what to change."""


@dataclass
class Sizes:
    """What is scored at once: padded tokens of a micro-batch, and rows of logits (None: scoring.py chooses)."""

    token_budget: int
    chunk: int | None = None

    def halve(self, longest: int) -> str:
        """Lowers the budget until every sample (the longest has `longest` tokens) is alone, then the rows of logits.

        Returns what it did. DoesNotFit if nothing is left to lower.
        """
        before = self.token_budget
        if before > longest:
            self.token_budget = max(longest, before // 2)
            return f"token budget {before} -> {self.token_budget}"
        if self.chunk is not None and self.chunk <= LEAST_ROWS:
            raise DoesNotFit(
                f"out of memory with a single sample of {longest} tokens; lower --max-new-tokens, --prompt-tokens or "
                "--lora-rank"
            )
        self.chunk = 256 if self.chunk is None else max(LEAST_ROWS, self.chunk // 2)
        return f"{self.chunk} rows of logits at once"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: of a GPU, of the CPU's allocator, or inside a library that reports it in words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def retry(work: Callable[[], T], smaller: Callable[[], str], what: str) -> T:
    """work(), again whenever memory runs out; one line each time.

    The first time only what nothing refers to any more is freed: what an earlier phase left behind is no reason to
    compute less for the rest of the run. From the second time on smaller() is called before; what it raises ends it.
    """
    failures = 0
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Here the error is gone, and with it the frames that held half-computed tensors.
        free()
        failures += 1
        change = "freed what was cached, and once more" if failures == 1 else smaller()
        print(f"warning: out of memory in {what}: {change}; nothing else changes", file=sys.stderr, flush=True)


def free() -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> float:
    """Bytes that a GPU can still give to this process: what nobody holds, within the share that torch was allowed."""
    free_bytes, total = torch.cuda.mem_get_info(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return min(free_bytes, share * total - torch.cuda.memory_reserved(device)) if share < 1 else free_bytes


def allocate_in_segments_that_grow() -> None:
    """Before CUDA wakes: lets torch's allocator extend its segments (expandable_segments), unless the user has settled
    the allocator otherwise. Sampling and training take the same memory in pieces of other sizes, in turn; in fixed
    segments the pieces of one are holes for the other."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # torch 2.9 renamed it and reads both


def once_more(work: Callable[[], T], what: str) -> T:
    """work(), a second time if memory runs out, with what was cached freed; DoesNotFit if it does again.

    For what cannot be done in smaller parts.
    """

    def no_less() -> str:
        raise DoesNotFit(f"out of memory in {what}, twice; free memory elsewhere, or take a smaller --preset")

    return retry(work, no_less, what)


# ------------------------------------------------------------------------------------------------------------ sampling


SLOTS, PAGES = ("max_batch", "batch_size"), "pages"  # what the engines call sequences at once, and cache pages


def rollout_sizes(engine) -> dict:
    """What the engine holds at once: sequences, and pages of its cache (None: not resolved yet)."""
    return {name: getattr(engine, name) for name in (*SLOTS, PAGES) if hasattr(engine, name)}


def set_rollout_sizes(engine, sizes: dict) -> None:
    for name, value in sizes.items():
        setattr(engine, name, value)


def halve_rollout(engine, longest: int, sequences: int) -> str:
    """Half the sequences (of so many asked for) and half the cache, as long as a request of `longest` tokens fits.

    DoesNotFit: no less left.
    """
    before = rollout_sizes(engine)
    for name in before.keys() & set(SLOTS):
        setattr(engine, name, max(1, min(before[name], sequences) // 2))
    if before.get(PAGES):
        engine.pages = min(engine.pages, max(engine.pages // 2, -(-longest // engine.page_size)))
    after = rollout_sizes(engine)
    if after == before:
        raise DoesNotFit(
            f"out of memory sampling a single sequence of up to {longest} tokens; lower --max-new-tokens or "
            "--prompt-tokens"
        )
    return ", ".join(f"{name} {before[name]} -> {after[name]}" for name in after if after[name] != before[name])
