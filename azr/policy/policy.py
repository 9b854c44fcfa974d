"""The policy: a frozen base in 4 bits (or not), live fp32 LoRA on top, and the two things self-play asks of it.
With `full` there is no adapter: every weight of the base is trained (full.py).

    policy = Policy.load("Qwen/Qwen2.5-Coder-3B", quantization="nf4", lora=LoraSettings(rank=32))
    completions = policy.generate([policy.encode(prompt)], 8, Sampling(max_new_tokens=512), seeds=[range(8)])
    for indices, log_prob, entropy, mask in policy.score(prompts, responses, with_grad=True): ...

Sampling (engine.py) and scoring use the same modules: nothing is merged or synchronised, and what is copied lives for
one call. Full logits are never held: log-probs and entropies come from chunks of response positions and are recomputed
in the backward pass.

Left out: a model that is spread over several GPUs, encoder-decoder models, and of training a part of the weights all
but LoRA.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from ..console import note, warn
from ..isolated import one_line
from .attention import AttentionError
from .backoff import halve_rollout, is_out_of_memory, retry
from .decoder import Unsupported
from .engine import Engine
from .full import FullWeights
from .hf_generate import HFGenerate
from .last_layer import only_asked
from .load import LoraSettings, ModelError, adapter_tensors, add_copy, fill_adapter, load_model
from .opening import Opening, check_base, is_full
from .packing import pack, packed_batches
from .residual import keep_in_fp32
from .sampling import Completion, Sampling
from .scoring import ChunkedLogProb, Scored, head_logits, micro_batches, share_prompts, shared_mask
from .tree_attention import NO_MASK, Tree, pack_attention

__all__ = ["Completion", "LoraSettings", "ModelError", "Policy", "Sampling", "Scored"]

# Tokens of a row that holds several answers to one prompt, on a GPU: on an H200 such rows took 0.69 of the time of rows
# of one answer (8 answers of 400 tokens to a prompt of 400, 3B). A CPU packs (packing.py).
SHARED_ROW = 4096


class Policy:
    """A causal language model with LoRA, or trained as a whole; make one with `Policy.load`."""

    def __init__(self, model, tokenizer, info: dict, eos_ids: set[int], **engine_options):
        self.model, self.tokenizer, self.info = model, tokenizer, info
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.base = base
        self.backbone, self.head = base.base_model, base.get_output_embeddings()
        self.adapter = "default"  # the one in use, see `using`
        self.device = self.head.weight.device
        self.eos_ids = frozenset(eos_ids)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(eos_ids, default=0)
        self.full: FullWeights | None = None  # of a model without an adapter that is, or was, trained as a whole
        self._checkpointing = False  # are activations recomputed?
        self._ran_out = False  # did memory run out in the last call of `generate` with `more`?
        # Answers to one prompt are scored in one row of at most so many tokens, the prompt once: half the tokens of a
        # step. 0: every sample alone.
        self.shared_row = SHARED_ROW
        keep_in_fp32(self.backbone, base.config)
        self.engine = self._engine(engine_options)
        self.known = isinstance(self.engine, Engine)  # are its layers written as decoder.py expects?
        self.packs = self.known and self.device.type == "cpu"
        if self.known:
            only_asked(self.backbone)
        if self.packs:
            pack_attention(base)

    @classmethod
    def load(
        cls,
        model,
        quantization="nf4",
        lora: LoraSettings | None = None,
        adapter=None,
        dtype=None,
        device=None,
        seed: int = 0,
        revision: str | None = None,
        need_gpu: bool = False,
        full: bool = False,
        **engine_options,
    ) -> "Policy":
        """Load a hub id or a directory; put new LoRA (`lora`) or a saved adapter (`adapter`) on it, or neither.

        full: every weight is to be trained. A checkpoint of such a run counts as an adapter: its weights are put in the
        place of the base's, to be measured.

        quantization: "nf4" (double quantization, blocks of 64; embeddings and head stay as they are) or "none".
        dtype: of computation and of what is not quantized, a torch.dtype, bf16, fp16, fp32 or auto (None): bf16 on a
        GPU that has it, fp16 on an older one, fp32 on a CPU. LoRA is always fp32; the same seed gives the same A.
        engine_options: attn (auto | flash | triton | sdpa), rollout_weights (auto | stored | bf16), max_batch, pages,
        ...: see `Engine`. need_gpu: without one refuse, instead of a warning if the model is large. Weights stored as
        bitsandbytes' NF4 are taken as they are. Raises ModelError, also for want of memory.
        """
        whole = adapter is not None and is_full(Path(adapter))
        matrices = None if whole else adapter
        try:
            loaded = load_model(str(model), quantization, lora, matrices, dtype, device, seed, revision, need_gpu)
            policy = cls(*loaded, **engine_options)
            if full or whole:  # after the engine, which gives the parameters their final addresses
                policy.full = FullWeights(policy.model, True) if full else FullWeights.over_base(policy.model, adapter)
                policy.info["train"] = "full"
            return policy
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = one_line(error)
        smaller = "a smaller model, or a card with more memory free" if quantization == "nf4" else "--quantization nf4"
        raise ModelError(f"{model} does not fit the memory ({reason}): take {smaller}")

    @classmethod
    def open(cls, opening: Opening, **options) -> "Policy":
        """`load` of what azr/policy/opening.py agreed on; options as there, dtype among them instead of the agreed one.

        What could not be checked is said. ModelError also if the base is not the one that the adapter was trained on.
        """
        if "dtype" not in options:
            options["dtype"] = getattr(torch, opening.dtype) if opening.dtype else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # peft's, that the base lies elsewhere: checked below
            policy = cls.load(opening.model, opening.quantization, adapter=opening.adapter, **options)
        for doubt in (*opening.doubts, *check_base(opening, policy.info)):
            warn(doubt)
        return policy

    def _engine(self, options: dict):
        """The engine; for an architecture that it does not know transformers' `generate`, which is said on stderr."""
        head = self.head  # not `self`, which would be in a reference cycle with its engine and outlive its last user
        try:
            engine = Engine(
                self.backbone,
                lambda hidden: head_logits(hidden, head.weight),
                self.base.config,
                self.tokenizer,
                self.eos_ids,
                pad_id=self.pad_id,
                **options,
            )
        except Unsupported as error:
            self._check_head()
            # what such a model does with a row is unknown: a mask of ours may not reach all of it
            self.shared_row = 0
            warn(f"{error}: sampling with transformers' generate, much slower")
            batch = min(options.get("max_batch", 64), 64)  # every batch waits for its longest response
            return HFGenerate(self.model, self.tokenizer, self.eos_ids, max_batch=batch, pad_id=self.pad_id)
        except AttentionError as error:
            raise ModelError(str(error)) from error
        if self.device.type == "cuda":
            note(engine.attention_note)
        return engine

    @torch.no_grad()
    def _check_head(self) -> None:
        """ModelError unless logits are what scoring takes them for: the last hidden state times the head's weights."""
        ids = torch.arange(4, device=self.device)[None] % self.head.weight.shape[0]
        training = self.model.training
        self.model.eval()
        with self.disable_adapter():  # nothing is trained yet
            logits = self.base(input_ids=ids, use_cache=False).logits[0].float()
            expected = head_logits(self.backbone(input_ids=ids, use_cache=False).last_hidden_state[0], self.head.weight)
        self.model.train(training)
        gap = (logits - expected).norm() / expected.norm().clamp(min=1e-30)
        if logits.shape != expected.shape or not gap < 0.01:  # rounding to bf16 is 0.002; a factor or a cap is more
            raise ModelError(
                f"{self.info['base_model']}: its logits are not its hidden states times its head (a scale or a cap "
                "comes after), so log-probs would be wrong; use another model"
            )

    # -- text

    def encode(self, text: str) -> list[int]:
        """Token ids of the text and nothing else: no BOS, no EOS, no chat template."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """The text of these ids, special tokens included, EOS and padding left out."""
        drop = self.eos_ids | {self.tokenizer.pad_token_id}
        ids = [i for i in ids if i not in drop]
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # -- sampling and scoring

    def generate(
        self,
        prompt_ids: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds,
        max_new_tokens: list[int] | None = None,
        on_finish=None,
        more=None,
        most: int = 0,
    ) -> list[list[Completion]]:
        """n completions of each prompt from the current weights; seeds[i][j], 64 bits, decides sample j of prompt i.

        max_new_tokens: a limit for each prompt instead of sampling's. on_finish(i, j, completion): called as each ends
        (twice, with the same tokens, if memory ran out and the call was repeated). A prompt that can't fit gives
        completions without ids, finish_reason "too_long". more, most: prompts that come while the call runs (none
        are taken once memory has run out). See engine.py.
        ValueError: an empty prompt, seeds of another shape.
        """
        training = self.model.training
        self.model.eval()
        seeds = [list(row) for row in seeds]
        longest = max(map(len, prompt_ids), default=0) + max(max_new_tokens or [sampling.max_new_tokens])
        attempts: list[dict] = []

        def work() -> list[list[Completion]]:
            attempts.append({"more": more, "most": most} if more and not attempts else {})
            return self.engine.generate(prompt_ids, n, sampling, seeds, max_new_tokens, on_finish, **attempts[-1])

        def smaller() -> str:
            return halve_rollout(self.engine, longest, n * len(prompt_ids) + attempts[-1].get("most", 0))

        try:
            # A repetition without `more` may fit whatever the sizes are: without counting the call before, memory
            # would run out, and all be sampled a second time, in every step.
            rows = retry(work, smaller, "sampling", int(bool(more) and self._ran_out))
        finally:
            self.model.train(training)
        if more:
            self._ran_out = len(attempts) > 1
        return rows

    def score(
        self,
        prompts: list[list[int]],
        responses: list[list[int]],
        temperature: float = 1.0,
        token_budget: int = 8192,
        with_grad: bool = False,
        chunk: int | None = None,
    ) -> Iterator[Scored]:
        """Log-prob and entropy of every response token, micro-batch by micro-batch.

        A micro-batch holds at most token_budget tokens, unless a sample alone has more: packed on a CPU (packing.py),
        elsewhere as right-padded rows, padding counted, longest first. chunk: see ChunkedLogProb. Call backward on each
        micro-batch before asking for the next. Empty responses give rows without tokens. ValueError: an empty prompt.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0 to score, not {temperature}")
        if empty := [i for i, p in enumerate(prompts) if not p]:
            raise ValueError(f"prompt {empty[0]} is empty; a prompt needs at least one token")
        return self._score(prompts, responses, temperature, token_budget, with_grad, chunk)

    def _score(self, prompts, responses, temperature, token_budget, with_grad, chunk) -> Iterator[Scored]:
        longest = min(self.shared_row, token_budget)
        if self.packs:
            batches = packed_batches(prompts, responses, token_budget)
        else:
            rows = share_prompts(prompts, responses, longest)
            lengths = [len(prompts[row[0]]) + sum(len(responses[i]) for i in row) for row in rows]
            batches = [[i for number in batch for i in rows[number]] for batch in micro_batches(lengths, token_budget)]
        self.model.train(with_grad)

        def one(indices: list[int]) -> Scored:
            # no `yield` inside: the caller's grad mode must not change between micro-batches
            with torch.set_grad_enabled(with_grad):
                return self._score_batch(
                    indices, [prompts[i] for i in indices], [responses[i] for i in indices], temperature, chunk, longest
                )

        yield from self.each(one, batches, with_grad)

    def each(self, score: Callable[[list[int]], Scored], batches: list[list[int]], with_grad: bool) -> Iterator[Scored]:
        """score(indices) of every micro-batch, in order. Where several processes share them, this is overridden."""
        return map(score, batches)

    def _score_batch(self, indices, prompts, responses, temperature, chunk, longest=0) -> Scored:
        layout = self._packed(prompts, responses) if self.packs else self._rows(prompts, responses, longest)
        ids, states, more = layout
        mask = torch.zeros(len(indices), max(map(len, responses)), dtype=torch.bool)
        for i, response in enumerate(responses):
            mask[i, : len(response)] = True
        # a state is asked for once, though it may predict the first token of several answers
        flat = sum(states, [])
        asked = {state: number for number, state in enumerate(sorted(set(flat)))}
        which = torch.tensor([asked[state] for state in flat], dtype=torch.int64)
        asked = torch.tensor(list(asked), dtype=torch.int64)
        target = torch.tensor(sum(responses, []), dtype=torch.int64)
        ids, mask, asked, which, target = (t.to(self.device) for t in (ids, mask, asked, which, target))
        in_part = self.known and len(asked) > 0
        more |= {"asked": asked} if in_part else {}
        hidden = self.backbone(input_ids=ids, use_cache=False, **more).last_hidden_state.flatten(0, 1)
        hidden = hidden if in_part else hidden[asked]
        # `which` repeats a state, so its gradient is a sum: on a CPU index_select adds in one order where indexing adds
        # from all threads at once, and a run would not repeat; on CUDA it is the other way round.
        hidden = hidden.index_select(0, which) if hidden.device.type == "cpu" else hidden[which]
        log_prob, entropy = ChunkedLogProb.apply(hidden, self.head.weight, target, temperature, chunk)
        padded = [x.new_zeros(mask.shape).masked_scatter(mask, x) for x in (log_prob, entropy)]
        return Scored(indices, padded[0], padded[1], mask)

    def _packed(self, prompts, responses) -> tuple[torch.Tensor, list[list[int]], dict]:
        """(ids (1, tokens), for each sample the flat indices of the states that predict it, what the model is told)."""
        packed, config = pack(prompts, responses), self.base.config
        tree = Tree(packed.segments, config.num_attention_heads // config.num_key_value_heads, self.head.weight.dtype)
        more = {"attention_mask": NO_MASK, "position_ids": packed.place[None], "tree": tree}
        return packed.ids[None], packed.states, more

    def _rows(self, prompts, responses, longest) -> tuple[torch.Tensor, list[list[int]], dict]:
        """As `_packed`: ids (rows, time), right-padded, several responses to one prompt in a row of up to `longest`."""
        rows = share_prompts(prompts, responses, longest)
        length = max(len(prompts[row[0]]) + sum(len(responses[i]) for i in row) for row in rows)
        ids = torch.full((len(rows), length), self.pad_id)
        spans: list = [None] * len(prompts)  # of each sample: row, first and end of its response, length of its prompt
        for number, row in enumerate(rows):
            end = prompt = len(prompts[row[0]])
            ids[number, :prompt] = torch.tensor(prompts[row[0]])
            for i in row:
                first, end = end, end + len(responses[i])
                ids[number, first:end] = torch.tensor(responses[i], dtype=torch.int64)
                spans[i] = number, first, end, prompt
        position = [
            [number * length + place for place in [prompt - 1, *range(first, end - 1)][: end - first]]
            for number, first, end, prompt in spans
        ]
        # Rows of one response need no mask: with right padding causal attention never reads it, and SDPA keeps its fast
        # causal kernel. A Qwen can be told so; left to look for itself, transformers asks the device whether rows are
        # packed, and the host waits.
        qwen = self.known and self.base.config.model_type in ("qwen2", "qwen3")
        more = {"attention_mask": {"full_attention": None}} if qwen else {}
        if len(rows) < len(prompts):
            seen, place = shared_mask(len(rows), length, spans, self.device)
            more = {"attention_mask": seen, "position_ids": place}
        return ids, position, more

    def score_lists(self, prompts, responses, temperature: float = 1.0, token_budget: int = 8192):
        """As `score` without gradient: (log-probs, entropies), each a list of floats per sample, in order."""
        log_probs: list[list[float]] = [[] for _ in prompts]
        entropies: list[list[float]] = [[] for _ in prompts]
        for indices, log_prob, entropy, _ in self.score(prompts, responses, temperature, token_budget):
            log_prob, entropy = log_prob.tolist(), entropy.tolist()
            for row, i in enumerate(indices):
                log_probs[i] = log_prob[row][: len(responses[i])]
                entropies[i] = entropy[row][: len(responses[i])]
        return log_probs, entropies

    def checkpoint_activations(self, on: bool = True) -> None:
        """Recompute each layer in the backward pass of `score(with_grad=True)` instead of keeping its activations."""
        if on == self._checkpointing:
            return
        self._checkpointing = on
        new = hasattr(self.base, "activation_checkpointing_enable")  # transformers 5.17 has the older name
        name = "activation_checkpointing" if new else "gradient_checkpointing"
        if on:
            # nothing random happens in a layer, so there is no random state to keep and put back at each
            options = {"use_reentrant": False, "preserve_rng_state": False}
            getattr(self.base, f"{name}_enable")(**{f"{name}_kwargs": options})
        else:
            getattr(self.base, f"{name}_disable")()

    # -- what is trained: adapters ("default", and those that `add_adapter` added), or with `full` every weight

    @property
    def adapters(self) -> list[str]:
        """Their names, "default" first."""
        return list(self.model.peft_config) if self.info["lora"] else ["default"]

    def add_adapter(self, name: str) -> list[torch.nn.Parameter]:
        """Adds an adapter that begins as a copy of "default", which stays in use; returns its matrices."""
        add_copy(self.model, name)
        return list(adapter_tensors(self.model, name).values())

    @contextmanager
    def using(self, adapter: str):
        """Context in which the policy samples, scores and is trained with the adapter of this name."""
        before = self.adapter
        self._use(adapter)
        try:
            yield
        finally:
            self._use(before)

    def _use(self, adapter: str) -> None:
        if adapter != self.adapter:
            self.model.set_adapter(adapter)  # no copies: the engine and PEFT's layers look up which is in use
            self.adapter = adapter

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The LoRA matrices of all adapters, or the masters of all weights, fp32, in a fixed order; empty without."""
        if self.full:
            return [p for p in self.full.masters.values() if p.requires_grad]
        # also by name, since PEFT lets only the adapter in use require a gradient
        return [p for name, p in self.model.named_parameters() if p.requires_grad or ".lora_" in name]

    def disable_adapter(self):
        """Context in which the policy is its base model."""
        if self.full:
            return self.full.base()
        return self.model.disable_adapter() if self.info["lora"] else nullcontext()

    def adapter_state(self, device="cpu", adapter: str = "default") -> dict[str, torch.Tensor]:
        """Copies of the LoRA matrices under PEFT's names (what adapter_model.safetensors holds); device None: where
        they are. With `full`: of all masters."""
        if self.full:
            return self.full.state(device)
        if not self.info["lora"]:
            return {}
        live = adapter_tensors(self.model, adapter).items()
        return {name: p.detach().to(device or p.device, copy=True).contiguous() for name, p in live}

    def load_adapter_state(self, state: dict[str, torch.Tensor], adapter: str = "default") -> None:
        """Write these values into the live LoRA matrices (optimizers keep their references), or with `full` into all
        weights. Raises ModelError."""
        if self.full:
            return self.full.load(state)
        fill_adapter(self.model, state, "this state", adapter)

    def save_adapter(self, directory, state: dict[str, torch.Tensor] | None = None) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as `PeftModel.from_pretrained` reads them.

        state: what `adapter_state` gave at some time, instead of the live matrices. With `full` it is a whole model.
        """
        from safetensors.torch import save_file

        if self.full:
            return self.full.save(Path(directory), self.model, self.tokenizer, state)
        if not self.info["lora"]:
            raise ModelError("this policy has no adapter to save; load it with LoRA settings")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = self.model.peft_config["default"].to_dict()
        config["inference_mode"] = True
        # sets have no order: sorted, so that the same adapter gives the same bytes
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        text = json.dumps(config, indent=2, sort_keys=True, default=str)
        (directory / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        state = self.adapter_state() if state is None else state
        save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
