"""The trusted side: starts lanes (lane.py), hands them jobs, checks what comes back, keeps time, replaces what breaks.

    with Sandbox(workers=4) as sandbox:
        [[first, second]] = sandbox.run([Job("def f(x): return x + 1", ("1", "2"))])
        [[outcome]] = sandbox.validate([Job("def f(x): return list({x, 'a'})", ("'b'",))])      # nondeterministic

One thread, one selector, no threads of its own; usable from a process that has torch and its threads loaded, since
lanes are started by exec. Every text that comes out of a child is read by literal.parse and must be its own
canonical text. The end of a job is told by the server alone (control pipe), so no program can end its job, or speak
in the next one's name.

A program's time is CPU time. One that waits instead is seen to sleep and is at fault like one that loops (`timeout`);
one that the machine does not let run is `infra`: retried alone, and never a verdict.
"""

import json
import os
import selectors
import sys
import threading
import time
import weakref
from collections import deque
from dataclasses import replace

from . import literal
from .contained import worth_trying
from .lane import Lane
from .outcomes import CPU_SLACK, Bundle, Outcome, Piece, Repeat, refusal, settle, settle_together
from .profiles import PROPOSAL, Profile
from .wire import REPORT, pack_args

# PYTHONHASHSEED of every validation. All verdicts come from the first, so that none depends on which lane was free. Not
# 0: it shows in sys.flags. Four for every program: no reading of a program tells for certain that hash order is out of
# its reach.
FIRST_SEEDS = (1, 2, 3, 4)
# Where hash order can matter. Two seeds agree by chance on half of all orders of a set of two texts, four on 12 %, ten
# on 0.2 %; and an answer that is a coin's throw is what a reward for learnability pays for.
MORE_SEEDS = (5, 6, 7, 8, 9, 10)
# Jobs that share a child at most, and the bytes of their requests together: half a pipe, so that sending never waits.
BUNDLE, BUNDLE_BYTES = 8, 32_768
RECYCLE_AFTER = 20_000  # jobs of one lane, so that a server's slow leak, if there is one, never matters
_TICK = 0.02  # seconds between looks into the result pipes of long jobs
_START_SECONDS = 60.0  # for a lane to greet: far more than it takes, since a machine may stand still
# Lanes in a row that may end before they greet, once another lane has: memory may be short for a moment.
LOST_STARTS = 3

_ADVICE = (
    "use Linux, Docker or WSL, or allow the weak mode (allow_weak=True, --allow-weak), which only limits time and "
    "memory"
)


class SandboxError(RuntimeError):
    """The sandbox cannot work here; the text says why and what to do."""


