"""`analyze.py sparsity` from the user's side: files in, screen, JSON and exit code out."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import analyze
from azr.weights.files import Adapter, Checkpoint
from azr.weights.reference import AdapterUpdate, Reference

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "azr" / "tiny"
KEYS = {
    "U1_rms",
    "U1_rel_fro",
    "U2",
    "S0",
    "S1",
    "S1_zero_base",
    "S2",
    "S3_code_frozen_scale",
    "S3_code_requantized",
    "S3_scale_unchanged",
    "S3_survival",
    "S4",
    "S5",
    "S6",
    "R1_effective_rank",
    "R1_stable_rank",
}
LINEARS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.v_proj": (32, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}


def run(*arguments):
    """Exit code of the subcommand, in this process."""
    return analyze.main(["sparsity", *map(str, arguments), "--workers", "2"])


def measure(tmp_path, *arguments):
    assert run(*arguments, "--json", tmp_path / "report.json") == 0
    return json.loads((tmp_path / "report.json").read_text())


def refused(capsys, *arguments):
    """The one line on stderr of a refusal."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("analyze.py sparsity: ") and "Traceback" not in captured.err
    return line


def weights(layers=2, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    found = {"model.embed_tokens.weight": (50, 64), "model.norm.weight": (64,)}
    found |= {f"model.layers.{i}.{name}.weight": size for i in range(layers) for name, size in LINEARS.items()}
    return {name: (0.02 * torch.randn(size, generator=generator)).to(dtype) for name, size in found.items()}


def write_model(directory, tensors, shards=1, **config):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", **config}))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    where = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return directory


def write_adapter(directory, rank=4, rms=1e-4, layers=2, seed=0, info=None, change=None, **config):
    """A LoRA on q_proj and up_proj; `change` edits the tensors before they are written."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name in ("self_attn.q_proj", "mlp.up_proj"):
            m, n = LINEARS[name]
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, n, generator=generator) / rank**0.5
            tensors[f"{prefix}.lora_B.weight"] = rms * torch.randn(m, rank, generator=generator)
    if change:
        change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    info = {"quantization": "none", "dtype": "float32"} if info is None else info
    if info:
        (directory / "azr.json").write_text(json.dumps(info))
    return directory


@pytest.fixture
def base(tmp_path):
    return write_model(tmp_path / "base", weights())


# ---------------------------------------------------------------- figures


def test_exactly_37_percent_changed_reads_630(tmp_path, base):
    tuned, generator = weights(), torch.Generator().manual_seed(5)
    for name, tensor in tuned.items():
        if "layers" in name:
            flat = tensor.view(-1).view(torch.int16)
            flat[torch.randperm(flat.numel(), generator=generator)[: round(0.37 * flat.numel())]] ^= 1
    report = measure(tmp_path, "--base", base, "--tuned", write_model(tmp_path / "tuned", tuned, shards=3))
    n, total = report["adapted"]["parameters"], report["parameters"]
    assert report["adapted"]["S1"] == report["adapted"]["S0"] == pytest.approx(0.63, abs=1e-4)
    assert report["whole"]["S1"] == pytest.approx(1 - 0.37 * n / total, abs=1e-4)
    assert report["adapted"]["S4"]["S_whole"] == pytest.approx(report["whole"]["S1"])
    assert report["modules"]["model.layers.1.mlp.up_proj"]["S1"] == pytest.approx(0.63, abs=1e-4)
    assert "model.norm.weight" not in report["modules"]  # it did not change
    assert set(report["types"]) == {"q_proj", "v_proj", "up_proj", "down_proj"} and set(report["layers"]) == {
        "0",
        "1",
    }


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_every_id_is_there_for_the_whole_the_adapted_and_each_module(tmp_path, base, quantization):
    info = {"quantization": quantization, "dtype": "bfloat16", "block_size": 64, "double_quant": True}
    adapter = write_adapter(tmp_path / "adapter", info=info)
    report = measure(tmp_path, "--base", base, "--adapter", adapter, "--spectral", "--out", tmp_path / "out")
    for group in (report["whole"], report["adapted"], *report["modules"].values()):
        assert KEYS <= group.keys() and {"S1", "S2", "S5"} <= group["at_rms_3e-5"].keys()
        assert {key[:2] for key in group} >= {"R2", "G1", "G2", "G3"}
        assert (group["S3_survival"] is None) == (quantization == "none")
    assert len(report["modules"]) == 4 and report["quantization"] == quantization
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"modules.png", "sparsity.json"}
    matched = report["adapted"]["U1_rms"] * report["matched_factor"]
    assert matched == pytest.approx(3e-5, rel=1e-4)
    f = report["adapted"]["parameters"] / report["parameters"]
    for key in ("S0", "S1", "S2"):
        assert report["whole"][key] == pytest.approx(1 - f * (1 - report["adapted"][key]))
    assert report["whole"]["U1_rms"] == pytest.approx(report["adapted"]["U1_rms"] * math.sqrt(f))


def test_scaling_to_one_size_makes_runs_of_different_size_comparable(tmp_path, base):
    small, large = (
        measure(tmp_path, "--base", base, "--adapter", write_adapter(tmp_path / f"{rms}", rms=rms))["adapted"]
        for rms in (1e-6, 1e-3)
    )
    assert small["S1"] > 0.97 and large["S1"] < 0.05
    assert small["at_rms_3e-5"]["S1"] == pytest.approx(large["at_rms_3e-5"]["S1"], abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": False},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"use_dora": True},
    ],
    ids=["lora", "rslora", "patterns", "dora"],
)
def test_the_update_is_what_peft_merges(tmp_path, settings):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(0)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **settings))
    for name, p in peft.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            p.data += 0.02 * torch.randn_like(p)
    peft.save_pretrained(tmp_path)
    merged = dict(peft.merge_and_unload().named_parameters())
    base = Checkpoint.open("tiny")
    update = AdapterUpdate(base, Adapter.open(tmp_path, base), Reference("none", torch.float32))
    assert len(update.adapted) == 28
    for name in update.adapted:
        expected, found = merged[name] - before[name], update.load(name)
        assert expected.abs().max() > 1e-3
        assert torch.allclose(found.delta, expected, atol=2e-6)
        assert update.energy(name) == pytest.approx(expected.double().square().sum().item(), rel=1e-4)


def test_a_run_is_measured_at_its_last_checkpoint(tmp_path, base):
    for step, rms in ((0, 0), (100, 2e-4), (20, 3e-4)):
        write_adapter(tmp_path / "run" / "checkpoints" / f"step_{step}", rms=rms)
    report = measure(tmp_path, "--base", base, "--adapter", tmp_path / "run", "--out", tmp_path / "out")
    assert report["update"].endswith("step_100") and report["adapted"]["U1_rms"] == pytest.approx(2e-4, rel=0.1)
    assert (tmp_path / "out" / "modules.png").is_file()


def test_an_untrained_adapter_changes_nothing(tmp_path, base, capsys):
    def zero(tensors):
        for name in tensors:
            if "lora_B" in name:
                tensors[name].zero_()

    info = {"quantization": "nf4", "dtype": "bfloat16"}
    report = measure(
        tmp_path, "--base", base, "--adapter", write_adapter(tmp_path / "a", change=zero, info=info), "--spectral"
    )
    assert report["adapted"]["S1"] == report["adapted"]["S0"] == 1.0 and report["adapted"]["S5"] is None
    assert "exactly 0" in capsys.readouterr().out


def test_the_screen_says_how_the_base_was_held(tmp_path, base, capsys):
    info = {"quantization": "nf4", "dtype": "bfloat16", "block_size": 64, "double_quant": True}
    adapter = write_adapter(tmp_path / "a", info=info)
    report = measure(tmp_path, "--base", base, "--adapter", adapter)
    assert "held as NF4, blocks of 64, double quantization, dequantised to" in capsys.readouterr().out
    assert report["adapted"]["zero_base_share"] == pytest.approx(0.09, abs=0.03)
    line = refused(capsys, "--base", base, "--adapter", adapter, "--quantization", "none")
    assert "--quantization none contradicts" in line and "leave the flag out" in line


def test_workers_do_not_change_the_figures(tmp_path, base):
    adapter, reports = write_adapter(tmp_path / "a"), []
    for workers in ("1", "3"):
        file = tmp_path / f"{workers}.json"
        arguments = ["sparsity", "--base", base, "--adapter", adapter, "--json", file, "--workers", workers]
        assert analyze.main(list(map(str, arguments))) == 0
        reports.append(file.read_bytes())
    assert reports[0] == reports[1]


def test_the_command_itself_on_the_embedded_model(tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "a")
    flags = ["--base", "tiny", "--adapter", str(tmp_path / "a")]
    assert "--quantization nf4 or --quantization none" in refused(capsys, *flags)  # no azr.json
    command = [sys.executable, str(ROOT / "analyze.py"), "sparsity", *flags]
    command += ["--quantization", "none", "--json", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["parameters"] == 848_000
    assert "bfloat16 is assumed" in done.stderr


# ---------------------------------------------------------------- bad input


def test_files_that_are_not_there_or_not_whole(tmp_path, base, capsys):
    adapter = write_adapter(tmp_path / "a")
    assert "no such directory" in refused(capsys, "--base", tmp_path / "none", "--adapter", adapter)
    assert "holds an adapter" in refused(capsys, "--base", adapter, "--adapter", adapter)
    assert "is no adapter" in refused(capsys, "--base", base, "--adapter", base)
    for flag, path in (("--json", base), ("--out", base / "config.json")):
        assert f"{flag} {path}: is a " in refused(capsys, "--base", base, "--tuned", base, flag, path)
    assert "no such directory" in refused(capsys, "--base", base, "--adapter", tmp_path / "nowhere")
    sharded = write_model(tmp_path / "sharded", weights(), shards=3)
    shard = sharded / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert "is truncated" in refused(capsys, "--base", sharded, "--adapter", adapter)
    shard.write_bytes(whole[:5])
    assert "only its start" in refused(capsys, "--base", sharded, "--adapter", adapter)
    shard.write_bytes(whole[:40])
    assert "only its start" in refused(capsys, "--base", sharded, "--adapter", adapter)
    shard.unlink()
    assert "lacks model-00002-of-00003" in refused(capsys, "--base", sharded, "--adapter", adapter)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "is truncated" in refused(capsys, "--base", base, "--adapter", adapter)


def test_an_index_that_names_tensors_no_shard_has(tmp_path, capsys):
    sharded = write_model(tmp_path / "sharded", weights(), shards=2)
    index = sharded / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    where["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(where))
    assert "no shard holds model.layers.9" in refused(capsys, "--base", sharded, "--tuned", sharded)


@pytest.mark.parametrize("where", ["base", "tuned", "embedding"])
def test_nan_is_named(tmp_path, where, capsys):
    tensors = {"base": weights(), "tuned": weights()}
    name = "model.embed_tokens.weight" if where == "embedding" else "model.layers.1.mlp.up_proj.weight"
    tensors["tuned" if where == "embedding" else where][name][3, 3] = math.nan
    base, tuned = (write_model(tmp_path / key, tensors[key]) for key in ("base", "tuned"))
    line = refused(capsys, "--base", base, "--tuned", tuned, "--json", tmp_path / "r.json")
    assert "NaN or infinity in " + name in line and ("base" if where == "base" else "tuned") in line
    assert not (tmp_path / "r.json").exists()
    adapter = write_adapter(tmp_path / "a", info={"quantization": "nf4", "dtype": "bfloat16"})
    assert "NaN or infinity" in refused(capsys, "--base", tuned if where != "base" else base, "--adapter", adapter)


def test_an_adapter_that_does_not_fit(tmp_path, base, capsys):
    def broken(name, **settings):
        return refused(capsys, "--base", base, "--adapter", write_adapter(tmp_path / name, **settings))

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    assert "does not exist: an adapter of another model" in broken("layers", layers=3)
    assert "an adapter of another model" in broken(
        "shape", change=lambda t: t.update({first + "A.weight": torch.ones(4, 96)})
    )
    assert "says rank 8" in broken("rank", r=8)
    assert "lacks base_model.model.model.layers.0.self_attn.q_proj.lora_B" in broken(
        "half", change=lambda t: t.pop(first + "B.weight")
    )
    assert "NaN or infinity" in broken("nan", change=lambda t: t[first + "A.weight"].fill_(math.nan))
    assert "no LoRA matrix" in broken("extra", change=lambda t: t.update({"lm_head.weight": torch.ones(2, 2)}))
    assert "modules_to_save is set" in broken("saved", modules_to_save=["lm_head"])
    assert "IA3 is not supported" in broken("ia3", peft_type="IA3")
    assert "trains biases" in broken("bias", bias="all")
    assert "quantization int8" in broken("int8", info={"quantization": "int8"})
    assert "--quantization" in broken("unsaid", info={})


def test_checkpoints_that_do_not_belong_together(tmp_path, base, capsys):
    def against(name, change, **config):
        tensors = weights()
        change(tensors)
        return write_model(tmp_path / name, tensors, **config)

    less = against("less", lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))
    assert "lacks model.layers.0.mlp.up_proj.weight" in refused(capsys, "--base", base, "--tuned", less)
    assert "not the same architecture" in refused(capsys, "--base", less, "--tuned", base)
    other = against("other", lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 32)}))
    assert "has shape (128, 64)" in refused(capsys, "--base", base, "--tuned", other)
    stored = against("stored", lambda t: None, quantization_config={"quant_method": "bitsandbytes"})
    assert "stored quantized (bitsandbytes)" in refused(capsys, "--base", base, "--tuned", stored)
    odd = against("odd", lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.uint8)}))
    assert "stored as U8" in refused(capsys, "--base", base, "--tuned", odd)


def test_tied_heads_other_vocabularies_and_dtypes_are_named(tmp_path, base, capsys):
    head = weights() | {"lm_head.weight": weights()["model.embed_tokens.weight"].clone()}
    tied = write_model(tmp_path / "tied", head, tie_word_embeddings=True)
    report = measure(tmp_path, "--base", tied, "--tuned", base)
    assert "tied" in report["excluded"]["lm_head.weight"]
    assert report["parameters"] == sum(tensor.numel() for tensor in weights().values())
    untied = write_model(tmp_path / "untied", load_file(tied / "model.safetensors"))
    assert "lm_head.weight" in measure(tmp_path, "--base", base, "--tuned", untied)["excluded"]
    longer = weights() | {"model.embed_tokens.weight": torch.zeros(60, 64).bfloat16()}
    capsys.readouterr()
    report = measure(tmp_path, "--base", base, "--tuned", write_model(tmp_path / "longer", longer))
    assert "another vocabulary" in report["excluded"]["model.embed_tokens.weight"]
    assert "not counted: model.embed_tokens.weight" in capsys.readouterr().out
    half = {name: tensor.float() + 1e-8 for name, tensor in weights().items()}
    report = measure(tmp_path, "--base", base, "--tuned", write_model(tmp_path / "fp32", half))
    assert "stored dtypes differ: bfloat16 and float32" in capsys.readouterr().err
    assert report["adapted"]["S0"] < 0.01 and report["adapted"]["S1"] > 0.999


def test_a_merge_on_a_4_bit_base_is_recognised(tmp_path, base, capsys):
    """Measured against the original it is all quantization error; with --quantization nf4 it is the update."""
    from azr.weights import nf4

    tuned = weights()
    for name, tensor in tuned.items():
        if "layers" in name:
            w0 = nf4.quantize(tensor).dequantize(torch.bfloat16).view_as(tensor).float()
            tuned[name] = (w0 + 1e-4 * torch.randn(w0.shape, generator=torch.Generator().manual_seed(1))).bfloat16()
    merged = write_model(tmp_path / "merged", tuned)
    wrong = measure(tmp_path, "--base", base, "--tuned", merged)
    assert "closer to the 4-bit base" in capsys.readouterr().err
    assert wrong["adapted"]["S1"] < 0.03 and wrong["adapted"]["U1_rel_fro"] == pytest.approx(0.09, abs=0.02)
    right = measure(tmp_path, "--base", base, "--tuned", merged, "--quantization", "nf4")
    assert "closer to" not in capsys.readouterr().err
    assert right["adapted"]["U1_rms"] == pytest.approx(1e-4, rel=0.1) and right["adapted"]["S1"] > 0.25


def test_another_base_of_the_same_shape_is_refused(tmp_path, base, capsys):
    info = {"quantization": "none", "dtype": "float32", "revision": "sha256:0000000000000000"}
    line = refused(capsys, "--base", base, "--adapter", write_adapter(tmp_path / "a", info=info))
    assert "was trained on another base than" in line and "give the base it was trained on" in line
    info["revision"] = "c" * 40  # a commit of the hub, which files in a directory do not tell
    assert run("--base", base, "--adapter", write_adapter(tmp_path / "b", info=info)) == 0
    assert "cannot be compared" in capsys.readouterr().err
