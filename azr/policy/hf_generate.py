"""Two more ways to sample, both by transformers, behind the same `generate` as `azr.policy.engine.Engine`.

    HFGenerate(model, tokenizer, eos_ids, batch_size=64).generate(prompts, 8, Sampling(), seeds)
    TransformersContinuousBatching(model, tokenizer, eos_ids, max_batch=64).generate(prompts, 8, Sampling(), seeds)

`model` is a causal language model of transformers, PEFT around it or not; its live weights are used. They are what the
engine is compared with, and what is left for an architecture that the engine does not know. Both give the engine's
Completions: EOS and stop strings end a response by the same rule, log-probs are those of the untruncated distribution.

What they cannot do: a seed for every sample. Each call seeds one generator from all its seeds, so the same call gives
the same samples, but with another batch size, or with another prompt added, every sample changes.

What is kept away from the samples, and would get in unseen: sampling settings in the checkpoint's generation_config
(`model.generate` fills in whatever is unset), and keys and values cached before an update (continuous batching finds
cached pages by their tokens, not by the weights that made them): every call has its own manager and cache.
"""

import hashlib
import sys
from contextlib import contextmanager

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor, StoppingCriteria

from azr.policy.sampling import Completion, Sampling, StopTable
from azr.policy.scoring import ChunkedLogProb, micro_batches


class Backend:
    """What both share: checks, seeds, the model's state around a call, and cutting a response where it ends."""

    def __init__(self, model, tokenizer, eos_ids, pad_id: int = 0):
        self.model, self.tokenizer, self.eos_ids, self.pad_id = model, tokenizer, frozenset(eos_ids), pad_id
        # PEFT puts LoRA into the base model's own layers, so the base model is the policy
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.base.config.get_text_config()  # of a model that also sees, the part that reads

    def generate(self, prompts: list[list[int]], n: int, sampling: Sampling, seeds, max_new_tokens=None,
                 on_finish=None):  # fmt: skip
        """n completions for each prompt, list[list[Completion]]; seeds[i][j] as for the engine (see above).

        max_new_tokens: a limit for each prompt instead of sampling's. A prompt that exceeds the model's context with
        its limit gives completions without ids, finish_reason "too_long", and a line on stderr. ValueError: an empty
        prompt, seeds or limits of another shape. RuntimeError: the library failed.
        """
        limits = [sampling.max_new_tokens] * len(prompts) if max_new_tokens is None else list(max_new_tokens)
        self._check(prompts, n, seeds, limits)
        fitting = [i for i, prompt in enumerate(prompts) if self._fits(i, len(prompt), limits[i])]
        done = [[Completion([], [], "too_long") for _ in range(n)] for _ in prompts]
        if fitting and n:
            table = StopTable(self.tokenizer, self.config.vocab_size, sampling.stop, self.eos_ids)
            digest = hashlib.sha256(repr([list(row) for row in seeds]).encode()).digest()
            seed = int.from_bytes(digest[:4], "little")
            with self._sampling_state():
                flat = self._generate(
                    [prompts[i] for i in fitting], n, sampling, [limits[i] for i in fitting], table, seed
                )
            for k, i in enumerate(fitting):
                done[i] = flat[k * n : (k + 1) * n]
        for i, row in enumerate(done if on_finish else []):  # all at the end: the library tells no sooner
            for j, completion in enumerate(row):
                on_finish(i, j, completion)
        return done

    def _check(self, prompts, n, seeds, limits) -> None:
        if len(limits) != len(prompts) or not all(limit >= 1 for limit in limits):
            raise ValueError(f"max_new_tokens must hold a number above 0 for each of the {len(prompts)} prompts")
        if len(seeds) != len(prompts) or any(len(row) != n for row in seeds):
            raise ValueError(f"seeds must hold {n} integers for each of the {len(prompts)} prompts")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty; a prompt needs at least one token")

    def _fits(self, i: int, length: int, limit: int) -> bool:
        context = getattr(self.config, "max_position_embeddings", None)
        if not context or length + limit <= context:
            return True
        reason = f"it has {length} tokens and asks for {limit} more; the model's context is {context}"
        print(f"warning: prompt {i} is not sampled: {reason}", file=sys.stderr, flush=True)
        return False

    @contextmanager
    def _sampling_state(self):
        """Evaluation mode, no checkpoint settings, the caller's random state: as before, whatever happens."""
        training, config = self.model.training, self.base.generation_config
        attention = self.base.config._attn_implementation
        cuda = [self.base.device] if self.base.device.type == "cuda" else []
        self.model.eval()
        self.base.generation_config = GenerationConfig()
        try:
            with torch.random.fork_rng(devices=cuda), torch.no_grad():
                yield
        finally:
            self.base.generation_config = config
            if self.base.config._attn_implementation != attention:
                self.base.set_attn_implementation(attention)
            self.model.train(training)

    def _settings(self, sampling: Sampling) -> GenerationConfig:
        """Every setting that changes what is sampled, written out."""
        greedy = sampling.temperature == 0
        return GenerationConfig(
            do_sample=not greedy, temperature=1.0 if greedy else sampling.temperature, top_p=sampling.top_p,
            top_k=sampling.top_k, min_p=None, typical_p=1.0, epsilon_cutoff=0.0, eta_cutoff=0.0, num_beams=1,
            repetition_penalty=1.0, no_repeat_ngram_size=0, max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(self.eos_ids) or None, pad_token_id=self.pad_id,
        )  # fmt: skip


