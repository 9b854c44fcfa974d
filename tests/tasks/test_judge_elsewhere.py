"""docs/trl_judge.py: the rewards that another trainer gets are those of this project's judge."""

import importlib.util
import json
from pathlib import Path

from azr.jsonl import write_jsonl_atomic
from azr.tasks import Task
from sandbox import Sandbox

ROOT = Path(__file__).parents[2]
PROGRAM = "def f(x):\n    return x * 2"
TASKS = [
    Task("deduction", PROGRAM, "4", "8"),
    Task("abduction", PROGRAM, "4", "8"),
    Task("induction", PROGRAM, message="doubles", visible=(("1", "2"), ("2", "4")), hidden=(("3", "6"), ("5", "10"))),
]
RIGHT = {"deduction": "```output\n8\n```", "abduction": "```input\n4\n```", "induction": f"```python\n{PROGRAM}\n```"}


def test_rewards_of_right_wrong_and_malformed_answers(tmp_path):
    spec = importlib.util.spec_from_file_location("trl_judge", ROOT / "docs" / "trl_judge.py")
    trl_judge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trl_judge)
    write_jsonl_atomic(tmp_path / "tasks.jsonl", [task.to_json() for task in TASKS])
    rows = trl_judge.rows_of(tmp_path / "tasks.jsonl")
    assert [json.loads(row["task"])["mode"] for row in rows] == list(RIGHT)
    texts = [f"<think>so</think><answer>{RIGHT[task.mode]}</answer>" for task in TASKS]
    texts += [text.replace("8", "9").replace("4", "5").replace("* 2", "+ 2") for text in texts] + ["8"] * 3
    columns = [row["task"] for row in rows] * 3
    with Sandbox(workers=1) as sandbox:
        rewards = trl_judge.JudgeReward(sandbox)(completions=texts, task=columns, prompts=[], trainer_state=None)
    assert rewards == [1.0] * 3 + [-0.5] * 3 + [-1.0] * 3
