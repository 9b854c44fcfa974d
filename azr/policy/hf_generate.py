"""`generate` of transformers, behind the same call as `azr.policy.engine.Engine`.

    HFGenerate(model, tokenizer, eos_ids, batch_size=64).generate(prompts, 8, Sampling(), seeds)

`model` is a causal language model of transformers, PEFT around it or not; its live weights are used. It is what the
engine is compared with, and what is left for an architecture that the engine does not know. It gives the engine's
Completions: EOS and stop strings end a response by the same rule, log-probs are those of the untruncated distribution.

What it cannot do: a seed for every sample. Each call seeds one generator from all its seeds, so the same call gives
the same samples, but with another batch size, or with another prompt added, every sample changes. Sampling settings in
the checkpoint's generation_config are kept away: `model.generate` would fill in whatever is unset.
"""

import hashlib
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from azr.console import warn
from azr.policy.sampling import Completion, Sampling, StopTable, check_requests


class HFGenerate:
    """`model.generate`, `batch_size` samples at a time, left-padded; a batch lasts as long as its longest sample."""

    def __init__(self, model, tokenizer, eos_ids, *, batch_size: int = 64, pad_id: int = 0):
        self.batch_size = batch_size
        self.model, self.tokenizer, self.eos_ids, self.pad_id = model, tokenizer, frozenset(eos_ids), pad_id
        # PEFT puts LoRA into the base model's own layers, so the base model is the policy
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.base.config.get_text_config()  # of a model that also sees, the part that reads

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds, max_new_tokens=None, on_finish=None
    ):
        """n completions for each prompt, list[list[Completion]]; seeds[i][j] as for the engine (see above).

        max_new_tokens: a limit for each prompt instead of sampling's. A prompt that exceeds the model's context with
        its limit gives completions without ids, finish_reason "too_long", and a line on stderr. ValueError: an empty
        prompt, seeds or limits of another shape. RuntimeError: the library failed.
        """
        limits = max_new_tokens or [sampling.max_new_tokens] * len(prompts)
        check_requests(prompts, n, seeds, limits)
        fitting = [i for i, prompt in enumerate(prompts) if self._fits(i, len(prompt), limits[i])]
        done = [[Completion([], [], "too_long") for _ in range(n)] for _ in prompts]
        if fitting and n:
            table = StopTable(self.tokenizer, self.config.vocab_size, sampling.stop, self.eos_ids)
            digest = hashlib.sha256(repr([list(row) for row in seeds]).encode()).digest()
            seed = int.from_bytes(digest[:4], "little")
            rows, done_rows = [i for i in fitting for _ in range(n)], []
            with self._sampling_state():
                torch.manual_seed(seed)
                for start in range(0, len(rows), self.batch_size):
                    batch = rows[start : start + self.batch_size]
                    done_rows += self._batch([prompts[i] for i in batch], sampling, [limits[i] for i in batch], table)
            for k, i in enumerate(fitting):
                done[i] = done_rows[k * n : (k + 1) * n]
        for i, row in enumerate(done if on_finish else []):  # all at the end: the library tells no sooner
            for j, completion in enumerate(row):
                on_finish(i, j, completion)
        return done

    def _fits(self, i: int, length: int, limit: int) -> bool:
        context = getattr(self.config, "max_position_embeddings", None)
        if not context or length + limit <= context:
            return True
        reason = f"it has {length} tokens and asks for {limit} more; the model's context is {context}"
        warn(f"prompt {i} is not sampled: {reason}")
        return False

    @contextmanager
    def _sampling_state(self):
        """Evaluation mode, no checkpoint settings, the caller's random state: as before, whatever happens."""
        training, config = self.model.training, self.base.generation_config
        cuda = [self.base.device] if self.base.device.type == "cuda" else []
        self.model.eval()
        self.base.generation_config = GenerationConfig()
        try:
            with torch.random.fork_rng(devices=cuda), torch.no_grad():
                yield
        finally:
            self.base.generation_config = config
            self.model.train(training)

    def _settings(self, sampling: Sampling) -> GenerationConfig:
        """Every setting that changes what is sampled, written out."""
        greedy = sampling.temperature == 0
        return GenerationConfig(
            do_sample=not greedy,
            temperature=1.0 if greedy else sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=None,
            typical_p=1.0,
            epsilon_cutoff=0.0,
            eta_cutoff=0.0,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(self.eos_ids) or None,
            pad_token_id=self.pad_id,
        )

    def _batch(self, prompts, sampling, limits, table) -> list[Completion]:
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], device=self.base.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.base.device)
        record = _LogProbs(sampling.temperature or 1.0)
        settings = self._settings(sampling)
        settings.max_new_tokens = max(limits)
        out = self.base.generate(
            inputs=ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=[record],
            stopping_criteria=[_RowEnds(table, width, limits)],
        )[:, width:]
        log_probs = record.finish(out)
        return [cut(row, p, table, limit) for row, p, limit in zip(out.tolist(), log_probs.tolist(), limits)]


def cut(ids: list[int], log_probs: list[float], table: StopTable, limit: int) -> Completion:
    """The completion up to its first end: an EOS token, the token that completes a stop string, or the limit."""
    for end in range(1, len(ids) + 1):
        reason = table.reason(ids[max(0, end - 1 - table.tail) : end]) or ("length" if end == limit else None)
        if reason:
            return Completion(ids[:end], log_probs[:end], reason)
    raise RuntimeError(f"transformers returned {len(ids)} tokens of {limit} and neither EOS nor a stop string")


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
