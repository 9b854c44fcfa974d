"""Honest programs of public data sets: accepted, with every exception known. Skipped where the data are absent."""

import gzip
import json
import os
from pathlib import Path

import pytest

from sandbox import BENCHMARK, PROPOSAL, Job, Sandbox, literal

LONG = bool(os.environ.get("SANDBOX_LONG"))
DATA = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="no data sets here")


def rows(name):
    """The rows of a file of published data; the test is skipped where it is not here."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is absent")
    with (gzip.open if name.endswith(".gz") else open)(path, "rt") as file:
        return [json.loads(line) for line in file]


def humaneval_jobs(count):
    """Canonical solutions with up to `count` base inputs each."""
    return {
        row["task_id"]: Job(
            row["prompt"] + row["canonical_solution"],
            tuple(literal.canon_args(tuple(given), {}) for given in row["base_input"][:count]),
            entry=row["entry_point"],
        )
        for row in rows("benchmarks/HumanEvalPlus.jsonl.gz")
    }


@pytest.mark.parametrize(
    "profile, exceptions",
    [
        (BENCHMARK, {}),
        (
            PROPOSAL,
            {"HumanEval/39": "import random", "HumanEval/160": "builtin eval", "HumanEval/162": "import hashlib"},
        ),
    ],
)
def test_humaneval(profile, exceptions):
    jobs = humaneval_jobs(4)
    with Sandbox(profile=profile) as sandbox:
        found = dict(zip(jobs, sandbox.run(jobs.values())))
    refused = {
        name: next(outcome.detail for outcome in outcomes if outcome.status != "ok")
        for name, outcomes in found.items()
        if any(outcome.status != "ok" for outcome in outcomes)
    }
    assert len(found) == 164 and refused == exceptions


def test_cruxeval():
    data = rows("benchmarks/cruxeval.jsonl")
    refused = {"sample_258", "sample_344", "sample_364", "sample_522"}
    data = [row for i, row in enumerate(data) if LONG or i % 4 == 0 or row["id"] in refused]
    with Sandbox() as sandbox:
        found = sandbox.run([Job(row["code"], (row["input"],)) for row in data])
    wrong = {
        row["id"]: outcomes[0].status
        for row, outcomes in zip(data, found)
        if outcomes[0].status != "ok"
        or not literal.equal(literal.parse(outcomes[0].output), literal.parse(row["output"]))
    }
    assert wrong == dict.fromkeys(refused, "not_literal")


def test_published_seeds_have_the_known_faults():
    data = {
        (row["snippet"], row["input"]): row
        for name in ("3b", "7b")
        for row in rows(f"azr_seeds/{name}_coder_seed_io.jsonl")
    }
    with Sandbox() as sandbox:
        found = sandbox.validate(
            [
                Job("\n".join(row["imports"]) + "\n" + row["snippet"], (row["input"],))
                for row in list(data.values())[:: 1 if LONG else 3]
            ]
        )
    counts = {}
    for outcomes in found:
        counts[outcomes[0].status] = counts.get(outcomes[0].status, 0) + 1
    assert counts["ok"] > 0.93 * len(found) and counts["nondeterministic"] >= 1
    assert "killed" not in counts and "infra" not in counts
