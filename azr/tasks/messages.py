"""Does the message of an induction task give its program away? As code, in another spelling, as a table, encoded.

    program = "def f(x):\n    return x * x"
    leak(program, "give back x * x")                            # what is given away, "" for nothing
    shows("2 -> 4, 3 -> 9", [("2", "4"), ("3", "9")])          # True
    expressions(program, "square it: x^2")      # programs to be tried in the sandbox: `def f(x): return x ** 2`

A hint in words is wanted and passes, an example too. Text in, text out, in time linear in the text; nothing is
evaluated. Imports program.py and lines.py.
"""

from __future__ import annotations

import base64
import codecs
import html
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator
from functools import lru_cache

from azr.tasks.lines import KEYWORDS
from azr.tasks.program import read_program

EXAMPLES = 1  # (input, output) pairs that a message may show
IN_A_ROW = 4  # outputs one after another that are the table, with or without their inputs
TRIES = 4  # expressions of one message that are tried

_DEFINITION = re.compile(r"\bdef\s+\w+\s*\(|\blambda\b[^:\n]{0,80}:")
_PROSE = frozenset(",.:-/();!?$_")  # marks that prose uses too
_WORD = re.compile(r"\w+|[^\w\s'\"]")
_ENCODED = re.compile(r"[A-Za-z0-9+/]{24,}={0,2}|(?:\\x[0-9a-fA-F]{2}){8,}")
# Characters by their numbers, eight or more in a row, and the base of these: \\x78 \\u0078 0x78 %78, 01111000, 78, 120.
_CODES = (
    (re.compile(r"(?:(?:\\x|\\u00|0x|%)[0-9a-fA-F]{2}[\s,;]*){8,}"), re.compile("[0-9a-fA-F]{2}(?![0-9a-fA-Fx])"), 16),
    (re.compile(r"(?:\\[0-7]{3}[\s,;]*){8,}"), re.compile("[0-7]{3}"), 8),
    (re.compile(r"(?:\b[01]{7,8}\b[\s,;]*){8,}"), re.compile("[01]+"), 2),
    (re.compile(r"(?:\b[0-9a-fA-F]{2}\b[\s,;]*){8,}"), re.compile("[0-9a-fA-F]{2}"), 16),
    (re.compile(r"(?:\b\d{2,3}\b[\s,;]*){8,}"), re.compile(r"\d+"), 10),
)
_PACKED = (base64.b64decode, base64.urlsafe_b64decode, base64.b32decode, base64.b85decode, base64.a85decode)
# Signs of mathematics, and what Python writes for them.
_SIGNS = {"−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", r"\cdot": "*", r"\times": "*", "{": "(", "}": ")"}
_SIGNS |= {sign: f"^{digit}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {"$": " "}
_SIGN = re.compile("|".join(map(re.escape, _SIGNS)))
_HEAD = "import math\nfrom math import sqrt\nfrom operator import add, floordiv, mod, mul, neg, sub, truediv\n"
_TOKEN = re.compile(r"[A-Za-z_]\w*|\d+(?:\.\d+)?|\*\*|//|[-+*/%^()\[\],.<>=!&|:]|\S")
_OPERATORS = frozenset("+ - * / % ^ ** // & | [ (".split())
_FUNCTIONS = frozenset(
    "abs min max sum len sorted reversed round int str list set tuple range ord chr bool float divmod pow zip map "
    "enumerate any all math sqrt add sub mul floordiv truediv mod neg upper lower strip replace split join count index "
    "for in if else and or not".split()
)


def cleaned(message: str) -> str:
    """The message without HTML entities, full-width letters and marks that are not seen."""
    text = unicodedata.normalize("NFKC", html.unescape(message))
    return "".join(letter for letter in text if unicodedata.category(letter) != "Cf")


def leak(program: str, message: str) -> str:
    """What a message gives away of the program, as code or encoded; "" if nothing."""
    text = cleaned(message)
    for reading in (text, *_decoded(text)):
        if code := leaked_code(program, reading):
            return code
    for word in _ENCODED.findall(text):
        # Digits among letters of both cases, or among hexadecimal ones: no word or number of a language.
        mixed = word.upper() != word != word.lower() or not re.search("[g-wyzG-WYZ]", word)
        if mixed and re.search("[0-9]", word) and re.search("[A-Za-z]", word):
            return "an encoded text"
    return ""


def _decoded(text: str) -> Iterator[str]:
    """The text in readings that are no language: backwards, turned by 13 letters, unquoted, unpacked, from numbers."""
    yield text[::-1]
    yield codecs.encode(text, "rot13")
    yield urllib.parse.unquote(text)
    for several, one, base in _CODES:
        for run in several.findall(text):
            yield "".join(chr(int(code, base)) for code in one.findall(run))
    for word in dict.fromkeys(("".join(text.split()), *re.findall(r"\S{16,}", text))):
        for unpack in _PACKED:
            try:
                yield unpack(word + "=" * (-len(word) % 4 if "=" not in word else 0)).decode("ascii")
            except ValueError:  # not of this kind
                continue


def shows(message: str, pairs: tuple[tuple[str, str], ...]) -> bool:
    """Whether the message holds more than EXAMPLES pairs, (input, output) or (output, input), or IN_A_ROW outputs in
    their order, from the first to the last or backwards."""
    words = _joined(_values(cleaned(message)))
    rows = [(_values(given), _values(output)) for given, output in pairs]
    shown = sum(_joined(given + output) in words for given, output in rows if given and output)
    turned = sum(_joined(output + given) in words for given, output in rows if given and output)
    for outputs in ([output for _, output in rows], [output for _, output in rows[::-1]]):
        for i in range(len(outputs) - IN_A_ROW + 1):
            row = [word for output in outputs[i : i + IN_A_ROW] for word in output]
            if len(row) >= IN_A_ROW and _joined(row) in words:
                return True
    return max(shown, turned) > EXAMPLES


def _values(text: str) -> list[str]:
    """Numbers and words, without the marks between them; 007, 7.0 and 0x7 are 7."""
    return [_shortest(word) for word in re.findall(r"-?(?:0x[0-9a-fA-F]+|\d+(?:\.\d+)?)|[^\W\d_]+", text)]


def _shortest(word: str) -> str:
    sign, digits = ("-", word[1:]) if word[0] == "-" else ("", word)
    if not digits[0].isdigit():
        return word
    if digits[:2] == "0x":
        return f"{sign}{int(digits, 16)}"
    whole, _, rest = digits.partition(".")
    whole, rest = whole.lstrip("0") or "0", rest.rstrip("0")
    return f"{sign}{whole}.{rest}" if rest else sign + whole


def expressions(program: str, message: str) -> list[str]:
    """Programs whose result is an expression of the message, in Python's spelling; at most TRIES. Whether one of them
    does what the task's program does is for the sandbox to say."""
    known = list(read_program(program).parameters)
    runs: list[list[str]] = [[]]
    plain = cleaned(_SIGN.sub(lambda sign: _SIGNS[sign[0]], message))
    for token in _TOKEN.findall(re.sub(r"(?<=\d)(?=[A-Za-z(])", "*", plain)):
        name = token.isidentifier()
        if not name or token in _FUNCTIONS or token in known or len(token) == 1:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    programs = []
    for run in runs:
        while run and run[-1] in ".,:=!(":
            run.pop()
        run = run[run.index("=") + 1 :] if "=" in run else run
        run = run[run[:1] == [">"] :]  # of an arrow
        names = [token for token in dict.fromkeys(run) if token.isidentifier() and token not in _FUNCTIONS]
        parameters = known
        if not names or len(names) > len(parameters) or not _OPERATORS.intersection(run):
            continue
        if not set(names) <= set(parameters):  # other names than the program's: the first ones, in their order
            parameters = [*names, *(f"_{i}" for i in range(len(parameters) - len(names)))]
        text = " ".join(run).replace("^", "**").replace(" . ", ".")
        programs.append(f"{_HEAD}def f({', '.join(parameters)}):\n    return {text}")
    return programs[:TRIES]


def leaked_code(program: str, message: str) -> str:
    """What code of the program, under whatever names, a cleaned message gives away; "" if none.

    A fence or a function definition always counts. Otherwise: the whole returned expression (three tokens or more),
    any other expression of six, or eight tokens in a row, if operators, subscripts or calls are in them. Prose that
    names functions or operations passes.
    """
    if "```" in message:
        return "a code fence"
    if _DEFINITION.search(message):
        return "a function definition"
    public, pieces = _code_of(program)
    words = _words(message, public)
    for size in sorted({len(piece) for piece in pieces}):
        for i in range(len(words) - size + 1):
            if tuple(words[i : i + size]) in pieces:
                return " ".join(words[i : i + size])
    return ""


@lru_cache(maxsize=64)
def _code_of(program: str) -> tuple[set[str], set[tuple[str, ...]]]:
    """(words that every program may hold, stretches of up to eight words whose presence in a message counts as this
    program's code). Once per program: a message may have a hundred readings."""
    # In the program's normal form, so that new names for its variables do not hide it. Words that every program may
    # hold stay; all others become "$" on both sides.
    shape = read_program(program).shape
    public = {word for row in shape for word in row if word.isidentifier()} | KEYWORDS
    return public, {piece for row in shape for piece in _pieces(row, public)}


def _words(text: str, public: set[str]) -> list[str]:
    """Words and single marks without quotes, every word that the program does not share with all programs as "$"."""
    return ["$" if word[0].isalpha() and word not in public else word for word in _WORD.findall(text)]


def _pieces(row: tuple[str, ...], public: set[str]) -> Iterator[tuple[str, ...]]:
    """The stretches of a statement that count: its whole expression, of a longer one every eight words in a row; those
    with a mark that prose does not use, a floor division or a call."""
    if row[0] in ("def", "class", "import", "from", "@", "async"):
        return
    body = row[1:] if row[0] in KEYWORDS else row[row.index("=") + 1 :] if "=" in row else row
    body = body[:-1] if body and body[-1] == ":" else body
    words = _words(" ".join(body), public)
    if len(words) < (3 if row[0] == "return" else 6):
        return
    size = min(len(words), 8)
    marks = [not word[0].isalnum() and word not in _PROSE for word in words]
    pairs = [
        before == after == "/" or after == "(" and before.isidentifier() and before not in KEYWORDS
        for before, after in zip(words, words[1:])
    ]
    for i in range(len(words) - size + 1):
        if any(marks[i : i + size]) or any(pairs[i : i + size - 1]):
            yield tuple(words[i : i + size])


def _joined(words: list[str]) -> str:
    # Separated by a mark that no word holds, so that a search for text finds whole words only.
    return "\0" + "\0".join(words) + "\0"
