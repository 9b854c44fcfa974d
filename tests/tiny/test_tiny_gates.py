"""The gates of the embedded base: what they read in a thought, what they count, what their tables and files hold."""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "results"))

import gate_base
import gate_numbers as numbers
import gate_proposals
import gate_table
import gate_training
import tiny_gates
from azr.tasks import MODES, Task
from azr.tiny import documents
from azr.tiny.programs import arguments_text
from gate_lab import DIRECT, Lab, Store

# ---------------------------------------------------------------- reading thoughts and programs


@pytest.mark.parametrize("mode", MODES)
def test_the_thoughts_of_the_documents_are_read_as_what_they_are(mode):
    rng, told = random.Random(1), {}
    for _ in range(60):
        drawn = documents.draw_task(mode, rng)
        thoughts = {style: documents.think(drawn, style, rng) for style in documents.STYLES}
        if thoughts["full"] == thoughts["coarse"]:
            continue  # a loop that never turns: one text in both styles
        for style, thought in thoughts.items():
            told.setdefault(style, set()).add(numbers.style_of(mode, thought))
    assert [told[style] for style in ("none", "junk", "coarse")] == [{"none"}, {"junk"}, {"coarse"}]
    # two tries, or two pairs, are a check whatever they were drawn as; a deduction says `again`
    assert told["full"] | told["check"] <= set(numbers.TRACED)
    assert mode != "deduction" or (told["full"], told["check"]) == ({"full"}, {"check"})


@pytest.mark.parametrize(
    "mode, thought, style",
    [
        ("deduction", "p=8;", "coarse"),
        ("deduction", "4%2==0 yes;p=4+1=5;", "full"),
        ("deduction", "p=[3, 4];q=len([3, 4])=2;", "full"),
        ("deduction", "p=8;again p=5+3=8;", "check"),
        ("deduction", "plus 3;", "other"),
        ("abduction", "5, 3 gives 8 yes;", "coarse"),
        ("abduction", "5, 3;5>3 yes;p=5+3=8;yes;", "full"),
        ("abduction", "5, 3;p=5+3=8;", "full"),
        ("abduction", "5, 3;p=8;no;5, 4;p=9;yes;", "check"),
        ("abduction", "5, 3;", "other"),
        ("induction", "plus 3 then even if over 2;", "coarse"),
        ("induction", "try p=x+3\n    5;p=5+3=8;yes;", "full"),
        ("induction", "try p=x+2\n    5;p=5+2=7;no;try p=x+3\n    5;p=5+3=8;yes;", "full"),
        ("induction", "try p=x+3\n    5;p=5+3=8;yes;6;p=6+3=9;yes;", "check"),
    ],
)
def test_styles(mode, thought, style):
    assert numbers.style_of(mode, thought) == style


def test_a_thought_ends_at_its_tag_or_where_it_was_cut_off():
    assert numbers.thought_of("p=8;</think><answer>8</answer>") == "p=8;"
    assert numbers.thought_of("p=5+3") == "p=5+3"


def test_a_full_trace_begins_as_the_generator_writes_it():
    rng, ends = random.Random(2), set()
    for _ in range(200):
        example = documents.draw(rng)
        text = numbers.full_prefix(example.program.text, arguments_text(example.arguments))
        trace = "".join(example.steps)
        assert trace.startswith(text)
        rest = trace[len(text) :]
        ends.add(rest[:1])
        assert numbers.style_of("deduction", text + rest) != "coarse" or not rest
    assert ends <= {"=", " ", ""}  # an expression without its value, a test without its outcome, nothing to compute


def test_a_prefix_of_a_loop_that_never_turns_goes_on_to_the_next_statement():
    program = "def f(x):\n    p=x\n    while p>9:\n        p=p-9\n    q=p+2\n    return q"
    assert numbers.full_prefix(program, "4") == "p=4;q=4+2"
    assert numbers.full_prefix(program, "11") == "p=11;p=11-9"


def test_statements_are_the_generators():
    rng = random.Random(3)
    for _ in range(100):
        program = documents.draw(rng).program
        assert numbers.statements(program.text) == len(program.statements)
    assert numbers.statements("def f(x:") is None and numbers.statements("y=1") is None


def test_what_a_response_is_made_to_begin_with():
    induction = Task(mode="induction", program="def f(x):\n    p=x+1\n    return p")
    deduction = Task(mode="deduction", program=induction.program, input="3", output="4")
    abduction = Task(mode="abduction", program=induction.program, input="3", output="4")
    assert [gate_base.prefix(task, "full") for task in (deduction, abduction, induction)] == ["p=3+1", None, "try "]
    assert {gate_base.prefix(task, "direct") for task in (deduction, abduction, induction)} == {DIRECT}