def cut(ids: list[int], log_probs: list[float], table: StopTable, limit: int) -> Completion:
    """The completion up to its first end: an EOS token, the token that completes a stop string, or the limit."""
    for end in range(1, len(ids) + 1):
        reason = table.reason(ids[max(0, end - 1 - table.tail) : end]) or ("length" if end == limit else None)
        if reason:
            return Completion(ids[:end], log_probs[:end], reason)
    raise RuntimeError(f"transformers returned {len(ids)} tokens of {limit} and neither EOS nor a stop string")


# ------------------------------------------------------------------------------------------------------- generate


class HFGenerate(Backend):
    """`model.generate`, `batch_size` samples at a time, left-padded; a batch lasts as long as its longest sample."""

    def __init__(self, model, tokenizer, eos_ids, *, batch_size: int = 64, pad_id: int = 0):
        super().__init__(model, tokenizer, eos_ids, pad_id)
        self.batch_size = batch_size

    def _generate(self, prompts, n, sampling, limits, table, seed) -> list[Completion]:
        torch.manual_seed(seed)
        prompts, limits = ([x for x in values for _ in range(n)] for values in (prompts, limits))
        done = []
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            done += self._batch(prompts[rows], sampling, limits[rows], table)
        return done

    def _batch(self, prompts, sampling, limits, table) -> list[Completion]:
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], device=self.base.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.base.device)
        record = _LogProbs(sampling.temperature or 1.0)
        settings = self._settings(sampling)
        settings.max_new_tokens = max(limits)
        out = self.base.generate(
            inputs=ids, attention_mask=mask, generation_config=settings, logits_processor=[record],
            stopping_criteria=[_RowEnds(table, width, limits)],
        )[:, width:]  # fmt: skip
        log_probs = record.finish(out)
        return [cut(row, p, table, limit) for row, p, limit in zip(out.tolist(), log_probs.tolist(), limits)]


class _LogProbs(LogitsProcessor):
    """Collects log-probs without keeping all logits: those of one step wait until its token is known."""

    def __init__(self, temperature: float):
        self.temperature, self.waiting, self.columns = temperature, None, []

    def __call__(self, input_ids, scores):
        # transformers runs this before temperature, top-k and top-p
        if self.waiting is not None:
            self._take(input_ids[:, -1])
        self.waiting = scores.float() / self.temperature
        return scores

    def _take(self, token) -> None:
        z = self.waiting
        self.columns.append(z.gather(-1, token[:, None]) - torch.logsumexp(z, -1, keepdim=True))

    def finish(self, out) -> torch.Tensor:
        """(rows, time) for the tokens `out` (rows, time)."""
        self._take(out[:, -1])
        return torch.cat(self.columns, 1)


class _RowEnds(StoppingCriteria):
    """True for the rows that have reached their own limit or completed a stop string."""

    def __init__(self, table: StopTable, width: int, limits: list[int]):
        self.table, self.width, self.limits = table, width, limits

    def __call__(self, input_ids, scores, **kwargs):
        time = input_ids.shape[1] - self.width
        tails = input_ids[:, -min(time, max(1, self.table.tail)) :].tolist()
        ends = [time >= limit or self.table.reason(tail) is not None for tail, limit in zip(tails, self.limits)]
        return torch.tensor(ends, device=input_ids.device)


# -------------------------------------------------------------------------------------------- continuous batching


