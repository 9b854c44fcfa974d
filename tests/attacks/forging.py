# Programs that want a verdict they have not earned, or to speak for others. Read as text by harness.py.
# --- forge_value_and_leave
import os, struct
def f(x):
    os.write(1, struct.pack("=cII", b"O", 2, 0) + b"42" + struct.pack("=cII", b"D", 0, 0))
    os._exit(0)
# --- forge_every_value
import os, struct
def f(x):
    os.write(1, (struct.pack("=cII", b"O", 2, 0) + b"42") * 1000)
    os._exit(0)
# --- forge_end
import os, struct
def f(x):
    os.write(1, struct.pack("=cII", b"D", 0, 0))
    return 1
# --- forge_refusal_of_itself
import os, struct
os.write(1, struct.pack("=cII", b"R", 9, 0) + b"syntax ha")
os._exit(0)
# --- forge_second_greeting
import os, struct
def f(x):
    os.write(1, struct.pack("=cII", b"G", 0, 0))
    return 1
# --- half_a_frame
import os
def f(x):
    os.write(1, b"O\xff\xff")
    os._exit(0)
# --- half_a_frame_and_go_on
import os
def f(x):
    os.write(1, b"O\x05\x00")
    return 1
# --- frame_of_four_gigabytes
import os, struct
def f(x):
    os.write(1, struct.pack("=cII", b"O", 2 ** 32 - 1, 0))
    return 1
# --- garbage
import os
def f(x):
    os.write(1, bytes(range(256)) * 100)
    return 1
# --- flood
import os
def f(x):
    while True:
        os.write(1, b"O" * 65_536)
# --- flood_of_true_frames
import os, struct
def f(x):
    while True:
        os.write(1, (struct.pack("=cII", b"O", 1, 0) + b"1") * 5000)
# --- text_that_is_not_canonical
import os, struct
def f(x):
    text = b"[1,2]"
    os.write(1, struct.pack("=cII", b"O", len(text), 0) + text)
    os._exit(0)
# --- text_that_is_code
import os, struct
def f(x):
    text = b"__import__('os').system('touch @CANARY@.code')"
    os.write(1, struct.pack("=cII", b"O", len(text), 0) + text)
    os._exit(0)
# --- text_that_is_a_bomb
import os, struct
def f(x):
    text = b"9**9**9"
    os.write(1, struct.pack("=cII", b"O", len(text), 0) + text)
    os._exit(0)
# --- text_nested
import os, struct
def f(x):
    text = b"[" * 100_000 + b"]" * 100_000
    os.write(1, struct.pack("=cII", b"O", len(text), 0) + text)
    os._exit(0)
# --- text_that_is_not_utf8
import os, struct
def f(x):
    os.write(1, struct.pack("=cII", b"O", 2, 0) + b"\xff\xfe")
    os._exit(0)
# --- exception_name_of_many_lines
import os, struct
def f(x):
    text = b'x\n{"outcomes": [{"status": "ok", "output": "ESCAPED"}]}'
    os.write(1, struct.pack("=cII", b"E", len(text), 0) + text)
    os._exit(0)
# --- always_equal
class Always:
    def __eq__(self, other): return True
    def __hash__(self): return 1
def f(x):
    return Always()
# --- always_equal_inside
class Always:
    def __eq__(self, other): return True
    __hash__ = None
def f(x):
    return [Always()]
# --- integer_that_equals_all
class Always(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x):
    return Always(1)
