"""Notices when a program looks at an address: at the text or the hash of an object that are made of nothing else.

    watch = Watch()
    watch.begin()           # in this process and its children, from here on
    {len, print}            # watch.seen is True

Where an object lies depends on what ran before in the process. No list of operations can tell whether a program makes
use of that: every `str(x)`, every f-string and every set may meet a function or an iterator. So the two slots of the
types whose text or hash may tell an address are led through a function that notes it and does what they did.

For CPython on 64 bits, whose first slots have kept their places from 3.8 on; `Watch()` tries them and raises OSError
where they are elsewhere. Imports nothing of the project and can be copied out alone.
"""

import collections
import ctypes
import functools
import operator
import types

_REPR, _HASH = 88, 120  # offsets of tp_repr and tp_hash in PyTypeObject, see Include/cpython/object.h


class _Own:
    """A class in Python, for the slots that call its methods: these call what is watched for its parts."""

    def __repr__(self):
        return ""

    def __hash__(self):
        return 0


# Whose text is made of their value or of their parts' texts. Any other type is watched.
_PLAIN_TEXT = (
    *(int, bool, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, slice, type),
    *(type(None), type(...), type(NotImplemented), type({}.keys()), type({}.values()), type({}.items()), _Own),
    *(BaseException, KeyError, OSError, UnicodeEncodeError, types.MethodType, types.ModuleType, types.GenericAlias),
    *(collections.deque, collections.defaultdict, functools.partial, operator.itemgetter, type(int | None)),
    *(type(str.join), type(int.__add__)),  # methods of builtin types, not of an object
)
# Whose hash is made of their value or parts, or of the place of an object that was there before every program.
_PLAIN_HASH = (
    *(int, bool, complex, str, bytes, tuple, frozenset, range, type, type(None), type(...), type(NotImplemented)),
    *(types.GenericAlias, type(int | None), _Own),
)


class Watch:
    """`seen`: whether an address was looked at since it was last set to False."""

    def __init__(self):
        self.seen = False
        # Types written in C: instances of the library's Python classes are out of reach where no class can be made.
        kinds = [kind for kind in _subclasses(object) if not issubclass(kind, type) and _in_c(kind)]
        plain_text = {_slot(kind, _REPR) for kind in _PLAIN_TEXT}
        plain_hash = {_slot(kind, _HASH) for kind in _PLAIN_HASH + (list,)} - {_slot(object, _HASH)}
        self._slots, self._callbacks = [], {}
        self._lead(float, _HASH, ctypes.c_ssize_t)
        for kind in kinds:
            if _slot(kind, _REPR) not in plain_text:
                self._lead(kind, _REPR, ctypes.py_object)
            if _slot(kind, _HASH) not in plain_hash and kind not in (*_PLAIN_HASH, float):
                self._lead(kind, _HASH, ctypes.c_ssize_t)
        self._try()

    def begin(self):
        """From here on, in this process. Without it, nothing is changed."""
        for place, function in self._slots[1:]:
            place.value = function
        self.seen = False

    def begin_floats(self):
        """NaN too, whose hash is its address. Not in `begin`, since it makes every other float slow to hash."""
        place, function = self._slots[0]
        place.value = function
        self.seen = False

    def _lead(self, kind, offset, result):
        """Notes where a slot is and what it is to hold: one function for each that is there now."""
        before = _slot(kind, offset)
        if before not in self._callbacks:
            form = ctypes.PYFUNCTYPE(result, ctypes.py_object)
            self._callbacks[before] = form(self._noting(form(before), offset == _HASH))
        function = ctypes.cast(self._callbacks[before], ctypes.c_void_p).value
        self._slots.append((ctypes.c_void_p.from_address(id(kind) + offset), function))

    def _noting(self, before, hashing):
        def after(value):
            # The hash of a float tells an address where it is NaN alone.
            if not (hashing and type(value) is float and value == value):
                self.seen = True
            return before(value)

        return after

    def _try(self):
        """Raises OSError if the slots do not do what they should, before anything is changed."""
        for offset, result, function in ((_REPR, ctypes.py_object, repr), (_HASH, ctypes.c_ssize_t, hash)):
            for value in (len, _Own, (1, "a"), 2.5, iter(())):
                if ctypes.PYFUNCTYPE(result, ctypes.py_object)(_slot(type(value), offset))(value) != function(value):
                    raise OSError("the slots of types are not where they are expected")


def _in_c(kind):
    return not kind.__flags__ & 1 << 9 or kind.__flags__ & 1 << 8  # no heap type, or an immutable one


def _slot(kind, offset):
    return ctypes.c_void_p.from_address(id(kind) + offset).value


def _subclasses(kind):
    """All classes below it that there are, each once."""
    kinds = dict.fromkeys(type.__subclasses__(kind))
    for below in list(kinds):
        kinds |= _subclasses(below)
    return kinds