class TransformersContinuousBatching(Backend):
    """transformers' continuous batching, `max_batch` samples at once; `options` go to its configuration.

    It knows no stop strings: the samples are read token by token and cancelled, so a few tokens too many are computed.
    Its log-probs are those of the truncated distribution; with top-p or top-k the samples are scored again. On a CPU
    it would take 60 % of the memory for its cache, so there it gets what max_batch samples need.
    """

    def __init__(self, model, tokenizer, eos_ids, *, max_batch: int = 64, pad_id: int = 0, **options):
        super().__init__(model, tokenizer, eos_ids, pad_id)
        self.max_batch, self.options = max_batch, options

    def _generate(self, prompts, n, sampling, limits, table, seed) -> list[Completion]:
        # a sample's fork shares its prompt, but a one-token prompt that is forked fails, and all others with it
        done: list = [None] * len(prompts)
        for forked in (True, False):
            chosen = [i for i, p in enumerate(prompts) if (n > 1 and len(p) > 1) == forked]
            if not chosen:
                continue
            copies = [i for i in chosen for _ in range(1 if forked else n)]
            tokens, most = [prompts[i] for i in copies], [limits[i] for i in copies]
            outputs = self._run(tokens, n if forked else 1, sampling, most, table, seed)
            for k, i in enumerate(chosen):
                done[i] = outputs[k * n : (k + 1) * n]
        done = [completion for row in done for completion in row]
        if sampling.top_p < 1 or sampling.top_k:
            self._rescore([p for p in prompts for _ in range(n)], done, sampling.temperature or 1.0)
        return done

    def _run(self, prompts, n, sampling, limits, table, seed) -> list[Completion]:
        """n completions for each prompt from one manager, which lives for this call."""
        settings = self._settings(sampling)
        settings.num_return_sequences = n  # afterwards: the constructor refuses several greedy samples
        if not self.eos_ids:
            settings.eos_token_id = -1  # what it takes for "none"
        waiting, done = {}, {}
        with self.base.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=self._configuration(prompts, limits, seed)
        ) as manager:
            for i, (prompt, limit) in enumerate(zip(prompts, limits)):
                name = f"{i}"
                for sample in range(n):
                    waiting[name if sample == n - 1 else f"{name}__child#{sample}"] = limit
                manager.add_request(list(prompt), request_id=name, max_new_tokens=limit, streaming=bool(table.stop))
            while waiting:
                output = manager.get_result(timeout=1)
                if output is None:
                    if not manager.is_running():
                        raise RuntimeError(f"continuous batching ended with {len(waiting)} samples unfinished")
                elif output.error is not None:
                    raise RuntimeError(f"continuous batching failed: {output.error}")
                elif output.request_id in waiting and (output.is_finished() or self._stops(output, table)):
                    limit = waiting.pop(output.request_id)
                    done[output.request_id] = cut(output.generated_tokens, output.logprobs, table, limit)
                    if not output.is_finished():
                        manager.cancel_request(output.request_id)
        names = [[f"{i}__child#{j}" for j in range(n - 1)] + [f"{i}"] for i in range(len(prompts))]
        return [done[name] for row in names for name in row]

    def _stops(self, output, table: StopTable) -> bool:
        return bool(output.generated_tokens) and table.reason(output.generated_tokens) is not None

    def _configuration(self, prompts, limits, seed: int) -> ContinuousBatchingConfig:
        options = dict(max_requests_per_batch=self.max_batch, return_logprobs=True, seed=seed)
        if self.base.device.type == "cpu":
            page = self.options.get("page_size", 32)
            pages = -(-max(len(p) + limit for p, limit in zip(prompts, limits)) // page) + 1
            # tokens of a step: its mask, tokens x (tokens + cache), is made and filled whole
            tokens = max(512, self.max_batch)
            options |= dict(page_size=page, num_blocks=self.max_batch * pages, max_batch_tokens=tokens)
        return ContinuousBatchingConfig(**options | self.options)

    def _rescore(self, prompts, completions, temperature: float, token_budget: int = 8192) -> None:
        """Replace log-probs by those of the untruncated distribution: one forward pass, right-padded, no mask."""
        device, head = self.base.device, self.base.get_output_embeddings().weight
        full = [list(p) + c.ids for p, c in zip(prompts, completions)]
        for indices in micro_batches([len(f) for f in full], token_budget):
            length = max(len(full[i]) for i in indices)
            ids = torch.tensor([full[i] + [self.pad_id] * (length - len(full[i])) for i in indices], device=device)
            hidden = self.base.base_model(input_ids=ids, use_cache=False).last_hidden_state
            for row, i in enumerate(indices):
                response = slice(len(prompts[i]) - 1, len(full[i]) - 1)
                target = torch.tensor(completions[i].ids, device=device)
                log_prob, _ = ChunkedLogProb.apply(hidden[row, response], head, target, temperature, 128)
                completions[i].log_probs = log_prob.tolist()
