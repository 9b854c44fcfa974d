"""Sequences of a micro-batch as one flat row of tokens: no padding, and what sequences have in common only once.

    packed = pack(prompts, responses)
    packed.ids, packed.place        # (tokens,) token ids and positions, for a model that reads one row
    packed.states                   # for each sample the flat indices of the states that predict its response
    packed.segments                 # who sees whom: see tree_attention.py

Answers to one prompt share it, proposals share the text that their prompts begin with, equal answers are one. The last
token of a response predicts nothing that is asked for and is left out.

    pack([[1, 2, 3], [1, 2, 3]], [[7, 8], [9, 8]])  with LEAST = 2 or 3:
    ids 1 2 3 7 9, places 0 1 2 3 3, states [2, 3] and [2, 4]
"""

from typing import NamedTuple

import torch

LEAST = 16  # tokens in common that are worth a segment: each costs further products in every layer


class Segment(NamedTuple):
    """Tokens first to end follow each other; those up to last, which come after them, see all of them."""

    first: int
    end: int
    last: int


class Packed(NamedTuple):
    """What `pack` gives."""

    ids: torch.Tensor  # (tokens,) int64
    place: torch.Tensor  # (tokens,) int64, position in the sequence
    states: list[list[int]]
    segments: list[Segment]  # in the order of their last token


class Packing:
    """Sequences laid out one after the other. They must come sorted: then what a sequence has in common with all
    before it, it has in common with the last."""

    def __init__(self):
        self.ids: list[int] = []
        self.place: list[int] = []
        self.segments: list[Segment] = []
        self.last: tuple[int, ...] = ()  # the sequence before
        self.path: list[int] = []  # where its tokens lie
        self.open: list[tuple[int, int]] = []  # its segments, from the root: flat index and depth they begin at

    def shared(self, sequence: tuple[int, ...]) -> int:
        """How many of its first tokens lie there already and are worth sharing: down to where it leaves the sequence
        before, or else to the last place above that where another one has left."""
        common, shortest = 0, min(len(sequence), len(self.last))
        while common < shortest and sequence[common] == self.last[common]:
            common += 1
        ends = [*(depth for _, depth in self.open), len(self.last)]
        fork = max((depth for depth in ends if depth <= common), default=0)
        return common if common - fork >= LEAST else fork

    def add(self, sequence: tuple[int, ...]) -> list[int]:
        """Lays it out; the flat index of each of its tokens."""
        shared = self.shared(sequence)
        self.close(shared)
        first = len(self.ids)
        self.ids += sequence[shared:]
        self.place += range(shared, len(sequence))
        self.path = [*self.path[:shared], *range(first, len(self.ids))]
        if shared < len(sequence):
            self.open.append((first, shared))
        self.last = sequence
        return self.path

    def close(self, depth: int = 0) -> None:
        """Nothing more comes below the segments, or parts of them, that lie deeper than `depth`."""
        bottom = len(self.last)
        while self.open and bottom > depth:
            first, top = self.open.pop()
            cut = max(depth, top)
            self.segments.append(Segment(first + cut - top, first + bottom - top, len(self.ids)))
            if top < cut:
                self.open.append((first, top))
            bottom = cut


def pack(prompts: list[list[int]], responses: list[list[int]]) -> Packed:
    """The tree of these sequences in depth-first order; prompts must not be empty."""
    packing, whole = Packing(), _whole(prompts, responses)
    paths = {sequence: packing.add(sequence) for sequence in sorted(set(whole))}
    packing.close()
    states = [paths[w][len(p) - 1 :][: len(r)] for w, p, r in zip(whole, prompts, responses)]
    return Packed(torch.tensor(packing.ids), torch.tensor(packing.place), states, packing.segments)


def packed_batches(prompts: list[list[int]], responses: list[list[int]], token_budget: int) -> list[list[int]]:
    """Indices of samples in micro-batches of at most `token_budget` packed tokens, save for one sample that has more;
    those that begin alike lie side by side."""
    whole, packing = _whole(prompts, responses), Packing()
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(whole)), key=lambda i: (whole[i], i)):
        if batches[-1] and len(packing.ids) + len(whole[i]) - packing.shared(whole[i]) > token_budget:
            packing = Packing()
            batches.append([])
        packing.add(whole[i])
        batches[-1].append(i)
    return batches if whole else []


def _whole(prompts: list[list[int]], responses: list[list[int]]) -> list[tuple[int, ...]]:
    return [(*prompt, *response[:-1]) for prompt, response in zip(prompts, responses, strict=True)]
