"""The host's picture of a paged KV cache: samples, the prompts they wait for, and who uses which page.

    pages = Pages(1000)                          # pages 1 to 1000; page 0 belongs to nobody
    sequence.pages = [pages.take() for _ in range(pages_for(len(sequence.prompt), page_size=64))]
    pages.release(sequence.pages)

After vLLM's PagedAttention (Kwon et al. 2023, arXiv 2309.06180): a page holds the keys and values of `page_size`
consecutive tokens, and several sequences may list the same page. Everything here is a Python list or number; the device
holds keys and values and nothing else, so there is no second copy of this state that could disagree with it. Imports
nothing of the project and can be copied out alone.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# Compared by identity (eq=False): two samples of one prompt may hold equal tokens and are still two, and only an object
# that is compared by identity can be in the set of those that ended.
@dataclass(eq=False)
class Sequence:
    """One sample: its prompt, what was sampled so far, and the pages that hold its keys and values."""

    index: int  # among all samples of the call, in the order of their prompts
    prompt: tuple[int, ...]  # token ids
    limit: int  # new tokens, at most
    seed: int = 0  # one of `sampling.seed_tensor`
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)  # in the order of the tokens

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are in the cache: all but the last one sampled.

        The last one is the input of the next decode step, which stores its keys and values at this position.
        """
        return len(self.prompt) + len(self.ids) - 1


@dataclass(eq=False)
class Group:
    """Tokens to prefill and the samples that wait for them.

    `pages` and `logits` are set by the prefill and stay until all samples have started: a prompt is computed once,
    however many samples it has and however few slots are free.
    """

    tokens: tuple[int, ...]
    waiting: deque[Sequence] = field(default_factory=deque)
    pages: list[int] | None = None
    logits: torch.Tensor | None = None  # (vocabulary,) fp32, after the last token


class Pages:
    """Which of the pages 1, 2, ... `count` are free, and how many sequences use each of the others."""

    def __init__(self, count: int):
        # A heap: low pages are taken first, so what is in use lies together. cpu_attention.py can then read a range of
        # pages as it lies instead of gathering them.
        self.free = list(range(1, count + 1))
        self.users = [0] * (count + 1)

    def take(self) -> int:
        """The lowest free page, now with one user. IndexError: none is free; callers look at `free` first."""
        page = heapq.heappop(self.free)
        self.users[page] = 1
        return page

    def share(self, pages: list[int]) -> list[int]:
        """One more user for each of these pages; returns them as a list of the new user's own."""
        for page in pages:
            self.users[page] += 1
        return list(pages)

    def release(self, pages: list[int]) -> None:
        """One user less for each of these pages; those without a user are free again."""
        for page in pages:
            self.users[page] -= 1
            if not self.users[page]:
                heapq.heappush(self.free, page)

    def compact(self, holders: list[list[int]]) -> list[tuple[int, int]]:
        """Renumber the pages in use, which are those in the lists of `holders`: pages of one user lie together from
        below, pages of several from above. Changes the lists; returns (old, new) of each page that has to be copied,
        all at once, for a new page may be another's old one."""
        used = sorted({page for pages in holders for page in pages})
        alone = [page for page in used if self.users[page] == 1]
        shared = [page for page in used if self.users[page] > 1]
        count = len(self.users) - 1
        new = dict(zip(alone, range(1, count + 1))) | dict(zip(reversed(shared), range(count, 0, -1)))
        users = [0] * (count + 1)
        for page in used:
            users[new[page]] = self.users[page]
        self.users, self.free = users, [page for page in range(1, count + 1) if not users[page]]
        for pages in holders:
            pages[:] = [new[page] for page in pages]
        return [(page, new[page]) for page in used if page != new[page]]


def copies_pay(room: float, copies: float, full_cache: float) -> bool:
    """Whether sampling should hold unpacked copies of 4-bit weights (--rollout-weights auto). All in bytes.

    room: for the copies and the KV cache together; copies: of the unpacked weights; full_cache: of a cache in which
    every slot reaches its limit. Products were faster with copies at every batch size measured (H200, 1 to 384 rows),
    but a cache that holds few responses costs more than any weights save.
    """
    # A quarter is enough, since few responses grow to their limit.
    return room - copies >= full_cache / 4


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that so many tokens of one sequence fill, the last one perhaps in part."""
    return -(-tokens // page_size)
