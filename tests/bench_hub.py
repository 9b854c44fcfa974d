"""docs/jobs/hub_job.py on a hub that is a folder, fails and stalls: killed at many moments, each time on an empty disk.

    python tests/bench_hub.py --json FILE            20 kills, then a hub that never answers
    python tests/bench_hub.py --stall 2 --steps 40   what a step loses to uploads: runs by turns without and with them

A kill is SIGKILL to the job with all its processes, at one of four kinds of moments in turn: some seconds after its
start, some time after a step, in the middle of an upload, while a checkpoint is written. What comes after is a job in
an empty folder, which has what the hub has. The last one is left alone; what the hub holds then is compared with an
undisturbed run: metrics, samples and the last adapter, byte for byte. Of ten uploads three are refused and two take
eight seconds more; one that is interrupted leaves the hub as it was, as a commit does. Exit code 1: a difference.

Left out: the real hub, its client, whose part of the work is done by STAND_IN here, and a token.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ["OMP_NUM_THREADS"] = "1"

import torch

import train_azr
from azr.models import model_path
from azr.train import loop

SMALL = "--prompts-per-mode 4 --answers 4 --max-new-tokens 64 --token-budget 1024 --save-every 1 --eval-every 10"
KINDS = ("start", "step", "upload", "checkpoint")
SECONDS = {"start": 20.0, "step": 2.0, "upload": 0.2, "checkpoint": 0.02}  # a kill comes so much later, at most
PATIENCE = 240  # seconds until a moment that does not come is given up, and the job killed then
STAND_IN = """
import json, os, random, shutil, time
from pathlib import Path
from huggingface_hub import errors

HUB = Path(os.environ["HUB"])

class HfApi:
    def create_repo(self, repo, private, exist_ok):
        HUB.mkdir(exist_ok=True)

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
        number = len(list(HUB.glob("commit-*")))
        new, chance, start = HUB / f"commit-{number}", random.random(), time.time()
        new.mkdir()
        (HUB / "uploading").touch()
        try:
            if os.environ.get("HANGS"):
                time.sleep(10**6)
            if chance < 0.3:
                raise OSError("503 Service Unavailable")
            if chance < 0.5:
                time.sleep(8)
            for path in sorted(Path(folder_path).rglob("*")):
                target = new / path.relative_to(folder_path)
                target.mkdir() if path.is_dir() else shutil.copyfile(path, target)
                time.sleep(0.02)
            (HUB / "new").symlink_to(new)
            os.replace(HUB / "new", HUB / "head")
        finally:
            (HUB / "uploading").unlink()
            with open(HUB / "uploads.jsonl", "a") as file:
                file.write(json.dumps({"start": start, "end": time.time(), "refused": chance < 0.3}) + "\\n")

def snapshot_download(repo, local_dir):
    if not (HUB / "head").exists():
        raise errors.RepositoryNotFoundError(repo)
    shutil.copytree(HUB / "head", local_dir)
