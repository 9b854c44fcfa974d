"""Speed of azr/passk.py and of a whole comparison, in CPU seconds (user + system), which a busy machine leaves alone.

    python tests/bench_passk.py [--quick] [--json FILE]

interval      5,000 problems x 1,024 samples, pass@k at 11 values of k with intervals from 2,000 bootstrap draws
estimator     the same pass@k without intervals, against one product a problem and k as it is usually written
comparison    everything `compare` reports on two such results (differences, sign flips, sets, crossing, answers)
              except reading and writing files
Medians of 3 runs. --quick: 500 problems.
"""

import argparse
import json
import resource
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from azr import passk
from azr.evals import compare

SAMPLES = 1024
KS = [2**i for i in range(11)]


def cpu_seconds(action) -> float:
    """Median over 3 runs, all threads counted."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF)
        action()
        after = resource.getrusage(resource.RUSAGE_SELF)
        taken.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return statistics.median(taken)


def one_by_one(c: np.ndarray) -> np.ndarray:
    """1 - prod (1 - k/i), a product for every problem and k (human-eval's way)."""
    return np.array(
        [
            [1.0 if SAMPLES - ci < k else 1 - np.prod(1 - k / np.arange(SAMPLES - ci + 1, SAMPLES + 1)) for k in KS]
            for ci in c.tolist()
        ]
    )


def graded(c: np.ndarray, rng: np.random.Generator) -> compare.Graded:
    """A result with c right answers a problem; right and wrong ones among 8 texts each."""
    correct = np.arange(SAMPLES)[None] < c[:, None]
    texts = np.where(correct, 0, 8) + rng.integers(0, 8, correct.shape)
    answers = [list(map(str, row)) for row in texts.tolist()]
    return compare.Graded(Path("."), {}, list(map(str, range(len(c)))), correct, answers, 0.0 * correct)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    problems, rng = 500 if args.quick else 5000, np.random.default_rng(0)
    c = rng.binomial(SAMPLES, rng.beta(0.3, 1.0, problems))
    other = rng.binomial(SAMPLES, rng.beta(0.3, 1.0, problems))
    np.testing.assert_allclose(passk.pass_at_k(SAMPLES, c[:50], KS), one_by_one(c[:50]), atol=1e-12)

    interval = cpu_seconds(lambda: passk.share_interval(passk.pass_at_k(SAMPLES, c, KS), draws=2000))
    estimator = cpu_seconds(lambda: [passk.pass_at_k(SAMPLES, c, KS) for _ in range(100)]) / 100
    usual = cpu_seconds(lambda: one_by_one(c))
    pair = graded(c, rng), graded(other, rng)
    comparison = cpu_seconds(lambda: compare.run(*pair, KS[:-1], 0.02))
    result = {
        "problems": problems,
        "samples": SAMPLES,
        "draws": 2000,
        "interval_cpu_s": interval,
        "estimator_cpu_s": estimator,
        "one_by_one_cpu_s": usual,
        "estimator_speedup": usual / estimator,
        "comparison_cpu_s": comparison,
    }
    print(f"{problems} problems x {SAMPLES} samples, {len(KS)} values of k, CPU seconds")
    print(f"pass@k with intervals, 2,000 draws   {interval:8.2f}")
    print(f"pass@k alone                         {estimator:8.3f}   {usual / estimator:.0f} x less than one by one")
    print(f"whole comparison of two results      {comparison:8.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
