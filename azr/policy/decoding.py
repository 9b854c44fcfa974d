"""One call of `Engine.generate` on the device: the KV cache, prefills, decode steps, and what became of each sample.

    results = Results(on_finish=None)
    Decoding(engine, engine.sequences(requests, results), longest, sampling, results).run()
    results.rows                            # the completions of each prompt

scheduler.py decides who runs; here its decisions become tensors. Before each block of steps everything that a step
needs is made from the host's lists, so there is no state on the device that could go stale. On CUDA the CPU reads the
sampled tokens once a block: what a sample computed after its end is cut off, and what it stored after its last page
went to page 0, which belongs to nobody.

Needs an `Engine` (engine.py) with its decoder, and the kernels of attention.py or cpu_attention.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from ..console import warn
from .attention import paged_decode
from .backoff import free_memory
from .cache import Group, Pages, Sequence, pages_for
from .cpu_attention import ByPage
from .graphs import Graphs
from .packing import Packing
from .sampling import Completion, Sampling, sample_tokens
from .scheduler import Scheduler
from .tree_attention import Tree
from .tree_attention import attend as attend_tree

if TYPE_CHECKING:
    from .engine import Engine

LOOK = 16  # decode steps between two looks at what has come in: each look may end in a prefill, which holds up all


class Results:
    """The completions of each prompt of one call; on_finish(prompt, sample, completion) is called as each ends."""

    def __init__(self, on_finish: Callable[[int, int, Completion], None] | None):
        self.on_finish = on_finish
        self.rows: list[list[Completion | None]] = []
        self.places: list[tuple[int, int]] = []  # of each sample of the call: its prompt, and its number there

    def add(self, n: int) -> int:
        """Makes room for n completions of one more prompt; the index of the first among all samples of the call."""
        first, prompt = len(self.places), len(self.rows)
        self.places += [(prompt, j) for j in range(n)]
        self.rows.append([None] * n)
        return first

    def put(self, index: int, completion: Completion) -> None:
        """The completion of sample `index` of the call."""
        prompt, j = self.places[index]
        self.rows[prompt][j] = completion
        if self.on_finish is not None:
            self.on_finish(prompt, j, completion)

    def refuse(self, first: int, length: int, limit: int, why: str) -> None:
        """Give a prompt of `length` tokens, which can never be sampled, completions without ids, and say why. first:
        the index of its first sample."""
        prompt = self.places[first][0]
        warn(f"prompt {prompt} is not sampled: it has {length} tokens and asks for {limit} more; {why}")
        for j in range(len(self.rows[prompt])):
            self.put(first + j, Completion([], [], "too_long"))


class Decoding:
    """One call: a scheduler of the samples, and the cache and steps that carry out what it decides.

    longest: tokens of the longest prompt with its limit, those that `more` brings among them (see Engine.generate; its
    samples are `most` at most). The decoder must have been prepared (`Decoder.prepare`) for longest + engine.block
    positions: a block may run past the last token.

    Nothing here may refer back to this object (a closure that is stored, a graph that holds a bound method): such a
    circle would keep gigabytes of cache alive after the call, until Python happens to look for circles.
    """

    def __init__(
        self,
        engine: Engine,
        sequences: list[Sequence],
        longest: int,
        sampling: Sampling,
        results: Results,
        more: Callable[[], list[tuple] | None] | None = None,
        most: int = 0,
    ):
        self.engine, self.sampling, self.results = engine, sampling, results
        self.decoder, self.device, self.page_size = engine.decoder, engine.decoder.device, engine.page_size
        on_cpu = self.device.type == "cpu"
        self.stop = engine.stop_table(sampling.stop)
        self.more, self.steps_to_look = more, LOOK
        slots = min(engine.max_batch, len(sequences) + most)
        self.width = pages_for(longest + engine.block, self.page_size)  # pages of the longest sequence
        # No more pages than all slots at full length can use, and one prompt that is held for samples that wait.
        self.cache = self._allocate(self._affordable(min(engine.pages, (slots + 1) * self.width)))
        # Views of it, made once: (2, pages, page_size, kv_heads, head_dim) of each layer, and for `ByPage` keys and
        # values with the pages of one head as its unit.
        self.layers = self.cache.unbind(1)
        self.by_head = [layer.transpose(2, 3).flatten(1, 2).unbind() for layer in self.layers] if on_cpu else None
        self.by_page: ByPage | None = None  # of the last step
        pages = Pages(self.cache.shape[2] - 1)
        self.scheduler = Scheduler(sequences, slots, pages, self.page_size, engine.prefill_tokens)
        self.graphs = None if on_cpu else Graphs(slots, self.width, self.device, engine.side_stream)

    def run(self) -> None:
        """Until every sample has ended and no more prompts come."""
        scheduler = self.scheduler
        while self._look_for_more() or scheduler.waiting or scheduler.running:
            if scheduler.may_admit() and self._prefill_step():
                continue
            if scheduler.running:
                self._decode_step()
            else:
                # Nobody runs and nobody could start: a held prompt has the pages that the first in line needs.
                scheduler.drop_held()

    def _look_for_more(self) -> bool:
        """Takes in the prompts that have come, LOOK decode steps after it did so last, or at once if there is nothing
        else to do. Counted in steps and not in seconds: who runs beside whom decides roundings. False: none come."""
        idle = not (self.scheduler.waiting or self.scheduler.running)
        if self.more and (idle or self.steps_to_look <= 0):
            self.steps_to_look, requests = LOOK, self.more()
            if requests is None:
                self.more = None
            else:
                new = self.engine.sequences(requests, self.results)
                if any(pages_for(len(s.prompt) + s.limit, self.page_size) > self.width for s in new):
                    raise ValueError("more() brought a prompt that is longer than the longest of the first")
                self.scheduler.add(new)
        return self.more is not None

    # -- the cache

    def _affordable(self, pages: int) -> int:
        """No more pages than fit into what is free on a GPU now, but enough for one sequence: the optimizer, or another
        process, may have taken memory since the engine counted its pages."""
        if self.device.type == "cpu" or self.engine.cache_bytes is not None:
            return pages
        torch.cuda.empty_cache()
        free = free_memory(self.device) - self.engine.working_bytes()
        return max(self.width, min(pages, int(free // self.engine.page_bytes())))

    def _allocate(self, count: int) -> torch.Tensor:
        """(2, layers, pages, page_size, kv_heads, head_dim): keys and values; `count` pages and page 0."""
        d, on_cpu = self.decoder, self.device.type == "cpu"
        # On a CPU the keys of one head lie together: its matrix products then need no copy.
        inner = (d.kv_heads, self.page_size) if on_cpu else (self.page_size, d.kv_heads)
        shape = (2, len(d.layers), count + 1, *inner, d.head_dim)
        # Zeros, because some backends multiply masked values with 0: NaN from used memory would come through.
        if not on_cpu:
            return torch.zeros(shape, dtype=d.dtype, device=self.device)
        # NumPy's zeros are memory that the system has not handed out yet: pages that nobody uses cost nothing.
        zeros = torch.from_numpy(np.zeros(math.prod(shape) * d.dtype.itemsize, np.uint8))
        return zeros.view(d.dtype).view(shape).transpose(3, 4)

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            source, target = self._tensor(copies).unbind(1)
            # Layer by layer: indexing all at once would hold the copied pages of every layer a second time.
            for layer in range(self.cache.shape[1]):
                self.cache[:, layer, target] = self.cache[:, layer, source]

    def _rotate_store(self, layer: int, q, k, v, cos, sin, where: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k at their positions; k and v (tokens, kv_heads, head_dim) go into the cache. where: (page of each
        token, offset in it)."""
        return self.decoder.ops.rotate_store(q, k, v, cos, sin, self.layers[layer], *where)

    # -- prefill

    def _prefill_step(self) -> bool:
        """Prefill the prompts and start the samples that the scheduler admits; False: no sample started."""
        new = self.scheduler.admit()
        if new.fresh:
            self.prefill(new.fresh)
        if new.starts:
            # After the prefill, which fills the pages that are copied, and before anyone writes into the copies.
            self._copy_pages(new.copies)
            self._first_tokens(new.starts)
        return bool(new.starts)

    def prefill(self, fresh: list[tuple[Group, list[int]]]) -> None:
        """Keys and values of whole prompts into their pages, and the logits after the last token into the groups."""
        on_cpu = self.device.type == "cpu"
        ids, position, attend, last = self._packed(fresh) if on_cpu else self._padded(fresh)
        # The head for the last tokens only: logits of every position would be (tokens, vocabulary) in fp32.
        hidden = self.decoder.forward(ids, position, attend, self._tensor(last))
        for (group, _), logits in zip(fresh, self.engine.head(hidden)):
            group.logits = logits

    def _padded(self, fresh: list[tuple[Group, list[int]]]) -> tuple:
        """(ids, positions (tokens,), attention, where the last token of each prompt is) of right-padded prompts:
        causal attention then needs no mask, so SDPA takes its fast kernel, and no real token sees the padding. What is
        stored for the padding is overwritten before anyone attends to it, or lies in page 0."""
        lengths = [len(group.tokens) for group, _ in fresh]
        rows, time = len(fresh), max(lengths)
        pad, blocks = self.engine.pad_id, pages_for(time, self.page_size)
        ids = self._tensor([[*group.tokens, *[pad] * (time - n)] for (group, _), n in zip(fresh, lengths)])
        pages = self._tensor([pages + [0] * (blocks - len(pages)) for _, pages in fresh])
        position = torch.arange(time, device=self.device)
        where = (pages[:, position // self.page_size].flatten(), (position % self.page_size).repeat(rows))

        def attend(layer, q, k, v, cos, sin, scale):
            q, k = self._rotate_store(layer, q, k, v, cos, sin, where)
            q, k, v = (t.reshape(rows, time, -1, t.shape[-1]).transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            return out.transpose(1, 2).flatten(0, 1)

        return ids.flatten(), position.repeat(rows), attend, [row * time + n - 1 for row, n in enumerate(lengths)]

    def _packed(self, fresh: list[tuple[Group, list[int]]]) -> tuple:
        """As `_padded`, without padding and with what prompts begin with in common once: it is computed for the first
        of them, and its keys and values are copied to the pages of the others."""
        packing = Packing()
        paths = {tokens: packing.add(tokens) for tokens in sorted({tuple(group.tokens) for group, _ in fresh})}
        packing.close()
        places: dict[int, tuple[int, int]] = {}  # of each packed token: a page and its offset in it
        copies: list[tuple[int, int, int, int]] = []
        for group, pages in fresh:
            for t, token in enumerate(paths[tuple(group.tokens)]):
                place = pages[t // self.page_size], t % self.page_size
                if places.setdefault(token, place) != place:
                    copies.append((*places[token], *place))
        where = tuple(self._tensor([places[token] for token in range(len(places))]).unbind(1))
        source, target = self._tensor(copies).view(-1, 2, 2).unbind(1)
        tree = Tree(packing.segments, self.decoder.heads // self.decoder.kv_heads, self.decoder.dtype)

        def attend(layer, q, k, v, cos, sin, scale):
            q, k = self._rotate_store(layer, q, k, v, cos, sin, where)
            if copies:
                cache = self.layers[layer]
                cache[:, target[:, 0], target[:, 1]] = cache[:, source[:, 0], source[:, 1]]
            q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
            return attend_tree(None, q, k, v, None, scale, tree=tree)[0][0]

        last = [paths[tuple(group.tokens)][-1] for group, _ in fresh]
        return self._tensor(packing.ids), self._tensor(packing.place), attend, last

    def _first_tokens(self, starts: list[tuple[Group, Sequence]]) -> None:
        """One token for each sample that starts, or goes on after it was preempted."""
        logits = torch.stack([group.logits for group, _ in starts])
        sequences = [sequence for _, sequence in starts]
        # Not all 0: a preempted sample goes on at the random number of its next token.
        count, seeds = self._tensor([len(s.ids) for s in sequences]), self._seeds(sequences)

        def sampled(exact: bool) -> list[tuple]:
            return [sample_tokens(logits, self.sampling, seeds, count, exact)]

        self._record(sequences, *self._read(sampled))

    # -- decode

    def _decode_step(self) -> None:
        """`block` steps for all that run; the CPU waits for the device once, at the end."""
        # No more steps than the sample with the most tokens left can use.
        steps = min(self.engine.block, max(s.limit - len(s.ids) for s in self.scheduler.running))
        self.steps_to_look -= steps
        self.scheduler.reserve(steps)
        if self.by_page is not None and self.by_page.scattered:
            # Copied once they are neighbours; gathered they would be copied in every step.
            self._copy_pages(self.scheduler.compact())
            self.by_page.scattered = False
        running = self.scheduler.running  # after `reserve`, which may have preempted some
        table = self._page_table(running, steps)
        rows = [[s.ids[-1] for s in running], [s.cached for s in running], [len(s.ids) for s in running]]
        token, position, count = self._tensor(rows)
        seeds = self._seeds(running)

        def sampled(exact: bool) -> list[tuple]:
            outcomes, now = [], token
            for step in range(steps):
                if self.graphs is not None:
                    hidden = self.graphs(self.hidden, now, position + step, table)
                else:
                    hidden = self.hidden(now, position + step, table)
                # The logits have no name here: they would live on beside those of the next step.
                outcomes.append(sample_tokens(self.engine.head(hidden), self.sampling, seeds, count + step, exact))
                now = outcomes[-1][0]  # stays on the device: the next step needs no word from the host
            return outcomes

        self._record(running, *self._read(sampled))

    def _page_table(self, running: list[Sequence], steps: int) -> torch.Tensor:
        """(rows, pages): the pages of each row after so many more steps, 0 where a row has none."""
        width = max(pages_for(s.cached + steps, self.page_size) for s in running)
        return self._tensor([s.pages + [0] * (width - len(s.pages)) for s in running])

    def hidden(self, token: torch.Tensor, position: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """(rows, H) after one more token of each row, whose keys and values are stored.

        token, position (rows,); table (rows, pages): the pages of each row, 0 where there is none. On a GPU this is
        what a graph captures: its launches depend on shapes alone, and it never waits for the device.
        """
        page = table.gather(1, (position // self.page_size)[:, None]).squeeze(1)
        where = (page, position % self.page_size)
        d, by_page, lengths = self.decoder, None, position + 1
        if self.engine.attention == "page":
            if self.by_page is None or not self.by_page.advance(table, lengths):
                self.by_page = ByPage(table, lengths, self.page_size, d.heads, d.kv_heads, d.head_dim)
            by_page = self.by_page
        else:
            table, lengths = table.int(), lengths.int()

        def attend(layer, q, k, v, cos, sin, scale):
            q, _ = self._rotate_store(layer, q, k, v, cos, sin, where)
            if by_page is not None:
                return by_page(q, *self.by_head[layer], scale)
            return paged_decode(self.engine.attention, q, *self.layers[layer], table, lengths, scale)

        return self.decoder.forward(token, position, attend)

    # -- between host and device

    def _read(self, steps: Callable[[bool], list[tuple]]) -> list[list[list]]:
        """[tokens, log-probs, entropies], a list for each row, from steps(exact) -> [(token, log_prob, entropy, sure),
        ...], one a step.

        The host waits for the device here and nowhere else. Where the quick truncation was not sure of a row, all
        steps are done again, exactly: they overwrite what they wrote.
        """
        for exact in (False, True):
            *sampled, sure = zip(*steps(exact))
            if exact or sure[0] is None or bool(torch.stack(sure).all()):
                break
        # each copy to the host waits: all that is not a token in one
        floats = torch.stack([torch.stack(values) for values in sampled[1:]])
        return [torch.stack(sampled[0]).t().tolist(), *floats.transpose(1, 2).tolist()]

    def _record(self, sequences: list[Sequence], *sampled: list[list]) -> None:
        """Append what was sampled, [tokens, log-probs, entropies] of each sequence, and let go of those that ended."""
        ended = set()
        for s, *rows in zip(sequences, *sampled):
            for token, log_prob, entropy in zip(*rows):
                s.ids.append(token)
                s.log_probs.append(log_prob)
                s.entropy.append(entropy)
                reason = self.stop.reason(s.ids) or ("length" if len(s.ids) >= s.limit else None)
                if reason:
                    self.results.put(s.index, Completion(s.ids, s.log_probs, reason, s.entropy))
                    ended.add(s)
                    break  # the rest of the block was sampled after the end
        self.scheduler.retire(ended)

    def _tensor(self, values: list) -> torch.Tensor:
        # Through a tensor on the host and without waiting: torch.tensor(..., device="cuda") would make the host wait.
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)

    def _seeds(self, sequences: list[Sequence]) -> torch.Tensor:
        return self._tensor([s.seed for s in sequences])