# ---------------------------------------------------------------- counts


def tasks_of(sizes) -> list[Task]:
    """A deduction and an abduction task of each size."""
    made = []
    for size in sizes:
        lines = "".join(f"    {name}=x+{size}\n" for name in "pqrstumn"[:size])
        program = f"def f(x):\n{lines}    return {'pqrstumn'[size - 1]}"
        made += [Task(mode=mode, program=program, input="1", output="2") for mode in ("deduction", "abduction")]
    return made


def test_the_stratified_part_has_as_many_of_each_mode_and_level():
    tasks = tasks_of([1, 1, 1, 2, 2, 7, 8, 8])
    kept = numbers.stratified(tasks, 2)
    assert [(tasks[i].mode[0], numbers.level(tasks[i])) for i in kept] == [
        (mode, level) for level in (1, 2, 7) for _ in range(2) for mode in "da"
    ]
    assert numbers.stratified(tasks, None) == list(range(len(tasks)))


def test_counts_by_mode_level_and_style():
    tasks = tasks_of([1, 4])
    counts = numbers.Counts.from_json(
        [[0, {"none": [3, 0, 15], "full": [1, 1, 25]}, 4, 0], [3, {"none": [4, 2, 20]}, 3, 1]], tasks
    )
    assert counts.accuracy.tolist() == [0.25, 0.5] and counts.tokens() == 7.5
    assert counts.of("abduction").index.tolist() == [3] and counts.of(levels=[1]).index.tolist() == [0]
    assert counts.shares()["full"] == 1 / 8
    value, lacking = numbers.given_style(counts, ["full"])
    assert value.mean == 1 and lacking == 1
    difference, lacking = numbers.style_difference(counts, ["none"], counts, numbers.TRACED)
    assert difference is None and lacking == 1  # one task is no comparison


def test_paired_differences_take_the_tasks_that_both_have():
    tasks = tasks_of([1, 2, 3])
    few = numbers.Counts.from_json([[i, {"none": [1, 0, 5]}, 1, 0] for i in (1, 2)], tasks)
    all_ = numbers.Counts.from_json([[i, {"full": [1, int(i > 1), 9]}, 1, 0] for i in range(6)], tasks)
    assert numbers.paired(few, all_).mean == 0.5
    with pytest.raises(ValueError):
        numbers.paired(few, all_.among([5]))


def test_spearman_is_that_of_the_ranks_and_ties_share_theirs():
    assert numbers.ranks([5, 1, 5, 9]).tolist() == [2.5, 1, 2.5, 4]
    assert numbers.spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
    assert np.isnan(numbers.spearman([1, 1, 1], [1, 2, 3]))
    rng = np.random.default_rng(0)
    a = np.repeat([1, 2, 3, 4, 5, 6], 30)
    interval = numbers.spearman_interval(a, a + rng.integers(-1, 3, len(a)))
    assert 0.7 < interval.low < interval.mean < interval.high < 0.95


def simulated(rng, shares: dict, accuracy: dict, tasks) -> numbers.Counts:
    """16 answers to each task with these shares of styles and this accuracy of each."""
    rows = []
    for i in range(len(tasks)):
        n = rng.multinomial(16, list(shares.values()))
        cells = {s: [int(c), int(rng.binomial(c, accuracy[s])), int(c)] for s, c in zip(shares, n) if c}
        rows.append([i, cells, 16, 0])
    return numbers.Counts.from_json(rows, tasks)


def test_a_gain_is_split_into_elicitation_and_execution():
    rng, tasks = np.random.default_rng(1), tasks_of([1, 2, 3, 4] * 25)
    base = simulated(rng, {"none": 0.8, "full": 0.2}, {"none": 0.3, "full": 0.8}, tasks)
    thinks = simulated(rng, {"none": 0.1, "full": 0.9}, {"none": 0.3, "full": 0.8}, tasks)
    better = simulated(rng, {"none": 0.8, "full": 0.2}, {"none": 0.5, "full": 0.9}, tasks)
    split = numbers.split_gain(base, thinks)
    assert split["gain"].mean == pytest.approx(numbers.paired(base, thinks).mean)
    assert split["elicitation"].low > 0.3 and abs(split["execution"].mean) < 0.03
    split = numbers.split_gain(base, better)
    assert split["execution"].low > 0.1 and abs(split["elicitation"].mean) < 0.03
    # what only one of the two does cannot be executed better or worse
    only = simulated(rng, {"full": 1.0}, {"full": 0.8}, tasks)
    none = simulated(rng, {"none": 1.0}, {"none": 0.3}, tasks)
    assert numbers.split_gain(none, only)["execution"].mean == 0


