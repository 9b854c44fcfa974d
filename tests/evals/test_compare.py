"""compare on made-up results whose truth is known: sharpened, better, or a second sample of the base."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import eval_passk
from azr import passk
from azr.evals import compare, compare_view, frontier

ROOT = Path(__file__).resolve().parents[2]
INFO = {
    "benchmark": "made-up",
    "model": "m",
    "adapter": None,
    "base_model": "m",
    "revision": "r",
    "quantization": "nf4",
    "template": "azr",
    "template_hash": "h",
    "benchmark_file_hash": "1",
    "dtype": "bfloat16",
    "made_by": "run",
}


def write(where, p, n, seed, texts=1, decoding=None, **info):
    """A result directory: n samples a problem, right with chance p; right answers are `texts` texts, wrong ones 4."""
    where.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    settings = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 64, "seed": seed} | (decoding or {})
    result = INFO | {"problems": len(p), "samples_per_problem": n, "decoding": settings} | info
    (where / "result.json").write_text(json.dumps(result))
    with open(where / "graded.jsonl", "w") as file:
        for i, chance in enumerate(p):
            correct = rng.random(n) < chance
            answer = np.where(correct, rng.integers(0, texts, n), 100 + rng.integers(0, 4, n))
            for j in rng.permutation(n).tolist():
                row = {"task_id": f"t/{i}", "sample": j, "correct": bool(correct[j]), "reason": "ok"}
                row |= {"answer": str(answer[j]), "tokens": 9, "finish_reason": "length" if j == 0 else "stop"}
                file.write(json.dumps(row) + "\n")
    return where


def graded(c, n):
    c = np.asarray(c)
    correct = np.arange(n)[None] < c[:, None]
    names = [f"t/{i}" for i in range(len(c))]
    return compare.Graded(Path("x"), {}, names, correct, [[None] * n] * len(c), np.full(correct.shape, np.nan))


def command(*words):
    return eval_passk.main(["compare", *map(str, words)])


def sharpened(p):
    """Better where it was good, lost where it was rare."""
    return np.where(p > 0.15, np.minimum(1, 1.6 * p), 0.1 * p)


def difficulty(rng, problems):
    return rng.beta(0.3, 0.8, problems)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """base, again (same model), sharp, better: 300 problems, 64 samples."""
    where, p = tmp_path_factory.mktemp("results"), difficulty(np.random.default_rng(0), 300)
    return {
        "base": write(where / "base", p, 64, 1),
        "again": write(where / "again", p, 64, 2),
        "sharp": write(where / "sharp", sharpened(p), 64, 3, adapter="run/step_9"),
        "better": write(where / "better", 1 - 0.6 * (1 - p) ** 2, 64, 4, texts=3, adapter="run/step_9"),
    }


# ---------------------------------------------------------------- the sentence


def test_sharpening_is_found_with_the_crossing_at_its_true_place(results, tmp_path, capsys):
    assert command(results["base"], results["sharp"], "--out", tmp_path) == 0
    result = json.loads((tmp_path / "compare.json").read_text())
    assert result["verdict"] == "sharpening without capacity gain"
    population = difficulty(np.random.default_rng(9), 400_000)
    ks = np.arange(1, 33)
    lead = np.array([np.mean((1 - population) ** k - (1 - sharpened(population)) ** k) for k in ks])
    i = np.flatnonzero(lead > 0)[-1]
    true = ks[i] + lead[i] / (lead[i] - lead[i + 1])
    k = result["crossing"]["k"]
    assert k["low"] < true < k["high"] and k["high"] < 2 * k["low"]
    assert (result["crossing"]["first"], result["crossing"]["then"]) == ("tuned", "base")
    assert [row["ahead"] for row in result["pass@k"]][::5] == ["tuned", "base"]
    assert result["sets"]["SRR"]["difference"]["high"] < 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"Crosses at k = {k['mean']:.1f} [{k['low']:.1f}, {k['high']:.1f}], tuned is ahead below")
    assert "Sharpening without capacity gain: at k = 32 the base is ahead." in printed.splitlines()[0]
    assert max(len(line) for line in printed.splitlines() if line.startswith("|")) <= 118


def test_a_second_sample_of_the_base_establishes_nothing(results, tmp_path, capsys):
    assert command(results["base"], results["again"], "--out", tmp_path) == 0
    result = json.loads((tmp_path / "compare.json").read_text())
    assert result["verdict"] == "cannot tell" and result["crossing"] is None
    assert not any(row["ahead"] for row in result["pass@k"])
    for name in (*compare.SETS, *compare.FIGURES):
        assert result["sets"][name]["difference"]["low"] <= 0 <= result["sets"][name]["difference"]["high"]
    assert 0.5 < result["sets"]["SRR"]["tuned"] < 1 and result["sets"]["NDR"]["tuned"] > 0
    assert capsys.readouterr().out.startswith("Cannot tell at every k measured: ")


def test_more_solved_is_a_capacity_gain(results, tmp_path):
    assert command(results["base"], results["better"], "--out", tmp_path) == 0
    result = json.loads((tmp_path / "compare.json").read_text())
    assert result["verdict"] == "capacity gain" and result["crossing"] is None
    assert result["sets"]["NDR"]["difference"]["low"] > 0
    distinct, entropy = result["answers"]["distinct_correct"], result["answers"]["entropy"]
    assert distinct["base"]["mean"] <= 1 < distinct["tuned"]["mean"] <= 3 and distinct["difference"]["low"] > 0
    assert 0 < entropy["base"]["mean"] < np.log(5) and result["answers"]["entropy_problems"] == 300
    assert result["answers"]["truncated"]["base"]["mean"] == pytest.approx(1 / 64)
    counts = result["solved_in_n"]
    assert sum(counts[name] for name in compare.SETS) == 300
    assert len(counts["problems"]["tuned_only"]) == counts["tuned_only"]


def row(k, ahead, high=None, base=0.5):
    mean = {"tuned": 0.1, "base": -0.1, None: 0.0}[ahead]
    difference = {"mean": mean, "low": mean - 0.05, "high": mean + 0.05 if high is None else high}
    return {"k": k, "base": {"mean": base}, "difference": difference, "ahead": ahead}


SAME = (1, 2, 4, 8, 16, 32)
UP, DOWN = "tuned", "base"


@pytest.mark.parametrize(
    "ks, leads, last, name, lead, claim",
    [
        (SAME, [UP] * 6, {}, "capacity gain", "Ahead at every k measured: ", "Capacity gain at k = 32."),
        (SAME, [DOWN] * 6, {}, "no capacity gain", "Behind at every k measured: ", "the base is ahead."),
        (SAME, [None] * 6, {}, "cannot tell", "Cannot tell at every k measured: ", "Capacity: cannot tell, a gain of"),
        (SAME, [UP, UP, None, None, DOWN, DOWN], {}, "sharpening", "Crosses at k = 3.0 [2.0, 4.0], tuned is a", ""),
        (
            SAME,
            [DOWN, DOWN, None, None, UP, UP],
            {},
            "capacity gain",
            "Crosses at k = 3.0 [2.0, 4.0], tuned is behi",
            "",
        ),
        (
            SAME,
            [UP, UP] + [None] * 4,
            {"high": 0.01},
            "sharpening",
            "Ahead at k = 1, 2; cannot tell at k = 4",
            "0.02 or",
        ),
        (
            SAME,
            [UP, UP] + [None] * 4,
            {"high": 0.02},
            "ahead at some k",
            "Ahead at k = 1, 2; cannot tell",
            "cannot tell",
        ),
        (SAME, [UP] + [None] * 5, {"high": 0.01, "base": 0.97}, "ahead at some k", "Ahead at k = 1; ", "No room for a"),
        (SAME, [None] * 6, {"high": 0.01}, "no capacity gain", "Cannot tell at every", "0.02 or more is excluded."),
        (SAME, [UP, DOWN, None, None, None, UP], {}, "capacity gain", "Ahead at k = 1, 32; behind at k = 2; can", ""),
        ((1,), [UP], {}, "ahead at every k", "Ahead at k = 1, the only k measured: +0.100 [+0.050, +0.150]. No cl", ""),
        ((1,), [DOWN], {}, "behind at every k", "Behind at k = 1, the only k measured: -0.100 [", "No claim about"),
        ((1,), [None], {}, "cannot tell", "Cannot tell at k = 1, the only k measured: ", "No claim about capacity"),
        ((1, 2, 4, 8), [UP] * 4, {}, "ahead at every k", "Ahead at every k", "here k is up to 8 and n = 64."),
        ((2, 16), [UP, None], {"high": 0.01}, "no capacity gain", "Ahead at k = 2; cannot tell at k = 16", ""),
        (
            (1, 64),
            [UP, UP],
            {},
            "ahead at every k",
            "Ahead at every k",
            "here k is up to 64 and n = 64.",
        ),  # one draw each
    ],
)
def test_the_sentence_says_no_more_than_its_definition(ks, leads, last, name, lead, claim):
    rows = [row(k, ahead) for k, ahead in zip(ks, leads)]
    rows[-1] = row(ks[-1], leads[-1], **last)
    sure = [ahead for ahead in leads if ahead]
    crosses = sure and sure[0] != sure[-1]
    point = {"first": sure[0], "then": sure[-1], "k": {"mean": 3, "low": 2, "high": 4}} if crosses else None
    got, sentence = compare.verdict(rows, point, 64, margin=0.02)
    assert got.startswith(name) and sentence.startswith(lead) and claim in sentence
    numbers = re.findall(r"[+-]\d\.\d+ \[.*?\](?: at k = \d+)?", sentence)
    assert len(numbers) == len(set(numbers)) == min(len(ks), 2)


def test_equal_counts_have_an_interval_of_their_own_and_the_page_says_which(tmp_path):
    a, b = (write(tmp_path / name, [0.0] * 30, 8, 1) for name in "ab")
    for where, right in ((a, 2), (b, 4)):
        lines = [json.loads(line) for line in (where / "graded.jsonl").read_text().splitlines()]
        for line in lines:
            line |= {"correct": line["sample"] < right, "answer": "7"}
        (where / "graded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert command(a, b) == 0
    result = json.loads((b / "compare.json").read_text())
    for one in (*result["pass@k"], result["answers"]["distinct_correct"], result["answers"]["entropy"]):
        for side in ("base", "tuned", "difference"):
            assert one[side]["all_equal"] and one[side]["low"] < one[side]["high"], (one, side)
    assert result["sentence"].startswith("Ahead at every k measured: +0.250 [")
    assert "the rule of three" in (b / "compare.md").read_text()


def test_false_positives_are_rare():
    """150 pairs of samples of one model, 40 problems: how often is anything called established?"""
    rng, n, found, sets, pairs = np.random.default_rng(1), 32, 0, 0, 150
    ks = passk.powers_of_two(n)
    for _ in range(pairs):
        p = difficulty(rng, 40)
        a, b = rng.binomial(n, p), rng.binomial(n, p)
        found += any(one["ahead"] for one in compare.curve_rows(a, b, n, ks, 200))
        figures = compare.set_figures(graded(a, n), graded(b, n), 200)
        sets += figures["NDR"]["difference"]["low"] > 0 or figures["NDR"]["difference"]["high"] < 0
    assert found <= 0.08 * pairs and sets <= 0.08 * pairs, (found, sets)


# ---------------------------------------------------------------- figures


def test_halves_of_the_base_are_the_mean_over_all_splits():
    """By enumeration: every way to split 6 samples into two times 3, against every 3 of the tuned model's."""
    import itertools

    base, tuned = graded([0, 1, 2, 5, 6], 6), graded([1, 0, 3, 4, 6], 6)
    expected = np.zeros((5, 8))
    triples = list(itertools.combinations(range(6), 3))
    for i in range(5):
        for triple in triples:
            rest = [j for j in range(6) if j not in triple]
            one, other = base.correct[i, list(triple)].any(), base.correct[i, rest].any()
            solved = [tuned.correct[i, list(three)].any() for three in triples]
            for offset, second in ((0, solved), (4, [other])):
                for s in second:
                    place = {(1, 1): 0, (1, 0): 1, (0, 1): 2, (0, 0): 3}[int(one), int(s)]
                    expected[i, offset + place] += 1 / len(triples) / len(second)
    figures = compare.set_figures(base, tuned, 50)
    assert figures["samples"] == 3
    for j, name in enumerate(compare.SETS):
        assert figures[name]["tuned"] == pytest.approx(expected[:, j].mean(), abs=1e-12)
        assert figures[name]["second_base"] == pytest.approx(expected[:, 4 + j].mean(), abs=1e-12)
    both, base_only, tuned_only = expected.sum(axis=0)[:3]
    srr, ndr = both / (both + base_only), tuned_only / (both + tuned_only)
    assert figures["SRR"]["tuned"] == pytest.approx(srr)
    assert figures["NDR"]["tuned"] == pytest.approx(ndr)


