"""What the parts of bench_gpu.py share: a line a measurement, the clock, timing on the device, the policies under test.

    bench.measure("copy", lambda: {"GB/s": ...}, takes=2)      # one JSON line, whatever happens inside

A measurement that fails becomes a line with the error; what it held is freed and the next one runs. One that no longer
fits the time is written as left out, and one that this run has measured already (before its process died) is passed
over.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from azr.machine.plan import QWEN25, Shape
from azr.policy.backoff import is_out_of_memory
from gpu.lines import LOST, append, read_lines, shown

SMALL = Shape(64, 2, 4, 2, 128, 1000, True, 16)  # in place of every true shape in the dry mode on a CPU
GB = 1e9


class Injected(RuntimeError):
    """The failure of --fail."""


class Bench:
    """One run. cpu: small shapes, perf_counter for events, no graphs. until: time.time() at which it must be over."""

    def __init__(self, path: Path, run: str, until: float, cpu: bool = False, data=None, smollm2=None, fail=(), die=()):
        self.path, self.run, self.until, self.cpu = Path(path), run, until, cpu
        self.fail, self.die = set(fail), set(die)  # parts in which every measurement fails, or ends the process
        self.data, self.smollm2 = data and Path(data), smollm2 and Path(smollm2)
        self.device, self.part, self.failed = ("cpu" if cpu else "cuda"), "", 0
        self.policies: dict = {}
        self.bandwidth: float | None = None  # bytes/s copied, read and written, once measured
        self.done = {(row["part"], row["name"]): row for row in read_lines(self.path) if row.get("run") == run}

    # ---------------------------------------------------------------- lines

    def left(self) -> float:
        """Seconds until the run must be over."""
        return self.until - time.time()

    def line(self, name: str, figures: dict, seconds: float = 0.0, ok: bool = True, table: str | None = None, **more):
        """Appends the line and shows it."""
        row = {
            "run": self.run,
            "part": self.part,
            "name": name,
            "table": table or self.part,
            "ok": ok,
            "seconds": round(seconds, 3),
            **more,
            "figures": figures,
        }
        append(self.path, row)
        self.failed += not ok
        print(shown(row), flush=True)

    def measure(self, name: str, call: Callable[[], dict | None], takes: float = 3.0, table: str | None = None):
        """call() -> figures, as one line; returns the figures, None if there are none. takes: seconds, about.

        The figure "ok" says whether what was measured is right; without it, it is.
        """
        if (earlier := self.done.get((self.part, name))) is not None:
            return earlier["figures"] or None
        if self.left() < (takes / 10 if self.cpu else takes):
            self.line(name, {}, table=table, left_out=f"takes about {takes:.0f} s, {self.left():.0f} s are left")
            return None
        self.path.with_suffix(".now").write_text(json.dumps({"part": self.part, "name": name}))
        # a hang ends the process with all stacks on stderr; the parent goes on with the next measurement
        faulthandler.dump_traceback_later(4 * takes + (120 if self.cpu else 45), exit=True)
        start, figures, failure = time.perf_counter(), {}, {}
        try:
            if self.part in self.die:
                os._exit(9)
            if self.part in self.fail:
                raise Injected(f"a failure of {self.part}, as asked")
            figures = call() or {}
            self.sync()
        except Exception as error:  # of any kind: the others still report
            failure = described(error)
        faulthandler.cancel_dump_traceback_later()
        ok = bool(figures.pop("ok", True)) and not failure
        self.line(name, figures, time.perf_counter() - start, ok, table, **failure)
        self.path.with_suffix(".now").unlink(missing_ok=True)
        self.clear()
        return figures or None

    # ---------------------------------------------------------------- the device

    def sync(self) -> None:
        if not self.cpu:
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Frees what nothing refers to; ends the process if the context is lost."""
        gc.collect()
        if self.cpu:
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            print(f"the CUDA context is lost: {error}", flush=True)
            raise SystemExit(LOST) from error

    def time(self, call: Callable, repeats: int = 7, warm: int = 2) -> float:
        """Median seconds of call() between CUDA events (CPU: wall)."""
        repeats, warm = (2, 1) if self.cpu else (repeats, warm)
        for _ in range(warm):
            call()
        if self.cpu:
            return statistics.median(wall(call) for _ in range(repeats))
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize()
        for start, end in pairs:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

    def time_each(self, calls: list[Callable]) -> tuple[float, str]:
        """(seconds a call, "graph" or "eager"): the calls, on different inputs so that the L2 cache does not flatter,
        replayed as one CUDA graph, so that the time is the device's and not that of launching."""
        if not self.cpu:
            try:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for call in calls[:2]:
                        call()
                torch.cuda.current_stream().wait_stream(side)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for call in calls:
                        call()
                return self.time(graph.replay) / len(calls), "graph"
            except RuntimeError as error:
                print(f"    no graph: {first_line(error)}", flush=True)
                torch.cuda.synchronize()
        return self.time(lambda: [call() for call in calls]) / len(calls), "eager"

    def memory(self) -> dict[str, float]:
        """GB by the allocator's count now."""
        if self.cpu:
            return {"allocated GB": 0.0, "reserved GB": 0.0, "inactive split GB": 0.0}
        stats = torch.cuda.memory_stats()
        return {
            "allocated GB": stats["allocated_bytes.all.current"] / GB,
            "reserved GB": stats["reserved_bytes.all.current"] / GB,
            "inactive split GB": stats.get("inactive_split_bytes.all.current", 0) / GB,
        }

    @contextmanager
    def peak(self, figures: dict):
        """Adds the peaks inside to `figures`: allocated and reserved, GB, and what was allocated before."""
        if self.cpu:
            yield
            figures |= {"before GB": 0.0, "peak GB": 0.0, "peak reserved GB": 0.0}
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / GB
        yield
        torch.cuda.synchronize()
        figures |= {
            "before GB": before,
            "peak GB": torch.cuda.max_memory_allocated() / GB,
            "peak reserved GB": torch.cuda.max_memory_reserved() / GB,
        }

    # ---------------------------------------------------------------- models

    def shape(self, size: str) -> Shape:
        return SMALL if self.cpu else QWEN25[size]

    def tokenizer(self) -> str | None:
        """The directory of Qwen's tokenizer, if --data has it; the dry mode's vocabulary is too small for it."""
        path = self.data and self.data / "qwen2.5-tokenizer"
        return str(path) if path and path.is_dir() and not self.cpu else None

    def policy(self, quantization: str = "nf4", size: str = "3B"):
        """The policy of random weights that several parts share: bf16 (CPU: fp32), LoRA of rank 32, no EOS.

        One is held at a time. A build that failed fails at once the next time.
        """
        from random_weights import random_policy

        key = (size, quantization)
        if key not in self.policies:
            self.drop()
            try:
                self.policies[key] = random_policy(
                    self.shape(size), quantization, self.device, 32, tokenizer=self.tokenizer(), max_batch=384
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    self.policies[key] = RuntimeError(f"no policy: {type(error).__name__}: {first_line(error)}")
                raise
        if isinstance(self.policies[key], Exception):
            raise self.policies[key]
        return self.policies[key]

    def any_policy(self, size: str = "3B"):
        """(policy, "nf4"), or (policy, "none") where bitsandbytes does not work."""
        try:
            return self.policy("nf4", size), "nf4"
        except Exception as error:
            print(f"    {size} in NF4 is not to be had ({first_line(error)}): taking bf16", flush=True)
        return self.policy("none", size), "none"

    def drop(self) -> None:
        """Lets go of the policies (not of what was learned about builds that fail)."""
        self.policies = {key: value for key, value in self.policies.items() if isinstance(value, Exception)}
        self.clear()


# ---------------------------------------------------------------- small things


def described(error: BaseException) -> dict:
    """The fields of a line that say what failed and where."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}: {frame.line}" for frame in frames]
    return {"error": f"{type(error).__name__}: {first_line(error)}", "traceback": where}


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["(no message)"])[0][:300]


def wall(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def prompts_of(count: int, length: int, vocabulary: int, salt: int = 0) -> list[list[int]]:
    """`count` different prompts of `length` tokens, none of them special."""
    return [[1 + (i * 7919 + j * (31 + i % 13) + salt) % (vocabulary - 2) for j in range(length)] for i in range(count)]


@contextmanager
def patched(owner, name: str, value):
    """`owner.name` is `value` inside; nothing where there is no such name."""
    if not hasattr(owner, name):
        yield
        return
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def kernel_table(profile, count: int = 25) -> list[dict]:
    """The kernels (on a CPU: the operations) that took most, of a torch profile."""
    rows = []
    for event in profile.key_averages():
        spent = getattr(event, "self_device_time_total", None)
        spent = getattr(event, "self_cuda_time_total", 0) if spent is None else spent
        on_device = "cuda" in str(getattr(event, "device_type", "")).lower()
        if not torch.cuda.is_available():
            spent, on_device = event.self_cpu_time_total, True
        if on_device and spent > 0:
            rows.append({"kernel": event.key[:110], "count": event.count, "us": round(spent, 1)})
    total = sum(row["us"] for row in rows) or 1.0
    rows = sorted(rows, key=lambda row: -row["us"])
    all_ = {"kernel": "all", "count": sum(row["count"] for row in rows), "us": round(total, 1), "share": 1.0}
    return [all_, *({**row, "share": round(row["us"] / total, 4)} for row in rows[:count])]


def activities() -> list:
    from torch.profiler import ProfilerActivity

    return [ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]
