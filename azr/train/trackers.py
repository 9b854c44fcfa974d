"""Metrics of a run in Trackio, Weights & Biases or TensorBoard too: `train_azr.py --tracker trackio|wandb|tensorboard`.

    trackers.check("wandb")                                    # before anything is loaded; ValueError in one line
    tracker = trackers.open_tracker("wandb", run)              # a Run of azr/runs.py, opened
    tracker.log({"step": 3, "train/loss": 0.2})
    tracker.close()

metrics.jsonl stays the record; a tracker gets copies of its numbers. None that fails ends a run: one line says so, and
the run goes on without. A resumed run continues the same one: TensorBoard drops the steps after the checkpoint, wandb
and Trackio (which cannot) keep the first values they got; RUN/wandb.json and RUN/trackio.json have what tells the run
again. The packages are imported only if asked for.
Left out: samples, plots, checkpoints, system metrics.
"""

from __future__ import annotations

import importlib
import math
import netrc
import os
import sys
import uuid
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from urllib.parse import urlparse

from azr.console import note, warn
from azr.jsonl import read_object, write_json_atomic
from azr.runs import Run

NEEDS = {
    "trackio": "trackio",
    "wandb": "wandb",
    "tensorboard": "torch.utils.tensorboard",
}  # module; TensorBoard's package has its name
OFFLINE = ("offline", "dryrun", "disabled")


class Tracker:
    """Where a step's numbers go. `send(numbers, step)` and `finish()` are others' code: they may raise anything."""

    def __init__(self, name: str, send: Callable[[dict[str, float], int], None], finish: Callable[[], None]) -> None:
        self.name, self.send, self.finish = name, send, finish
        self.broken = False

    def log(self, metrics: dict) -> None:
        """What is a finite number of one step's metrics; the step itself orders them."""
        step = int(metrics["step"])
        numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        finite = {k: float(v) for k, v in numbers.items() if k != "step" and math.isfinite(v)}
        self._try(lambda: self.send(finite, step))

    def close(self) -> None:
        """Ends the tracker's run, unless it has failed before. An error becomes a warning."""
        self._try(self.finish)

    def _try(self, call: Callable[[], None]) -> None:
        if self.broken:
            return
        try:
            call()
        except Exception as error:  # a full disk, a lost network, a bug: not worth a run
            self.broken = True
            _give_up(self.name, error)


NONE = Tracker("none", lambda numbers, step: None, lambda: None)


def _give_up(name: str, error: Exception) -> None:
    reason = (str(error).strip().splitlines() or [""])[0]
    warn(f"--tracker {name} failed ({type(error).__name__}: {reason}); going on without it, metrics.jsonl has all")


def check(name: str) -> None:
    """ValueError if the tracker asked for cannot work: its package is missing, or nobody is logged in."""
    if name == "none":
        return
    try:
        importlib.import_module(NEEDS[name])
    except ImportError as error:
        raise ValueError(f"--tracker {name} needs the package {name} ({error}): pip install {name}") from error
    if name == "wandb" and os.environ.get("WANDB_MODE") not in OFFLINE and not logged_in():
        raise ValueError(
            "--tracker wandb: nobody is logged in; `wandb login`, or set WANDB_API_KEY, or keep the metrics "
            "here with WANDB_MODE=offline"
        )


def logged_in() -> bool:
    """Whether there is a key in the environment or, as `wandb login` leaves it, in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def open_tracker(name: str, run: Run) -> Tracker:
    """The tracker of an open run; one that does not start is said and left out, so that no resume hangs on it."""
    if name == "none":
        return NONE
    try:
        return {"trackio": open_trackio, "wandb": open_wandb, "tensorboard": open_tensorboard}[name](run)
    except Exception as error:  # as in Tracker
        _give_up(name, error)
        return NONE


def open_tensorboard(run: Run) -> Tracker:
    """Event files in RUN/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    # the events of steps that a resume does again are hidden
    writer = SummaryWriter(run.dir / "tensorboard", purge_step=run.step + 1 if run.resumed else None)

    def send(numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    note(f"tracker: tensorboard --logdir {run.dir / 'tensorboard'}")
    return Tracker("tensorboard", send, writer.close)


def open_trackio(run: Run) -> Tracker:
    """A run in the local project azr, or in the Space of TRACKIO_SPACE_ID; its name is in RUN/trackio.json."""
    import trackio

    path, project = run.dir / "trackio.json", os.environ.get("TRACKIO_PROJECT") or "azr"
    # two run directories of the same name are two runs: their names get some digits
    known = read_object(path) if path.exists() else {"name": f"{run.dir.name}-{uuid.uuid4().hex[:4]}", "step": 0}
    write_json_atomic(path, known)
    with redirect_stdout(sys.stderr):  # it greets in a dozen lines; stdout is the run's
        there = trackio.init(
            project=project,
            name=known["name"],
            config=run.config,
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def send(numbers: dict[str, float], step: int) -> None:
        if step > known["step"]:  # a step that a resume does again would be a second point of the same curve
            there.log(numbers, step=step)
            known["step"] = step
            write_json_atomic(path, known)

    note(f"tracker: trackio show --project {project}")

    def finish() -> None:
        with redirect_stdout(sys.stderr):
            there.finish()

    return Tracker("trackio", send, finish)


def open_wandb(run: Run) -> Tracker:
    """A run in the project azr (WANDB_PROJECT changes it); its files in RUN/wandb, its id in RUN/wandb.json."""
    import wandb

    path = run.dir / "wandb.json"
    if not path.exists():
        write_json_atomic(path, {"id": uuid.uuid4().hex[:8]})
    there = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or "azr",
        id=str(read_object(path)["id"]),
        name=run.dir.name,
        dir=str(run.dir),
        config=run.config,
        resume="allow",
        settings=wandb.Settings(silent=True, x_disable_stats=True),
    )
    note(f"tracker: wandb sync {Path(there.dir).parent}" if there.offline else f"tracker: {there.url}")
    return Tracker("wandb", lambda numbers, step: there.log(numbers, step=step), there.finish)
