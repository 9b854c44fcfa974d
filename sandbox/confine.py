"""What the Linux kernel does for the sandbox: a seccomp filter, Landlock, an unused uid, resource limits. ctypes only.

The filter is an allow-list: memory, one write descriptor, exit. Harmless calls that a Python program may try (open,
stat, clocks) fail with EPERM; whatever is not named (fork, execve, socket, kill, ptrace, another architecture's
numbers) kills the process. A program cannot take any of it off again. Left out: namespaces and cgroups, which
containers do not grant; RLIMIT_NPROC, which root ignores and which counts strangers' zombies; PR_SET_TSC, which
kills honest programs: CPython reads the clock when it takes a lock, and math.ceil takes one.

    missing = limit_resources(256); Seccomp(libc(), result_fd=1).install()          # for ever, in this process

Imports nothing of the project and can be copied out alone. See seccomp(2), landlock(7), prctl(2).
"""

import ctypes
import os
import platform
import resource
import struct
import sys

# name: (x86-64, aarch64); None where the architecture lacks the call. Memory and the end: what the interpreter needs to
# compute. Not rt_sigreturn and restart_syscall: no signal has a handler in a child, and a forged signal frame would
# block the signals of the timers.
_ALLOW = {
    "brk": (12, 214),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
# Answered with "not permitted": honest programs try these (an import looks for files, a library asks for the time) and
# go on without; a killed child would cost them their verdict. sched_yield: time given away is not CPU time.
_FAIL = {
    "read": (0, 63),
    "open": (2, None),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "lseek": (8, 62),
    "rt_sigprocmask": (14, 135),
    "ioctl": (16, 29),
    "pread64": (17, 67),
    "readv": (19, 65),
    "access": (21, None),
    "sched_yield": (24, 124),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "uname": (63, 160),
    "fcntl": (72, 25),
    "getcwd": (79, 17),
    "readlink": (89, None),
    "gettimeofday": (96, 169),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "time": (201, None),
    "sched_getaffinity": (204, 123),
    "getdents64": (217, 61),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "openat": (257, 56),
    "newfstatat": (262, 79),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "prlimit64": (302, 261),
    "getrandom": (318, 278),
    "statx": (332, 291),
    "openat2": (437, 437),
    "faccessat2": (439, 439),
}
# Allowed by their arguments: memory that is not executable, writes to the result pipe alone, the clock of CPU time
# alone, locks without waiting for them.
_CHECK = {
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "write": (1, 64),
    "clock_gettime": (228, 113),
    "futex": (202, 98),
}
# Column above, and AUDIT_ARCH of linux/audit.h: a 32-bit call has other numbers, so another architecture is killed.
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7), "arm64": (1, 0xC00000B7)}

# From linux/seccomp.h (kill the process; errno 1, 11, 110; allow) and linux/bpf_common.h (load; and; jump if equal, if
# not below, if any bit is set; return).
_RET_KILL, _RET_EPERM, _RET_ALLOW = 0x80000000, 0x00050001, 0x7FFF0000
_RET_EAGAIN, _RET_ETIMEDOUT = 0x0005000B, 0x0005006E
_LOAD, _AND, _JEQ, _JGE, _JSET, _RET = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_FUTEX_WAKE, _FUTEX_COMMAND = 1, 0x7F  # of futex.h: the operation, and the bits of it that are no flags
_PROT_EXEC, _CPU_CLOCK = 4, 2  # PROT_EXEC of mman.h, CLOCK_PROCESS_CPUTIME_ID of time.h
_LOW_WORD = 16 if sys.byteorder == "little" else 20  # of argument 0 in struct seccomp_data

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446
# Above the users of ordinary machines, below the 65,536 that user namespaces of containers map.
_FIRST_UID, _UIDS = 50_000, 10_000


class ConfineError(OSError):
    """The kernel refused something that must not be missing."""


