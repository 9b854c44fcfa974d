"""Batched sampling over a paged KV cache, with the trainer's own modules: what `Policy.generate` runs.

    engine = Engine(backbone, head, config, tokenizer, eos_ids, max_batch=128)
    completions = engine.generate(prompt_ids, n=8, sampling=Sampling(max_new_tokens=512), seeds=seeds)

One concept a file, after nano-vllm:
- cache.py: samples, prompts, and who uses which page of the cache. On the host.
- scheduler.py: who starts, who runs, who is preempted when no page is free. On the host.
- decoding.py: one call; the cache, a prefill, a block of decode steps, as tensors made from those lists.
- graphs.py: decode steps as CUDA graphs. decoder.py: the forward pass. attention.py, cpu_attention.py: attention.
- this file: what outlives a call, which is sizes and the tables of stop tokens; and which requests can fit at all.

Everything else dies with the call. Which weights and which adapters are in use is looked up anew by each call, so there
is no synchronisation with the trainer that could be forgotten. The engine knows token ids, not tasks. Left out: pages
that different prompts share, chunked prefill, speculative decoding, several GPUs.
"""

from contextlib import nullcontext

import torch

from ..console import note
from .attention import choose_attention
from .backoff import free_memory
from .cache import Sequence, copies_pay, pages_for
from .decoder import ROLLOUT_WEIGHTS, Decoder
from .decoding import Decoding, Results
from .sampling import Completion, Sampling, StopTable, check_requests, seed_tensor

CPU_CACHE_BYTES = 2 << 30  # a CPU shares its memory with everything else, so what is free says little
# Decode steps between two looks at the tokens. At each look the host waits for the GPU and then the GPU for the host;
# the steps that a sample takes after its end are lost, 3.5 on average with 8. A CPU does not run ahead of the host.
BLOCK = {"cuda": 8, "cpu": 1}


