"""The run directory: configuration, metrics, samples, checkpoints and resume of one training run.

    with Run.open(Path("runs/tiny-0"), config, resume="auto") as run:
        if run.resumed: tensors, state, path = run.load_checkpoint()
        run.log({"step": 1, "train/loss": 0.3})             # the first step's line says 1; 0 is "before training"
        run.save_checkpoint(1, policy.save_adapter, tensors, state, info, keep=True)

The directory is the only state and the process can die at any instant. A checkpoint is written aside, synced, and
renamed; what a resume finds is the newest one whose checksums hold; log lines that are newer than it are cut off, so a
resumed run writes the same lines again. One process at a time holds the directory (an advisory lock, freed by the
kernel when the process dies).

Left out: copies to a bucket or hub, and any pickle: tensors are safetensors, all else is JSON (keys become strings).
torch is imported only to write or read a checkpoint. The file knows nothing of tasks; with azr/jsonl.py, which it
reads and writes with, it can be lifted out, so what it says goes to stderr by itself.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .jsonl import plain, read_object, sync, tolerant_lines, write_json_atomic

if TYPE_CHECKING:
    from torch import Tensor

# Settings that cannot change what a step computes, but for roundings, so a resume may be given other values. The last
# three say where something lies; whether it is the same is seen by its content.
RESUME_MAY_CHANGE = frozenset(
    "steps max_hours price_per_hour save_every eval_every eval_samples out resume dry_run tracker allow_cpu "
    "rollout_weights model data off_policy_source".split()
)
KEEP_STATES = 2  # the newest checkpoints that keep what a resume needs
SCRIPT = "train_azr.py"  # what the commands say that go on with a run
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
LOGS = ("metrics.jsonl", "samples.jsonl")
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")  # of a checkpoint: an adapter's, or a whole model's
UNDER_WAY = re.compile(r"lock|config\.json\.tmp-\d+")  # all that a start killed in its first instants leaves
STEP_DIRECTORY = re.compile(r"step_(\d+)")
LINE_STEP = re.compile(rb'\{"step": (\d+)[,}]')  # log lines start with their step: a cut need not parse gigabytes
VERSIONS_OF = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "tokenizers", "numpy", "flash-attn")


class RunError(ValueError):
    """One clear line: what is wrong with a run directory and what to do. A script prints it and exits 2."""


class DiskError(RunError):
    """The disk is full or refuses to be written; the line names the last good checkpoint. A script exits 1."""


def say(text: str) -> None:
    """One loud line on stderr."""
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- reading a run


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl, as `read_samples` reads them."""
    return list(read_samples(run_dir, "metrics.jsonl"))


def read_samples(run_dir: Path, name: str = "samples.jsonl") -> Iterator[dict]:
    """The lines of a log one by one (they can be gigabytes); what is damaged is left out, which is said once. RunError
    if there is no such file."""
    path = Path(run_dir) / name
    if not path.is_file():
        raise RunError(f"{path}: no such file; {path.parent} is not a run directory or has not logged anything yet")
    notes: list[str] = []
    others = 0
    for row in tolerant_lines(path, notes):
        if isinstance(row.get("step"), int):
            yield row
        else:
            others += 1
    for note in notes + [f"{name}: {others} line(s) have no step: left out"] * bool(others):
        say(f"warning: {path.parent}: {note}")


# ---------------------------------------------------------------- checkpoints on disk


