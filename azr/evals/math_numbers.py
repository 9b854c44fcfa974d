r"""Answers to questions whose reference is a number, read without sympy: a figure, a unit or a sentence around it.

    value(r"\frac{1}{2}")                                   # Fraction(1, 2)
    judge("5", r"\text{There are } 5 \text{ apples}")       # True
    judge("5050", r"\sum_{k=1}^{100} k")                    # "unevaluated"

math-verify evaluates whatever it is given, so that restating the question is an answer to it, and takes a number from
text without asking what the text says ("3 or four"). Here a figure must stand there, alone or among words that do not
take it back. Left out: units that differ, numbers in words, percent (both ways of reading them count elsewhere).

Imports nothing of the project.
"""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_TEN = r"(?:(?:\\times|\\cdot|\*|×)\s*10\s*\^\s*(?:\{\s*([-+]?\d{1,4})\s*\}|([-+]?\d{1,4}))|[eE]([-+]?\d{1,4}))"
_SCALED = re.compile(rf"({_DIGITS})\s*{_TEN}")
_POWER = re.compile(r"10\s*\^\s*(?:\{\s*([-+]?\d{1,4})\s*\}|([-+]?\d{1,4}))")
_OVER = re.compile(rf"({_DIGITS})\s*/\s*({_DIGITS})")
_FRACTION = re.compile(rf"(\d*)\s*\\[dt]?frac\s*(?:\{{\s*({_DIGITS})\s*\}}|\s*(\d))\s*(?:\{{\s*({_DIGITS})\s*\}}|(\d))")
_FIGURE = re.compile(
    rf"[-+]?\s*(?:\d*\s*\\[dt]?frac\s*(?:\{{\s*(?:{_DIGITS})\s*\}}|\d)\s*(?:\{{\s*(?:{_DIGITS})\s*\}}|\d)"
    rf"|(?:{_DIGITS})(?:\s*/\s*(?:{_DIGITS})|\s*{_TEN})?)"
)

# What LaTeX writes around words, and the powers of units: cm^2, s^{-1}.
_WORDY = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname|rm)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z}])\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d)(?!\d)")
_BLANK = re.compile(r"\\[,;:!$ ]|\\q?quad(?![a-z])|\\(?:left|right)(?![a-z])|[~$]")
_UNIT_SIGN = re.compile(r"\\(?:cdot|times|circ|degree|deg|mu|Omega|ohm|AA|prime)(?![a-z])|\^")
_NEAR = re.compile(r"\\(?:approx|approxeq|simeq|sim)(?![a-z])|≈")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_AROUND = re.compile(r"[A-Za-z\s.,:;()/°'·-]*")

# Words that take a figure back, offer another one or are one themselves.
_HEDGES = frozenset(
    """or nor not no none and but if unless maybe perhaps possibly probably either neither both except without instead
    wrong incorrect false mistaken mistake isn isnt wasnt aren arent never guess unsure unknown minus plus times divided
    multiplied added subtracted than then to through until till between versus vs squared cubed zero one two three four
    five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty
    thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands million millions billion billions
    trillion dozen half halves third thirds quarter quarters double twice thrice mod modulo choose factorial
    infinity""".split()
)
_MATHS = frozenset("pi sqrt sin cos tan log ln exp frac sum prod int inf infty binom gcd lcm max min".split())
_VERBS = frozenset("is was are were be been being will would should could must can has have had".split())
_AFFIRMING = _VERBS | frozenset(
    """the a an this that it its there here answer final result solution value number total correct right left
    remaining in all of altogether such so possible required needed for our we my away ways""".split()
)
# Operations that are still to be carried out, under names that no figure has.
_OPERATIONS = re.compile(
    r"\\(?:sum|prod|i*int|oint|lim|[dt]?binom|choose|[bp]?mod|gcd|lcm|max|min|det)(?![a-z])|"
    r"\b(?:gcd|lcm|max|min|mod|binom|choose|sum|prod|factorial)\b|(?<![\\!])!"
)
_SIGNS = re.compile(
    r"\\(?:sqrt|log|ln|lg|exp|a?r?c?(?:sin|cos|tan|cot)h?|sec|csc|[lr](?:floor|ceil|vert)|cdot|times|div|pm|mp|ast)"
    r"(?![a-z])|\*\*?|[|]|\^(?!\s*\{?\s*\\?(?:circ|prime|degree))|(?<=[\w)}])\s*[-+]|[\w)}]\s*/[^/]*/"
)
# A tower of powers, a power of five digits, the factorial of a large number: more than memory holds.
_ENDLESS = re.compile(r"\^\s*[{(]*-?[\d.]+[})]*\s*(?:\^|!)|\^\s*[{(]*-?\d{5}|\d{5}[})]*\s*!|![)}]*\s*!|\*\*[^*]*\*\*")
_IN_BASE = re.compile(r"(\d[\dA-Za-z]*)_\{?(\d+)\}?")
CLOSE, LEAST = Fraction(5, 10**7), Fraction(1, 1000)  # absolute, as math-verify rounds; of the reference at most


