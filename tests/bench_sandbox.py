"""Speed of the sandbox, beside a plain worker that does what the original executor does.

    python tests/bench_sandbox.py [--json FILE] [--quick]

Medians over interleaved rounds of one run, so that columns may be compared with each other on a busy machine too; the
figures in CPU seconds (this process, the lanes and their children together) hardly depend on what else runs:
  - fresh children a second on one lane, against the bare fork-exit-wait rate of a small Python process;
  - a step's judgements (40 programs: validate, 8 input answers, 8 output answers, 8 candidates x 10 hidden inputs)
    against one reused worker process that takes one call at a time (no isolation, no second hash seed, 10 s for a
    loop); and once more with a process for every program,
    instead of one for up to eight programs that cannot reach each other;
  - the same with 3 of 40 programs whose last candidate loops;
  - the CPU time that a loop costs beyond its limit, with every core busy;
  - a soak: memory and descriptors of the lanes before and after.
`--quick`: a tenth of the work, one loop, smoke only. Exit code 1 when a target is missed (not with --quick).
"""

import argparse
import concurrent.futures
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sandbox import Job, Sandbox, literal

TRIVIAL = "def f(x):\n    y = x * 2\n    if y > 10:\n        y -= 1\n    return y + 1\n"
BARE = """
import os, sys, time
count = int(sys.argv[1])
started = time.perf_counter()
for _ in range(count):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
print(count / (time.perf_counter() - started), sum(os.times()[:4]) / count)
"""
TEMPLATES = """
def f(xs):
    total = 0
    for i, x in enumerate(xs):
        total += x * (i + K)
    return total % 1009
---
def f(xs):
    best = run = 0
    for x in xs:
        run = max(0, run + x - K)
        best = max(best, run)
    return [best, run]
---
def f(xs):
    seen = {}
    for x in xs:
        seen[x % K] = seen.get(x % K, 0) + 1
    return sorted(seen.items())
---
def f(xs):
    out = []
    for x in xs:
        while x > K:
            x //= 2
        out.append(x)
    return out[::-1]
---
from collections import deque

def f(xs):
    q = deque(xs)
    q.rotate(K)
    return [a - b for a, b in zip(q, xs)]
---
def f(xs):
    def down(n):
        return 1 if n < 2 else (down(n - 1) + n * K) % 97
    return [down(abs(x) % 30) for x in xs]
---
import math

def f(xs):
    acc = 1
    for x in xs:
        acc = acc * abs(x) // math.gcd(acc, abs(x) or 1) % 10007 + K
    return acc
---
def f(xs):
    text = '-'.join(chr(97 + (x + K) % 26) for x in xs)
    return text[1:] + text[:1].upper()
---
class Node:
    def __init__(self, v):
        self.v, self.l, self.r = v, None, None

def f(xs):
    root, depth = Node(K), 0
    for x in xs:
        n, d = root, 0
        while True:
            d += 1
            side = 'l' if x < n.v else 'r'
            if getattr(n, side) is None:
                setattr(n, side, Node(x))
                break
            n = getattr(n, side)
        depth = max(depth, d)
    return depth
---
def f(xs):
    ys = sorted(xs, key=lambda x: (x % K, -x))
    return {'first': ys[0], 'last': ys[-1], 'span': ys[-1] - ys[0]}
""".split("---")
SPELLINGS = [
    "return [g(xs), h(xs)]",
    "return list((g(xs), h(xs)))",
    "first = g(xs)\n    return [first, h(xs)]",
    "out = []\n    out.append(g(xs))\n    out.append(h(xs))\n    return out",
    "return [part(xs) for part in (g, h)]",
    "a, b = g(xs), h(xs)\n    return [a, b]",
    "return [g(xs)] + [h(xs)]",
    "return [*map(lambda part: part(xs), (g, h))]",
]


def candidates(program):
    """Eight programs for the same pairs, no two alike."""
    return [program.replace(SPELLINGS[0], spelling) for spelling in SPELLINGS]


