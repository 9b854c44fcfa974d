"""Shapes against published totals, the memory plan against reference figures, presets against each other."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from azr.machine import cost, plan
from azr.machine.plan import GB, GIB, PRESETS, QWEN25, TINY, PlanError, choose_preset, plan_memory, shape_of
from azr.models import model_path
from azr.train.config import Config, resolve

ROOT = Path(__file__).resolve().parents[2]
FULL = {"train": "full", "quantization": "none"}


@pytest.mark.parametrize(
    "size, total",
    [
        ("0.5B", 494_032_768),
        ("1.5B", 1_543_714_304),
        ("3B", 3_085_938_688),
        ("7B", 7_615_616_512),
        ("14B", 14_770_033_664),
    ],
)
def test_parameter_totals_are_those_of_the_published_checkpoints(size, total):
    assert QWEN25[size].parameters == total
    assert shape_of(f"Qwen/Qwen2.5-Coder-{size}") == shape_of(f"Qwen/Qwen2.5-{size}-Instruct") == QWEN25[size]


def test_parameters_equal_those_of_a_real_model(tmp_path):
    """A Qwen2 and a Llama with grouped heads and untied tables, built by transformers; LoRA counted by PEFT."""
    import peft
    import torch
    import transformers

    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 100,
    }
    for kind, tied in (("Qwen2", True), ("Qwen2", False), ("Llama", False)):
        config = getattr(transformers, f"{kind}Config")(**sizes, tie_word_embeddings=tied)
        config.save_pretrained(tmp_path)
        shape = shape_of(str(tmp_path))
        with torch.device("meta"):
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
        assert shape.parameters == sum(p.numel() for p in model.parameters()), kind
        for targets, names in (("all-linear", "all-linear"), ("attention", ["q_proj", "k_proj", "v_proj", "o_proj"])):
            adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names))
            assert shape.lora_parameters(4, targets) == sum(
                p.numel() for p in adapted.parameters() if p.requires_grad
            ), (kind, targets)
            model = adapted.unload()


def test_bytes_against_reference_figures():
    """GB for NF4 with rank 32 on all matrices, and bytes a token, as worked out independently for 3B and 7B."""
    for size, weights, lora, kv in (("3B", 2.05, 0.96, 36_864), ("7B", 5.55, 1.29, 57_344)):
        shape = QWEN25[size]
        assert plan.weight_bytes(shape, "nf4") / GB == pytest.approx(weights, rel=0.01)
        assert 16 * shape.lora_parameters(32) / GB == pytest.approx(lora, rel=0.01)
        assert shape.kv_bytes == kv


@pytest.mark.parametrize("tokens, peak", [(8192, 5.28), (32768, 13.1)])
def test_training_totals_against_what_an_h200_measured(tokens, peak):
    """The peak of a micro-batch of a 3B, which had no moments of Adam yet (results/gpu/h200-2026-11-26-second.jsonl),
    and a residual stream in bf16: in fp32 each layer's input takes two bytes more."""
    preset = dataclasses.replace(PRESETS["24gb"], token_budget=tokens)
    shape = QWEN25["3B"]
    later = (8 * shape.lora_parameters(32) + 2 * shape.hidden * shape.layers * tokens) / GB
    assert sum(plan.memory(QWEN25["3B"], preset)["training"].values()) / GB == pytest.approx(peak + later, rel=0.05)


def test_fp32_takes_twice_the_bytes_on_a_gpu_and_fp16_those_of_bf16():
    shape, auto = QWEN25["3B"], PRESETS["24gb"]
    wide, half = (dataclasses.replace(auto, dtype=dtype) for dtype in ("fp32", "fp16"))
    assert plan.memory(shape, half) == plan.memory(shape, auto)
    assert plan.cache_bytes(shape, wide, 3, "cuda") == 2 * plan.cache_bytes(shape, auto, 3, "cuda")
    more = plan.memory(shape, wide)["training"]["weights"] - plan.memory(shape, auto)["training"]["weights"]
    assert more == pytest.approx(2 * shape.other_parameters)  # the matrices stay in 4 bits
    assert plan.memory(shape, wide, "cpu") == plan.memory(shape, auto, "cpu")
    assert "nf4 + fp32" in plan.render(plan.plan_memory(shape, wide, 24e9))
    # a CPU computes in what is asked for: half the bytes of a weight and of the cache, masters where all is trained
    assert plan.cache_bytes(shape, wide, 3, "cpu") == 2 * plan.cache_bytes(shape, half, 3, "cpu")
    wide, half = (dataclasses.replace(p, train="full", quantization="none") for p in (wide, half))
    wide, half = (plan.memory(shape, p, "cpu")["training"] for p in (wide, half))
    assert wide["weights"] == 2 * half["weights"] and wide.get("fp32 masters") is None
    assert half["fp32 masters"] == 4 * shape.parameters