def value(text: str) -> Fraction | None:
    """The number that a text is: 5, -1,234.5, 1/2, \\frac{1}{2}, 3\\frac12, 4.5e33, 4.5 \\times 10^{33}; else None."""
    text = " ".join(_BLANK.sub("", text).split()).rstrip(". ")
    if len(text) > 80:
        return None
    negative = text.startswith("-")
    size = _size(text[1:].lstrip() if text[:1] in ("-", "+") else text)
    return None if size is None else -size if negative else size


def _size(text: str) -> Fraction | None:
    if re.fullmatch(_DIGITS, text):
        return _plain(text)
    if match := _SCALED.fullmatch(text):
        return _plain(match[1]) * Fraction(10) ** int(match[2] or match[3] or match[4])
    if match := _POWER.fullmatch(text):
        return Fraction(10) ** int(match[1] or match[2])
    if match := _FRACTION.fullmatch(text):
        whole, above, below = match[1], _plain(match[2] or match[3]), _plain(match[4] or match[5])
        return Fraction(whole or 0) + above / below if below else None
    if match := _OVER.fullmatch(text):
        above, below = map(_plain, match.groups())
        return above / below if below else None
    return None


def _plain(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def same(reference: Fraction, answer: Fraction) -> bool:
    """Whether an answer is the reference: exactly for whole numbers, else as math-verify rounds to six decimals, but
    within a thousandth of the reference, or every tiny number would be right where the reference is one."""
    if reference == answer or reference.denominator == answer.denominator == 1:
        return reference == answer
    return abs(reference - answer) <= min(CLOSE, LEAST * abs(reference))


def judge(reference: str, answer: str) -> bool | str | None:
    """Whether an answer is right; or "unevaluated" or "endless", what is wrong with it; None: ask math-verify.

    Both as LaTeX or plain text, at most a few thousand characters.
    """
    # Blanks one by one: several in a row would be matched in many ways.
    reference, answer = (" ".join(text.replace("{,}", ",").replace("\\!", "").split()) for text in (reference, answer))
    if _ENDLESS.search(answer) and not _ENDLESS.search(reference):
        return "endless"
    if (bases := [_IN_BASE.fullmatch(_BLANK.sub("", text).strip()) for text in (reference, answer)]) and all(bases):
        (digits, base), (other, other_base) = (match.groups() for match in bases)
        return digits.lstrip("0").upper() == other.lstrip("0").upper() and int(base) == int(other_base)
    wanted = value(reference)
    if wanted is None:
        named = _OPERATIONS.search(answer) and not _OPERATIONS.search(reference)
        return "unevaluated" if named else None
    figure = _figure(answer)
    if figure is None:
        return False
    figure = figure.rpartition("=")[2]  # of an equation the last side counts, as for math-verify
    given = value(figure)
    if given is not None:
        return same(wanted, given)
    return "unevaluated" if _OPERATIONS.search(figure) or _SIGNS.search(figure) else None


def _figure(answer: str) -> str | None:
    """The part of an answer that says the number, as far as it can be told; None where words take it back."""
    flat = _WORDY.sub(
        lambda match: f" {_UNIT_SIGN.sub(' ', _UNIT_POWER.sub('', match[1]))} ", _UNIT_POWER.sub("", answer)
    )
    # One blank for all in a row: _FIGURE would try a run of them in as many ways as it has characters, cubed.
    flat, spoken = " ".join(_BLANK.sub(" ", flat).split()), bool(_WORDY.search(answer))
    *before, flat = _NEAR.split(flat)
    if before:
        # 22/7 \approx 3.14 is one number told twice, 3 \approx 4 is two.
        left, right = value(before[-1].rpartition("=")[2]), value(flat)
        if left is not None and right is not None and abs(left - right) > abs(right) / 100:
            return None
    words = [word.lower() for word in re.findall(r"(?<!\\)\b[A-Za-z]+", flat)] if spoken or _WORD.search(flat) else []
    if not words or _MATHS.intersection(words):
        return answer if not before and not spoken else flat
    if _HEDGES.intersection(words):
        return None
    side = flat.rpartition("=")[2].strip()
    figures = list(_FIGURE.finditer(side))
    if len(figures) != 1:
        return None if figures else side
    start, end = figures[0].span()
    if not (_AROUND.fullmatch(side[:start]) and _AROUND.fullmatch(side[end:])):
        return side
    after = set(re.findall(r"[a-z]+", side[end:].lower()))
    if after & _VERBS and not after <= _AFFIRMING or len(after) > 8:
        return None
    return figures[0][0]
