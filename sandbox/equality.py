"""When two values are equal: Python's == for literal values, except for NaN and the rounding of floats.

    equal([0.1 + 0.2, float("nan")], [0.3, float("nan")])         # True

Imports nothing of the project and can be copied out alone.
"""

import math
from functools import partial

_NUMBERS = (int, bool, float, complex)
_PAIRED, _PAIRED_TEXT = 16, 8_000  # both values may come from a model


def equal(a, b, rel: float = 1e-9) -> bool:
    """Python's == for values as `parse` gives them, except that NaN equals NaN and two floats are equal within the
    relative difference `rel` (absolute 0; rel=0 is exact). Inside sets and among dict keys too."""
    return _equal(a, b, rel, True)


def _equal(a, b, rel, search):
    """search: whether elements of sets that do not pair in order of size may be tried in every way."""
    kind, other = type(a), type(b)
    if kind is float and other is float:
        return a == b or (math.isnan(a) and math.isnan(b)) or (rel > 0 and math.isclose(a, b, rel_tol=rel, abs_tol=0.0))
    if kind is complex and other is complex:
        return _equal(a.real, b.real, rel, search) and _equal(a.imag, b.imag, rel, search)
    if kind in _NUMBERS and other in _NUMBERS:
        return a == b
    if kind is other and kind in (list, tuple):
        return len(a) == len(b) and all(_equal(x, y, rel, search) for x, y in zip(a, b))
    if kind in (set, frozenset) and other in (set, frozenset):
        # Exact partners are looked up in the hash tables; the few that are left are compared one by one.
        return len(a) == len(b) and _matched(
            [x for x in a if x not in b], [y for y in b if y not in a], partial(_equal, rel=rel), search
        )
    if kind is dict and other is dict:
        return _equal_dicts(a, b, rel, search)
    return kind is other and a == b


def _equal_dicts(a, b, rel, search):
    if len(a) != len(b) or not all(_equal(value, b[key], rel, search) for key, value in a.items() if key in b):
        return False
    return _matched(
        [key for key in a if key not in b],
        [key for key in b if key not in a],
        lambda x, y, search: _equal(x, y, rel, search) and _equal(a[x], b[y], rel, search),
        search,
    )


def _matched(left, right, same, search):
    """Whether the elements that have no exact partner can be paired off.

    In order of size first, which is how equal values pair but for rounding at the edge of a digit; of up to _PAIRED
    elements, whose time grows with the square, every way is tried (Kuhn's augmenting paths), but none again inside of
    that: each level of sets in sets would multiply the time by the square."""
    if not left and not right:
        return True
    # Only a float can be equal to something that `in` does not see.
    if len(left) != len(right) or not all(_has_float(x) for x in left):
        return False
    left, right = sorted(left, key=_rank), sorted(right, key=_rank)
    if all(same(x, y, search=search) for x, y in zip(left, right)):
        return True
    if not search or len(left) > _PAIRED or sum(len(_rank(x)) for x in left + right) > _PAIRED_TEXT:
        return False
    partner, partners = {}, [[j for j, y in enumerate(right) if same(x, y, search=False)] for x in left]

    def place(i, seen):
        for j in partners[i]:
            if j not in seen:
                seen.add(j)
                if j not in partner or place(partner[j], seen):
                    partner[j] = i
                    return True
        return False

    return all(place(i, set()) for i in range(len(left)))


def _rank(value) -> str:
    """A text to sort by, the same for values that are equal, rounding aside."""
    kind = type(value)
    if kind is complex:
        return f"({_rank(value.real)}, {_rank(value.imag)})"
    if kind in _NUMBERS:
        try:
            return f"{float(value) + 0.0:.7e}"  # adding 0.0 makes -0.0 the zero that it equals
        except OverflowError:  # an integer beyond all floats
            return hex(value)
    if kind is tuple:
        return f"({', '.join(map(_rank, value))})"
    return f"{{{', '.join(sorted(map(_rank, value)))}}}" if kind is frozenset else repr(value)


def _has_float(value):
    if type(value) in (tuple, frozenset):
        return any(_has_float(item) for item in value)
    return type(value) in (float, complex)
