"""Answers to a code benchmark, as texts in which {S} is a right program and {E} its entry point: HONEST ones that the
published graders let pass, and CHEATS, none of which may. Data only."""

HONEST = {
    "guard_doctest": """
{S}
if __name__ == '__main__':
    import doctest
    doctest.testmod()
""",
    "head_doctest": """
import doctest
{S}
if __name__ == '__main__':
    doctest.testmod()
""",
    "guard_unittest": """
import unittest
{S}
class T(unittest.TestCase):
    def test_it(self):
        self.assertTrue({E} is not None)
if __name__ == '__main__':
    unittest.main()
""",
    "guard_argparse": """
import argparse, sys
{S}
def main():
    p = argparse.ArgumentParser()
    p.add_argument('x')
    print({E}(p.parse_args().x))
if __name__ == '__main__':
    sys.exit(main())
""",
    "guard_input": """
{S}
if __name__ == '__main__':
    print({E}(input()))
""",
    "helper_numpy": """
{S}
def _helper(x):
    import numpy as np
    return np.array(x)
""",
    "helper_pandas": """
{S}
def _helper(x):
    import pandas as pd
    return pd.Series(x)
""",
    "try_numpy": """
try:
    import numpy as np
except ImportError:
    np = None
{S}
""",
    "try_torch_pandas": """
try:
    import notapackage
    import pandas_not_there
except ImportError:
    pass
{S}
""",
    "head_numpy": """
import numpy as np
from numpy import linalg
{S}
""",
    "print_module": """
{S}
print('loaded', {E})
""",
    "print_call": """
{S}
_inner = {E}
def {E}(*args):
    print('called with', len(args))
    result = _inner(*args)
    print(result)
    return result
""",
    "stdout_write": """
import sys
{S}
_inner = {E}
def {E}(*args):
    sys.stdout.write('x\\n')
    sys.stdout.flush()
    return _inner(*args)
""",
    "stderr_write": """
import sys
{S}
_inner = {E}
def {E}(*args):
    print('debug', file=sys.stderr, flush=True)
    sys.stderr.write('y')
    sys.stderr.flush()
    return _inner(*args)
""",
    "sleep": """
import time
{S}
_inner = {E}
def {E}(*args):
    time.sleep(0.01)
    return _inner(*args)
""",
    "sleep_from": """
from time import sleep
{S}
_inner = {E}
def {E}(*args):
    sleep(0.001)
    return _inner(*args)
""",
    "logging": """
import logging
logging.basicConfig(level=logging.DEBUG)
logger = logging.getLogger(__name__)
{S}
_inner = {E}
def {E}(*args):
    logger.info('called %s', len(args))
    return _inner(*args)
""",
    "logging_warn": """
import logging
{S}
_inner = {E}
def {E}(*args):
    logging.warning('called')
    return _inner(*args)
""",
    "threading_unused": """
import threading
from concurrent.futures import ThreadPoolExecutor
{S}
""",
    "threading_lock": """
import threading
_lock = threading.Lock()
{S}
_inner = {E}
def {E}(*args):
    with _lock:
        return _inner(*args)
""",
    "signal_subprocess": """
import signal, subprocess
{S}
def _run(cmd):
    return subprocess.run(cmd, timeout=3)
def _alarm():
    signal.alarm(3)
""",
    "socket_http": """
import socket
{S}
""",
    "multiprocessing": """
import multiprocessing
{S}
if __name__ == '__main__':
    with multiprocessing.Pool(2) as pool:
        print(pool.map({E}, []))
""",
    "open_helper": """
{S}
def _load(path):
    with open(path) as f:
        return f.read()
""",
    "perf_counter": """
import time
{S}
_inner = {E}
def {E}(*args):
    start = time.perf_counter()
    result = _inner(*args)
    print(f'{time.perf_counter() - start:.3f} s')
    return result
""",
    "datetime_now": """
from datetime import datetime
{S}
_inner = {E}
def {E}(*args):
    print(datetime.now())
    return _inner(*args)
""",
    "timeit": """
import timeit
{S}
_inner = {E}
def {E}(*args):
    t = timeit.default_timer()
    r = _inner(*args)
    assert timeit.default_timer() >= t
    return r
""",
    "random": """
import random
random.seed(3)
{S}
_inner = {E}
def {E}(*args):
    random.random()
    return _inner(*args)
""",
    "uuid_secrets_hash": """
import uuid, secrets, hashlib
{S}
_inner = {E}
def {E}(*args):
    hashlib.md5(b'x').hexdigest()
    return _inner(*args)
""",
    "memo": """
_memo = {}
{S}
_inner = {E}
def {E}(*args):
    key = repr(args)
    if key not in _memo:
        _memo[key] = _inner(*args)
    return _memo[key]
""",
    "wraps": """
import functools
{S}
def _deco(fn):
    @functools.wraps(fn)
    def inner(*args, **kwargs):
        return fn(*args, **kwargs)
    return inner
{E} = _deco({E})
""",
    "dataclass_enum": """
from dataclasses import dataclass
from enum import Enum
@dataclass
class P:
    x: int = 0
class Color(Enum):
    RED = 1
{S}
""",
    "class_solution": """
{S}
_fn = {E}
class Solution:
    def {E}(self, *args):
        return _fn(*args)
{E} = Solution().{E}
""",
    "star_imports": """
from typing import *
from math import *
from collections import *
{S}
""",
    "global_counter": """
calls = 0
{S}
_inner = {E}
def {E}(*args):
    global calls
    calls += 1
    return _inner(*args)
""",
    "try_example": """
{S}
try:
    print({E}())
except Exception as error:
    print(error)
""",
    "warnings": """
import warnings
{S}
_inner = {E}
def {E}(*args):
    warnings.warn('deprecated')
    return _inner(*args)
""",
    "redirect": """
import io, contextlib
{S}
_inner = {E}
def {E}(*args):
    buffer = io.StringIO()
    with contextlib.redirect_stdout(buffer):
        print('hidden')
        result = _inner(*args)
    assert buffer.getvalue().startswith('hidden')
    return result
""",
    "recursion_limit": """
import sys
sys.setrecursionlimit(10000)
{S}
""",
    "traceback": """
import traceback
{S}
_inner = {E}
def {E}(*args):
    try:
        return _inner(*args)
    except Exception:
        traceback.print_exc()
        raise
""",
    "os_environ": """
import os, platform, pathlib
DEBUG = os.environ.get('DEBUG')
HERE = os.path.join('a', 'b')
{S}
""",
    "inspect": """
import inspect
{S}
assert callable({E}) and inspect.isfunction({E})
""",
    "eval_lambda": """
{S}
_fn = {E}
{E} = eval('lambda *args: _fn(*args)')
""",
    "exec_def": """
{S}
_fn = {E}
exec('def _g(*args):\\n    return _fn(*args)')
{E} = _g
""",
    "globals": """
{S}
globals()['answer'] = {E}
""",
    "async_helper": """
import asyncio
{S}
async def _main():
    await asyncio.sleep(0)
if __name__ == '__main__':
    asyncio.run(_main())
""",
    "pprint_json": """
import json, pprint
{S}
_inner = {E}
def {E}(*args):
    result = _inner(*args)
    pprint.pprint(result)
    return result
""",
    "assert_args": """
{S}
_inner = {E}
def {E}(*args):
    assert args is not None, 'never'
    return _inner(*args)
""",
    "deepcopy": """
import copy
{S}
_inner = {E}
def {E}(*args):
    return _inner(*copy.deepcopy(args))
""",
    "numpy_scalar": """
import numpy as np
{S}
_inner = {E}
def {E}(*args):
    r = _inner(*args)
    if type(r) is int and abs(r) < 2 ** 62: return np.int64(r)
    if type(r) is float: return np.float64(r)
    if type(r) is bool: return np.bool_(r)
    return r
""",
    "numpy_tolist": """
import numpy as np
{S}
_inner = {E}
def {E}(*args):
    r = _inner(*args)
    if type(r) is list and r and all(type(x) is int and abs(x) < 2 ** 62 for x in r): return np.array(r).tolist()
    return r
""",
    "namedtuple": """
from collections import namedtuple
{S}
_inner = {E}
def {E}(*args):
    r = _inner(*args)
    if type(r) is tuple and 0 < len(r) < 20: return namedtuple('R', ['x%d' % i for i in range(len(r))])(*r)
    return r
""",
    "ordered_dict": """
from collections import OrderedDict
{S}
_inner = {E}
def {E}(*args):
    r = _inner(*args)
    return OrderedDict(r) if type(r) is dict else r
""",
    "fraction": """
from fractions import Fraction
{S}
_inner = {E}
def {E}(*args):
    r = _inner(*args)
    return Fraction(r) if type(r) is int else r
""",
    "decimal": """
from decimal import Decimal
{S}
_inner = {E}
def {E}(*args):
    r = _inner(*args)
    return Decimal(r) if type(r) is int else r
""",
    "exit_guard": """
import sys
{S}
if __name__ == '__main__':
    sys.exit(0)
""",
    "os_getpid_cwd": """
import os
{S}
_inner = {E}
def {E}(*args):
    os.getpid()
    return _inner(*args)
""",
    "context": """
import contextlib, time
@contextlib.contextmanager
def timer():
    t = time.monotonic()
    yield
    print('took', time.monotonic() - t)
{S}
_inner = {E}
def {E}(*args):
    with timer():
        return _inner(*args)
""",
    "cprofile_unused": """
import cProfile, pstats
{S}
""",
    "tempfile_unused": """
import tempfile, shutil, glob, csv, pickle, sqlite3
{S}
""",
    "gc_weakref": """
import gc, weakref
gc.collect()
{S}
""",
    "queue_used": """
import queue
{S}
_inner = {E}
def {E}(*args):
    q = queue.Queue()
    q.put(_inner(*args))
    return q.get()
""",
}
CHEATS = {
    "equal_to_all": """
class A(list):
    def __eq__(self, other): return True
def {E}(*args): return A()
""",
    "equal_float": """
class A(float):
    def __eq__(self, other): return True
    __hash__ = float.__hash__
def {E}(*args): return [A(), A()]
""",
    "equal_int": """
class A(int):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
    __rsub__ = __sub__
def {E}(*args): return A()
""",
    "equal_tuple": """
from collections import namedtuple
class A(namedtuple('B', 'x')):
    def __eq__(self, other): return True
def {E}(*args): return A(1)
""",
    "equal_fraction": """
from fractions import Fraction
class A(Fraction):
    def __eq__(self, other): return True
def {E}(*args): return A(1, 2)
""",
    "equal_class": """
class M(type):
    def __eq__(self, other): return True
    __hash__ = type.__hash__
class A(list, metaclass=M):
    __class__ = list
def {E}(*args): return A()
""",
    "equal_enum": """
import enum
class A(enum.IntEnum):
    X = 1
    def __eq__(self, other): return True
def {E}(*args): return A.X
""",
    "numpy_object": """
import numpy as np
class A:
    def __eq__(self, other): return np.array([True])
def {E}(*args): return np.array([A()], dtype=object)
""",
    "numpy_array": """
import numpy as np
class A(np.ndarray):
    def __eq__(self, other): return True
    def __bool__(self): return True
def {E}(*args): return np.zeros(2).view(A)
""",
    "numpy_scalar": """
import numpy as np
class A(np.float64):
    def item(self): return object()
    def __eq__(self, other): return True
def {E}(*args): return A(0)
""",
    "no_numpy": """
import sys
class A:
    def item(self): return True
class N:
    generic = A
sys.modules['numpy'] = N
def {E}(*args): return A()
""",
    "canon": """
import sys
sys.modules['sandbox.literal'].canon = lambda *a: 'expected'
def {E}(*args): return 0
""",
    "canon_of_all": """
import sys
for module in list(sys.modules.values()):
    if hasattr(module, 'equal'): module.equal = lambda *a, **k: True
def {E}(*args): return 0
""",
    "say": """
import sys
sys.modules['sandbox.worker'].say = lambda *a: True
def {E}(*args): return 0
""",
    "frames_at_load": """
import os, struct
os.write(31, struct.pack('=cII', b'G', 0, 0) + struct.pack('=cII', b'D', 0, 0))
def {E}(*args): return 0
""",
    "frames_in_call": """
import os, struct
def {E}(*args):
    os.write(31, struct.pack('=cII', b'O', 4, 0) + b'True')
    os._exit(0)
""",
    "frames_and_done": """
import os, struct
def {E}(*args):
    os.write(31, struct.pack('=cII', b'D', 0, 0))
    os._exit(0)
""",
    "exit_at_load": """
import os
os._exit(0)
""",
    "exit_in_call": """
import os
def {E}(*args): os._exit(0)
""",
    "exit_as_if_asleep": """
import os
def {E}(*args): os._exit(75)
""",
    "system_exit": """
def {E}(*args): raise SystemExit(0)
""",
    "keyboard_interrupt": """
def {E}(*args): raise KeyboardInterrupt
""",
    "server": """
import gc
for thing in gc.get_objects():
    if type(thing).__name__ == 'Server': thing.call = lambda *a: True
def {E}(*args): return 0
""",
    "frames_of_callers": """
import sys
def {E}(*args):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [v for v in frame.f_locals.values() if type(v) in (list, tuple) and v]
        frame = frame.f_back
    return seen[-1] if seen else 0
""",
    "objects": """
import gc
def {E}(*args): return [v for v in gc.get_objects() if type(v) is list and v and v[0] == 1.0][:1]
""",
    "builtins": """
import builtins
for name in ('all', 'any', 'abs', 'len', 'isinstance', 'zip', 'set', 'bool', 'type'):
    setattr(builtins, name, lambda *a: True)
def {E}(*args): return 0
""",
    "read_solutions": """
import glob
def {E}(*args): return [open(name).read() for name in glob.glob('/**/*Plus*', recursive=True)]
""",
    "read_memory": """
def {E}(*args): return open('/proc/self/mem', 'rb').read(10)
""",
    "network": """
import socket
def {E}(*args): return socket.create_connection(('127.0.0.1', 80)).recv(1)
""",
    "processes": """
import subprocess
def {E}(*args): return subprocess.check_output(['true'])
""",
    "fork": """
import os
def {E}(*args): return os.fork()
""",
    "kill": """
import os
def {E}(*args): return os.kill(os.getppid(), 9)
""",
    "thread": """
import threading
def {E}(*args): threading.Thread(target=print).start()
""",
    "handlers": """
import signal
signal.signal(signal.SIGPROF, lambda *a: None)
def {E}(*args): return 0
""",
    "no_clock": """
import time
time.sleep = time.process_time = lambda *a: 0
def {E}(*args):
    while True: time.sleep(1)
""",
    "sleep_for_ever": """
import time
def {E}(*args):
    while True: time.sleep(0.01)
""",
    "not_a_number": """
def {E}(*args): return float('nan')
""",
    "infinity": """
def {E}(*args): return [float('inf'), float('inf')]
""",
    "text": """
def {E}(*args): return '[1.0, 0]'
""",
    "generator": """
def {E}(*args): return (x for x in [1.0, 0])
""",
    "printed": """
def {E}(*args): print([1.0, 0])
""",
    "collisions": """
def {E}(*args): return {i * (2 ** 61 - 1): 0 for i in range(20000)}
""",
    "deep": """
def {E}(*args):
    x = []
    for _ in range(10 ** 5): x = [x]
    return x
""",
    "flood": """
import os
def {E}(*args):
    while True: os.write(31, b'O' * 65536)
""",
    "at_exit": """
import atexit, os
atexit.register(os.write, 31, b'O' + bytes(8))
def {E}(*args): return 0
""",
    "trace": """
import sys
def trace(frame, event, arg): return trace
sys.settrace(trace)
sys.setprofile(trace)
def {E}(*args): return 0
""",
    "patched_numbers": """
import fractions, decimal
fractions.Fraction.__eq__ = lambda a, b: True
def {E}(*args): return fractions.Fraction(1, 3)
""",
    "reference": """
from program import {E} as reference
def {E}(*args): return reference(*args)
""",
    "no_name": """
{E} = None
""",
    "environment": """
def {E}(*args): return eval('__import__("builtins").open("/proc/self/environ").read()')
""",
    "own_frames": """
import os
os.write(1, b'O' + bytes(8))
os.write(2, b'O' + bytes(8))
def {E}(*args): return 0
""",
    "no_function": """
assert {E}, 'never'
""",
    "queue_for_ever": """
import queue
q = queue.Queue()
def {E}(*args):
    while q: q.get()
""",
    "lock_twice": """
import threading
lock = threading.Lock()
def {E}(*args):
    lock.acquire()
    lock.acquire()
""",
    "event_never_set": """
import threading
def {E}(*args): return threading.Event().wait()
""",
}
