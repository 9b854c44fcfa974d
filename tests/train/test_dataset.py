"""The data set of a run's tasks: what each row says, what the card says, and that the file can be read again."""

import json
import re

import pytest
from huggingface_hub import DatasetCard

from azr.tasks import Task
from azr.train import dataset, make_data

LONG = "def f(a):\n    b = a + 1\n    return [b, b, a]"
TASKS = [
    (Task("deduction", program=LONG, input="1", output="[2, 2, 1]"), 0),
    (Task("abduction", program="def f(a):\n    return a", input="1", output="1"), 2),
    (
        Task(
            "induction", program=LONG, message="Say | it.", visible=(("1", "[2, 2, 1]"),), hidden=(("2", "[3, 3, 2]"),)
        ),
        2,
    ),
]


@pytest.fixture
def run(tmp_path):
    """A run directory in which the second task was proposed twice and answered in two steps."""

    def line(step, role, reward, rate):
        row = {
            "step": step,
            "role": role,
            "mode": "abduction",
            "task": TASKS[1][0].to_json(),
            "prompt": "",
            "response": "",
        }
        return row | {"tokens": 1, "finish_reason": "stop", "reward": reward, "reason": "ok", "solve_rate": rate}

    refused = line(2, "proposer", {"reward": -1}, None) | {"task": None}
    rows = [refused, line(2, "proposer", {"reward": 0.5}, 0.5), line(3, "proposer", {"reward": -1}, None)]
    rows += [line(step, "solver", {"correct": correct}, 0.5) for step, correct in ((2, True), (2, False), (3, True))]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "config.json").write_text(json.dumps({"model": "some/model", "recipe": "lean", "seed": 0}))
    return folder


@pytest.fixture
def near(tmp_path):
    """A benchmark whose second problem begins as LONG does and ends otherwise."""
    path, codes = tmp_path / "cruxeval.jsonl", ["def f(a):\n    return a * 2", LONG.replace("a]", "7, a, a]")]
    rows = [{"id": f"sample_{i}", "code": code, "input": "1", "output": "2"} for i, code in enumerate(codes)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return [f"cruxeval-o={path}"]


def test_rows_and_card(run, near):
    first, second, third = rows = list(dataset.rows_of(run, TASKS, near))
    assert [list(row) for row in rows] == [list(dataset.COLUMNS)] * 3
    assert [row["hash"] for row in rows] == [task.hash for task, _ in TASKS]
    # answers of all steps count, the rate is that of the step in which the task came
    assert (second["step"], second["solve_rate"], second["answers"], second["correct"]) == (2, 0.5, 3, 2)
    assert first["solve_rate"] is None and first["answers"] == 0 and first["input"] == "1" and first["visible"] is None
    assert third["visible"] == [{"input": "1", "output": "[2, 2, 1]"}] and third["output"] is None
    # 19 tokens have 7 13-grams, of which 5 end before the 18th, which is another in the benchmark
    assert (first["near"], first["tokens"], first["statements"]) == (["cruxeval-o/sample_1"], 19, 3)
    assert first["near_share"] == 5 / 7 and second["near"] == [] and second["near_share"] == 0
    card = dataset.data_card(rows, {"model": "some/model", "recipe": "lean"}, "tasks.parquet", near)
    data, text = DatasetCard(card).data.to_dict(), re.sub(" +", " ", card)  # columns are filled up with spaces
    assert data["configs"] == [{"config_name": "default", "data_files": "tasks.parquet"}]
    assert data["size_categories"] == ["n<1K"] and data["license"] == "unknown" and "model" in data["pretty_name"]
    assert "| up to 1/2 | 0 | 1 | 0 |" in text and "| not measured | 1 | 0 | 1 |" in text
    assert "| cruxeval-o | 1 | 2 | 2 |" in text and "| recipe | lean |" in text and dataset.MARK in text


def test_the_file_can_be_read_again(run, near, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(dataset, "ROWS", 2)
    out = tmp_path / "data" / "tasks.parquet"
    out.parent.mkdir()
    for _ in range(2):  # a card of this command is replaced
        dataset.write_parquet(run, out, TASKS, near)
    assert parquet.ParquetFile(out).num_row_groups == 2
    for row, again in zip(dataset.rows_of(run, TASKS, near), parquet.read_table(out).to_pylist(), strict=True):
        assert again == row | {"near_share": pytest.approx(row["near_share"])}  # which is fp32 there
    (out.parent / "README.md").write_text("somebody's own")
    with pytest.raises(ValueError, match="directory of its own"):
        dataset.write_parquet(run, out, TASKS, near)
    with pytest.raises(ValueError, match="no such file"):
        dataset.write_parquet(run, tmp_path / "other.parquet", TASKS, ["cruxeval-o=nowhere.jsonl"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cruxeval.jsonl", "data", "run"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["run", "RUN", "tasks.jsonl", "--near", "humaneval"], "take a name with .parquet"),
        (["run", "RUN", "tasks.parquet", "--solutions"], "only the tasks of a run"),
        (["tiny", "tasks.parquet"], "only the tasks of a run"),
    ],
)
def test_what_is_no_data_set_is_refused(flags, words, run, capsys):
    assert make_data.main([str(run) if flag == "RUN" else flag for flag in flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line