def step_directories(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of the finished checkpoints, oldest first; adapters whose state was pruned included."""
    parent = Path(run_dir) / "checkpoints"
    matches = [(STEP_DIRECTORY.fullmatch(path.name), path) for path in parent.iterdir()] if parent.is_dir() else []
    return sorted((int(match[1]), path) for match, path in matches if match)


def weights_of(checkpoint: Path) -> Path | None:
    """The file with the trained weights of a checkpoint, an adapter's or a whole model's; None if it has none."""
    return next((file for name in WEIGHTS if (file := checkpoint / name).is_file()), None)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file has the size and SHA-256 it was written with."""
    try:
        sums = json.loads((checkpoint / "state" / "checksums.json").read_text())
        for name, entry in sums.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if _sha256(path) != entry["sha256"]:
                return f"{name} has another checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its checksums cannot be read ({error})"
    return None


def newest_intact(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be resumed, and what is wrong with each newer one."""
    faults = []
    for _, path in reversed(step_directories(run_dir)):
        if not (path / "state" / "checksums.json").exists():
            continue  # an adapter that was kept without its state
        wrong = fault(path)
        if wrong is None:
            return path, faults
        faults.append(f"{path}: {wrong}")
    return None, faults


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_state(directory: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """state/ of a checkpoint; the checksums come last and cover every file of the checkpoint."""
    from safetensors.torch import save_file

    folder = directory / "state"
    folder.mkdir()
    # A clone drops what safetensors refuses: shared storage and views of something larger.
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
        folder / "tensors.safetensors",
    )
    (folder / "state.json").write_text(json.dumps(plain(state, "state", finite=False)), encoding="utf-8")
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sums = {str(path.relative_to(directory)): {"sha256": _sha256(path)} for path in files}
    (folder / "checksums.json").write_text(json.dumps(sums, indent=2))
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def _cut(path: Path, step: int) -> int:
    """Cuts off a log what follows its last whole line of `step` or an earlier one; returns how many bytes went.

    A damaged line before that stays: readers leave it out and say so.
    """
    offset = end = 0
    with open(path, "rb") as file:
        for line in file:
            offset, match = offset + len(line), LINE_STEP.match(line)
            if match and line.endswith(b"}\n") and int(match[1]) <= step:
                end = offset
    if end < offset:
        os.truncate(path, end)
        sync(path)
    return offset - end


def hold(directory: Path) -> TextIO:
    """The file lock of a directory, for this process alone until it is closed: two that write there would mix what they
    write. RunError if another process has it; OSError."""
    lock = open(directory / "lock", "a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            lock.seek(0)
            with lock:
                holder = lock.read().strip() or "unknown"
            raise RunError(f"{directory}: process {holder} is writing there; stop it first") from error
        say(f"warning: {directory}: this file system has no locks ({error}); run one process only in this directory")
        return lock
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


# ---------------------------------------------------------------- the run


class Run:
    """One run directory, held by this process. Attributes: `dir`, `config`, `step` (steps completed), `resumed`."""

    def __init__(self, directory: Path, config: dict) -> None:
        self.dir, self.config = directory, plain(config, "config")
        self.step, self.resumed = 0, False
        self._checkpoint: Path | None = None  # the one to resume from
        self._lock, self._files = None, {}

    @classmethod
    def open(cls, out: Path, config: dict, resume: str = "none", complete: Callable[[dict], dict] = dict) -> Run:
        """Starts or continues a run.

        resume "none": `out` must be absent or empty. "auto": continues the newest intact checkpoint of `out`; without
        any it starts afresh, and says so. Else a run directory to continue (instead of `out`): it must hold a run,
        which starts afresh if it was stopped before its first checkpoint. complete: the stored settings with those
        that did not exist when the run began.
        RunError, and nothing is changed: `out` holds something else, is held by another process, was started with
        other settings (RESUME_MAY_CHANGE may differ), or has only broken checkpoints.
        """
        out = Path(out) if resume in ("auto", "none") else Path(resume)
        run = cls(out, {**config, "out": str(out)} if "out" in config else config)
        holds = run._look(resume)
        try:
            out.mkdir(parents=True, exist_ok=True)
            run._lock = hold(out)
            if holds:
                run._continue(complete)
            elif resume == "auto":
                say(f"resume: {out} holds no run yet, starting from step 0")
            write_json_atomic(out / "config.json", run.config)
            (out / "checkpoints").mkdir(exist_ok=True)
            for stale in [*out.glob("*.tmp-*"), *out.glob("checkpoints/*.tmp-*")]:
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            # Unbuffered: a line is one write, so a kill tears at most the last one.
            run._files = {name: open(out / name, "ab", buffering=0) for name in LOGS}
        except (OSError, RunError) as error:
            run.close()
            if isinstance(error, RunError):
                raise
            raise RunError(f"{out}: cannot be a run directory ({error})") from error
        return run

    @classmethod
    def check(cls, out: Path, resume: str = "none") -> None:
        """RunError if `open` would refuse the directory by what is in it; touches nothing. For before a slow start."""
        cls(Path(out) if resume in ("auto", "none") else Path(resume), {})._look(resume)

    def _look(self, resume: str) -> bool:
        """Whether there is a run to continue; RunError for what is not one. Changes nothing."""
        place = next(path for path in (self.dir.absolute(), *self.dir.absolute().parents) if path.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise RunError(f"{self.dir}: cannot be a run directory ({place} is no directory that can be written to)")
        holds = self.dir.is_dir() and not all(UNDER_WAY.fullmatch(path.name) for path in self.dir.iterdir())
        if resume == "none":
            if holds:
                raise RunError(f"{self.dir}: is not empty; continue with --resume auto, or choose another --out")
            return False
        if holds and not (self.dir / "config.json").is_file():
            up = self.dir.absolute().parent  # a checkpoint lies in RUN/checkpoints
            hint = f"; its run is {up.parent}" if up.name == "checkpoints" else ""
            raise RunError(f"{self.dir}: is not a run directory (it has files but no config.json){hint}")
        if not holds and resume != "auto":
            raise RunError(f"{self.dir}: there is no run to resume; --resume takes a run directory, auto or none")
        return holds

    def _continue(self, complete: Callable[[dict], dict]) -> None:
        """Finds the checkpoint to resume from and takes the logs back to it."""
        checkpoint, faults = newest_intact(self.dir)
        if checkpoint is None:
            if faults or step_directories(self.dir):
                reason = "; ".join(faults) or "no checkpoint with a state"
                raise RunError(f"{self.dir}: nothing to resume from ({reason}); start a new run with --out")
            say(f"resume: {self.dir} has no checkpoint yet, starting again from step 0")
        else:
            self._compare(read_object(self.dir / "config.json", RunError), complete)
            self._checkpoint, self.resumed = checkpoint, True
            self.step = int(STEP_DIRECTORY.fullmatch(checkpoint.name)[1])
        logs = [self.dir / name for name in LOGS if (self.dir / name).exists()]
        went = sum(_cut(path, self.step if checkpoint else -1) for path in logs)
        for wrong in faults:
            say(f"warning: broken checkpoint, going on from {checkpoint}: {wrong}")
        for step, path in step_directories(self.dir):
            if step > self.step:  # broken: out of the way of the one that will be written again
                shutil.rmtree(path.with_name(f"{path.name}.broken"), ignore_errors=True)
                os.rename(path, path.with_name(f"{path.name}.broken"))
        if checkpoint:
            say(f"resume: {checkpoint}" + (f"; cut {went} bytes of newer log lines" if went else ""))

    def _compare(self, stored: dict, complete: Callable[[dict], dict]) -> None:
        """RunError if the run was started with other settings; what it could not have had counts as the default."""
        completed = complete(stored)
        if new := [f"{name} {completed[name]}" for name in completed if name not in stored]:
            say(f"resume: {self.dir} is from before these settings, at their defaults now: {', '.join(new)}")
        missing, names = "(absent)", sorted({*completed, *self.config} - RESUME_MAY_CHANGE)
        pairs = [(name, completed.get(name, missing), self.config.get(name, missing)) for name in names]
        if changes := [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]:
            raise RunError(
                f"{self.dir}: cannot resume with other settings ({'; '.join(changes)}); repeat the old ones "
                f"({self.command()}), or start a new run with --out"
            )

    def command(self) -> str:
        """What to type to go on with this run."""
        # as it was started: there may be no `python`, and the script need not lie where the command was typed
        words, script = sys.orig_argv, sys.argv[0]
        # also a script that gives train_azr.py an arm of its own: without it the run would silently go on as another
        typed = script.endswith(".py") and script in words
        return shlex.join(
            [*(words[: words.index(script) + 1] if typed else ["python", SCRIPT]), "--resume", str(self.dir)]
        )

    def close(self) -> None:
        """Frees the files and the lock; the run can be opened again."""
        for file in [*self._files.values(), self._lock]:
            if file:
                file.close()
        self._files, self._lock = {}, None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()
        if isinstance(error, OSError) and error.errno in DISK:  # of whatever else writes into the run
            raise self._disk_error(f"writing {error.filename or 'a file'}", error) from error

    # -------- logs

    def log(self, metrics: dict) -> None:
        """Appends one line to metrics.jsonl: flat keys, among them "step" (written first). NaN and infinities: null."""
        self._append("metrics.jsonl", [metrics])

    def log_samples(self, samples: list[dict]) -> None:
        """Appends to samples.jsonl, one line a sample, each with its "step"."""
        self._append("samples.jsonl", samples)

    def _append(self, name: str, rows: list[dict]) -> None:
        rows = [{"step": 0} | plain(row, name) | {"step": int(row["step"])} for row in rows]
        data = memoryview("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode("ascii"))
        try:
            while data:  # a raw write may take a part, on a nearly full disk
                data = data[self._files[name].write(data) :]
        except OSError as error:
            raise self._disk_error(f"writing {name}", error) from error

    # -------- checkpoints

    def save_checkpoint(
        self,
        step: int,
        save_adapter: Callable[[Path], None],
        tensors: dict[str, Tensor],
        state: dict,
        info: dict,
        keep: bool = False,
    ) -> Path:
        """Writes checkpoints/step_N, then prunes; returns its path.

        `save_adapter(directory)` writes the PEFT files, `info` becomes azr.json, `tensors` and `state` (JSON types)
        are what a resume needs. keep: the adapter stays for good (only its state/ is pruned); without it the
        checkpoint goes once two newer ones exist. A step that has its checkpoint is not written again: its state
        cannot differ. DiskError on a full disk or another write error: no trace of it stays, older ones are whole.
        """
        final = self.dir / "checkpoints" / f"step_{step}"
        aside = final.with_name(f"{final.name}.tmp-{os.getpid()}")
        try:
            from safetensors import SafetensorError  # its writer reports a full disk this way, not as OSError

            if not (final / "state" / "checksums.json").exists():
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                save_adapter(aside)
                (aside / "azr.json").write_text(json.dumps(plain(info, "azr.json"), indent=2) + "\n", encoding="utf-8")
                if keep:
                    (aside / "keep").touch()  # in the same rename: a kill in between would lose the mark
                _write_state(aside, tensors, state)
                for file in self._files.values():  # the logs are never behind a checkpoint
                    os.fsync(file.fileno())
                os.rename(aside, final)
                sync(final.parent)
            elif keep:
                (final / "keep").touch()
        except (OSError, SafetensorError) as error:
            raise self._disk_error(f"writing checkpoint {step}", error) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self.step, self._checkpoint = step, final
        self._prune()
        return final

    def _prune(self) -> None:
        paths = [path for _, path in step_directories(self.dir) if (path / "state").exists()]
        newest = [path for path in paths if (path / "state" / "checksums.json").exists()][-KEEP_STATES:]
        try:
            for path in paths:
                if path in newest:
                    continue
                if (path / "keep").exists():
                    # Checksums first: without them it is an adapter without state, not a broken checkpoint.
                    (path / "state" / "checksums.json").unlink(missing_ok=True)
                    shutil.rmtree(path / "state")
                else:  # out of sight first: a kill half-way must leave nothing that looks like a checkpoint
                    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
                    os.rename(path, aside)
                    shutil.rmtree(aside)
        except OSError as error:
            say(f"warning: old checkpoints could not be pruned ({error})")

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict, Path]:
        """(tensors on the CPU, state, directory) of the checkpoint that `open` found intact; RunError if none."""
        if self._checkpoint is None:
            raise RunError(f"{self.dir}: has no checkpoint to load")
        from safetensors.torch import load_file

        tensors = load_file(self._checkpoint / "state" / "tensors.safetensors")
        return tensors, read_object(self._checkpoint / "state" / "state.json", RunError), self._checkpoint

    def _disk_error(self, what: str, error: Exception) -> DiskError:
        good, _ = newest_intact(self.dir)
        remedy = f"the last good checkpoint is {good}, go on with" if good else "there is no checkpoint yet, begin with"
        return DiskError(f"{self.dir}: {what} failed ({error}), make room on the disk; {remedy}: {self.command()}")

    # -------- environment

    def environment(self, **more: Any) -> dict:
        """Writes environment.json: versions, machine, commit, and `more` (sandbox state, attention, ...); returns it.

        On a resume the earlier ones stay under "previous", and a changed version is said: it can change the numbers.
        """
        path, now = self.dir / "environment.json", plain({**describe_environment(), "step": self.step, **more})
        if path.exists():
            try:
                earlier = read_object(path, RunError)
            except RunError as error:  # nothing that is computed depends on it
                say(f"warning: {error}: written anew")
                earlier = {}
            now["previous"] = [*earlier.pop("previous", []), earlier]
            before, after = earlier.get("versions", {}), now["versions"]
            if changed := [
                f"{name} {before.get(name)} -> {after[name]}" for name in after if before.get(name) != after[name]
            ]:
                say(f"warning: resumed with other versions, the numbers may differ: {', '.join(changed)}")
        write_json_atomic(path, now)
        return now


def describe_environment() -> dict:
    """Versions (None: not installed), commit of the code ("-dirty" if tracked files differ from it), platform, CPUs,
    GPU. Imports nothing that is not loaded."""
    versions = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 10}
    try:
        commit = subprocess.check_output(describe, cwd=Path(__file__).parent, text=True, **quiet).strip()
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout
        commit = None
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    return {
        "versions": versions,
        "git": commit,
        "platform": platform.platform(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "threads": torch.get_num_threads() if torch is not None else None,
        "command": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
