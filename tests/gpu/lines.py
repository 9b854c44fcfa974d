"""The lines of bench_gpu.py: written, read, shown. No torch, so that the process that watches starts at once."""

from __future__ import annotations

import json
from pathlib import Path

LOST = 17  # exit code: the CUDA context is beyond use, a new process is needed


def append(path: Path, row: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, default=str) + "\n")
        file.flush()


def read_lines(path: Path) -> list[dict]:
    """The rows of a file of this benchmark; a last line that was cut off is passed over."""
    rows = []
    if Path(path).is_file():
        for text in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(text))
            except ValueError:
                continue
    return rows


def shown(row: dict) -> str:
    """The row for human eyes, lists and tables left out."""
    state = "left out" if "left_out" in row else "ok" if row["ok"] else "FAILED"
    figures = [f"{key} {number(value)}" for key, value in row["figures"].items() if not isinstance(value, (list, dict))]
    if rows := row["figures"].get("each"):
        figures += [f"... {key} {number(value)}" for key, value in rows[-1].items()]
    text = row.get("left_out") or "  ".join([*([row["error"]] if "error" in row else []), *figures])
    return f"{row['part']:9} {row['name']:34.34} {state:8} {row['seconds']:6.1f} s  {text}"[:400]


def number(value) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def summary(rows: list[dict]) -> str:
    """One line a part: how many measurements hold, failed, were left out, and its seconds."""
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        left, failed = sum("left_out" in row for row in mine), [row["name"] for row in mine if not row["ok"]]
        lines.append(
            f"{part:9} {len(mine) - left - len(failed):3} hold {len(failed):3} failed {left:3} left out "
            f"{sum(row['seconds'] for row in mine):7.1f} s  {'; '.join(failed)}".rstrip()
        )
    return "\n".join(lines)
