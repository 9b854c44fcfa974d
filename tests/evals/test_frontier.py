"""Several temperatures: the frontier of one model, two models each at its best, and what is refused."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from test_compare import command, write

import eval_passk
from azr import passk
from azr.evals import compare, frontier


def ladder(where, rates, n=32, problems=100, seed=0, **info):
    """WHERE/T1 ... with problems that are right at rates[t] on average, the same ones hard at each temperature."""
    hard = np.random.default_rng(7).uniform(-0.3, 0.3, problems)
    for i, (t, rate) in enumerate(rates.items()):
        samples = n if t else 1
        p = np.clip(rate + hard, 0, 1)
        write(where / f"T{t:g}", p, samples, 10 * seed + i, decoding={"temperature": t, "seed": 0}, **info)
    return where


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """base; tuned: right more often, greedily most of all; again: another sample of the base; lone: the base at T 1."""
    where = tmp_path_factory.mktemp("sides")
    base = {1.0: 0.3, 0.5: 0.4, 0.0: 0.35}
    return {
        "base": ladder(where / "base", base),
        "again": ladder(where / "again", base, seed=1),
        "tuned": ladder(where / "tuned", {1.0: 0.4, 0.5: 0.5, 0.0: 0.6}, seed=2, adapter="run/step_9"),
        "lone": write(where / "lone", np.full(100, 0.3), 8, 5, decoding={"temperature": 1.0}),
    }


# ---------------------------------------------------------------- one model


def test_the_frontier_of_one_model(sides):
    result = frontier.figures(frontier.read(sides["base"]))
    assert list(result["temperatures"]) == ["1", "0.5", "0"] and result["k"] == 16
    many = {t: row["pass@k"]["mean"] for t, row in result["temperatures"].items() if row["pass@k"]}
    assert result["best"] == {"pass@1": 0.5, "pass@k": float(max(many, key=many.get))}
    hot, greedy = result["temperatures"]["0.5"], result["temperatures"]["0"]
    own = compare.read(sides["base"] / "T0.5")
    assert hot["pass@1"]["mean"] == pytest.approx(own.correct.mean()) and hot["pass@1"]["low"] < hot["pass@1"]["high"]
    assert greedy["samples_per_problem"] == 1 and greedy["pass@k"] is None and greedy["greedy_share"] is None
    first = [row[0] for row in compare.read(sides["base"] / "T0").answers]
    same = np.mean([[x == y for x in row] for row, y in zip(own.answers, first)])
    assert hot["greedy_share"]["mean"] == pytest.approx(same)
    assert frontier.figures(frontier.read(sides["base"]), [1, 4, 8, 32])["k"] == 8  # 32 samples are no 2 x 32


# ---------------------------------------------------------------- two models


def test_best_against_best_in_pairs(sides, tmp_path, capsys):
    assert command(sides["base"], sides["tuned"], "--out", tmp_path) == 0
    result = json.loads((tmp_path / "compare.json").read_text())
    one = result["best"]["pass@1"]
    assert (one["base_temperature"], one["tuned_temperature"]) == (0.5, 0.0) and result["verdict"]["pass@1"] == "above"
    a, b = compare.read(sides["base"] / "T0.5"), compare.read(sides["tuned"] / "T0")
    assert one["difference"]["mean"] == pytest.approx(b.correct.mean() - a.correct.mean())
    printed = capsys.readouterr().out
    assert printed.startswith(
        "Tuned at its best of 3 temperatures (greedy) is above the base at its best of 3 temperatures (T 0.5): pass@1 +"
    )
    assert result["needs"] is None and (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, (line for line in printed.splitlines() if line.startswith("|")))) <= 118


def test_a_second_sample_of_the_base_is_not_told_apart(sides):
    result = frontier.run(sides["base"], sides["again"])
    assert result["verdict"]["pass@1"] == "cannot tell" and result["sentence"].startswith("Cannot tell tuned at its")
    assert result["verdict"]["coverage"] == "cannot tell"


def test_false_positives_over_six_temperatures_are_rarer_than_the_level():
    """Two samples of one model that is as good at each temperature, where choosing the best is choosing noise."""
    rng, apart, pairs, problems = np.random.default_rng(0), 0, 200, 60
    for _ in range(pairs):
        p = rng.beta(0.5, 0.9, problems)
        sides = [
            {t: compare.Graded(None, {}, [], rng.random((problems, 8)) < p[:, None], [], None) for t in frontier.LADDER}
            for _ in range(2)
        ]
        a, b = (frontier.solved(points[frontier.best(points, 1)], 1) for points in sides)
        apart += passk.difference_interval(b - a, draws=200).excludes_zero
    assert apart <= 0.05 * pairs


def figure(mean, half=0.02):
    return {"mean": mean, "low": mean - half, "high": mean + half}


@pytest.mark.parametrize(
    "one, many, k, base, verdicts, words",
    [
        (0.1, 0.1, 32, 0.5, ("above", "above"), "Its coverage is above all that the base reaches: pass@32 +0.100 ["),
        (-0.1, -0.1, 32, 0.5, ("below", "below"), "Its coverage is below what the base reaches"),
        (0.0, 0.0, 32, 0.5, ("cannot tell", "cannot tell"), "Coverage: cannot tell, pass@32"),
        (0.1, -0.01, 32, 0.5, ("above", "cannot tell"), "a gain of 0.02 or more is excluded"),
        (0.1, -0.01, 32, 0.99, ("above", "cannot tell"), "the base leaves no room, it solves all but 1.0 %"),
        (0.1, 0.1, 8, 0.5, ("above", None), "No claim about coverage: that takes k = 16 or more, and n >= 2k samples"),
        (0.1, None, None, 0.5, ("above", None), "No claim about coverage"),
    ],
)
def test_what_is_said_of_both_at_their_best(one, many, k, base, verdicts, words):
    at = {"base_temperature": 0.4, "tuned_temperature": 0.0, "base": {"mean": base}}
    pairs = {"pass@1": at | {"difference": figure(one)}}
    pairs["pass@k"] = None if many is None else at | {"difference": figure(many)}
    got, sentence = frontier.verdict(pairs, (6, 1), k, 0.02)
    assert tuple(got.values()) == verdicts and words in sentence
    assert "its only temperature (greedy)" in sentence and "its best of 6 temperatures (T 0.4)" in sentence


def test_what_a_claim_lacks_is_said_with_a_command_that_parses(sides, tmp_path):
    def parsed(line):
        words = shlex.split(line[line.index("python eval_passk.py") :])
        return eval_passk.build_parser().parse_args(words[2:])

    line = frontier.run(sides["lone"], sides["lone"])["needs"]
    args = parsed(line)
    assert "measured at 1 only" in line and args.temperature == list(frontier.LADDER) and args.samples == 32
    assert (args.model, args.benchmark, args.limit, args.out) == ("m", "made-up", 100, f"{sides['lone']}-temperatures")
    result = frontier.run(sides["lone"], sides["tuned"])  # one temperature against several
    assert result["needs"] == line and result["best"]["pass@k"]["base_temperature"] == 1.0 and result["k"] == 4
    cold = ladder(tmp_path / "cold", {1.0: 0.4, 0.25: 0.5})
    args = parsed(frontier.run(sides["base"], cold)["needs"])
    assert args.temperature == [1.0, 0.5, 0.25, 0.0] and args.out == str(sides["base"])
    silent = write(tmp_path / "silent", [0.5] * 100, 4, 1, decoding={"temperature": None})
    assert frontier.run(silent, silent)["needs"].endswith("not recorded.")


def test_unlike_or_unfinished_results_are_refused_in_one_line(tmp_path, capsys):
    small = {"n": 2, "problems": 4}
    base, half, mixed, empty = (tmp_path / name for name in ("base", "half", "mixed", "empty"))
    ladder(base, {1.0: 0.4, 0.5: 0.5}, **small)
    ladder(half, {1.0: 0.4, 0.5: 0.5}, **small)
    (half / "T0.5" / "config.json").write_text('{"benchmark": "tiny"}')
    (half / "T0.5" / "result.json").unlink()
    ladder(mixed, {1.0: 0.4}, **small)
    ladder(mixed, {0.5: 0.4}, adapter="x", **small)
    empty.mkdir()
    silent = write(tmp_path / "silent", [0.5] * 4, 2, 1, decoding={"temperature": None})
    other = ladder(tmp_path / "other", {1.0: 0.4, 0.5: 0.5}, template="plain", **small)
    for words, why in (
        ((base, half), "T0.5: is not finished; repeat the command that made it"),
        ((base, mixed), "results of different adapters"),
        ((base, empty), "it has no result.json"),
        ((base, Path(compare.__file__).parents[1] / "tiny"), "it has no result.json"),
        ((base, silent), "does not say at which temperature"),
        ((base, other), "template differs"),
    ):
        assert command(*words, "--out", tmp_path / "out") == 2, why
        error = capsys.readouterr().err
        assert why in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("text", ["", "hot", "1,", "1,,0", "-1", "nan", "inf", "1,1.0", "0,-0", "1e-9", "1e30", "1;0"])
def test_bad_temperatures_exit_2_in_one_line(text, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        eval_passk.main(
            ["run", "--model", "tiny", "--benchmark", "tiny", f"--temperature={text}", "--out", str(tmp_path)]
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "temperature" in error and not list(tmp_path.iterdir())
