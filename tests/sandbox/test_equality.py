"""When two literal values are equal: examples, and the time that comparing takes."""

import math
import random

import pytest

from sandbox.literal import equal
from tests.timing import cpu_seconds


@pytest.mark.parametrize(
    "a, b, same",
    [
        (1, 1.0, True),
        (1, True, True),
        ([1], (1,), False),
        ("1", 1, False),
        ({1}, frozenset({1}), True),
        (0.0, -0.0, True),
        (0.1 + 0.2, 0.3, True),
        (1.0, 1.0 + 1e-6, False),
        (1e-300, 0.0, False),
        (math.nan, math.nan, True),
        ([math.nan], [math.nan], True),
        ({math.nan}, {math.nan}, True),
        ({"a": 0.1 + 0.2}, {"a": 0.3}, True),
        ({0.1 + 0.2: 1}, {0.3: 1}, True),
        (2**60, float(2**60), True),
        (2**60 + 1, float(2**60), False),
        (10**400, math.inf, False),
        ({(0.1 + 0.2, 1), (5, 6)}, {(5, 6), (0.3, 1)}, True),
        ({0.3: 1, 0.1 + 0.2: 2}, {0.3: 2, 0.1 + 0.2: 1}, False),
        ({1: 2}, {1: 2, 3: 4}, False),
        (b"a", "a", False),
        (None, 0, False),
        ({1.0, 2.0}, {1.0, 2.5}, False),
        (1, 1 + 1e-12, False),
        (math.inf, math.inf, True),
        (math.inf, 1e308, False),
    ],
)
def test_equality(a, b, same):
    assert equal(a, b) is same and equal(b, a) is same


def numbers_near(x, sizes, rng):
    """Sets in sets of these sizes, of numbers that only rounding tells from x."""
    if not sizes:
        return x * (1 + 1e-8 * rng.random())
    return frozenset(numbers_near(x, sizes[1:], rng) for _ in range(sizes[0]))


def test_comparing_takes_linear_time():
    noisy = {(n / 3, float("nan")) for n in range(2_000)}
    # Sets in sets whose elements pair in no order of size: tried in every way at each level they took 3 s.
    rng = random.Random(1)
    left, right = ([numbers_near(1.5, (16, 16, 4), rng)] for _ in range(2))

    def compare():
        assert equal(noisy, {(x * (1 + 1e-12), y) for x, y in noisy})
        assert not equal(noisy, {(x * (1 + 1e-6), y) for x, y in noisy})
        assert not equal(left, right)

    assert cpu_seconds(compare, 1.5) < 1.5
