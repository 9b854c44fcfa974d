"""What a program may use and how much of it: the limits of the self-play loop and those of public benchmarks.

    Sandbox(profile=BENCHMARK)
    Sandbox(profile=dataclasses.replace(PROPOSAL, cpu_seconds=5.0))

A Profile goes to the lanes when they start; it is the same for every program of a Sandbox. Imports limits.py alone.
"""

from dataclasses import dataclass, field

from .limits import Limits

# Modules whose functions give the same answer each time and reach nothing outside. Not random, time or datetime
# (another answer each time), not os, sys or threading, not statistics, which imports random.
PROPOSAL_MODULES = tuple(
    """math cmath re itertools collections collections.abc functools heapq bisect string operator copy typing
    dataclasses enum fractions decimal json textwrap abc numbers unicodedata __future__""".split()
)
# What answers to public benchmarks import, most of it at their head and never used (threading, subprocess) or in a main
# guard (doctest, unittest). seccomp confines them all the same: what needs a file, a socket or a process fails.
BENCHMARK_MODULES = PROPOSAL_MODULES + tuple(
    """argparse array ast asyncio atexit base64 binascii builtins calendar cProfile codecs concurrent.futures
    concurrent.futures.thread contextlib contextvars csv datetime difflib doctest fileinput fnmatch gc getpass
    glob graphlib gzip hashlib hmac html inspect io ipaddress keyword linecache locale logging logging.handlers
    multiprocessing multiprocessing.pool os os.path pathlib pickle platform pprint pstats queue random reprlib
    sched secrets select selectors shlex shutil signal socket sqlite3 stat statistics struct subprocess sys
    tempfile threading time timeit token tokenize traceback types unittest unittest.mock urllib.parse uuid
    warnings weakref zipfile zlib zoneinfo""".split()
)
# Used where it is installed, else a line says so; with the parts of it that would be loaded at their first use.
BENCHMARK_PACKAGES = ("numpy", "numpy.fft", "numpy.linalg", "numpy.ma", "numpy.polynomial", "numpy.random")


@dataclass(frozen=True)
class Profile:
    """Limits of one Sandbox. CPU time decides verdicts, since it does not depend on what else the machine does."""

    name: str
    modules: tuple[str, ...]  # what `import` finds
    packages: tuple[str, ...] = ()  # and these, if they are installed
    cpu_seconds: float = 1.0  # CPU time of one input, loading the program included
    validation_seconds: float = 0.35  # CPU time of all inputs of a proposal together, each time that they are run
    wall_seconds: float = 30.0  # of a child at least; beyond it is `infra`, never a verdict
    memory_mb: int = 256  # address space of a child
    source_chars: int = 8_192
    output_bytes: int = 262_144  # all that one child may write
    recursion: int = 1_000
    gate: bool = True  # False: real builtins and modules, the kernel alone confines
    # True: a place for programs as they are published, with clocks, a time.sleep that counts as time, and standard
    # streams that lead nowhere.
    wide: bool = False
    limits: Limits = field(default_factory=Limits)


PROPOSAL = Profile("proposal", PROPOSAL_MODULES)
BENCHMARK = Profile(
    "benchmark",
    BENCHMARK_MODULES,
    cpu_seconds=10.0,
    memory_mb=1_024,
    source_chars=1_000_000,
    output_bytes=8_000_000,
    recursion=3_000,
    # What a program does not run harms nobody: an import in a main guard is no reason to refuse it unread.
    gate=False,
    wide=True,
    packages=BENCHMARK_PACKAGES,
    limits=Limits(1_000_000, 200_000, depth=100, int_bits=100_000, complex_numbers=True, published=True),
)
