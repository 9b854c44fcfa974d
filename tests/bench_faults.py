"""A training run that is killed again and again, against one that is left alone: what is lost, and whether it is equal.

    python tests/bench_faults.py --json FILE                60 steps, SIGKILL 50 times, SIGTERM 10 times
    python tests/bench_faults.py --quick                    3 steps, SIGKILL twice, SIGTERM once: what the tests run

Three runs of train_azr.py on the embedded model with the same settings: undisturbed; killed with SIGKILL at random
moments, resumed each time with --resume auto; stopped with SIGTERM at random moments, resumed likewise. Moments are
uniform over the run's progress (a step, and a fraction of the time of a step); some fall into the start of a process.
Compared bit for bit: metrics (but time/ and memory/), samples, probe, evaluations, final adapter and optimizer state.
Lost are complete steps that must be done again; CPU time lost is what a disturbed run used beyond the undisturbed one.

Every tenth start is the command line itself; the others are forks of this process, which has imported the libraries.
Exit code 1: something differs, or a process did not end as it should.

Left out: several machines, a machine that loses power (files are synced, which cannot be seen from here).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"

from azr.models import model_path
from azr.runs import newest_intact

SMALL = "--prompts-per-mode 2 --answers 2 --max-new-tokens 64 --save-every 2".split()
COLD_EVERY = 10  # starts
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class Drill:
    """One run directory, and the processes that work on it one after the other."""

    def __init__(self, out: Path, flags: list[str], cold: bool) -> None:
        self.out, self.flags, self.cold, self.starts = out, ["--out", str(out), *flags], cold, 0
        self.cpu = self.wall = 0.0  # seconds, over all processes
        self.unexpected: list[str] = []

    def start(self) -> int:
        """Starts the run, or goes on with it; returns the process id."""
        flags, self.starts, self.began = [*self.flags, "--resume", "auto"], self.starts + 1, time.monotonic()
        log = open(f"{self.out}.log", "ab")
        if self.cold and self.starts % COLD_EVERY == 0:
            pid = subprocess.Popen([sys.executable, str(ROOT / "train_azr.py"), *flags], stdout=log, stderr=log).pid
        elif not (pid := os.fork()):
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            os._exit(run(flags))
        log.close()
        return pid

    def ended(self, pid: int, wait: bool = False) -> int | None:
        """The exit code (negative: the signal), None while it runs."""
        found, status, usage = os.wait4(pid, 0 if wait else os.WNOHANG)
        if not found:
            return None
        self.cpu += usage.ru_utime + usage.ru_stime
        self.wall += time.monotonic() - self.began
        return os.waitstatus_to_exitcode(status)

    def expect(self, found: int, *codes: int) -> None:
        if found not in codes:
            self.unexpected.append(f"process {self.starts} of {self.out.name} ended with {found}, see {self.out}.log")

    def steps(self) -> int:
        """Complete lines of metrics.jsonl."""
        path = self.out / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def disturb(self, number: int, moment: float, step_seconds: float) -> dict | None:
        """One process, sent a signal at `moment` (in steps of the run); what that cost. None: it was done before."""
        pid = self.start()
        while self.steps() < int(moment):
            if (code := self.ended(pid)) is not None:
                self.expect(code, 0)
                return None
            time.sleep(0.01)
        time.sleep(moment % 1 * step_seconds)  # the moment is the test
        done, used, sent = self.steps(), cpu_of(pid), time.monotonic()
        os.kill(pid, number)
        before = self.cpu
        code = self.ended(pid, wait=True)
        self.expect(code, -number if number == signal.SIGKILL else 0, *[-number] * (self.steps() < 1))
        kept, _ = newest_intact(self.out)
        lost = max(0, done - (int(kept.name.removeprefix("step_")) if kept else 0))
        return {"lost": lost, "seconds": time.monotonic() - sent, "cpu": self.cpu - before - used, "code": code}

    def finish(self) -> None:
        self.expect(self.ended(self.start(), wait=True), 0)


def run(flags: list[str]) -> int:
    """train_azr.py in this (forked) process."""
    import train_azr

    try:
        code = train_azr.main(flags)
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 3
    sys.stdout.flush()
    return code


def cpu_of(pid: int) -> float:
    """Seconds of CPU time that a process has used; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def differences(one: Path, other: Path, steps: int) -> list[str]:
    """Names of what is not the same in two finished runs."""

    def metrics(out):
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]

    names = ["samples.jsonl", "probe.jsonl", "eval/held_out.jsonl", "eval/base.json", f"eval/step_{steps}.json"]
    names += ["eval/greedy_base.json", f"eval/greedy_step_{steps}.json"]
    names += [f"checkpoints/step_{steps}/{name}" for name in ("adapter_model.safetensors", "state/tensors.safetensors")]
    names += ["checkpoints/best.json"]
    different = [] if metrics(one) == metrics(other) else ["metrics.jsonl"]
    return different + [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]


