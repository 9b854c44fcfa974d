"""The training script as a user runs it: on the embedded model, undisturbed and resumed.

`main` is called with the arguments of the command line, which saves the seconds that a start of Python with torch and
transformers takes; processes that are killed are in test_faults.py.
"""

import dataclasses
import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest

from azr.models import model_path
from in_process import run_here

ROOT = Path(__file__).parents[2]
TINY = Path(model_path("tiny"))
SHARED = ROOT.parent / "shared" / "data"
SMALL = ["--prompts-per-mode", "3", "--answers", "3", "--eval-samples", "2", "--eval-every", "2", "--save-every", "2"]
SMALL += ["--max-new-tokens", "64"]
STEPS = 3  # of an undisturbed run; the second is evaluated


@pytest.fixture(scope="module", autouse=True)
def short_start():
    """Two rounds of the seed stage and a small probe, or the start would take longer than the steps."""
    from azr.train import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SEED_ROUNDS", 2)
        patch.setattr(loop, "PROBE", 4)
        yield


@pytest.fixture(scope="module")
def held_out(few_held_out):
    return few_held_out


def train(out, held_out, *flags) -> subprocess.CompletedProcess:
    """Exit code and what was printed."""
    import train_azr

    return run_here(train_azr.main, "--out", out, "--eval-data", held_out, *SMALL, *flags)


def reproducible(out) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))} for row in rows]


@pytest.fixture(scope="module", params=["none", "nf4"])
def finished(request, held_out, tmp_path_factory):
    """An undisturbed run of STEPS steps, and its quantization."""
    out = tmp_path_factory.mktemp("run") / request.param
    done = train(out, held_out, "--steps", STEPS, "--quantization", request.param)
    assert done.returncode == 0, done.stderr
    return out, request.param, done.stdout


def test_a_run_leaves_what_it_promises(finished):
    out, quantization, shown = finished
    rows = reproducible(out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["train/log_prob_gap"] < 1e-4 and row["train/skipped"] == 0 and row["train/tokens"] > 0
        assert all(0 <= row[f"proposer/{mode}/valid_rate"] <= 1 for mode in ("deduction", "abduction", "induction"))
    for name in ("held_out/deduction/accuracy", "solver/all/probe_kl"):
        assert name in rows[1] and name not in rows[0]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {s["role"] for s in samples} == {"proposer", "solver"} and all("reward" in s["reward"] for s in samples)
    assert all(s["reason"] for s in samples)
    info = json.loads((out / "checkpoints/step_3/azr.json").read_text())
    assert info["quantization"] == quantization and info["template"] == "tiny" and info["template_hash"]
    probe = [json.loads(line) for line in (out / "probe.jsonl").read_text().splitlines()]
    assert len({(row["role"], row["mode"]) for row in probe}) == 6
    assert (out / "plots/pass_at_k.png").stat().st_size > 10_000
    for words in ("step 3/3", "before the first step: held-out", "greedily, ", " with 2 answers at T 1", "pass@1"):
        assert words in shown
    before, after = (json.loads((out / f"eval/greedy_{name}.json").read_text())["tasks"] for name in ("base", "step_3"))
    assert [task["hash"] for task in before] == [task["hash"] for task in after] and {t["n"] for t in before} == {1}


def test_a_resumed_run_on_4_bits_goes_on_as_if_nothing_had_happened(finished, held_out, tmp_path):
    """From the checkpoint before its last step: the same metrics, bit for bit. Kills are drilled by bench_faults.py."""
    whole, quantization, _ = finished
    if quantization == "none":
        pytest.skip("resumed and killed in test_faults.py")
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / f"checkpoints/step_{STEPS}")
    (out / "eval/greedy_base.json").unlink()  # as in a run that began before it was measured: the base is gone
    done = train(out, held_out, "--steps", STEPS, "--quantization", quantization, "--resume", "auto")
    assert done.returncode == 0 and f"step {STEPS}/{STEPS}" in done.stdout, done.stderr
    assert reproducible(out) == reproducible(whole)
    assert "greedily" not in done.stdout and not (out / "eval/greedy_base.json").exists()
    for name in ("adapter_model.safetensors", "state/tensors.safetensors"):
        assert (out / f"checkpoints/step_{STEPS}" / name).read_bytes() == (
            whole / f"checkpoints/step_{STEPS}" / name
        ).read_bytes()


