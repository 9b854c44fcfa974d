"""results/first_run.py: figures from made-up counts, the page they fill, and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "results"))

import first_run
from azr.evals.held_out import load_tasks
from first_run import FORCED, TEMPERATURES, THINKING, Figures
from gate_numbers import BEYOND, level, stratified

SAMPLES = 8
README = "a\n<!-- first-run -->\nold\n<!-- end -->\nb\n"
TINY = "a\n<!-- first-run-tables -->\n<!-- end -->\nc\n"


def pages(tmp_path: Path) -> list[str]:
    """The two pages with their markers, and the flags that name them."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs" / "tiny.md").write_text(TINY)
    return ["--pages", str(tmp_path)]


def made_up(tmp_path: Path, after: float, forced: float) -> dict:
    """first_run.json about a model directory with 18 tasks, two seeds. The base solves .2 of them, greedily half."""
    lines = [f"    {name}=x+{i}\n" for i, name in enumerate("pqrstu", 1)]
    programs = [f"def f(x):\n{''.join(lines[:size])}    return {'pqrstu'[size - 1]}" for size in range(1, 7)]
    tasks = [
        {"mode": mode, "program": program, "input": "1", "output": str(size + 1)}
        for mode in ("deduction", "abduction")
        for size, program in enumerate(programs, 1)
    ]
    for size in range(1, 7):
        pairs = [[str(i), str(i + size)] for i in range(10)]
        tasks.append(
            {
                "mode": "induction",
                "program": programs[size - 1],
                "message": "m",
                "visible": pairs[:5],
                "hidden": pairs[5:],
            }
        )
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    rng = np.random.default_rng(0)

    def rows(share: float, n: int, style: str, keep=lambda mode: True) -> list:
        right = (np.arange(len(tasks)) < share * len(tasks)) if n == 1 else rng.binomial(n, share, len(tasks))
        return [[i, {style: [n, int(x), 10 * n]}, n, 0] for i, x in enumerate(right) if keep(tasks[i]["mode"])]

    parts: dict = {"example": None}
    for t in TEMPERATURES:
        n = SAMPLES if t else 1
        parts[f"base T{t:g}"] = rows(0.2 if t else 0.5, n, "none")
        for seed in ("seed 0", "seed 1"):
            parts[f"{seed} T{t:g}"] = rows(after, n, "full")
    for t in THINKING:
        parts[f"{FORCED} T{t:g}"] = rows(forced, SAMPLES if t else 1, "full", lambda mode: mode != "abduction")
    names = ("proposer/MODE/valid_rate", "solver/MODE/response_tokens", "proposer/MODE/entropy", "solver/MODE/entropy")
    for seed in ("seed 0", "seed 1"):
        parts[f"{seed} training"] = {name: [[0.5, 0.5, None], [0.75, 0.75, 0.75]] for name in names}
    settings = {"model": str(tmp_path), "runs": {"seed 0": "x", "seed 1": "y"}, "samples": SAMPLES}
    return {"settings": settings, "parts": parts}


def test_the_sentence_follows_from_the_intervals(tmp_path):
    above = Figures(made_up(tmp_path, 1.0, 0.5))
    assert above.best == 0 and above.solved("after", 0).mean() == 1
    said = first_run.sentence(above)
    assert "solves 1.000 of the held-out tasks greedily: **above the base at its best temperature** (greedy: .5" in said
    assert "**above the base made to think in full** (.500;" in said and "step by step: 0 % before, 100 % after" in said
    same = first_run.sentence(Figures(made_up(tmp_path, 0.5, 1.0)))
    assert "**not told apart from the base at its best temperature**" in same and "**below the base made" in same


def test_an_abduction_cannot_be_forced_and_counts_as_the_base_at_its_best(tmp_path):
    figures = Figures(made_up(tmp_path, 1.0, 1.0))
    forced, base = figures.solved(FORCED, 0), figures.solved("base", figures.best)
    is_abduction = figures.modes == "abduction"
    assert (forced[~is_abduction] == 1).all() and (forced[is_abduction] == base[is_abduction]).all()


def test_the_pages_are_filled_and_filled_again(tmp_path):
    data = made_up(tmp_path, 1.0, 0.5)
    data["parts"]["example"] = {
        "model": "seed 0",
        "before": "</think>1",
        "after": "p=1;</think>2",
        "task": {"program": "def f(x): ...", "input": "1", "output": "2"},
    }
    out = tmp_path / "out"
    out.mkdir()
    (out / "first_run.json").write_text(json.dumps(data))
    command = ["--out", str(out), *pages(tmp_path)]
    assert first_run.main(command) == 0 and (out / "first_run.png").read_bytes().startswith(b"\x89PNG")
    readme, tiny = ((tmp_path / name).read_text() for name in first_run.SECTIONS.values())
    assert readme.startswith("a\n<!-- first-run -->\n![") and readme.endswith("<!-- end -->\nb\n")
    assert "old" not in readme and tiny.endswith("<!-- end -->\nc\n")
    for expected in ("| pass@8, base |  |", "| induction (6 tasks) |", "50 / 50 / - -> 75 / 75 / 75", "<think>p=1;"):
        assert expected in tiny, expected
    assert first_run.main(command) == 0
    assert [(tmp_path / name).read_text() for name in first_run.SECTIONS.values()] == [readme, tiny]


def test_what_is_refused(tmp_path, capsys):
    command = ["--out", str(tmp_path), *pages(tmp_path)]
    run = tmp_path / "run"
    run.mkdir()
    for arguments, message in (
        ([], "no such file yet"),
        ([str(tmp_path / "none")], "no readable config.json"),
        (["--samples", "0"], "at least 1"),
        ([str(run)], "no readable config.json"),
    ):
        assert first_run.main([*arguments, *command]) == 2
        assert message in capsys.readouterr().err
    config = {"seed": 0, "quantization": "none", "model": "tiny", "max_new_tokens": 8}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no checkpoint yet"):
        first_run.together([run])
    (run / "checkpoints" / "step_2").mkdir(parents=True)
    assert first_run.together([run]) == ({"seed 0": run / "checkpoints" / "step_2"}, "tiny", 8)
    with pytest.raises(ValueError, match="the same seed"):
        first_run.together([run, run])
    (tmp_path / "README.md").write_text("no markers")
    assert first_run.main(command) == 2 and "no <!-- first-run -->" in capsys.readouterr().err


def test_the_pages_have_the_markers():
    for name, page in first_run.SECTIONS.items():
        assert (ROOT / page).read_text().count(f"<!-- {name} -->") == 1, page


def test_the_embedded_models_tasks_have_every_cell():
    """What first_run.py and experiments.py take: as many of each mode and length."""
    tasks = load_tasks(ROOT / "azr" / "tiny" / "held_out.jsonl")
    kept = [tasks[i] for i in stratified(tasks, first_run.A_CELL) if level(tasks[i]) < BEYOND]
    cells = {(task.mode, level(task)) for task in kept}
    assert len(cells) == 18 and len(kept) == 18 * first_run.A_CELL
