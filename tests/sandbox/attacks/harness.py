"""Runs the attack corpus and looks, after every program, whether anything has got out.

    python tests/sandbox/attacks/harness.py [--user root|nocaps|nobody] [--no-landlock] [--modes gate,raw]
                                    [--kinds files,...] [--only NAME,...] [--wall SECONDS] [--json FILE] [--verbose]

`gate`: as the loop uses the sandbox. `raw`: the gate is off, programs have the real builtins, os, ctypes and
sockets; the kernel alone holds. Invariants after each program: the canary file is unchanged, alone in its directory
and its text in no outcome; the same for a secret of the environment; nobody has connected; no process but the lanes'
own is left; every lane that has run something (after the last attack: every lane) answers an honest program. With
`gate`, a neighbour is run behind each attack, in the same process if the attack is let into company (see
sandbox/contained.py), and must be right. A program that got something says "ESCAPED". Exit code 1 when anything failed.
"""

import argparse
import ctypes
import json
import os
import select
import socket
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from sandbox import PROPOSAL, Job, Profile, Sandbox, confine, pool

KINDS = ("time", "memory", "processes", "files", "forging", "sharing", "nondeterminism")
STATUSES = {"ok", "timeout", "memory", "error", "forbidden", "killed", "not_literal", "too_large", "syntax", "infra"}
CPU_SECONDS = 0.05
GATE = replace(PROPOSAL, cpu_seconds=CPU_SECONDS)
RAW_MODULES = PROPOSAL.modules + (
    "_thread",
    "atexit",
    "builtins",
    "codecs",
    "ctypes",
    "gc",
    "io",
    "linecache",
    "mmap",
    "multiprocessing",
    "multiprocessing.process",
    "os",
    "pathlib",
    "queue",
    "random",
    "resource",
    "select",
    "signal",
    "socket",
    "struct",
    "subprocess",
    "sys",
    "threading",
    "time",
    "zlib",
)
RAW = Profile("raw", RAW_MODULES, gate=False, cpu_seconds=CPU_SECONDS)
HONEST = Job(
    "from collections import Counter\nimport math\n"
    "def f(x):\n    return [math.sqrt(x), Counter('aab').most_common(1), len('abc')]",
    ("4",),
    2.0,
)
HONEST_OUTPUT = "[2.0, [('a', 2)], 3]"
NEIGHBOUR = Job(
    "import math, heapq\nfrom collections import Counter\nfrom typing import List\n"
    "def f(x: List[int], seen=[]):\n    def down(n):\n        return 0 if n == 0 else 1 + down(n - 1)\n"
    "    seen.append(x)\n    big = [0] * 250_000\n    print(len(big))\n"
    "    return [math.sqrt(x), Counter('aab').most_common(1), len('abc'), down(900), len(big), seen,\n"
    "            heapq.nlargest(1, [1, 2]), sorted({'b', 'a'}), f'{x / 3:.3f}', str([x]), sum(range(x))]",
    ("4", "9"),
)
NEIGHBOUR_OUTPUTS = [
    f"[{root}, [('a', 2)], 3, 900, 250000, {seen}, [2], ['a', 'b'], '{third}', '[{x}]', {total}]"
    for x, root, seen, third, total in ((4, "2.0", "[4]", "1.333", 6), (9, "3.0", "[4, 9]", "3.000", 36))
]
SECRET = "the-secret-of-the-trainer"
GOLD = "the-expected-output-9137"  # stands for what a trainer knows and no lane may


LONG = {  # what @LONG name@ stands for in a program
    "parser_parentheses": "(" * 3000 + "1" + ")" * 3000,
    "parser_minus_signs": "-" * 4000 + "1",
    "parser_long_sum": "1" + "+1" * 2000,
    "parser_nested_lambda": "lambda: " * 800 + "1",
    "parser_nested_lists": "[" * 150 + "]" * 150,
    "parser_nested_comprehensions": "[0 for _ in " * 60 + "x" + "]" * 60,
    "form_feeds": "\f" * 4000 + "1",
}


def read_corpus(kinds=KINDS) -> list[tuple[str, str, str]]:
    """[(kind, name, program)]."""
    attacks = []
    for kind in kinds:
        for part in (Path(__file__).parent / f"{kind}.txt").read_text().split("# --- ")[1:]:
            name, _, code = part.partition("\n")
            attacks.append((kind, name.strip(), code.replace(f"@LONG {name.strip()}@", LONG.get(name.strip(), ""))))
    return attacks


