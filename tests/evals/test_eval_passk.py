"""eval_passk.py as a user types it: samples graded without torch, runs that are cut off and continued, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest

import eval_passk
from azr.evals import run, score
from azr.evals.benchmarks import BENCHMARKS, evenly_spread, load, prompt, stop_strings, template_hash
from azr.evals.grade import Answer, Grader, program_text, task_answer
from azr.models import model_path
from tests.timing import cpu_seconds

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "benchmarks"
CRUX = [
    {"code": "def f(x):\n    return [x, x + 1]", "input": "4", "output": "[4, 5]", "id": "a"},
    {"code": "def f():\n    return 'f() == 1'", "input": "", "output": "'f() == 1'", "id": "b"},
]
HALF = {
    "task_id": "Own/1",
    "prompt": 'def half(x):\n    """Half of x."""\n',
    "entry_point": "half",
    "canonical_solution": "    return x / 2\n",
    "base_input": [[2]],
    "plus_input": [[7]],
    "atol": 0,
}
OFFICIAL = {
    "task_id": "Own/1",
    "prompt": HALF["prompt"],
    "entry_point": "half",
    "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    import random\n    assert candidate(2) == 1\n    for _ in range(3):\n"
    "        x = random.randint(5, 9)\n        assert candidate(x) == x / 2\n",
}
MATHS = [
    {"problem": "One and one?", "answer": 2.0, "id": 7},
    {"question": "Half?", "final_answer": ["$\\frac{1}{2}$"]},
    {"problem": "Ten?", "solution": "so $\\boxed{10}$ m"},
    {"question": "A dozen?", "answer": "2*6=12\n#### 12"},
]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def call(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "eval_passk.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        **options,
    )


def scored(tmp_path, name, file, rows, ks=None, **options):
    samples = write(tmp_path / "samples.jsonl", rows)
    result = score.score(str(samples), load(f"{name}={file}"), ks, str(tmp_path / "out"), **options)
    return result, [json.loads(line) for line in (tmp_path / "out" / "graded.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- benchmarks


def test_the_fields_of_every_maths_file(tmp_path):
    benchmark = load(f"math500={write(tmp_path / 'm.jsonl', MATHS)}")
    assert [item.task.answer for item in benchmark.items] == ["2", r"\frac{1}{2}", "10", "12"]
    assert [item.task_id for item in benchmark.items] == ["7", "1", "2", "3"]
    with pytest.raises(ValueError, match="line 2: there is no reference answer"):
        load(f"aime24={write(tmp_path / 'n.jsonl', [MATHS[0], {'problem': 'x', 'solution': 'none'}])}")


def test_livecodebench_calls_become_arguments_of_f(tmp_path):
    row = {
        "question_id": "1",
        "id": "s",
        "function_name": "g",
        "code": "def g(a, b):\n    return a + b",
        "input": "g(1, b = 2)",
        "output": "3",
    }
    [item] = load(f"livecodebench-execution={write(tmp_path / 'l.jsonl', [row])}").items
    assert item.task.input == "1, b = 2" and item.task.program.endswith("f = g") and item.task_id == "1/s"


def test_unknown_names_and_broken_files_are_one_line(tmp_path):
    crux = write(tmp_path / "c.jsonl", [*CRUX, CRUX[0]])
    for name, said in (
        ("humanevl", "did you mean humaneval"),
        ("tiny=", "name of a file"),
        (f"cruxeval-o={crux}", "line 3: the problem a is there twice"),
        ("math500=/none/x", "no such file"),
        (f"gsm8k={crux}", "line 1: the key 'problem' is missing"),
        ("humaneval+", "humaneval\\+=FILE"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            load(name)
        assert "\n" not in str(caught.value)


def test_templates(tmp_path):
    crux, maths = load(f"cruxeval-o={write(tmp_path / 'c', CRUX)}"), load(f"gsm8k={write(tmp_path / 'm', MATHS)}")
    code = load(f"humaneval+={write(tmp_path / 'h', [HALF])}")
    tiny = load("tiny")
    assert len(tiny.items) == 2100 and prompt(tiny.items[0], "tiny").startswith("User: solve deduction")
    assert prompt(code.items[0], "plain") == HALF["prompt"] and HALF["prompt"] in prompt(code.items[0], "azr")
    assert "[4, 5]" not in prompt(crux.items[0], "plain")
    assert stop_strings(code, "plain") and stop_strings(crux, "azr") == ("</answer>",)
    hashes = {template_hash(b, t) for b in (crux, code) for t in ("azr", "plain")}
    assert len(hashes) == 4 and template_hash(crux, "azr") == template_hash(maths, "azr")
    for item, template in ((code.items[0], "tiny"), (crux.items[0], "nope")):
        with pytest.raises(ValueError, match="template"):
            prompt(item, template)


class ChatTokenizer:
    chat_template = "{{ messages }}"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return f"<user>{messages[0]['content']}<assistant>"


def test_the_chat_template_is_the_tokenizers(tmp_path):
    item = load(f"gsm8k={write(tmp_path / 'm', MATHS)}").items[0]
    assert prompt(item, "chat", ChatTokenizer()).startswith("<user>One and one?")
    with pytest.raises(ValueError, match="no chat template"):
        prompt(item, "chat", None)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    "text",
    [
        "[4, 5]",
        "so\n```output\n[4, 5]\n```",
        "[ANSWER]\n[4, 5]\n[/ANSWER]",
        "f(4) == [4, 5]",
        "assert f(4) == [4, 5]",
        "I think the answer is: [4, 5]\nbye",
        "</think> <answer>```output\n[4, 5]\n```</answer>",
        "```\n1\n```\n```\n[4, 5]\n```",
    ],
)
def test_a_literal_is_found(text):
    assert task_answer("deduction", text) == "[4, 5]"


def test_an_input_is_found():
    for text, found in (
        ("f(4, 'a')", "4, 'a'"),
        ("4, 'a'", "4, 'a'"),
        ("assert f(4, ')') == (1)", "4, ')'"),
        ("f()", ""),
        ("", ""),
        ("```input\n1\n```", "1"),
    ):
        assert task_answer("abduction", text) == found


def test_a_program_is_found(tmp_path):
    problem = load(f"humaneval+={write(tmp_path / 'h', [HALF])}").items[0].code
    whole = HALF["prompt"] + HALF["canonical_solution"].rstrip()
    for text in (
        f"Here:\n```python\n{whole}\n```\nand a test:\n```python\nhalf(2)\n```",
        f"</think><answer>\n```python\n{whole}\n```\n</answer>",
    ):
        assert program_text(problem, text) == whole
    assert program_text(problem, "    return x / 2\n") == "    return x / 2\n"


def test_linear_in_the_response(tmp_path):
    benchmark = load(f"cruxeval-o={write(tmp_path / 'c', CRUX)}")
    texts = [part * (2_000_000 // len(part)) for part in ("x", "[", "[ANSWER]", "answer is ", "f()", "<answer>")]
    answers = [Answer("a", text, "completion") for text in texts]
    with Grader(benchmark, workers=1) as grader:
        assert cpu_seconds(lambda: grader.grade(answers), 10) < 10
        assert not any(grade.correct for grade in grader.grade(answers))


# ---------------------------------------------------------------- score


def test_cruxeval_both_ways(tmp_path):
    file = write(tmp_path / "c.jsonl", CRUX)
    rows = [{"task_id": row["id"], "answer": row["output"]} for row in CRUX] + [
        {"task_id": "a", "answer": "[4,6]"},
        {"task_id": "b", "answer": "f("},
    ]
    result, graded = scored(tmp_path, "cruxeval-o", file, rows, [1])
    assert [row["correct"] for row in graded] == [True, False, True, False]
    assert result["pass@k"]["1"]["mean"] == 0.5 and result["samples_per_problem"] == 2 and result["problems"] == 2
    assert graded[0]["answer"] == "[4, 5]" and [row["sample"] for row in graded] == [0, 1, 0, 1]
    result, _ = scored(tmp_path, "cruxeval-i", file, [{"task_id": row["id"], "answer": row["input"]} for row in CRUX])
    assert result["pass@k"]["1"]["mean"] == 1


def test_base_and_plus_are_both_reported(tmp_path):
    rows = [
        {"task_id": "Own/1", "completion": "    return x / 2\n"},
        {"task_id": "Own/1", "solution": "def half(x):\n    return x // 2"},
        {"task_id": "Own/1", "completion": "    return None\n"},
        {"task_id": "Own/1", "completion": "    return x / 2 + 1\n"},
    ]
    file = write(tmp_path / "h.jsonl", [HALF])
    for name, hits in (("humaneval+", 1), ("humaneval", 2)):
        result, graded = scored(tmp_path, name, file, rows, [1])
        assert result["pass@k"]["1"]["mean"] == hits / 4
        assert (result["pass@k_base"]["1"]["mean"], result["pass@k_plus"]["1"]["mean"]) == (0.5, 0.25)
    result, graded = scored(tmp_path, "humaneval", write(tmp_path / "o.jsonl", [OFFICIAL]), rows, [1])
    assert [row["correct"] for row in graded] == [True, False, False, False] and "pass@k_base" not in result


def test_whatever_an_answer_holds_it_is_graded(tmp_path):
    rows = [{"task_id": "a", "answer": text} for text in ("\ud800", "\0", None, 17, "9" * 10_000_000, "[" * 1_000_000)]
    _, graded = scored(tmp_path, "cruxeval-o", write(tmp_path / "c.jsonl", CRUX), rows, [1])
    reasons = [row["reason"] for row in graded]
    assert reasons == ["syntax", "syntax", "no_answer", "wrong", "too_large", "too_large"]


def test_truncation(tmp_path):
    pytest.importorskip("math_verify")
    file = write(tmp_path / "m.jsonl", MATHS[:1] + MATHS[2:])
    rows = [
        {"task_id": "7", "completion": "so \\boxed{2}", "finish_reason": "eos", "tokens": 4},
        {"task_id": "7", "completion": "let me", "finish_reason": "length", "tokens": 9},
        {"task_id": "1", "completion": "#### 10", "finish_reason": "eos", "tokens": 2},
        {"task_id": "1", "completion": "#### 11", "finish_reason": "eos", "tokens": 2},
        {"task_id": "2", "completion": "#### 1", "finish_reason": "eos", "tokens": 2},
        {"task_id": "2", "completion": "#### 2", "finish_reason": "length", "tokens": 2},
    ]
    result, _ = scored(tmp_path, "gsm8k", file, rows, [1])
    assert result["truncation"]["share"] == pytest.approx(1 / 3)
    assert result["truncation"]["pass@1"] == pytest.approx(1 / 3)
    assert result["truncation"]["pass@1_without_truncated"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "rows, said",
    [
        ([{"task_id": "z", "answer": "1"}], "line 1: cruxeval-o has no problem 'z'; its first ids are a"),
        ([{"task_id": "a"}], "lacks a completion"),
        ([{"answer": "1"}], "task_id is missing"),
        (["{"], None),
        (["x", {"task_id": "a", "answer": "1"}], "line 1: not a JSON"),
        ([{"task_id": "a", "sample": 0, "answer": "1"}] * 2, "sample 0 of a is there twice"),
        ([], "holds no samples"),
        ([{"task_id": "a", "answer": [1]}], "expected text, found list"),
        (["[1]"], "expected a JSON object"),
    ],
)
def test_bad_samples_are_refused(tmp_path, rows, said):
    benchmark = load(f"cruxeval-o={write(tmp_path / 'c.jsonl', CRUX)}")
    with pytest.raises(ValueError, match=said) as caught:
        score.read_samples(write(tmp_path / "s.jsonl", rows), benchmark)
    assert "\n" not in str(caught.value)


def test_a_torn_last_line_is_refused_by_file_and_line(tmp_path):
    benchmark = load(f"cruxeval-o={write(tmp_path / 'c.jsonl', CRUX)}")
    (tmp_path / "s.jsonl").write_text('{"task_id": "a", "answer": "1"}\n{"task_id": "b", "ans')
    with pytest.raises(ValueError, match=r"s\.jsonl, line 2: not a JSON line .* was cut off in its writing$"):
        score.read_samples(tmp_path / "s.jsonl", benchmark)


def test_score_needs_no_torch_and_k_above_n_is_refused(tmp_path):
    file, out = write(tmp_path / "c.jsonl", CRUX), tmp_path / "out"
    samples = write(tmp_path / "s.jsonl", [{"task_id": row["id"], "answer": row["output"]} for row in CRUX])
    code = (
        "import runpy, sys\nsys.argv[0] = 'eval_passk.py'\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as done:\n    print('exit', done.code, 'torch' in sys.modules)"
    )
    arguments = ["score", str(samples), "--benchmark", f"cruxeval-o={file}", "--out", str(out)]
    for more, said in (([], "exit 0 False"), (["--k", "2"], "exit 2 False")):
        done = subprocess.run([sys.executable, "-c", code, *arguments, *more], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.splitlines()[-1] == said, done.stderr
    assert "has only 1 samples" in done.stderr and done.stderr.count("\n") == 1
    assert json.loads((out / "result.json").read_text())["made_by"] == "score"


# ---------------------------------------------------------------- run


def settings(**changes):
    given = {
        "model": "tiny",
        "adapter": None,
        "quantization": None,
        "dtype": None,
        "template": None,
        "samples": 6,
        "temperature": 1.0,
        "top_p": 0.95,
        "max_new_tokens": 40,
        "seed": 0,
        "match_entropy": False,
    }
    return run.settings_of(Namespace(**{**given, **changes}), TINY)[0]


TINY = evenly_spread(load("tiny"), 5)


def test_a_part_of_a_benchmark_is_evenly_spread():
    whole = load("tiny")
    assert evenly_spread(whole, None) == evenly_spread(whole, 9999) == whole and whole.part is None
    few = evenly_spread(whole, 30)
    assert Counter(item.task.mode for item in few.items) == dict.fromkeys(("deduction", "abduction", "induction"), 10)
    assert len({item.task.program.count("\n") for item in few.items if item.task.mode == "deduction"}) > 4
    assert few.part == "30 problems, evenly spread over the 2100"


def sampled(settings, benchmark, out):
    """(samples, what describes them) of a run at one temperature."""
    ((rows, info),) = run.run_each([(settings, out)], benchmark, score.Alone())
    return rows, info


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("run")
    rows, info = sampled(settings(), TINY, out)
    return out, (out / "samples.jsonl").read_bytes(), rows, info


def test_a_run_describes_itself(whole):
    out, _, rows, info = whole
    assert {(row.task_id, row.sample) for row in rows} == {(item.task_id, j) for item in TINY.items for j in range(6)}
    assert info["quantization"] == "none" and info["template"] == "tiny" and info["decoding"]["temperature"] == 1.0
    result = score.conclude(TINY, rows, out, [1, 3], {**info, "made_by": "run"})
    assert result["samples_per_problem"] == 6 and list(result["pass@k"]) == ["1", "3"]
    assert result["revision"].startswith("sha256:") and len((out / "graded.jsonl").read_text().splitlines()) == 30


@pytest.mark.parametrize("keep", [0.0, 0.45, 0.97])
def test_an_interrupted_run_goes_on_to_the_same_file(whole, tmp_path, keep):
    _, data, _, info = whole
    (tmp_path / "samples.jsonl").write_bytes(data[: int(keep * len(data))])
    (tmp_path / "config.json").write_text(json.dumps(info))
    sampled(settings(), TINY, tmp_path)
    assert (tmp_path / "samples.jsonl").read_bytes() == data


def test_more_samples_add_only_the_missing_ones(whole, tmp_path):
    _, data, rows, _ = whole
    sampled(settings(samples=2), TINY, tmp_path)
    first = (tmp_path / "samples.jsonl").read_bytes()
    again, _ = sampled(settings(), TINY, tmp_path)
    after = (tmp_path / "samples.jsonl").read_bytes()
    assert after == data and set(first.splitlines()) < set(after.splitlines())
    fewer, _ = sampled(settings(samples=2), TINY, tmp_path)
    assert len(fewer) == 10 and (tmp_path / "samples.jsonl").read_bytes() == after


def test_a_stop_in_the_middle_of_a_cell_costs_no_finished_answer(whole, tmp_path, monkeypatch):
    write, written = run.append, []

    def stop_after_ten(file, row):
        if len(written) == 10:
            raise KeyboardInterrupt
        written.append(row)
        write(file, row)

    monkeypatch.setattr(run, "append", stop_after_ten)
    with pytest.raises(KeyboardInterrupt):
        sampled(settings(), TINY, tmp_path)
    assert len((tmp_path / "samples.jsonl").read_bytes().splitlines()) == 10
    monkeypatch.setattr(run, "append", write)
    sampled(settings(), TINY, tmp_path)
    assert (tmp_path / "samples.jsonl").read_bytes() == whole[1]


def test_several_temperatures_are_each_what_one_writes(whole, tmp_path, capsys):
    def main(temperatures, out, *more):
        words = ["run", "--model", "tiny", "--benchmark", "tiny", "--limit", "5", "--samples", "6", *more]
        code = eval_passk.main([*words, "--max-new-tokens", "40", "--temperature", temperatures, "--out", str(out)])
        return code, capsys.readouterr()

    out = tmp_path / "out"
    code, printed = main("1,0", out)
    assert code == 0 and "| greedy | 1 " in printed.out and "fewer than 2k" not in printed.err
    assert (out / "T1" / "samples.jsonl").read_bytes() == whole[1]
    for name in ("config.json", "result.json"):
        assert json.loads((out / "T1" / name).read_text()).items() >= whole[3].items(), name
    assert len((out / "T0" / "samples.jsonl").read_text().splitlines()) == 5
    result = json.loads((out / "frontier.json").read_text())
    assert list(result["temperatures"]) == ["1", "0"] and result["k"] == 2 and result["model"] == "tiny"
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    for words, why in (
        (("1", out), "holds the results of 2 temperatures"),
        (("1,0", whole[0]), "holds the samples of one temperature"),
        (("1,0", tmp_path / "new" / "deep", "--match-entropy"), "--match-entropy takes one --temperature"),
        (("1,0", tmp_path / "new" / "deep", "--model", "none"), "no model 'none'"),
        (("1,0", out, "--limit", "4"), "(part 5 problems, evenly spread over the 2100 -> 4 problems"),
        (("0.9,0.3", out, "--top-p", "0.5"), "made in another way (top_p 0.95 -> 0.5)"),  # than T1 beside them
    ):
        code, printed = main(*words)
        assert code == 2 and why in printed.err.splitlines()[-1]
    assert not (tmp_path / "new").exists() and sorted(path.name for path in out.glob("T*")) == ["T0", "T1"]


def test_a_directory_of_something_else_is_no_place_for_results(tmp_path):
    (tmp_path / "config.json").write_text('{"model": "tiny", "steps": 80}')
    with pytest.raises(ValueError, match=r"holds something else .* give another --out"):
        run.check_same({"benchmark": "tiny"}, tmp_path)


def test_other_settings_are_refused(whole):
    out, data, _, _ = whole
    with pytest.raises(ValueError, match="temperature 1.0 -> 0.5"):
        sampled(settings(temperature=0.5), TINY, out)
    with pytest.raises(ValueError, match="exceeds the model's context"):
        sampled(settings(max_new_tokens=100_000), TINY, out)
    assert (out / "samples.jsonl").read_bytes() == data


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A sharpened model: the base with its answers pushed by random LoRA weights."""
    import torch

    from azr.policy.policy import LoraSettings, Policy
    from azr.tasks.prompts import template_hash as hash_of

    directory = tmp_path_factory.mktemp("adapter")
    policy = Policy.load(model_path("tiny"), "none", LoraSettings(4, 8.0))
    torch.manual_seed(0)
    for parameter in policy.trainable_parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    policy.save_adapter(directory)
    (directory / "azr.json").write_text(
        json.dumps({**policy.info, "template": "tiny", "template_hash": hash_of("tiny")})
    )
    return directory


