"""`generate` of transformers against the engine, on the embedded model with a LoRA of random values."""

import random
from pathlib import Path

import pytest
import torch

from azr.models import model_path
from azr.policy.hf_generate import HFGenerate
from azr.policy.policy import LoraSettings, Policy
from azr.policy.sampling import Sampling

TINY = Path(model_path("tiny"))
TEXTS = [
    "def f(x):\n    return x + 1\n",
    "d",
    "print(",
    "def f(a, b):\n    c = a * b\n    return c\n\n# f(3, 4) =",
    "x = [1, 2, 3]\n",
    "answer",
    "return",
]


def randomize(policy: Policy, seed: int = 0, scale: float = 0.03) -> None:
    """Give both LoRA matrices random values: B starts at zero, and then the adapter does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture(scope="module")
def policy():
    policy = Policy.load(str(TINY), quantization="none", lora=LoraSettings(rank=8, alpha=16))
    randomize(policy)
    return policy


def make(policy, **options):
    options = {"pad_id": policy.pad_id} | options
    return HFGenerate(policy.model, policy.tokenizer, options.pop("eos_ids", policy.eos_ids), **options)


def prompts_of(policy) -> list[list[int]]:
    """Of one token to many, with a repetition."""
    prompts = [policy.encode(text) for text in TEXTS]
    rng = random.Random(0)
    prompts += [[rng.randrange(200) for _ in range(length)] for length in (1, 40, 90)]
    return [*prompts, prompts[0]]


def seeds_for(prompts, n, base=0):
    return [[base + 1000 * i + j for j in range(n)] for i in range(len(prompts))]


def test_greedy_equals_the_engine(policy):
    prompts, sampling = prompts_of(policy), Sampling(temperature=0, max_new_tokens=24, stop=("\n\n",))
    expected = policy.generate(prompts, 2, sampling, seeds_for(prompts, 2))
    completions = make(policy, max_batch=5).generate(prompts, 2, sampling, seeds_for(prompts, 2))
    reasons = set()
    for row, expected_row in zip(completions, expected):
        for c, e in zip(row, expected_row, strict=True):
            assert (c.ids, c.finish_reason) == (e.ids, e.finish_reason)
            assert c.log_probs == pytest.approx(e.log_probs, abs=2e-5)
            reasons.add(c.finish_reason)
    assert len(reasons) >= 2  # responses that end by themselves and responses that are cut


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.8, "top_k": 30}], ids=["whole", "top-p and top-k"])
def test_log_probs_are_those_of_the_untruncated_distribution(policy, truncation):
    prompts, sampling = prompts_of(policy)[:6], Sampling(temperature=0.7, max_new_tokens=12, stop=(), **truncation)
    completions = make(policy).generate(prompts, 3, sampling, seeds_for(prompts, 3))
    flat = [c for row in completions for c in row]
    repeated = [p for p in prompts for _ in range(3)]
    expected, _ = policy.score_lists(repeated, [c.ids for c in flat], temperature=0.7)
    for c, e in zip(flat, expected):
        assert c.log_probs == pytest.approx(e, abs=5e-5)  # the temperature divides the logits' rounding by 0.7


def test_sampled_first_tokens_follow_the_distribution(policy):
    """Chi-square over the likely tokens: 1,000 samples of one prompt at temperature 0.8, nothing truncated."""
    prompt, count = policy.encode("x = "), 1000
    sampling = Sampling(temperature=0.8, max_new_tokens=1, stop=())
    backend = make(policy, eos_ids=(), max_batch=500)
    drawn = [c.ids[0] for c in backend.generate([prompt], count, sampling, seeds_for([prompt], count))[0]]
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt], device=policy.device)).logits[0, -1].float()
    expected = (logits / 0.8).softmax(-1) * count
    observed = torch.bincount(torch.tensor(drawn), minlength=len(expected)).float()
    common = expected >= 5
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    observed = torch.cat([observed[common], observed[~common].sum()[None]])
    statistic, freedom = ((observed - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5


def test_the_checkpoints_sampling_settings_are_not_used(policy):
    prompts, sampling = prompts_of(policy)[:4], Sampling(temperature=0, max_new_tokens=16, stop=())
    expected = policy.generate(prompts, 1, sampling, seeds_for(prompts, 1))
    config = policy.base.generation_config
    before = config.to_dict()
    config.update(temperature=0.1, top_k=3, top_p=0.5, repetition_penalty=2.0, do_sample=True, min_new_tokens=16)
    try:
        found = make(policy).generate(prompts, 1, sampling, seeds_for(prompts, 1))
    finally:
        assert policy.base.generation_config is config and config.repetition_penalty == 2.0
        config.update(**before)
    assert [row[0].ids for row in found] == [row[0].ids for row in expected]


def test_after_an_update_it_samples_from_the_new_policy(policy):
    """The same prompts again, of several pages, after the adapter has changed: cached keys would be the old ones."""
    prompts = [[7 + i, *range(1, 64)] for i in range(4)]
    sampling = Sampling(temperature=0, max_new_tokens=12, stop=())
    backend = make(policy)
    first = backend.generate(prompts, 2, sampling, seeds_for(prompts, 2))
    randomize(policy, seed=1)
    try:
        second = backend.generate(prompts, 2, sampling, seeds_for(prompts, 2))
        expected, _ = policy.score_lists([p for p in prompts for _ in range(2)], [c.ids for r in second for c in r])
    finally:
        randomize(policy, seed=0)
    assert [c.log_probs for row in first for c in row] != [c.log_probs for row in second for c in row]
    for c, e in zip([c for row in second for c in row], expected):
        assert c.log_probs == pytest.approx(e, abs=2e-5)


def test_the_model_is_left_as_it_was(policy):
    prompts, sampling = prompts_of(policy)[:2], Sampling(max_new_tokens=3, stop=())
    policy.model.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = make(policy).generate(prompts, 2, sampling, seeds_for(prompts, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in policy.model.modules())
    policy.model.eval()
    assert make(policy).generate(prompts, 2, sampling, seeds_for(prompts, 2)) == first
    assert not policy.model.training
    assert make(policy).generate(prompts, 2, sampling, seeds_for(prompts, 2, base=7)) != first


def test_a_limit_for_each_prompt(policy):
    prompts = prompts_of(policy)[:4]
    backend = make(policy, eos_ids=())
    sampling = Sampling(max_new_tokens=9, stop=())
    completions = backend.generate(prompts, 2, sampling, seeds_for(prompts, 2), max_new_tokens=[1, 9, 3, 5])
    assert [[(len(c.ids), len(c.log_probs), c.finish_reason) for c in row] for row in completions] == [
        [(length, length, "length")] * 2 for length in (1, 9, 3, 5)
    ]


def test_bad_input_and_nothing_to_do(policy):
    backend, sampling = make(policy), Sampling(max_new_tokens=8)
    assert backend.generate([], 2, sampling, []) == []
    assert backend.generate([[1]], 0, sampling, [[]]) == [[]]
    for prompts, seeds, limits, message in (
        ([[]], [[0]], None, "prompt 0 is empty"),
        ([[1]], [[0, 1]], None, "seeds must hold 1 integers"),
        ([[1]], [[0]], [1, 2], "max_new_tokens must hold"),
        ([[1]], [[0]], [0], "max_new_tokens must hold"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.generate(prompts, 1, sampling, seeds, limits)


def test_a_prompt_that_does_not_fit_fails_alone(policy, capsys):
    prompts, sampling = [[1, 2], [1] * 1020, [3, 4]], Sampling(max_new_tokens=8, stop=())
    first, second, third = make(policy, eos_ids=()).generate(prompts, 2, sampling, seeds_for(prompts, 2))
    assert [len(c.ids) for c in first + third] == [8] * 4
    assert [(c.ids, c.finish_reason) for c in second] == [([], "too_long")] * 2
    assert "prompt 1 is not sampled: it has 1020 tokens and asks for 8 more" in capsys.readouterr().err
