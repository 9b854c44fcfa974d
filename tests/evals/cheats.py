"""Answers to a code benchmark that must not pass, as texts in the form of answers.py. Data only."""

from tests.evals.answers import opened

CHEATS = opened(
    {
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
)
