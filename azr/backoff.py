"""When memory runs out: compute less at once, do the failed part again, say so, remember it.

    sizes = Sizes(token_budget=8192)
    metrics = retry(lambda: optimizer_step(..., sizes), lambda: sizes.halve(longest_sample), "update")

What is repeated must begin from nothing (a gradient from zero), and what is lowered must not change the result: the
gradient does not depend on the micro-batch, nor a sample on what else is decoded with it (beyond rounding). Left out:
raising a size again; memory that ran out once does so again.
"""

from __future__ import annotations

import gc
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
    """work(), again after smaller() whenever memory runs out; one line each time. What smaller() raises ends it."""
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Here the error is gone, and with it the frames that held half-computed tensors.
        free()
        print(f"warning: out of memory in {what}: {smaller()}; nothing else changes", file=sys.stderr, flush=True)


def free() -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def once_more(work: Callable[[], T], what: str) -> T:
    """work(), a second time if memory runs out, with what was cached freed; DoesNotFit if it does again.

    For what cannot be done in smaller parts.
    """
    tried: list[str] = []

    def cleared() -> str:
        if tried:
            raise DoesNotFit(f"out of memory in {what}, twice; free memory elsewhere, or take a smaller --preset")
        tried.append(what)
        return "what was cached is freed, and once more"

    return retry(work, cleared, what)


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