def test_the_context_of_a_model_is_known_offline_and_looked_at():
    assert plan.context_of("tiny") == 1024 and plan.context_of("qwen-3b") == 32_768
    assert plan.context_of("Qwen/Qwen2.5-7B") is plan.context_of("nobody/model") is None
    with pytest.raises(PlanError, match="--max-new-tokens 40000 leaves 0 of the 32768 tokens of the model's context"):
        resolve(Config(model="qwen-3b", preset="24gb", max_new_tokens=40_000, dry_run=True))


def test_two_adapters_take_twice_the_memory_of_one():
    shape, one = QWEN25["3B"], PRESETS["24gb"]
    two, lora = dataclasses.replace(one, adapters=2), shape.lora_parameters(32)
    more = {"cuda": {"load": 4, "rollout": 12, "training": 16}, "cpu": {"load": 4, "rollout": 24, "training": 28}}
    for device, phases in more.items():
        single, double = (plan_memory(shape, preset, None, device).totals for preset in (one, two))
        assert {phase: double[phase] - single[phase] for phase in phases} == {k: v * lora for k, v in phases.items()}
    single, double = (cost.disk(plan_memory(shape, preset, 24e9), "tiny", 500, 25) for preset in (one, two))
    assert double == single | {name: 2 * single[name] for name in ("adapters", "states")}
    assert f"2 x LoRA rank 32, all-linear: {2 * lora:,} parameters" in plan.render(plan_memory(shape, two, 24e9))
    assert Config(proposer="separate").adapters == 2 and Config().adapters == 1


