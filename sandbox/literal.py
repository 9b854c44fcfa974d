"""Python values as text: one canonical writing, a bounded reader, and an equality that needs no evaluation.

    canon([1, {2.5, 'a'}])        -> "[1, {2.5, 'a'}]"
    parse("{'a': (1,)}  # note")  -> {'a': (1,)}
    parse_args("1, k=[2]")        -> ((1,), {'k': [2]})

This file writes and is the face; reader.py reads, equality.py compares, limits.py has the bounds. The four can be
copied out together. No eval, no exec, no ast, no pickle, so that text written by a model can be read in a process that
matters.

Allowed, by exact type: None bool int float str bytes list tuple dict set frozenset; Counter, defaultdict and
OrderedDict are written as the dict they equal; complex numbers and re.Match only where the limits say so. Left out:
every expression (range(5), 2 + 3, lambdas, comprehensions, f-strings, Ellipsis) and everything with an __eq__ of its
own: a value that decides for itself what it equals would be the right answer to every task.
"""

import json
import math
import re
import sys
from collections import Counter, OrderedDict, defaultdict
from decimal import Decimal
from fractions import Fraction

from .equality import equal
from .limits import Limits, LiteralError, NotLiteral, TooLarge
from .reader import ArgumentReader, Reader

__all__ = [
    "Limits",
    "LiteralError",
    "NotLiteral",
    "TooLarge",
    "canon",
    "canon_args",
    "equal",
    "has_set",
    "parse",
    "parse_args",
    "type_name",
]

DEFAULT = Limits()
# Integers of more bits are written in hex: CPython refuses decimal text of more than 4,300 digits, because converting
# it takes time with the square of its length.
_HEX_FROM_BITS = 4_096
_NAME = type.__dict__["__name__"].__get__  # past the metaclass, which may have a __name__ of its own
_PLAIN = frozenset((int, bool, type(None)))  # types whose repr is canonical and whose size is no danger
_DICTS = (dict, Counter, defaultdict, OrderedDict)


# --- writing ----------------------------------------------------------------------------------------------------------


def canon(value, limits: Limits = DEFAULT) -> str:
    """Canonical text of `value`. Sets are sorted by (length, text), dicts keep their order, inf and nan become
    float('inf') and float('nan'). Raises NotLiteral for a type outside the list and TooLarge beyond the limits."""
    # Exact types everywhere in this file, not isinstance: a subclass may have a __repr__ and an __eq__ of its own.
    if type(value) is int and -(1 << 60) < value < 1 << 60 or value is None or type(value) is bool:
        return repr(value)  # the common case, for the sake of short-lived processes
    writer = _Writer(limits)
    text = writer.write(value, 0)
    if len(text) > limits.text:
        raise TooLarge(f"text of {len(text)} characters, the limit is {limits.text}")
    return text


def canon_args(args: tuple, kwargs: dict, limits: Limits = DEFAULT) -> str:
    """Canonical text of what stands between the parentheses of a call. Raises NotLiteral and TooLarge, as `canon`."""
    writer = _Writer(limits)
    parts = [writer.write(value, 0) for value in args]
    parts += [f"{name}={writer.write(value, 0)}" for name, value in kwargs.items()]
    text = ", ".join(parts)
    if len(text) > limits.text:
        raise TooLarge(f"text of {len(text)} characters, the limit is {limits.text}")
    return text


class _Writer:
    """Counts values and characters while it writes, so that a huge or cyclic value ends early."""

    def __init__(self, limits):
        self.limits, self.nodes, self.characters = limits, 0, 0

    def write(self, value, depth):
        """The canonical text of a value. Raises TooLarge, NotLiteral."""
        self.nodes += 1
        if self.nodes > self.limits.nodes:
            raise TooLarge(f"more than {self.limits.nodes} values")
        kind = type(value)
        if kind is str or kind is bytes:
            return self.count(len(value)) or repr(value)  # `count` returns None: it is here for what it raises
        if kind is int:
            return self.count(0) or self.integer(value)
        if value is None or kind is bool:
            return repr(value)
        if kind is float:
            return _float_text(value)
        if kind in (list, tuple, set, frozenset) or kind in _DICTS:
            if depth >= self.limits.depth:
                raise TooLarge(f"nested deeper than {self.limits.depth}")
            return self.container(value, kind, depth + 1)
        if kind is complex and self.limits.complex_numbers:
            return f"complex({_float_text(value.real)}, {_float_text(value.imag)})"
        if self.limits.published and (plain := as_builtin(value)) is not value:
            return self.write(plain, depth)
        raise NotLiteral(type_name(kind))

    def count(self, characters):
        """Takes down characters that are about to be written. Raises TooLarge."""
        self.characters += characters + 2  # two more for quotes, or for a comma and a blank
        if self.characters > self.limits.text:
            raise TooLarge(f"text of more than {self.limits.text} characters")

    def integer(self, value):
        """The text of an int. Raises TooLarge."""
        bits = value.bit_length()
        if bits > self.limits.int_bits:
            raise TooLarge(f"integer of {bits} bits, the limit is {self.limits.int_bits}")
        return repr(value) if bits <= _HEX_FROM_BITS else hex(value)

    def container(self, value, kind, depth):
        """The text of a list, tuple, set or dict of exactly this kind. Raises TooLarge, NotLiteral."""
        if len(value) > self.limits.nodes:
            raise TooLarge(f"more than {self.limits.nodes} values")
        if (kind is list or kind is tuple) and 1 < len(value) < 300 and _PLAIN.issuperset(map(type, value)):
            text = _plain_text(value)
            if len(text) < 1_000 and self.nodes + len(value) <= self.limits.nodes:
                self.nodes += len(value)
                return self.count(len(text)) or text
        if kind is list:
            return "[" + ", ".join([self.write(item, depth) for item in value]) + "]"
        if kind is tuple:
            items = [self.write(item, depth) for item in value]
            return f"({items[0]},)" if len(items) == 1 else "(" + ", ".join(items) + ")"
        if kind is set or kind is frozenset:
            # By length first, so that integers from 0 on come in the order of their values.
            items = sorted([self.write(item, depth) for item in value], key=lambda text: (len(text), text))
            display = "{" + ", ".join(items) + "}" if items else ""
            return (display or "set()") if kind is set else f"frozenset({display})"
        pairs = [f"{self.write(key, depth)}: {self.write(item, depth)}" for key, item in value.items()]
        return "{" + ", ".join(pairs) + "}"