class Engine:
    """Samples from `backbone` + `head`. Between calls it has sizes and the tables of stop tokens, nothing else.

    backbone: the transformer without its head; head: hidden (rows, H) -> fp32 logits (rows, vocabulary).
    max_batch: sequences decoded at once. attn: auto | flash | triton | sdpa. rollout_weights: stored | bf16 (4-bit
    layers as copies in the dtype of computation while `generate` runs) | auto (decided at the first call, by
    cache.copies_pay; the attribute then holds the decision). prefill_tokens: padded tokens of a prefill.
    pages, page_size: of the KV cache; default: what the attention wants, and what is free (or `cache_bytes`) at the
    first call, less `reserve`: bytes that the owner will take later and that sampling must leave (Adam's moments,
    before the first update). block: decode steps between two looks at the tokens (default 8 on CUDA, 1 on CPU).

    Raises Unsupported (another architecture), AttentionError (an attention that cannot run here), ValueError.
    """

    def __init__(
        self,
        backbone,
        head,
        config,
        tokenizer,
        eos_ids,
        *,
        max_batch: int = 256,
        attn: str = "auto",
        rollout_weights: str = "auto",
        cache_bytes: int | None = None,
        pages: int | None = None,
        page_size: int | None = None,
        prefill_tokens: int = 8192,
        block: int | None = None,
        pad_id: int = 0,
    ):
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
        # The sizes of a page are SDPA's, whose way through the cache "page" replaces (see cpu_attention.py).
        if on_cpu and attn == "auto":
            self.attention, self.attention_note = "page", "attention page: page by page, on the CPU"
        self.page_size = page_size or self.page_size
        self.block = block or BLOCK["cpu" if on_cpu else "cuda"]
        self.reserve = 0
        self.tables: dict[tuple[str, ...], StopTable] = {}
        # One for the captures of all calls (see Graphs).
        self.side_stream = None if on_cpu else torch.cuda.Stream(d.device)
        # Grouping moves parameters: they get their final addresses before an optimizer or a graph sees them.
        d.prepare()
        d.release()

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds: list[list[int]],
        max_new_tokens: list[int] | None = None,
        on_finish=None,
        more=None,
        most: int = 0,
    ) -> list[list[Completion]]:
        """n completions for each prompt; seeds[i][j] decides sample j of prompt i.

        max_new_tokens: a limit for each prompt instead of the one in `sampling`. on_finish(i, j, completion) is called
        as sample j of prompt i ends, long before the slowest one does. A prompt that exceeds the model's
        context or the whole cache with its limit gives completions without ids and finish_reason "too_long", and one
        line on stderr. The same call gives the same bits. ValueError: an empty prompt, seeds of another shape.

        more() brings further prompts while the first are sampled: a list of (prompt, seeds, limit), a sample for each
        seed, or None once there will be no more. It is called every LOOK decode steps, and when nothing else is left to
        do; then it should wait for what is on its way. Their completions follow the others. It brings `most` samples at
        most, and no prompt that is longer with its limit than the longest of the first ones (ValueError). The same bits
        come if it brings the same at the same calls.
        """
        limits = check_requests(prompts, n, sampling, seeds, max_new_tokens)
        results = Results(on_finish)
        self._resolve_weights(max((len(prompt) + limit for prompt, limit in zip(prompts, limits)), default=0))
        self._resolve_pages()
        fitting = self.sequences(zip(prompts, seeds, limits), results)
        if fitting:
            # Of those that fit: one endless prompt must not widen the page tables of all.
            longest = max(len(s.prompt) + s.limit for s in fitting)
            try:
                self.decoder.prepare(self.rollout_weights, longest + self.block)
                # Held by no name, so that its cache is gone before `empty_cache`. Parameters must not move in
                # inference mode, so it begins after `prepare`; a GPU, which runs behind the host, gains nothing by it.
                # Not inference_mode(False) there: that turns gradients on, whatever stands around it.
                with torch.inference_mode() if self.decoder.device.type == "cpu" else nullcontext():
                    Decoding(self, fitting, longest, sampling, results, more, most).run()
            finally:
                self.decoder.release()
                if self.decoder.device.type == "cuda":
                    torch.cuda.empty_cache()  # so that training gets the memory in one piece
        return results.rows

    def stop_table(self, stop: tuple[str, ...]) -> StopTable:
        """Which tokens can end a response with these stop strings; made once, as it decodes the whole vocabulary."""
        if stop not in self.tables:
            self.tables[stop] = StopTable(self.tokenizer, self.config.vocab_size, stop, self.eos_ids)
        return self.tables[stop]

    # -- requests

    def sequences(self, requests, results: Results) -> list[Sequence]:
        """The samples of those (prompt, seeds, limit) that can fit; the others get their completions here and a line on
        stderr."""
        fitting, context = [], getattr(self.config, "max_position_embeddings", None)
        for prompt, seeds, limit in requests:
            first, most = results.add(len(seeds)), len(prompt) + limit
            if context and most > context:
                results.refuse(first, len(prompt), limit, f"the model's context is {context}")
            elif pages_for(most, self.page_size) > self.pages:
                results.refuse(first, len(prompt), limit, f"the KV cache has {self.pages} pages of {self.page_size}")
            else:
                mixed = seed_tensor(seeds, "cpu").tolist()
                fitting += [Sequence(first + j, tuple(prompt), limit, seed) for j, seed in enumerate(mixed)]
        return fitting

    # -- sizes, in bytes

    def page_bytes(self) -> int:
        """Of one page: keys and values of `page_size` tokens in all layers."""
        d = self.decoder
        return 2 * len(d.backbone.layers) * self.page_size * d.kv_heads * d.head_dim * d.dtype.itemsize

    def working_bytes(self) -> int:
        """Estimate of what a call needs on a GPU beside the cache and copied weights: prefill, logits, graphs."""
        c = self.config
        prefill = self.prefill_tokens * (8 * c.hidden_size + 6 * c.intermediate_size) * self.decoder.dtype.itemsize
        # Six fp32 numbers for each row and word (logits, divided, as probabilities, and what top-p sorts and sums), and
        # a GiB for graphs, work spaces and the allocator's gaps.
        return prefill + 24 * self.max_batch * c.vocab_size + (1 << 30)

    def copied_bytes(self) -> int:
        """Of the 4-bit weights, unpacked to the dtype of computation; 0 where nothing is in 4 bits."""
        # Counted by parameters, not by modules: a LoRA layer shows its base's weight as its own, so that each weight
        # would be counted twice.
        states = (getattr(p, "quant_state", None) for p in self.decoder.backbone.parameters())
        return sum(state.shape.numel() for state in states if state is not None) * self.decoder.dtype.itemsize

    def _room(self) -> float:
        """What a GPU has free for the cache and for copies of weights."""
        torch.cuda.empty_cache()  # what torch holds back for itself counts as taken
        return free_memory(self.decoder.device) - self.working_bytes() - self.reserve

    def _resolve_weights(self, longest: int) -> None:
        """Once: whether a 4-bit base is unpacked for sampling, if that was left to the engine."""
        if self.rollout_weights != "auto":
            return
        self.rollout_weights, copies = "stored", self.copied_bytes()
        if self.decoder.device.type == "cpu" or not copies:
            return
        room = self._room()
        full = (self.max_batch + 1) * pages_for(longest + self.block, self.page_size) * self.page_bytes()
        pays = copies_pay(room, copies, full)
        self.rollout_weights = "bf16" if pays else "stored"
        why = "fit beside the cache" if pays else "leave too little for the cache"
        gb = f"copies of {copies / 1e9:.1f} GB {why}, {room / 1e9:.1f} GB are free"
        note(f"rollout weights {self.rollout_weights}: {gb}")

    def _resolve_pages(self) -> None:
        """Once: as many pages as fit into what is free (or `cache_bytes`), besides what a step itself needs.

        Once, not at each call, because the number decides when samples are preempted, and a run that resumes must
        preempt as the one before it did; checkpoints hold it (backoff.rollout_sizes).
        """
        if self.pages is not None:
            return
        room = self.cache_bytes
        if room is None and self.decoder.device.type == "cuda":
            room = self._room() - (self.copied_bytes() if self.rollout_weights == "bf16" else 0)
        elif room is None:
            room = CPU_CACHE_BYTES
        self.pages = max(1, int(room // self.page_bytes()))
