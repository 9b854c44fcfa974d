"""Which programs may share a child with others: those that provably cannot reach an object that is not their own.

A program qualifies when its code objects (as compiled, in the child, before anything has run) hold only listed
operations, builtins, attributes and modules. That leaves: no class, no attribute store, no dunder, no `getattr`,
`type`, `format` or `eval`, no exception handler, no `with`, `async` or `match`, no identity test but with a constant.
Each of them gets a namespace and inputs of its own. What they then still share, and why it cannot reach a verdict:
  - the interpreter's objects: all that is within reach is immutable (builtin functions and types, numbers, strings, C
    functions of the listed modules), and caches and free lists do not change values. The one cache that does, that of
    typing (List[1] and List[True] are one key), is emptied before each program.
  - addresses: what a text, a hash or a copy's memo tells of them is noticed as it happens (addresses.py), and the
    program is run again, in a child of its own.
  - memory, stack and CPU time: neighbours can only leave less of them. Nothing in a listed program can catch running
    out of them, so an output is the one it would have alone; whatever else comes out, exceptions of the program's own
    logic aside, is asked for again in a child of its own (see settle_together in outcomes.py).
  - hash randomisation: one seed, as in every child of the lane.
A looping program costs its own limit, its neighbours a child of their own. This is a rule of the language, on top of
which seccomp confines the child as always: who breaks the interpreter from inside the list could harm the programs
beside it, but finds no expected answer there either.

    if worth_trying(source) and contained(compile(source, "<program>", "exec")): ...

Imports `all_codes` of gate.py and nothing else of the project.
"""

import re
from dis import findlabels
from opcode import opmap

from .gate import all_codes

# By name, for Python 3.10 to 3.13. An operation that is not listed, because it is new or dangerous, costs a program its
# company and nothing else. Missing on purpose: STORE_ATTR (reaches shared objects), SETUP_FINALLY and PUSH_EXC_INFO
# (catch what neighbours may cause), LOAD_BUILD_CLASS, and the operations of `with` and `match`.
_OPERATIONS = """
    BINARY_ADD BINARY_AND BINARY_FLOOR_DIVIDE BINARY_LSHIFT BINARY_MODULO BINARY_MULTIPLY BINARY_OP
    BINARY_OR BINARY_POWER BINARY_RSHIFT BINARY_SLICE BINARY_SUBSCR BINARY_SUBTRACT BINARY_TRUE_DIVIDE BINARY_XOR
    BUILD_CONST_KEY_MAP BUILD_LIST BUILD_MAP BUILD_SET BUILD_SLICE BUILD_STRING BUILD_TUPLE CACHE CALL CALL_FUNCTION
    CALL_FUNCTION_EX CALL_FUNCTION_KW CALL_INTRINSIC_1 CALL_KW CALL_METHOD COMPARE_OP CONTAINS_OP CONVERT_VALUE COPY
    COPY_FREE_VARS DELETE_DEREF DELETE_FAST DELETE_NAME DELETE_SUBSCR DICT_MERGE DICT_UPDATE DUP_TOP DUP_TOP_TWO
    END_FOR EXTENDED_ARG FORMAT_SIMPLE FORMAT_VALUE FORMAT_WITH_SPEC FOR_ITER GEN_START GET_ITER IMPORT_FROM
    IMPORT_NAME INPLACE_ADD INPLACE_AND INPLACE_FLOOR_DIVIDE INPLACE_LSHIFT INPLACE_MODULO INPLACE_MULTIPLY INPLACE_OR
    INPLACE_POWER INPLACE_RSHIFT INPLACE_SUBTRACT INPLACE_TRUE_DIVIDE INPLACE_XOR IS_OP JUMP_ABSOLUTE JUMP_BACKWARD
    JUMP_FORWARD JUMP_IF_FALSE_OR_POP JUMP_IF_TRUE_OR_POP KW_NAMES LIST_APPEND LIST_EXTEND LIST_TO_TUPLE
    LOAD_ASSERTION_ERROR LOAD_ATTR LOAD_CLOSURE LOAD_CONST LOAD_DEREF LOAD_FAST LOAD_FAST_AND_CLEAR LOAD_FAST_CHECK
    LOAD_FAST_LOAD_FAST LOAD_GLOBAL LOAD_METHOD LOAD_NAME MAKE_CELL MAKE_FUNCTION MAP_ADD NOP POP_JUMP_BACKWARD_IF_FALSE
    POP_JUMP_BACKWARD_IF_NONE POP_JUMP_BACKWARD_IF_NOT_NONE POP_JUMP_BACKWARD_IF_TRUE POP_JUMP_FORWARD_IF_FALSE
    POP_JUMP_FORWARD_IF_NONE POP_JUMP_FORWARD_IF_NOT_NONE POP_JUMP_FORWARD_IF_TRUE POP_JUMP_IF_FALSE POP_JUMP_IF_NONE
    POP_JUMP_IF_NOT_NONE POP_JUMP_IF_TRUE POP_TOP PRECALL PUSH_NULL RAISE_VARARGS RERAISE RESUME RETURN_CONST
    RETURN_GENERATOR RETURN_VALUE ROT_FOUR ROT_N ROT_THREE ROT_TWO SET_ADD SET_FUNCTION_ATTRIBUTE SET_UPDATE STORE_DEREF
    STORE_FAST STORE_FAST_LOAD_FAST STORE_FAST_STORE_FAST STORE_NAME STORE_SLICE STORE_SUBSCR SWAP TO_BOOL
    UNARY_INVERT UNARY_NEGATIVE UNARY_NOT UNARY_POSITIVE UNPACK_EX UNPACK_SEQUENCE YIELD_VALUE"""
