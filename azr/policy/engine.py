"""Batched sampling over a paged KV cache, with the trainer's own modules: what `Policy.generate` runs.

    engine = Engine(backbone, head, config, tokenizer, eos_ids, max_batch=128)
    completions = engine.generate(prompt_ids, n=8, sampling=Sampling(max_new_tokens=512), seeds=seeds)

How it works:
- State. A `Sequence` is a prompt and what was sampled so far; a `Group` is a distinct prompt with the samples that
  still wait for it. All of it is on the host; the device holds keys and values and nothing else.
- Memory. Keys and values lie in pages of `page_size` tokens, counted by `Pages`. Samples of one prompt share its full
  pages; the page in which the prompt ends is copied for each.
- Policy. A prefill step (one pass per distinct prompt, then the first token of its samples), when an eighth of the
  slots is free; else `block` decode steps. Finished sequences leave at once. No page left: the newest sequence is
  preempted, waits in front, and is prefilled again with what it has; nothing is admitted until one has finished.
  A request that can never fit is refused alone.
- Tensors. Before each block, everything a step needs is made from the host's lists: there is no state to go stale.
- Loop. On CUDA the steps of a block are graphs, and the CPU reads the sampled tokens once a block: what a sequence
  sampled after its end is cut off, what it wrote after its last page went to page 0, which belongs to nobody.

All of it dies with the call, at once: nothing here refers to itself in a circle, because a circle would keep gigabytes
of cache alive until Python happens to look for circles. Which weights, which adapters: looked up anew by each call. It
knows token ids, not tasks. Left out: prefix sharing between different prompts, chunked prefill, speculative decoding,
several GPUs.
"""

import heapq
import sys
from collections import deque
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from azr.policy.backoff import free_memory
from azr.policy.cpu_attention import ByPage
from azr.policy.decoder import ROLLOUT_WEIGHTS, Decoder, Unsupported
from azr.policy.attention import choose_attention, paged_decode
from azr.policy.rollout_weights import copies_pay
from azr.policy.sampling import Completion, Sampling, StopTable, sample_without_wait, seed_tensor

__all__ = ["Completion", "Engine", "Sampling", "StopTable", "Unsupported"]

CPU_CACHE_BYTES = 2 << 30
# Rows of the decode steps that are captured as graphs: each capture costs a tenth of a second, each padding row a share
# of a step. Steps of few rows cost the same whatever their number, so the sizes are dense where rows are few.
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384)


# --------------------------------------------------------------------------------------------------------------- state


