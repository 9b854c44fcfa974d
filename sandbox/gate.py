"""Reads a program before it runs: compiles it, names what is forbidden, and says whether hash order can reach its
output.

Runs inside the confined child, on code objects (a syntax tree would cost more than the whole child). This is no
boundary, the kernel is: the gate gives proposers their reasons and keeps clocks, addresses and random numbers out of
honest programs.

    code, order_matters = judge(source, modules=frozenset({"math"}))          # raises Refused

Imports nothing of the project and can be copied out alone; made for the opcodes of Python 3.10 to 3.13.
"""

import builtins
import sys
from opcode import opmap

# Reach files, the terminal or other programs' objects (open, globals), or give another answer each time (id, hash).
FORBIDDEN_BUILTINS = frozenset(
    "open input eval exec compile id hash globals locals vars memoryview breakpoint exit quit help "
    "__import__ __build_class__ __loader__ __spec__ copyright credits license".split()
)
# Attributes that lead from an object of the program to the interpreter's: modules, frames, other classes.
_FORBIDDEN_NAMES = frozenset(
    "__globals__ __builtins__ __subclasses__ __code__ __closure__ __loader__ __spec__ __import__ __mro__ __bases__ "
    "__base__ __reduce__ __reduce_ex__ __getattribute__ __self__ __func__ __traceback__ "
    "gi_frame gi_code gi_yieldfrom cr_frame cr_code ag_frame ag_code tb_frame tb_next f_back f_globals f_locals "
    "f_builtins f_code f_trace _getframe with_traceback _evaluate __forward_code__".split()
)
# Names, operations and operators that can make a set or tell a hash, whose order or value may then reach the output.
_SET_NAMES = frozenset(
    "set frozenset Counter hash __hash__ symmetric_difference __or__ __and__ __sub__ __xor__ __abstractmethods__ "
    "KeysView ItemsView Set MutableSet __required_keys__ __optional_keys__ __readonly_keys__ __mutable_keys__ "
    "__protocol_attrs__".split()
)
_VIEW_NAMES, _VIEW_OPERATORS = frozenset(("keys", "items")), frozenset("and_ or_ sub xor iand ior isub ixor".split())
# A class pattern with positions takes attributes by the names in __match_args__ from whatever passes for an instance:
# together with these it could take any attribute of anything.
_PATTERN_NAMES = frozenset(
    "__match_args__ __instancecheck__ __subclasshook__ __class__ register type make_dataclass".split()
)
_SET_CODES = bytes(opmap[name] for name in ("BUILD_SET", "SET_ADD", "SET_UPDATE") if name in opmap)
# The operators that make sets of dict views, & | ^ -: operations of their own in Python 3.10, arguments of one since
# then.
_BINARY_CODES = {opmap[name] for name in "BINARY_AND BINARY_OR BINARY_SUBTRACT BINARY_XOR".split() if name in opmap}
_BINARY_OP, _BINARY_ARGUMENTS = opmap.get("BINARY_OP"), {1, 7, 10, 12, 14, 20, 23, 25}
_IMPORT, _IMPORT_FROM, _EXTENDED = opmap["IMPORT_NAME"], opmap["IMPORT_FROM"], opmap["EXTENDED_ARG"]
_MATCH_CLASS = opmap["MATCH_CLASS"]
_LOADS = {opmap["LOAD_NAME"], opmap["LOAD_GLOBAL"]}
_STORES = {opmap[name] for name in ("STORE_NAME", "STORE_GLOBAL")}
_GLOBAL_SHIFT = 1 if sys.version_info >= (3, 11) else 0  # the lowest bit of LOAD_GLOBAL's argument is a flag there


class Refused(Exception):
    """args[0] is a status (syntax, forbidden), args[1] its detail."""


