"""Puts the repository root first on the path, so that `pytest` works from anywhere, and keeps torch to one thread: on
a machine that does other things too, small matrices on several threads wait for each other most of the time."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
