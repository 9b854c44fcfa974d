"""Warnings in words: what triggers each, when it is said again, that healthy runs are left alone, and real runs that
are made to go wrong. The row that the others are made from is what the embedded model logged in a healthy run."""

import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from azr.analysis import health
from azr.analysis.checks import CHECKS, WINDOW
from azr.analysis.health import Health, Watch, example
from azr.train import loop, update
from azr.train.config import Config
from azr.train.metrics import commonest_share

ROOT = Path(__file__).parents[2]
CONFIG = {
    "learning_rate": 1e-3,
    "references": 2,
    "answers": 8,
    "temperature": 1.0,
    "max_new_tokens": 128,
    "token_budget": 4096,
    "max_batch": None,
    "attn": "auto",
    "rollout_weights": "stored",
    "proposer_reward": "learnability",
    "entropy_control": "none",
}
# role, mode: rates as logged; 16 proposals a mode, those refused by reason
LOGGED = {
    "deduction": (0.8125, {"error": 1, "forbidden": 1, "no_program": 1}, 0.77, 0.087),
    "abduction": (0.8125, {"error": 1, "syntax": 2}, 0.077, 0.202),
    "induction": (0.625, {"inputs_not_distinct": 2, "outputs_not_diverse": 3, "wrong_count": 1}, 0.6, 0.025),
}


def healthy(step: int) -> dict:
    row = {"step": step, "proposer/all/entropy": 0.788, "solver/all/entropy": 0.562, "train/log_prob_gap": 4e-7}
    row |= {"train/skipped": 0.0, "train/grad_norm": 0.2, "memory/token_budget": 4096, "memory/max_batch": 512}
    for mode, (valid, refused, idle, accuracy) in LOGGED.items():
        row |= {f"proposer/{mode}/valid_rate": valid, f"proposer/{mode}/duplicate_rate": 0.0}
        row |= {f"{role}/{mode}/truncated_rate": 0.0 for role in ("proposer", "solver")}
        row |= {f"proposer/{mode}/refused/{reason}": count for reason, count in refused.items()}
        row |= {f"proposer/{mode}/solved_of_8/{k}": (16 - sum(refused.values())) * (k == 0) for k in range(9)}
        row |= {f"solver/{mode}/zero_advantage_rate": idle, f"solver/{mode}/accuracy": accuracy}
        row |= {f"solver/{mode}/well_formed_rate": 0.95, f"solver/{mode}/timeout_rate": 0.0}
        row |= {f"solver/{mode}/commonest_share": 0.2, f"solver/{mode}/tasks": 13}
    if step % 25 == 0:
        row["held_out/all/accuracy"] = 0.25
    return row


def run(steps: int, change=lambda step: {}, config=CONFIG) -> Health:
    """The rows of so many steps, with what `change(step)` puts in."""
    found = Health(config)
    for step in range(1, steps + 1):
        found.add(healthy(step) | change(step))
    return found


def refuse(mode: str, reason: str, count: int) -> dict:
    """`count` of a mode's 16 proposals refused for a reason, the others valid."""
    gone = {f"proposer/{mode}/refused/{other}": 0 for other in LOGGED[mode][1]}
    valid = {f"proposer/{mode}/solved_of_8/0": 16 - count, f"proposer/{mode}/valid_rate": 1 - count / 16}
    return gone | valid | {f"proposer/{mode}/refused/{reason}": count}


def invalid(count: int) -> dict:
    return {key: value for mode in LOGGED for key, value in refuse(mode, "no_format", count).items()}


def later(step: int, then: dict) -> dict:
    return then if step > WINDOW else {}


def measured(step: int, last: float) -> dict:
    """Held-out accuracy 0.25 at step 25, then `last`; that of training rises."""
    accuracy = {"held_out/all/accuracy": 0.25 if step == 25 else last} if step % 25 == 0 else {}
    return accuracy | {"solver/deduction/accuracy": step / 100}


def test_the_share_of_one_answer():
    """Over all answers; what could not be read is no answer, but counts."""
    answers = [SimpleNamespace(parsed=SimpleNamespace(value=value)) for value in ("0", "0", "[1]", None, "1")]
    assert commonest_share(answers) == 2 / 5
    assert math.isnan(commonest_share([])) and math.isnan(commonest_share(answers[3:4]))


