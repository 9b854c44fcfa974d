"""What a program may use and how much of it: the limits of the self-play loop and those of public benchmarks.

    Sandbox(profile=BENCHMARK)
    Sandbox(profile=dataclasses.replace(PROPOSAL, cpu_seconds=5.0))

A Profile goes to the lanes when they start; it is the same for every program of a Sandbox. Imports limits.py alone.
"""

from dataclasses import dataclass, field

from sandbox.limits import Limits

# Modules whose functions give the same answer each time and reach nothing outside. Not random, time or datetime
# (another answer each time), not os, sys or threading, not statistics, which imports random.
PROPOSAL_MODULES = tuple(
    """math cmath re itertools collections collections.abc functools heapq bisect string operator copy typing
    dataclasses enum fractions decimal json textwrap abc numbers unicodedata __future__""".split()
)
# What the programs and tests of public benchmarks import; seccomp confines them all the same.
BENCHMARK_MODULES = PROPOSAL_MODULES + tuple(
    """array base64 binascii calendar contextlib datetime difflib hashlib inspect io os queue random statistics struct
    sys time timeit types warnings zlib""".split()
)


@dataclass(frozen=True)
class Profile:
    """Limits of one Sandbox. CPU time decides verdicts, since it does not depend on what else the machine does."""

    name: str
    modules: tuple[str, ...]  # what `import` finds
    cpu_seconds: float = 1.0  # CPU time of one input, loading the program included
    wall_seconds: float = 6.0  # of a child; beyond it is `infra`, never a verdict
    memory_mb: int = 256  # address space of a child
    source_chars: int = 8_192
    output_bytes: int = 262_144  # all that one child may write
    recursion: int = 1_000
    gate: bool = True  # False: real builtins and modules, the kernel alone confines (for tests)
    wide: bool = False  # True: the gate lets imports and builtins of benchmark programs pass
    limits: Limits = field(default_factory=Limits)


PROPOSAL = Profile("proposal", PROPOSAL_MODULES)
BENCHMARK = Profile(
    "benchmark",
    BENCHMARK_MODULES,
    cpu_seconds=10.0,
    wall_seconds=60.0,
    memory_mb=1_024,
    source_chars=1_000_000,
    output_bytes=8_000_000,
    recursion=3_000,
    wide=True,
    limits=Limits(1_000_000, 200_000, depth=100, int_bits=100_000, complex_numbers=True, match_as_true=True),
)