def test_what_is_unknown_is_said(tmp_path):
    for model in ("nobody/model", "Qwen/Qwen2.5-Coder-9B", "qwen-4b", str(tmp_path)):
        with pytest.raises(PlanError, match="not known offline"):
            shape_of(model)
    for text, message in (
        ('{"hidden_size": 1}', "does not give its sizes"),
        ("{", "config.json"),
        ("[]", "JSON object"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(PlanError, match=message) as caught:
            shape_of(str(tmp_path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "free_gib, name",
    [
        (7.6, "8gb"),
        (11.5, "12gb"),
        (15.6, "16gb"),
        (23.3, "24gb"),
        (31.4, "32gb"),
        (39.3, "40gb"),
        (47, "48gb"),
        (79, "80gb"),
        (139, "80gb"),
        (4, "8gb"),
    ],
)
def test_auto_takes_the_largest_that_is_free(free_gib, name):
    preset, why = choose_preset("auto", "qwen-3b", int(free_gib * GIB))
    assert preset.name == name and name in why and f"{free_gib:.1f} GiB" in why


def test_choices_without_a_gpu_are_loud():
    assert choose_preset("auto", "qwen-3b", None)[0].name == "8gb"
    assert "no GPU" in choose_preset("auto", "qwen-3b", None)[1]
    assert choose_preset("24gb", "qwen-3b", None)[0] is PRESETS["24gb"]
    assert choose_preset("auto", "tiny", None)[0] is choose_preset("24gb", "tiny", None)[0] is TINY
    assert plan.capacity(TINY) is None and plan.capacity(PRESETS["24gb"]) < 24 * GIB
    assert plan.capacity(PRESETS["24gb"], 5 * GIB) == 5 * GIB


def test_every_preset_holds_the_3b_model_and_larger_ones_do_more():
    previous = None
    for preset in PRESETS.values():
        made = plan_memory(QWEN25["3B"], preset, plan.capacity(preset))
        assert made.fits, preset.name
        if previous:
            for field in ("gib", "prompts_per_mode", "max_new_tokens", "max_batch", "token_budget"):
                assert getattr(preset, field) >= getattr(previous, field)
        previous = preset
    for name in ("16gb", "24gb", "48gb", "80gb"):
        assert plan_memory(QWEN25["7B"], PRESETS[name], plan.capacity(PRESETS[name])).fits, name


def test_sizes_are_halved_until_they_fit_and_only_those():
    preset = PRESETS["80gb"]
    made = plan_memory(QWEN25["7B"], preset, 12e9)
    assert made.fits and made.peak <= 12e9 and len(made.lowered) == 2
    for name in ("max_batch", "token_budget"):
        before, after = getattr(preset, name), getattr(made.preset, name)
        assert after < before and (before % after == 0 or after == preset.prompt_tokens + preset.max_new_tokens)
    assert dataclasses.replace(made.preset, max_batch=preset.max_batch, token_budget=preset.token_budget) == preset
    assert plan_memory(QWEN25["7B"], preset, None).lowered == []


def test_the_cache_takes_what_is_left_and_no_more_than_all_slots_need():
    shape, preset = QWEN25["3B"], PRESETS["24gb"]
    short, wide = (plan_memory(shape, preset, room) for room in (24e9, 80e9))
    assert plan.LEAST_SLOTS <= short.full_length < preset.max_batch <= wide.full_length <= preset.max_batch + 1
    assert short.totals["rollout"] == pytest.approx(24e9 - plan.SPARE)
    assert "the newest wait" in plan.render(short) and "the newest wait" not in plan.render(wide)


def test_a_plan_that_does_not_fit_names_a_flag_that_does():
    tight = plan_memory(QWEN25["7B"], PRESETS["80gb"], 10.5e9)
    flag, made = plan.advice(tight)
    words = flag.split()
    change = {name[2:].replace("-", "_"): int(value) for name, value in zip(words[::2], words[1::2])}
    again = plan_memory(tight.shape, dataclasses.replace(tight.preset, **change), 10.5e9)
    assert not tight.fits and again.fits and again == made and flag in plan.verdict(tight)
    bits = plan_memory(QWEN25["7B"], dataclasses.replace(PRESETS["16gb"], quantization="none"), 16e9)
    assert not bits.fits and plan.advice(bits)[0] == "--quantization nf4"


def test_every_weight_takes_masters_gradients_and_moments():
    """A 3B in bf16: 2 + 4 + 8 bytes a weight while sampling, 4 of gradients more in an update; fp32 has no masters."""
    shape, count = QWEN25["3B"], QWEN25["3B"].parameters
    full = dataclasses.replace(PRESETS["80gb"], **FULL)
    half, single = (plan.memory(shape, dataclasses.replace(full, dtype=dtype)) for dtype in ("bf16", "fp32"))
    names = ("weights", "fp32 masters", "Adam", "gradients")
    for parts, expected in ((half, (2, 4, 8, 4)), (single, (4, 0, 8, 4))):
        for name, size in zip(names[:3], expected):
            assert parts["rollout"].get(name, 0) == parts["training"].get(name, 0) == size * count
        assert 4 * count < parts["training"]["gradients"] < 4.8 * count and "gradients" not in parts["rollout"]
    assert plan_memory(shape, full, plan.capacity(full)).fits
    tight = plan_memory(shape, dataclasses.replace(PRESETS["48gb"], **FULL), plan.capacity(PRESETS["48gb"]))
    assert not tight.fits and plan.advice(tight)[0] == "--train lora --quantization nf4"
    huge = plan_memory(QWEN25["7B"], full, plan.capacity(full))
    assert not huge.fits and "every weight, in bf16 from fp32 masters" in plan.render(huge)
    assert all(len(line) <= 80 for line in plan.render(huge).splitlines())


def test_where_no_flag_helps_a_smaller_model_and_a_larger_card_are_named():
    small = plan_memory(QWEN25["14B"], PRESETS["8gb"], plan.capacity(PRESETS["8gb"]))
    text = plan.verdict(small)
    assert not small.fits and plan.advice(small) is None and "no flag" in text
    assert "--model qwen-3b" in text and "a card of 24 GB with --preset 24gb" in text
    assert plan_memory(QWEN25["3B"], PRESETS["8gb"], small.capacity).fits
    for name, fits in (("16gb", False), ("24gb", True)):
        assert plan_memory(QWEN25["14B"], PRESETS[name], plan.capacity(PRESETS[name])).fits == fits
    huge = dataclasses.replace(QWEN25["14B"], layers=400)
    assert "with --preset" not in plan.verdict(plan_memory(huge, PRESETS["80gb"], plan.capacity(PRESETS["80gb"])))


def test_rendering_is_plain_and_narrow():
    for model, preset in (("qwen-3b", PRESETS["24gb"]), ("qwen-7b", PRESETS["8gb"]), ("qwen-7b", PRESETS["24gb"])):
        made = plan_memory(shape_of(model), preset, plan.capacity(preset))
        text = plan.render(made, model)
        assert all(len(line) <= 80 for line in text.splitlines()) and text.isascii(), text
        assert "KV cache" in text and model_path(model) in text and f"{made.peak / GB:.2f}" in text
        assert plan.verdict(made).endswith("GB of GPU memory") == made.fits


def test_no_torch_is_imported_and_aliases_stay_next_to_the_file():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from azr.machine import plan; "
        "plan.render(plan.plan_memory(plan.shape_of('qwen-3b'), plan.PRESETS['24gb'], 2e10)); "
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    assert model_path("tiny") == str(ROOT / "azr" / "tiny") and model_path("some/where") == "some/where"
