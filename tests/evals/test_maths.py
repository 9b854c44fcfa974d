"""Mathematical answers: extraction, quick verdicts, and math-verify in its limited processes."""

import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from azr.evals import math_numbers
from azr.evals.math_answers import MAX_ANSWER, MathGrader, extract, last_boxed, normalise
from tests.timing import cpu_seconds

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "response, answer",
    [
        (r"so \boxed{1}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\text{a \} brace}}", r"\text{a \} brace}"),
        (r"\boxed{7} and then \boxed{never closed", "7"),
        (r"thus $\boxed 7$.", "7"),
        (r"so \fbox{12}", "12"),
        ("she has 9 * 2 = 18\n#### 18\nQ: next", "18"),
        ("The final answer is: 3.14. Next I", "3.14"),
        ("**Answer:** 42", "42"),
        ("the answer is 5\nno, the answer is 6\n", "6"),
        ("the answer is 5</think> <answer> 7 </answer>", "7"),
        (r"\boxed{5}</think> <answer> so \boxed{8} </answer>", "8"),
        ("a number, 12, and no more", None),
        ("</think><answer>```input\n[9, 1], 9\n```</answer>", None),
        ("", None),
    ],
)
def test_extraction(response, answer):
    assert extract(response) == answer


def test_extraction_is_linear_in_the_response():
    for text in (r"\boxed{", "answer is ", "<answer>", "#", "{", r"\boxed{1", "```\n"):
        long = text * (3_000_000 // len(text))
        assert cpu_seconds(partial(extract, long), 3) < 3, text
    assert last_boxed("\\boxed{" + "{" * 10**6) is None


@pytest.mark.parametrize(
    "text, normal",
    [
        ("$023$.", "23"),
        ("1,234.50", "1234.5"),
        ("-0.0", "0"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\dfrac 12", r"\frac12"),
        (r"\$70,000", "70000"),
        (r"50\%", "50%"),
    ],
)
def test_normal_form(text, normal):
    assert normalise(text) == normal


@pytest.fixture(scope="module")
def grader():
    pytest.importorskip("math_verify")
    with MathGrader(1) as grader:
        yield grader


RIGHT = [
    ("204", "204."),
    ("1/2", "0.5"),
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"(3,\frac{\pi}{2})", r"(3, \pi/2)"),
    ("18", "18 dollars"),
    ("18", "$18"),
    ("70000", "70,000"),
    (r"\text{Evelyn}", "Evelyn"),
    ("x^2-1", "(x-1)(x+1)"),
    (r"\{1,2\}", r"\{2, 1\}"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    ("5", r"x \approx 5"),
    ("1.414", r"\sqrt{2} \approx 1.414"),
    ("5", r"5\ \mathrm{kg \cdot m/s^2}"),
    ("5", r"\text{There are } 5 \text{ apples}"),
    ("5", r"\text{The answer is 5.}"),
    ("5", r"\text{Area} = 5 \text{ cm}^2"),
    ("5", "3+2=5"),
    ("-3", "(-3)"),
    ("120", r"120^\circ"),
    ("1000000", "10^6"),
    (r"4.5 \times 10^{-33}", "4.5e-33"),
    ("0.3333", "0.3333004"),
    ("1/300", "0.0033334"),
    ("52_8", "52_{8}"),
    (r"\binom{10}{3}", r"\binom{10}{3}"),
    (r"\frac{\pi}{2}", r"\pi/2"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
]
WRONG = [
    ("204", "205"),
    ("1/2", "0.51"),
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    ("x^2-1", "x^2+1"),
    ("18", "18 million"),
    (r"(1,2)", "(2,1)"),
    ("5", "__import__('os').system('true')"),
    ("2", "\u4e8c"),
    ("0", "0.0000001"),
    ("0.0000001", "0.000001"),
    (r"\frac{\pi}{10^9}", "1e-25"),
    (r"1.6 \times 10^{-19}", r"1.6 \times 10^{-18}"),
    ("2.5e-10", "-2.5e-10"),
    ("52_8", "52_9"),
    ("1000000.5", "1000000.6"),
]
# Restating the question, and answers that leave open which number they mean.
NO_ANSWERS = [
    ("5050", r"\sum_{k=1}^{100} k"),
    ("120", r"\binom{10}{3}"),
    ("59049", "3^{10}"),
    ("8", "2**3"),
    ("3", r"\int_0^3 1 dx"),
    ("2", r"17 \bmod 5"),
    ("2", r"\gcd(4, 6)"),
    ("12", "+".join(["1"] * 12)),
    ("12", r"3 \cdot 4"),
    ("120", "5!"),
    ("4", r"\sqrt{16}"),
    ("1", r"\sin(\pi/2)"),
    ("n(n+1)/2", r"\sum_{k=1}^{n} k"),
    ("3", "3 or four"),
    ("3", "3 is wrong"),
    ("3", "3 perhaps"),
    ("3", r"3 \approx 4"),
    ("4", r"3 \approx 4"),
    ("3", r"3\text{ (or 4)}"),
    ("3", r"\text{not } 3"),
    ("3", r"3 \text{ was my guess}"),
    ("3", r"3 \pm 1"),
    ("3", "3 hours 4 minutes"),
]


def test_equal_values_are_right_and_others_wrong(grader):
    verdicts = grader.grade(RIGHT + WRONG)
    assert [pair for pair, verdict in zip(RIGHT, verdicts) if not verdict.ok] == []
    assert [pair for pair, verdict in zip(WRONG, verdicts[len(RIGHT) :]) if verdict.ok] == []


def test_what_leaves_the_number_open_is_no_answer(grader):
    verdicts = grader.grade(NO_ANSWERS)
    assert [pair for pair, verdict in zip(NO_ANSWERS, verdicts) if verdict.ok] == []


def test_hostile_answers_are_read_in_linear_time():
    rng = random.Random(0)
    parts = [
        "1",
        " ",
        "^",
        "{",
        "}",
        r"\frac",
        r"\text{",
        "or",
        "x",
        "=",
        r"\approx",
        "!",
        "**",
        "-",
        "1,234",
        "9" * 20,
    ]
    texts = ["".join(rng.choices(rng.sample(parts, rng.randint(1, 4)), k=1000))[:MAX_ANSWER] for _ in range(150)]
    for text in [*texts, "So it is $11" + "$" * 1_000, "x = 14" + r"\quad" * 400]:  # blanks in disguise
        wanted = rng.choice(["5", "1/2", "52_8", "x^2"])
        assert cpu_seconds(partial(math_numbers.judge, wanted, text), 0.2) < 0.2, text


def test_equal_wrong_answers_have_one_key(grader):
    a, b, c = grader.grade([("7", r"\frac{1}{2}"), ("7", r"\dfrac{1}{2}"), ("7", r"\frac{1}{3}")])
    assert a.key == b.key != c.key


def test_what_is_no_answer(grader):
    reasons = [verdict.reason for verdict in grader.grade([("1", None), ("1", "  "), ("1", "9" * (MAX_ANSWER + 1))])]
    assert reasons == ["no_answer", "no_answer", "too_large"]


def test_an_answer_that_never_ends_costs_its_neighbours_nothing(grader):
    answers = ["x+1", "(x+1)^{3000}(y-1)^{3000}", "9^{9^{9^9}}", "(x-1)(x+1)"]
    verdicts = grader.grade([("x^2-1", answer) for answer in answers])
    assert [verdict.reason for verdict in verdicts] == ["wrong", "timeout", "endless", "ok"]


def test_a_worker_that_was_killed_is_started_again(grader):
    grader.grade([(r"\frac{\pi}{2}", r"\pi/2")])
    grader._idle.queue[0].process.kill()
    assert grader.grade([(r"\frac{\pi}{2}", r"0.5 \pi")])[0].ok


def test_sympy_stays_out_of_this_process():
    pytest.importorskip("math_verify")
    code = (
        "import sys; from azr.evals.math_answers import MathGrader\nwith MathGrader(1) as g: "
        "print(g.grade([('x^2-1', '(x-1)(x+1)')])[0].ok, "
        "'sympy' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True False False\n", done.stderr
