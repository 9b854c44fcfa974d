"""Puts the repository root first on the path, so that `pytest` works from anywhere."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
