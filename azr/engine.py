"""The decode loop behind `Policy.generate`: batched sampling with a KV cache that is written in place.

    engine = Engine(backbone, head, config, tokenizer, eos_ids)
    completions = engine.generate(prompt_ids, n=8, sampling=Sampling(max_new_tokens=64), seeds=seeds)

It knows token ids, not tasks, and it borrows the trainer's own modules: the quantized weights and the live, unmerged
LoRA tensors. There is no copy that could be stale; the KV cache dies with each call of `generate`.

How it works. All sequences of the batch write the same column of the cache, and a sequence of length L occupies the
columns [column - L, column); what lies left of it is masked. So a waiting prompt can take the slot of a finished
sequence at any time: its keys and values are computed by one right-padded, mask-free prefill per distinct prompt and
copied in front of the current column. When all live sequences have left the left edge, the cache is shifted.

Left out: pages (a short sequence holds as many columns as the longest), CUDA graphs, prefix sharing between different
prompts, sliding-window and recurrent layers.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

WORD = (1 << 64) - 1
GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
NORMAL, STOP_CANDIDATE, EOS = 0, 1, 2


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ("</answer>",)

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ValueError(f"stop must be a tuple of non-empty strings, not {self.stop!r}")


@dataclass
class Completion:
    ids: list[int]  # the EOS token or the tokens that complete a stop string are included
    log_probs: list[float]  # of the untruncated distribution at the sampling temperature (greedy: at 1)
    finish_reason: str  # "stop" | "eos" | "length"


# ---------------------------------------------------------------------------------------------------- random numbers


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014) on int64 tensors; products wrap around modulo 2^64."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def seed_tensor(seeds: list[int], device) -> torch.Tensor:
    """(n,) int64: any Python integers, taken modulo 2^64 and mixed, so that neighbouring seeds are unrelated."""
    wrapped = [((s & WORD) ^ (1 << 63)) - (1 << 63) for s in seeds]
    return _mix64(torch.tensor(wrapped, dtype=torch.int64, device=device) + GOLDEN)


def uniform(mixed_seeds: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """(n,) float64 in [0, 1): one number for each (seed, position), whatever else is in the batch.

    `mixed_seeds` comes from `seed_tensor`; `position` (n,) int64 counts the tokens of the response from 0.
    """
    bits = _mix64(mixed_seeds + (position + 1) * GOLDEN)
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def sample_tokens(logits, sampling: Sampling, mixed_seeds, position) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row of `logits` (rows, vocabulary): ids (rows,) and fp32 log-probs (rows,).

    Inverse CDF with the sum in float64 and one uniform number per (seed, position). Order of the truncations as in
    transformers: temperature, then top-k, then top-p on what is left. The log-prob ignores both.
    """
    z = logits.float()
    if sampling.temperature == 0:
        token = z.argmax(-1)
    else:
        z = z / sampling.temperature
    log_z = torch.logsumexp(z, -1, keepdim=True)
    if sampling.temperature > 0:
        token = _inverse_cdf((z - log_z).exp_(), sampling, uniform(mixed_seeds, position))
    log_prob = (z.gather(-1, token[:, None]) - log_z).squeeze(-1)
    return token, log_prob


def _inverse_cdf(probability: torch.Tensor, sampling: Sampling, u: torch.Tensor) -> torch.Tensor:
    order = None
    if sampling.top_p < 1 or sampling.top_k:
        probability, order = probability.sort(dim=-1, descending=True, stable=True)
        if sampling.top_k:
            probability[:, sampling.top_k :] = 0
        if sampling.top_p < 1:
            total = probability.sum(-1, keepdim=True)
            before = probability.cumsum(-1) - probability
            probability = probability.masked_fill(before >= sampling.top_p * total, 0)
    cdf = probability.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp_(max=cdf.shape[-1] - 1)
    return (index if order is None else order.gather(-1, index)).squeeze(-1)


# -------------------------------------------------------------------------------------------------------- stopping


