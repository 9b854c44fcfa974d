"""Model-written Python cut into tokens and logical lines, without the grammar: linear in the text, never raising.

    for line in split(source):                    # Line: depth in blocks, tokens
        line = tidy(line, in_class=False)         # without annotations and what means nothing; None if nothing is left

Brackets join lines, `;` and `if x: y` split them. Left out: scopes, which azr/tasks/program.py resolves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*)
    | (?P<string>[rRbBfFuU]{0,2}(?:\"\"\"|'''|"|'))
    | (?P<number>0[xXbBoO][0-9a-fA-F_]+|(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9_]+)?[jJ]?)
    | (?P<name>[^\W\d]\w*)
    | (?P<newline>\r\n?|\n)
    | (?P<space>[ \t\f\ufeff]+|\\\r?\n)
    | (?P<op>->|:=|\*\*=|//=|>>=|<<=|\.\.\.|[-+*/%&|^@=<>!]=|\*\*|//|<<|>>|.)""",
    re.VERBOSE | re.DOTALL,
)
_STRING_END = {q: re.compile(r"\\[\s\S]|" + q + ("" if len(q) == 3 else r"|\n")) for q in ('"""', "'''", '"', "'")}
KEYWORDS = frozenset(
    "False None True and as assert async await break class continue def del elif else except finally for from global "
    "if import in is lambda nonlocal not or pass raise return try while with yield".split()
)
BLOCKS = frozenset("if elif else for while try except finally with def class async".split())
OPEN, CLOSE = frozenset("([{"), frozenset(")]}")


def string_end(text: str, start: int, quote: str) -> tuple[int, bool]:
    """Where the string that opened before `start` ends, and whether it is closed."""
    for found in _STRING_END[quote].finditer(text, start):
        if found[0] == quote:
            return found.end(), True
        if found[0] == "\n":
            return found.start(), False
    return len(text), False


def tokens(source: str) -> list[tuple[str, str]]:
    """(kind, text) of every token but comments; kinds: name, number, string, op, newline, space."""
    found, position = [], 0
    while position < len(source):
        match = _TOKEN.match(source, position)
        kind, text, position = match.lastgroup, match[0], match.end()
        if kind == "string":
            end, _ = string_end(source, position, text.lstrip("rRbBfFuU"))
            text, position = text + source[position:end], end
        if kind != "comment":
            found.append((kind, text))
    return found


# --- logical lines ---------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """One statement or block header: its depth in blocks, its tokens and the scope of each token."""

    level: int
    tokens: list[tuple[str, str]]
    scopes: list[Scope] = field(default_factory=list)
    scope: Scope | None = None  # the scope the statement stands in


@dataclass
class Scope:
    """What binds names: a module, a function, a class body, a lambda or a comprehension."""

    kind: str
    parent: Scope | None
    names: dict[str, str | None] = field(default_factory=dict)  # name -> its number once it has one
    outer: dict[str, Scope] = field(default_factory=dict)  # declared global or nonlocal -> where to look
    functions: dict[str, Scope] = field(default_factory=dict)  # functions defined here, for keyword arguments

    def find(self, name: str) -> Scope | None:
        """The scope that binds `name` as seen from here; a class body is not seen from the functions in it."""
        scope = self
        while scope is not None:
            if name in scope.outer:
                scope = scope.outer[name]
            elif name in scope.names and (scope is self or scope.kind != "class"):
                return scope
            else:
                scope = scope.parent
        return None


def split(source: str) -> list[Line]:
    """Logical lines: brackets join lines, `;` and `if x: y` split them, blank lines vanish."""
    lines, current, indents, depth, column, fresh = [], [], [0], 0, 0, True

    def flush() -> None:
        nonlocal current
        if current:
            lines.extend(_statements(current, len(indents) - 1))
        current = []

    for kind, text in tokens(source):
        if kind == "newline":
            if depth == 0:
                flush()
                column, fresh = 0, True
        elif kind == "space":
            if fresh and not current and text[0] != "\\":
                column += len(text.replace("\f", "").replace("\ufeff", "").expandtabs())
        else:
            if fresh and not current and depth == 0:
                while column < indents[-1]:
                    indents.pop()
                if column > indents[-1]:
                    indents.append(column)
                fresh = False
            depth = max(0, depth + (text in OPEN) - (text in CLOSE)) if kind == "op" else depth
            current.append((kind, text))
    flush()
    return lines


