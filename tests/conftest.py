"""Puts the repository root first on the path, so that `pytest` works from anywhere, and keeps torch to one thread: on
a machine that does other things too, small matrices on several threads wait for each other most of the time."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["AZR_CACHE"] = ""  # what one test leaves behind is no other's business, and no user's
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Files that take more than 25 CPU seconds, the longest first. Whoever begins one of them last makes the other worker
# wait.
LONGEST = (
    "test_arms_run.py",
    "test_faults.py",
    "test_train.py",
    "test_bench_gpu.py",
    "test_engine.py",
    "test_sandbox_attacks.py",
    "test_doctor.py",
    "test_update.py",
    "test_eval_passk.py",
    "test_loss_scale.py",
    "test_difficulty.py",
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def few_held_out(tmp_path_factory) -> Path:
    """A file of two held-out tasks a mode: a run that is evaluated on all of its own takes seconds to read them."""
    lines = (ROOT / "azr" / "tiny" / "held_out.jsonl").read_text().splitlines()
    path = tmp_path_factory.mktemp("data") / "held_out.jsonl"
    path.write_text("\n".join(lines[0:2] + lines[700:702] + lines[1400:1402]) + "\n")
    return path
