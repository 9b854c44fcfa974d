"""Sampling: one token a row from fp32 logits, a random number for each (seed, position), and when a response ends.

    token, log_prob, entropy, _ = sample_tokens(logits, Sampling(top_p=0.95), seed_tensor(seeds, device), position)

Every sample has its own seed, and its t-th token consumes the number of (seed, t), whatever else is in the batch and
however often the sequence was interrupted. Left out: penalties, min-p, beams, per-token biases. Imports nothing of the
project and can be copied out alone.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

WORD = (1 << 64) - 1
GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer: splitmix64's step, 2^64 over the golden ratio
BLOCK = 128  # tokens that the first level of the inverse CDF lumps together
SMALL = 1024  # tokens of a vocabulary that is summed at one level: the calls would cost more than the sums
# Most probable tokens that are looked at first for top-p. A model that has learnt something puts 0.95 of its mass on
# far fewer; where it has not, the step is done again with all of them.
CUT = 1024
NORMAL, STOP_CANDIDATE, EOS = 0, 1, 2  # kinds of tokens, see StopTable


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Training samples need top_p 1 and top_k 0: only then are `Completion.log_probs` those of the distribution sampled
    from. The checkpoint's generation_config is never looked at.
    """

    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ("</answer>",)

    def __post_init__(self):
        """ValueError for values that mean nothing."""
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
    """What was sampled after one prompt."""

    ids: list[int]  # the EOS token or the tokens that complete a stop string are included
    log_probs: list[float]  # of the untruncated distribution at the sampling temperature (greedy: at 1)
    finish_reason: str  # "stop" | "eos" | "length" | "too_long" (can never fit: not sampled, no ids)
    entropy: list[float] = field(default_factory=list)  # of the same distribution, nats, one a token; empty: not known


def check_requests(prompts: list[list[int]], n: int, sampling: Sampling, seeds, limits: list[int] | None) -> list[int]:
    """The most new tokens of each prompt: `limits`, or those of `sampling`.

    ValueError: an empty prompt; seeds that are not n for each prompt; limits that are not a number above 0 for each.
    """
    limits = limits or [sampling.max_new_tokens] * len(prompts)
    if empty := [i for i, prompt in enumerate(prompts) if not prompt]:
        raise ValueError(f"prompt {empty[0]} is empty; a prompt needs at least one token")
    if len(seeds) != len(prompts) or any(len(row) != n for row in seeds):
        raise ValueError(f"seeds must hold {n} integers for each of the {len(prompts)} prompts")
    if len(limits) != len(prompts) or any(limit < 1 for limit in limits):
        raise ValueError(f"max_new_tokens must hold a number above 0 for each of the {len(prompts)} prompts")
    return limits


# ---------------------------------------------------------------------------------------------------- random numbers


