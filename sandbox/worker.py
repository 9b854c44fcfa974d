"""The process of a lane: a fork-server that gives every program a fresh, confined child. Started by lane.py.

Descriptors: 0 and `second` bring requests, in turn; RESULT_FD takes results (children write there; 1 and 2 are closed,
so that nothing a program prints is taken for one); `control` is the server's alone: one greeting, then after each child
its wait status, CPU time and peak memory. Children are forked before their requests come and wait. In a child, in this
order: die with the server, close everything but its request pipe and RESULT_FD, read the request, close that pipe,
start the kernel timers, seccomp; only then is the program looked at.
A child can say nothing but "input k gave this text", and what it says is checked outside. Not imported by the pool:
`main()` ends its process. Imports the sandbox's own files and the standard library alone.
"""

import codecs
import gc
import io
import json
import marshal
import os
import select
import signal
import sys
import time
import types
import typing
import warnings
from functools import partial

from . import addresses, confine, contained, gate, literal, wire

RESULT_FD = 31  # the only descriptor that the filter lets a child write to: the last below RLIMIT_NOFILE
# Looked up before the forks: Python loads a codec's module at its first use, and in a child there are no files.
_CODECS = """ascii latin_1 utf_8 utf_8_sig utf_16 utf_16_le utf_16_be utf_32 utf_32_le utf_32_be utf_7 idna punycode
    unicode_escape raw_unicode_escape charmap cp437 cp850 cp1250 cp1251 cp1252 cp1254 cp1257 iso8859_2 iso8859_5
    iso8859_15 koi8_r mac_roman rot_13 euc_jp shift_jis""".split()

# Modules that this file needs and a program must not come across: clocks, system calls, memory. (os.wait4 imports
# `resource` by itself.)
_HIDDEN = """_ctypes _thread ctypes fcntl gc marshal os posix posixpath select signal threading time
    sandbox.worker sandbox.confine sandbox.addresses""".split()

_SMALL = "def f(x):\n    return x\n"
# A bit of everything that programs do (see `rehearse`).
_SAMPLE = """
class A:
    def __init__(self, x):
        self.x = x
def f(x, y):
    found = {}
    for i, c in enumerate(str(A(x).x) + y):
        if i % 2 and c != "z" or not i:
            found[c] = found.get(c, 0) + 1
    while x > 0:
        x -= 1
    return [sorted(found.items(), key=lambda pair: pair[1]), {x for x in range(3)}, f"{x:>3}", -1.5, None]
"""