def test_nothing_solved_and_one_sample_are_reported_without_failing(tmp_path):
    for name, p, n in (("none", [0.0] * 5, 8), ("all", [1.0] * 5, 8), ("single", [0.5] * 30, 1)):
        a, b = (write(tmp_path / name / side, p, n, seed) for seed, side in enumerate("ab"))
        assert command(a, b) == 0
        result = json.loads((b / "compare.json").read_text(), parse_constant=lambda name: pytest.fail(name))
        assert result["verdict"] == "cannot tell"
        assert (b / "compare.png").read_bytes().startswith(b"\x89PNG")
        assert result["sentence"] in (b / "compare.md").read_text()


# ---------------------------------------------------------------- like with like, bad input


@pytest.mark.parametrize(
    "change, why",
    [
        ({"template": "plain"}, "template differs"),
        ({"template_hash": "other"}, "template_hash differs"),
        ({"quantization": "none"}, "quantization differs"),
        ({"benchmark": "other"}, "benchmark differs"),
        ({"adapter": "x", "base_model": "other"}, "base_model differs"),
        ({"decoding": {"temperature": 1.0}}, "decoding (temperature) differs"),
        ({"decoding": {"top_k": 5}}, "decoding (top_k) differs"),
        ({"benchmark_file_hash": "2"}, "benchmark_file_hash differs"),
        ({"problems": 5}, "finish the run"),
    ],
)
def test_unlike_results_are_refused_in_one_line(tmp_path, capsys, change, why):
    a, b = write(tmp_path / "a", [0.5] * 4, 8, 1), write(tmp_path / "b", [0.5] * 4, 8, 2, **change)
    assert command(a, b) == 2
    error = capsys.readouterr().err
    assert why in error and error.startswith("eval_passk.py: ") and error.count("\n") == 1
    assert sorted(path.name for path in b.iterdir()) == ["graded.jsonl", "result.json"]


