"""Architectures that the engine does not know: small random models of them, sampled, scored and trained all the same.

What must hold for each: a sample scored alone is scored as beside others, the right-padded rows of `score` equal a
plain forward pass, and what `generate` reports of a sample is what `score` says of it.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from azr.policy.hf_generate import HFGenerate
from azr.policy.policy import LoraSettings, ModelError, Policy, Sampling
from small_models import made_up_tokenizer

SIZES = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
)
HYBRID = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    layer_types=["linear_attention", "full_attention"],
)
MIXTURE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
KINDS = {
    "qwen3_5_text": HYBRID,  # linear attention, partial rotary
    "gemma3_text": dict(sliding_window=8, query_pre_attn_scalar=16),
    "phi3": {},  # q, k and v in one matrix
    "mistral": dict(sliding_window=8),
    "qwen2": dict(use_sliding_window=True, sliding_window=8, max_window_layers=1),  # known, were it not for its windows
    "gpt_neox": {},
    "qwen3_moe": MIXTURE,
}


def make(kind: str, directory, **settings) -> str:
    tokenizer = made_up_tokenizer()
    torch.manual_seed(0)
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    config = AutoConfig.for_model(kind, **SIZES | ends | settings)
    config.initializer_range = 0.15
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module", params=KINDS)
def directory(request, tmp_path_factory) -> str:
    return make(request.param, tmp_path_factory.mktemp(request.param), **KINDS[request.param])


PROMPTS = [[7] * 30, [5], [20, 21, 22, 23], [20, 21, 22, 23]]
RESPONSES = [[8, 9, 10], [11, 12], [13] * 20, [14]]


def worst(one: list[list[float]], other: list[list[float]]) -> float:
    return max(abs(a - b) for row, same in zip(one, other, strict=True) for a, b in zip(row, same, strict=True))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_architecture_the_engine_does_not_know_is_scored_sampled_and_trained(directory, quantization, capsys):
    policy = Policy.load(directory, quantization, LoraSettings(4, 8), device="cpu")
    assert isinstance(policy.engine, HFGenerate) and policy.shared_row == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "transformers' generate" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: the engine ")
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable_parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))

    together, alone = (policy.score_lists(PROMPTS, RESPONSES, token_budget=budget)[0] for budget in (8192, 1))
    assert worst(together, alone) < 1e-5
    policy.model.eval()
    with torch.no_grad():
        for row, prompt, response in zip(together, PROMPTS, RESPONSES):
            log_p = policy.model(input_ids=torch.tensor([prompt + response])).logits[0].float().log_softmax(-1)
            plain = log_p[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]
            assert row == pytest.approx(plain.tolist(), abs=1e-5)

    sampling, seeds = Sampling(temperature=0, max_new_tokens=10), [[i] for i in range(4)]
    samples = [row[0] for row in policy.generate(PROMPTS, 1, sampling, seeds)]
    single = [policy.generate([prompt], 1, sampling, [seed])[0][0] for prompt, seed in zip(PROMPTS, seeds)]
    assert [sample.ids for sample in samples] == [sample.ids for sample in single]  # left padding changes nothing
    scored = policy.score_lists(PROMPTS, [sample.ids for sample in samples])[0]
    assert worst(scored, [sample.log_probs for sample in samples]) < 1e-4

    policy.checkpoint_activations()
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-3)
    for _, log_prob, _, mask in policy.score(PROMPTS, RESPONSES, with_grad=True):
        (-log_prob * mask).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in policy.trainable_parameters())
    optimizer.step()
    after = policy.score_lists(PROMPTS, RESPONSES)[0]
    assert sum(map(sum, after)) > sum(map(sum, together))


@pytest.mark.parametrize("kind", ["qwen3_5_text", "mistral"])
def test_several_responses_in_a_row_would_be_wrong_there(kind, tmp_path):
    """Why `shared_row` is 0 for them: a mask reaches neither the state of linear attention nor a sliding window."""
    policy = Policy.load(make(kind, tmp_path, **KINDS[kind]), "none", device="cpu")
    samples = [PROMPTS[2]] * 2, [RESPONSES[2], [14, 15, 16, 17]]
    right = policy.score_lists(*samples)[0]
    policy.shared_row = 512
    assert worst(policy.score_lists(*samples)[0], right) > 1e-2


def refusal(directory) -> str:
    with pytest.raises(ModelError) as caught:
        Policy.load(directory, "none", device="cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize(
    "kind, settings, words",
    [
        ("gemma2", {}, "unsupported config setting final_logit_softcapping"),
        ("cohere", {"logit_scale": 0.0625}, "unsupported config setting logit_scale"),
        ("granite", {"logits_scaling": 8.0}, "unsupported config setting logits_scaling"),
        ("phi", {}, "head with a bias"),
        # a name that nobody has listed: found by comparing logits
        (
            "falcon_h1",
            dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, lm_head_multiplier=0.5),
            "its logits are not its hidden states times its head",
        ),
    ],
)
def test_what_changes_the_logits_after_the_head_is_refused(kind, settings, words, tmp_path):
    assert words in refusal(make(kind, tmp_path, **settings))


def test_experts_that_stay_out_of_4_bits_are_said(tmp_path, capsys):
    Policy.load(make("qwen3_moe", tmp_path, **MIXTURE), "nf4", device="cpu")
    assert "weights are not in 4 bits but in float32, such as model.layers.0.mlp.experts." in capsys.readouterr().err


def test_a_model_that_also_sees_trains_the_part_that_reads(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = made_up_tokenizer()
    torch.manual_seed(0)
    text = SIZES | dict(query_pre_attn_scalar=16, sliding_window=8, eos_token_id=3, pad_token_id=0)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, patch_size=4)
    vision["image_size"] = 16
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = Policy.load(tmp_path, "none", LoraSettings(4, 8), device="cpu")
    assert 3 in policy.eos_ids
    for _, log_prob, _, mask in policy.score(PROMPTS, RESPONSES, with_grad=True):
        (-log_prob * mask).sum().backward()
    assert all(parameter.grad is not None for parameter in policy.trainable_parameters())
    assert len(policy.generate(PROMPTS, 1, Sampling(max_new_tokens=3), [[i] for i in range(4)])) == 4
    policy.save_adapter(tmp_path / "adapter")
    again = Policy.load(tmp_path, "none", adapter=tmp_path / "adapter", device="cpu")
    assert again.adapter_state().keys() == policy.adapter_state().keys()
