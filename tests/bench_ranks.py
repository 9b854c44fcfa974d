"""One run, or one evaluation, by two and three processes against the same by one, on the CPU; stopped, killed, and
taken up by another number of processes.

    python tests/bench_ranks.py --json FILE            ten steps; every case, every disturbance
    python tests/bench_ranks.py --only lean,sft,moves  some of them
    python tests/bench_ranks.py --simulate 8 --card h100 --preset 80gb     1, 2, 4 and 8 GPUs that are pretended

A case is a set of flags: it is run by 1, 2 and 3 processes, and compared are samples (byte for byte), metrics (but
time/ and memory/), the gradient of the first step (from Adam's first moment) and the last adapter. `moves` begins with
2 processes, goes on with 1 and ends with 3. A disturbance is a signal to a process that torchrun has started; then
another number of processes goes on. `evaluation` is eval_passk.py at two temperatures, disturbed in the same ways but
without torchrun, so that nothing else ends the processes that are left: all files are compared byte for byte. Exit code
1: samples or files differ, the gradient by more than 1e-5, or a process did not end as it should. --simulate does
nothing of that: see simulated_ranks.py.

Left out: GPUs, several machines. Times are CPU seconds, which say what a rank has to do and not how long it waits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from safetensors.torch import load_file

import eval_passk
import train_azr
from azr import runs
from azr.machine.cost import CARDS
from azr.machine.plan import PRESETS
from azr.models import model_path
from azr.train import loop
from simulated_ranks import simulated

SMALL = "--prompts-per-mode 4 --answers 4 --max-new-tokens 64 --token-budget 1024 --save-every 1"
CASES = {  # name -> steps, flags
    "lean": (10, ""),
    "azr": (10, "--recipe azr"),
    "rlvr": (10, "--algorithm rlvr --data {tasks}"),
    "sft": (10, "--algorithm sft --data {solutions}"),
    "nf4": (3, "--quantization nf4"),
    "minibatches": (4, "--minibatches 2 --entropy-control kl-cov"),
    "frozen": (3, "--proposer frozen-base --entropy-control bonus"),
    "separate": (3, "--proposer separate"),
    "full": (3, "--train full --learning-rate 3e-5"),
    "off-policy": (3, "--off-policy-gamma 0.3 --off-policy-source base"),
}
DISTURBANCES = {  # name -> signal, rank (None: torchrun itself), processes that go on
    "kill-1": (signal.SIGKILL, 1, 1),
    "kill-0": (signal.SIGKILL, 0, 3),
    "term-1": (signal.SIGTERM, 1, 3),
    "term-0": (signal.SIGTERM, 0, 1),
    "term": (signal.SIGTERM, None, 2),
    "interrupt": (signal.SIGINT, None, 1),  # to all at once, as a terminal does
}
SHORT = 5  # steps of a run that is disturbed in its third
EVALUATION = "run --model tiny --benchmark tiny --limit 4 --samples 96 --temperature 1,0 --top-p 1 --out"
MOST = 1e-5  # of the gradient's norm


def small_start() -> None:
    """A short seed stage and probe, and the state of every step stays."""
    loop.PROBE, loop.SEED_ROUNDS, runs.KEEP_STATES = 2, 2, 100
    torch.set_num_threads(1)


def processes(count: int, flags: list[str], log: Path, main=train_azr.main) -> tuple[list[int], list[float]]:
    """Exit codes and CPU seconds of `count` forks of this process as the ranks of a run, without torchrun."""
    ends = [os.wait4(pid, 0) for pid in started(count, flags, log, main)]
    codes = [os.waitstatus_to_exitcode(status) for _, status, _ in ends]
    return codes, [round(usage.ru_utime + usage.ru_stime, 2) for _, _, usage in ends]


def started(count: int, flags: list[str], log: Path, main) -> list[int]:
    """Their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(count):
        if not (pid := os.fork()):
            names = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()} if count > 1 else {})
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1), os.dup2(descriptor, 2)
            sys.stdout = sys.stderr = os.fdopen(descriptor, "w", 1)  # pytest has others in their place
            code = 3
            try:
                code = main(flags)
            finally:
                sys.stdout.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def metrics(out: Path) -> list[dict]:
    """Of every step, what can be reproduced."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]


def texts(out: Path, steps: int) -> list[str]:
    """The samples of so many steps, and the probe; held-out answers are in the metrics as counts."""
    lines = (out / "samples.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["step"] <= steps] + [(out / "probe.jsonl").read_text()]


def gradient(out: Path) -> torch.Tensor:
    """Of the first step, clipped, times 1 - beta 1."""
    tensors = load_file(out / "checkpoints" / "step_1" / "state" / "tensors.safetensors")
    return torch.cat([value.flatten() for name, value in sorted(tensors.items()) if name.endswith("exp_avg")])


def compared(one: Path, other: Path) -> dict:
    """How far the second run, which may be shorter, is from the first."""
    pairs = list(zip(metrics(one), metrics(other)))
    keys = {(step, key) for step, pair in enumerate(pairs) for key in pair[0] | pair[1]}
    values = {key: [row.get(key[1]) for row in pairs[key[0]]] for key in keys}
    # a metric that only one of them has is as far away as can be
    unequal = {
        key: math.inf if None in (a, b) else abs(a - b) / max(abs(a), abs(b), 1e-3)
        for key, (a, b) in values.items()
        if a != b
    }
    last = f"checkpoints/step_{len(pairs)}"
    adapters = [load_file(next((out / last).glob("*model.safetensors"))) for out in (one, other)]
    exact, close = gradient(one), gradient(other)
    return {
        "steps": len(pairs),
        "samples": texts(one, len(pairs)) == texts(other, len(pairs)),
        "metrics": len(values),
        "metrics_unequal": len(unequal),
        "metrics_relative": max(unequal.values(), default=0.0),
        "gradient_relative": ((exact - close).norm() / exact.norm()).item(),
        "adapter_most": max((a - adapters[1][name]).abs().max().item() for name, a in adapters[0].items() if a.numel()),
    }


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder, self.wrong, lines = folder, [], (Path(model_path("tiny")) / "held_out.jsonl").read_text()
        self.names = {"tasks": folder / "tasks.jsonl", "solutions": folder / "solutions.jsonl"}
        for name, flags in (("tasks", []), ("solutions", ["--solutions"])):
            command = [
                sys.executable,
                "-m",
                "azr.tasks",
                "make",
                "tiny",
                str(self.names[name]),
                "--count",
                "60",
                *flags,
            ]
            subprocess.run(command, cwd=HERE.parent, check=True, capture_output=True)
        rows = lines.splitlines()
        self.held_out = folder / "held_out.jsonl"
        self.held_out.write_text("\n".join(rows[0:3] + rows[700:703] + rows[1400:1403]) + "\n")

    def flags(self, out: Path, steps: int, more: str) -> list[str]:
        words = f"{SMALL} {more.format(**self.names)} --eval-samples 0 --eval-every 5 --eval-data {self.held_out}"
        return [*words.split(), "--steps", str(steps), "--out", str(out), "--resume", "auto"]

    def finish(self, count: int, out: Path, steps: int, more: str = "") -> list[float]:
        """CPU seconds of each process."""
        codes, seconds = processes(count, self.flags(out, steps, more), out.with_suffix(".log"))
        if any(codes):
            self.wrong.append(f"{out.name}: {count} processes ended with {codes}")
        return seconds

    def judged(self, name: str, row: dict) -> dict:
        if not row["samples"] or not row["gradient_relative"] <= MOST:
            self.wrong.append(f"{name}: {row}")
        return row

    def case(self, name: str) -> dict:
        steps, more = CASES[name]
        outs, result = {count: self.folder / f"{name}-{count}" for count in (1, 2, 3)}, {"steps": steps}
        for count, out in outs.items():
            seconds = self.finish(count, out, steps, more)
            result[count] = {"cpu_seconds": seconds}
            if count > 1:
                result[count] |= self.judged(out.name, compared(outs[1], out))
        return result

    def alone(self) -> Path:
        """The undisturbed run of one process that moves and disturbances are compared with."""
        out = self.folder / "lean-1"
        if not out.exists():
            self.finish(1, out, CASES["lean"][0])
        return out

    def moves(self) -> dict:
        out, steps = self.folder / "moves", CASES["lean"][0]
        for count, until in ((2, 3), (1, 6), (3, steps)):
            self.finish(count, out, until)
        return self.judged("moves", compared(self.alone(), out))

    def disturbed(self, name: str) -> dict:
        number, rank, count = DISTURBANCES[name]
        out, steps = self.folder / name, SHORT
        log = out.with_suffix(".log")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, "--child"]
        with open(log, "w") as file:
            launcher = subprocess.Popen(
                [*command, *self.flags(out, steps, "")], stdout=file, stderr=file, start_new_session=True
            )
        while (done := lines_of(out / "metrics.jsonl")) < 2 and launcher.poll() is None:
            time.sleep(0.02)
        target = launcher.pid if rank is None else int(out.with_suffix(f".{rank}").read_text())
        sent = time.monotonic()
        (os.killpg if number == signal.SIGINT else os.kill)(target, number)
        code = launcher.wait()
        row = {"signal": number.name, "rank": rank, "steps_done": done, "exit_code": code}
        row |= {"seconds_to_end": round(time.monotonic() - sent, 2), "saved": runs.newest_intact(out)[0].name}
        words = ("train_azr.py:", "go on with", "stopping", "warning: saved")
        row["lines"] = [line for line in log.read_text().splitlines() if any(word in line for word in words)]
        self.finish(count, out, steps)
        return row | {"went_on_with": count} | self.judged(name, compared(self.alone(), out))

    def evaluation(self) -> dict:
        """By 1, 2 and 3 processes, and by 3 that are disturbed and go on as others."""
        result, exact = {}, {}
        for name in ("1", "2", "3", *DISTURBANCES):
            out, row = self.folder / f"evaluation-{name}", {}
            flags, log = [*EVALUATION.split(), str(out)], out.with_suffix(".log")
            if name in DISTURBANCES:
                number, rank, count = DISTURBANCES[name]
                row = disturbed_evaluation(out, started(3, flags, log, eval_passk.main), number, rank)
            else:
                count = int(name)
            codes, row["cpu_seconds"] = processes(count, flags, log, eval_passk.main)
            files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.json*")}
            exact = exact or files
            result[name] = row | {"processes": count, "files": len(files), "equal": files == exact}
            print(name, result[name], file=sys.stderr, flush=True)
            if any(codes) or files != exact:
                self.wrong.append(f"evaluation {name}: {codes}, {result[name]}")
        return result


def disturbed_evaluation(out: Path, pids: list[int], number: signal.Signals, rank: int | None) -> dict:
    """How the processes end when one of them, or with None each, gets a signal in the middle of sampling."""
    while samples_in(out) < 100:
        time.sleep(0.02)
    sent = time.monotonic()
    for pid in pids if rank is None else [pids[rank]]:
        os.kill(pid, number)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    seconds = round(time.monotonic() - sent, 2)
    names = sorted(path.name for path in out.glob("T1/*.json*"))
    return {"exit_codes": codes, "seconds_to_end": seconds, "samples": samples_in(out), "between": names}


def samples_in(out: Path) -> int:
    """Lines that any process has written."""
    return sum(lines_of(path) for path in out.glob("T1/samples*.jsonl"))


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def child(flags: list[str]) -> int:
    """A rank that torchrun has started; its number is left where the parent looks for it."""
    small_start()
    Path(flags[flags.index("--out") + 1]).with_suffix(f".{os.environ['RANK']}").write_text(str(os.getpid()))
    return train_azr.main(flags)


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default=",".join([*CASES, "moves", *DISTURBANCES, "evaluation"]), help="names, with commas"
    )
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    parser.add_argument(
        "--simulate", metavar="N", type=int, help="1, 2, 4, ... N processes with pretended GPUs instead"
    )
    parser.add_argument("--computed", action="store_true", help="--simulate without processes: what needs none")
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--preset", choices=PRESETS, default="80gb")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import matplotlib.pyplot  # noqa: F401  what a run imports is imported once, before the forks
    import peft  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    small_start()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        if args.simulate:
            counts = [2**i for i in range(args.simulate.bit_length())]
            start = None if args.computed else processes
            result = simulated(counts, args.card, args.preset, args.steps, args.seed, start, Path(folder, "log"))
            print(text := json.dumps(result, indent=1))
            return Path(args.json).write_text(text + "\n") * 0 if args.json else 0
        bench, result = Bench(Path(folder)), {}
        for name in args.only.split(","):
            work = bench.case if name in CASES else bench.disturbed if name in DISTURBANCES else None
            result[name] = work(name) if work else {"moves": bench.moves, "evaluation": bench.evaluation}[name]()
            print(json.dumps({name: result[name]}, indent=1), flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
        for line in bench.wrong:
            print(line, file=sys.stderr)
        if bench.wrong:
            for log in sorted(Path(folder).glob("*.log")):
                print(f"--- {log.name}", *log.read_text().splitlines()[-15:], sep="\n", file=sys.stderr)
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