def plain_call(lines, seconds):
    """In the worker: exec of all lines but the last, eval of the last, (text, status)."""

    def ring(number, frame):
        raise TimeoutError

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        space = {}
        exec("\n".join(lines[:-1]), space)
        return str(eval(lines[-1], space)), "Done"
    except Exception as error:
        return "", type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def tasks(count):
    """[(program, ten inputs)]: two templates as helpers of f, some 350 characters as published proposals have."""
    found = []
    for number in range(count):
        first, second = (TEMPLATES[(number + step) % len(TEMPLATES)] for step in (0, 3))
        program = first.replace("def f(", "def g(") + second.replace("def f(", "def h(")
        program = program.replace("K", str(number // len(TEMPLATES) + 3)) + "\ndef f(xs):\n    return [g(xs), h(xs)]\n"
        inputs = tuple(str([(7 * i * j + number * j + i) % 91 - 20 for j in range(8)]) for i in range(1, 11))
        found.append((program, inputs))
    return found


class Plain:
    """The plain baseline: a pool of one reused worker; every judgement is one call whose future is awaited."""

    def __init__(self):
        self.pool = concurrent.futures.ProcessPoolExecutor(1)

    def call(self, source, last, seconds=10.0):
        """(text of the last line, status), as `plain_call` in the worker."""
        return self.pool.submit(plain_call, source.splitlines() + [last], seconds).result(seconds + 5)

    def step(self, programs, loops):
        """All judgements of a step; `loops` of the programs have a candidate that never ends."""
        for number, (program, inputs) in enumerate(programs):
            twice = f"{program}\nif f({inputs[0]}) != f({inputs[0]}): raise Exception"
            gold, _ = self.call(twice, f"repr(f({inputs[0]}))")
            for answer in inputs[:8]:
                self.call(program, f"{gold} == f({answer})")
            for _ in range(8):
                self.call("", f"{gold} == {gold}")
            hidden = [self.call(program, f"repr(f({text}))")[0] for text in inputs]
            for place, candidate in enumerate(candidates(program)):
                if number < loops and place == 7:
                    self.call("def f(x):\n while True: pass", "f(1)")
                    continue
                for text, value in zip(inputs, hidden):
                    self.call(candidate, f"{value} == f({text})")

    def close(self):
        """Ends the worker."""
        self.pool.shutdown()


def step(sandbox, programs, loops):
    """The same judgements by the sandbox; raises AssertionError when it misjudges."""
    loop = "def f(x):\n while True: pass"
    firsts = sandbox.validate([Job(program, inputs[:1]) for program, inputs in programs])
    golds = [literal.parse(outcomes[0].output) for outcomes in firsts]
    right = 0
    for gold, outcomes in zip(golds, sandbox.run([Job(program, inputs[:8]) for program, inputs in programs])):
        right += sum(literal.equal(literal.parse(outcome.output), gold) for outcome in outcomes)
    for gold, outcomes in zip(golds, firsts):
        right += sum(literal.equal(literal.parse(outcomes[0].output), gold) for _ in range(8))
    hidden = [[outcome.output for outcome in outcomes] for outcomes in sandbox.run([Job(*task) for task in programs])]
    answers = [
        Job(loop if number < loops and place == 7 else candidate, inputs, stop_at_failure=True)
        for number, (program, inputs) in enumerate(programs)
        for place, candidate in enumerate(candidates(program))
    ]
    for number, outcomes in enumerate(sandbox.run(answers)):
        right += [outcome.output for outcome in outcomes] == hidden[number // 8]
    if right < 17 * len(programs) - loops:  # an input answer is right, every output answer and every candidate
        raise AssertionError("the sandbox misjudged")


def wall_seconds(action):
    """Seconds by the clock that the action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def cpu_seconds(pids):
    """Of this process, of those and of their children that have ended."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def children_rates(quick):
    """Fresh processes with one and with ten inputs, beside bare forks."""
    rounds, count = (3, 60) if quick else (7, 400)
    bare, one, ten, ratios, cpu = [], [], [], [], []
    with Sandbox(workers=1, share=False) as sandbox:
        sandbox.run([Job(TRIVIAL, ("1",))] * 20)
        pids = [lane.process.pid for lane in sandbox._lanes]
        for _ in range(rounds):
            command = [sys.executable, "-S", "-c", BARE, str(count)]
            rate, seconds = map(float, subprocess.check_output(command).split())
            bare.append(rate)
            for rates, inputs in ((one, ("3",)), (ten, tuple("0123456789"))):
                started, before = time.perf_counter(), cpu_seconds(pids)
                sandbox.run([Job(TRIVIAL, inputs)] * count)
                rates.append(count * len(inputs) / (time.perf_counter() - started))
                if rates is one:
                    cpu.append((cpu_seconds(pids) - before) / count)
                    ratios.append(cpu[-1] / seconds)
    return {
        "bare_forks_per_second": statistics.median(bare),
        "children_per_second": statistics.median(one),
        "children_share_of_bare": statistics.median(a / b for a, b in zip(one, bare)),
        "child_cpu_ms": 1000 * statistics.median(cpu),
        "child_cpu_in_bare_forks": statistics.median(ratios),
        "calls_per_second_ten_inputs": statistics.median(ten),
        "ten_inputs_speedup": statistics.median(a / b for a, b in zip(ten, one)),
    }


def step_rates(quick, loops):
    """Start-up is left out on both sides; `alone`: the sandbox with a process for every program."""
    programs, rounds = tasks(8 if quick else 40), 1 if quick or loops else 7
    loops = min(loops, 1) if quick else loops
    wall, cpu = {"plain": [], "own": [], "alone": []}, {"plain": [], "own": [], "alone": []}

    def measure(name, pids, action):
        before = cpu_seconds(pids)
        wall[name].append(wall_seconds(action))
        cpu[name].append(cpu_seconds(pids) - before)

    for _ in range(rounds):
        plain = Plain()
        plain.call("", "1")
        measure("plain", list(plain.pool._processes), lambda: plain.step(programs, loops))
        plain.close()
        for kind in ("own",) if loops else ("own", "alone"):
            with Sandbox(share=kind == "own") as sandbox:
                sandbox.validate([Job("def f(x): return len({x})", ("1",))] * 4)  # all lanes are up
                measure(kind, [lane.process.pid for lane in sandbox._lanes], lambda: step(sandbox, programs, loops))
    name, figures = "step_with_loops" if loops else "step", {}
    figures[f"{name}_judgements"] = 97 * len(programs)
    for kind, label in (("plain", f"{name}_plain"), ("own", name), ("alone", f"{name}_alone")):
        if wall[kind]:
            figures[f"{label}_seconds"] = statistics.median(wall[kind])
            figures[f"{label}_cpu_seconds"] = statistics.median(cpu[kind])
        if wall[kind] and kind != "plain":
            figures[f"{label}_speedup"] = statistics.median(a / b for a, b in zip(wall["plain"], wall[kind]))
            figures[f"{label}_cpu_ratio"] = statistics.median(a / b for a, b in zip(cpu["plain"], cpu[kind]))
    return figures


def loop_overshoot(quick):
    """Milliseconds of CPU time beyond the limit that looping children took, while every core is kept busy."""
    limit, count = (0.2, 3) if quick else (1.0, 8)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    found = []
    try:
        with Sandbox(workers=1) as sandbox:
            for _ in range(count):
                before = sandbox.state["children_cpu_seconds"]
                [[outcome]] = sandbox.run([Job("def f(x):\n while True: pass", ("1",), limit)])
                if outcome.status != "timeout":
                    raise AssertionError(f"a loop ended as {outcome}")
                found.append(1000 * (sandbox.state["children_cpu_seconds"] - before - limit))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return {"loop_overshoot_ms_median": statistics.median(found), "loop_overshoot_ms_worst": max(found)}


def soak(quick):
    """What thousands of jobs leave behind in the lanes."""
    count = 400 if quick else 4_200
    with Sandbox(share=False) as sandbox:
        warm = [Job(TRIVIAL, ("1", "2"))] * 100
        sandbox.run(warm)
        before = lanes_size(sandbox)
        failing = "def f(x): return 1 // 0"
        outcomes = sandbox.run([Job(TRIVIAL if i % 7 else failing, ("1", "2")) for i in range(count)])
        after = lanes_size(sandbox)
        bad = sum(outcome.status not in ("ok", "error") for job in outcomes for outcome in job)
    return {
        "soak_jobs": count,
        "soak_bad": bad,
        "soak_memory_kib_change": max(a[0] - b[0] for a, b in zip(after, before)),
        "soak_descriptors_change": max(a[1] - b[1] for a, b in zip(after, before)),
    }


def lanes_size(sandbox):
    """[(resident KiB, open descriptors)] of the servers, by process id."""
    sizes = []
    for lane in sorted(sandbox._lanes, key=lambda lane: lane.process.pid):
        status = Path(f"/proc/{lane.process.pid}/status").read_text()
        while Path(f"/proc/{lane.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            pass  # it is still forking; asleep it waits for its child, by one more descriptor
        try:
            descriptors = len(os.listdir(f"/proc/{lane.process.pid}/fd"))
        except PermissionError:  # not root: the server hides them
            descriptors = 0
        sizes.append((int(status.split("VmRSS:")[1].split()[0]), descriptors))
    return sizes


TARGETS = {
    "children_share_of_bare": (">=", 0.30),
    "ten_inputs_speedup": (">=", 6.0),
    "step_speedup": (">=", 3.5),
    "step_with_loops_speedup": (">=", 12.0),
    "loop_overshoot_ms_worst": ("<=", 50.0),
    "soak_bad": ("<=", 0),
    "soak_memory_kib_change": ("<=", 256),
    "soak_descriptors_change": ("<=", 0),
}


def main():
    """Prints the figures; returns the exit code."""
    parser = argparse.ArgumentParser(description="Speed of the sandbox.")
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work; no verdict on the targets")
    arguments = parser.parse_args()
    with Sandbox(workers=1) as sandbox:
        state = sandbox.state
    figures = {
        "machine": f"{platform.machine()} {os.cpu_count()} cores",
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }
    figures |= {key: state[key] for key in ("seccomp", "landlock", "uid")}
    figures |= children_rates(arguments.quick)
    figures |= step_rates(arguments.quick, 0) | step_rates(arguments.quick, 3)
    figures |= loop_overshoot(arguments.quick) | soak(arguments.quick)
    missed = []
    for name, value in figures.items():
        sign, target = TARGETS.get(name, ("", None))
        good = target is None or (value >= target if sign == ">=" else value <= target)
        missed += [] if good else [name]
        note = "" if target is None else f"   target {sign} {target}: {'reached' if good else 'MISSED'}"
        print(f"{name:32} {value if type(value) is not float else round(value, 3)}{note}")
    if arguments.json:
        record = figures | {"missed": missed, "quick": arguments.quick}
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")
    return 1 if missed and not arguments.quick else 0


if __name__ == "__main__":
    sys.exit(main())
