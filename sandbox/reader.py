"""Reads one literal, or the arguments of a call, from text: a recursive descent over one linear regular expression.

    Reader("[1, (2,)]", Limits()).value(0)         # [1, (2,)]

A text is read as it stands between parentheses: line ends are white space and "1, 2" is a tuple. `literal.parse` and
`literal.parse_args` are the way in. Characters, values, nesting and the size of integers are bounded before anything of
that size exists. Imports limits.py alone; the two can be copied out together.
"""

import marshal
import re
import unicodedata
from collections import Counter
from keyword import iskeyword

from .limits import LiteralError, TooLarge

# One alternative for each kind of token, none of which can match in two ways: matching is linear in the text, whatever
# it is. White space and comments are part of the expression.
_DIGITS = r"[0-9](?:_?[0-9])*"
_TOKEN = re.compile(
    rf"""[ \t\f\n]*(?:(?P<op>[\[\](){{}},:=+*-])|(?P<skip>\#[^\n]*|\\\n|\Z)
    |(?P<number>(?:0[xX](?:_?[0-9a-fA-F])+|0[oO](?:_?[0-7])+|0[bB](?:_?[01])+
        |(?:(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][+-]?{_DIGITS})?
            |{_DIGITS}[eE][+-]?{_DIGITS}|{_DIGITS})[jJ]?)(?!\w))
    |(?P<string>(?:[rR][bB]?|[bB][rR]?|[uU])?(?:
        '''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*''' | \"\"\"[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*\"\"\"
        | '(?!'')[^'\\\n]*(?:\\.[^'\\\n]*)*' | "(?!"")[^"\\\n]*(?:\\.[^"\\\n]*)*"))
    |(?P<name>[^\W\d]\w*)
    |(?P<dot>\.))""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:\n|[0-7]{1,3}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}]*\}|.)", re.DOTALL)
_SIMPLE = {
    "\\": "\\",
    "'": "'",
    '"': '"',
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
    "\n": "",
}
_CONSTANTS = {"None": None, "True": True, "False": False}
_FLOATS = {"inf", "infinity", "nan"}
_END = ("end", "")
_SHARED = 100  # keys with one hash: each is compared with all before it
_SEQUENCES = (str, bytes, list, tuple)
_METHODS = frozenset(
    ("upper", "lower", "capitalize", "title", "swapcase", "strip", "lstrip", "rstrip", "split", "join")
)


def _tokens(text, limits):
    """[(kind, text)] without white space and comments."""
    if type(text) is not str:
        raise LiteralError(f"text expected, not {type(text).__name__}")
    if len(text) > limits.text:
        raise TooLarge(f"text of {len(text)} characters, the limit is {limits.text}")
    if "\0" in text or not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise LiteralError("NUL or lone surrogate in the text")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads its source
    # A value needs some tokens (brackets, commas, a key's colon, signs); more than eight a value are too many values.
    tokens, position, most = [], 0, 8 * limits.nodes
    for token in iter(_TOKEN.scanner(text).match, None):  # match, not search: a broken string is looked at once
        position, kind = token.end(), token.lastgroup
        if kind != "skip":
            tokens.append((kind, token[kind]))
            if len(tokens) > most:
                raise TooLarge(f"more than {limits.nodes} values")
    if position != len(text):
        raise LiteralError(f"unexpected {text[position : position + 20]!r}")
    tokens += (_END, _END)  # two, so that looking one token ahead of the last is never out of range
    return tokens


class Reader:
    """Recursive descent; `kind` and `text` are the current token. Every bracket costs one level of depth.

    All methods raise LiteralError where the text is no literal, TooLarge beyond the limits.
    """

    def __init__(self, text, limits):
        self.limits, self.nodes, self.position = limits, 0, 0
        self.tokens = _tokens(text, limits)
        self.kind, self.text = self.tokens[0]

    def next(self):
        """The text of the current token; goes on to the next one."""
        text = self.text
        self.position += 1
        self.kind, self.text = self.tokens[self.position]
        return text

    def at(self, op):
        """Whether the current token is this operator (and not a string with that text)."""
        return self.text == op and self.kind == "op"

    def take(self, op):
        """Goes past this operator if it comes next; whether it did."""
        if self.text == op and self.kind == "op":
            self.next()
            return True
        return False

    def expect(self, op):
        """Goes past this operator, which must come next."""
        if not self.take(op):
            raise LiteralError(f"{op!r} expected, not {self.text!r:.40}")

    def finish(self):
        """The text must end here."""
        if self.kind != "end":
            raise LiteralError(f"unexpected {self.text!r:.40}")

    def value(self, depth):
        """The value that begins at the current token, inside of `depth` brackets."""
        self.nodes += 1
        if self.nodes > self.limits.nodes:
            raise TooLarge(f"more than {self.limits.nodes} values")
        if depth > self.limits.depth:
            raise TooLarge(f"nested deeper than {self.limits.depth}")
        kind, text = self.kind, self.text
        if kind == "number":
            return self.sum(self.number(), depth)
        if kind == "string":
            return self.strings()
        if kind == "name":
            return self.named(depth)
        if text in ("-", "+"):
            return self.sum(self.signed(depth), depth)
        if text == "[":
            self.next()
            return self.rest([], "]", depth + 1)
        if text == "(":
            return self.sum(self.parenthesis(depth), depth)
        if text == "{":
            return self.braces(depth + 1)
        raise LiteralError(f"a literal expected, not {text!r:.40}")

    def rest(self, items, close, depth):
        """The elements up to `close` (None: the end of the text); `items` holds those already read."""
        if items:
            self.expect(",")
        while not (self.kind == "end" if close is None else self.at(close)):
            items.append(self.value(depth))
            if not self.take(","):
                break
        if close is not None:
            self.expect(close)
        return items

    def parenthesis(self, depth):
        """A tuple, or a value in parentheses."""
        self.next()
        if self.take(")"):
            return ()
        first = self.value(depth + 1)
        if self.take(")"):
            return first
        return tuple(self.rest([first], ")", depth + 1))

    def braces(self, depth):
        """A dict or a set; what follows the first value tells."""
        self.next()
        if self.take("}"):
            return {}
        first = self.value(depth)
        if not self.take(":"):
            if self.take("}"):
                return _hashed(set, [first])
            return _hashed(set, self.rest([first], "}", depth))
        pairs = [(first, self.value(depth))]
        while self.take(",") and not self.at("}"):
            key = self.value(depth)
            self.expect(":")
            pairs.append((key, self.value(depth)))
        self.expect("}")
        return _hashed(dict, pairs)

    def named(self, depth):
        """A constant, or one of the calls that canonical text uses: float('nan'), set(), frozenset({1})."""
        name = self.next()
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if not self.take("("):
            raise LiteralError(f"{name:.40} is no literal")
        if name == "float" and self.kind == "string":
            text = self.strings()
            self.expect(")")
            # Only what has no literal: float('1.5') is an expression like any other.
            if type(text) is str and text.strip().lstrip("+-").lower() in _FLOATS:
                return float(text)
        elif name in ("set", "frozenset"):
            # The braces in frozenset({1}) are its level; frozenset(frozenset(... has none, and would have no end.
            level = depth if name == "frozenset" and self.kind == "op" else depth + 1
            items = () if self.at(")") else self.value(level)
            self.take(",")
            self.expect(")")
            if type(items) in (set, list, tuple):
                return _hashed(set if name == "set" else frozenset, items)
        elif name == "complex" and self.limits.complex_numbers:
            parts = self.rest([], ")", depth + 1)
            if len(parts) == 2 and all(type(part) in (int, float) for part in parts):
                return complex(*parts)
        raise LiteralError(f"{name:.40}(...) is no literal")

    def signed(self, depth):
        """A number with at most one sign (in front of a parenthesis too), as ast.literal_eval has it."""
        minus = self.next() == "-"
        opened = 0  # parentheses around the number, as in -((1)): they may hold nothing else after a sign
        while self.take("("):
            opened += 1
            if depth + opened > self.limits.depth:
                raise TooLarge(f"nested deeper than {self.limits.depth}")
        if self.kind != "number":
            raise LiteralError(f"a number expected, not {self.text!r:.40}")
        value = self.number()
        for _ in range(opened):
            self.expect(")")
        return -value if minus else +value

    def sum(self, left, depth):
        """1+2j: the only operation that is a literal, and only where complex numbers are allowed."""
        if not self.limits.complex_numbers or self.kind != "op" or self.text not in "+-":
            return left
        if type(left) not in (int, float):
            return left
        minus = self.next() == "-"
        right = self.parenthesis(depth) if self.at("(") else self.number() if self.kind == "number" else None
        if type(right) is not complex:
            raise LiteralError("only an imaginary number can be added")
        return left - right if minus else left + right

    def number(self):
        """An int, float or imaginary number without a sign."""
        text = self.next()
        # The common case first; 300 digits are below the limits of both profiles.
        if len(text) < 300 and text.isdigit() and text[0] != "0":
            return int(text)
        if text[-1] in "jJ" and text[:2] not in ("0x", "0X"):
            if not self.limits.complex_numbers:
                raise LiteralError("complex numbers are not allowed here")
            return complex(text)
        digits = text.replace("_", "")
        if digits[:2].lower() in ("0x", "0o", "0b") or digits.isdigit():
            return self.integer(digits)
        return float(digits)

    def integer(self, digits):
        """An integer of any base from its digits without underscores."""
        prefix = digits[:2].lower()
        base = {"0x": 16, "0o": 8, "0b": 2}.get(prefix, 10)
        if base == 10 and digits[0] == "0" and digits.strip("0"):
            raise LiteralError(f"integer with a leading zero: {digits:.40}")
        # From the number of digits, before they are converted: every digit has at least so many bits.
        if (len(digits) - 2) * (base.bit_length() - 1) > self.limits.int_bits + 8:
            raise TooLarge(f"integer of more than {self.limits.int_bits} bits")
        try:
            value = int(digits, base)
        except ValueError as error:  # more decimal digits than CPython converts
            raise TooLarge("integer of more than 4,300 decimal digits") from error
        if value.bit_length() > self.limits.int_bits:
            raise TooLarge(f"integer of more than {self.limits.int_bits} bits")
        return value

    def strings(self):
        """String or bytes literals that stand next to each other, joined as Python joins them."""
        parts = [_string(self.next())]
        while self.kind == "string":
            parts.append(_string(self.next()))
        if len(parts) == 1:
            return parts[0]
        kind = type(parts[0])
        if any(type(part) is not kind for part in parts):
            raise LiteralError("text and bytes next to each other")
        return kind().join(parts)

    def keyword(self):
        """The name of `name=` when one comes next."""
        if self.kind != "name" or self.tokens[self.position + 1] != ("op", "="):
            return None
        name = unicodedata.normalize("NFKC", self.next())  # as Python's own parser does, so that names are the same
        self.next()
        if iskeyword(name) or not name.isidentifier():
            raise LiteralError(f"{name:.40} cannot be the name of an argument")
        return name


class ArgumentReader(Reader):
    """Reads, besides literals, the constants of CRUXEval's inputs that need no name but dict: 'a' + 'b', ['a'] * 3,
    'B-a'.lower().split('-'), ''.join(['a', 'b']), dict(k=1). Sizes are checked before anything is built."""

    work = 0  # elements of all constants on the way to a value: each operation copies its operand

    def value(self, depth):
        """A sum of texts or sequences, or a single value."""
        left = self.product(depth)
        while self.take("+"):
            right = self.product(depth)
            if type(left) is not type(right) or type(left) not in _SEQUENCES:
                raise LiteralError("only texts and sequences can be added")
            # Checked before it is added, here and below: 'a' * 10**9 is twelve characters and a gigabyte.
            left = self.checked(len(left) + len(right), left) + right
        return left

    def product(self, depth):
        """A value, or one that is repeated by `* n`."""
        value = self.methods(super().value(depth), depth)
        while self.take("*"):
            count = super().value(depth)
            if type(value) not in _SEQUENCES or type(count) is not int:
                raise LiteralError("only a text or sequence can be multiplied, by an integer")
            value = self.checked(len(value) * max(count, 0), value) * count
        return value

    def methods(self, value, depth):
        """What the listed methods of a text make of it: none makes much more than it is given, but `join`."""
        while type(value) is str and self.kind == "dot":
            self.next()
            name = self.next()
            self.expect("(")
            arguments = self.rest([], ")", depth + 1)
            if name not in _METHODS:
                raise LiteralError(f".{name:.40}(...) is no literal")
            if name == "join" and len(arguments) == 1 and type(arguments[0]) in (list, tuple):
                self.checked(sum(len(value) + len(part) for part in arguments[0] if type(part) is str), "")
            self.checked(len(value), value)
            # An attribute of an exact str under a listed name: no lookup that the text could steer.
            try:
                value = getattr(value, name)(*arguments)
            except (TypeError, ValueError) as error:
                raise LiteralError(f".{name}(...): {error}") from error
        return value

    def named(self, depth):
        """dict(k=1) too; everything else as in a literal."""
        if self.text != "dict" or self.tokens[self.position + 1] != ("op", "("):
            return super().named(depth)
        self.next(), self.next()
        pairs = {}
        while not self.at(")"):
            name = self.keyword()
            if name is None or name in pairs:
                raise LiteralError("dict(...) takes different names")
            pairs[name] = self.value(depth + 1)
            if not self.take(","):
                break
        self.expect(")")
        return pairs

    def checked(self, size, value):
        """`value`, unless something of its type with `size` elements is beyond the limits, or all before it were too
        many: a thousand calls of .upper() on one long text are a short text themselves."""
        self.work += size
        if size > (self.limits.text if type(value) in (str, bytes) else self.limits.nodes):
            raise TooLarge(f"a constant of {size} elements")
        if self.work > 16 * self.limits.text:
            raise TooLarge("too many operations on long constants")
        return value


def _hashed(kind, items):
    """A set or dict of the items. TooLarge: more than _SHARED keys made to share a hash, which would take minutes.

    Python randomises the hashes of text, not of numbers: multiples of 2^61 - 1 all have the hash 0, and all tuples of
    -1 and -2 of one length have the same.
    """
    try:
        if len(items) > _SHARED:
            keys = [item[0] for item in items] if kind is dict else items
            counts = Counter(map(hash, keys))
            if max(counts.values()) > _SHARED:
                # Equal keys share a hash too, and are harmless. Told apart by their bytes, whose hashes are random.
                texts = {(value, marshal.dumps(key, 2)) for key in keys if counts[value := hash(key)] > _SHARED}
                if max(Counter(value for value, _ in texts).values()) > _SHARED:
                    raise TooLarge("keys whose hashes collide")
        return kind(items)
    except TypeError as error:
        raise LiteralError(str(error)) from error


def _string(token):
    """The value of one string or bytes token, as Python reads it."""
    prefix = token[: token.index(token[-1])].lower()
    width = 3 if token[len(prefix) : len(prefix) + 3] in ("'''", '"""') else 1
    body = token[len(prefix) + width : -width]
    is_bytes = "b" in prefix
    if is_bytes and not body.isascii():
        raise LiteralError("bytes with characters beyond ASCII")
    if "\\" in body and "r" not in prefix:
        body = _ESCAPE.sub(_byte_escape if is_bytes else _text_escape, body)
    return body.encode("latin-1") if is_bytes else body


def _common_escape(text):
    head = text[1]
    if head in _SIMPLE:
        return _SIMPLE[head]
    if head in "01234567":
        return chr(int(text[1:], 8))
    if head == "x":
        if len(text) != 4:
            raise LiteralError(r"cut-off \x escape")
        return chr(int(text[2:], 16))
    return text  # an unknown escape keeps its backslash


def _byte_escape(match):
    # In bytes, as in Python, \u, \U and \N are no escapes, and an octal one beyond 255 loses its ninth bit.
    text = match.group()
    if text[1] in "uUN":
        return text
    character = _common_escape(text)
    return chr(ord(character) & 0xFF) if len(character) == 1 else character


def _text_escape(match):
    text = match.group()
    if text[1] in "uU":
        if len(text) == 2 or int(text[2:], 16) > 0x10FFFF:
            raise LiteralError("cut-off or impossible unicode escape")
        return chr(int(text[2:], 16))
    if text[1] == "N":
        try:
            character = unicodedata.lookup(text[3:-1])
        except KeyError as error:
            raise LiteralError(f"unknown character name {text:.60}") from error
        if len(character) != 1:
            raise LiteralError(f"unknown character name {text:.60}")
        return character
    return _common_escape(text)