def libc():
    """The C library with prctl and syscall typed, or None where there is no Linux."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    library.syscall.restype = ctypes.c_long
    return library


def plain_fork():
    """The C library's fork without what Python does around it for threads and random numbers, which a process of one
    thread does not need and which costs a child a quarter of its start. None where there is no Linux."""
    return ctypes.PyDLL(None).fork if sys.platform.startswith("linux") else None


# --- seccomp ----------------------------------------------------------------------------------------------------------


def build_filter(machine: str, result_fd: int) -> bytes:
    """BPF program (8 bytes an instruction) for one architecture (platform.machine()); writes go to `result_fd` alone.

    Raises ConfineError for an architecture without a table.
    """
    if machine not in _ARCHITECTURES:
        raise ConfineError(f"no system call table for {machine}")
    column, architecture = _ARCHITECTURES[machine]
    actions = {}
    for table, action in ((_ALLOW, [_ret(_RET_ALLOW)]), (_FAIL, [_ret(_RET_EPERM)])):
        actions |= {numbers[column]: action for numbers in table.values() if numbers[column] is not None}
    checks = {
        "mmap": _unless_bit(2, _PROT_EXEC),
        "mprotect": _unless_bit(2, _PROT_EXEC),
        "write": _only_if(0, result_fd),
        "clock_gettime": _only_if(0, _CPU_CLOCK),
        "futex": _never_waiting(),
    }
    actions |= {_CHECK[name][column]: code for name, code in checks.items()}
    # A binary search over regions of numbers, not a list of comparisons: the kernel runs the program once for every
    # system call number when it is installed, which each child pays for (53 us against 135 us).
    regions = [(0, [_ret(_RET_KILL)])]
    for number in sorted(actions):  # (first number, code): each region reaches to the next one
        if regions[-1][0] == number:
            regions.pop()
        regions += [(number, actions[number]), (number + 1, [_ret(_RET_KILL)])]
    merged = [regions[0]]  # neighbours with the same answer are one region
    for first, code in regions[1:]:
        if code != merged[-1][1]:
            merged.append((first, code))
    head = [_op(_LOAD, 4), _op(_JEQ, architecture, 1, 0), _ret(_RET_KILL), _op(_LOAD, 0)]
    return b"".join(head + _search(merged))


def _op(code, value, if_true=0, if_false=0):
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _ret(action):
    return _op(_RET, action)


def _only_if(argument, value):
    # The lower half is compared alone. Descriptors and clocks are 32-bit numbers for the kernel too.
    return [_op(_LOAD, _LOW_WORD + 8 * argument), _op(_JEQ, value, 0, 1), _ret(_RET_ALLOW), _ret(_RET_EPERM)]


def _unless_bit(argument, bit):
    return [_op(_LOAD, _LOW_WORD + 8 * argument), _op(_JSET, bit, 1, 0), _ret(_RET_ALLOW), _ret(_RET_EPERM)]


def _never_waiting():
    # Nobody else is there to end a wait. One with a time limit can only end by it, so it does at once (ETIMEDOUT). One
    # without would last for ever: told that the lock has changed (EAGAIN), the C library looks again and again, and so
    # the program uses up its CPU time like any other that does not end.
    return [
        _op(_LOAD, _LOW_WORD + 8),
        _op(_AND, _FUTEX_COMMAND),
        _op(_JEQ, _FUTEX_WAKE, 5, 0),
        _op(_LOAD, _LOW_WORD + 24),  # the address of the time limit, in two halves
        _op(_JEQ, 0, 0, 4),
        _op(_LOAD, 36 - _LOW_WORD + 24),
        _op(_JEQ, 0, 0, 2),
        _ret(_RET_EAGAIN),
        _ret(_RET_ALLOW),
        _ret(_RET_ETIMEDOUT),
    ]


def _search(regions):
    if len(regions) == 1:
        return regions[0][1]
    middle = len(regions) // 2
    left, right = _search(regions[:middle]), _search(regions[middle:])
    return [_op(_JGE, regions[middle][0], len(left), 0)] + left + right


class Seccomp:
    """A filter ready to be installed: `install()` is one prctl, in the child, and cannot be undone.

    Made before the forks, since a child would pay for it each time. `library`: what `libc()` gave.
    """

    def __init__(self, library, result_fd: int):
        self._library = library
        self.load(build_filter(platform.machine(), result_fd))

    def load(self, program: bytes):
        """Another BPF program (tests install some that allow more)."""
        # Attributes, not locals: the kernel reads this memory at `install`, so Python must not free it before.
        self._program = ctypes.create_string_buffer(program, len(program))
        head = struct.pack("@HP", len(program) // 8, ctypes.addressof(self._program))
        self._head = ctypes.create_string_buffer(head, len(head))
        self._address = ctypes.addressof(self._head)

    def install(self):
        """For this process and for ever. Raises ConfineError; PR_SET_NO_NEW_PRIVS must have been set."""
        if self._library.prctl(PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._address, 0, 0) != 0:
            raise ConfineError(ctypes.get_errno(), "seccomp filter refused: " + os.strerror(ctypes.get_errno()))

    def works(self) -> bool:
        """Whether a child that installs it is really confined (a forbidden call fails, an unlisted one kills)."""
        return self._probe(lambda: os.getpid() <= 0) == 0 and self._probe(os.fork) == -31  # -SIGSYS

    def _probe(self, action):
        pid = os.fork()
        if pid == 0:
            # _exit in any case: a child that got away would run the lane's code a second time.
            code = 2
            try:
                self.install()
                code = 0 if action() is True else 1
            finally:
                os._exit(code)
        status = os.waitpid(pid, 0)[1]
        return os.waitstatus_to_exitcode(status)


# --- the rest ---------------------------------------------------------------------------------------------------------


def landlock(library) -> int:
    """Takes files, TCP and signals to outsiders from this process and its children. Returns the kernel's ABI number.
    Raises ConfineError where the kernel has no Landlock or refuses."""
    abi = library.syscall(ctypes.c_long(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if abi < 1:
        raise ConfineError(ctypes.get_errno(), "no Landlock: " + os.strerror(ctypes.get_errno()))
    # A newer kernel knows more rights, an older one refuses those that it does not know: as many as its ABI has.
    files = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    # struct landlock_ruleset_attr: files, TCP (bind, connect; ABI 4), scopes (abstract sockets, signals; ABI 6).
    attributes = struct.pack("=QQQ", files, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    size = ctypes.c_size_t(len(attributes))
    ruleset = library.syscall(ctypes.c_long(_LANDLOCK_CREATE), attributes, size, ctypes.c_uint(0))
    # A ruleset without a single rule: everything that it handles is denied.
    if ruleset < 0:
        raise ConfineError(ctypes.get_errno(), "Landlock ruleset refused: " + os.strerror(ctypes.get_errno()))
    result = library.syscall(ctypes.c_long(_LANDLOCK_RESTRICT), ctypes.c_int(ruleset), ctypes.c_uint(0))
    os.close(ruleset)
    if result != 0:
        raise ConfineError(ctypes.get_errno(), "Landlock refused: " + os.strerror(ctypes.get_errno()))
    return abi


def unused_uid(number: int, taken: list[int]) -> int:
    """A uid that is not `taken`, from a range below 65536 so that it exists in small user namespaces too."""
    candidates = (_FIRST_UID + (number + step) % _UIDS for step in range(_UIDS))
    return next(uid for uid in candidates if uid not in taken)


def drop_user(uid: int):
    """Becomes `uid` for good, without groups. Raises PermissionError without the capability."""
    # The uid last: with it goes the right to change the others.
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def limit_resources(memory_mb: int) -> list[str]:
    """Resource limits of the lane and its children; returns the names of those that could not be set.

    CPU time is not among them: RLIMIT_CPU counts whole seconds, the child's timers milliseconds.
    """
    limits = {
        "CORE": 0,
        "FSIZE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
        "STACK": 16 << 20,
        "NOFILE": 32,
        "AS": memory_mb << 20,
    }
    missing = []
    for name, value in limits.items():
        number = getattr(resource, "RLIMIT_" + name, None)
        try:
            # Never above the hard limit that a container has set: raising it needs a capability.
            hard = resource.getrlimit(number)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(number, (value, value))
        except (TypeError, ValueError, OSError):
            missing.append(name)
    return missing