def _mix64(x):
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014) on tensors or arrays of int64; products are modulo 2^64."""
    # torch has no unsigned shift of int64: the mask clears the copies of the sign bit that the shift brings in.
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
    on_cpu = mixed_seeds.device.type == "cpu"
    if on_cpu:  # twenty operations on a few numbers: NumPy's calls cost a third of torch's
        mixed_seeds, position = mixed_seeds.numpy(), position.numpy()
    bits = _mix64(mixed_seeds + (position + 1) * GOLDEN)
    # The upper 53 bits: as many as a double holds, so that 1.0 never comes out.
    bits = (bits >> 11) & ((1 << 53) - 1)
    return (torch.from_numpy(bits) if on_cpu else bits).double() * 2.0**-53


# ---------------------------------------------------------------------------------------------------------- sampling


def sample_tokens(logits, sampling: Sampling, mixed_seeds, position, exact: bool = True) -> tuple:
    """One token for each row of `logits` (rows, vocabulary): ids, fp32 log-probs and entropies (rows,), and `sure`.

    Inverse CDF with sums in float64 and one uniform number per (seed, position). Order of the truncations as in
    transformers: temperature, then top-k, then top-p on what is left. Log-prob and entropy (nats; NaN with a
    logit of -inf) ignore both. The host never waits for the device.

    With exact=False top-p looks at the `CUT` most probable tokens only, which is much faster. sure (rows,) bool is then
    False where it needs more of them, and the row has to be sampled again, exactly. None: nothing can be missing.
    """
    z = logits.float()
    sure = None
    if sampling.temperature not in (0, 1):  # saves a tensor of the size of the logits
        z = z / sampling.temperature
    # Not log_softmax: over 150,000 words a CPU's kernel of it is off by 3e-5, since it sums one after the other.
    log_p = z - torch.logsumexp(z, -1, keepdim=True)
    p = log_p.exp()
    entropy = -torch.linalg.vecdot(p, log_p)
    if sampling.temperature == 0:
        token = z.argmax(-1)
    else:
        if sampling.top_p < 1 or sampling.top_k:
            p, sure = truncate(p, sampling.top_k, sampling.top_p, p.shape[-1] if exact else CUT)
        token = inverse_cdf(p, uniform(mixed_seeds, position))
    return token, log_p.gather(-1, token[:, None]).squeeze(-1), entropy, sure


def truncate(p: torch.Tensor, top_k: int, top_p: float, looked_at: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """p (rows, vocabulary) with zeros outside the k most probable tokens and then outside the smallest set of tokens,
    most probable first, whose share of what is left is at least top_p. Tokens as probable as the last one stay.

    Sorting 150,000 tokens a row is slow, so for top-p alone only the `looked_at` most probable are sorted. Second
    result (rows,) bool: whether they hold enough of the mass, so that the row is that of a full sort; None where
    nothing can be missing. top_k = 0 and top_p = 1 mean off.
    """
    size = p.shape[-1]
    # top-k decides how many are sorted: with k given, nothing beyond the k-th can stay.
    most = min(size, top_k or looked_at)
    largest = (p.topk(most, dim=-1) if most < size else p.sort(dim=-1, descending=True)).values  # descending
    if top_p == 1:
        last = torch.full_like(p[:, :1], largest.shape[-1] - 1, dtype=torch.int64)
        return p.masked_fill(p < largest.gather(-1, last), 0), None
    # top-p is a share of what top-k left, as in transformers; without top-k that is the whole vocabulary.
    mass = largest.sum(-1, keepdim=True, dtype=torch.float64)
    complete = bool(top_k) or largest.shape[-1] == size
    total = mass if complete else p.sum(-1, keepdim=True, dtype=torch.float64)
    # A token stays while the mass before it is below top_p: so the one that crosses the bound stays, and always one.
    before = largest.cumsum(-1, dtype=torch.float64) - largest
    last = (before < top_p * total).sum(-1, keepdim=True) - 1
    sure = None if complete else (mass >= top_p * total).squeeze(-1)
    return p.masked_fill(p < largest.gather(-1, last), 0), sure


def inverse_cdf(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """(rows,) tokens drawn from p (rows, vocabulary), not necessarily normalised, by u (rows,) in [0, 1).

    Two levels: first a block of `BLOCK` tokens by its mass, then a token of that block, so that only block sums and one
    block a row are ever held in float64; a small vocabulary has one. A token of probability 0 is never drawn.
    """
    rows, size = p.shape
    if size <= SMALL:
        cdf = p.cumsum(-1, dtype=torch.float64)
        return _first_above(cdf, u[:, None] * cdf[:, -1:]).squeeze(-1)
    if size % BLOCK:
        p = F.pad(p, (0, -size % BLOCK))
    p = p.view(rows, -1, BLOCK)
    cdf = p.sum(-1, dtype=torch.float64).cumsum(-1)
    target = u[:, None] * cdf[:, -1:]  # times the total, so that p need not be normalised
    block = _first_above(cdf, target)
    before = F.pad(cdf, (1, 0)).gather(-1, block)
    inner = p[torch.arange(rows, device=p.device), block[:, 0]].cumsum(-1, dtype=torch.float64)
    return (block * BLOCK + _first_above(inner, target - before)).squeeze(-1)


def _first_above(cdf: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(rows, 1): the first index with cdf > target. A target that rounding put at the end is brought back below it."""
    below_end = torch.nextafter(cdf[:, -1:], torch.zeros_like(target))
    # right=True means above, not at or above: with u = 0 a first token of probability 0 would be drawn.
    return torch.searchsorted(cdf, torch.minimum(target, below_end), right=True)


# -------------------------------------------------------------------------------------------------------- stopping


class StopTable:
    """Which tokens can end a response: EOS tokens, and tokens whose text can be the end of a stop string."""

    def __init__(self, tokenizer, vocab_size: int, stop: tuple[str, ...], eos_ids: frozenset[int]):
        self.tokenizer, self.stop = tokenizer, stop
        # A token has at least one byte, so a stop string spans at most as many tokens as it has bytes. Decoding no more
        # than these keeps the check independent of the response's length.
        self.tail = max((len(s.encode()) for s in stop), default=0)
        kinds = bytearray(vocab_size)
        if stop:
            # Only a token whose own text can end a stop string makes the host decode the response's end at all.
            texts = tokenizer.batch_decode([[i] for i in range(vocab_size)], clean_up_tokenization_spaces=False)
            for i, text in enumerate(texts):
                if any(_can_complete(text, s) for s in stop):
                    kinds[i] = STOP_CANDIDATE
        for i in eos_ids:
            if i < vocab_size:
                kinds[i] = EOS
        self.kinds = bytes(kinds)  # NORMAL, STOP_CANDIDATE or EOS for each token id

    def reason(self, ids: list[int]) -> str | None:
        """Why the response ends with its last token, "eos" or "stop"; None: it does not."""
        kind = self.kinds[ids[-1]]
        if kind != STOP_CANDIDATE:
            return "eos" if kind == EOS else None
        text = self.tokenizer.decode(ids[-self.tail :], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return "stop" if any(s in text for s in self.stop) else None


def _can_complete(text: str, stop: str) -> bool:
    """Can appending a token with this text make the stop string appear? Bytes of a split character: assume so."""
    if "\ufffd" in text:
        return not stop.isascii()
    return any(stop.endswith(text[:j]) or text[:j].endswith(stop) for j in range(1, len(text) + 1))
