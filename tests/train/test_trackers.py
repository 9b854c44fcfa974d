"""Trackers: what is sent, under which step, and that none of them can hurt a run. The real packages where they are."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from azr.runs import Run, RunError
from azr.train import trackers
from azr.train.config import Config

ROOT = Path(__file__).parents[2]
CONFIG = {"model": "tiny", "seed": 3, "steps": 4, "tracker": "none"}
ROW = {
    "step": 2,
    "train/loss": 0.5,
    "buffer/size": 7,
    "train/nan": math.nan,
    "x/none": None,
    "text": "no",
    "flag": True,
}


def open_run(path, resume="none", **more):
    return Run.open(path, {**CONFIG, **more}, resume)


def steps(run, last):
    for step in range(run.step + 1, last + 1):
        run.log({"step": step})
        yield step
        adapter = lambda directory: (directory / "a").write_text("a")  # noqa: E731
        run.save_checkpoint(step, adapter, {}, {}, {}, keep=True)


def test_numbers_only_and_their_step():
    sent, ended = [], []
    tracker = trackers.Tracker("x", lambda numbers, step: sent.append((numbers, step)), lambda: ended.append(1))
    tracker.log(ROW)
    tracker.close()
    assert sent == [({"train/loss": 0.5, "buffer/size": 7.0}, 2)] and ended == [1]


def test_one_that_fails_is_said_once_and_left_out(capsys):
    def send(numbers, step):
        raise OSError("No space left on device")

    tracker = trackers.Tracker("wandb", send, send)
    for step in (1, 2):
        tracker.log({"step": step})
    tracker.close()
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "No space left" in said[0] and "going on" in said[0]


def test_one_that_does_not_start_is_said_and_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # what an import of a missing package meets
    with open_run(tmp_path / "r") as run:
        assert trackers.open_tracker("tensorboard", run) is trackers.NONE
    assert "going on" in capsys.readouterr().err


def test_a_missing_package_is_refused_before_anything_begins(tmp_path, monkeypatch, capsys):
    import train_azr

    trackers.check("none")
    for name, module in trackers.NEEDS.items():
        monkeypatch.setitem(sys.modules, module, None)
        out = tmp_path / name
        assert train_azr.main(["--tracker", name, "--out", str(out), "--steps", "1"]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and f"pip install {name}" in said[0] and not out.exists()


def test_nobody_logged_in_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", sys)  # any module: it is not used before the login is known
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ValueError, match="WANDB_MODE=offline"):
        trackers.check("wandb")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    trackers.check("wandb")
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check("wandb")


def test_a_run_may_change_its_tracker(tmp_path):
    with open_run(tmp_path / "r") as run:
        list(steps(run, 1))
    with open_run(tmp_path / "r", "auto", tracker="tensorboard") as run:
        assert run.resumed
    with pytest.raises(RunError):
        open_run(tmp_path / "r", "auto", seed=4)
    assert Config().tracker == "none"


def test_nothing_is_imported_that_was_not_asked_for():
    code = "import sys, train_azr; sys.exit(any(m in sys.modules for m in ('wandb', 'tensorboard')))"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        == 0
    )


# ---------------------------------------------------------------- the real ones


def test_tensorboard_hides_what_a_resume_does_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers.check("tensorboard")
    with open_run(tmp_path / "r") as run:
        tracker = trackers.open_tracker("tensorboard", run)
        for step in steps(run, 2):
            tracker.log({"step": step, "train/loss": 1 / step})
        tracker.log({"step": 3, "train/loss": -1})  # no checkpoint: a kill takes it back
    with open_run(tmp_path / "r", "auto") as run:
        assert run.step == 2
        tracker = trackers.open_tracker("tensorboard", run)
        for step in steps(run, 4):
            tracker.log({"step": step, "train/loss": 1 / step})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, round(event.value, 4)) for event in events] == [(n, round(1 / n, 4)) for n in (1, 2, 3, 4)]


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check("wandb")
    for resume, last in (("none", 2), ("auto", 3)):
        with open_run(tmp_path / "r", resume) as run:
            tracker = trackers.open_tracker("wandb", run)
            assert tracker is not trackers.NONE
            for step in steps(run, last):
                tracker.log({"step": step, "train/loss": 1 / step})
            tracker.close()
            assert not tracker.broken
    identity = json.loads((tmp_path / "r" / "wandb.json").read_text())["id"]
    runs = list((tmp_path / "r" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(path.name.endswith(identity) for path in runs)


def test_trackio_goes_on_with_the_same_run_and_takes_no_step_twice(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "store", raising=False)
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "store")
    trackers.check("trackio")
    for resume, last in (("none", 2), ("auto", 4)):
        with open_run(tmp_path / "r", resume) as run:
            tracker = trackers.open_tracker("trackio", run)
            assert tracker is not trackers.NONE
            for step in steps(run, last):
                tracker.log({"step": step, "train/loss": 1 / step})
            if resume == "none":
                tracker.log({"step": 3, "train/loss": -1})  # no checkpoint: the resumed run does it again
            tracker.close()
            assert not tracker.broken
    name = json.loads((tmp_path / "r" / "trackio.json").read_text())["name"]
    [stored] = trackio.Api().runs("azr")
    assert stored.name == name
