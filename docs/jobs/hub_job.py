# /// script
# requires-python = ">=3.11"
# dependencies = ["huggingface_hub>=1.0"]
# ///
"""A run as a job of the Hugging Face hub, where the disk is gone when the job ends: the run directory goes to a repo.

    hf jobs uv run --flavor a10g-large --timeout 12h --secrets HF_TOKEN --env CODE=https://github.com/YOU/YOUR-FORK \\
        docs/jobs/hub_job.py YOU/azr-run --model qwen-3b --steps 500 --max-hours 11.5

The first argument is the repo (a private model repo, made if it is missing), the rest goes to train_azr.py. What the
repo holds is downloaded first, so the same line goes on where an earlier job stopped, failed or ran out of time.
Uploads happen beside the training, which never waits for one; one that fails is tried again at the next turn.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

MINUTES = float(os.environ.get("UPLOAD_MINUTES", "10"))  # between two uploads: what a lost machine may cost
LIMIT = 3600.0  # seconds of an upload: one that hangs is given up, or it would be the last
LOGS = ("config.json", "environment.json", "metrics.jsonl", "samples.jsonl", "probe.jsonl")


def train_command(run: Path, flags: list[str]) -> list[str]:
    """The training, in an environment of its own unless COMMAND names a Python that has the packages already."""
    python = os.environ.get("COMMAND")
    if python is None:
        if not Path("azr-code").exists():
            subprocess.run(["git", "clone", "--depth", "1", os.environ["CODE"], "azr-code"], check=True)
        subprocess.run(["uv", "venv", "azr-venv"], check=True)
        subprocess.run(
            ["uv", "pip", "install", "--python", "azr-venv/bin/python", "-r", "azr-code/requirements.txt"], check=True
        )
        python = "azr-venv/bin/python"
    return [python, str(Path(os.environ.get("TRAIN", "azr-code/train_azr.py"))), *flags, "--out", str(run)]


def stage(run: Path, aside: Path) -> None:
    """A copy that fits together: checkpoints first, then logs, which a resume cuts off after its checkpoint.

    Files of a checkpoint never change: a second name is as good as a copy and costs no time and no space. OSError if a
    checkpoint was pruned while it was looked at; the next turn will do.
    """
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    whole = shutil.ignore_patterns("*.tmp*", "*.broken")  # a checkpoint is whole once it has its name
    for folder in ("checkpoints", "eval"):
        if (run / folder).is_dir():
            copy = os.link if folder == "checkpoints" else shutil.copyfile
            shutil.copytree(run / folder, aside / folder, ignore=whole, copy_function=copy)
    for name in LOGS:
        if (run / name).is_file():
            shutil.copyfile(run / name, aside / name)


def give_up(*_) -> None:
    """What SIGALRM does."""
    raise TimeoutError(f"no end after {LIMIT:g} s")


def upload(api: HfApi, repo: str, run: Path) -> bool:
    """Puts a copy of the run into the repo, what is gone here is deleted there too; whether it worked."""
    aside = run.with_name(run.name + ".upload")
    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        stage(run, aside)
        api.upload_folder(repo_id=repo, folder_path=aside, commit_message="run", delete_patterns=["checkpoints/**"])
    except Exception as error:  # the network, the hub, a checkpoint pruned under our hands: never worth a run
        print(f"upload failed, tried again later: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        shutil.rmtree(aside, ignore_errors=True)
    return True


def main(repo: str, flags: list[str]) -> int:
    """Trains and uploads until the training has ended; its exit code."""
    api, run = HfApi(), Path("run")
    api.create_repo(repo, private=True, exist_ok=True)
    try:
        snapshot_download(repo, local_dir=run)
    except RepositoryNotFoundError:
        pass
    shutil.rmtree(run / ".cache", ignore_errors=True)  # the download's own notes are no part of a run
    (run / ".gitattributes").unlink(missing_ok=True)
    training = subprocess.Popen([*train_command(run, flags), "--resume", "auto"])
    signal.signal(signal.SIGTERM, lambda *_: training.terminate())  # it saves and exits 0, then the last upload follows
    due = time.monotonic() + 60 * MINUTES
    while (code := training.poll()) is None:
        time.sleep(1)
        if time.monotonic() > due:
            upload(api, repo, run)
            due = time.monotonic() + 60 * MINUTES
    while run.is_dir() and not upload(api, repo, run):
        time.sleep(30)  # the job's own time limit ends this
    return code


if __name__ == "__main__":
    wrong = ""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        wrong = f"the first argument is the repo of the run, YOU/NAME\n\n{__doc__}"
    elif "CODE" not in os.environ and "COMMAND" not in os.environ:
        wrong = "CODE is not set: --env CODE=GIT-URL names the repository that is trained"
    if wrong:
        print(f"hub_job.py: {wrong}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
