"""Answers to a code benchmark that the published graders let pass, as texts: {S} is a right program, {E} its name.
{WRAPPED} opens a function of that name around it, which calls it as `_inner`. Data only; cheats.py has the others."""

HALF = {  # a problem of our own; each test adds its plus_input
    "task_id": "Own/1",
    "prompt": 'def half(x):\n    """Half of x, and how often it can be halved again."""\n',
    "entry_point": "half",
    "canonical_solution": "    return [x / 2, (x & -x).bit_length() - 2]\n",
    "base_input": [[2], [12]],
    "atol": 0,
}
WRAPPED = "{S}\n_inner = {E}\ndef {E}(*args):"


def opened(answers: dict[str, str]) -> dict[str, str]:
    """The answers with {WRAPPED} spelled out."""
    return {name: text.replace("{WRAPPED}", WRAPPED) for name, text in answers.items()}


HONEST = opened(
    {
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
{WRAPPED}
    print('called with', len(args))
    result = _inner(*args)
    print(result)
    return result
""",
        "stdout_write": """
import sys
{WRAPPED}
    sys.stdout.write('x\\n')
    sys.stdout.flush()
    return _inner(*args)
""",
        "stderr_write": """
import sys
{WRAPPED}
    print('debug', file=sys.stderr, flush=True)
    sys.stderr.write('y')
    sys.stderr.flush()
    return _inner(*args)
""",
        "sleep": """
import time
{WRAPPED}
    time.sleep(0.01)
    return _inner(*args)
""",
        "sleep_from": """
from time import sleep
{WRAPPED}
    sleep(0.001)
    return _inner(*args)
""",
        "logging": """
import logging
logging.basicConfig(level=logging.DEBUG)
logger = logging.getLogger(__name__)
{WRAPPED}
    logger.info('called %s', len(args))
    return _inner(*args)
""",
        "logging_warn": """
import logging
{WRAPPED}
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
{WRAPPED}
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
{WRAPPED}
    start = time.perf_counter()
    result = _inner(*args)
    print(f'{time.perf_counter() - start:.3f} s')
    return result
""",
        "datetime_now": """
from datetime import datetime
{WRAPPED}
    print(datetime.now())
    return _inner(*args)
""",
        "timeit": """
import timeit
{WRAPPED}
    t = timeit.default_timer()
    r = _inner(*args)
    assert timeit.default_timer() >= t
    return r
""",
        "random": """
import random
random.seed(3)
{WRAPPED}
    random.random()
    return _inner(*args)
""",
        "uuid_secrets_hash": """
import uuid, secrets, hashlib
{WRAPPED}
    hashlib.md5(b'x').hexdigest()
    return _inner(*args)
""",
        "memo": """
_memo = {}
{WRAPPED}
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
{WRAPPED}
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
{WRAPPED}
    warnings.warn('deprecated')
    return _inner(*args)
""",
        "redirect": """
import io, contextlib
{WRAPPED}
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
{WRAPPED}
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
{WRAPPED}
    result = _inner(*args)
    pprint.pprint(result)
    return result
""",
        "assert_args": """
{WRAPPED}
    assert args is not None, 'never'
    return _inner(*args)
""",
        "deepcopy": """
import copy
{WRAPPED}
    return _inner(*copy.deepcopy(args))
""",
        "numpy_scalar": """
import numpy as np
{WRAPPED}
    r = _inner(*args)
    if type(r) is int and abs(r) < 2 ** 62: return np.int64(r)
    if type(r) is float: return np.float64(r)
    if type(r) is bool: return np.bool_(r)
    return r
""",
        "numpy_tolist": """
import numpy as np
{WRAPPED}
    r = _inner(*args)
    if type(r) is list and r and all(type(x) is int and abs(x) < 2 ** 62 for x in r): return np.array(r).tolist()
    return r
""",
        "namedtuple": """
from collections import namedtuple
{WRAPPED}
    r = _inner(*args)
    if type(r) is tuple and 0 < len(r) < 20: return namedtuple('R', ['x%d' % i for i in range(len(r))])(*r)
    return r
""",
        "ordered_dict": """
from collections import OrderedDict
{WRAPPED}
    r = _inner(*args)
    return OrderedDict(r) if type(r) is dict else r
""",
        "fraction": """
from fractions import Fraction
{WRAPPED}
    r = _inner(*args)
    return Fraction(r) if type(r) is int else r
""",
        "decimal": """
from decimal import Decimal
{WRAPPED}
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
{WRAPPED}
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
{WRAPPED}
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
{WRAPPED}
    q = queue.Queue()
    q.put(_inner(*args))
    return q.get()
""",
    }
)
