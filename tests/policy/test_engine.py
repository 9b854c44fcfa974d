"""The rollout engine against transformers' generate and against the trainer's log-probs, and its scheduling.

Random models of each architecture stand in for real ones, with the real Qwen2.5 tokenizer (vocabulary 151,936) where
its files are at hand, else with a made-up one; besides, the embedded model.
"""

import random
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from azr.models import model_path
from azr.policy import decoder
from azr.policy import sampling as sampling_module
from azr.policy.cache import Pages
from azr.policy.cpu_attention import SHARED_ROWS, ByPage
from azr.policy.decoding import Decoding
from azr.policy.engine import Engine
from azr.policy.policy import LoraSettings, Policy
from azr.policy.sampling import Sampling, inverse_cdf, sample_tokens, seed_tensor, truncate, uniform
from azr.policy.scheduler import Scheduler
from small_models import REAL_TOKENIZER, made_up_tokenizer, make_model, prompts_of, seeds_of, stirred

LORA = LoraSettings(rank=4, alpha=8)
SIZES = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.15,
)
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ARCHITECTURES = {
    "qwen2": lambda **o: Qwen2Config(**SIZES, **o, tie_word_embeddings=True),
    "qwen3": lambda **o: Qwen3Config(**SIZES, **o, tie_word_embeddings=True, head_dim=32),
    "llama": lambda **o: LlamaConfig(**SIZES, **o, tie_word_embeddings=False, rope_parameters=ROPE),
}
LENGTHS = (1, 5, 32, 33, 70)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Name -> directory of a model; made when first asked for."""
    made = {"tiny": model_path("tiny")}

    def get(name: str) -> str:
        if name not in made:
            real = REAL_TOKENIZER.is_dir()
            tokenizer = AutoTokenizer.from_pretrained(REAL_TOKENIZER) if real else made_up_tokenizer()
            made[name] = str(tmp_path_factory.mktemp(name))
            torch.manual_seed(0)
            options = dict(vocab_size=151_936 if real else 320, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
            AutoModelForCausalLM.from_config(ARCHITECTURES[name](**options)).save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return made[name]

    return get


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("small"), made_up_tokenizer(), vocab=320)


@pytest.fixture(scope="module")
def policy(small) -> Policy:
    return stirred(Policy.load(small, "none", lora=LORA))


def engine_of(policy: Policy, **options) -> Engine:
    """Another engine on the same policy."""
    return Engine(
        policy.backbone,
        policy.engine.head,
        policy.base.config,
        policy.tokenizer,
        policy.eos_ids,
        pad_id=policy.pad_id,
        **options,
    )


def greedy_reference(policy, prompts, new_tokens: int) -> list[list[int]]:
    """By `generate` of transformers, prompts of one length at a time, so that nothing is padded."""
    done: dict[int, list[int]] = {}
    for length in {len(p) for p in prompts}:
        rows = [i for i, p in enumerate(prompts) if len(p) == length]
        ids = torch.tensor([prompts[i] for i in rows])
        out = policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            num_beams=1,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            pad_token_id=policy.pad_id,
        )[:, length:].tolist()
        for i, row in zip(rows, out):
            end = next((t + 1 for t, token in enumerate(row) if token in policy.eos_ids), new_tokens)
            done[i] = row[:end]
    return [done[i] for i in range(len(prompts))]


def mixed_prompts(each: int, vocab: int = 250, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, vocab) for _ in range(length)] for length in LENGTHS for _ in range(each)]


def check_log_probs(policy, prompts, out, temperature=1.0, tolerance=2e-5):
    flat = [(p, c) for p, row in zip(prompts, out) for c in row]
    expected = policy.score_lists([p for p, _ in flat], [c.ids for _, c in flat], temperature)
    assert all(len(c.log_probs) == len(c.entropy) == len(c.ids) for _, c in flat)
    for name, values in zip(("log_probs", "entropy"), expected):
        gaps = [abs(a - b) for (_, c), row in zip(flat, values) for a, b in zip(getattr(c, name), row)]
        assert max(gaps) < tolerance and sum(gaps) / len(gaps) < tolerance / 5


# ------------------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", ["tiny", *ARCHITECTURES])
def test_greedy_equals_generate(name, quantization, directory):
    """25 prompts of 1 to 70 tokens for each of four models; with LoRA, and unquantized without it, too."""
    policy = stirred(Policy.load(directory(name), quantization, lora=LORA, max_batch=16))
    prompts, seeds = mixed_prompts(5, seed=len(name)), seeds_of(25, 1)
    prompts[3] = prompts[4]
    new = 20 if name == "tiny" else 6  # logits of 151,936 tokens are slow
    greedy = Sampling(temperature=0, max_new_tokens=new, stop=())
    out = policy.generate(prompts, 1, greedy, seeds)
    assert [row[0].ids for row in out] == greedy_reference(policy, prompts, new)
    check_log_probs(policy, prompts, out)
    if quantization == "none":
        with policy.disable_adapter():
            plain = policy.generate(prompts, 1, greedy, seeds)
            assert [row[0].ids for row in plain] == greedy_reference(policy, prompts, new)
            check_log_probs(policy, prompts, plain)
        assert [row[0].log_probs for row in plain] != [row[0].log_probs for row in out]


OPTIONS = {
    "gathered pages": dict(attn="sdpa"),
    "three slots": dict(max_batch=3),
    "small prefills": dict(prefill_tokens=40),
    "blocks of eight": dict(block=8),
    "little memory": dict(page_size=8, pages=24),
    "little memory, gathered, in blocks": dict(page_size=8, pages=24, attn="sdpa", block=5),
    "one page": dict(page_size=96, pages=1),
    "one slot": dict(max_batch=1),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_samples_do_not_depend_on_slots_pages_or_blocks(options, policy, monkeypatch):
    preempted = []
    monkeypatch.setattr(
        Scheduler,
        "preempt",
        lambda self, s, real=Scheduler.preempt: (preempted.append(s), real(self, s)),
    )
    prompts = mixed_prompts(2) + [[7]]
    sampling, seeds = Sampling(temperature=0.9, top_p=0.95, max_new_tokens=24), seeds_of(len(prompts), 2)
    wide = policy.generate(prompts, 2, sampling, seeds)
    assert not preempted
    other = engine_of(policy, **options)
    out = other.generate(prompts, 2, sampling, seeds)
    assert out == other.generate(prompts, 2, sampling, seeds)  # bit for bit
    assert [[(c.ids, c.finish_reason) for c in row] for row in out] == [
        [(c.ids, c.finish_reason) for c in row] for row in wide
    ]
    check_log_probs(policy, prompts, out, temperature=0.9)
    assert bool(preempted) == ("pages" in options and options["pages"] > 1)


def test_sixteen_samples_in_one_page_and_in_a_crowd(policy):
    """n = 16 where only one sample fits at a time, and among 400 others."""
    prompts, seeds = [[5], [5, 6, 7], *mixed_prompts(5)], seeds_of(27, 16)
    sampling = Sampling(max_new_tokens=20)
    crowd = policy.generate(prompts, 16, sampling, seeds)
    lonely = engine_of(policy, page_size=24, pages=1).generate(prompts[:2], 16, sampling, seeds[:2])
    assert [[c.ids for c in row] for row in lonely] == [[c.ids for c in row] for row in crowd[:2]]
    assert len({tuple(c.ids) for c in crowd[0]}) == 16
    few = engine_of(policy, max_batch=24).generate(prompts, 16, sampling, seeds)
    pairs = [(a.ids, b.ids) for one, two in zip(crowd, few) for a, b in zip(one, two)]
    assert sum(a == b for a, b in pairs) >= 0.999 * len(pairs)


def test_a_prompt_is_prefilled_once_and_its_full_pages_are_shared(policy, monkeypatch):
    engine = engine_of(policy, page_size=8, max_batch=6)
    prefilled, most = [], []
    monkeypatch.setattr(
        Decoding,
        "prefill",
        lambda self, fresh, real=Decoding.prefill: (prefilled.extend(fresh), real(self, fresh)),
    )
    monkeypatch.setattr(
        Decoding,
        "hidden",
        lambda self, *a, real=Decoding.hidden: (most.append(max(self.scheduler.pages.users)), real(self, *a))[1],
    )
    a, b = prompts_of(2, low=20, high=30)
    out = engine.generate([a, b, a, b, a], 8, Sampling(max_new_tokens=6), seeds_of(5, 8))
    assert len(prefilled) == 2  # 40 samples through 6 slots, two distinct prompts
    assert max(most) >= 6  # all six slots read the same pages, and the prompt's own count is kept for those that wait
    assert [len(row) for row in out] == [8] * 5


def test_limits_for_each_prompt(policy):
    prompts, seeds = prompts_of(6), seeds_of(6, 2)
    sampling = Sampling(max_new_tokens=30, stop=())
    full = policy.generate(prompts, 2, sampling, seeds)
    for block in (1, 8):
        out = engine_of(policy, block=block).generate(prompts, 2, sampling, seeds, max_new_tokens=[1, 2, 3, 9, 17, 30])
        for row, whole, limit in zip(out, full, [1, 2, 3, 9, 17, 30]):
            assert [c.ids for c in row] == [c.ids[:limit] for c in whole]
    with pytest.raises(ValueError, match="max_new_tokens"):
        policy.generate(prompts, 2, sampling, seeds, max_new_tokens=[1])


@pytest.mark.parametrize("options", [{}, {"block": 8}, {"max_batch": 3}, {"page_size": 8, "pages": 16}])
def test_prompts_that_come_while_others_are_sampled(options, policy):
    """They have the completions that they have alone, whenever they come; and they are waited for."""
    first, later = prompts_of(4, seed=1), prompts_of(5, seed=2)
    seeds, seeds_later = seeds_of(4, 1), [[50 + i, 60 + i] for i in range(5)]
    sampling = Sampling(max_new_tokens=40, stop=())
    alone = policy.generate(first, 1, sampling, seeds) + policy.generate(later, 2, sampling, seeds_later)
    engine, further = engine_of(policy, **options), [(*pair, 40) for pair in zip(later, seeds_later)]

    def generate():
        brought, last, ended, looks = iter([[], further[:2], [], further[2:4], []]), iter([further[4:]]), [], []

        def more():
            looks.append(len(ended))
            if len(ended) == 14:
                return None
            return next(last, []) if len(ended) == 12 else next(brought, [])

        out = engine.generate(
            first, 1, sampling, seeds, on_finish=lambda i, j, _: ended.append((i, j)), more=more, most=10
        )
        return out, ended, looks

    out, ended, looks = generate()
    assert [[c.ids for c in row] for row in out] == [[c.ids for c in row] for row in alone]
    assert sorted(ended) == [(i, j) for i, row in enumerate(alone) for j in range(len(row))]
    assert looks[0] < 4 and 12 in looks and looks[-1] == 14  # in the middle; and when nothing else is left
    assert generate() == (out, ended, looks)  # bit for bit


def test_a_prompt_that_comes_later_must_not_be_longer_than_the_first(policy):
    engine, brought = engine_of(policy, page_size=8), iter([[([5] * 60, [1], 8)]])
    with pytest.raises(ValueError, match="longer than"):
        engine.generate([[5, 6]], 1, Sampling(max_new_tokens=8), [[1]], more=lambda: next(brought, None), most=1)
    refused = engine.generate([[5] * 600], 1, Sampling(max_new_tokens=8), [[1]], more=lambda: 1 / 0, most=1)
    assert refused[0][0].finish_reason == "too_long"  # nothing runs, so nothing is asked for


# ------------------------------------------------------------------------------------------------- the live policy


def test_after_an_optimizer_step_it_samples_from_the_new_policy(small):
    policy = stirred(Policy.load(small, "nf4", lora=LORA))
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=0.02)
    prompts, sampling, seeds = prompts_of(4), Sampling(max_new_tokens=12), seeds_of(4, 2)
    before = policy.generate(prompts, 2, sampling, seeds)
    for step in range(3):
        for _, log_prob, _, _ in policy.score(prompts, [row[0].ids for row in before], with_grad=True):
            (-log_prob.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:  # this gives every parameter new memory; the engine must notice
            policy.model.to(torch.float64).to(torch.float32)
        after = policy.generate(prompts, 2, sampling, seeds)
        assert after != before
        check_log_probs(policy, prompts, after)  # of the trainer's own path, with the new weights
        before_scores, _ = policy.score_lists(prompts, [row[0].ids for row in before])
        assert sum(map(sum, before_scores)) > sum(sum(row[0].log_probs) for row in before)  # the update was felt
        before = after


def test_the_grouped_matrices_are_the_parameters(small):
    policy = Policy.load(small, "none", lora=LORA)
    attention = policy.backbone.layers[0].self_attn
    a, b = (m.lora_A["default"].weight for m in (attention.q_proj, attention.k_proj))
    assert b.data_ptr() == a.data_ptr() + a.numel() * 4 and a.is_leaf and a.requires_grad
    addresses = [p.data_ptr() for p in policy.model.parameters()]
    policy.generate([[5]], 1, Sampling(max_new_tokens=2), [[0]])
    assert addresses == [p.data_ptr() for p in policy.model.parameters()]
    assert not policy.engine.decoder.layers  # nothing of the call is left


def test_copies_of_the_frozen_weights_change_nothing_and_die_with_the_call(small):
    stored = stirred(Policy.load(small, "nf4", lora=LORA))
    copied = stirred(Policy.load(small, "nf4", lora=LORA, rollout_weights="bf16"))
    layer = copied.backbone.layers[0].mlp.down_proj.base_layer
    x = torch.randn(5, layer.in_features)
    assert torch.equal(layer(x), x @ decoder.dequantized(layer, torch.float32).t())
    prompts, sampling, seeds = prompts_of(6), Sampling(max_new_tokens=12), seeds_of(6, 2)
    one, two = (p.generate(prompts, 2, sampling, seeds) for p in (stored, copied))
    assert [[c.ids for c in row] for row in one] == [[c.ids for c in row] for row in two]
    check_log_probs(stored, prompts, two)
    assert not copied.engine.decoder.layers
    with pytest.raises(ValueError, match="rollout_weights"):
        Policy.load(small, "nf4", rollout_weights="fp8")


def test_an_unknown_architecture_falls_back_loudly(tmp_path, capsys):
    tokenizer = made_up_tokenizer()
    AutoModelForCausalLM.from_config(
        MistralConfig(**SIZES, vocab_size=320, eos_token_id=0, pad_token_id=0, sliding_window=None)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = stirred(Policy.load(tmp_path, "none", lora=LORA))
    error = capsys.readouterr().err
    assert "does not know mistral" in error and "generate" in error
    prompts = prompts_of(3)
    out = policy.generate(prompts, 2, Sampling(max_new_tokens=5, stop=()), seeds_of(3, 2))
    check_log_probs(policy, prompts, out)


# ---------------------------------------------------------------------------------------------------- bad requests


def test_a_request_that_can_never_fit_fails_alone(policy, capsys):
    prompts, seeds = [[1] * 5, [1] * 200, [2] * 5], seeds_of(3, 2)
    sampling = Sampling(max_new_tokens=100)
    good, bad, other = policy.generate(prompts, 2, sampling, seeds)
    assert [(c.ids, c.log_probs, c.finish_reason) for c in bad] == [([], [], "too_long")] * 2
    error = capsys.readouterr().err
    assert "prompt 1 is not sampled: it has 200 tokens and asks for 100 more; the model's context is 256" in error
    assert [good, other] == policy.generate([prompts[0], prompts[2]], 2, sampling, [seeds[0], seeds[2]])
    capsys.readouterr()
    [[small], [large]] = engine_of(policy, page_size=16, pages=2).generate(
        [[1] * 5, [1] * 25], 1, Sampling(max_new_tokens=20), [[0], [1]]
    )
    assert small.ids and large.finish_reason == "too_long"
    assert "the KV cache has 2 pages of 16" in capsys.readouterr().err


def test_requests_that_mean_nothing(policy):
    sampling = Sampling(max_new_tokens=10)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        policy.generate([[]], 1, sampling, [[0]])
    with pytest.raises(ValueError, match="seeds"):
        policy.generate([[1]], 2, sampling, [[0]])
    for bad in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}, {"stop": "x"}):
        with pytest.raises(ValueError):
            Sampling(**bad)
    assert policy.generate([], 4, sampling, []) == []
    assert policy.generate([[1]], 0, sampling, [[]]) == [[]]


# -------------------------------------------------------------------------------------------------------- stopping


def force(policy: Policy, text: str):
    """Make the head prefer the tokens of `text`, one after the other, whatever came before."""
    ids = policy.encode(text)
    steps = iter(ids + [policy.encode("x")[0]] * 1000)

    def head(hidden):
        logits = torch.zeros(hidden.shape[0], policy.base.config.vocab_size)
        logits[:, next(steps)] = 50.0
        return logits

    policy.engine.head = head
    return ids


def test_stop_strings_over_several_tokens(small):
    policy = Policy.load(small, "none", block=3)
    assert len(policy.encode("</answer>")) > 1
    force(policy, "a </answer b </answer> tail")
    [[c]] = policy.generate([[5, 6]], 1, Sampling(temperature=0, max_new_tokens=60), [[0]])
    assert c.finish_reason == "stop" and policy.decode(c.ids) == "a </answer b </answer>"
    assert len(c.ids) == len(c.log_probs)


def test_a_stop_string_that_ends_inside_a_token_and_one_that_is_not_ascii(small):
    policy = Policy.load(small, "none")
    force(policy, "1 + 2 return 3")
    [[c]] = policy.generate([[5]], 1, Sampling(temperature=0, max_new_tokens=40, stop=("zz", "+ 2 ret")), [[0]])
    assert c.finish_reason == "stop" and "+ 2 ret" in policy.decode(c.ids)
    assert "+ 2 ret" not in policy.decode(c.ids[:-1])
    force(policy, "né€ 2")
    [[c]] = policy.generate([[5]], 1, Sampling(temperature=0, max_new_tokens=40, stop=("é€",)), [[0]])
    assert c.finish_reason == "stop" and policy.decode(c.ids) == "né€"


def test_eos_and_length(small):
    policy = Policy.load(small, "none")
    force(policy, "12<|endoftext|>34")
    [[c]] = policy.generate([[5]], 1, Sampling(temperature=0, max_new_tokens=40), [[0]])
    assert c.finish_reason == "eos" and c.ids[-1] == policy.tokenizer.eos_token_id and policy.decode(c.ids) == "12"
    force(policy, "1234")
    [[c]] = policy.generate([[5]], 1, Sampling(temperature=0, max_new_tokens=3), [[0]])
    assert c.finish_reason == "length" and policy.decode(c.ids) == "123"


# -------------------------------------------------------------------------------------------------------- sampling


def chi_square_passes(counts: torch.Tensor, p: torch.Tensor) -> bool:
    """Cells expected at least 5 times on their own, the others together; Wilson-Hilferty: the cube root of
    chi-square / df is nearly normal; 4 standard deviations."""
    expected = p / p.sum() * counts.sum()
    if counts[expected == 0].sum():
        return False
    large = expected >= 5
    squares, rest = (counts - expected)[large] ** 2 / expected[large], (counts - expected)[~large].sum() ** 2
    cells = torch.cat([squares, (rest / expected[~large].sum().clamp(min=1))[None]])
    df = int(large.sum()) - (0 if expected[~large].sum() > 0 else 1)
    return bool((cells.sum() / df) ** (1 / 3) < 1 - 2 / (9 * df) + 4 * (2 / (9 * df)) ** 0.5)


def truncated_by_sorting(p: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    p, order = p.double().sort(descending=True)
    if top_k:
        p[top_k:] = 0
    p[p.cumsum(-1) - p >= top_p * p.sum()] = 0
    return torch.zeros_like(p).scatter_(0, order, p)


@pytest.mark.parametrize(
    "draws, options", [(100_000, {}), (100_000, {"top_p": 0.8, "temperature": 1.3}), (20_000, {"top_k": 20})]
)
def test_first_tokens_follow_the_softmax(small, draws, options):
    """Chi-square over many draws with the seeds 0, 1, 2, ..."""
    policy = Policy.load(small, "none", max_batch=8192)
    prompt, sampling = prompts_of(1)[0], Sampling(max_new_tokens=1, stop=(), **options)
    out = policy.generate([prompt], draws, sampling, [range(draws)])
    counts = torch.bincount(torch.tensor([c.ids[0] for c in out[0]]), minlength=320).double()
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / sampling.temperature
    p = truncated_by_sorting(logits.softmax(-1), sampling.top_k, sampling.top_p)
    assert chi_square_passes(counts, p)
    wrong = p.clone()
    wrong[p.argsort()[::2]] *= 1.2  # the test can tell such a difference
    assert not chi_square_passes(counts, wrong)


@pytest.mark.parametrize("scale", [0.1, 3.0])  # flat: the cut does not hold the mass; peaked: it does
def test_truncation_equals_a_full_sort_at_a_large_vocabulary(scale):
    generator = torch.Generator().manual_seed(0)
    p = (scale * torch.randn(4, 20_000, generator=generator)).softmax(-1)
    held = p.topk(sampling_module.CUT).values.sum(-1)
    assert (held < 0.9).all() if scale < 1 else (held > 0.9).all()
    for top_k, top_p in ((0, 0.9), (50, 1.0), (50, 0.7), (0, 1e-6), (30_000, 1.0)):
        for looked_at in (sampling_module.CUT, p.shape[-1]):
            ours, sure = truncate(p, top_k, top_p, looked_at)
            quick = (top_k, top_p) in ((0, 0.9), (0, 1e-6)) and looked_at < p.shape[-1]
            assert (sure is not None) == quick
            if quick:  # it knows where it does not know
                assert (sure == (scale > 1 or top_p < 0.1)).all()
            for i, (row, kept) in enumerate(zip(p, ours)):
                if sure is None or sure[i]:
                    assert torch.equal(kept > 0, truncated_by_sorting(row, top_k, top_p) > 0)


def test_flat_rows_are_sampled_again_exactly(small):
    """Top-p over a distribution that the quick look does not cover: the same samples as with a full sort each step."""
    policy = Policy.load(small, "none", block=4)
    prompts, sampling = prompts_of(3), Sampling(max_new_tokens=9, top_p=0.97, temperature=3.0, stop=())
    seeds = [[10 * i + j for j in range(4)] for i in range(3)]
    wanted = policy.generate(prompts, 4, sampling, seeds)
    for cut in (1, 8, 64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling_module, "CUT", cut)
            assert policy.generate(prompts, 4, sampling, seeds) == wanted


@pytest.mark.parametrize("size", [1000, 3000])
def test_inverse_cdf_is_exact_and_never_draws_what_has_no_probability(size):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(6, size, generator=generator).mul(2).softmax(-1)
    p[:, 700:] = 0
    p[1, :650] = 0
    p[2, 1:] = 0
    for u in (0.0, 1e-12, 0.3, 0.77, 1 - 2**-53):
        token = inverse_cdf(p, torch.full((6,), u, dtype=torch.float64))
        cdf = p.double().cumsum(-1)
        below = cdf.gather(-1, (token[:, None] - 1).clamp(min=0)).squeeze(-1) * (token > 0)
        at, target = cdf.gather(-1, token[:, None]).squeeze(-1), u * cdf[:, -1]
        assert (below <= target + 1e-12).all() and (target <= at + 1e-12).all()
        assert (p.gather(-1, token[:, None]) > 0).all()
    logits = p.log()
    token, log_prob, _, _ = sample_tokens(logits, Sampling(top_k=3), seed_tensor([1] * 6, "cpu"), torch.arange(6))
    assert torch.allclose(log_prob, logits.log_softmax(-1).gather(-1, token[:, None]).squeeze(-1), atol=1e-6)


def test_uniform_numbers_are_uniform_and_uncorrelated():
    seeds = seed_tensor(list(range(2000)), "cpu")
    u = torch.stack([uniform(seeds, torch.full_like(seeds, t)) for t in range(100)])
    assert 0 <= u.min() and u.max() < 1 and u.unique().numel() == u.numel()
    cells = torch.bincount((u.flatten() * 256).long(), minlength=256).double()
    assert ((cells - 781.25) ** 2 / 781.25).sum() < 255 + 4 * (2 * 255) ** 0.5
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):  # neighbouring seeds, neighbouring positions
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01
    assert torch.equal(seed_tensor([-1, 2**64 - 1], "cpu")[:1], seed_tensor([2**64 - 1], "cpu"))


# -------------------------------------------------------------------------------------------- attention, page by page


@pytest.mark.parametrize("users", [1, 3, SHARED_ROWS + 5])
def test_attention_by_page_equals_the_softmax(users):
    """`users` rows share two pages; each has one to three of its own, the last one incomplete."""
    generator, size = random.Random(0), 8
    torch.manual_seed(0)
    by_head = torch.randn(2, 100, 2, size, 16)
    keys, values = by_head.transpose(2, 3)
    free = generator.sample(range(1, 100), 99)
    shared = [free.pop(), free.pop()]
    tables = [shared + [free.pop() for _ in range(generator.randint(1, 3))] for _ in range(users)]
    tables.append([free.pop()])  # and one shares nothing
    lengths = [size * (len(t) - 1) + generator.randint(2, size) for t in tables]
    table = torch.tensor([t + [0] * (5 - len(t)) for t in tables])
    q = torch.randn(len(tables), 6, 16)
    sizes = size, 6, 2, 16
    out = ByPage(table, torch.tensor(lengths), *sizes)(q, *by_head.flatten(1, 2), 0.3)
    for row, (pages, length) in enumerate(zip(tables, lengths)):
        k, v = (t[pages].flatten(0, 1)[:length].repeat_interleave(3, dim=1) for t in (keys, values))
        weight = (0.3 * torch.einsum("hd,thd->ht", q[row], k)).softmax(-1)
        assert torch.allclose(out[row], torch.einsum("ht,thd->hd", weight, v), atol=1e-5)
    stepped = ByPage(table, torch.tensor(lengths) - 1, *sizes)
    assert stepped.advance(table, torch.tensor(lengths)) and not stepped.advance(table[:, :4], torch.tensor(lengths))
    assert torch.equal(stepped(q, *by_head.flatten(1, 2), 0.3), out)


def test_scattered_pages_are_moved_together_and_no_sample_changes(policy, monkeypatch):
    """Short samples end between long ones, which leaves gaps."""
    prompts, moves, compact = mixed_prompts(4), [], Scheduler.compact
    limits = [60 if i % 4 == 0 else 3 for i in range(len(prompts))]
    work = prompts, 2, Sampling(stop=()), seeds_of(len(prompts), 2), limits
    monkeypatch.setattr(Scheduler, "compact", lambda self: moves.append(compact(self)) or moves[-1])
    moved = policy.engine.generate(*work)
    assert any(moves)
    monkeypatch.setattr(Scheduler, "compact", lambda self: [])
    gathered = policy.engine.generate(*work)
    assert [[c.ids for c in row] for row in moved] == [[c.ids for c in row] for row in gathered]
    check_log_probs(policy, prompts, moved)


# ------------------------------------------------------------------------------------------------------------- pages


def test_pages_are_counted():
    pages = Pages(4)
    a, b = pages.take(), pages.take()
    assert (a, b) == (1, 2) and pages.share([a]) == [a]
    pages.release([a, b])
    assert Counter(pages.free) == Counter([2, 3, 4]) and pages.take() == 2
    pages.release([a])
    assert pages.take() == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_sample_what_eager_steps_sample(small):
    policy = stirred(Policy.load(small, "nf4", lora=LORA, dtype=torch.float32, attn="sdpa"))
    prompts, sampling, seeds = mixed_prompts(4), Sampling(max_new_tokens=20), seeds_of(20, 4)
    with_graphs = policy.generate(prompts, 4, sampling, seeds)
    on_cpu = stirred(Policy.load(small, "nf4", lora=LORA, device="cpu")).generate(prompts, 4, sampling, seeds)
    same = [a.ids == b.ids for one, two in zip(with_graphs, on_cpu) for a, b in zip(one, two)]
    assert sum(same) >= 0.95 * len(same)
    assert with_graphs == policy.generate(prompts, 4, sampling, seeds)
