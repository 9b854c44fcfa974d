"""docs/jobs/hub_job.py without a hub: what it uploads, and that a failure is no error. tests/bench_hub.py kills whole
jobs."""

import importlib.util
import time
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "docs" / "jobs" / "hub_job.py"


@pytest.fixture(scope="module")
def hub_job():
    spec = importlib.util.spec_from_file_location("hub_job", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Hub:
    """upload_folder as the hub's client has it; fails the first time, and does not come back the third time."""

    def __init__(self):
        self.commits = []

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
        texts = {
            str(path.relative_to(folder_path)): path.read_text() for path in folder_path.rglob("*") if path.is_file()
        }
        self.commits.append(texts)
        if len(self.commits) == 1:
            raise OSError("503")
        if len(self.commits) == 3:
            time.sleep(60)


def test_a_copy_that_fits_together_is_uploaded(hub_job, tmp_path, capsys, monkeypatch):
    run, hub = tmp_path / "run", Hub()
    files = {
        "metrics.jsonl": "1\n2\n3",
        "lock": "7",
        "checkpoints/step_2/state/state.json": "{}",
        "checkpoints/step_3.tmp-9/azr.json": "half",
        "checkpoints/step_1.broken/azr.json": "bad",
        "eval/step_0.json": "[]",
    }
    for name, text in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    assert not hub_job.upload(hub, "you/run", run) and "503" in capsys.readouterr().err
    assert hub_job.upload(hub, "you/run", run)
    whole = {"metrics.jsonl", "checkpoints/step_2/state/state.json", "eval/step_0.json"}
    assert hub.commits[0] == hub.commits[1] == {name: files[name] for name in whole}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    monkeypatch.setattr(hub_job, "LIMIT", 0.05)
    assert not hub_job.upload(hub, "you/run", run) and "no end after 0.05 s" in capsys.readouterr().err
    # a checkpoint is no second copy; a log, which grows meanwhile, is one
    hub_job.stage(run, tmp_path / "aside")
    links = {name: (tmp_path / "aside" / name).stat().st_nlink for name in whole}
    assert links == {name: 2 if name.startswith("checkpoints") else 1 for name in whole}