"""


class Fork:
    """What hub_job.py needs of subprocess.Popen, with the training as a fork of this process, which has imported what
    it needs: of what a job takes, imports would be the most."""

    def __init__(self, command: list[str]) -> None:
        self.code, self.pid = None, os.fork()
        if not self.pid:
            sys.modules.update(REAL)
            subprocess.Popen = POPEN  # for the lanes of the sandbox
            leave(lambda: train_azr.main(command[2:]))

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.code


POPEN, REAL = subprocess.Popen, {}  # of this process


def leave(work) -> None:
    """Ends this process, a fork, with what work() returns."""
    code = 3
    try:
        code = work()
    finally:
        sys.stdout.flush()
        os._exit(code)


class Job(Fork):
    """hub_job.py in an empty folder, in a session of its own, with the stand-in as its client of the hub."""

    def __init__(self, place: Path, client: Path, flags: list[str], environment: dict[str, str]) -> None:
        place.mkdir()
        self.code, self.pid = None, os.fork()
        if self.pid:
            return
        os.setsid()
        os.chdir(place)
        os.environ.update(environment)
        descriptor = os.open(place.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        random.seed(str(place))
        REAL.update({name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("huggingface_hub")})
        sys.path.insert(0, str(client))
        subprocess.Popen = Fork
        script = runpy.run_path(str(HERE.parent / "docs" / "jobs" / "hub_job.py"))
        sys.path.pop(0)
        leave(lambda: script["main"]("you/run", flags))

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()


class Bench:
    """A folder with the hub, and jobs in folders beside it."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps, self.held_out = folder, steps, folder / "held_out.jsonl"
        package = folder / "client" / "huggingface_hub"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(STAND_IN)
        (package / "errors.py").write_text("class RepositoryNotFoundError(Exception):\n    pass\n")
        rows = (Path(model_path("tiny")) / "held_out.jsonl").read_text().splitlines()
        self.held_out.write_text("\n".join(rows[0:3] + rows[700:703] + rows[1400:1403]) + "\n")

    def flags(self) -> list[str]:
        return f"{SMALL} --eval-samples 0 --eval-data {self.held_out} --steps {self.steps}".split()

    def job(self, number: int, hub: Path, **environment: str) -> tuple[Job, Path]:
        """Starts one; its run directory."""
        place = self.folder / f"job-{number}"
        names = {"HUB": str(hub), "COMMAND": sys.executable, "TRAIN": "train_azr.py", "UPLOAD_MINUTES": "0.02"}
        return Job(place, self.folder / "client", self.flags(), names | environment), place / "run"

    def killed(self, number: int, kind: str, rng: random.Random, hub: Path) -> dict:
        """A job that is killed at a moment of this kind; what there was then."""
        job, run = self.job(number, hub)
        start = time.monotonic()

        def wait(condition) -> None:
            while not condition() and job.poll() is None and time.monotonic() - start < PATIENCE:
                time.sleep(0.001)

        def there() -> bool:
            return (hub / "uploading").exists() if kind == "upload" else any(run.glob("checkpoints/*.tmp*"))

        wanted = rng.choice((1, 2))
        if kind != "start":
            wait((run / "lock").exists)  # the training looks at what it got
        if kind == "step":
            wanted += lines(run / "metrics.jsonl")
            wait(lambda: lines(run / "metrics.jsonl") >= wanted)
        elif kind != "start":
            for _ in range(wanted):
                wait(lambda: not there())
                wait(there)
        time.sleep(rng.random() * SECONDS[kind])
        row = {"kind": kind, "ended": job.poll(), "seconds": round(time.monotonic() - start, 1)}
        job.kill()
        (hub / "uploading").unlink(missing_ok=True)
        (hub / "new").unlink(missing_ok=True)
        row |= {"steps_there": lines(run / "metrics.jsonl"), "steps_on_the_hub": lines(hub / "head" / "metrics.jsonl")}
        shutil.rmtree(run.parent)  # the disk is gone
        return row


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def metrics(run: Path, of_the_machine: bool = False) -> list[dict]:
    """Of every step, what can be reproduced, or all the rest."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.startswith(("time/", "memory/")) == of_the_machine} for row in rows]


def differences(one: Path, other: Path, steps: int) -> list[str]:
    """What of the two runs is not the same."""
    wrong = []
    if metrics(one) != metrics(other):
        wrong.append("metrics.jsonl")
    for name in ("samples.jsonl", "probe.jsonl", f"checkpoints/step_{steps}/adapter_model.safetensors"):
        if (one / name).read_bytes() != (other / name).read_bytes():
            wrong.append(name)
    return wrong


def steps_in(run: Path, uploads: list[dict]) -> dict:
    """Seconds of a step, median and longest."""
    times = [row["time/step"] for row in metrics(run, True)]
    return {"steps": len(times), "median": statistics.median(times), "longest": max(times), "uploads": len(uploads)}


def stalls(bench: Bench, rounds: int) -> dict:
    """Seconds of every step that samples and trains alone (no evaluation), by turns without a hub and as its job, whose
    uploads follow each other by a second; how many of them there were."""
    found: dict[str, list[float]] = {"alone": [], "with uploads": []}
    uploads = 0
    for number in range(rounds):
        alone, hub = bench.folder / f"alone-{number}", bench.folder / f"hub-{number}"
        Fork([sys.executable, "train_azr.py", *bench.flags(), "--out", str(alone)]).wait()
        job, _ = bench.job(number, hub)
        job.wait()
        uploads += lines(hub / "uploads.jsonl")
        for name, run in (("alone", alone), ("with uploads", hub / "head")):
            rows = metrics(run, True)[1:]  # the first step makes Adam's moments and warms caches
            found[name] += [row["time/step"] - row.get("time/evaluate", 0.0) for row in rows]
    figures = {name: {"median": statistics.median(x), "longest": max(x), "steps": len(x)} for name, x in found.items()}
    return figures | {"uploads": uploads}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stall", type=int, default=0, metavar="ROUNDS", help="only what a step loses to uploads")
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    args = parser.parse_args()
    import matplotlib.pyplot  # noqa: F401  what a run imports is imported once, before the forks
    import peft  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    loop.PROBE, loop.SEED_ROUNDS, rng = 2, 2, random.Random(args.seed)  # a short beginning
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hub-") as name:
        folder = Path(name)
        bench, hub, alone = Bench(folder, args.steps), folder / "hub", folder / "alone"
        if args.stall:
            print(json.dumps(stalls(bench, args.stall), indent=1))
            return 0
        # not in this process: torch's threads, once started, are no good in a fork
        Fork([sys.executable, "train_azr.py", *bench.flags(), "--out", str(alone)]).wait()
        result = {"undisturbed": steps_in(alone, []), "kills": []}
        for number in range(args.kills):
            row = bench.killed(number, KINDS[number % len(KINDS)], rng, hub)
            result["kills"].append(row)
            print(row, file=sys.stderr, flush=True)
        job, _ = bench.job(args.kills, hub)
        result["last_exit_code"] = job.wait()
        uploads = [json.loads(line) for line in (hub / "uploads.jsonl").read_text().splitlines()]
        result["refused"] = sum(upload["refused"] for upload in uploads)
        result["with_hub"] = steps_in(hub / "head", uploads)
        result["differences"] = differences(alone, hub / "head", args.steps)
        # a hub that never answers: the training ends all the same, before the first upload has
        job, run = bench.job(args.kills + 1, folder / "hanging", HANGS="1")
        while not (run / "checkpoints" / f"step_{args.steps}").exists() and job.poll() is None:
            time.sleep(0.1)
        result["hanging"] = {"steps": lines(run / "metrics.jsonl"), "uploads": lines(folder / "hanging/uploads.jsonl")}
        job.kill()
    print(text := json.dumps(result, indent=1))
    if args.json:
        Path(args.json).write_text(text + "\n")
    return 1 if result["differences"] or result["last_exit_code"] or result["hanging"]["steps"] < args.steps else 0


if __name__ == "__main__":
    sys.exit(main())