class StopTable:
    """Which tokens can end a response: EOS tokens, and tokens whose text can be the end of a stop string."""

    def __init__(self, tokenizer, vocab_size: int, stop: tuple[str, ...], eos_ids: frozenset[int], device):
        self.tokenizer, self.stop = tokenizer, stop
        # a stop string spans at most as many tokens as it has bytes
        self.tail = max((len(s.encode()) for s in stop), default=0)
        kind = torch.zeros(vocab_size, dtype=torch.uint8)
        if stop:
            texts = tokenizer.batch_decode([[i] for i in range(vocab_size)], clean_up_tokenization_spaces=False)
            for i, text in enumerate(texts):
                if any(_can_complete(text, s) for s in stop):
                    kind[i] = STOP_CANDIDATE
        for i in eos_ids:
            if i < vocab_size:
                kind[i] = EOS
        self.kind = kind.to(device)

    def complete(self, ids: list[int]) -> bool:
        """Does the response end with a token that completes a stop string?"""
        text = self.tokenizer.decode(ids[-self.tail :], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(s in text for s in self.stop)


def _can_complete(text: str, stop: str) -> bool:
    """Can appending a token with this text make the stop string appear? Bytes of a split character: assume so."""
    if "\ufffd" in text:
        return not stop.isascii()
    return any(stop.endswith(text[:j]) or text[:j].endswith(stop) for j in range(1, len(text) + 1))


# -------------------------------------------------------------------------------------------------------- KV cache


class _Layer(DynamicLayer):
    """One layer of the shared-column cache: keys and values (slots, kv heads, width, head dim), written in place."""

    def __init__(self, owner: "ColumnCache"):
        super().__init__()
        self.owner = owner

    def update(self, key_states, value_states, *args, **kwargs):
        rows, column = key_states.shape[0], self.owner.column
        self.keys[:rows, :, column : column + 1] = key_states
        self.values[:rows, :, column : column + 1] = value_states
        return self.keys[:rows, :, : column + 1], self.values[:rows, :, : column + 1]

    def get_seq_length(self) -> int:
        return self.owner.column


class ColumnCache(Cache):
    """A preallocated cache in which every row writes the same column (see the module docstring)."""

    def __init__(self, num_layers: int, slots: int, width: int):
        super().__init__(layers=[_Layer(self) for _ in range(num_layers)])
        self.slots, self.width, self.column = slots, width, 0

    def insert(self, rows: torch.Tensor, source: torch.Tensor, lengths: torch.Tensor, prefill: list) -> None:
        """Copy prefilled prompts in front of the current column: row rows[i] gets prompt source[i].

        rows, source (k,); lengths (prompts,); prefill: one (keys, values) per layer, each (prompts, heads, L, dim),
        right-padded.
        """
        span = prefill[0][0].shape[2]
        # left-align: the last `length` of the `span` columns; the rest repeats token 0, finite and masked
        time = (torch.arange(span, device=rows.device) - (span - lengths[source])[:, None]).clamp_(min=0)
        for layer, (keys, values) in zip(self.layers, prefill):
            if layer.keys is None:
                shape = (self.slots, keys.shape[1], self.width, keys.shape[3])
                # zeros, not empty: a NaN left in memory would pass through the mask as 0 * NaN
                layer.keys, layer.values = keys.new_zeros(shape), values.new_zeros(shape)
            for target, new in ((layer.keys, keys), (layer.values, values)):
                chosen = new[source[:, None], :, time].transpose(1, 2)  # (k, heads, span, dim)
                target[rows, :, self.column - span : self.column] = chosen

    def select(self, rows: torch.Tensor, shift: int) -> None:
        """Keep these rows, in this order, and move everything `shift` columns to the left."""
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                kept = tensor[:, :, shift : self.column].index_select(0, rows)
                tensor[: len(rows), :, : self.column - shift] = kept
        self.column -= shift


@dataclass
class _Group:
    """A distinct prompt and the samples that still wait for a slot."""

    prompt: tuple[int, ...]
    waiting: deque = field(default_factory=deque)
    prefill: list | None = None  # per layer (keys, values), each (1, heads, L, dim), kept until all have started
    logits: torch.Tensor | None = None  # (1, vocabulary) at the last position


# ---------------------------------------------------------------------------------------------------------- engine


class Engine:
    """Samples from `backbone` + `head`. Nothing is kept between calls but the tables of stop tokens.

    backbone: the transformer without its head, called as transformers call it; head: hidden (rows, H) -> fp32 logits;
    max_batch: sequences decoded at once; cache_bytes: bound of the KV cache; prefill_tokens: padded tokens a prefill.
    """

    def __init__(self, backbone, head, config, tokenizer, eos_ids, *, max_batch=256, cache_bytes=None,
                 prefill_tokens=8192, pad_id=0):
        self.backbone, self.head, self.config, self.tokenizer = backbone, head, config, tokenizer
        self.eos_ids, self.pad_id = frozenset(eos_ids), pad_id
        self.max_batch, self.cache_bytes, self.prefill_tokens = max_batch, cache_bytes, prefill_tokens
        self.tables: dict[tuple[str, ...], StopTable] = {}

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        c = self.config
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim * dtype.itemsize

    def slots_for(self, width: int, device, dtype: torch.dtype) -> int:
        """Sequences of `width` tokens fit the cache bound (default: half of a GPU's free memory; CPU: 2 GiB)."""
        room = self.cache_bytes
        if room is None:
            room = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2 << 30
        return max(1, min(self.max_batch, room // (width * self.bytes_per_token(dtype))))

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[list[int]]):
        """n completions for each prompt; seeds[i][j] decides sample j of prompt i. Returns list[list[Completion]].

        ValueError: an empty prompt, a prompt that leaves no room for max_new_tokens in the model's context, seeds of
        another shape.
        """
        self._check(prompts, n, sampling, seeds)
        if not prompts or n == 0:
            return [[] for _ in prompts]
        flat = _Decoding(self, prompts, n, sampling, [s for row in seeds for s in row]).run()
        return [flat[i * n : (i + 1) * n] for i in range(len(prompts))]

    def stop_table(self, stop: tuple[str, ...], device) -> StopTable:
        if stop not in self.tables:
            self.tables[stop] = StopTable(self.tokenizer, self.config.vocab_size, stop, self.eos_ids, device)
        return self.tables[stop]

    def _check(self, prompts, n, sampling, seeds) -> None:
        context = getattr(self.config, "max_position_embeddings", None)
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty; a prompt needs at least one token")
            if context and len(prompt) + sampling.max_new_tokens > context:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens: with max_new_tokens {sampling.max_new_tokens} it exceeds "
                    f"the model's context of {context}; shorten the prompt or lower max_new_tokens"
                )
        if len(seeds) != len(prompts) or any(len(row) != n for row in seeds):
            raise ValueError(f"seeds must hold {n} integers for each of the {len(prompts)} prompts")


class _Decoding:
    """The state of one call of `generate`.

    Per slot (tensors of `slots` entries): which sample it holds, its left padding, its last token, how many tokens it
    has, whether it is alive. A dead slot is computed until it is refilled or removed; it writes to a spare sample.
    """

    def __init__(self, engine: Engine, prompts, n: int, sampling: Sampling, seeds: list[int]):
        self.engine, self.sampling = engine, sampling
        weight = next(engine.backbone.parameters())
        self.device, self.dtype = weight.device, engine.backbone.dtype
        self.table = engine.stop_table(sampling.stop, self.device)
        self.total = total = len(prompts) * n
        self.queue = _distinct(prompts, n)
        longest = len(self.queue[0].prompt) + sampling.max_new_tokens
        width = longest + 64  # slack, so that shifting the cache to the left is rare
        slots = min(total, engine.slots_for(width, self.device, self.dtype))
        self.cache = ColumnCache(engine.config.num_hidden_layers, slots, width)
        self.seeds = seed_tensor(seeds + [0], self.device)
        # one row more than there are samples: where dead slots write
        self.ids = torch.zeros(total + 1, sampling.max_new_tokens, dtype=torch.int64, device=self.device)
        self.log_probs = torch.zeros(total + 1, sampling.max_new_tokens, device=self.device)
        self.mask = torch.zeros(slots, width, dtype=self.dtype, device=self.device)  # additive: 0 or -inf
        self.sample = torch.full((slots,), total, device=self.device)
        self.pad, self.token, self.count, self.alive = (torch.zeros_like(self.sample) for _ in range(4))
        self.left = {}  # slot -> left padding of the live ones, known without asking the device
        self.free = list(range(slots - 1, -1, -1))
        self.rows = 0  # slots [0, rows) are computed
        self.done: list[Completion | None] = [None] * total

    def run(self) -> list[Completion]:
        refill = max(1, len(self.free) // 8)
        while True:
            while self.queue and (len(self.free) >= refill or not self.left):
                self._admit()
            if not self.left:
                return self.done
            self._tidy()
            self._step()

    # -- one decode step

    def _step(self) -> None:
        rows, column = self.rows, self.cache.column
        hidden = self.engine.backbone(
            input_ids=self.token[:rows, None],
            position_ids=(column - self.pad[:rows])[:, None],
            attention_mask=self.mask[:rows, None, None, : column + 1],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.cache.column += 1
        self._record(slice(0, rows), self.engine.head(hidden[:, -1]))

    def _record(self, rows, logits: torch.Tensor) -> None:
        """Sample one token for these slots, store it, and retire the sequences that it ends."""
        sample, count, alive = self.sample[rows], self.count[rows], self.alive[rows]
        token, log_prob = sample_tokens(logits, self.sampling, self.seeds[sample], count)
        self.ids[sample, count] = token
        self.log_probs[sample, count] = log_prob
        self.token[rows] = token
        self.count[rows] = count + alive
        kind = self.table.kind[token]
        ends = ((kind != NORMAL) | (count + 1 >= self.sampling.max_new_tokens)) & (alive > 0)
        ended = ends.nonzero().squeeze(-1)  # the CPU waits for the device here, once a step
        if len(ended):
            slots = ended if isinstance(rows, slice) else rows[ended]
            self._retire(slots, kind[ended].tolist())

    def _retire(self, slots: torch.Tensor, kinds: list[int]) -> None:
        samples, counts = self.sample[slots].tolist(), self.count[slots].tolist()
        ids, log_probs = self.ids[self.sample[slots]].tolist(), self.log_probs[self.sample[slots]].tolist()
        finished = []
        for k, slot in enumerate(slots.tolist()):
            response = ids[k][: counts[k]]
            if kinds[k] == EOS:
                reason = "eos"
            elif kinds[k] == STOP_CANDIDATE and self.table.complete(response):
                reason = "stop"
            elif counts[k] >= self.sampling.max_new_tokens:
                reason = "length"
            else:
                continue
            self.done[samples[k]] = Completion(response, log_probs[k][: counts[k]], reason)
            finished.append(slot)
            del self.left[slot]
        if finished:
            index = torch.tensor(finished, device=self.device)
            self.sample[index], self.count[index], self.alive[index] = self.total, 0, 0
            self.free.extend(reversed(finished))

    # -- admission

    def _admit(self) -> None:
        """Give free slots to waiting samples: prefill their prompts (each once) and sample their first tokens."""
        picked = []  # (group, its samples that start now)
        room, tokens = len(self.free), 0
        while self.queue and room:
            group = self.queue[0]
            if group.prefill is None:
                # the queue is sorted, longest first, so the first prompt of the batch sets its padded length
                tokens += len(picked[0][0].prompt if picked else group.prompt)
                if picked and tokens > self.engine.prefill_tokens:
                    break
            take = min(room, len(group.waiting))
            picked.append((group, [group.waiting.popleft() for _ in range(take)]))
            room -= take
            if not group.waiting:
                self.queue.popleft()
        if not self.left:
            self.cache.column = len(picked[0][0].prompt)
        fresh = [group for group, _ in picked if group.prefill is None]
        held = [(group, samples) for group, samples in picked if group.prefill is not None]
        if held:  # at most one: the group that did not fit last time
            self._insert(held, held[0][0].prefill, held[0][0].logits)
        if fresh:
            prefill, logits = self._prefill([group.prompt for group in fresh])
            last = fresh[-1]
            if last.waiting:
                last.prefill = [tuple(t[-1:, :, : len(last.prompt)].clone() for t in layer) for layer in prefill]
                last.logits = logits[-1:].clone()
            self._insert(picked[len(held) :], prefill, logits)

    def _prefill(self, prompts) -> tuple[list, torch.Tensor]:
        """Keys and values per layer (prompts, heads, L, dim), logits after each prompt (prompts, vocabulary)."""
        ids = [list(p) + [self.engine.pad_id] * (len(prompts[0]) - len(p)) for p in prompts]
        ids = torch.tensor(ids, device=self.device)
        cache = DynamicCache()
        # right-padded: causal attention needs no mask, and what is computed for the padding is never read
        hidden = self.engine.backbone(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        last = torch.tensor([len(p) - 1 for p in prompts], device=self.device)
        logits = self.engine.head(hidden[torch.arange(len(prompts), device=self.device), last])
        return [(layer.keys, layer.values) for layer in cache.layers], logits

    def _insert(self, picked, prefill: list, logits: torch.Tensor) -> None:
        slots, samples, source, pads = [], [], [], []
        for index, (group, starting) in enumerate(picked):
            for sample in starting:
                slot = self.free.pop()
                self.left[slot] = self.cache.column - len(group.prompt)
                slots.append(slot), samples.append(sample), source.append(index), pads.append(self.left[slot])
        lengths = torch.tensor([len(group.prompt) for group, _ in picked], device=self.device)
        rows, sample, source, pad = torch.tensor([slots, samples, source, pads], device=self.device)
        self.cache.insert(rows, source, lengths, prefill)
        self.sample[rows], self.pad[rows], self.count[rows], self.alive[rows] = sample, pad, 0, 1
        self._mask_rows(rows)
        self.rows = max(self.rows, max(slots) + 1)
        self._record(rows, logits[source])

    def _mask_rows(self, rows: torch.Tensor) -> None:
        hidden = torch.arange(self.cache.width, device=self.device) < self.pad[rows][:, None]
        self.mask[rows] = torch.zeros_like(self.mask[rows]).masked_fill_(hidden, float("-inf"))

    # -- keeping the cache dense

    def _tidy(self) -> None:
        """Drop dead rows once nobody waits for them, and shift the cache where the left edge is empty."""
        shift = min(self.left.values())
        full = self.cache.column >= self.cache.width
        if not full and shift < max(32, self.cache.column // 4):
            shift = 0
        drop = not self.queue and len(self.left) <= 0.75 * self.rows
        if not (drop or shift):
            return
        keep = sorted(self.left) if drop else list(range(self.rows))
        rows = torch.tensor(keep, device=self.device)
        self.cache.select(rows, shift)
        for tensor in (self.sample, self.token, self.count, self.alive):
            tensor[: len(keep)] = tensor[rows]
        # a dead row keeps at least one visible column: attention over nothing would be NaN
        self.pad[: len(keep)] = (self.pad[rows] - shift).clamp_(min=0)
        place = {slot: i for i, slot in enumerate(keep)}
        self.left = {place[slot]: pad - shift for slot, pad in self.left.items()}
        self.rows = len(keep)
        self.free = [s for s in range(self.cache.slots - 1, -1, -1) if s not in self.left]
        self._mask_rows(torch.arange(self.rows, device=self.device))


def _distinct(prompts: list[list[int]], n: int) -> deque:
    """One group per distinct prompt, longest first: a later prompt then always fits left of the current column."""
    groups: dict[tuple[int, ...], _Group] = {}
    for i, prompt in enumerate(prompts):
        group = groups.setdefault(tuple(prompt), _Group(tuple(prompt)))
        group.waiting.extend(range(i * n, (i + 1) * n))
    return deque(sorted(groups.values(), key=lambda group: -len(group.prompt)))
