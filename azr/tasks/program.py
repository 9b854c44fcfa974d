"""Reads model-written Python as text: normal form, triviality.

Text from a model is never handed to `ast` or `compile` here: a deeply nested program can take the interpreter down,
and the process that calls this holds the weights. Instead a small regular-expression tokenizer (lines.py), linear in
the text and never raising, cuts a program into logical lines, and names are resolved to the scope that binds them
(module, function, lambda, comprehension). That is enough to tell whether two programs are the same but for names,
comments, docstrings, annotations and layout.

Left out: the grammar. What is not Python gets some normal form too; whether it runs is the sandbox's business. Two
programs with one normal form behave alike, the converse is not promised: redundant brackets, other spellings of a
number or a string with escapes, or another order of statements give another form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from azr.tasks.lines import BLOCKS, CLOSE, KEYWORDS, OPEN, Line, Scope, split, tidy, tokens

ENTRY = "f"
# Characters, as many as a proposal or an answer to a task may have; anything longer is its own normal form. A line of
# one character costs 20 microseconds, and the process that trains waits.
MAX_SOURCE = 8_192

_BARE_STRING = re.compile(r"""[uU]?(['"])([^'"\\\n]*)\1""")


# --- scopes ----------------------------------------------------------------------------------------------------------


def _resolve(lines: list[Line]) -> Scope:
    """Gives every token its scope and every scope the names it binds; returns the module's scope."""
    module = Scope("module", None)
    stack = [(-1, module)]  # (level of the header, scope of the block below it)
    for line in lines:
        while stack[-1][0] >= line.level:
            stack.pop()
        line.scope = stack[-1][1]
        words = [text for _, text in line.tokens]
        at, inner = int(words[:2] == ["async", "def"]), None
        if words[at] in ("def", "class") and len(words) > at + 1:
            inner = Scope(words[at], line.scope)
            line.scope.names.setdefault(words[at + 1], None)
            if words[at] == "def":
                line.scope.functions[words[at + 1]] = inner
            stack.append((line.level, inner))
        _Scanner(line, inner if words[at] == "def" else None).run()
        _bind(line, words)
    return module


def _comprehensions(line: Line) -> set[int]:
    """Positions of the brackets that hold a comprehension."""
    found, stack = set(), []
    for i, (kind, text) in enumerate(line.tokens):
        if kind == "op" and text in OPEN:
            stack.append(i)
        elif kind == "op" and text in CLOSE and stack:
            stack.pop()
        elif kind == "name" and text == "for" and stack:
            found.add(stack[-1])
    return found


@dataclass
class _Opened:
    """A lambda or a comprehension whose end has not been read yet."""

    outside: Scope  # where it stands
    depth: int  # in brackets: of a comprehension's inside, of the place where a lambda stands
    inside: Scope
    first_iterable: bool  # a comprehension's first iterable is still to come: it is evaluated outside


class _Scanner:
    """Walks a statement's tokens once: the scope of each, and what parameters, lambdas and comprehensions bind.

    A lambda ends at a comma or bracket of its depth, a comprehension at its bracket. The target of a comprehension is
    bound inside of it although it is read after the value, so the scope is opened at the bracket, not at `for`.
    """

    def __init__(self, line: Line, function: Scope | None) -> None:
        """function: the scope that the parameters in this line belong to, if it is a `def`."""
        self.line, self.function = line, function
        self.comprehensions = _comprehensions(line)
        self.scope, self.depth = line.scope, 0
        self.opened: list[_Opened] = []
        self.parameters = False  # between `lambda` and its colon
        self.targets = False  # between `for` and `in` of a comprehension

    def run(self) -> None:
        """Fills in line.scopes."""
        for i, (kind, text) in enumerate(self.line.tokens):
            self._leave(kind, text)
            self.line.scopes.append(self._owner(i) if kind == "name" and text not in KEYWORDS else self.scope)
            self._enter(i, kind, text)

    def _at_opened(self) -> bool:
        """Whether this is the depth of the innermost lambda or comprehension."""
        return bool(self.opened) and self.opened[-1].depth == self.depth

    def _leave(self, kind: str, text: str) -> None:
        """What ends before this token."""
        if kind == "op" and text in CLOSE:
            while self.opened and self.opened[-1].depth >= self.depth:
                self.scope = self.opened.pop().outside
            self.depth -= 1
        elif text in ("for", "if", "async"):
            self._leave_lambdas(text == "for")
            if self._at_opened():  # the first iterable is over
                self.scope = self.opened[-1].inside
        elif text == "," and not self.parameters:
            self._leave_lambdas(True)

    def _leave_lambdas(self, ended: bool) -> None:
        while ended and self._at_opened() and self.opened[-1].inside.kind == "lambda":
            self.scope = self.opened.pop().outside

    def _owner(self, i: int) -> Scope:
        """The scope that the name at this position is looked up in; binds it if it is a parameter or a target."""
        text, before = self.line.tokens[i][1], self.line.tokens[i - 1][1] if i else ""
        if before in ("*", "**") and i > 1:
            before = self.line.tokens[i - 2][1]
        starts = before in ("(", ",", "lambda")
        if self.function is not None and self.depth == 1 and starts and not self.opened:
            self.function.names.setdefault(text, None)
            return self.function
        parameter = self.parameters and self._at_opened() and starts
        if parameter or (self.targets and before != "."):
            self.scope.names.setdefault(text, None)
        return self.scope

    def _enter(self, i: int, kind: str, text: str) -> None:
        """What begins behind this token."""
        if kind == "op" and text in OPEN:
            self.depth += 1
            if i in self.comprehensions:
                self._open("comprehension")
        elif text == "lambda":
            self._open("lambda")
            self.parameters = True
        elif text == ":" and self.parameters and self._at_opened():
            self.parameters = False
        elif text == "for" and self.scope.kind == "comprehension":
            self.targets = True
        elif text == "in" and self.targets:
            self.targets = False
            if self._at_opened() and self.opened[-1].first_iterable:
                self.opened[-1].first_iterable = False
                self.scope = self.opened[-1].outside

    def _open(self, kind: str) -> None:
        opened = _Opened(self.scope, self.depth, Scope(kind, self.scope), kind == "comprehension")
        self.opened.append(opened)
        self.scope = opened.inside


def _bind(line: Line, words: list[str]) -> None:
    """Names that a statement binds in its own scope (parameters and comprehension targets are bound by _Scanner)."""
    if words[0] in ("global", "nonlocal") and line.scope.parent is not None:
        _declare(line, words[0])
        return
    for i in _bound(line, words):
        if line.tokens[i][0] == "name" and words[i] not in KEYWORDS:
            line.scope.names.setdefault(words[i], None)
    _bind_walruses(line, words)


def _declare(line: Line, word: str) -> None:
    """`global` and `nonlocal`: where the names are to be looked up."""
    outside = line.scope.parent
    while word == "global" and outside.parent is not None:
        outside = outside.parent
    declared = [text for kind, text in line.tokens[1:] if kind == "name"]
    line.scope.outer.update(dict.fromkeys(declared, outside))
    if word == "global":
        outside.names.update({name: None for name in declared if name not in outside.names})


def _bound(line: Line, words: list[str]) -> list[int]:
    """Positions of what a statement binds; an import takes back names that mean something."""
    first, bound = words[0], [i + 1 for i, word in enumerate(words[:-1]) if word == "as"]
    if first in ("import", "from"):
        imported = {words[i] for i in range(1, len(words)) if line.tokens[i][0] == "name"} - {words[i] for i in bound}
        for name in imported - KEYWORDS:
            line.scope.names.pop(name, None)  # `import math` binds a name that means something: it stays
        return bound
    if first == "for" or words[:2] == ["async", "for"]:
        return bound + _targets(line, words.index("for") + 1, words.index("in") if "in" in words else 0)
    if first == "case":
        return bound + [i for i in _targets(line, 1, len(words)) if words[i] != "_"]
    return bound if first in BLOCKS else bound + _assigned(line, words)


def _bind_walruses(line: Line, words: list[str]) -> None:
    """`x := ...` binds outside of the comprehension that it stands in."""
    for i in range(len(words) - 1):
        if words[i + 1] == ":=" and line.tokens[i][0] == "name":
            scope = line.scopes[i]
            while scope.kind == "comprehension":
                scope = scope.parent
            scope.names.setdefault(words[i], None)


def _assigned(line: Line, words: list[str]) -> list[int]:
    """Positions of the names that `a = b, c[i] = ...` or `a += ...` binds."""
    depth, last = 0, 0
    for i, word in enumerate(words):
        if line.tokens[i][0] == "op":
            depth += (word in OPEN) - (word in CLOSE)
            if depth == 0 and word.endswith("=") and word not in ("==", "!=", "<=", ">="):
                last = i
    return _targets(line, 0, last)


def _targets(line: Line, start: int, stop: int) -> list[int]:
    """Positions of names in a target list: no attributes, nothing subscripted or called, nothing inside those."""
    found, closers, inside = [], [], 0
    for i in range(start, stop):
        kind, text = line.tokens[i]
        before = line.tokens[i - 1] if i > start else ("op", ",")
        if kind == "op" and text in OPEN:
            closers.append(before[0] == "name" and before[1] not in KEYWORDS or before[1] in CLOSE)
            inside += closers[-1]
        elif kind == "op" and text in CLOSE and closers:
            inside -= closers.pop()
        elif kind == "name" and text not in KEYWORDS and before[1] != "." and not inside:
            if i + 1 >= len(line.tokens) or line.tokens[i + 1][1] not in (".", "[", "("):
                found.append(i)
    return found


# --- the normal form and what is read off it -------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What the text of a program tells without running it."""

    form: str  # normal form; equal forms are one program
    has_entry: bool  # a top-level `def f`
    trivial: str  # "identity", "no parameter is read", or "" when neither
    parameters: dict[str, str]  # of f: name -> its name in the normal form
    shape: tuple[tuple[str, ...], ...]  # per statement: tokens with every name the program binds as "$"


@lru_cache(maxsize=4096)
def read_program(source: str) -> Reading:
    """Reads a program; linear in its length, never raises. Longer than MAX_SOURCE: the text itself is the form."""
    if len(source) > MAX_SOURCE:
        return Reading(source, True, "", {}, ())
    lines, blocks = [], []  # blocks: (level, word) of the headers that are open
    for line in split(source):
        while blocks and blocks[-1][0] >= line.level:
            blocks.pop()
        shown = tidy(line, bool(blocks) and blocks[-1][1] == "class")
        if line.tokens[-1][1] == ":":
            blocks.append((line.level, line.tokens[0][1]))
        if shown is not None:
            lines.append(shown)
    module = _resolve(lines)
    counter = iter(range(len(source) + 1))
    words = [_render(line, counter) for line in lines]
    start, stop = _entry(lines)
    scope = module.functions.get(ENTRY)
    parameters = {name: number for name, number in (scope.names if scope else {}).items() if number}
    parameters = {name: number for name, number in parameters.items() if start is not None and number in words[start]}
    trivial = "" if start is None else _triviality(lines[start:stop], words[start:stop], set(parameters.values()))
    return Reading(
        form="\0\n".join(f"{line.level}\0" + "\0".join(row) for line, row in zip(lines, words)),
        has_entry=start is not None,
        trivial=trivial,
        parameters=parameters,
        shape=tuple(tuple("$" if word[0] == "$" else word for word in row) for row in words),
    )


def bare(source: str) -> str:
    """The program without comments and docstrings, nor the blank lines that they leave; one that has none comes back
    as it is. A block that holds nothing else gets `pass`."""
    words = tokens(source)
    rows, depth = [[]], 0  # logical lines, each with its space before it
    for kind, text in words:
        depth = max(0, depth + (text in OPEN) - (text in CLOSE)) if kind == "op" else depth
        if kind == "newline" and depth == 0:
            rows.append([])
        else:
            rows[-1].append((kind, text))
    rows = [row for row in rows if any(kind not in ("space", "newline") for kind, _ in row)]
    alone = [all(kind in ("string", "space", "newline") for kind, _ in row) for row in rows]
    if not any(alone) and sum(len(text) for _, text in words) == len(source):
        return source
    indents = [row[0][1] if row[0][0] == "space" else "" for row in rows]
    lines = []
    for i, row in enumerate(rows):
        if not alone[i]:
            lines.append("".join(text for _, text in row).rstrip())
        elif indents[i] not in (indents[i - 1] if i else None, indents[i + 1] if i + 1 < len(rows) else None):
            lines.append(indents[i] + "pass")
    return "\n".join(lines)


_NUMBER_WORD = re.compile(r"(?<=\0)\.?\d[^\0]*")
_STRING_WORD = re.compile(r"(?<=\0)[rRbBuUfF]{0,2}[\"'][^\0]*")


def skeleton(source: str) -> str:
    """The normal form with every number 0 and every string empty: equal for programs that differ in constants, names
    and layout only."""
    return _STRING_WORD.sub("''", _NUMBER_WORD.sub("0", read_program(source).form))


def _render(line: Line, counter) -> list[str]:
    """The tokens of a statement with every bound name as $k, numbered in order of first appearance."""
    row, callees = [], []
    for i, (kind, text) in enumerate(line.tokens):
        before = line.tokens[i - 1] if i else ("", "")
        after = line.tokens[i + 1][1] if i + 1 < len(line.tokens) else ""
        scope = line.scopes[i]
        if kind == "op" and text in OPEN:
            called = text == "(" and before[0] == "name" and before[1] not in KEYWORDS
            callees.append(_callee(before[1], scope) if called else None)
        elif kind == "op" and text in CLOSE and callees:
            callees.pop()
        if kind == "string":
            row.extend(_render_string(text, scope, counter))
        elif kind != "name" or text in KEYWORDS or before[1] == ".":
            row.append(text)
        elif after == "=" and callees and callees[-1] is not None and before[1] in ("(", ",") and not _is_header(line):
            target = callees[-1]  # a keyword argument: a name of the function that is called
            row.append(_number(text, target, counter) if isinstance(target, Scope) else text)
        else:
            row.append(_number(text, scope, counter))
    return row


def _is_header(line: Line) -> bool:
    return "def" in (line.tokens[0][1], line.tokens[min(1, len(line.tokens) - 1)][1])


def _callee(name: str, scope: Scope) -> Scope | str:
    """The scope of a function of the program by that name, else the name."""
    owner = scope.find(name)
    return owner.functions.get(name, name) if owner is not None else name


def _number(name: str, scope: Scope, counter) -> str:
    owner = scope.find(name)
    if owner is None or owner.kind == "class" or (owner.kind == "module" and name == ENTRY):
        return name
    if owner.names[name] is None:
        owner.names[name] = f"${next(counter)}"
    return owner.names[name]


def _render_string(text: str, scope: Scope, counter) -> list[str]:
    """A string with plain quotes where possible; the expressions in the braces of an f-string as tokens."""
    bare = _BARE_STRING.fullmatch(text)
    if bare:
        return [f"'{bare[2]}'"]
    prefix = text[: len(text) - len(text.lstrip("rRbBfFuU"))]
    if "f" not in prefix.lower():
        return [text]
    row, depth, start = [], 0, 0
    for brace in re.finditer(r"\{\{|\}\}|[{}]", text):
        if len(brace[0]) == 2 and depth == 0:
            continue
        for ch in brace[0]:
            depth = max(0, depth + (1 if ch == "{" else -1))
        if brace[0][0] == "{" and depth == len(brace[0]):
            row.append("'" + text[start : brace.start()])
            start = brace.end()
        elif depth == 0:
            row.extend(_render_field(text[start : brace.start()], scope, counter))
            start = brace.start()
    return row + ["'" + text[start:]]


def _render_field(text: str, scope: Scope, counter) -> list[str]:
    """The expression of one replacement field; a format specification keeps its letters."""
    row, depth, previous, expression = [], 0, "", True
    for kind, word in tokens(text):
        depth += (word in OPEN) - (word in CLOSE) if kind == "op" else 0
        if depth == 0 and word in (":", "!"):
            expression = False
        free = kind == "name" and word not in KEYWORDS and previous != "." and (expression or depth > 0)
        row.append(_number(word, scope, counter) if free else word)
        previous = word
    return row


def _entry(lines: list[Line]) -> tuple[int | None, int]:
    """Where the last top-level `def f` starts and where its body ends."""
    start, stop = None, len(lines)
    for i, line in enumerate(lines):
        words = [text for _, text in line.tokens[:2]]
        if line.level == 0 and words == ["def", ENTRY]:
            start, stop = i, len(lines)
        elif line.level == 0 and start is not None and stop == len(lines):
            stop = i
    return start, stop


def _triviality(lines: list[Line], words: list[list[str]], parameters: set[str]) -> str:
    """Whether f returns a parameter as it came, or reads none. `x = 5` at the top of the body ends a parameter's
    life."""
    same = set(parameters)  # names that still hold a parameter
    for row in words[1:]:
        plain = [word for word in row if word not in ("(", ")")]
        if len(plain) == 2 and plain[0] == "return" and plain[1] in same:
            return "identity"
        if len(plain) != 3 or plain[1] != "=" or plain[2] not in same or plain[0][0] != "$":
            break
        same.add(plain[0])
    alive = set(parameters)
    for line, row in zip(lines[1:], words[1:]):
        assigned = row[0] in alive and len(row) > 1 and row[1] == "="
        if alive.intersection(row[2:] if assigned else row):
            return ""
        if assigned and line.level == lines[0].level + 1:
            alive.discard(row[0])
    return "no parameter is read"
