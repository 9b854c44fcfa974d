"""Notices when a program looks at an address: at the text or the hash of an object that are made of nothing else.

    watch = Watch()
    watch.begin()           # in this process and its children, from here on
    {len, print}            # watch.seen is "hash"
    str(iter([]))           # watch.seen is "text"

Where an object lies depends on what ran before in the process. No list of operations can tell whether a program makes
use of that: every `str(x)`, every f-string and every set may meet a function or an iterator. So the two slots of the
types whose text or hash may tell an address are led through a function that notes it and does what they did.

For CPython on 64 bits, whose first slots have kept their places from 3.8 on; `Watch()` tries them and raises OSError
where they are elsewhere. Imports nothing of the project and can be copied out alone.
"""

import ctypes
import decimal
import types

# Offsets of tp_repr and tp_hash in PyTypeObject (Include/cpython/object.h), and of d_wrapped in PyWrapperDescrObject
# (descrobject.h).
_REPR, _HASH, _WRAPPED = 88, 120, 48
# The types whose slots tell an address; most others have theirs from `object`. Texts and hashes that are made of those
# of parts are not among them: they call these, and they may raise, which a function called by way of ctypes must not.
_TELLING_TEXT = (
    *(object, types.FunctionType, types.BuiltinFunctionType, types.MethodWrapperType, types.GeneratorType),
    *(types.CoroutineType, types.AsyncGeneratorType, types.CellType, types.CodeType, types.FrameType),
)
_TELLING_HASH = (object, types.BuiltinFunctionType, types.MethodType, types.MethodWrapperType)
# Numbers whose hash is an address where they are NaN, and nothing of the kind otherwise.
_NUMBERS = (float, complex, decimal.Decimal)
# Of these, all objects were there before every program, at the same place for all of them.
_OLD = (type(None), type(...), type(NotImplemented))


class Watch:
    """`seen`: "text" or "hash" if an address was looked at since it was last set to ""."""

    def __init__(self):
        self.seen = ""
        # Types written in C: instances of the library's Python classes are out of reach where no class can be made.
        kinds = [kind for kind in _subclasses(object) if not issubclass(kind, type) and _in_c(kind)]
        texts = {_slot(kind, _REPR) for kind in _TELLING_TEXT}
        hashes = {_slot(kind, _HASH) for kind in _TELLING_HASH}
        self._slots, self._callbacks = [], {}
        for kind in filter(_in_c, _NUMBERS):
            self._lead(kind, _HASH, ctypes.c_ssize_t)
        self._numbers = len(self._slots)
        for kind in kinds:
            if _slot(kind, _REPR) in texts:
                self._lead(kind, _REPR, ctypes.py_object)
        # `object` itself, and what a class that is made later takes from it: the function in object.__repr__.
        self._lead(object, _REPR, ctypes.py_object)
        self._lead(vars(object)["__repr__"], _WRAPPED, ctypes.py_object)
        for kind in kinds:
            if _slot(kind, _HASH) in hashes and kind not in _OLD:
                self._lead(kind, _HASH, ctypes.c_ssize_t)
        self._try()

    def begin(self):
        """From here on, in this process. Without it, nothing is changed."""
        self._use(self._slots[self._numbers :])

    def begin_numbers(self):
        """NaN too, whose hash is its address. Not in `begin`, since it makes every other such number slow to hash."""
        self._use(self._slots[: self._numbers])

    def _use(self, slots):
        for place, function in slots:
            place.value = function
        self.seen = ""

    def note(self):
        """For what tells an address, or a hash, in another way."""
        self.seen = self.seen or "hash"

    def _lead(self, kind, offset, result):
        """Notes where a slot is and what it is to hold: one function for each that is there now."""
        before = _slot(kind, offset)
        if before not in self._callbacks:
            form = ctypes.PYFUNCTYPE(result, ctypes.py_object)
            self._callbacks[before] = form(self._noting(form(before), "hash" if offset == _HASH else "text"))
        function = ctypes.cast(self._callbacks[before], ctypes.c_void_p).value
        self._slots.append((ctypes.c_void_p.from_address(id(kind) + offset), function))

    def _noting(self, before, what):
        def after(value):
            if not (what == "hash" and type(value) in _NUMBERS and _is_plain(value)) and self.seen != "text":
                self.seen = what
            # What is raised here is lost. A decimal that signals has no hash: -1 becomes a SystemError.
            signals = what == "hash" and type(value) is decimal.Decimal and value.is_snan()
            return -1 if signals else before(value)

        return after

    def _try(self):
        """Raises OSError if the slots do not do what they should, before anything is changed."""
        if _slot(vars(object)["__repr__"], _WRAPPED) != _slot(object, _REPR):
            raise OSError("the function of object.__repr__ is not where it is expected")
        for offset, result, function in ((_REPR, ctypes.py_object, repr), (_HASH, ctypes.c_ssize_t, hash)):
            for value in (len, (1, "a"), 2.5, iter(())):
                if ctypes.PYFUNCTYPE(result, ctypes.py_object)(_slot(type(value), offset))(value) != function(value):
                    raise OSError("the slots of types are not where they are expected")


def _is_plain(number):
    """Whether it is not NaN; `==` would raise for decimals that signal."""
    return not number.is_nan() if type(number) is decimal.Decimal else number == number


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
