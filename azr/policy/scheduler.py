"""Which samples of a call run next, and on which pages: lists and counts of the host, no tensors.

    scheduler = Scheduler(sequences, slots=64, pages=Pages(1000), page_size=64, prefill_tokens=8192)
    if scheduler.may_admit():
        admission = scheduler.admit()       # prompts to prefill, samples that start, pages to copy
    scheduler.reserve(8)                    # pages for 8 decode steps of all that run
    scheduler.retire(ended)                 # the pages of those that ended are free again

The rules:
- Prompts wait longest first. Samples of one prompt share its full pages; the page in which the prompt ends is copied
  for each, since each goes on writing there.
- Samples are admitted when an eighth of the slots is free, not one by one: a prefill holds up every sample that runs,
  so it should start several.
- A running sample gets pages as it grows. When none is free, the newest one is preempted: it loses its pages, waits in
  front of all others, and is prefilled again with what it has. Its tokens do not change, because each token's random
  number depends on the sample's seed and the token's position alone (sampling.py).

Imports cache.py alone; the two can be copied out together.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .cache import Group, Pages, Sequence, pages_for


@dataclass
class Admission:
    """What one prefill step has to do, in this order."""

    fresh: list[tuple[Group, list[int]]] = field(default_factory=list)  # prompts to prefill, and their pages
    copies: list[tuple[int, int]] = field(default_factory=list)  # (from page, to page)
    starts: list[tuple[Group, Sequence]] = field(default_factory=list)  # samples that get their first token


class Scheduler:
    """Who waits, who runs (oldest first), and which pages they use.

    slots: samples that run at once. pages: the cache's. prefill_tokens: padded tokens of one prefill; a single longer
    prompt is prefilled alone. The caller has refused what cannot fit even alone: with that, every call makes progress.
    """

    def __init__(self, sequences: list[Sequence], slots: int, pages: Pages, page_size: int, prefill_tokens: int):
        self.waiting: deque[Group] = deque()
        self.add(sequences)
        self.running: list[Sequence] = []
        self.slots, self.pages = slots, pages
        self.page_size, self.prefill_tokens = page_size, prefill_tokens
        # A sample was preempted and none has ended since. Admitting it again at once would take the pages that the
        # others grow into, and the same sample would be prefilled and preempted in every block.
        self.full = False

    def add(self, sequences: list[Sequence]) -> None:
        """More samples, which wait behind those that wait already."""
        self.waiting += by_prompt(sequences)

    @property
    def free_slots(self) -> int:
        """Samples that could run besides those that do."""
        return self.slots - len(self.running)

    # -- who starts

    def may_admit(self) -> bool:
        """Whether a prefill is worth holding up those that run: an eighth of the slots, or all that wait, can start."""
        if not self.running:
            return True
        enough = min(self.slots // 8, sum(len(group.waiting) for group in self.waiting))
        return bool(self.waiting) and not self.full and self.free_slots >= max(1, enough)

    def admit(self) -> Admission:
        """Start as many waiting samples as slots, pages and `prefill_tokens` allow. `starts` may be empty although a
        prompt is `fresh`: its samples then wait for pages, and the prompt keeps its own."""
        new, longest = Admission(), 0
        while self.waiting and self.free_slots:
            group = self.waiting[0]
            if group.pages is None:
                longest = max(longest, len(group.tokens))
                # Every prompt of a prefill is padded to the longest, so that is what each costs.
                too_much = new.fresh and (len(new.fresh) + 1) * longest > self.prefill_tokens
                if too_much or not self._take_prompt(group):
                    break
                # With its pages as they are now: the last sample to start takes them away from the group.
                new.fresh.append((group, group.pages))
            self._start_samples(group, new)
            if group.waiting:
                break
            self.waiting.popleft()
        return new

    def _start_samples(self, group: Group, new: Admission) -> None:
        while group.pages and group.waiting and self.free_slots and self._take_pages(group, new.copies):
            new.starts.append((group, group.waiting.popleft()))
            self.running.append(new.starts[-1][1])

    def _spare(self) -> int:
        """Free pages beyond one for each running sample to grow into."""
        return len(self.pages.free) - len(self.running)

    def _take_prompt(self, group: Group) -> bool:
        need = pages_for(len(group.tokens), self.page_size)
        # Beside running samples a prompt must leave one page more than it takes, for its first sample to grow into.
        if len(self.pages.free) < need or (self.running and self._spare() <= need):
            return False
        group.pages = [self.pages.take() for _ in range(need)]
        return True

    def _take_pages(self, group: Group, copies: list[tuple[int, int]]) -> bool:
        """Pages for the next sample of a prefilled group: the full ones shared, and a copy of the one in which the
        prompt ends. False: there are too few."""
        sequence, complete = group.waiting[0], len(group.tokens) // self.page_size
        partial = len(group.pages) - complete  # 0 or 1
        # Nothing runs, so no page will ever be given back: without this the sample would wait for a copy for ever.
        stuck = not self.running and len(self.pages.free) < 1 + partial
        # The last sample needs no copy: nobody else will read the page in which the prompt ends.
        if stuck or len(group.waiting) == 1:
            sequence.pages, group.pages = group.pages, None  # if others wait, the prompt is prefilled again for them
            return True
        if self._spare() < 1 + partial:
            return False
        sequence.pages = self.pages.share(group.pages[:complete])
        if partial:
            sequence.pages.append(self.pages.take())
            copies.append((group.pages[-1], sequence.pages[-1]))
        return True

    # -- who makes room

    def reserve(self, steps: int) -> None:
        """Pages for the next steps of every running sample, the oldest first; the newest are preempted for them."""
        # Over a copy, since preempting shortens the list. A sample preempted on the way has no pages and is passed by.
        for sequence in list(self.running):
            # Never beyond the sample's limit: what it computes after its end goes to page 0 (see decoding.py).
            need = pages_for(min(sequence.cached + steps, len(sequence.prompt) + sequence.limit), self.page_size)
            while sequence.pages and len(sequence.pages) < need:
                if self.pages.free:
                    sequence.pages.append(self.pages.take())
                # A held prompt goes first: to prefill it again costs less than a sample's whole text.
                elif not self.drop_held():
                    self.preempt(self.running[-1])

    def drop_held(self) -> bool:
        """Give up a prefill whose remaining samples still wait. False: there is none."""
        for group in self.waiting:
            if group.pages is not None:
                self.pages.release(group.pages)
                group.pages = group.logits = None
                return True
        return False

    def preempt(self, sequence: Sequence) -> None:
        """Take the pages of a running sample; it waits in front, to be prefilled with its prompt and its tokens."""
        self.running.remove(sequence)
        self.pages.release(sequence.pages)
        sequence.pages = []
        self.waiting.appendleft(Group(sequence.prompt + tuple(sequence.ids), deque([sequence])))
        self.full = True

    def compact(self) -> list[tuple[int, int]]:
        """Brings the pages in use together (`Pages.compact`); the pages to copy."""
        held = [group.pages for group in self.waiting if group.pages is not None]
        return self.pages.compact([sequence.pages for sequence in self.running] + held)

    def retire(self, ended: set[Sequence]) -> None:
        """Let go of the samples that ended, and of their pages."""
        for sequence in ended:
            self.pages.release(sequence.pages)
        if ended:
            self.running = [sequence for sequence in self.running if sequence not in ended]
            self.full = False


def by_prompt(sequences: list[Sequence]) -> deque[Group]:
    """One group for each distinct prompt, longest first, so that the prompts of one prefill are of similar length and
    little of it is padding."""
    groups: dict[tuple[int, ...], Group] = {}
    for sequence in sequences:
        groups.setdefault(sequence.prompt, Group(sequence.prompt)).waiting.append(sequence)
    return deque(sorted(groups.values(), key=lambda group: -len(group.tokens)))