def _statements(line: list[tuple[str, str]], level: int) -> list[Line]:
    """Splits `a; b` and the body that stands behind a block's colon."""
    found, start, depth, lambdas = [], 0, 0, 0
    header = line[0][1] in BLOCKS or _is_match(line)
    for i, (kind, text) in enumerate(line):
        if kind == "op":
            depth += (text in OPEN) - (text in CLOSE)
        if depth > 0:
            continue
        lambdas += kind == "name" and text == "lambda"
        if (kind, text) == ("op", ":") and lambdas:
            lambdas -= 1
        elif (kind, text) == ("op", ":") and header:
            found.append(Line(level, line[start : i + 1]))
            start, level, header = i + 1, level + 1, False
        elif (kind, text) == ("op", ";"):
            found.append(Line(level, line[start:i]))
            start = i + 1
    found.append(Line(level, line[start:]))
    return [statement for statement in found if statement.tokens]


def _is_match(line: list[tuple[str, str]]) -> bool:
    """Whether `match` or `case` opens a block here, and is no name."""
    if line[0][1] not in ("match", "case") or len(line) < 3 or line[-1][1] != ":" and line[0][1] == "match":
        return False
    return line[1][0] in ("name", "number", "string") or line[1][1] in ("(", "[", "{", "-", "*")


def tidy(line: Line, in_class: bool) -> Line | None:
    """The statement without annotations and trailing commas; None for docstrings, `pass` and typing imports."""
    words = line.tokens
    if all(kind == "string" for kind, _ in words) or words[0][1] == "pass":
        return None
    if words[0][1] in ("import", "from") and len(words) > 1 and words[1][1] == "typing":
        return None
    if words[0][1] == "def" or words[0][1] == "async" and len(words) > 1 and words[1][1] == "def":
        words = _bare_header(words)
    elif words[0][0] == "name" and words[0][1] not in KEYWORDS and not _is_match(words):
        words = _bare_assignment(words, in_class)
    return Line(line.level, _no_trailing_commas(words)) if words else None


def _bare_header(words: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A `def` line without the annotations of its parameters and of its result."""
    kept, depth, lambdas = [], 0, 0
    skipping = ()  # what ends the annotation, as (depth, text)
    for kind, text in words:
        depth -= kind == "op" and text in CLOSE
        lambdas += text == "lambda"
        if (depth, text) in skipping:
            skipping = ()
        if depth == 1 and text == ":" and not lambdas:
            skipping = ((1, ","), (1, "="), (0, ")"))
        elif (depth, text) == (0, "->"):
            skipping = ((0, ":"),)
        elif text == ":" and lambdas:
            lambdas -= 1
        if not skipping:
            kept.append((kind, text))
        depth += kind == "op" and text in OPEN
    return kept


def _bare_assignment(words: list[tuple[str, str]], in_class: bool) -> list[tuple[str, str]]:
    """`x: int = 3` as `x = 3`; a bare `x: int` declares nothing that is run, except a field in a class body."""
    depth = 0
    for i, (kind, text) in enumerate(words):
        if kind != "op":
            if text == "lambda":
                return words
            continue
        depth += (text in OPEN) - (text in CLOSE)
        if depth == 0 and text == "=":
            return words
        if depth == 0 and text == ":":
            value = next((j for j in range(i, len(words)) if words[j] == ("op", "=")), None)
            if value is None:
                return words[: i + 1] if in_class else []
            return words[: i + in_class] + words[value:]
    return words


def _no_trailing_commas(words: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Drops the comma before a closing bracket where the bracket holds another comma, so that it means nothing."""
    kept, commas = [], [0]
    for kind, text in words:
        if kind == "op" and text in OPEN:
            commas.append(0)
        elif kind == "op" and text in CLOSE:
            if kept and kept[-1] == ("op", ",") and commas[-1] > 1:
                kept.pop()
            if len(commas) > 1:
                commas.pop()
        commas[-1] += (kind, text) == ("op", ",")
        kept.append((kind, text))
    return kept