def test_the_adapter_loads_with_peft_and_gives_the_same_log_probs(finished):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from azr.policy.policy import Policy

    out, quantization, _ = finished
    adapter = out / "checkpoints/step_3"
    row = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    policy = Policy.load(TINY, quantization, adapter=adapter)
    prompt, response = policy.encode(row["prompt"]), policy.encode(row["response"])
    ours = torch.tensor(policy.score_lists([prompt], [response])[0][0])

    options = (
        {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            )
        }
        if quantization == "nf4"
        else {}
    )
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = torch.tensor([tokenizer(row["prompt"] + row["response"], add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        log_probs = model(ids).logits[0].log_softmax(-1)
    theirs = log_probs[:-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
    assert (ours - theirs).abs().max() < 1e-4


def test_a_saved_config_can_be_passed_back(finished):
    from azr.train.config import parse, resolve

    out, _, _ = finished
    stored = json.loads((out / "config.json").read_text())
    config, _ = resolve(parse(["--config", str(out / "config.json"), "--seed", "7"], ""))
    assert dataclasses.asdict(config) == {**stored, "seed": 7}


def test_a_run_given_as_config_is_told_where_its_file_is(tmp_path):
    from azr.train.config import read_config

    with pytest.raises(ValueError, match=f"--config takes the file, such as {tmp_path}/config.json"):
        read_config(tmp_path)


def test_a_config_from_before_is_read_with_one_line(finished, held_out, tmp_path):
    """Settings that no longer exist are left out; a strength moves to the name of its control; the run goes on."""
    out, quantization, _ = finished
    if quantization == "nf4":
        pytest.skip("says nothing about settings")
    stored = json.loads((out / "config.json").read_text())
    gone = {"loss_weighting": "token", "probe": "auto", "keep_states": 4, "entropy_coefficient": 0.03, "card": None}
    old = {**stored, **gone, "entropy_control": "bonus"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    done = train(tmp_path / "other", held_out, "--config", tmp_path / "config.json", "--print-config")
    assert done.returncode == 0 and json.loads(done.stdout)["entropy_control"] == "bonus=0.03"
    [line] = done.stderr.splitlines()
    assert "settings that no longer exist are left out: " in line and "loss_weighting token" in line
    shutil.copytree(out, tmp_path / "run")
    (tmp_path / "run/config.json").write_text(json.dumps({**stored, **gone, "entropy_coefficient": None}))
    again = ["--steps", STEPS, "--quantization", "none", "--resume", tmp_path / "run"]
    done = train(out, held_out, "--config", tmp_path / "run/config.json", *again)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no longer exist") == 1 and reproducible(tmp_path / "run") == reproducible(out)
    assert not set(gone) & set(json.loads((tmp_path / "run/config.json").read_text()))


def test_a_warm_start_from_an_adapter(finished, held_out, tmp_path):
    out, quantization, _ = finished
    adapter, flags = out / "checkpoints/step_3", ("--steps", 1, "--eval-samples", 0, "--quantization", quantization)
    done = train(tmp_path / "run", held_out, *flags, "--adapter", out)  # a run: its newest
    assert done.returncode == 0 and "warm start from the adapter" in done.stdout, done.stderr
    began = tmp_path / "run/checkpoints/step_0/adapter_model.safetensors"
    assert began.read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    assert json.loads((tmp_path / "run/config.json").read_text())["adapter"] == str(adapter)
    for more, words in ((["--lora-rank", "4"], "leave the --lora flags out"), (["--adapter", "/nowhere"], "/nowhere")):
        done = train(tmp_path / "bad", held_out, *flags, "--adapter", adapter, *more)
        assert done.returncode == 2 and words in done.stderr and not (tmp_path / "bad").exists()


def test_presets_are_sizes_cards_and_a_smoke_test(held_out, tmp_path):
    def settings(*flags) -> dict:
        done = train(tmp_path / "run", held_out, *flags, "--print-config")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    big = {name: settings("--model", "qwen-3b", "--preset", name) for name in ("24gb", "4090", "H200", "80gb")}
    assert big["24gb"] | {"preset": ""} == big["4090"] | {"preset": ""}
    assert big["80gb"] | {"preset": ""} == big["H200"] | {"preset": ""}
    for model in ("tiny", "qwen-3b"):
        smoke = settings("--model", model, "--preset", "smoke")
        assert smoke["steps"] == 2 and smoke["eval_samples"] == 2  # a flag that is typed stays


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--preset", "9090"], "unknown preset 9090"),
        (["--entropy-control", "bonus=0"], "must be above 0"),
        (["--loss-weighting", "token"], "unrecognized"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--lr", "1"], "unrecognized"),
        (["--learning-rat", "1"], "did you mean --learning-rate?"),
        (["--steps", "0"], "--steps: must be a whole number"),
        (["--temperature", "0"], "--temperature"),
        (["--config", "/nowhere.json"], "/nowhere.json"),
        (["--resume", "/nowhere"], "/nowhere"),
        (["--eval-data", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--attn", "fast"], "--attn"),
        (["--rollout-weights", "bf16"], "none to copy"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, words, held_out, tmp_path):
    done = train(tmp_path / "run", held_out, *flags)
    lines = [line for line in done.stderr.splitlines() if line.startswith("train_azr.py")]
    assert done.returncode == 2 and len(lines) == 1 and words in lines[0]


def test_a_start_that_fails_blocks_nothing_and_the_published_recipe_takes_several_minibatches(held_out, tmp_path):
    flags = ("--steps", 1, "--eval-samples", 0, "--recipe", "azr", "--minibatches", 2)
    assert train(tmp_path / "run", held_out, "--model", "/nowhere").returncode == 2
    done = train(tmp_path / "run", held_out, *flags)
    assert done.returncode == 0, done.stderr
    assert all(math.isfinite(row["train/loss"]) for row in reproducible(tmp_path / "run"))
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert any(s["role"] == "solver" for s in samples)


def test_a_directory_that_holds_another_run_is_left_alone(finished, held_out):
    out, _, _ = finished
    before = (out / "metrics.jsonl").read_bytes()
    done = train(out, held_out, "--steps", STEPS)
    assert done.returncode == 2 and "--resume auto" in done.stderr
    done = train(out, held_out, "--steps", STEPS, "--resume", "auto", "--learning-rate", "0.5")
    assert done.returncode == 2 and "learning_rate" in done.stderr
    assert (out / "metrics.jsonl").read_bytes() == before
    done = train(out, held_out, "--steps", STEPS, "--resume", "auto")
    assert done.returncode == 0 and f"all {STEPS} steps were complete before" in done.stdout, done.stderr
    assert (out / "metrics.jsonl").read_bytes() == before


def test_non_finite_updates_are_skipped_saved_and_end_the_run(held_out, tmp_path, monkeypatch):
    """Three skipped updates, then exit code 1."""
    import train_azr

    honest = train_azr.ppo_loss
    monkeypatch.setattr(train_azr, "ppo_loss", lambda s, batch: math.inf * honest(s, batch))
    done = train(tmp_path / "run", held_out, "--steps", 5, "--eval-samples", 0)
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert "update skipped" in done.stderr and len(list((tmp_path / "run").glob("non_finite_step_*.jsonl"))) == 3


def test_a_real_architecture_with_the_real_tokenizer(tmp_path):
    """Two steps on random weights: a small Qwen2 in NF4 with Qwen2.5's vocabulary."""
    source = SHARED / "qwen2.5-tokenizer"
    if not source.is_dir():
        pytest.skip("the Qwen2.5 tokenizer is not at hand")
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    model, tokenizer = tmp_path / "model", AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=151_936,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(model)
    for file in source.iterdir():
        shutil.copy(file, model)
    tasks = (TINY / "held_out.jsonl").read_text().splitlines()[:2]
    (tmp_path / "tasks.jsonl").write_text("\n".join(tasks) + "\n")
    done = train(
        tmp_path / "run",
        tmp_path / "tasks.jsonl",
        "--model",
        model,
        "--steps",
        2,
        "--max-new-tokens",
        8,
        "--prompts-per-mode",
        2,
        "--eval-samples",
        1,
        "--entropy-control",  # random weights propose nothing valid: without it no token has a gradient, or a gap
        "bonus=0.001",
        "--allow-cpu",
    )
    assert done.returncode == 0, done.stderr
    rows = reproducible(tmp_path / "run")
    assert len(rows) == 2 and rows[0]["train/log_prob_gap"] < 1e-4 and rows[0]["train/grad_norm"] > 0
    assert "seed stage" in done.stderr  # random weights propose nothing valid: said loudly
    assert "0 % of 6 valid; 6 of 6 refused: no_" in done.stdout and f"report {tmp_path / 'run'}" in done.stdout