@dataclass(eq=False)
class Sequence:
    """One sample: its prompt, what was sampled so far, and the pages that hold its keys and values."""

    index: int  # among all samples of the call
    prompt: tuple[int, ...]
    limit: int  # new tokens
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are in the cache: all but the last one sampled."""
        return len(self.prompt) + len(self.ids) - 1


@dataclass(eq=False)
class Group:
    """Tokens to prefill and the samples that wait for them; pages and logits from the prefill on, until all started."""

    tokens: tuple[int, ...]
    waiting: deque[Sequence] = field(default_factory=deque)
    pages: list[int] | None = None
    logits: torch.Tensor | None = None  # (vocabulary,) after the last token


# -------------------------------------------------------------------------------------------------------------- memory


class Pages:
    """Which of the pages 1, 2, ... `count` are free, and how many sequences use each of the others."""

    def __init__(self, count: int):
        self.free = list(range(1, count + 1))  # a heap: low pages first, so that what is in use lies together
        self.users = [0] * (count + 1)

    def take(self) -> int:
        page = heapq.heappop(self.free)
        self.users[page] = 1
        return page

    def share(self, pages: list[int]) -> list[int]:
        for page in pages:
            self.users[page] += 1
        return list(pages)

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self.users[page] -= 1
            if not self.users[page]:
                heapq.heappush(self.free, page)


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


# -------------------------------------------------------------------------------------------------------------- engine


class Engine:
    """Samples from `backbone` + `head`. Nothing is kept between calls but sizes and the tables of stop tokens.

    backbone: the transformer without its head; head: hidden (rows, H) -> fp32 logits (rows, vocabulary).
    max_batch: sequences decoded at once. attn: auto | flash | triton | sdpa. rollout_weights: stored | bf16 (4-bit
    layers as copies in the dtype of computation while `generate` runs) | auto (bf16 on a GPU where copies_pay says
    so at the first call; `rollout_weights` then says which). prefill_tokens: padded tokens of a prefill.
    pages, page_size: of the KV cache; default: what the attention wants, and what is free (or `cache_bytes`) at the
    first call, less `reserve`: bytes that the owner will take later and that sampling must leave (Adam's moments,
    before the first update). block: decode steps between two looks at the tokens (default 8 on CUDA, 1 on CPU).

    Raises Unsupported (another architecture), AttentionError (an attention that cannot run here), ValueError.
    """

    def __init__(self, backbone, head, config, tokenizer, eos_ids, *, max_batch=256, attn="auto",
                 rollout_weights="auto", cache_bytes=None, pages=None, page_size=None, prefill_tokens=8192,
                 block=None, pad_id=0):  # fmt: skip
        if rollout_weights not in ROLLOUT_WEIGHTS:
            raise ValueError(f"rollout_weights must be {', '.join(ROLLOUT_WEIGHTS)}, not {rollout_weights!r}")
        self.decoder = d = Decoder(backbone, config)
        self.head, self.config, self.tokenizer, self.eos_ids = head, config, tokenizer, frozenset(eos_ids)
        self.max_batch, self.prefill_tokens, self.rollout_weights = max_batch, prefill_tokens, rollout_weights
        self.cache_bytes, self.pages, self.pad_id = cache_bytes, pages, pad_id
        on_cpu = d.device.type == "cpu"
        self.attention, self.page_size, self.attention_note = choose_attention(
            attn, d.device, d.dtype, d.heads, d.kv_heads, d.head_dim
        )
        if on_cpu and attn == "auto":
            self.attention, self.attention_note = "page", "attention page: page by page, on the CPU"
        self.page_size = page_size or self.page_size
        self.block = block or (1 if on_cpu else 8)
        self.reserve = 0
        self.tables: dict[tuple[str, ...], StopTable] = {}
        # one for all captures: cuBLAS keeps a work space of 8 to 32 MiB for every stream that it has met
        self.side_stream = None if on_cpu else torch.cuda.Stream(d.device)
        d.prepare()  # parameters get their final addresses before an optimizer or a graph sees them
        d.release()

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[list[int]],
                 max_new_tokens: list[int] | None = None, on_finish=None) -> list[list[Completion]]:  # fmt: skip
        """n completions for each prompt; seeds[i][j] decides sample j of prompt i.

        max_new_tokens: a limit for each prompt instead of the one in `sampling`. on_finish(i, j, completion) is called
        as sample j of prompt i ends, long before the slowest one does. A prompt that exceeds the model's
        context or the whole cache with its limit gives completions without ids and finish_reason "too_long", and one
        line on stderr. The same call gives the same bits. ValueError: an empty prompt, seeds of another shape.
        """
        limits = max_new_tokens or [sampling.max_new_tokens] * len(prompts)
        self._check(prompts, n, seeds, limits)
        done = _Done(n, len(prompts) * n, on_finish)
        longest = max((len(prompt) + limit for prompt, limit in zip(prompts, limits)), default=0)
        self._resolve_weights(longest)
        self._resolve_pages()
        fitting = []
        for i, (prompt, limit) in enumerate(zip(prompts, limits)):
            if (reason := self._misfit(len(prompt), limit)) is None:
                fitting += [Sequence(i * n + j, tuple(prompt), limit) for j in range(n)]
            else:
                _warn(f"prompt {i} is not sampled: {reason}")
                for j in range(n):
                    done.put(i * n + j, Completion([], [], "too_long"))
        if fitting:
            longest = max(len(s.prompt) + s.limit for s in fitting)
            try:
                self.decoder.prepare(self.rollout_weights, longest + self.block)
                _Decoding(self, fitting, [s for row in seeds for s in row], longest, sampling, done).run()
            finally:
                self.decoder.release()
                if self.decoder.device.type == "cuda":
                    torch.cuda.empty_cache()  # training finds the memory in one piece
        return [done.completions[i * n : (i + 1) * n] for i in range(len(prompts))]

    # -- sizes

    def page_bytes(self) -> int:
        d = self.decoder
        return 2 * len(d.backbone.layers) * self.page_size * d.kv_heads * d.head_dim * d.dtype.itemsize

    def _resolve_weights(self, longest: int) -> None:
        """Once: whether a 4-bit base is unpacked for sampling, if that was left to the engine."""
        if self.rollout_weights != "auto":
            return
        self.rollout_weights, copies = "stored", self.copied_bytes()
        if self.decoder.device.type == "cpu" or not copies:
            return
        torch.cuda.empty_cache()
        room = free_memory(self.decoder.device) - self.working_bytes() - self.reserve
        full = (self.max_batch + 1) * pages_for(longest + self.block, self.page_size) * self.page_bytes()
        pays = copies_pay(room, copies, full)
        self.rollout_weights = "bf16" if pays else "stored"
        why = "fit beside the cache" if pays else "leave too little for the cache"
        gb = f"copies of {copies / 1e9:.1f} GB {why}, {room / 1e9:.1f} GB are free"
        _say(f"rollout weights {self.rollout_weights}: {gb}")

    def _resolve_pages(self) -> None:
        """Once: as many pages as fit into what is free (or `cache_bytes`), besides what a step itself needs."""
        if self.pages is not None:
            return
        room = self.cache_bytes
        if room is None:
            room = CPU_CACHE_BYTES
            if self.decoder.device.type == "cuda":
                torch.cuda.empty_cache()
                room = free_memory(self.decoder.device) - self.working_bytes() - self.reserve
                room -= self.copied_bytes() if self.rollout_weights == "bf16" else 0
        self.pages = max(1, int(room // self.page_bytes()))

    def working_bytes(self) -> int:
        """Estimate of what a call needs on a GPU beside the cache and copied weights: prefill, logits, graphs."""
        c = self.config
        prefill = self.prefill_tokens * (8 * c.hidden_size + 6 * c.intermediate_size) * self.decoder.dtype.itemsize
        return prefill + 24 * self.max_batch * c.vocab_size + (1 << 30)

    def copied_bytes(self) -> int:
        """Of the 4-bit weights, unpacked."""
        # by their weights: a LoRA layer shows its base's weight as its own
        states = (getattr(p, "quant_state", None) for p in self.decoder.backbone.parameters())
        return sum(state.shape.numel() for state in states if state is not None) * self.decoder.dtype.itemsize

    def _check(self, prompts, n, seeds, limits) -> None:
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty; a prompt needs at least one token")
        if len(seeds) != len(prompts) or any(len(row) != n for row in seeds):
            raise ValueError(f"seeds must hold {n} integers for each of the {len(prompts)} prompts")
        if len(limits) != len(prompts) or any(limit < 1 for limit in limits):
            raise ValueError(f"max_new_tokens must hold a number above 0 for each of the {len(prompts)} prompts")

    def _misfit(self, length: int, limit: int) -> str | None:
        context = getattr(self.config, "max_position_embeddings", None)
        asked = f"it has {length} tokens and asks for {limit} more"
        if context and length + limit > context:
            return f"{asked}; the model's context is {context}"
        if pages_for(length + limit, self.page_size) > self.pages:
            return f"{asked}; the KV cache has {self.pages} pages of {self.page_size}"
        return None

    def stop_table(self, stop: tuple[str, ...]) -> StopTable:
        if stop not in self.tables:
            self.tables[stop] = StopTable(self.tokenizer, self.config.vocab_size, stop, self.eos_ids)
        return self.tables[stop]


class _Done:
    """The completions of one call, and who is told of each."""

    def __init__(self, n: int, count: int, on_finish):
        self.n, self.on_finish = n, on_finish
        self.completions: list[Completion | None] = [None] * count

    def put(self, index: int, completion: Completion) -> None:
        self.completions[index] = completion
        if self.on_finish is not None:
            self.on_finish(*divmod(index, self.n), completion)


class _Decoding:
    """One call of `generate`: who waits, who runs, and the cache."""

    def __init__(self, engine: Engine, sequences, seeds: list[int], longest: int, sampling: Sampling, done: "_Done"):
        self.engine, self.sampling, self.done = engine, sampling, done
        self.decoder, self.device, self.page_size = engine.decoder, engine.decoder.device, engine.page_size
        self.table, self.seeds = engine.stop_table(sampling.stop), seed_tensor(seeds, self.device)
        self.waiting = _distinct(sequences)
        self.running: list[Sequence] = []  # oldest first
        self.full = False  # a sequence was preempted, and none has finished since
        self.slots = min(engine.max_batch, len(sequences))
        self.width = pages_for(longest + engine.block, self.page_size)  # pages of the longest sequence
        # no more than all slots can use, and a prompt that is held
        self.cache = self._allocate(self._affordable(min(engine.pages, (self.slots + 1) * self.width)))
        self.pages = Pages(self.cache.shape[2] - 1)
        self.graphs = Graphs(self) if self.device.type == "cuda" else None

    def _affordable(self, pages: int) -> int:
        """No more pages than fit into what is free on a GPU now, but one sequence's: who trains, or another process,
        may have taken memory since the engine counted its pages."""
        if self.device.type == "cpu" or self.engine.cache_bytes is not None:
            return pages
        torch.cuda.empty_cache()
        free = free_memory(self.device) - self.engine.working_bytes()
        return max(self.width, min(pages, int(free // self.engine.page_bytes())))

    def _allocate(self, count: int) -> torch.Tensor:
        """(2, layers, pages, page_size, kv_heads, head_dim). Zeros: what is masked must still be finite."""
        d, on_cpu = self.decoder, self.device.type == "cpu"
        # on a CPU the keys of one head lie together: its matrix products then need no copy
        inner = (d.kv_heads, self.page_size) if on_cpu else (self.page_size, d.kv_heads)
        shape = (2, len(d.layers), count + 1, *inner, d.head_dim)
        cache = torch.zeros(shape, dtype=d.dtype, device=self.device)
        return cache.transpose(3, 4) if on_cpu else cache

    def run(self) -> None:
        while self.waiting or self.running:
            if self._may_admit() and self._prefill_step():
                continue
            if self.running:
                self._decode_step()
            else:
                self._drop_held()

    # -- policy: who starts

    def _may_admit(self) -> bool:
        if not self.running:
            return True
        wanted = min(self.slots // 8, sum(len(group.waiting) for group in self.waiting))
        return bool(self.waiting) and not self.full and self.slots - len(self.running) >= max(1, wanted)

    def _prefill_step(self) -> bool:
        """Start as many waiting samples as slots, pages and `prefill_tokens` allow; False: none."""
        fresh: list[tuple[Group, list[int]]] = []  # prompts to prefill, and their pages
        starts: list[tuple[Group, Sequence]] = []
        copies: list[tuple[int, int]] = []  # (from page, to page)
        longest = 0
        while self.waiting and len(self.running) < self.slots:
            group = self.waiting[0]
            if group.pages is None:
                longest = max(longest, len(group.tokens))
                over = fresh and (len(fresh) + 1) * longest > self.engine.prefill_tokens
                if over or not self._take_prompt(group):
                    break
                fresh.append((group, group.pages))
            while (
                group.pages and group.waiting and len(self.running) < self.slots and self._take_pages(group, copies)
            ):
                starts.append((group, group.waiting.popleft()))
                self.running.append(starts[-1][1])
            if group.waiting:
                break
            self.waiting.popleft()
        if fresh:
            self._prefill(fresh)
        if starts:
            self._copy_pages(copies)
            self._first_tokens(starts)
        return bool(starts)

    def _spare(self) -> int:
        """Free pages beyond one for each running sequence to grow into."""
        return len(self.pages.free) - len(self.running)

    def _take_prompt(self, group: Group) -> bool:
        need = pages_for(len(group.tokens), self.page_size)
        if len(self.pages.free) < need or (self.running and self._spare() <= need):
            return False
        group.pages = [self.pages.take() for _ in range(need)]
        return True

    def _take_pages(self, group: Group, copies: list) -> bool:
        """Pages for the next sample of a prefilled group: the full ones shared, and a copy of the one in which the
        prompt ends. The last sample takes over the group's own; so does one that would wait for them for ever."""
        sequence, complete = group.waiting[0], len(group.tokens) // self.page_size
        partial = len(group.pages) - complete  # 0 or 1
        stuck = not self.running and len(self.pages.free) < 1 + partial
        if stuck or len(group.waiting) == 1:
            sequence.pages, group.pages = group.pages, None  # if others wait, they prefill again
            return True
        if self._spare() < 1 + partial:
            return False
        sequence.pages = self.pages.share(group.pages[:complete])
        if partial:
            sequence.pages.append(self.pages.take())
            copies.append((group.pages[-1], sequence.pages[-1]))
        return True

    # -- policy: who makes room

    def _reserve(self, steps: int) -> None:
        """Pages for the next steps of every running sequence, the oldest first; the newest are preempted for them."""
        for sequence in list(self.running):
            need = pages_for(min(sequence.cached + steps, len(sequence.prompt) + sequence.limit), self.page_size)
            while sequence.pages and len(sequence.pages) < need:
                if self.pages.free:
                    sequence.pages.append(self.pages.take())
                elif not self._drop_held():
                    self._preempt(self.running[-1])

    def _drop_held(self) -> bool:
        """Give up a prefill whose remaining samples still wait."""
        for group in self.waiting:
            if group.pages is not None:
                self.pages.release(group.pages)
                group.pages = group.logits = None
                return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pages.release(sequence.pages)
        sequence.pages = []
        self.waiting.appendleft(Group(sequence.prompt + tuple(sequence.ids), deque([sequence])))
        self.full = True

    # -- tensors and steps

    def _prefill(self, fresh: list[tuple[Group, list[int]]]) -> None:
        """Keys and values into the pages, logits after the last token into the groups. Right-padded: causal attention
        needs no mask, and what is computed for the padding is overwritten before anyone attends to it."""
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

        hidden = self.decoder.forward(ids.flatten(), position.repeat(rows), attend)
        last = [row * time + n - 1 for row, n in enumerate(lengths)]
        for (group, _), logits in zip(fresh, self.engine.head(hidden[self._tensor(last)])):
            group.logits = logits

    def _first_tokens(self, starts: list[tuple[Group, Sequence]]) -> None:
        """One token for each sample that starts, or goes on after it was preempted."""
        logits = torch.stack([group.logits for group, _ in starts])
        sequences = [sequence for _, sequence in starts]
        count, seeds = self._tensor([len(s.ids) for s in sequences]), self._seeds(sequences)
        self._record(sequences, *self._sampled(
            lambda exact: [sample_without_wait(logits, self.sampling, seeds, count, exact)]
        ))

    def _sampled(self, steps) -> tuple[list[list[int]], list[list[float]]]:
        """(tokens, log-probs), a list for each row, from steps(exact) -> [(token, log_prob, sure), ...], one a step.

        The host waits for the device here and nowhere else. Where the quick truncation was not sure of a row, all
        steps are done again, exactly: they overwrite what they wrote.
        """
        for exact in (False, True):
            tokens, log_probs, sure = zip(*steps(exact))
            if exact or sure[0] is None or bool(torch.stack(sure).all()):
                break
        return torch.stack(tokens).t().tolist(), torch.stack(log_probs).t().tolist()

    def _decode_step(self) -> None:
        """`block` steps for all that run; the CPU waits for the device once, at the end."""
        steps = min(self.engine.block, max(s.limit - len(s.ids) for s in self.running))
        self._reserve(steps)
        running = self.running
        width = max(pages_for(s.cached + steps, self.page_size) for s in running)
        table = self._tensor([s.pages + [0] * (width - len(s.pages)) for s in running])
        token, position, count = self._tensor([[s.ids[-1] for s in running], [s.cached for s in running],
                                               [len(s.ids) for s in running]])  # fmt: skip
        seeds = self._seeds(running)

        def sampled(exact: bool) -> list[tuple]:
            done, now = [], token
            for step in range(steps):
                if self.graphs is not None:
                    hidden = self.graphs(self.hidden, now, position + step, table)
                else:
                    hidden = self.hidden(now, position + step, table)
                done.append(
                    sample_without_wait(self.engine.head(hidden), self.sampling, seeds, count + step, exact)
                )
                now = done[-1][0]
            return done

        self._record(running, *self._sampled(sampled))

    def hidden(self, token: torch.Tensor, position: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """(rows, H) after one more token of each row, whose keys and values are stored.

        token, position (rows,); table (rows, pages): the pages of each row, 0 where there is none.
        """
        page = table.gather(1, (position // self.page_size)[:, None]).squeeze(1)
        where = (page, position % self.page_size)
        by_page = ByPage(table, position + 1, self.page_size) if self.engine.attention == "page" else None
        table, lengths = table.int(), (position + 1).int()

        def attend(layer, q, k, v, cos, sin, scale):
            q, _ = self._rotate_store(layer, q, k, v, cos, sin, where)
            keys, values = self.cache[0, layer], self.cache[1, layer]
            if by_page is not None:
                return by_page(q, keys, values, scale)
            return paged_decode(self.engine.attention, q, keys, values, table, lengths, scale)

        return self.decoder.forward(token, position, attend)

    def _rotate_store(self, layer: int, q, k, v, cos, sin, where: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k at their positions; k and v (tokens, kv_heads, head_dim) into the cache. where: (page of each token,
        offset in it)."""
        return self.decoder.ops.rotate_store(q, k, v, cos, sin, self.cache[0, layer], self.cache[1, layer], *where)

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            source, target = self._tensor(copies).unbind(1)
            for layer in range(self.cache.shape[1]):
                self.cache[:, layer, target] = self.cache[:, layer, source]

    def _tensor(self, values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)

    def _seeds(self, sequences: list[Sequence]) -> torch.Tensor:
        return self.seeds[self._tensor([s.index for s in sequences])]

    def _record(self, sequences: list[Sequence], tokens: list[list[int]], log_probs: list[list[float]]) -> None:
        """Append what was sampled, a list for each sequence, and let go of those that ended."""
        finished = set()
        for s, new_ids, new_log_probs in zip(sequences, tokens, log_probs):
            for token, log_prob in zip(new_ids, new_log_probs):
                s.ids.append(token)
                s.log_probs.append(log_prob)
                reason = self.table.reason(s.ids) or ("length" if len(s.ids) >= s.limit else None)
                if reason:
                    self.done.put(s.index, Completion(s.ids, s.log_probs, reason))
                    self.pages.release(s.pages)
                    finished.add(s)
                    break
        if finished:
            self.running = [s for s in self.running if s not in finished]
            self.full = False


class Graphs:
    """Decode steps captured as CUDA graphs, one for each of GRAPH_SIZES (and multiples of the last) that occurs.

    Inputs are copied to fixed addresses; rows beyond the batch write to page 0. They hold addresses of weights and of
    the cache, so they live as long as one call of `generate`. They do not hold the decoding they belong to: its cache
    would then live until Python looks for circles. Logits come after the replay: kept by every graph, those of a
    vocabulary of 150,000 would take gigabytes.
    """

    def __init__(self, decoding: _Decoding):
        self.captured, self.pool, self.side = {}, torch.cuda.graph_pool_handle(), decoding.engine.side_stream
        rows = self.size(decoding.slots)
        self.token, self.position = torch.zeros(2, rows, dtype=torch.int64, device=decoding.device)
        self.table = torch.zeros(rows, decoding.width, dtype=torch.int64, device=decoding.device)

    @staticmethod
    def size(rows: int) -> int:
        largest = GRAPH_SIZES[-1]
        return next((n for n in GRAPH_SIZES if rows <= n), -(-rows // largest) * largest)

    def __call__(self, step, token, position, table) -> torch.Tensor:
        """What step(token, position, table) gives for these rows, replayed."""
        rows, size = len(token), self.size(len(token))
        self.token[:size], self.position[:size], self.table[:size] = 0, 0, 0
        self.token[:rows], self.position[:rows], self.table[:rows, : table.shape[1]] = token, position, table
        if size not in self.captured:
            self.captured[size] = self._capture(step, self.token[:size], self.position[:size], self.table[:size])
        graph, hidden = self.captured[size]
        graph.replay()
        return hidden[:rows]

    def _capture(self, step, *inputs):
        side = self.side or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles kernels and makes workspaces; it writes what the replay writes again
            step(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            hidden = step(*inputs)
        return graph, hidden


def _distinct(sequences: list[Sequence]) -> deque[Group]:
    """One group for each distinct prompt, longest first, so that prompts of a prefill are of similar length."""
    groups: dict[tuple[int, ...], Group] = {}
    for sequence in sequences:
        groups.setdefault(sequence.prompt, Group(sequence.prompt)).waiting.append(sequence)
    return deque(sorted(groups.values(), key=lambda group: -len(group.tokens)))


def _warn(text: str) -> None:
    _say(f"warning: {text}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
