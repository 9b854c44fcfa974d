"""Puts the repository root first on the path, so that `pytest` works from anywhere, and keeps torch to one thread: on
a machine that does other things too, small matrices on several threads wait for each other most of the time."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
