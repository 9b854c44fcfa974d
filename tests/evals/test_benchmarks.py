"""Evaluation against answers whose verdicts are known."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from azr.drawing import png
from azr.evals import held_out
from azr.evals.held_out import EvalResult, TaskResult, evaluate, load_tasks, plot_pass_at_k

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- tasks

ROWS = [
    {"mode": "deduction", "program": "def f(a):\n    return [a, a + 1]", "input": "4", "output": "[4, 5]"},
    {"mode": "abduction", "program": "def f(a):\n    return a % 3", "input": "4", "output": "1"},
    {
        "mode": "induction",
        "program": "def f(a):\n    return a * 2",
        "message": "double it",
        "visible": [["1", "2"], ["2", "4"]],
        "hidden": [["3", "6"], ["'a'", "'aa'"]],
    },
]


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_load_tasks(tmp_path, capsys):
    tasks = load_tasks(write(tmp_path / "t.jsonl", [*ROWS, "", ROWS[0]]))
    assert [task.mode for task in tasks] == ["deduction", "abduction", "induction"]
    assert "1 lines repeat" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        "null",
        '{"mode": "deduction", "program": "def f(a): return a"}',
        '{"mode": "x"}',
        "\x00",
        "[" * 100_000,
    ],
)
def test_load_tasks_names_the_bad_line(tmp_path, line):
    path = write(tmp_path / "t.jsonl", [ROWS[0], line])
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: ")) as caught:
        load_tasks(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_load_tasks_refuses_an_empty_or_absent_file(tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\n")
    for name, message in (("empty", "no tasks"), ("absent", "no such"), ("binary", "line 1"), ("", "is a directory")):
        with pytest.raises(ValueError, match=message):
            load_tasks(tmp_path / name)


# ---------------------------------------------------------------- evaluation


class Scripted:
    """A policy that says given texts: characters are its tokens. It keeps the seeds it was asked with."""

    def __init__(self, answers):
        self.answers, self.seeds, self.calls = iter(answers), [], 0

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def generate(self, prompts, n, sampling, seeds):
        from azr.policy.engine import Completion

        self.seeds += seeds
        self.calls += 1
        texts = [[next(self.answers) for _ in range(n)] for _ in prompts]
        return [
            [
                Completion([ord(c) for c in text], [0.0] * len(text), "stop" if text.endswith(">") else "length")
                for text in row
            ]
            for row in texts
        ]


def response(tag, text):
    return f"it follows</think>\n<answer>\n```{tag}\n{text}\n```\n</answer>"


ANSWERS = [
    response("output", "[4, 5]"),
    response("output", "[4,5]"),
    response("output", "[4, 6]"),
    "no idea",
    response("input", "4"),
    response("input", "7"),
    response("input", "5"),
    response("input", "7"),
    response("python", "def f(a):\n    return a + a"),
    response("python", "def f(a):\n    return a + a"),
    response("python", "def f(a):\n    return 2 * int(a)"),
    response("python", "def f(a)\n    return"),
]


@pytest.fixture(scope="module")
def sandbox():
    from sandbox import Sandbox

    with Sandbox() as box:
        yield box


def run(tmp_path, sandbox, answers, seed=0, progress=None):
    from azr.policy.engine import Sampling

    tasks, policy = load_tasks(write(tmp_path / "t.jsonl", ROWS)), Scripted(answers)
    return evaluate(policy, tasks, 4, Sampling(max_new_tokens=64), "azr", sandbox, seed, progress), policy


def test_evaluate_counts_what_the_answers_are_worth(tmp_path, sandbox):
    seen = []
    result, policy = run(tmp_path, sandbox, ANSWERS, progress=lambda done, total: seen.append((done, total)))
    assert [task.correct for task in result.tasks] == [2, 3, 2]
    assert [task.distinct_correct for task in result.tasks] == [1, 2, 1]
    assert [task.truncated for task in result.tasks] == [1, 0, 0]
    assert [task.well_formed for task in result.tasks][:2] == [3, 4]
    assert [task.infra for task in result.tasks] == [0, 0, 0]
    assert result.tasks[0].tokens == [len(text) for text in ANSWERS[:4]]
    assert seen[-1] == (3, 3)
    metrics = result.metrics()
    assert metrics["held_out/abduction/accuracy"] == 0.75 and metrics["held_out/all/accuracy"] == pytest.approx(7 / 12)
    assert metrics["held_out/deduction/accuracy_well_formed"] == pytest.approx(2 / 3)
    assert json.loads(json.dumps(result.to_json())) == EvalResult.from_json(result.to_json()).to_json()


def test_every_sample_has_its_own_lasting_seed(tmp_path, sandbox, monkeypatch):
    first, policy = run(tmp_path, sandbox, ANSWERS)
    seeds = list(itertools.chain(*policy.seeds))
    assert len(set(seeds)) == 12 and all(0 <= seed < 2**64 for seed in seeds)
    assert held_out.sample_seed(0, "abc", 1) == 9302858396499162942  # the same on every machine, for good
    monkeypatch.setattr(held_out, "ANSWERS_PER_CALL", 4)
    parts, other = run(tmp_path, sandbox, ANSWERS)
    assert other.calls == 3 and other.seeds == policy.seeds and parts.to_json() == first.to_json()
    assert not set(seeds) & set(itertools.chain(*run(tmp_path, sandbox, ANSWERS, seed=1)[1].seeds))


def test_evaluate_refuses_nothing(tmp_path, sandbox):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(Scripted([]), [], 4, None, "azr", sandbox, 0)


# ---------------------------------------------------------------- comparison and plot


def made_up(rng, gain, samples=16, problems=40):
    tasks = []
    for index in range(problems):
        correct = int(rng.binomial(samples, min(1, (index / problems) ** 2 + gain)))
        tasks.append(
            TaskResult(
                f"{index:x}",
                ("deduction", "abduction")[index % 2],
                samples,
                correct,
                samples,
                correct,
                1,
                0,
                0,
                [5] * samples,
            )
        )
    return EvalResult(tasks, {"template": "tiny", "sampling": {"temperature": 1.0}})


def test_difference_finds_a_gain_and_refuses_other_tasks_or_settings():
    rng = np.random.default_rng(6)
    base, trained = made_up(rng, 0), made_up(rng, 0.2)
    assert held_out.difference(base, trained, 1).excludes_zero
    assert held_out.well_formed_difference(base, trained, "abduction").low > 0
    assert re.fullmatch(r"0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", str(held_out.difference(base, trained, 1, "deduction")))
    other = made_up(rng, 0)
    other.tasks.reverse()
    with pytest.raises(ValueError, match="same tasks"):
        held_out.difference(base, other)
    other = made_up(rng, 0)
    other.settings["sampling"] = {"temperature": 0.6}
    with pytest.raises(ValueError, match="differ in sampling"):
        held_out.well_formed_difference(base, other)
    with pytest.raises(ValueError, match="not an evaluation result"):
        EvalResult.from_json({"tasks": [{"hash": "a"}], "settings": {}})


def test_plot_has_a_panel_a_mode_and_one_for_all(tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    rng, path = np.random.default_rng(7), tmp_path / "p.png"
    path.write_bytes(png(plot_pass_at_k(made_up(rng, 0), made_up(rng, 0.2), "trained")))
    image = matplotlib_image.imread(path)
    assert image.shape[1] > 2.5 * image.shape[0] and len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50
    with pytest.raises(ValueError, match="k must lie between"):
        plot_pass_at_k(made_up(rng, 0), made_up(rng, 0), "trained", ks=[1, 32])


def test_no_torch_is_imported():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import azr.evals.benchmarks; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# ---------------------------------------------------------------- CRUXEval


def test_cruxeval_is_read_from_its_public_file():
    from azr.evals.benchmarks import cruxeval_tasks

    path = Path(__file__).parents[2].parent / "shared" / "data" / "benchmarks" / "cruxeval.jsonl"
    if not path.is_file():
        pytest.skip("CRUXEval's file is not at hand")
    tasks = cruxeval_tasks(200, f"cruxeval-o={path}")
    assert [task.mode for task in tasks] == ["deduction"] * 200 + ["abduction"] * 200
    assert tasks == cruxeval_tasks(200, f"cruxeval-o={path}") and len({task.hash for task in tasks}) == 400
    assert [task.program for task in tasks[:200]] == [task.program for task in tasks[200:]]


def test_a_file_that_is_not_cruxeval_is_refused(tmp_path):
    from azr.evals.benchmarks import cruxeval_tasks

    (tmp_path / "x.jsonl").write_text('{"code": "def f(x): return x"}\n')
    with pytest.raises(ValueError, match="line 1: the key 'input' is missing"):
        cruxeval_tasks(1, f"cruxeval-o={tmp_path / 'x.jsonl'}")
