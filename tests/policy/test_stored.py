"""Checkpoints that are stored quantized: bitsandbytes' NF4 is taken as it is, all else is refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from azr.models import model_path
from azr.policy.policy import LoraSettings, ModelError, Policy, Sampling

TINY = model_path("tiny")
TEXTS = [("def f(x):\n    return x + 1\n", "f(3) == 4"), ("answer", " is 12"), ("answer", "s")]


def store(source: str, directory: Path, **settings) -> str:
    """The model as transformers saves it in 4 bits, with a dtype of computation that is not ours."""
    config = BitsAndBytesConfig(
        **{
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.float16,
            "bnb_4bit_use_double_quant": True,
        }
        | settings
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=config
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> str:
    return store(TINY, tmp_path_factory.mktemp("stored"))


def scores(policy: Policy) -> list[list[float]]:
    return policy.score_lists(*([policy.encode(text) for text in column] for column in zip(*TEXTS)))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_in_4_bits_equals_what_is_quantized_on_load(stored, dtype):
    loaded = Policy.load(stored, "nf4", LoraSettings(4, 8), dtype=dtype, device="cpu")
    quantized = Policy.load(TINY, "nf4", LoraSettings(4, 8), dtype=dtype, device="cpu")
    same = ("quantization", "block_size", "double_quant", "dtype", "tokenizer_hash")
    assert {key: loaded.info[key] for key in same} == {key: quantized.info[key] for key in same}
    assert loaded.info["quantization"] == "nf4" and loaded.info["revision"] != quantized.info["revision"]
    assert {p.dtype for p in loaded.base.parameters()} == {p.dtype for p in quantized.base.parameters()}
    for row, same in zip(scores(loaded), scores(quantized), strict=True):
        assert row == pytest.approx(same, abs=1e-5)
    packed = dict(quantized.base.named_parameters())
    assert all(torch.equal(p, packed[key]) for key, p in loaded.base.named_parameters() if p.dtype == torch.uint8)
    prompt, sampling = loaded.encode(TEXTS[0][0]), Sampling(temperature=0, max_new_tokens=8)
    one, other = (policy.generate([prompt], 1, sampling, [[1]])[0][0] for policy in (loaded, quantized))
    assert one.ids == other.ids and one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
    for policy in (loaded, quantized):
        for _, log_prob, _, mask in policy.score([prompt], [[5, 6]], with_grad=True):
            (log_prob * mask).sum().backward()
    for a, b in zip(loaded.trainable_parameters(), quantized.trainable_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_modules_that_a_checkpoint_leaves_unquantized_stay_so(tmp_path):
    kept = ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    policy = Policy.load(store(TINY, tmp_path, llm_int8_skip_modules=kept), "nf4", LoraSettings(4, 8), device="cpu")
    assert sum(p.dtype == torch.uint8 for p in policy.base.parameters()) == 26
    prompt, sampling = policy.encode(TEXTS[0][0]), Sampling(temperature=1.0, max_new_tokens=8)
    completion = policy.generate([prompt], 1, sampling, [[1]])[0][0]  # the engine's mix of layers against the trainer's
    assert policy.score_lists([prompt], [completion.ids])[0][0] == pytest.approx(completion.log_probs, abs=1e-4)


def test_single_quantization_and_other_blocks_are_read_from_the_weights(tmp_path):
    policy = Policy.load(store(TINY, tmp_path, bnb_4bit_use_double_quant=False), "nf4", device="cpu")
    assert policy.info["double_quant"] is False and all(len(row) for row in scores(policy))


def refusal(directory, quantization="nf4") -> str:
    with pytest.raises(ModelError) as caught:
        Policy.load(directory, quantization, device="cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


def test_4_bits_cannot_be_undone(stored):
    assert "stored in 4 bits, which cannot be undone: take --quantization nf4" in refusal(stored, "none")


@pytest.mark.parametrize(
    "settings, method",
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes, fp4"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_other_methods_are_refused_by_name(tmp_path, settings, method, quantization):
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((Path(TINY) / file).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    line = refusal(tmp_path, quantization)
    assert f"is stored quantized ({method})" in line and "give the unquantized model" in line


def test_a_file_without_its_scales_is_refused(stored, tmp_path):
    for file in Path(stored).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    lost = {key: value for key, value in load_file(weights).items() if "layers.1.mlp.up_proj.weight." not in key}
    save_file(lost, weights, metadata={"format": "pt"})
    assert "up_proj" in refusal(tmp_path)
