"""What reference solutions gave is kept from one call to the next, and nothing is believed that may be another's."""

import json
import os
import time

import pytest

from azr.evals import code_answers, kept, score
from azr.evals.benchmarks import load
from azr.evals.code_answers import grade, load_problems, reference_of
from azr.evals.kept import Kept, directory
from sandbox import BENCHMARK, Sandbox
from tests.evals.answers import HALF

ROW = HALF | {"plus_input": [[7], [640]]}
BURN = (
    "    from time import process_time\n    end = process_time() + (0.3 if x == 12 else 0)\n"
    "    while process_time() < end:\n        pass\n    return x\n"
)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(1, profile=BENCHMARK) as sandbox:
        yield sandbox


def problem_of(tmp_path, **change):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(ROW | change) + "\n")
    return load_problems(path)[0]


def children(sandbox, problem, store):
    """The processes that a reference takes, and the reference."""
    before = sandbox.state["children"]
    reference = reference_of(problem, sandbox, store)
    return sandbox.state["children"] - before, reference


def test_a_second_call_runs_no_reference(tmp_path, sandbox, capsys):
    half = "    if x > 6:\n        return iter(())\n    return x / 2\n"  # with an input that is left out
    problem = problem_of(tmp_path, canonical_solution=half)
    first, reference = children(sandbox, problem, Kept(tmp_path / "cache", "now"))
    said = capsys.readouterr().err
    again, same = children(sandbox, problem, Kept(tmp_path / "cache", "now"))
    assert (first, again) == (1, 0) and same == reference and reference.faults
    assert "inputs are left out" in said and capsys.readouterr().err == said


def test_score_says_where_the_outputs_are_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AZR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.jsonl").write_text(json.dumps(ROW) + "\n")
    benchmark, reference, jobs = (
        load(f"humaneval+={tmp_path / 'own.jsonl'}"),
        ROW["prompt"] + ROW["canonical_solution"],
        [],
    )
    run = Sandbox.run
    monkeypatch.setattr(Sandbox, "run", lambda self, given: jobs.extend(job.code for job in given) or run(self, given))
    answer = reference + "# another text\n"
    (tmp_path / "s.jsonl").write_text(json.dumps({"task_id": "Own/1", "solution": answer}) + "\n")
    results = []
    for out, said in (("a", f"kept in {tmp_path}/cache/references for"), ("b", "1 of 1 from the cache of 20")):
        results.append(score.score(str(tmp_path / "s.jsonl"), benchmark, [1], str(tmp_path / out)))
        assert f"outputs of the reference solutions: {said}" in capsys.readouterr().err
        assert answer in jobs and (reference in jobs) == (out == "a")
        jobs.clear()
    assert results[0] == results[1] and results[0]["pass@k"]["1"]["mean"] == 1


def test_another_program_input_or_machine_is_another_file(tmp_path, sandbox):
    store, plus = Kept(tmp_path / "cache", "now"), ROW["plus_input"]
    reference_of(problem_of(tmp_path), sandbox, store)
    changes = (
        {"canonical_solution": "    return x / 4\n"},
        {"plus_input": [*plus, [99]]},
        {"prompt": "x = 1\n" + HALF["prompt"]},
    )
    for change in changes:
        problem = problem_of(tmp_path, **change)
        taken, reference = children(sandbox, problem, store)
        assert taken == 1 and reference == reference_of(problem, sandbox)
    assert children(sandbox, problem_of(tmp_path), Kept(tmp_path / "cache", "another machine"))[0] == 1
    assert len(list((tmp_path / "cache").iterdir())) == 5 and len(store.made) == 4 and not store.used


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(b"\xff" * 1000), "damaged"),
        (lambda path: path.write_text('{"outputs": ["0", "0"]}\n'), "damaged"),
        (lambda path: path.chmod(0o620), "others may write it"),
    ],
)
def test_what_is_damaged_or_foreign_is_said_and_made_again(tmp_path, sandbox, capsys, spoil, said):
    problem, store = problem_of(tmp_path), Kept(tmp_path / "cache", "now")
    reference = reference_of(problem, sandbox, store)
    [path] = (tmp_path / "cache").iterdir()
    spoil(path)
    taken, again = children(sandbox, problem, store)
    errors = capsys.readouterr().err
    assert taken == 1 and again == reference and errors.count("\n") == 1 and said in errors and str(path) in errors
    assert path.stat().st_mode & 0o777 == 0o600
    assert children(sandbox, problem, store)[0] == 0