class World:
    """What must not change: a canary file, a secret in the environment, a listening socket, the processes."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.canary = self.directory / "canary"
        self.canary.write_text(SECRET)
        os.environ["WANDB_API_KEY"] = SECRET
        self.tcp, self.udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.tcp.bind(("127.0.0.1", 0))
        self.tcp.listen()
        self.port = self.tcp.getsockname()[1]
        self.udp.bind(("127.0.0.1", self.port))
        self.before, self.children = self.look(), set(own_children())
        self.jobs = {}  # of each lane when it last answered

    def fill(self, code):
        """A program with the places of this world where it has marks for them."""
        for mark, value in (("@CANARY@", self.canary), ("@PORT@", self.port), ("@PID@", os.getpid())):
            code = code.replace(mark, str(value))
        return code

    def look(self):
        """All of the canary and its directory that may not change."""
        status = self.canary.stat()
        names = sorted(os.listdir(self.directory))
        return names, self.canary.read_text(), status.st_mtime_ns, status.st_mode, status.st_uid

    def violations(self, sandbox, everywhere) -> list[str]:
        """What has changed. Lanes that have run nothing since they last answered are asked only with `everywhere`."""
        found = []
        if self.look() != self.before:
            found.append("the canary or its directory has changed")
        if select.select([self.tcp, self.udp], [], [], 0)[0]:
            found.append("somebody connected")
        found += strays(sandbox, self.children)
        for lane in list(sandbox._lanes):
            if lane.state is None or not everywhere and self.jobs.get(lane) == lane.jobs:
                continue
            outcome = on_lane(sandbox, lane, HONEST)
            self.jobs[lane] = lane.jobs
            if outcome.output != HONEST_OUTPUT:
                found.append(f"the lane with hash seed {lane.seed} answers {outcome}")
        return found

    def close(self):
        """Closes the sockets."""
        self.tcp.close()
        self.udp.close()


def on_lane(sandbox, lane, job):
    """Runs one job on one lane, the others hidden for that moment."""
    others = [other for other in sandbox._lanes if other is not lane]
    for other in others:
        sandbox._lanes.remove(other)
    try:
        pieces, results = sandbox._prepare([job], lane.seed)
        sandbox._execute(pieces)
        return results[0][0]
    finally:
        sandbox._lanes[:] = sandbox._lanes + others


def processes():
    """(pid, state, parent, session) of all processes."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            yield int(entry), fields[0], int(fields[1]), int(fields[3])


def own_children():
    """Process ids of our living children."""
    return [pid for pid, state, parent, _ in processes() if parent == os.getpid() and state not in "ZX"]


def strays(sandbox, known) -> list[str]:
    """Processes in a lane's session other than its server and two children; children of ours that are no
    lanes."""
    servers = {lane.process.pid for lane in sandbox._lanes + sandbox._dying}
    children, found = {}, []
    for pid, state, parent, session in processes():
        if state in "ZX" or pid in servers or pid in known:
            continue
        if session in servers:
            children.setdefault(session, []).append(pid)
            if parent != session:
                found.append(f"process {pid} has left its lane {session}")
        elif parent == os.getpid():
            found.append(f"process {pid} is a child of ours")
    return found + [f"lane {server} has processes {pids}" for server, pids in children.items() if len(pids) > 2]


def judge(kind, mode, outcomes) -> list[str]:
    """What is wrong with the outcomes of one attack."""
    found = []
    for outcome in outcomes:
        said = f"{outcome.output} {outcome.detail}"
        if outcome.status not in STATUSES | {"nondeterministic"}:
            found.append(f"unknown status {outcome.status}")
        if "ESCAPED" in said or SECRET in said:
            found.append(f"it got out: {said:.100}")
        if "\n" in said:
            found.append("a line end in what is logged")
        if kind == "time" and outcome.status == "infra":
            found.append(f"no verdict, and so no punishment: {outcome.detail}")
        if kind == "nondeterminism" and mode == "gate" and outcome.status == "ok":
            found.append(f"passed for deterministic: {outcome.output:.80}")
    return found