def test_other_problems_too_large_k_and_bad_margins_are_refused(tmp_path, capsys):
    a, b = write(tmp_path / "a", [0.5] * 4, 8, 1), write(tmp_path / "b", [0.5] * 6, 8, 2)
    lone = write(tmp_path / "c", [0.5], 8, 2)
    for words, why in (
        ((a, b), "'t/4'"),
        ((a, a, "--k", "1,9"), "beyond the 8 samples"),
        ((lone, lone), "one problem only"),
        ((a, tmp_path), "it has no result.json"),
    ):
        assert command(*words) == 2
        assert why in capsys.readouterr().err
    for words in (("--k", "0,1"), ("--margin", "0")):
        with pytest.raises(SystemExit) as stop:
            command(a, a, *words)
        assert stop.value.code == 2


def test_what_is_not_recorded_is_said_and_a_matched_temperature_is_allowed(tmp_path, capsys):
    a = write(tmp_path / "a", [0.5] * 4, 8, 1)
    scored = dict.fromkeys(("model", "base_model", "revision", "quantization", "template", "template_hash"))
    b = write(tmp_path / "b", [0.5] * 4, 8, 2, **scored, made_by="score")
    hot = write(tmp_path / "c", [0.5] * 4, 8, 3, dtype="float32", decoding={"temperature": 0.9, "match_entropy": True})
    assert command(a, b) == 0
    assert "quantization is not recorded in both results" in capsys.readouterr().err
    assert command(a, hot) == 0
    error = capsys.readouterr().err
    assert "temperature 0.9 was matched to the base's entropy at 0.6" in error and "dtype differs: bfloat16" in error


