"""The policy: loading, scoring against the naive form, NF4, adapters. Sampling is in test_engine.py.

A random Qwen2 stands in for a base model: with a made-up byte-level tokenizer, and with the real Qwen2.5 tokenizer
where its files are at hand.
"""

import gc
import json
import random
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from azr.policy.policy import LoraSettings, ModelError, Policy, Sampling
from azr.policy.scoring import ChunkedLogProb, micro_batches, share_prompts
from small_models import REAL_TOKENIZER, made_up_tokenizer, make_model, prompts_of, seeds_of, stirred

LORA = LoraSettings(rank=8, alpha=16)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("small"), made_up_tokenizer(), vocab=320)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> str:
    """The real tokenizer (vocabulary 151,936) where it is at hand, else the made-up one with an untied head."""
    directory = tmp_path_factory.mktemp("real")
    if REAL_TOKENIZER.is_dir():
        return make_model(directory, AutoTokenizer.from_pretrained(REAL_TOKENIZER), vocab=151_936)
    return make_model(directory, made_up_tokenizer(), vocab=320, tie=False)


@pytest.fixture(scope="module")
def policy(small) -> Policy:
    return stirred(Policy.load(small, quantization="none", lora=LORA))


def naive(model, prompt, response, temperature=1.0):
    """(log-probs, entropies) of one sequence by a full-logits forward pass."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()[len(prompt) - 1 : -1] / temperature
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(-1, torch.tensor(response)[:, None]).squeeze(-1)
    return chosen, -(log_p.exp() * log_p).sum(-1)


# ---------------------------------------------------------------------------------------------------------- score


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_log_prob_equals_the_naive_form(temperature):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 32, generator=generator, dtype=torch.float32)
    weight = torch.randn(500, 32, generator=generator) * 0.4
    target = torch.randint(0, 500, (300,), generator=generator)
    g_y, g_h = torch.randn(2, 300, generator=generator)
    for use_y, use_h in ((1, 0), (0, 1), (1, 1)):
        a, b = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        log_prob, entropy = ChunkedLogProb.apply(a, weight, target, temperature, 128)
        log_p = (b @ weight.double().t() / temperature).log_softmax(-1)
        y, h = log_p.gather(-1, target[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
        assert torch.allclose(log_prob.double(), y, atol=1e-5) and torch.allclose(entropy.double(), h, atol=1e-5)
        loss = sum(((v * g).sum() for v, g, use in ((log_prob, g_y, use_y), (entropy, g_h, use_h)) if use))
        loss.backward()
        sum(((v * g.double()).sum() for v, g, use in ((y, g_y, use_y), (h, g_h, use_h)) if use)).backward()
        assert (a.grad.double() - b.grad).norm() / b.grad.norm() < 1e-5


def test_scores_do_not_depend_on_micro_batches_and_equal_the_naive_form(policy):
    prompts, responses = prompts_of(12), prompts_of(12, low=0, high=25, seed=1)
    responses[4] = []
    whole = policy.score_lists(prompts, responses, temperature=0.9, token_budget=100_000)
    for budget in (1, 150):
        parts = policy.score_lists(prompts, responses, temperature=0.9, token_budget=budget)
        for a, b in zip(whole, parts):
            for x, y in zip(a, b):
                assert x == pytest.approx(y, abs=1e-5)
    with torch.no_grad():
        for i, (prompt, response) in enumerate(zip(prompts, responses)):
            assert len(whole[0][i]) == len(response)
            if response:
                log_prob, entropy = naive(policy.model, prompt, response, 0.9)
                assert whole[0][i] == pytest.approx(log_prob.tolist(), abs=1e-5)
                assert whole[1][i] == pytest.approx(entropy.tolist(), abs=1e-5)


def gradient(policy, prompts, responses, advantage, budget):
    weight = torch.tensor([1 / max(1, len(r)) for r in responses])
    for p in policy.trainable_parameters():
        p.grad = None
    for indices, log_prob, entropy, mask in policy.score(prompts, responses, token_budget=budget, with_grad=True):
        loss = -(log_prob - log_prob.detach()).exp() * advantage[indices, None] - 0.1 * entropy
        (loss.masked_fill(~mask, 0.0) * weight[indices, None]).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])


def test_micro_batches_and_checkpointing_do_not_change_the_gradient(policy):
    prompts, responses = prompts_of(16), prompts_of(16, low=1, high=25, seed=1)
    advantage = torch.randn(16, generator=torch.Generator().manual_seed(0))
    whole = gradient(policy, prompts, responses, advantage, budget=100_000)
    assert whole.norm() > 0
    for budget in (1, 200):
        assert (gradient(policy, prompts, responses, advantage, budget) - whole).norm() / whole.norm() < 1e-5
    policy.checkpoint_activations(True)
    checkpointed = gradient(policy, prompts, responses, advantage, budget=200)
    policy.checkpoint_activations(False)
    assert (checkpointed - whole).norm() / whole.norm() < 1e-5
    # and it is the gradient of the naive form
    for p in policy.trainable_parameters():
        p.grad = None
    weight = torch.tensor([1 / max(1, len(r)) for r in responses])
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        log_prob, entropy = naive(policy.model, prompt, response)
        (weight[i] * (-advantage[i] * log_prob - 0.1 * entropy).sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])
    assert (whole - expected).norm() / expected.norm() < 1e-5


def test_scoring_leaves_the_callers_grad_mode_alone(policy):
    for _ in policy.score(prompts_of(4), prompts_of(4, seed=1), token_budget=1):
        assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        policy.score([[1], []], [[1], [1]])


def test_micro_batches_keep_the_budget():
    lengths = [random.Random(0).randint(1, 100) for _ in range(200)]
    batches = micro_batches(lengths, 400)
    assert sorted(i for b in batches for i in b) == list(range(200))
    assert all(len(b) * max(lengths[i] for i in b) <= 400 for b in batches)
    assert micro_batches([500, 3], 400) == [[0], [1]] and micro_batches([], 10) == []


# ------------------------------------------------------------------------------------------------------------ NF4


def packed(policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters() if p.dtype == torch.uint8}


def test_nf4_loads_with_double_quantization_and_leaves_head_and_embeddings_alone(small):
    policy = Policy.load(small, "nf4", lora=LORA)
    assert {k: policy.info[k] for k in ("quantization", "block_size", "double_quant", "dtype")} == {
        "quantization": "nf4",
        "block_size": 64,
        "double_quant": True,
        "dtype": "float32",
    }
    assert len(packed(policy)) == 14  # 2 layers x 7 linears
    assert policy.head.weight.dtype == torch.float32 and policy.head.weight is policy.backbone.embed_tokens.weight
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}


def test_nf4_hand_made_rewards_move_the_policy_the_right_way(real):
    """Eight samples with rewards +1 and -1 through sampling, scoring and an update."""
    policy = Policy.load(real, "nf4", lora=LORA, seed=3)
    prompts = [p for p in prompts_of(4, low=4, high=12) for _ in range(2)]
    texts = ["<answer>1</answer>", "<answer>2</answer>"] * 4
    responses = [policy.encode(text) for text in texts]
    rewards = torch.tensor([1.0, -1.0] * 4)
    policy.generate(prompts[:2], 1, Sampling(max_new_tokens=4), seeds_of(2, 1))  # evaluation first: it must not repack
    frozen, before = packed(policy), policy.adapter_state()
    start, _ = policy.score_lists(prompts, responses)
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-2, weight_decay=0.0)
    weight = torch.tensor([1 / (8 * len(r)) for r in responses])
    for update in range(2):
        for indices, log_prob, _, mask in policy.score(prompts, responses, with_grad=True):
            for row, i in enumerate(indices):  # training and evaluation agree bit for bit at the first step
                if update == 0:
                    assert log_prob[row, : len(responses[i])].tolist() == start[i]
            loss = -(log_prob - log_prob.detach()).exp() * rewards[indices, None]
            (loss.masked_fill(~mask, 0.0) * weight[indices, None]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    end, _ = policy.score_lists(prompts, responses)
    # the first token that differs between the good and the bad response of a pair
    at = next(t for t, (a, b) in enumerate(zip(*responses[:2])) if a != b)
    for i in range(0, 8, 2):
        assert end[i][at] - start[i][at] > 0 > end[i + 1][at] - start[i + 1][at]
    assert all(torch.equal(p, frozen[name]) for name, p in packed(policy).items())
    after = policy.adapter_state()
    assert all(not torch.equal(before[name], after[name]) for name in before if "lora_B" in name)


# ------------------------------------------------------------------------------------------------ adapters, loading


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_saved_adapter_loads_with_peft(small, tmp_path, quantization):
    policy = stirred(Policy.load(small, quantization, lora=LORA))
    policy.save_adapter(tmp_path / "a")
    policy.save_adapter(tmp_path / "b")
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    options = {"quantization_config": config} if quantization == "nf4" else {}
    base = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32, device_map={"": "cpu"}, **options)
    peft_model = PeftModel.from_pretrained(base, tmp_path / "a").train()
    again = Policy.load(small, quantization, adapter=tmp_path / "a")
    assert again.info["lora"] == {"rank": 8, "alpha": 16, "targets": "all-linear"}
    prompts, responses = prompts_of(5), prompts_of(5, low=3, seed=2)
    wanted, _ = policy.score_lists(prompts, responses)
    with policy.disable_adapter():
        plain, _ = policy.score_lists(prompts, responses)
    assert again.score_lists(prompts, responses)[0] == wanted
    for i in range(5):
        with torch.no_grad():
            assert naive(peft_model, prompts[i], responses[i])[0].tolist() == pytest.approx(wanted[i], abs=1e-4)
        assert plain[i] != pytest.approx(wanted[i], abs=1e-2)


def test_adapter_state_round_trip_keeps_the_parameters(small):
    policy = stirred(Policy.load(small, "none", lora=LORA))
    parameters, state = policy.trainable_parameters(), policy.adapter_state()
    stirred(policy)
    assert any(not torch.equal(a, b) for a, b in zip(state.values(), policy.adapter_state().values()))
    policy.load_adapter_state(state)
    assert all(torch.equal(state[name], value) for name, value in policy.adapter_state().items())
    assert all(a is b for a, b in zip(parameters, policy.trainable_parameters()))
    with pytest.raises(ModelError, match="lacks"):
        policy.load_adapter_state({})


def test_the_seed_decides_the_initial_adapter(small):
    kinds = (("none", 5), ("nf4", 5), ("none", 6))
    one, same, other = (Policy.load(small, q, lora=LORA, seed=s).adapter_state() for q, s in kinds)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) == ("lora_B" in name) for name in one)
    assert all(not value.any() for name, value in one.items() if "lora_B" in name)
    random_state = torch.get_rng_state()
    attention = Policy.load(small, "none", lora=LoraSettings(4, 8, "attention")).adapter_state()
    assert torch.equal(random_state, torch.get_rng_state())
    assert len(attention) == 2 * 4 * 2 and all("self_attn" in name for name in attention)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_dropped_policy_frees_its_memory_at_once(small, quantization):
    """Without the garbage collector: it runs when Python has made many objects, not when a GPU is full."""

    def used() -> list[weakref.ref]:
        policy = Policy.load(small, quantization, lora=LORA)
        policy.generate([[1, 2]], 1, Sampling(max_new_tokens=2), [[1]])
        for _, log_prob, _, _ in policy.score([[1, 2]], [[3, 4]], with_grad=True):
            log_prob.sum().backward()
        layer = policy.backbone.layers[0].mlp.up_proj
        return [weakref.ref(each) for each in (policy, policy.engine, policy.model, layer, layer.base_layer.weight)]

    used()  # imports at the first use leave tracebacks, and those frames
    gc.collect()
    gc.disable()
    try:
        assert [each() for each in used()] == [None] * 5
    finally:
        gc.enable()


def test_encode_adds_nothing_and_decode_keeps_everything_but_eos(policy):
    text = "def f(x):\n    return x + 12  # </think> é"
    ids = policy.encode(text)
    assert policy.decode(ids) == text
    assert policy.decode(ids + [policy.tokenizer.eos_token_id]) == text


def test_loading_says_what_is_wrong(small, tmp_path):
    stirred(Policy.load(small, "none", lora=LORA)).save_adapter(tmp_path / "adapter")

    def message(*args, **kwargs) -> str:
        with pytest.raises(ModelError) as caught:
            Policy.load(*args, **kwargs)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "without config.json" in message(tmp_path / "empty")
    assert "it holds an adapter" in message(tmp_path / "adapter")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "is a run, not a model" in message(tmp_path / "run", need_gpu=True)  # before a GPU is asked for
    assert "int3" in message(small, quantization="int3")
    assert "not both" in message(small, lora=LORA, adapter=tmp_path / "adapter")
    assert "is no adapter" in message(small, "none", adapter=tmp_path / "empty")
    assert "targets" in message(small, "none", lora=LoraSettings(targets="mlp"))
    assert "rank" in message(small, "none", lora=LoraSettings(rank=0))

    broken = tmp_path / "broken"
    shutil.copytree(small, broken)
    (broken / "model.safetensors").write_bytes(b"\x08" * 100)
    assert "cannot be loaded" in message(broken, "none")
    (broken / "config.json").write_text("{")
    assert "no model" in message(broken, "none")
    shutil.copy(Path(small) / "config.json", broken)
    (broken / "tokenizer.json").unlink()
    assert "no usable tokenizer" in message(broken, "none")
    assert "a directory that is there" in message(tmp_path / "absent")

    other = make_model(tmp_path / "other", made_up_tokenizer(), vocab=320)
    weights = Path(other) / "model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "up_proj" not in k}, weights, metadata={"format": "pt"})
    assert "lack model.layers.0.mlp.up_proj.weight (2 in all)" in message(other, "none")
    config = json.loads((Path(other) / "config.json").read_text())
    wide = Qwen2Config(**{**config, "hidden_size": 32})
    Qwen2ForCausalLM(wide).save_pretrained(other)
    assert "an adapter of another model" in message(other, "none", adapter=tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "r": 16}))
    assert "rank" in message(small, "none", adapter=tmp_path / "adapter")


def test_a_tokenizer_that_reads_its_files_differently_is_refused(small, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    ids = Policy.load(copy, "none").encode("f(12) == 3")
    check = copy / "tokenizer_check.json"
    check.write_text(json.dumps({"text": "f(12) == 3", "ids": ids}))
    Policy.load(copy, "none")
    check.write_text(json.dumps({"text": "f(12) == 3", "ids": ids[:-1] + [0]}))
    with pytest.raises(ModelError, match="other ids than those of tokenizer_check.json"):
        Policy.load(copy, "none")


def test_samples_of_one_prompt_share_a_row_and_change_nothing(policy, monkeypatch):
    prompts = [p for p in prompts_of(4) for _ in range(5)]
    responses = prompts_of(20, low=1, high=25, seed=1)
    responses[7] = []
    advantage = torch.randn(20, generator=torch.Generator().manual_seed(0))
    results = [(gradient(policy, prompts, responses, advantage, 200), policy.score_lists(prompts, responses, 0.9, 200))]
    monkeypatch.setattr(policy, "packs", False)  # as on a GPU
    for policy.shared_row, budget in ((0, 100_000), (512, 100_000), (512, 120), (60, 200)):
        rows = share_prompts(prompts, responses, min(policy.shared_row, budget))
        assert sorted(i for row in rows for i in row) == list(range(20))
        assert (len(rows) == 20) == (policy.shared_row == 0) and all(
            len({*map(tuple, (prompts[i] for i in row))}) == 1 for row in rows
        )
        gradients = gradient(policy, prompts, responses, advantage, budget)
        results.append((gradients, policy.score_lists(prompts, responses, 0.9, budget)))
    policy.shared_row = 512
    for gradients, lists in results[1:]:
        assert (gradients - results[0][0]).norm() / results[0][0].norm() < 1e-5
        for mine, alone in zip(lists, results[0][1]):
            assert all(a == pytest.approx(b, abs=1e-5) for a, b in zip(mine, alone))
