"""Reads what a model wrote: the text of the answer tag, fenced blocks, answers, proposals; finds code in a message.

    parse_answer("deduction", "2 + 2</think> <answer>```output\n4\n```</answer>").value           # "4"
    parse_proposal("abduction", response).value                                                 # a Proposal, or None

Text in, text out: the time is linear in the text, nothing raises on a response, and nothing is evaluated. A response is
what a model writes after a prompt that ends with an opened `<think>`: "thoughts</think> <answer>...</answer>".

Imports task.py and the tokenizer of program.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from azr.tasks.lines import KEYWORDS, string_end
from azr.tasks.program import read_program
from azr.tasks.task import MODES, Parsed, Proposal

_ANSWER = re.compile(r"</think>\s*<answer>")
# Three ticks or more, and perhaps a language, in whose name c++, c# and objective-c have marks.
_OPENING = re.compile(r"(`{3,})(?:([A-Za-z][\w+#.-]*)(?![\w`+#.-]))?")
# What matters inside of a block: ticks, quotes (which may hold ticks), comments and escapes (which may hold quotes).
_INSIDE = re.compile(r"(?m:^)[ \t]*`{3,}|`{3,}|\"\"\"|'''|[\"']|#(?:(?!```)[^\n])*|\\[\s\S]")
_DEFINITION = re.compile(r"\bdef\s+\w+\s*\(|\blambda\b[^:\n]{0,80}:")
_PROSE = frozenset(",.:-/();!?$_")  # marks that prose uses too
_WORD = re.compile(r"\w+|[^\w\s'\"]")
_LINE_END = re.compile(r"[ \t]*(?:\r?\n|\Z)")


@dataclass(frozen=True)
class Fence:
    """A closed fenced block: its language in lower case ("" if none) and its text."""

    tag: str
    text: str


def answer_text(response: str) -> tuple[bool, str | None, bool]:
    """(well formed, text of the answer or None, whether the answer tag is closed).

    Well formed: `...</think>`, optional white space, `<answer>...</answer>`, anything after it. Otherwise the last
    answer tag that was opened is read all the same, so that correctness can be told apart from format.
    """
    start = _ANSWER.search(response)
    if start is not None:
        end = response.find("</answer>", start.end())
        if end >= 0:
            return True, response[start.end() : end], True
    begin = response.rfind("<answer>")
    if begin < 0:
        return False, None, False
    begin += len("<answer>")
    end = response.find("</answer>", begin)
    return False, response[begin : end if end >= 0 else len(response)], end >= 0


def fences(text: str) -> list[Fence]:
    """The closed fenced blocks of a text, in order.

    A block ends at ticks that end a line, or that start one without naming a language. Ticks inside a string literal
    or amid a line do not end it (a message is prose and has no string literals); another opening fence leaves it
    unclosed.
    """
    blocks, position, unclosed = [], 0, set()
    while (opening := _OPENING.search(text, position)) is not None:
        tag = (opening[2] or "").lower()
        end, position, closed = _close(text, opening.end(), len(opening[1]), tag != "message", unclosed)
        if closed:
            # Models also write the text on the line of the ticks: ```output 4```
            first, newline, rest = text[opening.end() : end].partition("\n")
            body = rest if newline and not first.strip() else first.lstrip(" ") + newline + rest
            blocks.append(Fence(tag, body.rstrip()))
    return blocks


def _close(text: str, start: int, ticks: int, code: bool, unclosed: set[str]) -> tuple[int, int, bool]:
    """(end of the block that began at `start`, where to go on, whether it was closed).

    unclosed: collects the triple quotes that open a string without an end, so that each is searched for once: searched
    for again and again, they would make the time grow with the square of the text.
    """
    position = start
    while (match := _INSIDE.search(text, position)) is not None:
        mark, position = match[0].lstrip(" \t"), match.end()
        if mark[0] == "`":
            begin = position - len(mark)
            starts_line = begin > match.start() or text[begin - 1] == "\n"
            opens = starts_line and text[position : position + 1].isalpha()
            if len(mark) >= ticks and (_LINE_END.match(text, position) or starts_line and not opens):
                return begin, position, True
            if opens:
                return begin, begin, False
        elif code and mark[0] in "\"'" and mark not in unclosed:
            end, closed = string_end(text, position, mark)
            if closed:
                position = end
            elif len(mark) == 3:
                unclosed.add(mark)
    return len(text), len(text), False


# --- code in a message -----------------------------------------------------------------------------------------------


def leaked_code(program: str, message: str) -> str:
    """What code of the program, under whatever names, a message for an induction task gives away; "" if none.

    A fence or a function definition always counts. Otherwise: the whole returned expression (three tokens or more),
    any other expression of six, or eight tokens in a row, if operators, subscripts or calls are in them. Prose that
    names functions or operations passes.
    """
    if "```" in message:
        return "a code fence"
    if _DEFINITION.search(message):
        return "a function definition"
    # In the program's normal form, so that new names for its variables do not hide it. Words that every program may
    # hold stay; all others become "$" on both sides.
    shape = read_program(program).shape
    public = {word for row in shape for word in row if word.isidentifier()} | KEYWORDS
    text = _joined(_words(message, public))
    for row in shape:
        for piece in _pieces(row, public):
            if _is_code(piece) and _joined(piece) in text:
                return " ".join(piece)
    return ""


def _words(text: str, public: set[str]) -> list[str]:
    """Words and single marks without quotes, every word that the program does not share with all programs as "$"."""
    return ["$" if word[0].isalpha() and word not in public else word for word in _WORD.findall(text)]


def _pieces(row: tuple[str, ...], public: set[str]):
    """Stretches of a statement whose presence in a message counts as its code."""
    if row[0] in ("def", "class", "import", "from", "@", "async"):
        return
    body = row[1:] if row[0] in KEYWORDS else row[row.index("=") + 1 :] if "=" in row else row
    body = body[:-1] if body and body[-1] == ":" else body
    words = _words(" ".join(body), public)
    if len(words) >= (3 if row[0] == "return" else 6):
        yield words
    for i in range(len(words) - 7):
        yield words[i : i + 8]


def _is_code(piece: list[str]) -> bool:
    """Marks that prose does not use, a floor division, or a call."""
    pairs = list(zip(piece, piece[1:]))
    called = any(after == "(" and before.isidentifier() and before not in KEYWORDS for before, after in pairs)
    return called or ("/", "/") in pairs or any(not word[0].isalnum() and word not in _PROSE for word in piece)


def _joined(words: list[str]) -> str:
    # Separated by a mark that no word holds, so that a search for text finds whole words only.
    return "\0" + "\0".join(words) + "\0"


# --- answers and proposals --------------------------------------------------------------------------------------------

_OUT_TAG = {"deduction": "output", "abduction": "input", "induction": "python"}
_PYTHON = ("python", "py", "python3")


def parse_answer(mode: str, response: str) -> Parsed:
    """A solver's answer as text: its last ```output (deduction), ```input (abduction) or ```python (induction) block;
    without one, the last untagged block or, for the first two, the bare answer; for mathematics the bare answer. Never
    raises."""
    well_formed, text, closed = answer_text(response)
    if text is None:
        return Parsed(False, None, "no_format", "there is no answer tag")
    blocks = fences(text)
    tags = _PYTHON if mode == "induction" else (_OUT_TAG.get(mode),)
    candidates = [block.text for block in blocks if block.tag in tags]
    candidates = candidates or [block.text for block in blocks if not block.tag]
    # The last: a model that tries twice means its second attempt.
    value = candidates[-1] if candidates and mode != "math" else None
    if value is None and closed and (mode == "math" or mode != "induction" and "```" not in text):
        value = text.strip()
    if not value:
        detail = f"no closed ```{_OUT_TAG.get(mode, '')} block in the answer"
        return Parsed(well_formed, None, "no_answer" if well_formed else "no_format", detail)
    return Parsed(well_formed, value, "ok") if well_formed else Parsed(False, value, "no_format", _BROKEN)


_BROKEN = "the response is not '...</think> <answer>...</answer>'"


def parse_proposal(mode: str, response: str, program: str | None = None) -> Parsed:
    """A proposal: the first ```python block that defines f with the first ```input block; for induction all ```input
    blocks and the last ```message block, about `program`. Whether it is a task is for `validate` to say.

    Never raises on a response. ValueError: a mode without proposals, or induction without a program.
    """
    if mode not in MODES or mode == "induction" and program is None:
        raise ValueError(f"a proposal in mode {mode!r}{' needs its program' * (mode == 'induction')}: cannot be read")
    well_formed, text, _ = answer_text(response)
    if text is None:
        return Parsed(False, None, "no_format", "there is no answer tag")
    blocks = fences(text)
    inputs = tuple(block.text for block in blocks if block.tag == "input")
    messages = [block.text for block in blocks if block.tag == "message" and block.text]
    if mode != "induction":
        program, inputs = _program_block(blocks), inputs[:1]
    parts = {"program": program, "input": inputs, "message": mode != "induction" or messages}
    missing = next((name for name, part in parts.items() if not part), None)
    if missing:
        reason = f"no_{missing}" if well_formed else "no_format"
        return Parsed(well_formed, None, reason, f"no closed block with the {missing}")
    value = Proposal(mode, program, inputs, messages[-1] if mode == "induction" else None)
    return Parsed(well_formed, value, "ok") if well_formed else Parsed(False, value, "no_format", _BROKEN)


def _program_block(blocks: list[Fence]) -> str | None:
    python = [block.text for block in blocks if block.tag in _PYTHON]
    python = python or [block.text for block in blocks if not block.tag and "def " in block.text]
    return next((text for text in python if "def f(" in text), python[0] if python else None)