class Sandbox:
    """Runs untrusted programs. `workers` jobs at a time (default: one a core).

    Raises SandboxError where programs cannot be confined (no seccomp), unless allow_weak says that processes with
    resource limits and timers are enough. `share`: programs that can reach nothing but what is their own or immutable
    (contained.py) are run several to a process; False: never. `quiet`: nothing on stderr about protections or packages
    that are missing. Use as a context manager; closed at exit otherwise.
    """

    def __init__(
        self,
        workers: int | None = None,
        profile: Profile = PROPOSAL,
        allow_weak: bool = False,
        share: bool = True,
        quiet: bool = False,
    ):
        if sys.platform == "win32" or not sys.platform.startswith("linux") and not allow_weak:
            raise SandboxError(f"programs cannot be confined on {sys.platform}: {_ADVICE}")
        self.workers = workers or _cores()
        self.profile, self.allow_weak = profile, allow_weak
        self.share = share and profile.gate and not profile.wide
        self._owner, self._lock, self._selector = os.getpid(), threading.RLock(), selectors.DefaultSelector()
        # _dying: lanes that were told to end and may still run; _infra: pieces to be tried again alone.
        self._lanes, self._dying, self._infra, self._restarts = [], [], [], 0
        self._lost_lanes, self._lost_starts = 0, 0
        self._packed, self._canonical_texts, self._protection = {}, {}, {}
        self._children, self._cpu_seconds, self._peak_mb = 0, 0.0, 0.0
        # It holds the lists, not this object, which would never be collected otherwise.
        self._finalizer = weakref.finalize(self, _close_lanes, self._lanes, self._dying, self._selector, self._owner)
        # One lane starts here, so that a machine that cannot confine programs says so before a run begins.
        try:
            self._start(FIRST_SEEDS[0])
            while self._lanes[0].state is None:
                self._turn()
        except BaseException:
            self.close()
            raise
        for line in () if quiet else _notes(self.state):
            print(f"sandbox: {line}", file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End all lanes and what they run; harmless when done twice."""
        self._finalizer()

    @property
    def state(self) -> dict:
        """What protects us: seccomp, Landlock (ABI number), uid, limits; each True, a value, or "no: why"."""
        lanes = [lane for lane in self._lanes if lane.state]
        return self._protection | {
            "profile": self.profile.name,
            "workers": self.workers,
            "lanes": len(lanes),
            "hash_seeds": list(FIRST_SEEDS + MORE_SEEDS),
            "weak": self._protection.get("seccomp") is not True,
            "lanes_replaced": self._restarts,
            "lanes_lost": self._lost_lanes,
            "children": self._children,
            "children_cpu_seconds": round(self._cpu_seconds, 6),
            "children_peak_mb": round(self._peak_mb, 1),
        }

    # --- jobs ---

    def run(self, jobs) -> list[list[Outcome]]:
        """Outcomes of every input of every job, in order. A fresh process per job, but for jobs next to each other that
        provably cannot tell (`share`); an input that ends its process early does not spoil the inputs after it: they
        get another process."""
        with self._lock:
            pieces, results = self._prepare(jobs, FIRST_SEEDS[0])
            self._execute(self._bundled(pieces))
            return results

    def _bundled(self, pieces):
        """The pieces, those in bundles that may be able to share a child. No bundle is so large that a worker has
        nothing to do."""
        if not self.share:
            return pieces
        fit, rest = {}, []
        for piece in pieces:
            # Only jobs with one CPU limit: the child has one timer, set before any program is looked at.
            small = sum(map(len, piece.texts)) + len(piece.job.code) < BUNDLE_BYTES // BUNDLE
            if small and not piece.slow and worth_trying(piece.job.code):
                fit.setdefault((piece.seed, piece.cpu_limit(self.profile.cpu_seconds)), []).append(piece)
            else:
                rest.append(piece)
        bundles = []
        for alike in fit.values():
            size = max(1, min(BUNDLE, -(-len(alike) // self.workers)))
            groups = [alike[start : start + size] for start in range(0, len(alike), size)]
            bundles += [Bundle(group) if len(group) > 1 else group[0] for group in groups]
        return bundles + rest

    def validate(self, jobs) -> list[list[Outcome]]:
        """As `run`, and again under other hash seeds with the inputs reversed, under the first of these and then once
        more in order; under six more where hash order may matter. What is not the same each time becomes
        `nondeterministic`, with the detail "state" (the same process gave two answers), "address" or "hash_seed".

        All inputs of a job together have `cpu_seconds` (default: the profile's validation_seconds), each time: ten
        seeds come to 14 times that at most."""
        limits = [job.cpu_seconds or self.profile.validation_seconds for job in jobs]
        jobs = [replace(job, cpu_seconds=limit, job_seconds=limit) for job, limit in zip(jobs, limits)]
        with self._lock:
            pieces, results = self._prepare(jobs, FIRST_SEEDS[0])
            sensitive = pieces[0].sensitive if pieces else set()
            self._execute(self._bundled(pieces))
            for first in results:
                _refuse_addresses(first, {what for what in ("order", "text", "hash") if (id(first), what) in sensitive})
            again = self._repeats(jobs, results, FIRST_SEEDS[1:2], True)
            self._explain(again)
            _conclude(again)
            again = self._repeats(jobs, results, FIRST_SEEDS[2:], False)
            # `sensitive` is known by now: the child says with the first run whether hash order may matter.
            pairs = [pair for pair in zip(jobs, results) if id(pair[1]) in sensitive]
            _conclude(again + self._repeats(*zip(*pairs), MORE_SEEDS, False) if pairs else again)
            return results

    def _repeats(self, jobs, results, seeds, twice):
        """Runs what is good so far under each of the seeds; returns the repeats."""
        repeats = []
        for job, first in zip(jobs, results):
            good = [slot for slot, outcome in enumerate(first) if outcome.status == "ok"]
            if good and (len(good) == len(first) or not job.stop_at_failure):
                repeats += [Repeat(job, first, good, seed, twice) for seed in seeds]
        self._execute(self._bundled([piece for repeat in repeats for piece in self._pieces_of(repeat)]))
        return repeats

    def _explain(self, repeats):
        """Where several inputs differ between two seeds it may be for their order: the same order under the first seed
        tells. A second answer that is the same there makes it a matter of state."""
        doubtful = [repeat for repeat in repeats if len(repeat.good) > 1 and repeat.compare()]
        checks = [repeat.under(FIRST_SEEDS[0]) for repeat in doubtful]
        self._execute([piece for check in checks for piece in self._pieces_of(check)])
        for repeat, check in zip(doubtful, checks):
            for slot in repeat.compare():
                if repeat.agrees(check, slot):
                    repeat.by_order.add(slot)

    def _pieces_of(self, repeat):
        texts = self._canonical(repeat.job, repeat.order, repeat.outcomes)
        pieces = _pieces(repeat.job, texts, repeat.outcomes, repeat.seed, set())
        for piece in pieces:
            # In company it would be cut off, or cut others off, and would have to be run once more.
            piece.slow = any(outcome.seconds > CPU_SLACK for outcome in repeat.first)
        return pieces

    def _canonical(self, job, order, outcomes):
        """[(place in outcomes, packed input)]; an input that is no literal gets its outcome here and goes nowhere."""
        texts = []
        for place, slot in enumerate(order):
            try:
                texts.append((place, self._pack(job.inputs[slot])))
            except literal.TooLarge as error:
                outcomes[place] = Outcome("too_large", None, f"input {error}")
            except literal.LiteralError as error:
                outcomes[place] = Outcome("not_literal", None, f"input {error}")
        return texts

    def _pack(self, text):
        """pack_args with a cache: a step asks the same hidden inputs of every candidate."""
        packed = self._packed.get(text)
        if packed is None:
            packed = pack_args(text, self.profile.limits)
            _remember(self._packed, text, packed)
        return packed

    def _prepare(self, jobs, seed):
        """(pieces to run, outcomes of each job): jobs and inputs that are refused at once have theirs already."""
        pieces, results, sensitive = [], [], set()
        for job in jobs:
            outcomes = [None] * len(job.inputs)
            results.append(outcomes)
            refused = refusal(job, self.profile)
            if refused is not None:
                outcomes[:] = [refused] * len(outcomes)
                continue
            texts = self._canonical(job, range(len(job.inputs)), outcomes)
            pieces += _pieces(job, texts, outcomes, seed, sensitive)
        return pieces, results

    # --- the loop ---

    def _execute(self, pieces):
        # A forked copy would read from the same pipes, and each of the two would get half of the frames.
        if os.getpid() != self._owner or not self._finalizer.alive:
            raise SandboxError("this Sandbox is closed, or belongs to another process: open one here")
        try:
            self._drive(pieces, self.workers)
            # One at a time, with nothing beside it: a crowded machine is then no reason to fail again.
            while self._infra:
                piece = self._infra.pop()
                piece.retried = True
                self._drive([piece], 1)
        except BaseException:
            # A Ctrl-C in the middle: what busy lanes will say belongs to jobs that nobody waits for any more.
            for lane in [lane for lane in self._lanes if lane.piece is not None]:
                self._drop(lane)
            self._infra.clear()
            raise

    def _drive(self, pieces, workers):
        """Runs pieces until all are settled, at most `workers` at a time."""
        queues = {}  # by hash seed, which a lane has for life
        for piece in pieces:
            queues.setdefault(piece.seed, deque()).append(piece)
        while self._fill(queues, workers) or any(lane.piece is not None for lane in self._lanes):
            # What has to be run again goes first: its job has waited longest.
            for piece in self._turn():
                queues[piece.seed].appendleft(piece)

    def _fill(self, queues, workers):
        """Gives waiting pieces to idle lanes, starts lanes that are missing. True while pieces wait."""
        busy = sum(lane.piece is not None for lane in self._lanes)
        for seed, queue in queues.items():
            lanes = [lane for lane in self._lanes if lane.seed == seed]
            idle = [lane for lane in lanes if lane.state is not None and lane.piece is None]
            while queue and idle and busy < workers:
                if not queue[0].cpu_limit(self.profile.cpu_seconds):
                    queue.popleft().settle_from(0, Outcome("timeout", None, "job_time"))
                    continue
                lane = idle.pop()
                if lane.jobs >= RECYCLE_AFTER:
                    self._drop(lane)
                    lanes.remove(lane)
                    continue
                self._give(lane, queue.popleft())
                busy += 1
            # Verdicts come from the first seed, half of a validation from the second; the further seeds have a quarter
            # of the lanes each, or memory would go to idle processes.
            most = self.workers if seed in FIRST_SEEDS[:2] else max(1, self.workers // 4)
            # One new lane for each piece that none will take, those that start already counted.
            starting = sum(lane.state is None for lane in lanes)
            for _ in range(min(len(queue) - starting, most - len(lanes))):
                self._start(seed)
        return any(queues.values())

    def _give(self, lane, piece):
        try:
            lane.give(piece, self.profile)
        except OSError:  # it died while idle; its control pipe will say so and the piece is run again
            lane.piece = piece
            return
        if lane.unsent:
            self._selector.register(lane.request, selectors.EVENT_WRITE, lane)

    def _turn(self):
        """Waits for the next event and handles it; returns pieces that must be run (again)."""
        again = []
        for key, _ in self._selector.select(_TICK):
            lane = key.data  # perhaps dropped a moment ago, for another event of this turn
            if key.fd == lane.request:
                self._send(lane)
            elif lane in self._lanes:
                again += self._hear(lane)
        now = time.monotonic()
        for lane in list(self._lanes):
            if lane.state is None and now - lane.started > _START_SECONDS:
                raise SandboxError(f"a lane did not start within {_START_SECONDS:.0f} s")
            # A child that writes more than a pipe holds waits until it is read; short jobs are read when they end.
            if lane.piece is not None and now - lane.began > _TICK:
                if not lane.listen(self.profile.output_bytes):
                    again += self._stopped(lane, Outcome("killed", None, "output_flood"))
                elif lane.waits(now):
                    again += self._stopped(lane, Outcome("timeout", None, "waiting"))
                elif now > lane.deadline:
                    late = lane.overran()
                    stopped = Outcome("timeout", None, "cpu_time")
                    again += self._stopped(lane, stopped) if late else self._lost(lane, "deadline")
        return again

    def _stopped(self, lane, outcome):
        """Ends the running child, and the lane with it, for what it does; returns pieces that must be run (again)."""
        piece, output = lane.piece, bytes(lane.output)
        self._drop(lane)
        return piece.stopped(output, outcome, self._is_canonical)

    def _send(self, lane):
        try:
            lane.send()
        except OSError:
            lane.unsent = b""  # the lane is gone; its control pipe tells
        if not lane.unsent:
            self._selector.unregister(lane.request)

    def _hear(self, lane):
        """The control pipe of a lane: its greeting, the end of a job, or its own end."""
        try:
            data = os.read(lane.control, 65_536)
        except BlockingIOError:
            return []
        lane.reports += data
        if lane.state is None and data:
            if b"\n" in lane.reports:
                line, lane.reports = lane.reports.split(b"\n", 1)
                self._greeted(lane, json.loads(line))
            return []
        if not data:  # closed: the server itself has ended
            return self._lost(lane, "lane_ended")
        if len(lane.reports) < REPORT.size:
            return []
        status, cpu, memory = REPORT.unpack_from(lane.reports)
        lane.reports = lane.reports[REPORT.size :]
        self._children += 1
        self._cpu_seconds += cpu / 1e6
        self._peak_mb = max(self._peak_mb, memory / 1024)
        return self._finished(lane, status, cpu / 1e6, memory / 1024)

    def _greeted(self, lane, state):
        if "error" in state:
            raise SandboxError(f"a lane could not start: {state['error']}")
        if state["seccomp"] is not True and not self.allow_weak:
            raise SandboxError(f"programs cannot be confined here (seccomp {state['seccomp']}): {_ADVICE}")
        lane.state = self._protection = state

    def _finished(self, lane, status, cpu, memory_mb):
        piece = lane.piece
        if piece is None:  # the child that waited was killed from outside: whose turn it is is no longer certain
            return self._lost(lane, "no_job")
        # Everything the child wrote is in the pipe by now: the server reports after it has reaped the child.
        flood = not lane.listen(self.profile.output_bytes)
        lane.piece = None
        if flood:  # what is still in its pipe would be taken for the next job's
            lane.piece = piece
            return self._stopped(lane, Outcome("killed", None, "output_flood"))
        if not lane.output.startswith(b"B") or lane.unsent:  # the request may not have been read whole
            lane.piece = piece
            return self._lost(lane, "no_start")
        if type(piece) is Bundle:
            return settle_together(piece, bytes(lane.output), status, self._is_canonical)
        piece.spent.append(cpu)
        rest, infra = settle(piece, bytes(lane.output), status, self._is_canonical)
        if infra:
            # The kernel ends what fills the machine's memory: twice in a row is no accident.
            greedy = infra == "signal SIGKILL" and memory_mb > self.profile.memory_mb / 2
            return self._again(piece, infra, Outcome("memory", None, "killed") if greedy else None)
        # What is left after a time-out may take as long again, input by input: several lanes share that.
        return [part for left in rest for part in (left.parts(self.workers) if cpu >= lane.limit else [left])]

    def _lost(self, lane, why):
        """Drop a lane that is of no more use; its job is run again. SandboxError: lanes end before they greet."""
        self._lost_lanes += 1
        # One that fails to start may have met a full machine; several in a row, or the very first, mean that none will.
        self._lost_starts = self._lost_starts + 1 if lane.state is None else 0
        if lane.state is None and (not self._protection or self._lost_starts > LOST_STARTS):
            raise SandboxError(f"a lane could not start: it ended with exit code {lane.process.poll()}")
        piece = lane.piece
        self._drop(lane)
        return [] if piece is None else self._again(piece, why)

    def _is_canonical(self, text) -> bool:
        """Whether a text that a child has sent is the canonical text of a value within the limits.

        The child says what it likes: this is where its text becomes trusted, by being read and written again here.
        """
        if text in self._canonical_texts:
            return True
        try:
            good = literal.canon(literal.parse(text, self.profile.limits), self.profile.limits) == text
        except literal.LiteralError:
            return False
        if good:
            _remember(self._canonical_texts, text, True)
        return good

    def _again(self, piece, why, fault=None):
        """What becomes of inputs that were cut off for no fault of the program: all of them once more, alone; the
        second time the first of them is given up and the others go on, unless the job ends there. A bundle is taken
        apart. fault: the outcome if the program itself can have caused it twice; None: the machine's failure."""
        if type(piece) is Bundle:
            return piece.pieces
        waiting = [position for position, slot in enumerate(piece.slots) if piece.outcomes[slot] is None]
        if not waiting:
            return []
        if not piece.retried:
            self._infra.append(piece.rest(waiting[0]))
            return []
        outcome = fault or Outcome("infra", None, why)
        piece.settle(waiting[0], outcome)
        if piece.job.stop_at_failure:
            piece.settle_from(waiting[0] + 1, Outcome(outcome.status, None, "not_run"))
            return []
        return [piece.rest(position) for position in waiting[1:2]]

    def _start(self, seed):
        lane = Lane(seed, self.profile, self.allow_weak)
        self._lanes.append(lane)
        self._selector.register(lane.control, selectors.EVENT_READ, lane)

    def _drop(self, lane):
        self._selector.unregister(lane.control)
        if lane.unsent and lane.request in self._selector.get_map():
            self._selector.unregister(lane.request)
        self._lanes.remove(lane)
        lane.piece = None
        lane.close()
        self._restarts += 1
        # In place: the finalizer holds this very list.
        self._dying[:] = [old for old in self._dying if old.process.poll() is None] + [lane]


# --- housekeeping ---------------------------------------------------------------------------------------------------


def _refuse_addresses(outcomes, told):
    """Ten processes may agree on a bit of an address, or on the order of two of them: looking is enough."""
    if "text" in told or {"hash", "order"} <= told:
        for slot, outcome in enumerate(outcomes):
            if outcome.status == "ok":
                outcomes[slot] = Outcome("nondeterministic", None, "address the program looks where an object lies")


def _conclude(repeats):
    """Puts what came out differently in the place of the first run's outcomes."""
    # Compared before any is overwritten. Backwards, so that where several seeds differ the first has the last word.
    for repeat, differing in [(repeat, repeat.compare()) for repeat in repeats[::-1]]:
        for slot, outcome in differing.items():
            repeat.first[slot] = outcome


def _pieces(job, texts, outcomes, seed, sensitive):
    """One piece with all the inputs, or none when no input is left to run."""
    places = [place for place, _ in texts]
    return [Piece(job, [text for _, text in texts], places, outcomes, seed, sensitive)] if texts else []


def _remember(cache, text, value):
    """Short texts only, and all are forgotten at once when there are many: a bound on memory without bookkeeping."""
    if len(text) <= 1_000:
        if len(cache) >= 4_096:
            cache.clear()
        cache[text] = value


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _close_lanes(lanes, dying, selector, owner):
    if os.getpid() != owner:  # a forked copy: the lanes are not ours
        return
    selector.close()
    for lane in lanes:
        lane.close()
    deadline = time.monotonic() + 2.0
    for lane in lanes + dying:
        lane.wait(max(0.05, deadline - time.monotonic()))
    lanes.clear()
    dying.clear()


def _notes(state):
    """One line for every protection that is missing."""
    if state["weak"]:
        yield f"WEAK MODE: seccomp {state['seccomp']}; programs can reach files and the network"
    if not isinstance(state.get("landlock"), int):
        yield f"Landlock {state.get('landlock')}; seccomp alone keeps programs from files"
    if str(state.get("uid")).startswith("no:"):
        yield f"uid unchanged ({state['uid'][4:]}); seccomp alone protects other processes"
    if state["limits"] != "set":
        yield f"resource limits {state['limits']}"
    for name in dict.fromkeys(name.partition(".")[0] for name in state["missing"]):
        yield f"{name} is not installed: programs that import it fail"