def compile_source(source: str):
    """The program's code object. Raises Refused with the status syntax, whatever the parser trips over."""
    try:
        # dont_inherit: without it this file's own __future__ imports would apply to the program.
        return compile(source, "<program>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        reason = str(getattr(error, "msg", error)).encode("ascii", "backslashreplace").decode()[:100]
        raise Refused("syntax", f"{type(error).__name__} {reason}" + (f" (line {line})" if line else "")) from error


def judge(source: str, modules: frozenset):
    """(code object, whether set or hash order can matter). Raises Refused. modules: that may be imported."""
    code = compile_source(source)
    codes = all_codes(code)
    # A program may have a variable of its own called `input` or `id`: what it assigns anywhere is not the builtin.
    stored, loaded, every = set(), set(), set()
    for part in codes:
        names = set(part.co_names)
        every |= names
        refused = names & _FORBIDDEN_NAMES or _pattern_names(part) & _FORBIDDEN_NAMES
        if refused:
            raise Refused("forbidden", f"name {min(refused)}")
        if _IMPORT in part.co_code[::2]:
            _check_imports(part, modules)
        if names & FORBIDDEN_BUILTINS:
            _global_names(part, FORBIDDEN_BUILTINS, stored, loaded)
    if loaded - stored:
        raise Refused("forbidden", f"builtin {min(loaded - stored)}")
    if every & _PATTERN_NAMES and any(map(_has_positions, codes)):
        raise Refused("forbidden", f"name {min(every & _PATTERN_NAMES)} beside a class pattern with positions")
    return code, _order_sensitive(codes, every)


def all_codes(code):
    """The code object and all that lie inside it: functions, lambdas, comprehensions, class bodies."""
    codes, kind = [code], type(code)
    for part in codes:
        codes += [constant for constant in part.co_consts if type(constant) is kind]
    return codes


def _instructions(code):
    """(opcode, argument) pairs; inline caches show up as harmless zeros."""
    # EXTENDED_ARG holds the upper bits of the next instruction's argument.
    argument, raw = 0, code.co_code
    for position in range(0, len(raw), 2):
        argument = argument << 8 | raw[position + 1]
        if raw[position] != _EXTENDED:
            yield raw[position], argument
            argument = 0


def _check_imports(code, modules):
    module = ""
    for operation, argument in _instructions(code):
        if operation == _IMPORT:
            module = code.co_names[argument]
            if module not in modules:
                raise Refused("forbidden", f"import {module or '.'}")
        elif operation == _IMPORT_FROM and code.co_names[argument].startswith("_") and module != "__future__":
            raise Refused("forbidden", f"import {module}.{code.co_names[argument]}")


def _global_names(code, names, stored, loaded):
    """Adds to `stored` and `loaded` those of `names` that the code uses as variables, not as attributes."""
    for operation, argument in _instructions(code):
        if operation in _STORES and code.co_names[argument] in names:
            stored.add(code.co_names[argument])
        elif operation in _LOADS:
            shift = _GLOBAL_SHIFT if operation == opmap["LOAD_GLOBAL"] else 0
            name = code.co_names[argument >> shift]
            if name in names and not (name == "hash" and code.co_name == "__hash__"):
                loaded.add(name)


def _pattern_names(code):
    """The attributes of class patterns, `case A(name=x)`: constants, and no names of the code."""
    if _MATCH_CLASS not in code.co_code[::2]:
        return frozenset()
    texts = [constant for constant in code.co_consts if type(constant) is tuple]
    return frozenset(name for names in texts for name in names if type(name) is str)


def _has_positions(code):
    return any(operation == _MATCH_CLASS and argument for operation, argument in _instructions(code))


def _order_sensitive(codes, names):
    """Whether hash order can matter anywhere in the program: a view may be made in one function, its & in another."""
    operations = b"".join(code.co_code[::2] for code in codes)
    if not _SET_NAMES.isdisjoint(names) or any(operation in operations for operation in _SET_CODES):
        return True
    if _VIEW_NAMES.isdisjoint(names):
        return False
    return not _VIEW_OPERATORS.isdisjoint(names) or any(
        operation in _BINARY_CODES or operation == _BINARY_OP and argument in _BINARY_ARGUMENTS
        for code in codes
        for operation, argument in _instructions(code)
    )


def safe_builtins(importer, getter) -> dict:
    """The builtins of a program: `print` goes nowhere, imports come from the list, getattr refuses what the gate
    refuses."""
    allowed = {name: value for name, value in vars(builtins).items() if name not in FORBIDDEN_BUILTINS}
    allowed["hash"] = hash  # only inside a __hash__ method: the gate sees to it
    allowed |= {"print": _print, "__import__": importer, "__build_class__": builtins.__build_class__}
    allowed["getattr"] = getter  # the gate sees names in the code, not those that are made as text
    return allowed


def _print(*values, **options):
    """print() without a place to print to."""


def guarded_getattr(note):
    """getattr without the names that lead out of a program; note() is called for those that can tell a hash."""

    def getter(value, name, *default):
        _check_name(name, _FORBIDDEN_NAMES)
        if name.startswith("__"):
            note()
        return getattr(value, name, *default)

    return getter


def _check_name(name, refused=None):
    """Raises AttributeError for a name that is refused; None: for one that begins with an underscore."""
    if type(name) is not str:  # a subclass of str could hash and compare as it likes
        raise TypeError("attribute name must be string")
    if name in refused if refused is not None else name.startswith("_"):
        raise AttributeError(f"{name} is not available")


def close_doors(modules: dict, proxies: dict):
    """Takes from the modules of a lane what evaluates text or takes attributes by texts that the gate does not see.

    modules: the real ones by name; proxies: what programs get in their place. Attributes by text may be had all the
    same, but for names that begin with an underscore (update_wrapper: for those that are forbidden).
    """
    operator, functools, typing = (modules[name] for name in ("operator", "functools", "typing"))

    def attrgetter(*names):
        for name in names:
            for part in name.split(".") if type(name) is str else [name]:
                _check_name(part)
        return operator.attrgetter(*names)

    def methodcaller(name, /, *args, **options):
        _check_name(name)
        return operator.methodcaller(name, *args, **options)

    def update_wrapper(wrapper, wrapped, assigned=functools.WRAPPER_ASSIGNMENTS, updated=functools.WRAPPER_UPDATES):
        names = tuple(assigned), tuple(updated)
        for name in names[0] + names[1]:
            _check_name(name, _FORBIDDEN_NAMES)
        return functools.update_wrapper(wrapper, wrapped, *names)

    def wraps(wrapped, assigned=functools.WRAPPER_ASSIGNMENTS, updated=functools.WRAPPER_UPDATES):
        return lambda wrapper: update_wrapper(wrapper, wrapped, assigned, updated)

    def get_type_hints(value, *_, **__):
        hints = dict(getattr(value, "__annotations__", None) or {})
        if any(isinstance(hint, (str, typing.ForwardRef)) for hint in hints.values()):
            raise NameError("annotations that are text are not evaluated")
        return hints

    typing.get_type_hints = get_type_hints  # functools.singledispatch calls it
    for name, replacements in {
        "operator": {"attrgetter": attrgetter, "methodcaller": methodcaller},
        "functools": {"update_wrapper": update_wrapper, "wraps": wraps},
        "typing": {"get_type_hints": get_type_hints},
    }.items():
        vars(proxies[name]).update(replacements)
    for name, leaf in (("string", "Formatter"), ("typing", "ForwardRef")):
        del vars(proxies[name])[leaf]
        names = proxies[name].__all__
        names.remove(leaf)
