"""Time, dollars and disk of a plan; --dry-run and --config as typed; the plan against a measured peak; the probe."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import bench_plan
from azr.machine import cost, plan
from azr.machine.plan import PRESETS, QWEN25, TINY, plan_memory
from azr.policy.policy import SHARED_ROW
from in_process import run_here

ROOT = Path(__file__).resolve().parents[2]


def typed(*flags) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of train_azr.py."""
    import train_azr

    done = run_here(train_azr.main, *flags)
    return done.returncode, done.stdout, done.stderr


def made(size="3B", preset="24gb", **change):
    sizes = dataclasses.replace(PRESETS[preset], **change)
    return plan_memory(QWEN25[size], sizes, plan.capacity(PRESETS[preset]))


# ---------------------------------------------------------------- time


def test_faster_cards_shorter_texts_and_smaller_models_take_less_time():
    middle = cost.PACES[0]
    base = cost.step_time(made(), cost.CARDS["3090"], middle)
    assert cost.step_time(made(), cost.CARDS["h100"], middle).total < base.total / 2
    assert cost.step_time(made("7B"), cost.CARDS["3090"], middle).total > 1.5 * base.total
    assert cost.step_time(made(max_new_tokens=128), cost.CARDS["3090"], middle).total < base.total
    times = {pace.name: cost.step_time(made(), cost.CARDS["3090"], pace).total for pace in cost.PACES}
    assert times["fast"] < times["middle"] < times["slow"]
    assert base.total == pytest.approx(base.propose + base.solve + base.validate + base.update)


def test_the_plan_shares_rows_as_scoring_does():
    assert cost.SHARED_ROW == SHARED_ROW


def test_decoding_is_never_faster_than_the_bandwidth_allows():
    """One response: each of its tokens reads all the weights once."""
    preset = dataclasses.replace(PRESETS["24gb"], quantization="none", max_batch=1)
    one = plan_memory(QWEN25["3B"], preset, 24e9)
    seconds = cost.sampling_time(one, cost.CARDS["4090"], 1, 100, 10, 1)
    linear_and_head = 2 * (QWEN25["3B"].linear_parameters + 151_936 * 2048)
    assert seconds > 100 * linear_and_head / 1008e9


def test_an_update_costs_six_operations_a_weight_and_token():
    none = dataclasses.replace(PRESETS["24gb"], quantization="none")
    seconds = cost.update_time(QWEN25["3B"], none, cost.CARDS["4090"], 0, 1000)
    assert seconds == pytest.approx(6 * QWEN25["3B"].linear_parameters * 1000 / 165e12)


def test_cards_are_in_the_machine_or_assumed_and_it_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    card, why = cost.card_for(PRESETS["24gb"])
    assert card.name == "3090" and "assumed" in why
    assert cost.card_for(TINY)[0] is None
    for preset in PRESETS.values():
        assert cost.card_for(preset)[0].gib == preset.gib
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for there, name in (("NVIDIA H100 80GB HBM3", "h100"), ("Tesla T4", "t4"), ("NVIDIA Something", "3090")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda there=there: there)
        card, why = cost.card_for(PRESETS["24gb"])
        assert card.name == name and there in why and ("not in the list" in why) == (there == "NVIDIA Something")


def test_disk_counts_adapters_that_stay_and_states_that_are_pruned():
    plan_ = made()
    adapter = 4 * QWEN25["3B"].lora_parameters(32)
    parts = cost.disk(plan_, "qwen-3b", 500, 25)
    assert parts["adapters"] == 21 * adapter and parts["states"] == 9 * adapter  # steps 0, 25, ... 500; one is written
    assert parts["download"] > 2 * QWEN25["3B"].parameters
    assert cost.disk(plan_, str(ROOT / "azr" / "tiny"), 500, 0)["download"] == 0
    whole = plan_memory(QWEN25["3B"], dataclasses.replace(PRESETS["80gb"], train="full", quantization="none"), 8e10)
    parts = cost.disk(whole, "qwen-3b", 500, 25)  # bf16 models; masters and two moments in fp32 beside them
    assert parts["adapters"] == 21 * 2 * QWEN25["3B"].parameters
    assert parts["states"] == 3 * 14 * QWEN25["3B"].parameters