def main():
    """Set-up, greeting, then children until the pool closes the request pipe or its process ends."""
    config = json.loads(sys.argv[1])
    for name in ("control", "second"):
        if config[name] == RESULT_FD:
            config[name] = os.dup(RESULT_FD)
    control = config["control"]
    os.set_inheritable(control, False)
    os.dup2(1, RESULT_FD, inheritable=False)
    os.dup2(2, 1)  # the lane was started with a standard error that leads nowhere
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler: the filter lets none return
    try:
        server = Server(config)
        greeting = server.confine()
    except Exception as error:  # whatever it was, the pool must hear it
        os.write(control, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        os._exit(1)
    os.write(control, json.dumps(greeting).encode() + b"\n")
    # The objects of now move to a generation that is never looked at: a collection in a child would touch, and so copy,
    # every page that it shares with the server.
    gc.collect()
    server.padding = _padding(config["seed"])
    config.clear()  # a format string finds its way to it, and to the pool's process id, which is the same in all lanes
    gc.freeze()
    server.serve()


class Server:
    """Everything a child needs, made once before the forks.

    Raises OSError if the pool's process is gone, and what imports and kernel calls raise; `main` tells the pool.
    """

    def __init__(self, config):
        self.config, self.control, self.pid = config, config["control"], os.getpid()
        self.requests = (0, config["second"])
        self.pool = os.pidfd_open(config["pool"]) if hasattr(os, "pidfd_open") else None
        # After the descriptor is open: if the pool dies from here on, `wait` sees it.
        if os.getppid() != config["pool"]:
            raise OSError("the pool's process is gone")
        self.limits = literal.Limits(**config["limits"])
        self.gated, self.wide = config["gate"], config["wide"]
        self.modules = {name: _load(name) for name in config["modules"]}
        self.missing = [name for name, place in config["packages"].items() if not _load_from(place, name)]
        self.names = frozenset(self.modules)
        self.clock = _Clock() if self.wide else None
        self.watch, self.together = addresses.Watch(), False
        if self.gated:
            self.proxies = _proxies(self.modules)
            self.builtins = gate.safe_builtins(self.importer, gate.guarded_getattr(self.watch.note))
            gate.close_doors(self.modules, self.proxies)
            self.proxies["copy"].deepcopy = self.deepcopy
        for codec in _CODECS:
            codecs.lookup(codec)  # later there is no way to load one
        if "random" in sys.modules:  # the benchmark profile: the same numbers in every child of the lane
            sys.modules["random"].seed(config["seed"])
        self.program = types.ModuleType("program")
        sys.modules["program"] = self.program
        self.library = confine.libc()
        self.fork = confine.plain_fork() or os.fork
        self.seccomp = None

    def confine(self):
        """Takes from this process all that it can; returns what was taken, for Sandbox.state."""
        # In this order: what needs files or capabilities before they are taken away. The filter is tried once more near
        # the end, when everything else is as it will be for the children.
        state = {"python": sys.version.split()[0], "missing": self.missing}
        missing = confine.limit_resources(self.config["memory_mb"])
        state["limits"] = "set" if not missing else "missing " + " ".join(missing)
        self.note(state, "seccomp", self.make_seccomp)
        if self.seccomp is None and not self.config["allow_weak"]:
            return state
        self.note(state, "first_to_be_killed", _out_of_memory_first)
        _forget_surroundings(self.wide)
        self.note(state, "uid", self.drop_user)
        if self.library is not None:
            self.library.prctl(confine.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            self.library.prctl(confine.PR_SET_DUMPABLE, 0, 0, 0, 0)  # /proc/PID/mem of a sibling is then out of reach
        self.note(state, "landlock", lambda: confine.landlock(self.library) if self.library else None)
        if self.seccomp is not None and not self.seccomp.works():
            self.seccomp = None
            state["seccomp"] = "installed but not effective"
        self.hidden = [sys.modules.pop(name) for name in _HIDDEN if self.gated and name in sys.modules]
        if self.gated:
            self.watch.begin()
        self.rehearse()
        _forget_types()
        sys.setrecursionlimit(self.config["recursion"] + 20)  # the frames below the program
        return state

    @staticmethod
    def note(state, name, action):
        """The result of action() under that name, or "no: " and why it could not be done."""
        try:
            state[name] = action()
        except (OSError, StopIteration) as error:
            state[name] = f"no: {error}"

    def make_seccomp(self):
        """Prepares the filter and tries it. Raises ConfineError where it cannot work."""
        if self.library is None:
            raise confine.ConfineError(f"{sys.platform} has no seccomp")
        self.library.prctl(confine.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        self.seccomp = confine.Seccomp(self.library, RESULT_FD)
        if not self.seccomp.works():
            self.seccomp = None
            raise confine.ConfineError("the filter could not be installed")
        return True

    def rehearse(self):
        """Answers a program of ours a few times, into the void: what the interpreter learns and caches on the way is
        then shared by the children instead of being learnt, and paid for in copied pages, by each."""
        results, void = os.dup(RESULT_FD), os.pipe()
        os.dup2(void[1], RESULT_FD)
        for _ in range(20):
            self.answer(_SAMPLE, "f", (marshal.dumps(((3, "a"), {}), 2),), False)
            os.read(void[0], 65_536)
        os.dup2(results, RESULT_FD)
        for descriptor in (results, *void):
            os.close(descriptor)
        self.program = sys.modules["program"] = types.ModuleType("program")

    def drop_user(self):
        """Becomes a user that nobody else is, if this is root; returns the uid or what it stays."""
        if os.geteuid() != 0:
            return f"kept {os.geteuid()}"
        uid = confine.unused_uid(self.pid, self.config["taken_uids"])
        confine.drop_user(uid)
        return uid

    # --- the server ---

    def serve(self):
        """Two children at any time: one has a job or is about to get it, the next waits at the other request pipe. So
        forking goes on beside the running program."""
        # A poll that also sees the pool's pipes close and its process end: no lane outlives its trainer.
        poller = select.poll()
        for descriptor in self.requests:
            poller.register(descriptor, 0)  # nothing but the hang-up
        if self.pool is not None:
            poller.register(self.pool, select.POLLIN)
        children, turn = [self.spawn(0), self.spawn(1)], 0
        while self.wait(poller, children[turn]):
            children[turn] = self.spawn(turn)
            turn = 1 - turn
        for pid in children:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass  # reaped already
        os._exit(0)

    def spawn(self, turn):
        """Forks a child that waits for its request at one of the two pipes; returns its pid."""
        pid = self.fork()
        if pid == 0:
            self.child(self.requests[turn])
        if pid < 0:
            os._exit(1)
        return pid

    def wait(self, poller, pid):
        """Reaps the child and reports. False when the pool is gone."""
        if self.pool is not None:
            child = os.pidfd_open(pid)
            poller.register(child, select.POLLIN)
            ready = [descriptor for descriptor, _ in poller.poll()]
            poller.unregister(child)
            os.close(child)
            if ready != [child]:  # a request pipe was closed, or the pool's process has ended
                return False
        # The kernel's word on how it ended and what it used, not the child's.
        _, status, usage = os.wait4(pid, 0)
        cpu = int((usage.ru_utime + usage.ru_stime) * 1e6)
        try:
            os.write(self.control, wire.REPORT.pack(status, cpu, usage.ru_maxrss))
        except OSError:
            return False
        return True

    # --- the child ---

    def child(self, source):
        """One child's life; never returns. source: the descriptor of its request pipe."""
        try:
            if self.library is not None:
                self.library.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self.pid:  # it died before the line above
                os._exit(1)
            gate.judge(_SMALL, self.names)  # while it waits: the page faults of the first use
            wire.frame(b"O", literal.canon([1], self.limits), time.process_time())
            os.dup2(source, 0)
            os.closerange(1, RESULT_FD)  # the control pipe among them; RLIMIT_NOFILE allows no higher ones
            # Read while the child may still read; marshal, since the request comes from the pool, which is trusted.
            programs, cpu, wall = marshal.loads(_read_request())
            os.close(0)
            # The kernel kills at these times, also inside of C code, and neither the timers nor the signals' default
            # action can be changed after the filter is in place.
            signal.setitimer(signal.ITIMER_PROF, cpu)
            signal.setitimer(signal.ITIMER_REAL, wall)
            if self.clock is not None:
                self.clock.limit = cpu
            begin = str(os.getpid())
            if self.seccomp is not None:
                self.seccomp.install()
            say(b"B", begin)
            self.answer(*programs[0]) if len(programs) == 1 else self.answer_together(programs)
            say(b"D")
        finally:
            # Whatever happens: a child must not get back into the server's loop, and runs no exit handlers.
            os._exit(0)

    def answer(self, code, entry, inputs, stop_at_failure):
        """One program that has the child for itself."""
        try:
            if self.gated:
                program, order = gate.judge(code, self.names)
            else:
                program, order = gate.compile_source(code), True
        except gate.Refused as refused:
            return say(b"R", " ".join(refused.args))
        # The namespace of a real module, so that classes find theirs and dataclasses and enum work.
        space = vars(self.program)
        if self.gated:
            space["__builtins__"] = self.builtins
            if order:
                self.watch.begin_numbers()
        self.watch.seen = ""
        self.run(program, space, order, entry, inputs, stop_at_failure)

    def answer_together(self, programs):
        """Several programs. All are read before any runs, and only those run that can reach nothing of the others."""
        # Read first: compiling one could meet the stack or memory that another has used up. Each text once: answers to
        # one task are often inputs to one program.
        readings = {code: self.read(code) for code in {code: None for code, *_ in programs}}
        self.together = True
        self.watch.begin_numbers()
        for code, entry, inputs, stop_at_failure in programs:
            program, order, frame = readings[code]
            _forget_types()
            if frame:
                say(*frame)
            else:
                # A copy of the builtins, so that not even these are one object for two programs.
                space = {"__name__": "program", "__builtins__": dict(self.builtins)}
                self.run(program, space, order, entry, inputs, stop_at_failure)

    def read(self, code):
        """(code object, whether hash order matters, nothing) of a program that may share the child; else the last is
        the frame to write instead of running it."""
        try:
            program, order = gate.judge(code, self.names)
        except gate.Refused as refused:
            return None, False, (b"R", " ".join(refused.args))
        return program, order, () if contained.contained(program) else (b"A",)

    def run(self, program, space, order, entry, inputs, stop_at_failure):
        """Loads a program into its namespace and calls it with each input."""
        try:
            exec(program, space)
            function = space[entry]
        except BaseException as error:  # SystemExit too: what a program raises is an outcome
            return say(b"A") if self.looked() and self.together else say(b"X", _name_of(error, entry))
        looked = self.looked()
        if looked and self.together:
            return say(b"A")
        say(b"G", looked or ("order" if order else ""))
        for arguments in inputs:
            if not self.call(function, arguments) and stop_at_failure:
                return None

    def call(self, function, arguments):
        """One input; whether it gave a value."""
        try:
            args, kwargs = wire.unpack_args(arguments, self.limits)
            value = function(*args, **kwargs)
        except BaseException as error:
            kind, text = b"E", _name_of(error)
        else:
            kind, text = self.told(value)
        if looked := self.looked():  # first, since the process may end at any moment
            say(b"N", looked)
        say(kind, text)
        return kind == b"O"

    def told(self, value):
        """(kind, text) of the frame of a value."""
        try:
            return b"O", literal.canon(value, self.limits)
        except literal.TooLarge as error:
            return b"L", str(error)
        except literal.NotLiteral as error:
            return b"U", str(error)

    def looked(self):
        """ "text" or "hash" if the program has looked at an address since the last time that this was asked, or ""."""
        seen, self.watch.seen = self.watch.seen, ""
        return seen

    def deepcopy(self, value, *memo, **options):
        """copy.deepcopy; the keys of its second argument are addresses."""
        if memo or options:
            self.watch.note()
        return self.modules["copy"].deepcopy(value, *memo, **options)

    def importer(self, name, scope=None, local=None, names=(), level=0):
        """What `import` does for a program: modules from the list, cut down to their public names."""
        if level or name not in self.proxies:
            raise ImportError(f"import {name}")
        return self.proxies[name if names else name.partition(".")[0]]


def say(kind, text=""):
    """Writes one frame. Returns False, so that a failure can be told and returned in one line."""
    os.write(RESULT_FD, wire.frame(kind, text, time.process_time() + _Clock.slept))
    return False


class _Clock:
    """Sleeping counts as time and takes none: time.sleep sets the clocks of the module time forward, and ends the
    process where a sleep and the CPU time used reach the limit.

    `limit`: seconds of CPU time of the child. Takes the place of functions of the real module, once, before the forks.
    """

    slept = 0.0

    def __init__(self):
        self.limit, self.process_time = 0.0, time.process_time
        time.sleep = self.sleep
        for name in ("time", "monotonic", "perf_counter"):
            setattr(time, name, self.later(getattr(time, name), 1.0))
            setattr(time, name + "_ns", self.later(getattr(time, name + "_ns"), 1_000_000_000))

    def sleep(self, seconds):
        """As time.sleep."""
        if seconds < 0:
            raise ValueError("sleep length must be non-negative")
        _Clock.slept += seconds
        if self.process_time() + _Clock.slept > self.limit:
            os._exit(wire.OVERSLEPT)

    @staticmethod
    def later(clock, scale):
        """The clock, ahead by what was slept."""
        return lambda: clock() + type(scale)(scale * _Clock.slept)


class _Nowhere(io.RawIOBase):
    """Takes whatever is written."""

    def writable(self):
        """It is."""
        return True

    def write(self, data):
        """All of it is taken."""
        return len(data)


def _forget_types():
    """Empties the caches of typing, where 1 and True are one key: List[True] is what List[1] has left behind."""
    for forget in typing._cleanups:
        forget()


def _name_of(error, entry=None):
    # The class alone: a message is the program's own text, and could be anything.
    if entry is not None and type(error) is KeyError and error.args == (entry,):
        return f"NameError no {entry}"
    return literal.type_name(type(error))


def _read_request():
    length = wire.HEAD.unpack(_read_exactly(wire.HEAD.size))[0]
    return _read_exactly(length)


def _read_exactly(length):
    parts = []
    while length:
        part = os.read(0, length)
        if not part:
            os._exit(0)  # the pool has closed the pipe
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


# --- set-up -----------------------------------------------------------------------------------------------------------


def _load(name):
    __import__(name)
    return sys.modules[name]


def _load_from(place, name):
    """Whether the package could be imported; place: the directory it is in, None if there is none."""
    if place is None:
        return False
    sys.path.append(place)
    try:
        __import__(name)
    except Exception:  # a broken installation is as good as none
        return False
    finally:
        sys.path.remove(place)
    return True


def _proxies(modules):
    """Copies of the modules without private names and without the modules that they imported themselves."""
    proxies = {name: types.ModuleType(name, module.__doc__) for name, module in modules.items()}
    for name, module in modules.items():
        public = {
            key: value
            for key, value in vars(module).items()
            if not key.startswith("_") and type(value) is not types.ModuleType
        }
        proxies[name].__dict__.update(public)
        if hasattr(module, "__all__"):
            proxies[name].__all__ = [key for key in module.__all__ if key in public]
    for name, proxy in proxies.items():
        parent, _, leaf = name.rpartition(".")
        if parent in proxies:
            setattr(proxies[parent], leaf, proxy)
    return proxies


def _out_of_memory_first():
    """When the machine runs out of memory, the kernel ends this process before the trainer."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    return True


def _forget_surroundings(streams):
    """No environment, no way to find further modules, no standard streams, or (`streams`) some that lead nowhere."""
    os.environ.clear()
    sys.path.clear()
    sys.meta_path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()
    sys.argv = [""]
    sys.orig_argv.clear()  # the hash seed, paths and users of this machine
    warnings.simplefilter("ignore")
    sys.stdin = sys.stdout = sys.stderr = None
    if streams:
        sys.stdin = io.TextIOWrapper(io.BytesIO(), "utf-8")
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.BufferedWriter(_Nowhere()), "utf-8", "backslashreplace") for _ in range(2)
        )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


# Make objects of 16 and 32 bytes, and from 48 on those that a `bytes` of a length takes.
_SIZES = (object, lambda: float("0.5"), *(partial(bytes, size) for size in range(2, 480, 16)))


def _padding(seed):
    """Small objects of every size with holes between them, which the objects of a child will take: other ones in every
    lane. Address randomisation moves whole pages only, so without them lanes would agree on what depends on addresses
    (an order, or a bit of one)."""
    kept, state = [[object() for _ in range(100 * seed)]], seed  # of the smallest size 256 fill a page
    for make in _SIZES:
        blocks = [make() for _ in range(64)]
        for _ in range(20):
            state = (state * 1_103_515_245 + 12_345) % (1 << 31)  # the generator of the C standard
            blocks[(state >> 16) % 64] = None
        kept.append(blocks)
    return kept