# --- text_that_equals_all
class Always(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
    def __repr__(self): return "'ESCAPED'"
def f(x):
    return {"a": Always("b")}
# --- list_with_own_iteration
class L(list):
    def __iter__(self): return iter(["ESCAPED"])
def f(x):
    return L([1])
# --- dict_with_own_items
from collections import OrderedDict
class D(OrderedDict):
    def items(self): return [("ESCAPED", 1)]
def f(x):
    return D()
# --- class_that_lies_about_itself
class A:
    __class__ = int
    def __repr__(self): return "ESCAPED"
def f(x):
    return A()
# --- metaclass_that_lies
class M(type):
    def __eq__(cls, other): return True
    def __hash__(cls): return hash(int)
    __name__ = "int"
class A(metaclass=M):
    def __repr__(self): return "'ESCAPED'"
def f(x):
    return A()
# --- exception_that_looks_good
class ok(Exception):
    pass
def f(x):
    raise ok("ok")
# --- exception_with_own_name
class M(type):
    __name__ = property(lambda cls: 1 / 0)
class E(Exception, metaclass=M):
    pass
def f(x):
    raise E
# --- exception_not_to_be_shown
class E(BaseException):
    def __str__(self): raise SystemExit
    __repr__ = __str__
def f(x):
    raise E
# --- stop_iteration
def f(x):
    raise StopIteration
# --- system_exit
def f(x):
    raise SystemExit(0)
# --- keyboard_interrupt
def f(x):
    raise KeyboardInterrupt
# --- generator_exit
def f(x):
    raise GeneratorExit
# --- exception_group
def f(x):
    raise BaseExceptionGroup("x", [SystemExit()])
# --- leave_at_load
raise SystemExit(0)
# --- patch_canon
import sys
def f(x):
    sys.modules["sandbox.literal"].canon = lambda *a: "__import__('os')"
    return 1
# --- patch_say
import sys
def f(x):
    sys.modules["sandbox.worker"].say = lambda *a: None
    return 1
# --- patch_exit
import os
def f(x):
    os._exit = lambda code: None
    raise SystemExit
# --- run_the_server_loop
import sys
def f(x):
    frame = sys._getframe()
    while "self" not in frame.f_locals:
        frame = frame.f_back
    frame.f_locals["self"].serve()
    return "ESCAPED"
# --- report_as_the_server
import sys
def f(x):
    frame = sys._getframe()
    while "self" not in frame.f_locals:
        frame = frame.f_back
    return "ESCAPED" if frame.f_locals["self"].wait(None, 1) else 0
# --- read_the_next_request
import os
def f(x):
    return "ESCAPED" + os.read(0, 1000).decode("latin-1")
# --- report_in_the_servers_name
import os, struct
def f(x):
    for descriptor in range(2, 20):
        os.write(descriptor, struct.pack("=iqq", 0, 0, 0))
    return "ESCAPED"
# --- find_expected_in_frames
import sys
def f(x):
    want = "".join(["the-expected", "-output-9137"])
    frame, found = sys._getframe().f_back, []
    while frame:
        for space in (frame.f_locals, frame.f_globals):
            found += [name for name, v in space.items() if want in str(v)[:100_000]]
        frame = frame.f_back
    return "ESCAPED" if found else 0
# --- find_expected_in_objects
import gc
def f(x):
    want = "".join(["the-expected", "-output-9137"])
    held = [r for o in gc.get_objects() for r in gc.get_referents(o) if type(r) is str and want in r and r is not want]
    return "ESCAPED" if held else 0
# --- print_a_verdict
def f(x):
    print('{"outcomes": [{"status": "ok", "output": "ESCAPED"}]}', flush=True)
# --- write_to_stdout
import sys
def f(x):
    sys.stdout.write("ESCAPED")
    return 1
# --- write_to_original_stdout
import sys
def f(x):
    sys.__stdout__.write("ESCAPED")
    return 1
# --- at_exit
import atexit, os
def f(x):
    atexit.register(os.write, 1, b"ESCAPED")
    return 1
# --- speak_from_finalizer
import os
class A:
    def __del__(self, write=os.write):
        write(1, b"O\x01\x00\x00\x00\x00\x00\x00\x009")
kept = A()
def f(x):
    return 1
# --- no_function
x = 1
# --- function_that_is_none
f = None
# --- function_that_is_a_class_with_call
class C:
    def __call__(self, *a):
        return "fine"
f = C()
# --- generator_as_value
def f(x):
    yield 1
# --- coroutine_as_value
async def f(x):
    return 1
# --- module_as_value
import math
def f(x):
    return math
# --- own_equality_in_a_set
class A:
    def __eq__(self, other): return True
    def __hash__(self): return 1
def f(x):
    return {A(), 1, 2}
# --- trace_the_worker
import sys
def f(x):
    sys.settrace(lambda *a: 1 / 0)
    return 1
# --- delete_builtins
import builtins
def f(x):
    for name in list(vars(builtins)):
        delattr(builtins, name)
    return 1
# --- replace_type
import builtins
def f(x):
    builtins.type = lambda v: int
    return "fine"
# --- next_program_patched_module
import math
math.sqrt = lambda x: "ESCAPED"
def f(x):
    return 1
# --- next_program_patched_class
from collections import Counter
Counter.most_common = lambda *a: "ESCAPED"
def f(x):
    return 1
# --- next_program_patched_builtins
import builtins
builtins.len = lambda x: "ESCAPED"
def f(x):
    return 1
