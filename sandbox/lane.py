"""One lane as the pool sees it: a fork-server process (worker.py) and the trusted ends of its pipes.

    lane = Lane(seed=1, profile=PROPOSAL, allow_weak=False)
    lane.give(piece, PROPOSAL)          # later: lane.listen(limit), lane.output
    lane.close(); lane.wait(2.0)

Nothing here blocks: the pool's selector says when a pipe can be read or written. Started by exec and not by fork, with
an empty environment, so that no thread, descriptor or secret of the trainer is in it.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import marshal
import os
import struct
import subprocess
import sys
import time
from dataclasses import asdict

from .outcomes import Bundle, Piece
from .profiles import Profile
from .wire import FRAME, HEAD

# Seconds by the clock that a child may take for a second of CPU time.
WALL_FACTOR = 30
# Seconds after which a child is looked at, seconds between looks, and looks in a row that find it waiting.
LOOKS_AFTER, LOOK_SECONDS, LOOKS = 0.5, 0.1, 5
_F_SETPIPE_SZ = 1031  # fcntl.F_SETPIPE_SZ, which systems other than Linux lack
_BOOT = (
    "import sys, types; sys.path.pop(0); p = types.ModuleType('sandbox'); p.__path__ = [sys.argv.pop(1)]; "
    "sys.modules['sandbox'] = p; from sandbox import worker; worker.main()"
)


class Lane:
    """One fork-server process and the trusted ends of its pipes: two for requests, one for results, one for control.

    seed: its PYTHONHASHSEED. `state`: its greeting, None until it has greeted. `piece`: what it runs now, or None.
    """

    def __init__(self, seed: int, profile: Profile, allow_weak: bool):
        request_read, first = os.pipe()
        second_read, second = os.pipe()
        self.data, data_write = os.pipe()
        self.control, control_write = os.pipe()
        # The profile's limits and modules go to the server once, not with each job.
        config = {
            "seed": seed,
            "control": control_write,
            "second": second_read,
            "taken_uids": _taken_uids(),
            "pool": os.getpid(),
            "allow_weak": allow_weak,
            **{key: value for key, value in asdict(profile).items() if key != "name"},
            "packages": {name: _place(name) for name in profile.packages},
        }
        # An environment of its own, so that no token of the user's is in reach. LD_BIND_NOW: the linker looks symbols
        # up once, before the forks, and not again in every child.
        # OPENBLAS: numpy would start a thread a core, and a fork has but one.
        environment = {"PYTHONHASHSEED": str(seed), "PYTHONUTF8": "1", "LD_BIND_NOW": "1", "OPENBLAS_NUM_THREADS": "1"}
        if "LD_LIBRARY_PATH" in os.environ:  # a Python whose own library is found that way
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        # With -S and -s there are no site-packages, whose start-up files would run in the lane; -I would ignore
        # the hash seed. A session of its own, since a Ctrl-C is for the trainer alone.
        try:
            here = os.path.dirname(os.path.abspath(__file__))
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-s", "-B", "-c", _BOOT, here, json.dumps(config)],
                env=environment,
                cwd="/",
                stdin=request_read,
                stdout=data_write,
                stderr=subprocess.DEVNULL,
                pass_fds=(control_write, second_read),
                start_new_session=True,
            )
        finally:
            # Closed here even if the start failed. A copy left open would keep the pipe from ever ending.
            for descriptor in (request_read, second_read, data_write, control_write):
                os.close(descriptor)
        self.requests, self.request = (first, second), first  # in turn: the next child waits already
        for descriptor in (*self.requests, self.data, self.control):
            os.set_blocking(descriptor, False)
        _widen(self.data)
        self.seed, self.state, self.jobs = seed, None, 0
        self.piece, self.unsent, self.output, self.reports, self.deadline = None, b"", bytearray(), b"", 0.0
        self.started = time.monotonic()

    def give(self, piece: Piece | Bundle, profile: Profile):
        """Send a job to the child that waits. OSError: the lane has ended."""
        self.limit = piece.cpu_limit(profile.cpu_seconds)
        # By the clock the child may take many times its CPU time on a crowded machine; what exceeds it is `infra`. The
        # deadline here is later: it is for a server that stopped, not for a child.
        wall = max(profile.wall_seconds, WALL_FACTOR * self.limit)
        body = marshal.dumps((piece.programs(), self.limit, wall))
        self.piece, self.unsent = piece, HEAD.pack(len(body)) + body
        self.request = self.requests[self.jobs % 2]
        self.output, self.jobs, self.began = bytearray(), self.jobs + 1, time.monotonic()
        self.asleep, self.looked = 0, self.began
        self.deadline = self.began + 1.5 * wall + 5
        self.send()

    def send(self):
        """As much of the request as the pipe takes; the rest stays in `unsent`. OSError: the lane has ended."""
        try:
            self.unsent = self.unsent[os.write(self.request, self.unsent) :]
        except BlockingIOError:
            pass

    def listen(self, limit: int) -> bool:
        """Takes what has come on the result pipe; False when it is more than `limit` bytes."""
        while len(self.output) <= limit:
            try:
                data = os.read(self.data, 262_144)
            except BlockingIOError:
                return True
            if not data:
                return True
            self.output += data
        return False

    def child(self) -> tuple[str, float] | None:
        """State of the running child (proc(5): R runs or wants to, S waits) and its CPU seconds, None if it is gone.

        What it has said, its process id first, is in `output` by now.
        """
        try:
            length = FRAME.unpack_from(self.output)[1]
            with open(f"/proc/{int(self.output[FRAME.size : FRAME.size + length])}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except (OSError, ValueError, struct.error):
            return None
        return fields[0], sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def waits(self, now: float) -> bool:
        """Whether the child has slept at so many looks in a row that it is no accident. One that is starved wants to
        run whenever it is looked at, and one that waits to be read from has been."""
        if now - self.began < LOOKS_AFTER or now - self.looked < LOOK_SECONDS:
            return False
        state = self.child()
        self.asleep = self.asleep + 1 if state is not None and state[0] == "S" else 0
        self.looked = now
        return self.asleep >= LOOKS

    def overran(self) -> bool:
        """Whether the child has had more than its CPU time and yet goes on."""
        state = self.child()
        return state is not None and state[1] > self.limit + 0.1

    def close(self):
        """Closing the request pipes ends the server and whatever it runs."""
        for descriptor in (*self.requests, self.data, self.control):
            os.close(descriptor)

    def wait(self, seconds):
        """Until its process has ended; killed after so many seconds."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:  # a stray copy of the request pipe holds it open (a forked process of ours)
            self.process.kill()
            self.process.wait()


def _widen(pipe):
    """A megabyte of room, so that a child need not wait until the pool looks."""
    try:
        fcntl.fcntl(pipe, _F_SETPIPE_SZ, 1 << 20)
    except OSError:
        pass  # the limit of this user is lower: slower, not wrong


def _place(package):
    """The directory to import an installed package from, None if it is not there."""
    spec = importlib.util.find_spec(package.partition(".")[0])
    return os.path.dirname(os.path.dirname(spec.origin)) if spec is not None and spec.origin else None


def _taken_uids():
    """Uids of this machine's users. A lane takes none of them: processes of one uid may send each other signals."""
    import pwd  # not on Windows

    return [entry.pw_uid for entry in pwd.getpwall() if entry.pw_uid >= 1_000]
