"""Files of bench_gpu.py as Markdown: a table for each kind of measurement, and the planner beside what was measured.

Everything between the markers of docs/gpu.md is made by `filled`; the text around it is written by hand.
"""

from __future__ import annotations

from pathlib import Path

from gpu.lines import number, read_lines

START, END = "<!-- tables: python tests/bench_gpu.py tables -->", "<!-- end of tables -->"
LONGEST = 9  # rows of a list among the figures, such as the kernels that took most; the file has them all
PLANS = (("", ""), (" rollout", " rollout"), (" training", " training"))


def tables(files: list[Path]) -> str:
    """One section a file, in the order of the files. ValueError: a file without a measurement."""
    sections = []
    for file in files:
        rows = [row for row in read_lines(file) if "part" in row]
        if not rows:
            raise ValueError(f"{file}: holds no measurement of bench_gpu.py")
        sections.append(section(Path(file).name, latest(rows)))
    return "\n\n".join(sections)


def latest(rows: list[dict]) -> list[dict]:
    """A measurement made twice counts as it came out last, unless it was left out then."""
    found: dict[tuple, dict] = {}
    for row in rows:
        key = row["part"], row["name"]
        if key not in found or "left_out" not in row:
            found[key] = row
    return list(found.values())


def section(name: str, rows: list[dict]) -> str:
    blocks = [f"## {name}", counts(rows)]
    for table in dict.fromkeys(row["table"] for row in rows):
        mine = [row for row in rows if row["table"] == table and row["figures"]]
        if mine:
            blocks += [f"### {table}", *of_kind(mine)]
    planned = plans(rows)
    if planned:
        blocks += ["### planner beside measurement, GB", markdown(planned)]
    why = lambda row: row.get("left_out") or row.get("error", "not right")  # noqa: E731
    bad = [
        {"part": row["part"], "measurement": row["name"], "why": why(row)}
        for row in rows
        if "left_out" in row or not row["ok"]
    ]
    if bad:
        blocks += ["### failed or left out", markdown(bad)]
    return "\n\n".join(blocks)


def counts(rows: list[dict]) -> str:
    left = sum("left_out" in row for row in rows)
    failed = sum(not row["ok"] for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    hold = len(rows) - failed - left
    return f"{len(rows)} measurements in {seconds:.0f} s: {hold} hold, {failed} failed, {left} left out."


def of_kind(rows: list[dict]) -> list[str]:
    """The table of a kind; lists of kernels are tables of their own, the list "each" is the rows themselves."""
    flat, lists = [], []
    for row in rows:
        plain = {key: value for key, value in row["figures"].items() if not is_table(value)}
        each = row["figures"].get("each")
        shared = {key: value for key, value in plain.items() if not isinstance(value, (list, dict))}
        flat += [{"": row["name"], **one} for one in each] if is_table(each) else []
        flat += [{"": row["name"], **plain}] if not is_table(each) or len(shared) > 1 else []
        for key, value in row["figures"].items():
            if key != "each" and is_table(value) and "us" in value[0]:
                lists.append(f"{row['name']}, {key}:\n\n{markdown(value[:LONGEST])}")
    by_columns: dict[frozenset, list] = {}
    for row in flat:  # rows that share no column beside the name are tables of their own
        key = next((k for k in by_columns if len(k & row.keys()) > 1), frozenset(row))
        by_columns.setdefault(key, []).append(row)
    return [markdown(group) for group in by_columns.values()] + lists


def is_table(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def plans(rows: list[dict]) -> list[dict]:
    found = []
    for row in rows:
        for planned, measured in PLANS:
            plan, real = (row["figures"].get(f"{name} GB") for name in (f"planned{planned}", f"measured{measured}"))
            if isinstance(plan, (int, float)) and isinstance(real, (int, float)) and real > 0:
                found.append(
                    {
                        "part": row["part"],
                        "measurement": row["name"] + planned,
                        "planned": plan,
                        "measured": real,
                        "planned / measured": plan / real,
                    }
                )
    return found


def markdown(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {cell(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(item) for item in value)
    return number(value).replace("|", "/").replace("\n", " ")


def filled(page: str, files: list[Path]) -> str:
    """The page with new tables between its markers. ValueError: it has no markers."""
    before, marker, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not marker or not end:
        raise ValueError(f"the page has no lines {START} and {END}")
    return f"{before}{START}\n\n{tables(files)}\n\n{END}{after}"
