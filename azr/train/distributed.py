"""Several processes as one run: `torchrun --nproc-per-node 4 train_azr.py ...`, or `accelerate launch`.

    sys.exit(together(lambda ranks: main(ranks)))     # ranks: of torchrun's environment, else this process alone
    results = ranks.shared(sandbox.run, jobs)         # each process does its share; all get all results, in order

Every rank runs the same program and holds the same samples, buffers and counters. Shared is what takes time: prompts
to sample (`Policy.generate`), programs to run (`Sandbox`), micro-batches to score and differentiate (`Policy.score`).
Nothing else knows of it, so neither the phases of train_azr.py nor the arms do.

Work is dealt in turn. Prompts come mode by mode, and the mode is what tells most of the length of a response, so that
each rank gets as many of each; micro-batches come longest first, as many tokens in each. The micro-batches are those
of one process, and their gradients are added in their order: N processes have the gradient of one, bit for bit where a
device gives the same bits twice. Rank 0 owns the run directory; the others write into a folder that goes with them.

Left out: sharded weights (each rank holds the whole base), ranks that come or go while the run lasts.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from azr.console import note
from azr.evals.score import Alone
from azr.policy.backoff import allocate_in_segments_that_grow, is_out_of_memory, rollout_sizes, set_rollout_sizes
from azr.policy.policy import Policy, Scored
from azr.runs import Run, RunError
from azr.stop import DUPLICATE_SECONDS, StopNow
from sandbox import Sandbox

ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets for each process
# Between ranks that sample, minutes; a process that died closes its connections, which the others see at once.
PATIENCE = timedelta(minutes=10)
# Numbers of a gradient that are sent at once, 64 MB: a second copy of all would cost as much as the first.
PIECE = 2**24
POLL = 0.0005  # seconds between two looks whether all have come: a signal is handled between them
LOOK = 0.1  # seconds between two looks whether another process has been stopped, where nothing else tells
GONE = "another process has ended; the same command goes on (train_azr.py: --resume auto), with any number of them"
LAST_WORDS = 40  # lines of what a rank other than 0 would have said, shown if it fails
TOLD = timedelta(seconds=1)  # that it waits for rank 0 to say the same
MIRRORED = ("eval", "probe.jsonl", "metrics.jsonl")  # of the run directory: what every rank reads


class Lost(RuntimeError):
    """Another process of the run has ended, or the processes no longer hold the same weights; one line. Exit code 1."""


class MemoryElsewhere(MemoryError):
    """Memory ran out on some rank: all repeat what they were at, with the same smaller sizes."""


class Ranks(Alone):
    """The processes of a run. By default this one alone: then nothing is sent, and everything is done here."""

    def __init__(self, rank: int = 0, world: int = 1, local_world: int = 1, store=None) -> None:
        super().__init__()
        self.rank, self.world, self.store, self.due = rank, world, store, 0.0
        # torchrun hands Ctrl-C on to processes that had it from the terminal, when it gets to it
        self.duplicate_seconds = DUPLICATE_SECONDS if world == 1 else 2.0
        # of the cores that this process may use, for the lanes of its sandbox; None: what a lone process takes
        self.workers = max(1, len(os.sched_getaffinity(0)) // local_world) if world > 1 else None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes the run directory and speaks."""
        return self.rank == 0

    def exchange(self, value, failed: bool = False) -> list:
        """The values of all ranks, in their order. MemoryElsewhere if one comes with `failed`, Lost if one is gone,
        StopNow if one was stopped. All ranks must come equally often."""
        if self.world == 1:
            return [value]
        # torch's all_gather_object, which pickles too, would wait where no signal comes through; the bytes are those of
        # this run's own processes, whose group nobody else is in
        data = torch.frombuffer(bytearray(pickle.dumps((failed, value))), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        self.wait(dist.all_gather(sizes, torch.tensor([len(data)]), async_op=True))
        rows = [torch.empty(int(max(sizes)), dtype=torch.uint8) for _ in range(self.world)]
        padded = torch.nn.functional.pad(data, (0, len(rows[0]) - len(data)))
        self.wait(dist.all_gather(rows, padded, async_op=True))
        messages = [pickle.loads(row.numpy().tobytes()) for row in rows]  # pickle stops where the padding begins
        if ranks := [rank for rank, (bad, _) in enumerate(messages) if bad]:
            raise MemoryElsewhere(f"out of memory on rank {', '.join(map(str, ranks))}")
        return [value for _, value in messages]

    def wait(self, work) -> None:
        """Until a collective is complete; unlike torch's own wait it lets signals through."""
        try:
            while not work.is_completed():
                time.sleep(POLL)
            work.wait()
        except RuntimeError as error:
            with suppress(RuntimeError):  # the store may be gone too
                self._check()
            raise Lost(GONE) from error

    def add(self, name: str, amount: int) -> int:
        """Adds to a counter of all ranks, 0 at first; the sum. StopNow, Lost as `exchange`."""
        if self.world == 1:
            return super().add(name, amount)
        try:
            if time.monotonic() > self.due:  # a second call to the store for each of many answers would cost as much
                self._check()
                self.due = time.monotonic() + LOOK
            return self.store.add(name, amount)
        except RuntimeError as error:
            raise Lost(GONE) from error

    def _check(self) -> None:
        if self.store.check(["stopped"]):
            raise StopNow("on another rank")

    def shared(self, work: Callable[[list], list], items: list) -> list:
        """work(items), a result for each item, where rank r does items r, r + N, ..."""
        if self.world == 1:
            return work(items)
        mine, results = items[self.rank :: self.world], [None] * len(items)
        for rank, part in enumerate(self.exchange(work(mine) if mine else [])):
            results[rank :: self.world] = part
        return results

    def agreed(self, work: Callable):
        """work(), in which ranks exchange. Where memory runs out on one, the others learn it at their next exchange."""
        try:
            return work()
        except MemoryElsewhere:
            raise
        except (RuntimeError, MemoryError) as error:
            if self.world > 1 and is_out_of_memory(error):
                self.exchange(None, failed=True)
            raise

    def ends_step(self, parameters: list[torch.Tensor], over: bool) -> bool:
        """What rank 0 says to `over`. Lost if the ranks do not hold the same weights any more."""
        if self.world == 1:
            return over
        # as integers: a sum whose order does not matter
        sums = [p.detach().flatten().view(torch.int16).sum(dtype=torch.int64) for p in parameters]
        said = self.exchange((torch.stack(sums).tolist(), over))
        if any(weights != said[0][0] for weights, _ in said):
            raise Lost("the processes came to different weights; are their GPUs and packages the same?")
        return said[0][1]


# ------------------------------------------------------------------------------------------------------ what is shared


class SharedPolicy(Policy):
    """A Policy whose calls are made by all ranks together, with the same arguments, and give all the same."""

    ranks: Ranks  # set once it is loaded

    def generate(self, prompt_ids, n, sampling, seeds, max_new_tokens=None, on_finish=None):
        """As Policy.generate; on_finish is told of this rank's share. Sizes that memory lowers on one rank are lowered
        on all."""
        limits = max_new_tokens or [sampling.max_new_tokens] * len(prompt_ids)

        def sample(part: list[tuple]) -> list:
            ids, seeds, limits = map(list, zip(*part))
            return super(SharedPolicy, self).generate(ids, n, sampling, seeds, limits, on_finish)

        rows = self.ranks.shared(sample, list(zip(prompt_ids, seeds, limits, strict=True)))
        every = self.ranks.exchange(rollout_sizes(self.engine))
        least = {name: min((x[name] for x in every if x[name]), default=None) for name in every[0]}
        if least["max_batch"] < every[0]["max_batch"]:
            note(f"memory ran out on another rank: {least['max_batch']} sequences at once from now on")
        set_rollout_sizes(self.engine, least)
        return rows

    def each(self, score, batches, with_grad):
        """Every micro-batch in order: one of N has a graph here, the others come as numbers. When the last has been
        taken, the gradient of all has been added to that of the parameters."""
        rank, world, total = self.ranks.rank, self.ranks.world, None
        parameters = self.trainable_parameters() if with_grad else []
        before, touched = [p.grad for p in parameters], set()  # of another adapter's micro-batches
        for p in parameters:
            p.grad = None
        for first in range(0, len(batches), world):
            turn = batches[first : first + world]
            mine = score(turn[rank]) if rank < len(turn) else None
            plain = mine and (mine.indices, *(x.detach().cpu().numpy() for x in mine[1:]))
            for owner, numbers in enumerate(self.ranks.exchange(plain)[: len(turn)]):
                if owner == rank:
                    yield mine
                else:
                    yield Scored(numbers[0], *(torch.from_numpy(x).to(self.device) for x in numbers[1:]))
            mine = None
            if with_grad:
                total = self._add(parameters, total, touched)
        whole = self._spread(parameters, total) if touched else before
        for i, (p, one, other) in enumerate(zip(parameters, before, whole)):
            p.grad = one if i not in touched else other if one is None else one + other

    def _add(self, parameters: list, total: torch.Tensor | None, touched: set[int]) -> torch.Tensor:
        """total (weights / N,) plus this rank's slice of the gradient of each rank, in their order: a reduce-scatter
        whose order is that of one process. Leaves the parameters without a gradient; `touched` gets the places of those
        that had one on some rank, since Adam moves one with a gradient of zeros and leaves one without."""
        world, touching = self.ranks.world, [i for i, p in enumerate(parameters) if p.grad is not None]
        rows = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
        rows.append(rows[0].new_zeros(-sum(map(len, rows)) % world))
        flat = torch.cat(rows).view(world, -1)
        total = flat.new_zeros(flat.shape[1]) if total is None else total
        del rows
        for p in parameters:
            p.grad = None
        # memory may have run out on some rank until here; what follows takes no more than the gradients have just left
        touched.update(*self.ranks.exchange(touching))
        for ours, theirs in zip(total.split(PIECE // world), flat.split(PIECE // world, 1)):
            theirs = theirs.contiguous()
            parts = torch.empty_like(theirs)
            self.ranks.wait(dist.all_to_all_single(parts, theirs, async_op=True))
            for part in parts:
                ours += part
        return total

    def _spread(self, parameters: list, total: torch.Tensor) -> list[torch.Tensor]:
        """The slices of all ranks put together, in the shapes of the parameters."""
        whole = total.new_empty(len(total) * self.ranks.world)
        self.ranks.wait(dist.all_gather(list(whole.chunk(self.ranks.world)), total, async_op=True))
        pieces = whole[: sum(p.numel() for p in parameters)].split([p.numel() for p in parameters])
        return [piece.view_as(p) for p, piece in zip(parameters, pieces)]


class SharedSandbox(Sandbox):
    """A Sandbox whose jobs are run by all ranks, each with its share of the cores; all get all outcomes."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks.workers, quiet=not ranks.leads)
        self.ranks = ranks

    def run(self, jobs):
        """As Sandbox.run."""
        return self.ranks.shared(super().run, list(jobs))

    def validate(self, jobs):
        """As Sandbox.validate."""
        return self.ranks.shared(super().validate, list(jobs))


class Follower(Run):
    """What a rank other than 0 writes to: a folder of its own. It reads the checkpoint where rank 0 reads it."""

    def follow(self, place: Path, resumed: bool, step: int) -> None:
        """Starts with what rank 0 has in `place`. RunError if this rank cannot see it."""
        if not place.is_dir():
            raise RunError(f"{place}: cannot be read by rank {os.environ['RANK']}; all machines must see --out")
        for path in (place / name for name in MIRRORED):
            if path.exists():
                copy = shutil.copytree if path.is_dir() else shutil.copyfile
                copy(path, self.dir / path.name)
        self.resumed, self.step = resumed, step
        self._checkpoint = place / "checkpoints" / f"step_{step}" if resumed else None

    def log_samples(self, samples):
        """Rank 0 does; nobody reads them here."""


@contextmanager
def open_run(ranks: Ranks, config, complete: Callable) -> Iterator[Run]:
    """`Run.open` on rank 0; a Follower of it on the others."""
    if ranks.leads:
        with Run.open(Path(config.out), asdict(config), config.resume, complete) as run:
            ranks.exchange((run.dir.resolve(), run.resumed, run.step))
            ranks.exchange(None)  # the others have copied what they need: it may change
            yield run
        return
    place = ranks.exchange(None)[0]
    with tempfile.TemporaryDirectory(prefix="azr-") as folder, Follower.open(Path(folder), asdict(config)) as run:
        run.follow(*place)
        ranks.exchange(None)
        yield run


# ------------------------------------------------------------------------------------------------- joining and leaving


def together(work: Callable[[Ranks], int], script: str = "train_azr.py", patience: timedelta = PATIENCE) -> int:
    """work(ranks), an exit code: with the processes that torchrun started, or alone. With several the process ends
    here: a process group that waits for a rank that is gone cannot be taken down. patience: of a rank that waits."""
    if any(name not in os.environ for name in ENVIRONMENT) or int(os.environ["WORLD_SIZE"]) < 2:
        return work(Ranks())
    try:
        ranks = join(patience)
    except (RuntimeError, ValueError) as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    shown = sys.stderr if ranks.leads else silence()
    try:
        code = work(ranks)
    except SystemExit as end:
        code = end.code or 0
    except Lost as error:
        print(f"{script}: {error}", file=sys.stderr)
        code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(ranks, code, shown, script)


def join(patience: timedelta) -> Ranks:
    """This process as one of the run's: its GPU, and the connections to the others. ValueError, RuntimeError."""
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if cuda := torch.cuda.is_available():
        if local_world > torch.cuda.device_count():
            raise ValueError(f"{local_world} processes on {torch.cuda.device_count()} GPUs; take --nproc-per-node gpu")
        allocate_in_segments_that_grow()
        torch.cuda.set_device(local)
    store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("azr", store),
        rank=rank,
        world_size=world,
        timeout=patience,
    )
    return Ranks(rank, world, local_world, store)


def silence() -> io.TextIOBase:
    """Sends nowhere what this process prints, but for what is written to the stream that is returned. sys.stderr keeps
    it, in case the process fails."""
    shown, nowhere = os.fdopen(os.dup(2), "w"), os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # libraries write there too
        os.dup2(nowhere, descriptor)
    sys.stdout, sys.stderr = open(os.devnull, "w"), io.StringIO()
    return shown


def leave(ranks: Ranks, code: int, shown: io.TextIOBase, script: str) -> NoReturn:
    """Ends this process, and tells the others why: they see a connection that closes, and look in the store."""
    with suppress(RuntimeError):  # the store may be gone
        if code == 0:
            ranks.store.set("stopped", "")  # or done, as the others are then
        elif ranks.leads:
            ranks.store.set("told", "")
    if code and not ranks.leads:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends those that are left, but not before this line
        try:
            ranks.store.wait(["told"], TOLD)  # most errors are those of all ranks: one line is enough
        except RuntimeError:
            lines = sys.stderr.getvalue().splitlines()
            last = lines[-1:] if lines[-1:] and lines[-1].startswith(script) else lines[-LAST_WORDS:]
            print(*(f"rank {ranks.rank}: {line}" for line in last), sep="\n", file=shown)
    for stream in (sys.stdout, sys.stderr, shown):
        stream.flush()
    os._exit(code)