def summary(hits: list[dict], drill: Drill, alone: Drill, different: list[str]) -> dict:
    seconds = [hit["seconds"] for hit in hits] or [0.0]
    return {
        "signals_that_hit": len(hits),
        "starts": drill.starts,
        "steps_lost": sum(hit["lost"] for hit in hits),
        "steps_lost_at_worst": max([hit["lost"] for hit in hits], default=0),
        "cpu_seconds_lost": round(drill.cpu - alone.cpu, 2),
        "cpu_seconds_lost_each": round((drill.cpu - alone.cpu) / max(1, len(hits)), 2),
        "signal_to_exit_seconds_at_worst": round(max(seconds), 3),
        "signal_to_exit_seconds_median": round(statistics.median(seconds), 3),
        "signal_to_exit_cpu_seconds_at_worst": round(max([hit["cpu"] for hit in hits], default=0.0), 3),
        "different": different,
        "unexpected": drill.unexpected,
    }


def measure(directory: Path, steps: int, kills: int, stops: int, quick: bool, seed: int) -> dict:
    # What a run needs is imported here, once: torch alone would leave some six CPU seconds to every fork.
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import train_azr  # noqa: F401
    from azr.train import loop

    torch.set_num_threads(1)  # no pool of threads in this process, which forks
    if quick:
        loop.PROBE, loop.SEED_ROUNDS = 1, 2
    held_out = directory / "held_out.jsonl"
    lines = (Path(model_path("tiny")) / "held_out.jsonl").read_text().splitlines()
    tasks = 2 if quick else 8  # a mode
    held_out.write_text("\n".join(lines[:tasks] + lines[700 : 700 + tasks] + lines[1400 : 1400 + tasks]) + "\n")
    flags = ["--steps", str(steps), "--eval-data", str(held_out), *SMALL]
    few, many = "--eval-every 2 --eval-samples 1 --max-new-tokens 32", "--eval-every 20 --eval-samples 2"
    flags += (few if quick else many).split()
    alone, killed, stopped = (Drill(directory / name, flags, not quick) for name in ("alone", "killed", "stopped"))
    alone.finish()
    times = [json.loads(line)["time/step"] for line in (alone.out / "metrics.jsonl").read_text().splitlines()]
    dice, pace = random.Random(seed), statistics.median(times)
    result = {"steps": steps, "step_seconds_median": pace, "undisturbed_cpu_seconds": round(alone.cpu, 2)}
    for name, drill, number, count in (
        ("SIGKILL", killed, signal.SIGKILL, kills),
        ("SIGTERM", stopped, signal.SIGTERM, stops),
    ):
        moments = sorted(dice.uniform(0, steps) for _ in range(count))
        hits = [hit for moment in moments if (hit := drill.disturb(number, moment, pace))]
        drill.finish()
        result[name] = summary(hits, drill, alone, differences(alone.out, drill.out, steps))
    return result | {"unexpected": alone.unexpected}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="SIGKILLs (50)")
    parser.add_argument("--stops", type=int, help="SIGTERMs (10)")
    parser.add_argument("--steps", type=int, help="of each run (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--quick", action="store_true", help="2 SIGKILLs and 1 SIGTERM in 3 steps")
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    args = parser.parse_args()
    defaults = (3, 2, 1) if args.quick else (60, 50, 10)
    steps, kills, stops = (b if a is None else a for a, b in zip((args.steps, args.kills, args.stops), defaults))
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        result = measure(Path(directory), steps, kills, stops, args.quick, args.seed)
        good = not any(
            found[key] for found in (result["SIGKILL"], result["SIGTERM"]) for key in ("different", "unexpected")
        )
        result["equal"] = good and not result["unexpected"]
        if not result["equal"]:
            for log in sorted(Path(directory).glob("*.log")):
                print(f"--- {log.name}", *log.read_text().splitlines()[-15:], sep="\n", file=sys.stderr)
    print(json.dumps(result, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