def test_a_file_under_the_name_of_another_is_not_believed(tmp_path, capsys):
    store = Kept(tmp_path, "now")
    store.put("a", [1])
    store.put("b", [2])
    (tmp_path / store.made[0]).replace(tmp_path / store.made[1])
    assert store.get("b") is None and "damaged" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_not_believed(tmp_path, capsys):
    store = Kept(tmp_path, "now")
    store.put("a", [1])
    os.chown(tmp_path / store.made[0], 12345, -1)
    assert store.get("a") is None and "belongs to somebody else" in capsys.readouterr().err


def test_an_answer_can_neither_read_nor_spoil_it(tmp_path, sandbox):
    problem, store = problem_of(tmp_path), Kept(tmp_path, "now")
    reference = reference_of(problem, sandbox, store)
    path = tmp_path / store.made[0]
    path.chmod(0o644)
    before = path.read_bytes()
    right = problem.prompt + problem.solution
    assert grade(problem, right, reference, sandbox).ok_plus
    for attempt in ("open({!r}).read()", "open({!r}, 'wb')", "os.unlink({!r})", "os.rename({!r}, 'x')"):
        found = grade(problem, f"import os\n{attempt.format(str(path))}\n{right}", reference, sandbox)
        assert not found.ok_base and found.reason in ("error", "forbidden"), attempt
    assert path.read_bytes() == before


def test_a_slow_reference_is_timed_again(tmp_path, sandbox, monkeypatch):
    problem, store = problem_of(tmp_path, canonical_solution=BURN), Kept(tmp_path / "cache", "now")
    limit = reference_of(problem, sandbox, store).cpu_seconds
    jobs, run = [], sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda given: jobs.extend(given) or run(given))
    again = reference_of(problem, sandbox, store)
    assert [job.inputs for job in jobs] == [("2", "12")] and 1.0 < again.cpu_seconds < 2 * limit
    assert again.outputs == reference_of(problem, sandbox).outputs
    # a machine twice as slow, as it were: the time is that of now, not that of the file
    monkeypatch.setattr(code_answers, "_slowest", lambda outcomes: (7.0, 1))
    assert reference_of(problem, sandbox, store).cpu_seconds == 28.0


def test_what_may_be_the_machines_fault_is_not_kept(tmp_path, sandbox, monkeypatch):
    monkeypatch.setattr(code_answers, "REFERENCE_SECONDS", 0.2)
    problem, store = problem_of(tmp_path, canonical_solution=BURN), Kept(tmp_path / "cache", "now")
    assert "timeout" in reference_of(problem, sandbox, store).faults[0]
    assert not store.made and children(sandbox, problem, store)[0] > 0


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path, sandbox, capsys):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", None):
        store = Kept(place, "now")
        assert reference_of(problem_of(tmp_path), sandbox, store).outputs
        store.trim()
        assert not store.made and not store.used
    assert capsys.readouterr().err == ""


def test_what_was_not_used_for_longest_goes(tmp_path, monkeypatch):
    store = Kept(tmp_path, "now")
    for number in range(4):
        store.put(number, "x" * number)
        path = tmp_path / store.made[-1]
        os.utime(path, (time.time() - 100 + number,) * 2)
    monkeypatch.setattr(kept, "MOST_BYTES", 2 * path.stat().st_size)
    assert store.get(0) == ""  # the oldest, and the last that was used
    store.trim()
    assert [store.get(number) for number in range(4)] == ["", None, None, "xxx"]


def test_the_place_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for own, shared, place in (
        ("", "/x", None),
        ("/own", "/x", "/own/references"),
        (None, "/x", "/x/azr/references"),
        (None, "x", tmp_path / ".cache/azr/references"),  # relative: to be ignored
        (None, None, tmp_path / ".cache/azr/references"),
    ):
        for name, value in (("AZR_CACHE", own), ("XDG_CACHE_HOME", shared)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert (found := directory("references")) is place or str(found) == str(place)
