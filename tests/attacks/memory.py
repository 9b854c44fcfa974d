# Programs that take too much: memory, output, nesting, the parser. Read as text by harness.py.
# --- list_of_a_billion
def f(x):
    return len([0] * 10 ** 9)
# --- bytearray_of_gigabytes
def f(x):
    return len(bytearray(4 * 10 ** 9))
# --- text_doubling
def f(x):
    s = "x"
    while True:
        s += s
# --- growing_dict
def f(x):
    d = {}
    while True:
        d[len(d)] = "x" * 1000
# --- memory_error_swallowed
def f(x):
    kept = []
    while True:
        try:
            kept.append(bytearray(10 ** 7))
        except MemoryError:
            pass
# --- output_of_a_megabyte
def f(x):
    return "x" * 10 ** 6
# --- output_of_many_values
def f(x):
    return list(range(10 ** 6))
# --- output_that_contains_itself
def f(x):
    a = []
    a.append(a)
    return a
# --- dict_that_contains_itself
def f(x):
    a = {}
    a[1] = (a,)
    return a
# --- exponential_sharing
def f(x):
    a = [1, 2]
    for _ in range(60):
        a = [a, a]
    return a
# --- nested_ten_thousand_deep
def f(x):
    a = []
    for _ in range(10 ** 4):
        a = [a]
    return a
# --- nested_million_deep_freed
def f(x):
    a = ()
    for _ in range(10 ** 6):
        a = (a,)
    return 1 if a is None else repr(len(a))
# --- integer_of_a_megabit
def f(x):
    return 1 << 10 ** 6
# --- integer_text
def f(x):
    return str(10 ** 100_000)
# --- huge_class_name
def f(x):
    raise type("A" * 10 ** 7, (Exception,), {})
# --- huge_exception_text
def f(x):
    raise ValueError("x" * 10 ** 8)
# --- parser_parentheses
def f(x): return @LONG parser_parentheses@
# --- parser_minus_signs
def f(x): return @LONG parser_minus_signs@
# --- parser_long_sum
def f(x): return @LONG parser_long_sum@
# --- parser_nested_lambda
def f(x): return @LONG parser_nested_lambda@
# --- parser_nested_lists
def f(x): return @LONG parser_nested_lists@
# --- parser_nested_comprehensions
def f(x): return @LONG parser_nested_comprehensions@
# --- constant_folding_text
def f(x): return len("x" * 10 ** 10)
# --- constant_folding_tuple
def f(x): return len((1,) * 10 ** 10)
# --- constant_folding_shift
def f(x): return (1 << 10 ** 10) & 1
# --- coding_cookie
# -*- coding: utf-7 -*-
def f(x): return "+AG8-"
# --- cut_off_string
def f(x): return "abc
# --- form_feeds
def f(x): return @LONG form_feeds@
# --- deep_copy
import copy
def f(x):
    a = []
    for _ in range(10 ** 5):
        a = [a]
    return len(copy.deepcopy(a))
# --- deep_json
import json
def f(x):
    return json.loads("[" * 10 ** 5)
# --- deep_comparison
def f(x):
    a, b = [], []
    for _ in range(10 ** 5):
        a, b = [a], [b]
    return a == b
# --- regex_group_bomb
import re
def f(x):
    return re.compile("(" * 5000 + ")" * 5000).groups
# --- regex_counted_bomb
import re
def f(x):
    return bool(re.match("(((a{1,100}){1,100}){1,100}){1,100}$", "a" * 5000 + "b"))
# --- colliding_keys
def f(x):
    return len({i * (2 ** 61 - 1) for i in range(10 ** 6)})
# --- format_width
def f(x):
    return len("%*d" % (10 ** 9 + x, 1)) + len(f"{1:>{10 ** 9}}")
# --- permutations_of_a_big_pool
import itertools
def f(x):
    return len(next(itertools.product(range(10 ** 9), repeat=2)))
# --- many_files
import os
def f(x):
    found = []
    for number in range(10 ** 4):
        found.append(os.open("/dev/null", 0))
    return "ESCAPED"
# --- map_ten_gigabytes
import mmap
def f(x):
    m = mmap.mmap(-1, 10 * 2 ** 30)
    return "ESCAPED" if len(m) else 0
# --- null_pointer
import ctypes
def f(x):
    return ctypes.string_at(0)
# --- stack_overflow
import sys
def f(x):
    sys.setrecursionlimit(10 ** 9)
    class A:
        def __repr__(self):
            return repr(self)
    return repr(A())
# --- write_over_code
import ctypes
def f(x):
    ctypes.memset(id(int), 0, 400)
    return 1
# --- zip_bomb
import zlib
def f(x):
    data = zlib.compress(bytes(10 ** 7))
    return len(zlib.decompress(data)) * len(bytearray(10 ** 9))
# --- output_flood
def f(x):
    return ["x" * 10_000]
def g(x):
    return 1
# --- lock_memory
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).mlockall(3) == 0 else 0