def test_fewer_samples_are_taken_from_the_larger_result_loudly(tmp_path, capsys):
    p = np.linspace(0, 1, 12)
    a, b = write(tmp_path / "a", p, 8, 1), write(tmp_path / "b", p, 5, 2)
    assert command(a, b) == 0
    assert f"{a}: has 8 samples a problem; only the first 5" in capsys.readouterr().err
    assert json.loads((b / "compare.json").read_text())["samples_per_problem"] == 5
    lines = (a / "graded.jsonl").read_text().splitlines(keepends=True)
    (a / "graded.jsonl").write_text("".join(lines[:-1]))
    assert command(a, b) == 0 and "between 7 and 8 samples" in capsys.readouterr().err


GOOD = '{"task_id": "t/0", "sample": 0, "correct": true, "answer": "\\ud800"}\n'


@pytest.mark.parametrize(
    "line, why",
    [
        ("{", "line 2"),
        ("[]", "expected a JSON object"),
        ('{"task_id": "t/0", "sample": 1}', "line 2: needs"),
        ('{"task_id": "t/0", "sample": true, "correct": true}', "line 2: needs"),
        ('{"task_id": "t/0", "sample": 1, "correct": true, "answer": 3}', "answer (text or null)"),
        (GOOD, "sample 0 of 't/0' is there twice"),
        ("[" * 100_000, "line 2"),
        ("\xff", "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path, capsys, line, why):
    where = write(tmp_path / "a", [0.5], 1, 1)
    (where / "graded.jsonl").write_text(GOOD + line + "\n")
    assert command(where, where) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1 and len(error) < 1000
    (where / "graded.jsonl").write_bytes(b"\xff\xfe\n")
    assert command(where, where) == 2
    (where / "result.json").write_text("[]")
    assert command(where, where) == 2 and "expected a JSON object" in capsys.readouterr().err


def test_the_crossing_is_interpolated_and_censored_at_the_ends():
    log_k = np.log([1.0, 2.0, 4.0, 8.0])
    lead = np.array([[2, 1, -1, -2], [1, 1, 1, 1], [-1, -1, -1, -1], [1, -1, 1, -3.0]])
    np.testing.assert_allclose(np.exp(compare._last_change(lead, log_k)), [8**0.5, 8, 1, 4 * 2**0.25])


def test_no_torch_and_no_matplotlib_until_it_is_needed():
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r}); import azr.evals.frontier, azr.evals.compare_view
print([name for name in ("torch", "matplotlib") if name in sys.modules])"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_markdown_has_every_part(results):
    result = frontier.run(results["base"], results["sharp"])
    page = compare_view.markdown(result)
    assert not result["notes"] and page.count("| ") > 80 and "nan" not in page.lower()
    for part in (
        "Crosses at k = ",
        "SRR: kept",
        "NDR: new",
        "McNemar",
        "compare.png",
    ):
        assert part in page