def test_an_adapter_is_measured_as_it_was_trained(adapter):
    found = settings(adapter=str(adapter), model=None)
    opened = found.opening
    assert (opened.quantization, opened.dtype, found.template) == ("none", "float32", "tiny")
    for name, value in (("quantization", "nf4"), ("template", "plain"), ("dtype", "bfloat16")):
        with pytest.raises(ValueError, match=f"--{name} {value} contradicts"):
            settings(adapter=str(adapter), **{name: value})
    asked = eval_passk.build_parser().parse_args(["run", "--benchmark", "tiny", "--dtype", "fp32"]).dtype
    assert settings(adapter=str(adapter), dtype=asked).opening.dtype == "float32"  # by the name that train_azr.py takes


def test_the_temperature_that_gives_the_bases_entropy(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "MATCH_ANSWERS", 40)
    _, info = sampled(settings(adapter=str(adapter), match_entropy=True, samples=1, temperature=0.5), TINY, tmp_path)
    matched = info["matched"]
    assert matched["temperature"] >= 0.5 and info["decoding"]["match_entropy"]
    close = abs(matched["entropy"] - matched["base_entropy"]) <= 0.05 * matched["base_entropy"]
    assert close or matched["temperature"] == 0.5 and matched["entropy"] >= matched["base_entropy"]
    _, again = sampled(settings(adapter=str(adapter), match_entropy=True, samples=1, temperature=0.5), TINY, tmp_path)
    assert again == info
    with pytest.raises(ValueError, match="needs --adapter"):
        settings(match_entropy=True)