# ---------------------------------------------------------------- files and tables


def test_a_store_makes_each_part_once_and_refuses_other_settings(tmp_path):
    path, made = tmp_path / "x.json", []

    def part(value):
        made.append(value)
        return {"rows": [value, (1, 2)]}

    store = Store(path, {"model": "a"})
    assert store.get("one", part, 1) == {"rows": [1, [1, 2]]}
    assert Store(path, {"model": "a"}).get("one", part, 2) == {"rows": [1, [1, 2]]} and made == [1]
    assert json.loads(path.read_text())["settings"] == {"model": "a"}
    with pytest.raises(ValueError, match="model is 'a' there, 'b' here"):
        Store(path, {"model": "b"})


def test_a_task_file_has_distinct_tasks_of_the_sizes_asked_for(tmp_path):
    path = gate_training.task_file(tmp_path / "tasks.jsonl", 12, 0, (4, 5))
    tasks = [Task.from_json(json.loads(line)) for line in path.read_text().splitlines()]
    assert len({task.hash for task in tasks}) == 36 and {task.mode for task in tasks} == set(MODES)
    assert {numbers.statements(task.program) for task in tasks} == {4, 5}
    again = gate_training.task_file(tmp_path / "again.jsonl", 12, 0, (4, 5))
    assert again.read_text() == path.read_text()


def test_references_of_one_prompt_have_one_size():
    rng = random.Random(4)
    for size in gate_proposals.SIZES:
        asked = gate_proposals.draw_asked("abduction", rng, size)
        assert [numbers.statements(task.program) for task in asked.references] == [size, size]
    asked = gate_proposals.draw_asked("induction", rng, 1)
    assert len(asked.references) == 1 and asked.size == numbers.statements(asked.references[0].program)


def test_the_page_keeps_what_is_around_the_markers(tmp_path):
    page = tmp_path / "tiny.md"
    page.write_text("# Title\n\nBefore.\n")
    gate_table.put(page, "one\n")
    text = page.read_text()
    page.write_text(text + "\nAfter.\n")
    gate_table.put(page, "two\n")
    assert page.read_text().startswith("# Title\n\nBefore.\n") and page.read_text().endswith("After.\n")
    assert "two" in page.read_text() and "one" not in page.read_text()


def test_gates_pass_where_the_numbers_say_so():
    rows = [[2, 2, "ok", False, "a"]] * 7 + [[4, 5, "ok", False, "b"]] * 7 + [[4, None, "syntax", False, None]] * 4
    part = {"rows": rows, "solved": [[2, 2, 8, 4]] * 5}
    store = argparse.Namespace(parts={mode: part for mode in MODES})
    passed = {(gate.gate, gate.what): gate.passed for gate in gate_table.proposal_gates(store)}
    assert len(passed) == 8 and all(passed.values())
    worse = {
        "rows": rows[:7] + [[4, 1, "ok", False, "b"]] * 7 + [[4, None, "syntax", False, None]] * 20,
        "solved": [[2, 2, 8, 8]] * 5,
    }
    store = argparse.Namespace(parts={mode: worse for mode in MODES})
    assert not any(gate.passed for gate in gate_table.proposal_gates(store))


@pytest.mark.parametrize("name", sorted(tiny_gates.COMMANDS))
def test_bad_input_is_one_line(name, tmp_path, capsys):
    assert tiny_gates.main([name, "--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tiny_gates.py: ") and error.count("\n") == 1


def test_answers_are_counted_and_the_same_again(tmp_path):
    with Lab("tiny", longest=24) as lab:
        index = lab.part(1)[:2]
        rows = lab.answer(index, 3, 1.0)
        assert rows == lab.answer(index, 3, 1.0)
        assert rows != lab.answer(index, 3, 1.0, first=3)
        counts = lab.counts(rows)
        assert counts.n.tolist() == [3, 3] and counts.table[:, :, 2].sum() <= 6 * 24
        direct = lab.counts(lab.answer(index, 2, 0.0, [DIRECT] * 2))
        assert direct.shares()["none"] == 1 and direct.right.max() <= 2
