"""Reads model-written Python as text: normal form, triviality, carried state.

Text from a model is never handed to `ast` or `compile` here: a deeply nested program can take the interpreter down,
and the process that calls this holds the weights. Instead a small regular-expression tokenizer, linear in the text
and never raising, cuts a program into logical lines, and names are resolved to the scope that binds them (module,
function, lambda, comprehension). That is enough to tell whether two programs are the same but for names, comments,
docstrings, annotations and layout.

Left out: the grammar. What is not Python gets some normal form too; whether it runs is the sandbox's business. Two
programs with one normal form behave alike, the converse is not promised: redundant brackets, other spellings of a
number or a string with escapes, or another order of statements give another form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

ENTRY = "f"
MAX_SOURCE = 16_384  # characters; anything longer is its own normal form

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
_BLOCKS = frozenset("if elif else for while try except finally with def class async".split())
_OPEN, _CLOSE = frozenset("([{"), frozenset(")]}")
_REACH = frozenset("setattr getattr delattr vars globals locals getcontext setcontext localcontext exec eval".split())
_BARE_STRING = re.compile(r"""[uU]?(['"])([^'"\\\n]*)\1""")


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


def _split(source: str) -> list[Line]:
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
            depth = max(0, depth + (text in _OPEN) - (text in _CLOSE)) if kind == "op" else depth
            current.append((kind, text))
    flush()
    return lines


def _statements(line: list[tuple[str, str]], level: int) -> list[Line]:
    """Splits `a; b` and the body that stands behind a block's colon."""
    found, start, depth, lambdas = [], 0, 0, 0
    header = line[0][1] in _BLOCKS or _is_match(line)
    for i, (kind, text) in enumerate(line):
        if kind == "op":
            depth += (text in _OPEN) - (text in _CLOSE)
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


def _tidy(line: Line, in_class: bool) -> Line | None:
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
        depth -= kind == "op" and text in _CLOSE
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
        depth += kind == "op" and text in _OPEN
    return kept


def _bare_assignment(words: list[tuple[str, str]], in_class: bool) -> list[tuple[str, str]]:
    """`x: int = 3` as `x = 3`; a bare `x: int` declares nothing that is run, except a field in a class body."""
    depth = 0
    for i, (kind, text) in enumerate(words):
        if kind != "op":
            if text == "lambda":
                return words
            continue
        depth += (text in _OPEN) - (text in _CLOSE)
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
        if kind == "op" and text in _OPEN:
            commas.append(0)
        elif kind == "op" and text in _CLOSE:
            if kept and kept[-1] == ("op", ",") and commas[-1] > 1:
                kept.pop()
            if len(commas) > 1:
                commas.pop()
        commas[-1] += (kind, text) == ("op", ",")
        kept.append((kind, text))
    return kept


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
        _scan(line, inner if words[at] == "def" else None)
        _bind(line, words)
    return module


def _comprehensions(line: Line) -> set[int]:
    """Positions of the brackets that hold a comprehension."""
    found, stack = set(), []
    for i, (kind, text) in enumerate(line.tokens):
        if kind == "op" and text in _OPEN:
            stack.append(i)
        elif kind == "op" and text in _CLOSE and stack:
            stack.pop()
        elif kind == "name" and text == "for" and stack:
            found.add(stack[-1])
    return found


def _scan(line: Line, function: Scope | None) -> None:
    """Scope of each token of a statement; binds the parameters of `function`, lambdas and comprehension targets."""
    scan = _Scan(line, function)
    for i, (kind, text) in enumerate(line.tokens):
        scan.leave(kind, text)
        line.scopes.append(scan.owner(i, kind, text))
        scan.enter(i, kind, text)


@dataclass
class _Open:
    """A lambda or comprehension that has begun and not ended."""

    outside: Scope
    depth: int  # of brackets, where it stands
    inside: Scope
    first: bool  # a comprehension whose first iterable is still to come


class _Scan:
    """Where a statement is being read: how deep in brackets, in which scope, within targets or lambda parameters."""

    def __init__(self, line: Line, function: Scope | None):
        self.line, self.function, self.scope, self.depth = line, function, line.scope, 0
        self.comprehensions = _comprehensions(line)
        self.opened: list[_Open] = []
        self.targets = self.parameters = False

    @property
    def here(self) -> bool:
        """Whether the innermost lambda or comprehension stands at this depth of brackets."""
        return bool(self.opened) and self.opened[-1].depth == self.depth

    def leave(self, kind: str, text: str) -> None:
        """Ends what this token ends: a closing bracket, or `,` and `for` behind the body of a lambda."""
        if kind == "op" and text in _CLOSE:
            while self.opened and self.opened[-1].depth >= self.depth:
                self.scope = self.opened.pop().outside
            self.depth -= 1
        elif text in ("for", "if", "async") or text == "," and not self.parameters:
            while text in ("for", ",") and self.here and self.opened[-1].inside.kind == "lambda":
                self.scope = self.opened.pop().outside
            if text != "," and self.here:
                self.scope = self.opened[-1].inside

    def owner(self, i: int, kind: str, text: str) -> Scope:
        """The scope of a token; a parameter or a target is bound there."""
        if kind != "name" or text in KEYWORDS:
            return self.scope
        before = self.line.tokens[i - 1][1] if i else ""
        if before in ("*", "**") and i > 1:
            before = self.line.tokens[i - 2][1]
        starts = before in ("(", ",", "lambda")
        if self.function is not None and self.depth == 1 and starts and not self.opened:
            self.function.names.setdefault(text, None)
            return self.function
        if (self.parameters and self.here and starts) or (self.targets and before != "."):
            self.scope.names.setdefault(text, None)
        return self.scope

    def enter(self, i: int, kind: str, text: str) -> None:
        """Begins what this token begins: brackets, a comprehension in them, a lambda, targets."""
        if kind == "op" and text in _OPEN:
            self.depth += 1
            if i in self.comprehensions:
                self.open("comprehension")
        elif text == "lambda":
            self.open("lambda")
            self.parameters = True
        elif text == ":" and self.parameters and self.here:
            self.parameters = False
        elif text == "for" and self.scope.kind == "comprehension":
            self.targets = True
        elif text == "in" and self.targets:
            self.targets = False
            if self.here and self.opened[-1].first:  # the first iterable is evaluated outside of the comprehension
                self.opened[-1].first, self.scope = False, self.opened[-1].outside

    def open(self, kind: str) -> None:
        self.opened.append(_Open(self.scope, self.depth, Scope(kind, self.scope), kind == "comprehension"))
        self.scope = self.opened[-1].inside


def _bind(line: Line, words: list[str]) -> None:
    """Names that a statement binds in its own scope (parameters and comprehension targets are bound by _scan)."""
    if words[0] in ("global", "nonlocal") and line.scope.parent is not None:
        return _declare(line, words[0])
    for i in _bound(line, words):
        if line.tokens[i][0] == "name" and words[i] not in KEYWORDS:
            line.scope.names.setdefault(words[i], None)
    for i in range(len(words) - 1):
        if words[i + 1] == ":=" and line.tokens[i][0] == "name":
            scope = line.scopes[i]
            while scope.kind == "comprehension":  # a walrus binds in the function around it
                scope = scope.parent
            scope.names.setdefault(words[i], None)


def _declare(line: Line, keyword: str) -> None:
    """`global` and `nonlocal`: where to look for the names instead."""
    outside = line.scope.parent
    while keyword == "global" and outside.parent is not None:
        outside = outside.parent
    declared = [word for (kind, word) in line.tokens[1:] if kind == "name"]
    line.scope.outer.update(dict.fromkeys(declared, outside))
    if keyword == "global":
        outside.names.update({name: None for name in declared if name not in outside.names})


def _bound(line: Line, words: list[str]) -> list[int]:
    """Positions of what the statement binds: behind `as`, targets of `for`, patterns of `case`, assignments."""
    first, bound = words[0], [i + 1 for i, word in enumerate(words[:-1]) if word == "as"]
    if first in ("import", "from"):
        named = {words[i] for i in range(1, len(words)) if line.tokens[i][0] == "name"} - {words[i] for i in bound}
        for name in named - KEYWORDS:
            line.scope.names.pop(name, None)  # `import math` binds a name that means something: it stays
    elif first == "for" or words[:2] == ["async", "for"]:
        bound += _targets(line, words.index("for") + 1, words.index("in") if "in" in words else 0)
    elif first == "case":
        bound += [i for i in _targets(line, 1, len(words)) if words[i] != "_"]
    elif first not in _BLOCKS:
        bound += _assigned(line, words)
    return bound


def _assigned(line: Line, words: list[str]) -> list[int]:
    """Positions of the names that `a = b, c[i] = ...` or `a += ...` binds."""
    depth, last = 0, 0
    for i, word in enumerate(words):
        if line.tokens[i][0] == "op":
            depth += (word in _OPEN) - (word in _CLOSE)
            if depth == 0 and word.endswith("=") and word not in ("==", "!=", "<=", ">="):
                last = i
    return _targets(line, 0, last)


def _targets(line: Line, start: int, stop: int) -> list[int]:
    """Positions of names in a target list: no attributes, nothing subscripted or called, nothing inside those."""
    found, closers, inside = [], [], 0
    for i in range(start, stop):
        kind, text = line.tokens[i]
        before = line.tokens[i - 1] if i > start else ("op", ",")
        if kind == "op" and text in _OPEN:
            closers.append(before[0] == "name" and before[1] not in KEYWORDS or before[1] in _CLOSE)
            inside += closers[-1]
        elif kind == "op" and text in _CLOSE and closers:
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
    stateless: bool  # nothing in sight can carry a value from one call of f to the next
    parameters: dict[str, str]  # of f: name -> its name in the normal form
    shape: tuple[tuple[str, ...], ...]  # per statement: tokens with every name the program binds as "$"


@lru_cache(maxsize=4096)
def read_program(source: str) -> Reading:
    """Reads a program; linear in its length, never raises. Longer than MAX_SOURCE: the text itself is the form."""
    if len(source) > MAX_SOURCE:
        return Reading(source, True, "", False, {}, ())
    lines, blocks = [], []  # blocks: (level, word) of the headers that are open
    for line in _split(source):
        while blocks and blocks[-1][0] >= line.level:
            blocks.pop()
        tidy = _tidy(line, bool(blocks) and blocks[-1][1] == "class")
        if line.tokens[-1][1] == ":":
            blocks.append((line.level, line.tokens[0][1]))
        if tidy is not None:
            lines.append(tidy)
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
        stateless=_stateless(lines, words),
        parameters=parameters,
        shape=tuple(tuple("$" if word[0] == "$" else word for word in row) for row in words),
    )


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
        if kind == "op" and text in _OPEN:
            called = text == "(" and before[0] == "name" and before[1] not in KEYWORDS
            callees.append(_callee(before[1], scope) if called else None)
        elif kind == "op" and text in _CLOSE and callees:
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
        depth += (word in _OPEN) - (word in _CLOSE) if kind == "op" else 0
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


def _stateless(lines: list[Line], words: list[list[str]]) -> bool:
    """Only imports and functions without defaults, and no way in sight to store a value outside of a call's locals.

    Attributes are only called, never read or set: that costs some honest programs a process of their own per answer.
    """
    for line, row in zip(lines, words):
        if line.level == 0 and row[0] not in ("import", "from", "def"):
            return False
        if row[0] in ("global", "nonlocal", "class", "@", "async") or (row[0] == "def" and "=" in row):
            return False
        if any(word in _REACH or word.startswith("_") and word != "_" for word in row):
            return False
        dots = [i for i, word in enumerate(row) if word == "." and row[0] not in ("import", "from")]
        if any(row[i + 2 : i + 3] != ["("] for i in dots):
            return False
    return True
