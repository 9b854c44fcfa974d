"""Reads what a model wrote: the text of the answer tag, fenced blocks, answers, proposals.

    parse_answer("deduction", "2 + 2</think> <answer>```output\n4\n```</answer>").value           # "4"
    parse_proposal("abduction", response).value                                                 # a Proposal, or None

Text in, text out: the time is linear in the text, nothing raises on a response, and nothing is evaluated. A response is
what a model writes after a prompt that ends with an opened `<think>`: "thoughts</think> <answer>...</answer>".

Imports task.py and the tokenizer of lines.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from azr.tasks.lines import string_end
from azr.tasks.task import INDUCTION_INPUTS, MODES, Parsed, Proposal

_ANSWER = re.compile(r"</think>\s*<answer>")
# Three ticks or more, and perhaps a language, in whose name c++, c# and objective-c have marks.
_OPENING = re.compile(r"(`{3,})(?:([A-Za-z][\w+#.-]*)(?![\w`+#.-]))?")
# What matters inside of a block: ticks, quotes (which may hold ticks), comments and escapes (which may hold quotes).
_INSIDE = re.compile(r"(?m:^)[ \t]*`{3,}|`{3,}|\"\"\"|'''|[\"']|#(?:(?!```)[^\n])*|\\[\s\S]")
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
    """A proposal: the first ```python block that defines f with the first ```input block; for induction the last ten
    ```input blocks (a model that writes more is not wrong: AZR reads it so) and the last ```message block, about
    `program`. Whether it is a task is for `validate` to say.

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
    inputs = inputs[-INDUCTION_INPUTS:]
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