BUILTINS = frozenset(
    """
    abs all any ascii bin bool bytes callable chr dict divmod enumerate filter float frozenset hex int
    isinstance issubclass iter len list map max min next oct ord pow print range repr reversed round set slice
        sorted str sum tuple
    zip ArithmeticError AssertionError IndexError KeyError LookupError NotImplementedError StopIteration TypeError
    ValueError ZeroDivisionError""".split()
)
MODULES = {
    name: frozenset(names.split())
    for name, names in {
        "math": """acos acosh asin asinh atan atan2 atanh ceil comb copysign cos cosh degrees dist e erf erfc exp expm1
        fabs factorial floor fmod frexp fsum gamma gcd hypot inf isclose isfinite isinf isnan isqrt lcm ldexp
        lgamma log log10
        log1p log2 modf nan perm pi pow prod radians remainder sin sinh sqrt tan tanh tau trunc""",
        "itertools": """accumulate chain combinations combinations_with_replacement compress count cycle dropwhile
        filterfalse
        islice permutations product repeat starmap takewhile zip_longest""",
        "collections": "Counter defaultdict deque",
        "functools": "cmp_to_key lru_cache partial reduce",
        "heapq": "heapify heappop heappush heappushpop heapreplace nlargest nsmallest",
        "bisect": "bisect bisect_left bisect_right insort insort_left insort_right",
        "operator": "add and_ eq floordiv ge gt itemgetter le lt mod mul ne neg or_ pow sub truediv xor",
        "string": "ascii_letters ascii_lowercase ascii_uppercase digits hexdigits punctuation",
        "copy": "copy deepcopy",
        "typing": "Any Dict Iterable List Optional Sequence Set Tuple Union",
    }.items()
}
ATTRIBUTES = frozenset(
    """
    add append appendleft bit_count bit_length capitalize casefold center clear conjugate copy count decode denominator
    difference difference_update discard elements encode endswith expandtabs extend extendleft find from_bytes
    from_iterable fromkeys get imag index insert intersection intersection_update is_integer isalnum isalpha isascii
    isdecimal isdigit isdisjoint isidentifier islower isnumeric isprintable isspace issubset issuperset istitle isupper
    items join keys ljust lower lstrip maketrans most_common numerator partition pop popitem popleft real
    remove removeprefix removesuffix replace reverse rfind rindex rjust rotate rpartition rsplit rstrip setdefault sort
    split splitlines startswith strip subtract swapcase symmetric_difference symmetric_difference_update title to_bytes
    total translate union update upper values zfill""".split()
).union(*MODULES.values())

