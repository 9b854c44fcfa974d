"""Files that are missing, empty, damaged or of another kind, given to every script: one line, exit code 2, and nothing
is written. Tasks whose stored outputs are wrong; adapters of another base."""

import gzip
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import analyze
import train_azr
from azr.evals.held_out import load_tasks
from azr.models import model_path
from azr.policy.opening import ModelError, Opening, agree, check_base, check_warm_start
from azr.tasks.__main__ import main as tasks
from azr.tiny import make
from azr.train.data import true_tasks
from in_process import run_here
from sandbox import Sandbox

HELD_OUT = Path(model_path("tiny")) / "held_out.jsonl"
LINE = HELD_OUT.read_text().splitlines()[0]
FILES = {
    "empty": b"",
    "binary": bytes(range(256)) * 9,
    "torn": f"{LINE}\n{LINE[:40]}".encode(),
    "latin": '{"mode": "é"}\n'.encode("latin-1"),
    "list": b"[1, 2]\n",
    "object": b'{"a": 1}\n',
    "text": b"Dear reader,\nthis is no JSON.\n",
    "deep": b"[" * 100_000,
    "zipped": gzip.compress(LINE.encode())[:50],
}
# (script, its words before and after the file)
READS = [
    (train_azr.main, ["--config"], []),
    (train_azr.main, ["--algorithm", "rlvr", "--data"], []),
    (train_azr.main, ["--algorithm", "sft", "--data"], []),
    (train_azr.main, ["--eval-data"], []),
    (train_azr.main, ["--off-policy-gamma", "0.5", "--off-policy-source"], []),
    (train_azr.main, ["--adapter"], []),
    (train_azr.main, ["--resume"], []),
    (train_azr.main, ["export"], ["--out", "new"]),
    (analyze.main, ["dynamics"], []),
    (analyze.main, ["health"], []),
    (analyze.main, ["report"], []),
    (analyze.main, ["entropy", "--run"], []),
    (analyze.main, ["sparsity", "--base", "tiny", "--adapter"], []),
    (tasks, ["make", "run"], ["new.jsonl"]),
    (tasks, ["make", "run", "--solutions"], ["new.jsonl"]),
]
WRITES = [
    (train_azr.main, ["--out"]),
    (analyze.main, ["rewards", "--out"]),
    (analyze.main, ["rewards", "--json"]),
    (tasks, ["make", "tiny", "--count", "2"]),
    (lambda words: make_tiny(words), ["--out"]),
    (lambda words: make_tiny(words), ["--work"]),
]


def make_tiny(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make.py", *words])
        make.main()


def assert_refused(main, words) -> None:
    before = sorted(Path.cwd().rglob("*"))
    done = run_here(main, *words)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2 and len(lines) == 1, (words, done.returncode, done.stderr)
    assert sorted(Path.cwd().rglob("*")) == before, words


def test_no_script_stumbles_over_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, data in FILES.items():
        Path(name).write_bytes(data)
    Path("folder").mkdir()
    for main, words, more in READS:
        for name in (*FILES, "folder", "missing/file"):
            assert_refused(main, [*words, name, *more])
    Path("text2").write_text("x")
    for main, words in WRITES:
        assert_refused(main, [*words, "text/below"])  # a file is no directory


def test_tasks_that_are_not_what_their_programs_give_are_left_out(capsys):
    given = load_tasks(HELD_OUT)
    right = [given[0], given[700], given[1400]]
    wrong = [replace(task, output="'no'") for task in right[:2]]
    wrong.append(replace(right[2], hidden=((right[2].hidden[0][0], "'no'"), *right[2].hidden[1:])))
    maths = replace(right[0], mode="math", question="1 + 1?", answer="2", program="", input="", output="")
    with Sandbox(1) as sandbox:
        s = SimpleNamespace(sandbox=sandbox)
        assert true_tasks(s, [*right, maths]) == [*right, maths] and not capsys.readouterr().err
        assert true_tasks(s, [*wrong, *right, maths]) == [*right, maths]
        assert "3 of 7 tasks of a file are not what their programs give (wrong 3): left out" in capsys.readouterr().err
        with pytest.raises(ValueError, match="3 of 3 tasks"):
            true_tasks(s, wrong)


def test_an_adapter_of_another_base_by_its_record_alone(tmp_path):
    base = model_path("tiny")
    info = {"base_model": base, "revision": "sha256:1", "tokenizer_hash": "t", "lora": {"rank": 1}}
    for record, refused in (
        ({"base_model": "tiny", "revision": "sha256:1"}, False),
        ({"base_model": "/elsewhere/azr/tiny", "revision": "sha256:1"}, False),  # a checkout that has moved
        ({"base_model": "tiny", "revision": "sha256:2"}, True),
        ({"base_model": "some/model"}, True),
        ({"base_model": "tiny"}, False),
        ({}, False),
    ):
        (tmp_path / "azr.json").write_text(json.dumps(record))
        for check in (
            lambda: check_warm_start(str(tmp_path), info, {"rank": 1}),
            lambda: check_base(Opening(base, tmp_path, record, "none", None, None), info),
        ):
            if refused:
                with pytest.raises(ValueError, match="another base"):
                    check()
            else:
                check()
    shutil.copy(tmp_path / "azr.json", tmp_path / "adapter_config.json")
    (tmp_path / "azr.json").write_text(json.dumps({"base_model": "/moved/azr/tiny", "quantization": "none"}))
    assert agree(None, tmp_path).model == base
    (tmp_path / "azr.json").write_text('{"dtype": {}}')
    with pytest.raises(ModelError, match="dtype must be text"):
        agree(None, tmp_path)
