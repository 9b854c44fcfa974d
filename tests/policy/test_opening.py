"""Every script opens a base with its adapter in the same way, and refuses the same contradictions in the same words."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import analyze
import eval_passk
from azr.models import model_path
from azr.policy.opening import ModelError, agree, check_base, check_template, checkpoints_of
from azr.policy.policy import LoraSettings, Policy
from azr.weights import export


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of the embedded model, as a run leaves it."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints" / "step_3"
    policy = Policy.load(model_path("tiny"), "none", LoraSettings(2, 4.0, "attention"))
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.01)
    policy.save_adapter(directory)
    (directory / "azr.json").write_text(json.dumps({**policy.info, "template": "tiny"}))
    return directory


def changed(checkpoint, directory, record=None, config=None, tensors=None):
    """A copy whose azr.json, adapter_config.json or matrices are other ones."""
    directory.mkdir(parents=True)
    for name, change in (("azr.json", record), ("adapter_config.json", config)):
        (directory / name).write_text(json.dumps(json.loads((checkpoint / name).read_text()) | (change or {})))
    state = load_file(checkpoint / "adapter_model.safetensors")
    save_file(tensors(state) if tensors else state, directory / "adapter_model.safetensors")
    return directory


def with_nan(state):
    name = sorted(state)[0]
    return state | {name: state[name].index_fill(0, torch.tensor([1]), float("nan"))}


def wider(state):
    """The queries' input is one number longer than the model's."""
    name = next(name for name in sorted(state) if "q_proj.lora_A" in name)
    return state | {name: torch.nn.functional.pad(state[name], (0, 1))}


def elsewhere(state):
    return {name.replace("layers.0.", "layers.77."): tensor for name, tensor in state.items()}


CONTRADICTIONS = {
    "quantization": ({}, ["--quantization", "nf4"], "--quantization nf4 contradicts .*azr.json, which says none"),
    "unknown": ({"record": {"quantization": "int8"}}, [], "azr.json: quantization int8 is not supported"),
    "unsaid": ({"record": {"quantization": None}}, [], "add --quantization nf4 or --quantization none"),
    "base": ({"record": {"revision": "sha256:0"}}, [], "was trained on another base than .* .revision sha256:0, here"),
    "shapes": ({"tensors": wider}, [], "q_proj updates a matrix of 128 x 129, but .* has 128 x 128"),
    "names": ({"tensors": elsewhere}, [], "adapts model.layers.77.* which does not exist: an adapter of another"),
    "rank": ({"config": {"r": 7}}, [], "adapter_config.json says rank 7"),
    "kind": ({"config": {"peft_type": "IA3"}}, [], "IA3 is not supported"),
    "biases": ({"config": {"bias": "all"}}, [], "trains biases"),
    "nan": ({"tensors": with_nan}, [], "adapter_model.safetensors: NaN or infinity in base_model"),
}


def refusals(capsys, adapter, flags, tmp_path):
    """{script: its one line without its name} of every script that opens a base with an adapter."""
    probe = tmp_path / "probe.jsonl"
    probe.write_text(json.dumps({"role": "solver", "mode": "deduction", "prompt": "a", "response": "b"}) + "\n")
    run = ["run", "--model", "tiny", "--benchmark", "tiny", "--limit", "1", "--samples", "1", "--max-new-tokens", "4"]
    commands = {
        "eval_passk.py": (eval_passk.main, [*run, "--out", tmp_path / "eval", "--adapter", adapter, *flags]),
        "analyze.py sparsity": (analyze.main, ["sparsity", "--base", "tiny", "--adapter", adapter, *flags]),
        "analyze.py entropy": (
            analyze.main,
            ["entropy", "--model", "tiny", "--data", probe, "--adapter", adapter, *flags],
        ),
        "train_azr.py export": (export.main, [adapter, "--base", "tiny", "--out", tmp_path / "merged"]),
    }
    if flags:  # export has no flag that could contradict azr.json
        del commands["train_azr.py export"]
    lines = {}
    for script, (main, arguments) in commands.items():
        capsys.readouterr()
        assert main(list(map(str, arguments))) == 2, script
        *before, last = capsys.readouterr().err.splitlines()
        assert last.startswith(f"{script}: ") and not any(line.startswith(script) for line in before), (before, last)
        lines[script] = last.removeprefix(f"{script}: ")
    return lines


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_every_script_refuses_the_same_in_the_same_words(checkpoint, tmp_path, capsys, name):
    change, flags, said = CONTRADICTIONS[name]
    adapter = changed(checkpoint, tmp_path / "step_3", **change)
    lines = refusals(capsys, adapter, flags, tmp_path)
    assert len(set(lines.values())) == 1, lines
    assert re.search(said, lines["eval_passk.py"]), lines
    assert not (tmp_path / "merged").exists()


def test_flags_and_azr_json_make_the_settings(checkpoint, tmp_path):
    run = checkpoint.parents[1]
    opening = agree(None, run)
    assert opening.adapter == checkpoint and checkpoints_of(run) == {3: checkpoint}
    assert (opening.model, opening.quantization, opening.dtype) == (model_path("tiny"), "none", "float32")
    assert opening.notes[0] == f"adapter {checkpoint}: the newest checkpoint of {run}" and not opening.doubts
    assert agree("tiny").quantization == "none" and agree("qwen-3b").quantization == "nf4"
    for asked in ({"dtype": "bfloat16"}, {"template": "plain"}):
        with pytest.raises(ModelError, match="contradicts"):
            agree("tiny", checkpoint, **asked)
    bare = changed(checkpoint, tmp_path / "bare")
    (bare / "azr.json").unlink()
    with pytest.raises(ModelError, match="--quantization nf4 or --quantization none"):
        agree("tiny", bare)
    assert "cannot be checked" in agree("tiny", bare, "none").doubts[0]
    with pytest.raises(ModelError, match="names its base"):
        agree(None, bare, "none")
    moved = changed(checkpoint, tmp_path / "moved", record={"base_model": "/nowhere/tiny"})
    with pytest.raises(ModelError, match="/nowhere/tiny, which is not here"):
        agree(None, moved)
    (moved / "azr.json").write_text("{")
    with pytest.raises(ModelError, match="azr.json: cannot be read"):
        agree("tiny", moved)
    with pytest.raises(ModelError, match="--model is missing"):
        agree(None)
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ModelError, match="young has no checkpoint yet"):
        agree("tiny", tmp_path / "young")


def test_a_commit_and_a_fingerprint_are_no_contradiction_and_another_wording_is(checkpoint, tmp_path):
    hub = agree("tiny", changed(checkpoint, tmp_path / "hub", record={"revision": "c" * 40, "template_hash": "old"}))
    assert "cannot be compared" in check_base(hub, {"revision": "sha256:1"})[0]
    assert check_base(hub, {"revision": "c" * 40, "tokenizer_hash": None}) == []
    with pytest.raises(ModelError, match="another base than .*double_quant"):
        check_base(
            agree("tiny", changed(checkpoint, tmp_path / "b", record={"double_quant": True})), {"double_quant": False}
        )
    check_template(hub, "azr", "new")
    with pytest.raises(ModelError, match="another wording of the tiny prompts"):
        check_template(hub, "tiny", "new")
