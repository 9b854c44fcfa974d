"""When memory runs out: free what is cached and repeat the failed part; then repeat it with smaller sizes, which stay.

    sizes = Sizes(token_budget=8192)
    metrics = retry(lambda: optimizer_step(..., sizes), lambda: sizes.halve(longest_sample), "update")

What is repeated must begin from nothing (a gradient from zero), and what is lowered must not change the result: the
gradient does not depend on the micro-batch, nor a sample on what else is decoded with it (beyond rounding). Left out:
raising a size again; memory that ran out once does so again.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..console import warn

LEAST_ROWS = 16  # of logits at once: 10 MB for a vocabulary of 151,936, so with fewer nothing is gained
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
        # The samples are alone already, so what is left to lower is the rows of logits that are held at once.
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
    if "StreamCaptureInvalidated" in str(error) and error.__context__ is not None:
        # What fails while a CUDA graph is captured spoils the end of the capture too, whose error then hides the first.
        return is_out_of_memory(error.__context__)
    # cuBLAS, bitsandbytes and Triton raise a plain RuntimeError, and torch's CPU allocator does too.
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def retry(work: Callable[[], T], smaller: Callable[[], str], what: str, failures: int = 0) -> T:
    """work(), again whenever memory runs out; one line on stderr each time.

    After the first failure only unused memory is freed: what an earlier phase left behind is no reason to compute less
    for the rest of the run. From the second on smaller() lowers something and says what; an exception of its own
    (DoesNotFit) ends the attempts. failures: of the same work before, which count.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of `except`: the error is gone, and with it the frames that held half-computed tensors. Garbage first:
        # tensors in circles of references hold blocks that empty_cache could not give back to the GPU.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        failures += 1
        change = "freed what was cached, and once more" if failures == 1 else smaller()
        warn(f"out of memory in {what}: {change}; nothing else changes")


def free_memory(device: torch.device) -> float:
    """Bytes that a GPU can still give to this process: what nobody holds, within the share that torch was allowed."""
    free_bytes, total = torch.cuda.mem_get_info(device)
    # What torch has reserved counts against its own share, whether tensors use it or not. Older versions
    # of torch cannot tell the share.
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return min(free_bytes, share * total - torch.cuda.memory_reserved(device)) if share < 1 else free_bytes


def allocate_in_segments_that_grow() -> None:
    """Let torch's allocator extend its segments (expandable_segments), unless the user has set the allocator already.

    Sampling and training take the same memory in turn, in pieces of other sizes; in fixed segments the pieces of one
    are holes for the other. Must be called before CUDA is initialised: torch reads the variable once.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # torch 2.9 renamed it and reads both


def once_more(work: Callable[[], T], what: str) -> T:
    """work(); if memory runs out, free what is cached and do it a second time. For what has no smaller parts.

    DoesNotFit: memory ran out twice.
    """

    def no_less() -> str:
        raise DoesNotFit(f"out of memory in {what}, twice; free memory elsewhere, or take a smaller --preset")

    return retry(work, no_less, what)


# ------------------------------------------------------------------------------------------------------------ sampling
def rollout_sizes(engine) -> dict:
    """What the engine holds at once: sequences, and pages of its cache (None: not resolved yet, or it has none)."""
    return {"max_batch": engine.max_batch, "pages": engine.pages}


def set_rollout_sizes(engine, sizes: dict) -> None:
    """Put back what `rollout_sizes` gave, as a run that resumes does: sizes decide roundings."""
    for name, value in sizes.items():
        setattr(engine, name, value)


def halve_rollout(engine, longest: int, sequences: int) -> str:
    """Halve the sequences at once and the cache's pages; a request of `longest` tokens still fits. Says what changed.

    sequences: of the call that failed; a call with fewer sequences than slots would not notice half of the slots.
    DoesNotFit: one sequence and its pages are all that is left.
    """
    before = rollout_sizes(engine)
    engine.max_batch = max(1, min(engine.max_batch, sequences) // 2)
    if engine.pages:
        engine.pages = min(engine.pages, max(engine.pages // 2, -(-longest // engine.page_size)))
    after = rollout_sizes(engine)
    if after == before:
        raise DoesNotFit(
            f"out of memory sampling a single sequence of up to {longest} tokens; lower --max-new-tokens or "
            "--prompt-tokens"
        )
    return ", ".join(f"{name} {before[name]} -> {after[name]}" for name in after if after[name] != before[name])
