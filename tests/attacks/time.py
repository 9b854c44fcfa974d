# Programs that never end, or try to. Read as text by harness.py, one program after each "# ---" line.
# --- busy_loop
def f(x):
    while True:
        pass
# --- loop_at_load
while True:
    pass
def f(x):
    return 1
# --- power_tower
def f(x):
    return 9 ** 9 ** 9
# --- regex_backtracking
import re
def f(x):
    return bool(re.match(r"(a+)+$", "a" * 60 + "b"))
# --- endless_c_iterator
from collections import deque
from itertools import count
def f(x):
    deque(count(), maxlen=0)
# --- sum_of_a_long_range
def f(x):
    return sum(range(10 ** 13))
# --- swallow_every_exception
def f(x):
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
# --- recursion_swallowed
def f(x):
    try:
        return f(x) + f(x)
    except RecursionError:
        return f(x)
# --- fibonacci
def f(x):
    fib = lambda n: n if n < 2 else fib(n - 1) + fib(n - 2)
    return fib(60)
# --- endless_hash
class A:
    def __hash__(self):
        while True:
            pass
def f(x):
    return {A(): 1}
# --- endless_comparison
class A:
    def __lt__(self, other):
        while True:
            pass
def f(x):
    return sorted([A(), A()])
# --- endless_class_body
class A:
    while True:
        pass
# --- endless_decorator
def forever(function):
    while True:
        pass
@forever
def f(x):
    return 1
# --- endless_index
class A:
    def __index__(self):
        while True:
            pass
def f(x):
    return [1][A()]
# --- factorial
import math
def f(x):
    return math.factorial(10 ** 8) % 7
# --- decimal_digits
from decimal import Decimal, getcontext
def f(x):
    getcontext().prec = 10 ** 8
    return str(Decimal(2) ** Decimal("0.5"))[:5]
# --- generator_that_never_yields
def f(x):
    return next(i for i in iter(int, 1) if i)
# --- permutations
import itertools
def f(x):
    return sum(1 for _ in itertools.permutations(range(50)))
# --- loop_in_finalizer
class A:
    def __del__(self):
        while True:
            pass
def f(x):
    A()
    return 1
# --- loop_after_generator_exit
def f(x):
    def g():
        while True:
            try:
                yield 1
            except GeneratorExit:
                while True:
                    pass
    for _ in g():
        break
    return 1
# --- cancel_the_cpu_timer
import signal
def f(x):
    signal.setitimer(signal.ITIMER_PROF, 0)
    while True:
        pass
# --- cancel_the_wall_timer
import signal
def f(x):
    signal.setitimer(signal.ITIMER_REAL, 0)
    return "ESCAPED"
# --- ignore_the_signal
import signal
def f(x):
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    while True:
        pass
# --- block_the_signal
import ctypes
def f(x):
    ctypes.CDLL(None).sigfillset(s := ctypes.create_string_buffer(128))
    ctypes.CDLL(None).sigprocmask(0, s, None)
    while True:
        pass
# --- raise_the_limit
import resource
def f(x):
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    return "ESCAPED"
# --- sleep
import time
def f(x):
    time.sleep(1000)
    return "ESCAPED"
# --- deadlock
import threading
def f(x):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
# --- read_a_pipe_for_ever
import os
def f(x):
    return os.read(1, 1)
# --- wait_in_select
import select
def f(x):
    select.select([], [], [], 1000)
    return "ESCAPED"
# --- pause
import signal
def f(x):
    signal.pause()
# --- timer_by_system_call
import ctypes
def f(x):
    ctypes.CDLL(None).syscall(38, 2, ctypes.create_string_buffer(32), None)
    while True:
        pass
