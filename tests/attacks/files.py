# Programs that reach for files, the network and secrets. Read as text by harness.py.
# --- read_canary
def f(x):
    return open("@CANARY@").read()
# --- write_canary
def f(x):
    open("@CANARY@", "w").write("x")
    return "ESCAPED"
# --- read_by_descriptor
import os
def f(x):
    return os.read(os.open("@CANARY@", os.O_RDONLY), 100)
# --- read_by_path
import pathlib
def f(x):
    return pathlib.Path("@CANARY@").read_text()
# --- read_by_fileio
import io
def f(x):
    return io.FileIO("@CANARY@").read()
# --- read_by_linecache
import linecache
def f(x):
    return linecache.getline("@CANARY@", 1)
# --- read_by_codecs
import codecs
def f(x):
    return codecs.open("@CANARY@").read()
# --- read_by_builtins_of_a_module
import json
def f(x):
    return json.decoder.scanner.re.enum.sys.modules["builtins"].open("@CANARY@").read()
# --- read_by_globals_of_a_function
import json
def f(x):
    return json.dumps.__globals__["__builtins__"]["open"]("@CANARY@").read()
# --- read_by_subclasses
def f(x):
    for c in object.__subclasses__():
        if c.__name__ in ("_wrap_close", "FileLoader"):
            return c.__init__.__globals__["__builtins__"]["open"]("@CANARY@").read()
# --- read_by_assembled_names
import json
def f(x):
    return getattr(json.dumps, "__glo" + "bals__")["__builtins__"]["open"]("@CANARY@").read()
# --- read_by_format
import json
def f(x):
    return "{0.__globals__}".format(json.dumps)[:50] + open("@CANARY@").read()
# --- read_by_attrgetter
import json, operator
def f(x):
    return operator.attrgetter("__globals__")(json.dumps)["__builtins__"]["open"]("@CANARY@").read()
# --- read_by_generator_frame
def f(x):
    g = (g.gi_frame.f_back for _ in [1])
    return next(g).f_builtins["open"]("@CANARY@").read()
# --- read_by_traceback
def f(x):
    try:
        1 / 0
    except ZeroDivisionError as error:
        return error.__traceback__.tb_frame.f_back.f_globals["os"].open("@CANARY@", 0)
# --- read_by_eval
def f(x):
    return eval("open('@CANARY@').read()")
# --- read_by_import_function
def f(x):
    return __import__("os").read(__import__("os").open("@CANARY@", 0), 99)
# --- read_by_dataclass_annotation
from dataclasses import make_dataclass
def f(x):
    return make_dataclass("A", [("y", "open('@CANARY@').read()")])(1).y and open("@CANARY@").read()
# --- read_by_namedtuple
from collections import namedtuple
def f(x):
    return namedtuple("A", "y", module="os")(1).__class__.__new__.__globals__["__builtins__"]
# --- read_by_type_hints
import typing
def f(x):
    def g(y: "open('@CANARY@').read()"): pass
    return typing.get_type_hints(g)["y"]
# --- status_of_canary
import os
def f(x):
    return "ESCAPED" if os.stat("@CANARY@").st_size else 0
# --- delete_canary
import os
def f(x):
    os.unlink("@CANARY@")
    return "ESCAPED"
# --- rename_canary
import os
def f(x):
    os.rename("@CANARY@", "@CANARY@.gone")
    return "ESCAPED"
# --- link_canary
import os
def f(x):
    os.symlink("@CANARY@", "@CANARY@.link")
    return "ESCAPED"
# --- directory
import os
def f(x):
    os.mkdir("@CANARY@.d")
    return "ESCAPED"
# --- mode_of_canary
import os
def f(x):
    os.chmod("@CANARY@", 0o777)
    return "ESCAPED"
# --- truncate_canary
import os
def f(x):
    os.truncate("@CANARY@", 0)
    return "ESCAPED"
# --- list_root
import os
def f(x):
    return "ESCAPED" + str(os.listdir("/"))
# --- environment
import os
def f(x):
    return str(dict(os.environ))
# --- environment_in_memory
import ctypes
def f(x):
    names = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    found, i = [], 0
    while names and names[i]:
        found.append(names[i])
        i += 1
    return found
# --- environment_of_trainer
def f(x):
    return open("/proc/@PID@/environ", "rb").read()
# --- command_line_of_trainer
def f(x):
    return "ESCAPED" + open("/proc/@PID@/cmdline").read()
# --- memory_of_trainer
def f(x):
    return "ESCAPED" if open("/proc/@PID@/mem", "rb") else 0
# --- own_memory
def f(x):
    return "ESCAPED" if open("/proc/self/mem", "r+b") else 0
# --- open_by_system_call
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).syscall(2, b"@CANARY@", 0, 0) >= 0 else 0
# --- openat2_by_system_call
import ctypes
def f(x):
    how = ctypes.create_string_buffer(24)
    return "ESCAPED" if ctypes.CDLL(None).syscall(437, -100, b"@CANARY@", how, 24) >= 0 else 0
# --- open_by_handle
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).syscall(304, 0, ctypes.create_string_buffer(128), 0) >= 0 else 0
# --- inherited_descriptors
import os
def f(x):
    found = []
    for number in range(64):
        try:
            found.append(os.read(number, 100))
        except OSError:
            pass
    return "ESCAPED" if found else 0
# --- write_to_descriptors
import os
def f(x):
    found = []
    for number in [0, *range(2, 64)]:
        try:
            found.append(os.write(number, b"ESCAPED"))
        except OSError:
            pass
    return "ESCAPED" if found else 0
# --- duplicate_descriptor
import os
def f(x):
    return "ESCAPED" if os.dup(1) else 0
# --- pipe
import os
def f(x):
    return "ESCAPED" if os.pipe() else 0
# --- connect
import socket
def f(x):
    socket.create_connection(("127.0.0.1", @PORT@), 1).send(b"x")
    return "ESCAPED"
# --- datagram
import socket
def f(x):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", @PORT@))
    return "ESCAPED"
# --- unix_socket
import socket
def f(x):
    socket.socket(socket.AF_UNIX).connect("\0nobody")
    return "ESCAPED"
# --- name_lookup
import socket
def f(x):
    return "ESCAPED" + str(socket.getaddrinfo("localhost", 80))
# --- socket_pair
import socket
def f(x):
    return "ESCAPED" if socket.socketpair() else 0
# --- shared_memory
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).syscall(29, 0, 4096, 0o1777) >= 0 else 0
# --- watch_files
import ctypes
def f(x):
    return "ESCAPED" if ctypes.CDLL(None).inotify_init() >= 0 else 0
# --- import_from_disk
import antigravity
def f(x):
    return "ESCAPED"
# --- random_from_the_kernel
import os
def f(x):
    return "ESCAPED" if os.urandom(8) else 0
# --- secrets_in_objects
import gc
def f(x):
    want = "".join(["the-secret", "-of-the-trainer"])
    found = [o for o in gc.get_objects() if type(o) in (dict, list, tuple) and want in str(o)[:100_000]]
    return "ESCAPED" if found else 0
