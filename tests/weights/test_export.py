"""Export: what is merged, what is written, what the verification sees, what is refused; on 4-bit models with LoRA."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from azr.evals.held_out import load_tasks
from azr.models import model_path
from azr.policy.load import LoraSettings
from azr.policy.opening import Opening
from azr.policy.policy import Policy
from azr.runs import Run
from azr.tasks.prompts import solve_prompt, template_hash
from azr.weights import export, export_check, files, model_card
from azr.weights.reference import AdapterUpdate
from azr.weights.sizes import compare
from in_process import run_here

ROOT = Path(__file__).parents[2]
TINY = Path(model_path("tiny"))
TASKS = load_tasks(TINY / "held_out.jsonl")


def command(*arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `train_azr.py export ...`."""
    import train_azr

    done = run_here(train_azr.main, "export", *arguments)
    return done.returncode, done.stdout, done.stderr


def train(policy: Policy, steps: int, rate: float) -> None:
    """Real updates: the log-probs of some texts go up."""
    texts = [policy.encode(solve_prompt(task, "tiny")) for task in TASKS[:6]]
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=rate)
    for _ in range(steps):
        for scored in policy.score([ids[:4] for ids in texts], [ids[4:40] for ids in texts], with_grad=True):
            (-scored.log_prob.sum() / scored.mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    policy.model.eval()


def make_run(out: Path, policy: Policy, rate: float = 1e-3) -> Path:
    """A run directory as training leaves one, with checkpoints at steps 0, 4 and 8."""
    config = {"model": "tiny", "algorithm": "selfplay", "steps": 8, "seed": 5, "learning_rate": rate}
    info = {**policy.info, "template": "tiny", "template_hash": template_hash("tiny")}
    with Run.open(out, config) as run:
        for step in (0, 4, 8):
            if step:
                train(policy, 4, rate)
                accuracy = {4: 0.5, 8: 0.25}[step]
                run.log(
                    {
                        "step": step,
                        "train/tokens": 1000,
                        "time/elapsed": 90.0 * step,
                        "held_out/deduction/accuracy": accuracy,
                        "held_out/induction/accuracy": None,
                    }
                )
            run.save_checkpoint(step, policy.save_adapter, {}, {}, info, keep=True)
    (out / "checkpoints" / "best.json").write_text(json.dumps({"step": 4, "metric": "accuracy", "value": 0.5}))
    rows = [
        {
            "role": role,
            "mode": task.mode,
            "prompt": solve_prompt(task, "tiny"),
            "response": f"</think> <answer>{task.input or 'x'}</answer>",
        }
        for role in ("proposer", "solver")
        for task in [TASKS[0], TASKS[1], TASKS[700], TASKS[701]]
    ]
    (out / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """NF4 + LoRA on the embedded model."""
    policy = Policy.load(str(TINY), "nf4", LoraSettings(8, 16.0), seed=1)
    return make_run(tmp_path_factory.mktemp("run") / "tiny", policy)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Qwen2 of random bf16 weights with whole blocks, biases, and a head of its own; the embedded tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=480,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        max_position_embeddings=1024,
        eos_token_id=256,
        pad_token_id=256,
        bos_token_id=None,
        initializer_range=0.08,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    directory = tmp_path_factory.mktemp("base") / "small"
    model.bfloat16().save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer_check.json"):
        shutil.copyfile(TINY / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def small_policy(small):
    policy = Policy.load(str(small), "nf4", LoraSettings(8, 16.0, "attention"), seed=1)
    train(policy, 6, 1e-3)
    return policy


@pytest.fixture(scope="module")
def small_checkpoint(small_policy, tmp_path_factory):
    """A checkpoint copied out of its run; only the attention has adapters."""
    directory = tmp_path_factory.mktemp("copied") / "step_6"
    small_policy.save_adapter(directory)
    (directory / "azr.json").write_text(json.dumps({**small_policy.info, "template": "tiny"}))
    return directory


def load(directory, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    return model.eval()


def tensors(directory) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: t for file in sorted(Path(directory).glob("*.safetensors")) for name, t in load_file(file).items()}


# ---------------------------------------------------------------- the merge


def test_a_run_is_exported_verified_and_within_the_bound(tiny_run, tmp_path):
    code, out, err = command(tiny_run, "--out", tmp_path / "m")
    assert code == 0, err
    assert "verified" in out and "rounding to bf16" in out
    assert [path.name for path in tmp_path.iterdir()] == ["m"]  # nothing aside
    report = json.loads((tmp_path / "m" / "export.json").read_text())
    assert report["verified"] and report["step"] == 8 and report["wrong_tensors"] == []
    assert report["fp32_merge"]["max"] <= 1e-3
    model, control = report["bf16_model"], report["random_rounding"]
    assert model["mean"] <= 2 * control["mean"] and model["kl"] <= 4 * control["kl"]
    # it is the trained model, not the base: what is left of the difference is small against the update
    assert model["mean"] < 0.2 * report["without_adapter"]["mean"]
    assert model["kl"] < 0.05 * report["without_adapter"]["kl"]
    assert 0 < report["rounding"]["unmoved_share"] < 0.5 and 0.9 < report["rounding"]["survival"] < 1.1


def test_what_is_written_is_a_plain_bf16_model(tiny_run, tmp_path):
    assert command(tiny_run, "--out", tmp_path / "m", "--no-verify")[0] == 0
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert (tmp_path / "m" / "generation_config.json").is_file()
    weights = tensors(tmp_path / "m")
    assert "lm_head.weight" not in weights  # tied
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    base = tensors(TINY)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert torch.equal(weights[name], base[name])
    policy = Policy.load(str(tmp_path / "m"), "none", dtype=torch.bfloat16)  # the tokenizer too
    assert policy.info["tokenizer_hash"] == json.loads((tmp_path / "m" / "azr.json").read_text())["tokenizer_hash"]


def test_merged_weights_are_those_of_bitsandbytes_and_peft(small_policy, small_checkpoint, tmp_path):
    from bitsandbytes.functional import dequantize_4bit

    assert command(small_checkpoint, "--out", tmp_path / "m", "--no-verify")[0] == 0
    weights = tensors(tmp_path / "m")
    for name, module in small_policy.base.named_modules():
        linear = getattr(module, "base_layer", module)
        if hasattr(getattr(linear, "weight", None), "quant_state") and not name.endswith("base_layer"):
            held = dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
            delta = module.get_delta_weight("default") if linear is not module else 0  # the MLP has no adapter
            assert torch.equal(weights[f"{name}.weight"], (held + delta).bfloat16()), name
    assert "lm_head.weight" in weights
    with torch.no_grad():
        ids = torch.tensor([small_policy.encode(solve_prompt(TASKS[0], "tiny"))])
        gap = load(tmp_path / "m")(input_ids=ids).logits - small_policy.base(input_ids=ids).logits
    assert gap.abs().max() < 0.1


def test_an_unquantized_base_merges_as_peft_does(small, tmp_path):
    policy = Policy.load(str(small), "none", LoraSettings(4, 8.0), seed=2)
    train(policy, 3, 1e-3)
    policy.save_adapter(tmp_path / "a")
    (tmp_path / "a" / "azr.json").write_text(json.dumps({**policy.info, "template": "tiny"}))
    code, _, err = command(tmp_path / "a", "--out", tmp_path / "m")
    assert code == 0, err
    assert "seed tasks" in err  # no run, no probe: said
    merged = policy.model.merge_and_unload().state_dict()
    for name, tensor in tensors(tmp_path / "m").items():
        assert torch.equal(tensor, merged[name].bfloat16()), name


def test_shards_hold_the_same_tensors_as_one_file(small_checkpoint, tmp_path, monkeypatch):
    assert command(small_checkpoint, "--out", tmp_path / "one", "--no-verify")[0] == 0
    monkeypatch.setattr(export.write_weights, "__defaults__", (1e5,))
    code, _, err = command(small_checkpoint, "--out", tmp_path / "many")
    assert code == 0, err  # verified: transformers reads the index
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in many.values())


def test_the_naive_4_bit_merge_loses_the_update(small_policy, small_checkpoint, small, tmp_path):
    merge = export.open_merge(export.find_source(small_checkpoint, None), None)
    update = AdapterUpdate(merge.base, merge.adapter, merge.reference)
    survival, stored = [], []
    for name in update.adapted:
        change = update.load(name)
        survival.append(compare(change.w0, change.delta, change.original, 1.0, change.stored).report()["S3_survival"])
        stored.append(merge.rounded(name)[1].report()["survival"])
    assert max(survival) < 0.6 and sum(survival) / len(survival) < 0.35  # of the update, along its own direction
    assert min(stored) > 0.98  # what the bf16 export keeps
    # and in the logits, with peft's own merge into 4 bits
    assert command(small_checkpoint, "--out", tmp_path / "m", "--no-verify")[0] == 0
    ids = torch.tensor([(4 * small_policy.encode(solve_prompt(task, "tiny")))[:48] for task in TASKS[:4]])
    naive = Policy.load(str(small), "nf4", adapter=small_checkpoint).model.merge_and_unload()
    with torch.no_grad():
        live = small_policy.base(input_ids=ids).logits
        lost = (naive(input_ids=ids).logits - live).abs().mean()
        kept = (load(tmp_path / "m")(input_ids=ids).logits - live).abs().mean()
        with small_policy.disable_adapter():
            whole = (small_policy.base(input_ids=ids).logits - live).abs().mean()
    assert lost > 0.3 * whole and kept < 0.1 * lost


# ---------------------------------------------------------------- the verification


def test_a_wrong_merge_is_not_verified(tiny_run, tmp_path, monkeypatch):
    right = export.Merge.delta
    double = lambda merge, name, held: None if (d := right(merge, name, held)) is None else 2 * d  # noqa: E731
    monkeypatch.setattr(export.Merge, "delta", double)
    code, _, err = command(tiny_run, "--out", tmp_path / "m")
    assert code == 1 and "NOT VERIFIED" in err and "fp32 merge" in err
    assert [path.name for path in tmp_path.iterdir()] == ["m.unverified"]
    assert json.loads((tmp_path / "m.unverified" / "export.json").read_text())["verified"] is False
    code, _, err = command(tiny_run, "--out", tmp_path / "m")
    assert code == 2 and "m.unverified" in err


def test_a_changed_file_is_seen(small_checkpoint, tmp_path):
    from safetensors.torch import save_file

    assert command(small_checkpoint, "--out", tmp_path / "m", "--no-verify")[0] == 0
    weights = tensors(tmp_path / "m")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] *= 1.01
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    merge = export.open_merge(export.find_source(small_checkpoint, None), None)
    report, failures = export_check.check(merge, tmp_path / "m", None, 2)
    assert report["wrong_tensors"] == ["model.layers.1.mlp.up_proj.weight"]
    assert len(failures) == 1 and "up_proj" in failures[0]


def test_other_base_weights_in_the_forward_pass_are_seen(tiny_run, monkeypatch):
    """Merged as if another kernel had read the 4-bit weights, here off by 5 %."""
    merge, honest = export.open_merge(export.find_source(tiny_run, "last"), None), export.Merge.held
    other = lambda merge, name: honest(merge, name) * (1.05 if merge.quantized(name) else 1)  # noqa: E731
    monkeypatch.setattr(export.Merge, "held", other)
    report, _, _ = export_check.measure_policy(merge, tiny_run, 1)
    assert report["fp32_merge"]["max"] > 1e-2


def test_an_update_smaller_than_the_steps_of_bf16_is_said(small_checkpoint, tmp_path):
    """A base that was held in bf16, as on a GPU, and an early checkpoint at a small learning rate."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(small_checkpoint, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: t * (0.01 if "lora_B" in name else 1) for name, t in load_file(file).items()}, file)
    info = json.loads((tmp_path / "a" / "azr.json").read_text())
    (tmp_path / "a" / "azr.json").write_text(json.dumps({**info, "dtype": "bfloat16"}))
    code, _, err = command(tmp_path / "a", "--out", tmp_path / "m")
    assert code == 0 and "use base and adapter" in err and "told apart" in err
    report = json.loads((tmp_path / "m" / "export.json").read_text())
    assert report["rounding"]["survival"] < 0.5 and report["rounding"]["unmoved_share"] > 0.5
    assert report["fp32_merge"]["max"] <= 1e-3


def test_stochastic_rounding_is_right_on_average():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2000, generator=generator)
    mean = sum(export_check.stochastic_round(x, generator).double() for _ in range(200)) / 200
    step = x.abs() * 2**-7
    assert ((mean - x).abs() <= 0.2 * step).all()
    assert torch.equal(export_check.stochastic_round(x.bfloat16().float(), generator), x.bfloat16())


# ---------------------------------------------------------------- which checkpoint, which base


def test_checkpoints_by_name(tiny_run):
    assert export.find_source(tiny_run, None).step == 8
    assert export.find_source(tiny_run, "step_4").step == 4
    assert export.find_source(tiny_run, "best").step == 4
    source = export.find_source(tiny_run / "checkpoints" / "step_4", None)
    assert source.step == 4 and source.run == tiny_run
    with pytest.raises(export.ExportError, match="step_0, step_4, step_8"):
        export.find_source(tiny_run, "step_5")


def test_the_untrained_adapter_gives_the_base_as_it_was_held(tiny_run, tmp_path):
    code, out, _ = command(tiny_run, "--checkpoint", "step_0", "--out", tmp_path / "m", "--no-verify")
    assert code == 0 and "0 everywhere" in out


def test_bad_input_writes_nothing(tiny_run, small, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_run, damaged)
    with (damaged / "checkpoints" / "step_8" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\0" * 8)
    moved = tmp_path / "moved"
    shutil.copytree(tiny_run / "checkpoints" / "step_8", moved, ignore=shutil.ignore_patterns("state"))
    info = json.loads((moved / "azr.json").read_text())
    (moved / "azr.json").write_text(json.dumps({**info, "base_model": "/nowhere/tiny"}))
    out, before = tmp_path / "out", sorted(tmp_path.rglob("*"))
    for arguments, word in [
        ((tmp_path / "nowhere", "--out", out), "does not exist"),
        ((full, "--out", out), "no checkpoint"),
        ((tiny_run, "--checkpoint", "step_3", "--out", out), "step_8"),
        ((tiny_run, "--out", full), "not empty"),
        ((damaged, "--out", out), "checksum"),
        ((moved, "--out", out), "--base"),
        ((tiny_run, "--base", small, "--out", out), "another base"),
        ((tiny_run,), "--out"),
    ]:
        code, _, err = command(*arguments)
        assert code == 2 and word in err and len(err.strip().splitlines()) == 1, (arguments, err)
    assert sorted(tmp_path.rglob("*")) == before
    assert command(moved, "--base", "tiny", "--out", out, "--no-verify")[0] == 0


def test_a_kill_leaves_no_model(tiny_run, tmp_path):
    """kill -9 while it runs: DIR is not there; the next export removes what was left aside."""
    arguments = [sys.executable, str(ROOT / "train_azr.py"), "export", str(tiny_run), "--out", str(tmp_path / "m")]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("m.tmp/model.safetensors")) and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["m.tmp"]
    code, _, err = command(tiny_run, "--out", tmp_path / "m", "--no-verify")
    assert code == 0 and "killed" in err
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_revision_of_a_cached_hub_model_is_the_one_in_azr_json(small, tmp_path, monkeypatch):
    """Two revisions in the cache, main points to the other one."""
    from huggingface_hub import constants

    def opened(revision):
        record = {"base_model": "some/base", "revision": revision}
        return Opening("some/base", tmp_path, record, "none", None, None)

    folder, old, new = tmp_path / "models--some--base", "a" * 40, "b" * 40
    for revision in (old, new):
        shutil.copytree(small, folder / "snapshots" / revision)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(new)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(files, "only_cached", lambda name: True)
    base = export.open_base(opened(old))
    assert base.directory.name == old
    with pytest.raises(files.WeightsError, match="local cache"):
        export.open_base(opened("c" * 40))


# ---------------------------------------------------------------- the card


def test_the_card_says_what_it_is_and_how_to_load_it(tiny_run, tmp_path):
    from huggingface_hub import ModelCard

    assert command(tiny_run, "--out", tmp_path / "m", "--no-verify")[0] == 0
    text = (tmp_path / "m" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "mit" and card.data.library_name == "transformers" and "self-play" in card.data.tags
    assert "azr, step 8" in text and "algorithm selfplay, seed 5, learning rate 0.001" in text
    assert "2505.03335" in text and "untrusted" in text and "</answer>" in text and "NOT compared" in text
    assert text.count("\n") < 60  # one screen
    code = text.split("```python\n", 1)[1].split("\n```\n\nThe model")[0]
    compile(code, "card", "exec")  # the example at least is Python


def test_the_licence_is_that_of_the_card_of_the_base(tmp_path):
    licence = lambda base: model_card.licence(base, tmp_path)  # noqa: E731
    assert licence("some/model") == {"license": "unknown"}
    (tmp_path / "README.md").write_text("---\nlicense: llama3.2\ntags:\n- x\n---\n# A model\n")
    assert licence("some/model") == {"license": "llama3.2"}
    assert "base_model: some/model" in model_card.header("some/model", {"license": "unknown"})
