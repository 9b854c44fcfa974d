"""The report page: self-contained, tolerant of unfinished runs, warnings in words; bad input refused in one line."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

import analyze
from azr.analysis import html, report
from azr.analysis.reader import read_run, same_model
from bench_report import write_run
from in_process import run_here


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs and one that goes on, with a torn last line."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        write_run(root / f"run-{seed}", 50, 3, seed=seed)
    shutil.copytree(root / "run-0", root / "running")
    lines = (root / "running" / "metrics.jsonl").read_text().splitlines()
    (root / "running" / "metrics.jsonl").write_text("\n".join(lines[:10] + lines[12:30]) + '\n{"step": 31, "so')
    return root


def run_command(*flags):
    return run_here(analyze.main, "report", *flags)


class Tags(HTMLParser):
    """Collects tags and checks that they close."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_one_page_without_network(runs, tmp_path):
    done = run_command(runs / "run-0", "--out", tmp_path, "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert not tags.open and not [tag for tag, _ in tags.seen if tag in ("script", "link", "iframe")]
    images = [attributes["src"] for tag, attributes in tags.seen if tag == "img"]
    assert len(images) >= 4 and all(src.startswith("data:image/png;base64,iVBOR") for src in images)
    assert not re.search(r"https?://|url\(", page)
    places = [attributes["id"] for tag, attributes in tags.seen if tag == "section"]
    assert [attributes["href"] for tag, attributes in tags.seen if tag == "a"] == [f"#{place}" for place in places]
    assert len(places) == page.count("<h2>") >= 8
    for text in (
        "What these numbers do and do not show",
        "One run, one seed",
        "Not measured yet",
        "analyze.py difficulty",
    ):
        assert text in page
    found = json.loads((tmp_path / "r.json").read_text())[str(runs / "run-0")]
    assert any("Entropy of the solver" in fact for fact in found["facts"]) and found["dynamics"]["windows"]
    moved = (
        "KL from the policy of step 0 to that of step 50, on its text, nats per token: proposer 0.1000, solver 0.1000."
    )
    assert moved in found["facts"] and found["dynamics"]["probe_kl"]["solver/induction"] == {"25": 0.05, "50": 0.1}
    assert (tmp_path / "overview.png").is_file() and (tmp_path / "probe.png").is_file()
    shown = run_here(analyze.main, "dynamics", runs / "run-0").stdout
    assert "step 25 -> 50:" in shown and f"  {'solver/abduction':22s}0.0500 -> 0.1000" in shown


def test_several_runs_one_of_which_goes_on(runs, tmp_path):
    done = run_command(runs / "run-1", runs / "running", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Step 30 of 50" in done.stderr and "torn" in done.stderr and "2 step(s)" in done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "run-1 in detail" in page and "running in detail" in page and "One run, one seed" not in page


def test_text_of_a_model_cannot_become_html_and_ten_steps_are_no_trend(tmp_path):
    write_run(tmp_path / "run", 10, 2)
    path = tmp_path / "run" / "samples.jsonl"
    path.write_text(path.read_text().replace("def f(x):", f"<script>alert(1)</script>{'x' * 300}"))
    assert run_command(tmp_path / "run").returncode == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>" not in page and f"&lt;script&gt;alert(1)&lt;/script&gt;{'x' * 300}\n" in page  # whole, not cut
    assert "10 steps are too few to say how entropy changed" in page and "tenth of the steps, " not in page
    shown = run_here(analyze.main, "dynamics", tmp_path / "run").stdout
    assert shown.count("- (of 25 steps or more)") == 3, shown


def test_a_sample_keeps_its_lines_and_has_the_expected_answer():
    text = html.code("".join(f"    line {i}\n" for i in range(30)), 12)
    assert "... (18 lines left out)" in text and "    line 0\n" in text and "    line 29<" in text
    assert "white-space: pre;" in html.STYLE and "pre-wrap" not in html.STYLE
    task = {"program": "def f(x):\n    return x + 1", "input": "41", "output": "42"}
    answer = {"reward": {"correct": False}, "reason": "wrong", "response": "43"}
    row = {"task": task, "solve_rate": 0.5, "reason": "ok", "response": ""}
    page = report.one_task([2, row, answer], "deduction")
    assert "f(41) == ?" in page and "<p class=quiet>expected:</p><pre>42</pre>" in page and "(wrong)" in page
    assert "f(?) == 42" in (page := report.one_task([2, row, None], "abduction")) and "<pre>41</pre>" in page
    row = row | {"task": task | {"message": "adds one", "visible": [["1", "2"], ["2", "3"]]}}
    assert "# adds one\nf(1) == 2\nf(2) == 3</pre>" in report.one_task([2, row, None], "induction")
    assert "refused, not literal" in report.one_task(
        [0, row | {"task": None, "reason": "not_literal"}, None], "deduction"
    )


def test_the_warnings_are_those_of_the_run(tmp_path):
    """No more and no fewer than `analyze.py health` says."""
    write_run(tmp_path / "run", 30, 9, rate=lambda share: 0.5)
    assert report.read_entry(tmp_path / "run").warnings == []
    metrics = tmp_path / "run" / "metrics.jsonl"
    more = {
        "train/log_prob_gap": 0.3,
        "solver/abduction/commonest_share": 0.6,
        "solver/abduction/tasks": 9,
        "proposer/induction/valid_rate": 0.0,
        "solver/deduction/zero_advantage_rate": 1.0,
    }
    rows = [json.loads(line) | more for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = report.read_entry(tmp_path / "run").warnings
    for words in ("0.300 nats", "the same answer", "hardly a proposal is valid (induction", "teach nothing (deduction"):
        assert sum(words in line for line in lines) == 1, words
    assert len(lines) == 4 and all(line.startswith("Step") for line in lines)


def test_runs_of_different_models_and_bad_directories(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs / "run-1", other)
    config = json.loads((other / "config.json").read_text()) | {"model": "qwen-3b"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="different models"):
        same_model([read_run(runs / "run-0"), read_run(other)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('["not", "a run"]')
    for paths in ((runs / "run-0", other), (tmp_path / "empty",), (tmp_path / "foreign",), (tmp_path / "none",)):
        done = run_command(*paths)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert not (tmp_path / "empty" / "report.html").exists()