_ALLOWED = frozenset(opmap[name] for name in _OPERATIONS.split() if name in opmap)
_ATTRIBUTE_CODES = [opmap[name] for name in ("LOAD_ATTR", "LOAD_METHOD") if opmap.get(name, 256) < 256]
# From 3.12 on the two are one operation, whose argument's lowest bit tells which: the name's number is above it.
_ATTRIBUTE_SHIFT = 2 - len(_ATTRIBUTE_CODES)
_IMPORT_NAME, _IMPORT_FROM, _STORE_NAME = opmap["IMPORT_NAME"], opmap["IMPORT_FROM"], opmap["STORE_NAME"]
_IS, _LOAD_CONST, _EXTENDED = opmap["IS_OP"], opmap["LOAD_CONST"], opmap["EXTENDED_ARG"]
# Names of a code object at most. Their numbers then fit an argument of one byte, flags included, so EXTENDED_ARG never
# applies to a name and the arguments below can be read one by one.
_NAMES = 60
_ASYNC = 0x80 | 0x100 | 0x200  # flags of coroutines, awaitable generators, asynchronous generators
_HOPELESS = re.compile(r"\b(?:class|except|finally|with|async|match|getattr|setattr|type|yield\s+from)\b|__|\.format\b")


def worth_trying(source: str) -> bool:
    """A guess from the text: False spares a program that would be refused the way to a shared child and back.

    Made in the pool, where nothing is compiled; a wrong guess costs time, never a verdict.
    """
    return _HOPELESS.search(source) is None


def contained(code) -> bool:
    """Whether a program, by its code object, can reach nothing but what is its own or immutable."""
    # Names that it assigns at its top level are its own; in functions, locals are not in co_names at all.
    allowed = BUILTINS | ATTRIBUTES | MODULES.keys() | {code.co_names[number] for number in _numbers(code, _STORE_NAME)}
    return all(_listed(part, allowed) for part in all_codes(code))


def _listed(code, allowed):
    names = code.co_names
    # Every second byte is an operation, inline caches included, which are listed as CACHE.
    if code.co_flags & _ASYNC or len(names) > _NAMES or not _ALLOWED.issuperset(code.co_code[::2]):
        return False
    if not allowed.issuperset(names) or any(name.startswith("__") for name in names):
        return False
    attributes = [names[number >> _ATTRIBUTE_SHIFT] for kind in _ATTRIBUTE_CODES for number in _numbers(code, kind)]
    attributes += [names[number] for number in _numbers(code, _IMPORT_FROM)]
    modules = [names[number] for number in _numbers(code, _IMPORT_NAME)]
    return ATTRIBUTES.issuperset(attributes) and MODULES.keys() >= set(modules) and _plain_identity(code)


def _numbers(code, kind):
    """The arguments of all instructions of a kind."""
    operations, arguments = code.co_code[::2], []
    place = operations.find(kind)  # bytes.find, and not a loop over all bytes: most programs hold a kind not at all
    while place >= 0:
        arguments.append(code.co_code[2 * place + 1])
        place = operations.find(kind, place + 1)
    return arguments


def _plain_identity(code):
    """Whether `is` is asked of None, True and False alone: other identities depend on caches."""
    operations = code.co_code[::2]
    if _IS not in operations:
        return True
    # Not where a jump leads, whose constant is another, nor with a number of the constant that takes two instructions.
    targets = findlabels(code.co_code)
    for place, kind in enumerate(operations):
        if kind == _IS:
            loaded = (
                operations[place - 1] == _LOAD_CONST and operations[place - 2] != _EXTENDED and 2 * place not in targets
            )
            constant = code.co_consts[code.co_code[2 * place - 1]] if loaded else 0
            if constant is not None and type(constant) is not bool:
                return False
    return True