def attempt(sandbox, kind, mode, job):
    """(outcomes of the attack, what it did to its neighbours). Nothing is sorted out by a look at the text: the child's
    own check decides who is let into company."""
    if mode != "gate":
        return sandbox.run([job])[0], []
    guess, pool.worth_trying = pool.worth_trying, lambda source: True
    try:
        third = Job("def f(x): return x", ("1",))  # for two workers: so the first two are for one child
        outcomes, behind, _ = sandbox.run([job, NEIGHBOUR, third])
    finally:
        pool.worth_trying = guess
    harmed = [outcome.output for outcome in behind] != NEIGHBOUR_OUTPUTS
    if kind == "nondeterminism":
        outcomes = sandbox.validate([job])[0]
    return outcomes, [f"the neighbour answers {behind}"] if harmed else []


def run(mode, kinds, directory, only="", wall=1.0, workers=2, report=None) -> list[dict]:
    """One record for every attack: {"mode", "kind", "name", "statuses", "violations", "seconds"}."""
    world, records = World(directory), []
    try:
        with Sandbox(workers, replace(GATE if mode == "gate" else RAW, wall_seconds=wall)) as sandbox:
            corpus = [attack for attack in read_corpus(kinds) if not only or attack[1] in only.split(",")]
            for kind, name, code in corpus:
                started = time.monotonic()
                job = Job(world.fill(code), ("1",) if kind in ("time", "memory") else ("1", "2"))
                outcomes, violations = attempt(sandbox, kind, mode, job)
                violations += judge(kind, mode, outcomes) + world.violations(sandbox, name == corpus[-1][1])
                statuses = [f"{outcome.status} {outcome.detail}".strip()[:60] for outcome in outcomes]
                records.append(
                    {
                        "mode": mode,
                        "kind": kind,
                        "name": name,
                        "statuses": statuses,
                        "violations": violations,
                        "seconds": round(time.monotonic() - started, 3),
                    }
                )
                if report:
                    report(records[-1])
            records[-1]["state"] = sandbox.state
    finally:
        world.close()
    return records


# --- lesser privileges --------------------------------------------------------------------------------------


def drop_capabilities():
    """Root without any capability, and without a way to get one back by exec."""
    library = confine.libc()
    for capability in range(64):
        library.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if library.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError("capset refused")


def refuse_calls(numbers, prctl_option=None):
    """A filter for this process and its children: these system calls fail, and prctl with this first argument."""
    library = confine.libc()
    program = [confine._op(confine._LOAD, 0)]
    for number in numbers:
        program += [confine._op(confine._JEQ, number, 0, 1), confine._ret(confine._RET_EPERM)]
    if prctl_option is not None:
        prctl = 157 if os.uname().machine == "x86_64" else 167
        program += [
            confine._op(confine._JEQ, prctl, 0, 3),
            confine._op(confine._LOAD, confine._LOW_WORD),
            confine._op(confine._JEQ, prctl_option, 0, 1),
            confine._ret(confine._RET_EPERM),
        ]
    program.append(confine._ret(confine._RET_ALLOW))
    filter_ = confine.Seccomp(library, 1)
    filter_.load(b"".join(program))
    library.prctl(confine.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    filter_.install()


def main():
    """Runs what the arguments ask for; returns the exit code."""
    parser = argparse.ArgumentParser(description="Runs the attack corpus against the sandbox.")
    parser.add_argument("--user", choices=("root", "nocaps", "nobody"), help="privileges (default: as started)")
    parser.add_argument("--no-landlock", action="store_true", help="as if the kernel had no Landlock")
    parser.add_argument("--modes", default="gate,raw")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--only", default="", metavar="NAME,...", help="these attacks alone")
    parser.add_argument("--wall", type=float, default=1.0, help="seconds by the clock; more on a crowded machine")
    parser.add_argument("--json", help="write all records there")
    parser.add_argument("--verbose", action="store_true", help="one line for every attack")
    arguments = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="attacks-")
    os.chmod(directory, 0o777)
    if arguments.no_landlock:
        refuse_calls((444, 445, 446))
    if arguments.user == "nocaps":
        drop_capabilities()
    elif arguments.user == "nobody":
        confine.drop_user(65_534)
    show = (lambda record: print(*record.values(), flush=True)) if arguments.verbose else None
    kinds, records = arguments.kinds.split(","), []
    for mode in arguments.modes.split(","):
        records += run(mode, kinds, directory, arguments.only, arguments.wall, report=show)
    bad = [record for record in records if record["violations"]]
    for record in bad:
        print(f"FAILED {record['mode']} {record['kind']} {record['name']}: {record['violations']}")
    print(f"{len(records) - len(bad)} of {len(records)} attack runs stopped; {records[-1]['state']}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(records, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
