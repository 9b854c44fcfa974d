"""The attack corpus, through the gate and with the gate off, with invariants after each program (attacks/harness.py).

SANDBOX_LONG=1 runs all of it under every set of privileges; otherwise lesser privileges meet the raw attacks on
processes and files alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")

HARNESS = Path(__file__).parent / "attacks" / "harness.py"
AS_NOBODY = """
import os, subprocess, sys
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
subprocess.run([sys.executable, "-c", "import json"], check=True)
"""
LONG = bool(os.environ.get("SANDBOX_LONG"))


def attack(tmp_path, *options):
    """Runs the harness; returns its records."""
    report = tmp_path / "report.json"
    command = [sys.executable, str(HARNESS), "--json", str(report), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert report.exists(), done.stdout + done.stderr
    records = json.loads(report.read_text())
    assert [record for record in records if record["violations"]] == []
    assert done.returncode == 0, done.stdout + done.stderr
    return records


def test_corpus_is_large_and_has_no_double():
    sys.path.insert(0, str(HARNESS.parent))
    import harness

    corpus = harness.read_corpus()
    assert len(corpus) >= 200 and len({(kind, name) for kind, name, _ in corpus}) == len(corpus)
    assert {kind for kind, _, _ in corpus} == set(harness.KINDS)
    assert all("@LONG" not in code for _, _, code in corpus)


def test_through_the_gate(tmp_path):
    records = attack(tmp_path, "--modes", "gate")
    statuses = [status for record in records for status in record["statuses"]]
    refused = sum(status.startswith(("forbidden", "nondeterministic")) for status in statuses)
    assert refused > 150


def test_kernel_alone(tmp_path):
    records = attack(tmp_path, "--modes", "raw")
    kinds = {record["kind"] for record in records}
    killed = [record for record in records if "forbidden system_call" in record["statuses"]]
    assert len(kinds) == 7 and len([record for record in killed if record["kind"] == "processes"]) > 25


@pytest.mark.parametrize("options", [("--user", "nocaps"), ("--user", "nobody"), ("--user", "nocaps", "--no-landlock")])
def test_with_less_privilege(tmp_path, options):
    if os.geteuid() != 0:
        pytest.skip("only root can give privileges up")
    if "nobody" in options and subprocess.run([sys.executable, "-c", AS_NOBODY], capture_output=True).returncode != 0:
        pytest.skip("this Python is not readable for everybody")
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    attack(tmp_path, *options, *(() if LONG else ("--modes", "raw", "--kinds", "processes,files")))