def _plain_text(items):
    """The text of a list or tuple of integers, booleans and None; 1,000 blanks when an integer is too long for
    decimal text."""
    try:
        return repr(items)  # the same as ours, and in C; shorter than 1,000 characters no integer is beyond a limit
    except ValueError:
        return " " * 1_000


def as_builtin(value):
    """The builtin value that a published grader would find equal to this one; the value itself if there is none.

    A class with an __eq__ of its own is none of these: it would equal whatever it likes. Called where the value was
    made, in the child, which can claim no more with it than by returning the plain value.
    """
    kind, numpy = type(value), sys.modules.get("numpy")
    if kind is re.Match:
        return True
    if numpy is not None and isinstance(value, numpy.generic):
        plain = value.item()
        return plain if type(plain) in (bool, int, float, complex, str, bytes) else value
    if kind in (Fraction, Decimal):
        try:
            # Not value // 1, which a Decimal of more digits than its context has refuses.
            top, bottom = value.as_integer_ratio()
            return top if bottom == 1 else near if (near := top / bottom) == value else value
        except (ArithmeticError, ValueError):  # Decimal's infinities and NaN, numbers beyond all floats
            return value
    for base in (int, float, str, tuple, list):
        if isinstance(value, base) and kind.__eq__ is base.__eq__:
            # Through the base: the subclass may have methods of its own, and must not become itself again.
            return base.__add__(value, base()) if base in (int, float) else base.__getitem__(value, slice(None))
    return value


def type_name(kind: type) -> str:
    """The name of a class, whatever its metaclass says; at most 100 characters."""
    return _NAME(kind)[:100]


def _float_text(value):
    if math.isnan(value):  # inf and nan have no literal of their own
        return "float('nan')"
    if value in (math.inf, -math.inf):
        return "float('inf')" if value > 0 else "float('-inf')"
    return repr(value)


# --- reading ----------------------------------------------------------------------------------------------------------

# Texts that JSON may read in our place: no names, and strings in single quotes that hold no quote, no escape and no
# line end, so that nothing means something else there. Linear: no character can be matched in two ways.
_MARKS = r"[-+0-9eE., \[\]{}:]*"
_AS_JSON = re.compile(rf"{_MARKS}(?:'[^'\"\\\x00-\x1f\ud800-\udfff]*'{_MARKS})*").fullmatch


def parse(text: str, limits: Limits = DEFAULT):
    """The value of one literal (or of a bare tuple "1, 2"). Raises LiteralError, TooLarge among them."""
    if _may_be_json(text, limits):
        try:
            value = json.loads(text.replace("'", '"'))  # several times faster, the same for what it accepts
            canon(value, limits)  # for what it raises
            return value
        except (ValueError, RecursionError):
            pass  # not JSON, or beyond a limit: read below
    reader = Reader(text, limits)
    value = reader.value(0)
    if reader.at(","):
        value = tuple(reader.rest([value], None, 1))
    reader.finish()
    return value


def parse_args(text: str, limits: Limits = DEFAULT) -> tuple[tuple, dict]:
    """(args, kwargs) of the text between the parentheses of a call. Each one is a literal, or spells a constant in
    one of the few ways that published inputs do (see reader.ArgumentReader). Raises LiteralError."""
    if _may_be_json(text, limits):
        try:
            values = tuple(json.loads(f"[{text}]".replace("'", '"')))
            canon_args(values, {}, limits)
            return values, {}
        except (ValueError, RecursionError):
            pass  # as in `parse`
    reader = ArgumentReader(text, limits)
    args, kwargs = [], {}
    while reader.kind != "end":
        name = reader.keyword()
        if name is None and kwargs:
            raise LiteralError("positional argument after a keyword argument")
        if name in kwargs:
            raise LiteralError(f"keyword argument {name} repeated")
        if name is None:
            args.append(reader.value(0))
        else:
            kwargs[name] = reader.value(0)
        if not reader.take(",") and reader.kind != "end":
            raise LiteralError(f"unexpected {reader.text!r:.40}")
    return tuple(args), kwargs


def _may_be_json(text, limits):
    """Whether JSON, if it can read the text, reads what Reader would. A key that a dict has twice is one value to
    `canon` and two to Reader: only where so short a text is within the limit anyway."""
    if type(text) is not str or len(text) > limits.text or not _AS_JSON(text):
        return False
    return "{" not in text or len(text) <= limits.nodes


def has_set(value) -> bool:
    """Whether a set or frozenset is anywhere in the value."""
    kind = type(value)
    if kind in (list, tuple):
        return any(map(has_set, value))
    return kind in (set, frozenset) or kind is dict and any(has_set(part) for pair in value.items() for part in pair)