def test_ctrl_c_keeps_what_is_finished_and_exits_0(tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        str(ROOT / "eval_passk.py"),
        "run",
        "--model",
        "tiny",
        "--benchmark",
        "tiny",
        "--samples",
        "64",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    path, deadline = out / "samples.jsonl", time.monotonic() + 240
    while not (path.exists() and path.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "the same command goes on" in said, errors
    lines = path.read_text().splitlines()
    assert 0 < len(lines) < 64 * 2100 and set(json.loads(lines[0])) == {
        "task_id",
        "sample",
        "completion",
        "tokens",
        "finish_reason",
    }


def test_bad_command_lines_exit_2_with_one_line(tmp_path):
    for arguments, said in (
        (["run", "--benchmark", "tiny", "--model", "tiny", "--samples", "4", "--k", "8"], "only 4 samples"),
        (["score", tmp_path / "none", "--benchmark", "tiny"], "cannot be read"),
    ):
        done = call(*arguments)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert call("--help").returncode == 0


# ---------------------------------------------------------------- the public files


@pytest.mark.parametrize("name, field, right", [("cruxeval-o", "output", 800), ("cruxeval-i", "input", 796)])
def test_cruxeval_as_in_its_public_file(name, field, right, tmp_path):
    file = DATA / "cruxeval.jsonl"
    if not file.is_file():
        pytest.skip("CRUXEval's file is not at hand")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    result, _ = scored(tmp_path, name, file, [{"task_id": row["id"], "answer": row[field]} for row in rows])
    assert result["reasons"]["ok"] == right


def test_maths_references_are_right_and_others_wrong(tmp_path):
    pytest.importorskip("math_verify")
    if not DATA.is_dir():
        pytest.skip("the public files are not at hand")
    names = {"math500": "math500", "aime24": "aime24", "amc23": "amc23", "olympiadbench": "olympiadbench"}
    for name, file in names.items():
        benchmark = load(f"{name}={DATA / file}.jsonl")
        items = benchmark.items[:: max(1, len(benchmark.items) // 20)]
        pairs = [(a, b) for a, b in zip(items, items[1:]) if a.task.answer != b.task.answer]
        with Grader(benchmark, workers=1) as grader:
            own = grader.grade(
                [Answer(a.task_id, f"So it is $\\boxed{{{a.task.answer}}}$.", "completion") for a in items]
            )
            other = grader.grade([Answer(a.task_id, f"So \\boxed{{{b.task.answer}}}", "completion") for a, b in pairs])
        assert all(grade.correct for grade in own), name
        assert sum(grade.correct for grade in other) <= 0.02 * len(pairs), name


def test_every_name_has_a_source():
    for name, source in BENCHMARKS.items():
        assert name == "tiny" or source.hub or source.page, name
