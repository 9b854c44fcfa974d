"""The bounds of a literal, and the errors of texts and values that are none.

    Limits(text=400).int_bits                  # 4096
    try: literal.parse(text)
    except LiteralError as error: ...          # TooLarge and NotLiteral among them

Imports nothing of the project.
"""

from dataclasses import dataclass


class LiteralError(ValueError):
    """The text is no literal, or a value has none."""


class NotLiteral(LiteralError):
    """A value (or a text) of a kind that literals cannot say."""


class TooLarge(LiteralError):
    """A literal that is beyond the limits: characters, values, nesting or bits of an integer."""


# A text written by a model is read in the process that trains, and without these bounds a short one can ask for minutes
# or gigabytes.
@dataclass(frozen=True)
class Limits:
    """How large a literal may be, and which values beyond Python's own literals count as one."""

    text: int = 16_384  # characters of the whole text
    nodes: int = 4_000  # values, counting containers, keys and elements
    depth: int = 24  # brackets inside brackets
    int_bits: int = 4_096  # bits of an integer; Python refuses decimal text of more than 4,300 digits, 14,284 bits
    complex_numbers: bool = False  # complex numbers are values too
    # canon writes a re.Match as True (what a truth test of it would give), and as a plain value whatever equals one
    # under a builtin's own ==: numpy's scalars, named tuples, exact fractions
    published: bool = False
