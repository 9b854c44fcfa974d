"""Puts the repository root first on the path, so that `pytest` works from anywhere, and keeps torch to one thread: on
a machine that does other things too, small matrices on several threads wait for each other most of the time."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Files that take longest. Whoever begins one of them last makes the other worker wait.
LONGEST = (
    "test_train.py",
    "test_faults.py",
    "test_bench_gpu.py",
    "test_eval_passk.py",
    "test_arms_run.py",
    "test_engine.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def few_held_out(tmp_path_factory) -> Path:
    """A file of two held-out tasks a mode: a run that is evaluated on all of its own takes seconds to read them."""
    lines = (ROOT / "azr" / "tiny" / "held_out.jsonl").read_text().splitlines()
    path = tmp_path_factory.mktemp("data") / "held_out.jsonl"
    path.write_text("\n".join(lines[0:2] + lines[700:702] + lines[1400:1402]) + "\n")
    return path
