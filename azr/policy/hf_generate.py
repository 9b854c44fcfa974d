"""`generate` of transformers, behind the same call as `azr.policy.engine.Engine`.

    HFGenerate(model, tokenizer, eos_ids, max_batch=64).generate(prompts, 8, Sampling(), seeds)

`model` is a causal language model of transformers, PEFT around it or not; its live weights are used. It serves the
architectures that the engine does not know, and gives the engine's Completions: EOS and stop strings end a response by
the same rule, log-probs are those of the untruncated distribution.

What it cannot do: a seed for every sample. Each call seeds one generator from all its seeds, so the same call gives
the same samples, but with another batch size, or with another prompt added, every sample changes. Sampling settings in
the checkpoint's generation_config are kept away: `model.generate` would fill in whatever is unset.
"""

import hashlib
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, StoppingCriteria

from .decoding import Results
from .sampling import Completion, Sampling, StopTable, check_requests


class HFGenerate:
    """`model.generate`, `max_batch` samples at a time, left-padded; a batch lasts as long as its longest sample."""

    pages = None  # of a cache of its own, which it does not have (backoff.py asks)

    def __init__(self, model, tokenizer, eos_ids, *, max_batch: int = 64, pad_id: int = 0):
        self.max_batch = max_batch
        self.model, self.tokenizer, self.eos_ids, self.pad_id = model, tokenizer, frozenset(eos_ids), pad_id
        # PEFT puts LoRA into the base model's own layers, so the base model is the policy
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.base.config.get_text_config()  # of a model that also sees, the part that reads

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds, max_new_tokens=None, on_finish=None, **_
    ) -> list[list[Completion]]:
        """n completions for each prompt; arguments and errors are those of `Engine.generate`.

        All seeds together seed one generator (see above), and `on_finish` is called for all samples at the end. What
        `more` has is not taken: a batch is over before the next begins.
        """
        limits = check_requests(prompts, n, sampling, seeds, max_new_tokens)
        results, rows = Results(None), []
        context = getattr(self.config, "max_position_embeddings", None)
        for i, (prompt, limit) in enumerate(zip(prompts, limits)):
            first = results.add(n)
            if context and len(prompt) + limit > context:
                results.refuse(first, len(prompt), limit, f"the model's context is {context}")
            else:
                rows += range(first, first + n)
        table = StopTable(self.tokenizer, self.config.vocab_size, sampling.stop, self.eos_ids) if rows else None
        digest = hashlib.sha256(repr([list(row) for row in seeds]).encode()).digest()
        with self._sampling_state(seed=int.from_bytes(digest[:4], "little")):
            for start in range(0, len(rows), self.max_batch):
                batch = rows[start : start + self.max_batch]
                texts, most = [prompts[index // n] for index in batch], [limits[index // n] for index in batch]
                for index, completion in zip(batch, self._batch(texts, most, sampling, table)):
                    results.put(index, completion)
        for i, row in enumerate(results.rows if on_finish else ()):
            for j, completion in enumerate(row):
                on_finish(i, j, completion)
        return results.rows

    @contextmanager
    def _sampling_state(self, seed: int):
        """Evaluation mode, no checkpoint settings, a seeded random state; afterwards all is as it was before."""
        training, config = self.model.training, self.base.generation_config
        cuda = [self.base.device] if self.base.device.type == "cuda" else []
        self.model.eval()
        self.base.generation_config = GenerationConfig()
        try:
            with torch.random.fork_rng(devices=cuda), torch.no_grad():
                torch.manual_seed(seed)
                yield
        finally:
            self.base.generation_config = config
            self.model.train(training)

    def _batch(self, prompts, limits, sampling: Sampling, table: StopTable) -> list[Completion]:
        """One completion for each prompt, which is sampled up to its limit."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], device=self.base.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.base.device)
        watch = _Watch(table, width, limits, sampling.temperature or 1.0)
        out = self.base.generate(
            inputs=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                do_sample=sampling.temperature > 0,
                temperature=sampling.temperature or 1.0,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_new_tokens=max(limits),
                eos_token_id=sorted(self.eos_ids) or None,
                pad_token_id=self.pad_id,
            ),
            logits_processor=[watch.see],
            stopping_criteria=[watch],
        )[:, width:]
        columns = (torch.cat(values, 1).tolist() for values in (watch.log_probs, watch.entropy))
        rows = zip(out.tolist(), *columns, watch.ends)
        return [Completion(ids[:end], log_p[:end], why, entropy[:end]) for ids, log_p, entropy, (end, why) in rows]


class _Watch(StoppingCriteria):
    """Sees the logits and then the token of every step: keeps log-probs, not logits, and where each response ends."""

    def __init__(self, table: StopTable, width: int, limits, temperature: float):
        self.table, self.width, self.limits, self.temperature = table, width, limits, temperature
        self.log_probs: list[torch.Tensor] = []  # (rows, 1) of each step
        self.entropy: list[torch.Tensor] = []
        self.ends: list[tuple[int, str] | None] = [None] * len(limits)  # (tokens, reason) of each row

    def see(self, input_ids, scores):
        """The logits processor: transformers calls it before temperature, top-k and top-p."""
        self.logits = scores.float() / self.temperature
        return scores

    def __call__(self, input_ids, scores, **kwargs):
        """(rows,) bool: the rows that have ended by EOS, by a stop string or at their own limit."""
        time, z = input_ids.shape[1] - self.width, self.logits
        log_p = torch.log_softmax(z, -1)
        self.log_probs.append(log_p.gather(-1, input_ids[:, -1:]))
        self.entropy.append(-torch.linalg.vecdot(log_p.exp(), log_p)[:, None])
        for row, tail in enumerate(input_ids[:, -min(time, max(1, self.table.tail)) :].tolist()):
            if self.ends[row] is None:
                reason = self.table.reason(tail) or ("length" if time >= self.limits[row] else None)
                self.ends[row] = (time, reason) if reason else None
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)
