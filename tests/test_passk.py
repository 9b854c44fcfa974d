"""pass@k and its relatives against enumeration, intervals and tests against simulation."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from azr import passk
from azr.passk import pass_at_k
from tests.timing import cpu_seconds

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------- estimators


def test_estimators_equal_enumeration():
    """Every n <= 12, k and c."""
    for n in range(1, 13):
        for k in range(1, n + 1):
            subsets = np.array(list(itertools.combinations(range(n), k)))
            for c in range(n + 1):  # answers 0..c-1 are the right ones
                right = (subsets < c).sum(axis=1)
                assert pass_at_k(n, [c], k)[0] == pytest.approx(np.mean(right > 0), abs=1e-12), (n, c, k)


def test_pass_at_k_equals_exact_fractions_at_large_n():
    n, ks = 1024, [1, 7, 256, 512, 1023, 1024]
    c = np.array([0, 1, 2, 50, 511, 1000, 1023, 1024])
    exact = [[1 - math.comb(n - ci, k) / math.comb(n, k) for k in ks] for ci in c.tolist()]
    np.testing.assert_allclose(pass_at_k(n, c, ks), exact, rtol=0, atol=1e-12)


def test_pass_at_k_takes_samples_per_problem_and_refuses_what_is_undefined():
    np.testing.assert_allclose(pass_at_k([2, 4, 4], [1, 1, 0], [1, 2]), [[0.5, 1], [0.25, 0.5], [0, 0]])
    assert pass_at_k(4, [1, 2], 2).shape == (2,) and pass_at_k(4, [1, 2], [2]).shape == (2, 1)
    for n, c, k in ((4, [5], 1), (4, [-1], 1), (4, [1], 0), (4, [1], 5), ([4, 8], [1, 1], 8), (4, [1], [])):
        with pytest.raises(ValueError, match="pass@k"):
            pass_at_k(n, c, k)


def test_answer_entropy_and_distinct_correct_answers():
    assert passk.answer_entropy(["a", "b", "c", "d", None]) == pytest.approx(math.log(4))
    assert passk.answer_entropy(["a", "a"]) == 0 and math.isnan(passk.answer_entropy([None]))
    assert passk.answer_entropy(["a"] * 3 + ["b"]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert passk.distinct_correct(["1/2", "0.5", "1/2", "3"], [True, True, True, False]) == 2


def test_powers_of_two_stop_at_half_the_samples():
    assert passk.powers_of_two(1) == [1] and passk.powers_of_two(3) == [1]
    assert passk.powers_of_two(128) == [1, 2, 4, 8, 16, 32, 64] and passk.powers_of_two(100)[-1] == 32


# ---------------------------------------------------------------- intervals


def testt_quantile_against_tables():
    for freedom, expected in ((5, 2.5706), (10, 2.2281), (29, 2.0452), (199, 1.9720)):
        assert -passk.t_quantile(0.025, freedom) == pytest.approx(expected, abs=4e-3)


POPULATIONS = {
    "u_shaped": lambda rng, size: rng.beta(0.3, 1.0, size) * (rng.random(size) >= 0.2),
    "u_symmetric": lambda rng, size: rng.beta(0.3, 0.3, size),
    "many_zeros": lambda rng, size: rng.beta(0.5, 1.5, size) * (rng.random(size) >= 0.6),
    "uniform": lambda rng, size: rng.random(size),
}


@pytest.mark.parametrize("problems, low, high", [(150, 0.92, 0.97), (30, 0.88, 0.97)])
@pytest.mark.parametrize("difficulty", POPULATIONS)
def test_coverage_of_the_95_percent_interval(difficulty, problems, low, high):
    """2,000 simulated sets: how often is the truth inside, at k = 1, n/2, n?

    At k = n values are 0 or 1, so coverage moves in steps with the truth and n: here n = 32, the uniform one's is 92.
    """
    rng, n, sets, draw = np.random.default_rng(0), 32, 2000, POPULATIONS[difficulty]
    ks = [1, n // 2, n]
    population = draw(rng, 500_000)
    truth = np.array([np.mean(1 - (1 - population) ** k) for k in ks])
    inside = np.zeros(3)
    for part in range(4):  # one call for many sets: each is a column
        c = rng.binomial(n, draw(rng, (problems, sets // 4)))
        values = pass_at_k(n, c.ravel(), ks).reshape(problems, -1)
        interval = passk.share_interval(values, draws=500, seed=part)
        ends = interval.low.reshape(-1, 3), interval.high.reshape(-1, 3)
        inside += ((ends[0] <= truth) & (truth <= ends[1])).sum(axis=0)
    assert np.all(inside / sets >= low) and np.all(inside / sets <= high), inside / sets


def test_coverage_of_a_paired_difference():
    """Two models with a true gain of 0.05 on every problem, and one that loses every tenth problem altogether."""
    rng, n, sets = np.random.default_rng(1), 16, 1000
    for change, truth in ((lambda p: p + 0.05, 0.05), (lambda p: p * (rng.random(p.shape) > 0.1), -0.045)):
        p = rng.uniform(0, 0.9, (150, sets))
        difference = (rng.binomial(n, change(p)) - rng.binomial(n, p)) / n
        interval = passk.difference_interval(difference, draws=400)
        assert 0.92 <= np.mean((interval.low <= truth) & (truth <= interval.high)) <= 0.97


def paired(base, tuned, k):
    return passk.difference_interval(pass_at_k(16, tuned, k) - pass_at_k(16, base, k))


def test_pairing_makes_the_interval_narrow_and_is_reproducible():
    rng = np.random.default_rng(2)
    base = rng.binomial(16, rng.uniform(0, 1, 100))
    better = np.minimum(16, base + 1)
    interval, again = paired(base, better, [1, 4]), paired(base, better, [1, 4])
    alone = passk.bootstrap_interval(pass_at_k(16, base, 1))
    assert interval.excludes_zero.all() and interval.mean.shape == (2,)
    assert interval.high[0] - interval.low[0] < (alone.high - alone.low) / 4
    assert np.array_equal(interval.low, again.low)


def test_a_difference_carried_by_few_problems_is_no_certainty():
    same = paired([3] * 100, [3] * 100, 1)
    assert same.mean == 0 and 0.01 < same.high == -same.low < 0.04
    for changed, sure in ((1, False), (4, False), (15, True)):  # of 100 problems, now solved
        interval = paired([0] * 100, [16] * changed + [0] * (100 - changed), 1)
        assert interval.mean == changed / 100 and bool(interval.excludes_zero) == sure, interval
        assert interval.low <= interval.mean <= interval.high
    everything = paired([0] * 30, [16] * 30, 1)
    assert everything.mean == 1 and everything.high == 1


def test_interval_agrees_with_the_normal_one_on_many_problems():
    values = np.random.default_rng(3).uniform(0, 1, 2000)
    interval = passk.bootstrap_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert interval.mean - interval.low == pytest.approx(half, rel=0.08)
    assert interval.high - interval.mean == pytest.approx(half, rel=0.08)


def test_certainty_is_not_claimed_from_few_problems():
    for value in (0.0, 1.0):
        interval = passk.share_interval(np.full(30, value))
        assert 0 <= interval.low <= value <= interval.high <= 1 and 0.05 < interval.high - interval.low < 0.2
    assert math.isnan(passk.bootstrap_interval(np.array([0.5])).low)
    for empty in (
        lambda: passk.bootstrap_interval(np.array([])),
        lambda: passk.bootstrap_statistic(np.zeros((0, 2)), np.sum),
    ):
        with pytest.raises(ValueError, match="no problems"):
            empty()


def test_values_that_are_all_equal_are_no_certainty_either():
    rest = 1 - 0.025 ** (1 / 100)  # of other problems, at 97.5 %
    share, difference = passk.share_interval(np.full(100, 0.25)), passk.difference_interval(np.full(100, -0.25))
    assert (share.low, share.high) == pytest.approx((0.25 - rest * 0.25, 0.25 + rest * 0.75))
    assert (difference.low, difference.high) == pytest.approx((-0.25 - rest * 0.75, -0.25 + rest * 1.25))
    mixed = np.stack([np.full(100, 0.25), np.linspace(0, 1, 100)], axis=1)
    for interval in (passk.share_interval, passk.difference_interval):
        for i, whole in enumerate(interval(mixed)[i] for i in (0, 1)):
            alone = interval(mixed[:, i])
            assert (whole.low, whole.high) == pytest.approx((alone.low, alone.high))
    plain = passk.bootstrap_interval(np.full(100, 0.25))
    assert plain.low == plain.high == 0.25  # without ends nothing says how far another problem could be


def test_a_ratio_of_sums_equals_the_plain_mean_for_equal_denominators():
    hits = np.random.default_rng(4).integers(0, 9, 40)
    share = lambda sums: sums[..., 0] / sums[..., 1]  # noqa: E731
    ratio = passk.bootstrap_statistic(np.stack([hits, np.full(40, 8)], axis=1), share)
    plain = passk.bootstrap_interval(hits / 8)
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((plain.mean, plain.low, plain.high))
    assert math.isnan(passk.bootstrap_statistic(np.zeros((40, 2)), share).mean)


def test_five_thousand_problems_with_1024_samples_are_quick():
    c, ks = np.random.default_rng(5).integers(0, 1025, 5000), [2**i for i in range(11)]
    assert cpu_seconds(lambda: passk.share_interval(pass_at_k(1024, c, ks), draws=2000), 10) < 10


# ---------------------------------------------------------------- tests of no difference


def test_sign_flips_are_exact_for_few_problems():
    values = np.array([0.1, 0.2, -0.05, 0.4, 0.0])
    sums = [abs(sum(s * v for s, v in zip(signs, values))) for signs in itertools.product((-1, 1), repeat=5)]
    expected = np.mean(np.array(sums) >= abs(values.sum()) - 1e-12)
    assert passk.sign_flip_test(values) == pytest.approx(expected)
    assert passk.sign_flip_test(np.stack([values, 0 * values], axis=1)).tolist() == pytest.approx([expected, 1])
    assert passk.sign_flip_test(np.zeros(4)) == 1


def test_random_sign_flips_agree_with_the_exact_ones_and_reject_at_their_level():
    rng = np.random.default_rng(6)
    binary = rng.choice([-1.0, 1.0], size=40, p=[0.3, 0.7])
    exact = passk.mcnemar(int((binary < 0).sum()), int((binary > 0).sum()))
    assert passk.sign_flip_test(binary) == pytest.approx(exact, abs=0.01)  # on 0 and 1 the two are the same test
    null = rng.normal(size=(30, 2000)) * rng.exponential(size=(30, 1))
    assert 0.04 < np.mean(passk.sign_flip_test(null, draws=2000) < 0.05) < 0.06


def test_holm_and_mcnemar_against_known_values():
    np.testing.assert_allclose(passk.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert passk.holm([0.6, 0.7]).tolist() == [1, 1]
    assert passk.mcnemar(0, 6) == pytest.approx(2 / 64) and passk.mcnemar(3, 3) == 1 and passk.mcnemar(0, 0) == 1
    assert passk.mcnemar(2, 10) == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert 0 <= passk.mcnemar(3000, 3100) <= 1


def test_the_file_needs_numpy_alone():
    code = f"""import sys; sys.path.insert(0, {str(ROOT)!r}); before = set(sys.modules); import azr.passk
print(sorted(name for name in set(sys.modules) - before if name.startswith("azr") or name in ("torch", "scipy")))"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "['azr', 'azr.passk']\n"
    )