CASES = {  # name: (steps, what triggers it, what just does not, words of the warning, flags it names)
    "entropy": (
        20,
        lambda s: later(s, {"solver/all/entropy": 0.16}),
        lambda s: later(s, {"solver/all/entropy": 0.18}),
        "solver entropy fell 72 % (0.56 -> 0.16",
        ["--entropy-control adaptive", "--learning-rate 0.0005"],
    ),
    "entropy-rise": (
        15,
        lambda s: later(s, {"solver/all/entropy": 0.85, "proposer/all/entropy": 1.2}),
        lambda s: later(s, {"solver/all/entropy": 0.84, "proposer/all/entropy": 1.1}),
        "entropy rose 1.5-fold",
        ["--learning-rate 0.00025"],
    ),
    "valid": (
        5,
        lambda s: invalid(15),
        lambda s: {**invalid(14), "nothing": None} if s % 2 else refuse("deduction", "error", 3),
        "hardly a proposal is valid (deduction 6 %, abduction 6 %, induction 6 %); of 135 refusals: no_format 135",
        ["--references 4", "--temperature 0.8"],
    ),
    "no-task": (
        5,
        lambda s: invalid(16) if s % 5 in (1, 2, 3) else {},
        lambda s: invalid(16) if s % 5 == 1 else {},
        "75 % of the last steps had no valid proposal",
        ["--temperature 0.8"],
    ),
    "no-update": (
        5,
        lambda s: {"train/grad_norm": 0.2 * (s % 5 in (0, 4))},
        lambda s: {"train/grad_norm": 0.2 * (s % 5 != 1)},
        "% of the last steps trained nothing",
        ["--answers", "--model"],
    ),
    "refused": (
        5,
        lambda s: refuse("induction", "inputs_not_distinct", 13),
        lambda s: refuse("induction", "inputs_not_distinct", 11),
        "induction 81 % inputs_not_distinct",
        ["--temperature 0.8"],
    ),
    "format": (
        5,
        lambda s: {"solver/abduction/well_formed_rate": 0.45},
        lambda s: {"solver/abduction/well_formed_rate": 0.55},
        "answers without the asked form (abduction 55 %)",
        ["--temperature 0.8"],
    ),
    "no-advantage": (
        5,
        lambda s: {"solver/induction/zero_advantage_rate": 0.97, "solver/induction/accuracy": 0.01},
        lambda s: {"solver/induction/zero_advantage_rate": 0.94},
        "teach nothing (induction 97 %). Too hard",
        ["--answers 16"],
    ),
    "one-answer": (
        5,
        lambda s: {"solver/abduction/commonest_share": 0.5},
        lambda s: (
            {"solver/abduction/commonest_share": 0.38}
            | {"solver/deduction/commonest_share": 1.0, "solver/deduction/tasks": 2}
        ),
        "the same answer to everything (abduction 50 %)",
        ["--learning-rate 0.0005"],
    ),
    "gap": (
        3,
        lambda s: {"train/log_prob_gap": 0.12, "train/gap_outside_10": 0.35},
        lambda s: {"train/log_prob_gap": 0.09},
        "disagree by 0.120 nats a token, 35 % of tokens by more than 10 %",
        ["--attn sdpa", "--dtype fp16"],
    ),
    "duplicates": (
        5,
        lambda s: {"proposer/abduction/duplicate_rate": 0.4},
        lambda s: {"proposer/abduction/duplicate_rate": 0.25},
        "repeat earlier ones (abduction 40 %)",
        ["--temperature 1.2", "--references 4"],
    ),
    "guessable": (
        5,
        lambda s: {"proposer/deduction/guessable_rate": 0.6},
        lambda s: {"proposer/deduction/guessable_rate": 0.4},
        "tasks can be guessed (deduction 60 %)",
        ["--proposer-reward above-chance"],
    ),
    "cut-off": (
        3,
        lambda s: {"solver/deduction/truncated_rate": 0.12},
        lambda s: {"solver/deduction/truncated_rate": 0.08},
        "cut off at --max-new-tokens 128 (solver deduction 12 %)",
        ["--max-new-tokens 256"],
    ),
    "held-out": (
        50,
        lambda s: measured(s, 0.19),
        lambda s: measured(s, 0.2),
        "held-out accuracy fell 25.0 -> 19.0 % since step 25",
        ["--learning-rate 0.0005", "--prompts-per-mode"],
    ),
    "skipped": (
        20,
        lambda s: {"train/skipped": float(s in (4, 9))},
        lambda s: {"train/skipped": float(s in (4, 19))},
        "2 of the last 10 updates were not finite",
        ["--learning-rate 0.0005"],
    ),
    "sandbox": (
        10,
        lambda s: {"proposer/deduction/refused/infra": float(s % 2)},
        lambda s: {"proposer/deduction/refused/infra": float(s == 8)},
        "the machine gave no verdict on 1.4 % of the proposals",
        [],
    ),
    "timeout": (
        5,
        lambda s: {"solver/deduction/timeout_rate": 0.25},
        lambda s: {"solver/deduction/timeout_rate": 0.15},
        "out of CPU time (answers deduction 25 %)",
        [],
    ),
    "memory": (
        4,
        lambda s: {"memory/token_budget": 4096 >> s},
        lambda s: {"memory/token_budget": 2048, "memory/max_batch": 256},
        "tokens of a micro-batch 4096 -> 1024",
        ["--preset"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_past_the_limit_and_just_not(name):
    steps, past, below, words, flags = CASES[name]
    said = [f for f in run(steps, past).said if f.check == name]
    assert said and words in said[0].text(), said
    for flag in flags:
        assert flag in said[0].text()
    assert said[0].step >= {check.name: check.steps for check in CHECKS}[name] and said[0].level >= 1
    assert not [f for f in run(steps, below).said if f.check == name]


def test_every_check_has_a_case():
    assert {check.name for check in CHECKS} == set(CASES)


def test_answers_without_a_verdict_are_told_and_what_to_do():
    """39 tasks with 8 answers a step: 2 of 312 are 0.6 %, 1 is 0.3 %."""
    [said] = run(10, lambda step: {"time/unjudged": 2}).said
    assert said.check == "sandbox" and said.places == ("answers",) and "0.6 % of the answers" in said.what
    assert "python -m sandbox doctor" in said.advice
    assert not run(10, lambda step: {"time/unjudged": 1}).said


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_a_run_that_proposes_or_trains_nothing_hears_it_however_short(steps):
    config = CONFIG | {"steps": steps}
    assert [f.check for f in run(steps, lambda step: invalid(16) | {"train/grad_norm": 0.0}, config).said] == ["valid"]
    idle = run(steps, lambda step: {"train/grad_norm": 0.0}, config)
    assert [f.check for f in idle.said] == ["no-update"] and "100 % of the last steps" in idle.summary()[1]
    assert not run(steps, config=config).said


def test_a_healthy_run_hears_nothing():
    found = run(120)
    assert not found.said and "nothing to warn of in 120 steps" in found.summary()[0]


def test_one_bad_step_is_noise():
    bad = invalid(16) | {"solver/deduction/truncated_rate": 0.9, "proposer/all/entropy": 0.1, "train/skipped": 1.0}
    assert not run(60, lambda step: bad if step == 30 else {}).said


def test_said_once_then_when_worse_then_after_a_while():
    gaps = lambda step: {"train/log_prob_gap": 0.12 if step < 40 else 0.6}  # noqa: E731
    assert [f.step for f in run(39, gaps).said] == [3]
    # at 42 the mean of ten is twice that of step 3, at 52 twice that; 50 steps later it still holds
    assert [f.step for f in run(110, gaps).said] == [3, 42, 52, 102]


@pytest.mark.parametrize(
    "dtype, healthy_gap, past", [("bf16", 0.045, 0.12), ("fp16", 0.005, 0.03), ("fp32", 4e-6, 0.002)]
)
def test_the_gap_is_measured_by_what_its_dtype_rounds(dtype, healthy_gap, past):
    """In bf16 every real model has a gap that would be a fault in fp16 or fp32."""
    config = CONFIG | {"dtype": dtype}
    assert not run(20, lambda s: {"train/log_prob_gap": healthy_gap}, config).said
    [found] = run(20, lambda s: {"train/log_prob_gap": past}, config).said
    assert f"rounding in {dtype}" in found.advice and ("--dtype fp16" in found.advice) == (dtype == "bf16")
    assert "--rollout-weights" not in found.advice
    copied = run(20, lambda s: {"train/log_prob_gap": past}, config | {"rollout_weights": "bf16", "attn": "sdpa"}).said
    assert "--rollout-weights stored" in copied[0].advice and "--attn" not in copied[0].advice


def test_another_mode_is_news_but_not_at_once():
    def change(step):
        return {f"proposer/{mode}/duplicate_rate": 0.5 * (step > start) for mode, start in starts.items()}

    starts = {"deduction": 0, "abduction": 5}
    said = run(30, change).said
    assert [f.step for f in said] == [5, 15] and said[1].places == ("deduction", "abduction")


def test_one_fault_one_warning():
    """Answers that are cut off are malformed, so all alike: only the first is said."""
    change = {"solver/induction/truncated_rate": 1.0, "solver/induction/well_formed_rate": 0.0}
    found = run(9, lambda step: change | {"solver/induction/zero_advantage_rate": 1.0})
    assert [f.check for f in found.said] == ["cut-off"]


def test_cut_off_later_asks_for_a_lower_rate():
    found = run(20, lambda step: later(step, {"solver/deduction/truncated_rate": 0.4}))
    assert "At first they were not: --learning-rate 0.0005" in found.said[0].text()


def test_no_task_that_comes_later_asks_for_a_lower_rate():
    said = run(6, lambda step: invalid(16) if step > 2 else {}).said[0]
    assert (
        said.check == "no-task"
        and said.step == 4
        and "Try --learning-rate 0.0005 (it was better before)" in said.text()
    )


def test_null_and_missing_values_are_not_numbers():
    rows = [{"step": 1}, {"step": 2, "train/log_prob_gap": None}, {"step": 3, "train/log_prob_gap": math.nan}]
    found = Health({})
    for step, row in enumerate(rows * 10, 1):
        assert found.add(row | {"step": step}) == []


def test_runs_without_proposers():
    """rlvr logs no proposer/ metrics, sft no log-prob gap either."""
    found = Health(CONFIG)
    for step in range(1, 40):
        row = {key: value for key, value in healthy(step).items() if not key.startswith("proposer/")}
        found.add(row | {"solver/deduction/truncated_rate": 0.5})
    assert {f.check for f in found.said} == {"cut-off"}


def test_flags_that_are_named_exist():
    known = {"--" + field.name.replace("_", "-") for field in fields(Config)}
    settings = [
        CONFIG,
        {},
        CONFIG | {"rollout_weights": "bf16", "attn": "sdpa", "entropy_control": "kl-cov"},
        CONFIG | {"temperature": 2.0, "proposer_reward": "gate"},
        CONFIG | {"temperature": 0.6, "attn": "sdpa"},
    ]
    reasons = "no_format duplicate too_long infra timeout memory not_literal syntax".split()
    texts = []
    for config in settings:
        for steps, past, *_ in CASES.values():
            texts += [f.text() for f in run(steps, past, config).said]
        for reason in reasons:
            texts += [f.text() for f in run(9, lambda s: refuse("deduction", reason, 16), config).said]
        easy = {"solver/induction/zero_advantage_rate": 1.0, "solver/induction/accuracy": 0.99}
        texts += [f.text() for f in run(9, lambda s: easy, config).said]
    named = {flag for text in texts for flag in re.findall(r"--[a-z-]+", text)}
    assert len(named) > 10 and named <= known, named - known


# ------------------------------------------------------------------------------------------------ runs on the disk


def write(directory: Path, rows: list[dict], config=CONFIG) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    text = "".join(json.dumps({k: None if v != v else v for k, v in row.items()}) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text)
    return directory


@pytest.mark.parametrize("stopped_after", [0, 1, 4, 12, 25])
def test_a_resumed_run_says_what_an_undisturbed_one_does(tmp_path, stopped_after):
    change = lambda s: later(s, {"solver/all/entropy": 0.1, "train/log_prob_gap": 0.14})  # noqa: E731
    rows, said, heard = [healthy(s) | change(s) for s in range(1, 41)], [], []
    whole = Watch(CONFIG, tmp_path / "none", said.append)
    for row in rows:
        whole.add(row)
    watch = Watch(CONFIG, write(tmp_path / "run", rows[:stopped_after]), heard.append)
    for row in rows[stopped_after:]:
        watch.add(row)
    assert heard == [text for text in said if int(text.split()[1].rstrip(":")) > stopped_after]
    assert watch.health.summary() == whole.health.summary() and len(said) == 2


def test_the_example_is_the_last_of_its_reason(tmp_path):
    rows = [
        (1, "proposer", "induction", "wrong_count", "one"),
        (2, "proposer", "induction", "wrong_count", "two\nlines"),
        (2, "proposer", "deduction", "wrong_count", "no"),
        (2, "solver", "induction", "wrong_count", "no"),
        (3, "proposer", "induction", "wrong_count", "later"),
    ]
    names = ("step", "role", "mode", "reason", "response")
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(dict(zip(names, row))) + "\n" for row in rows) + '{"st')
    f = health.Finding("refused", 2, "", "", 1.0, ("induction",), ("induction", "wrong_count"))
    assert example(tmp_path, f) == repr("two\nlines")
    assert example(tmp_path / "none", f) is None


def command(*arguments) -> subprocess.CompletedProcess:
    done = [sys.executable, "analyze.py", "health", *map(str, arguments)]
    return subprocess.run(done, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_command_line(tmp_path):
    done = command(write(tmp_path / "run", [healthy(s) | {"train/log_prob_gap": 0.2} for s in range(1, 9)]))
    assert done.returncode == 0 and done.stdout.startswith("step 3: sampler and trainer disagree by 0.200")
    assert "what to look at:\n- steps 3 to 8: " in done.stdout
    done = command(tmp_path / "nothing")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such file" in done.stderr
    limits = command("--limits").stdout
    assert all(re.search(f"^{name} ", limits, re.M) for name in [check.name for check in CHECKS])


# ------------------------------------------------------------------------------------------ real runs that go wrong

SMALL = "--prompts-per-mode 3 --answers 3 --eval-every 0 --eval-samples 0 --save-every 99".split()


def too_short(monkeypatch) -> str:
    return "--max-new-tokens 8 --steps 5"


def falling_apart(monkeypatch) -> str:
    """After three steps the adapter becomes noise, as after updates far too large, whatever the machine rounds."""
    honest, calls = update.make_optimizer, []

    def broken(policy, learning_rate):
        def scatter(*_):
            calls.append(1)
            if len(calls) == 3:
                generator = torch.Generator().manual_seed(0)
                with torch.no_grad():
                    for name, parameter in policy.model.named_parameters():
                        if "lora_B" in name:
                            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))

        optimizer = honest(policy, learning_rate)
        optimizer.register_step_post_hook(scatter)
        return optimizer

    monkeypatch.setattr(update, "make_optimizer", broken)
    return "--max-new-tokens 32 --steps 8"


@pytest.mark.parametrize(
    "fault, checks, words",
    [(too_short, {"cut-off", "valid"}, "no_format"), (falling_apart, {"entropy-rise"}, "falls apart")],
)
def test_real_runs(few_held_out, tmp_path, capfd, monkeypatch, fault, checks, words):
    """On the terminal while it runs, at its end, and the same when asked afterwards."""
    import train_azr

    monkeypatch.setattr(loop, "SEED_ROUNDS", 1)  # the embedded model cannot fill its buffers in 8 tokens
    monkeypatch.setattr(loop, "PROBE", 2)
    out, flags = tmp_path / "run", fault(monkeypatch).split()
    assert train_azr.main([*SMALL, *flags, "--eval-data", str(few_held_out), "--out", str(out)]) == 0
    shown = capfd.readouterr()
    said = re.findall(r"^warning: (step \d+: .*)", shown.err, re.M)
    found = Health(json.loads((out / "config.json").read_text()))
    for row in health.steps_of(out):
        found.add(row)
    assert checks <= {f.check for f in found.said} and words in " ".join(said)
    assert len(said) == len(found.said) and all(text.startswith(f.text()) for text, f in zip(said, found.said))
    assert "what to look at:\n- " in shown.out
