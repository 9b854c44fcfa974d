# Programs whose output is luck: each must be refused by validation. Read as text by harness.py.
# --- set_order
def f(x):
    return "".join({"a", "b", str(x)})
# --- set_pop
def f(x):
    return {"left", "right"}.pop()
# --- set_next
def f(x):
    return next(iter(frozenset(["heads", "tails"])))
# --- set_by_comprehension
def f(x):
    return [w for w in {w for w in ("spam", "eggs", "ham")}]
# --- key_views
def f(x):
    return list({"a": 1, "b": 2, "c": 3}.keys() & {"c": 1, "b": 2, "a": 3}.keys())
# --- key_views_difference
def f(x):
    return list({"a": 1, "b": 2, "c": 3}.keys() - {"z"})
# --- set_in_the_input_order
def f(x):
    return list(set(("ab", "cd", "ef", x)))
# --- minimum_with_ties
def f(x):
    return min({"ab", "cd", "ef"}, key=len)
# --- count_of_a_set
from collections import Counter
def f(x):
    return Counter(set("hello world")).most_common(1)
# --- text_of_a_set
def f(x):
    return str({"a", "b", "c"})
# --- hash_of_text
def f(x):
    return hash("text") % 2
# --- hash_method
def f(x):
    return "text".__hash__() % 2
# --- hash_in_a_class
class A:
    def __hash__(self):
        return hash("text")
def f(x):
    return A().__hash__() % 2
# --- identity
def f(x):
    return id(x) % 1000
# --- address_in_text
def f(x):
    return str(object())
# --- address_of_a_function
def f(x):
    return repr(f)
# --- address_of_a_method
def f(x):
    return f"{[].append}"
# --- address_hash
def f(x):
    return object().__hash__()
# --- object_address_order
class A:
    def __init__(self, n): self.n = n
def f(x):
    return [a.n for a in {A(1), A(2), A(3), A(4)}]
# --- object_address_order_two
class A:
    pass
def f(x):
    a, b = A(), A()
    a.n, b.n = "a", "b"
    return next(iter({a, b})).n
# --- address_of_type
def f(x):
    return type("A", (), {}).__hash__(type("A", (), {})) if False else hash(type(x))
# --- nan_hash
def f(x):
    return float("nan").__hash__()
# --- clock
import time
def f(x):
    return time.time()
# --- date
import datetime
def f(x):
    return str(datetime.datetime.now())
# --- random
import random
def f(x):
    return random.random()
# --- random_bytes
import os
def f(x):
    return os.urandom(4)
# --- uuid
import uuid
def f(x):
    return str(uuid.uuid4())
# --- counter_in_a_list
calls = []
def f(x):
    calls.append(x)
    return len(calls)
# --- counter_in_an_attribute
def f(x):
    f.n = getattr(f, "n", 0) + 1
    return f.n
# --- counter_in_a_default
def f(x, seen=[]):
    seen.append(1)
    return len(seen)
# --- counter_in_a_global
n = 0
def f(x):
    global n
    n += 1
    return n
# --- counter_in_a_closure
def make():
    n = 0
    def g(x):
        nonlocal n
        n += 1
        return n
    return g
f = make()
# --- counter_in_a_class
class A:
    n = 0
def f(x):
    A.n += 1
    return A.n
# --- counter_in_a_generator
numbers = iter(range(10 ** 6))
def f(x):
    return next(numbers)
# --- counter_in_an_iterator
from itertools import count
numbers = count()
def f(x):
    return next(numbers)
# --- cache_that_remembers
from functools import lru_cache
@lru_cache
def g(x): return x
def f(x):
    g(x)
    return g.cache_info().hits
# --- counter_in_a_module
import math
def f(x):
    math.calls = getattr(math, "calls", 0) + 1
    return math.calls
# --- remembers_the_input
seen = {}
def f(x):
    return seen.setdefault("first", x) * 0 + len(seen) + seen.setdefault(x, len(seen))