# ---------------------------------------------------------------- as typed


def test_dry_run_of_a_large_model_needs_no_gpu_and_no_network():
    code, out, err = typed("--model", "qwen-3b", "--preset", "24gb", "--dry-run", "--price-per-hour", "0.44")
    assert (code, err) == (0, "") and out.startswith("fits ") and "GB of GPU memory" in out.splitlines()[0]
    for word in (
        "weights",
        "LoRA + Adam",
        "KV cache",
        "activations",
        "logits",
        "overhead",
        "head-room",
        "propose",
        "solve",
        "validate",
        "update",
        "500 steps",
        "$0.44/h",
        "samples.jsonl",
        "model files",
    ):
        assert word in out, word
    assert "computed, not measured on this card" in out and "assumed" in out
    assert all(len(line) <= 80 for line in out.splitlines()), max(out.splitlines(), key=len)
    code, out, _ = typed("--model", "qwen-7b", "--preset", "h200", "--dry-run")
    assert code == 0 and "preset 80gb" in out and "h200, as asked" in out


def test_dry_run_that_does_not_fit_exits_1_and_its_advice_exits_0():
    flags = ["--model", "qwen-7b", "--preset", "16gb", "--quantization", "none", "--dry-run"]
    code, out, _ = typed(*flags)
    assert code == 1 and out.startswith("DOES NOT FIT ")
    advice = out.split("it fits with ")[1].split(" (")[0].split()
    assert typed(*flags, *advice)[0] == 0
    code, out, _ = typed(
        "--model", "qwen-3b", "--preset", "24gb", "--eval-every", "1", "--steps", "500000", "--dry-run"
    )
    assert code == 1 and out.startswith("DOES NOT FIT ") and "GB of disk" in out.splitlines()[0]  # 120 TB of adapters


def test_dry_run_of_the_embedded_model_plans_for_the_cpu():
    code, out, _ = typed("--dry-run", "--steps", "10")
    assert code == 0 and "fp32" in out and "fits" in out and "GB are free at" in out and "time, computed" not in out


def test_a_saved_config_comes_back_and_a_wrong_one_is_refused(tmp_path):
    file = tmp_path / "config.json"
    _, out, _ = typed("--model", "qwen-3b", "--preset", "16gb", "--answers", "4", "--print-config")
    first = json.JSONDecoder().raw_decode(out)[0]
    file.write_text(json.dumps(first))
    assert json.JSONDecoder().raw_decode(typed("--config", str(file), "--print-config")[1])[0] == first
    changed = json.JSONDecoder().raw_decode(typed("--config", str(file), "--answers", "6", "--print-config")[1])[0]
    assert changed == {**first, "answers": 6}
    for wrong in ({"steps": "abc"}, {"lora_rank": 1.5}, {"model": 3}, {"seed": None}, {"answers": True}):
        file.write_text(json.dumps(wrong))
        code, out, err = typed("--config", str(file), "--dry-run")
        assert code == 2 or "must be" in err, wrong
        assert out == "" and err.count("\n") == 1 and next(iter(wrong)) in err
    assert typed("--preset", "9090", "--out", str(tmp_path / "run"))[0] == 2 and not (tmp_path / "run").exists()


# ---------------------------------------------------------------- against measurement


def test_the_plan_is_within_15_percent_of_the_measured_peak(tmp_path):
    bench_plan.write_model(bench_plan.SHAPES["deep"], tmp_path)
    row = bench_plan.measure("deep", "nf4", tmp_path, "cpu", False)
    assert "ratio" in row, row
    assert abs(row["ratio"] - 1) <= bench_plan.MOST_OFF, row


def test_after_three_measured_steps_a_run_says_what_it_will_take(capsys):
    from azr.train.screen import StepLines

    lines = StepLines(500, 0.44)
    for step in range(1, 5):
        lines.show({"step": step, "time/step": 90.0, "time/elapsed": 90.0 * step, "time/solve": 60.0})
    shown = [line for line in capsys.readouterr().out.splitlines() if "measured" in line]
    assert len(shown) == 1 and "90.0 s a step" in shown[0]
    assert "12:30 h" in shown[0] and "$5.50 at $0.44" in shown[0]  # 500 x 90 s
