"""Two processes are the run of one: same samples and gradient, although memory runs out on one of them; and the same
evaluation, although one of them dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import eval_passk
import train_azr
from azr.evals import run
from azr.machine.cost import CARDS, decode_time
from azr.machine.plan import choose_preset, plan_memory, shape_of
from azr.policy.policy import Policy
from azr.train import distributed, loop
from azr.train.distributed import Ranks
from azr.train.loss_scale import LossScale
from bench_ranks import compared, processes
from simulated_ranks import Step, sampling_seconds, shares

SMALL = (
    "--steps 1 --prompts-per-mode 2 --answers 2 --max-new-tokens 40 --token-budget 160 --eval-every 1 --eval-samples 0"
)


def no_memory_on_rank_1(patch) -> None:
    """Its first backward pass fails, then its next micro-batch: the first costs a repetition, the second half the
    budget."""
    failures = []

    def failing(honest, count):
        def work(*arguments, **options):
            if os.environ.get("RANK") == "1" and len(failures) == count and torch.is_grad_enabled():
                failures.append(honest)
                raise torch.OutOfMemoryError("CUDA out of memory (not really)")
            return honest(*arguments, **options)

        return work

    patch.setattr(LossScale, "backward", failing(LossScale.backward, 0))
    patch.setattr(Policy, "_score_batch", failing(Policy._score_batch, 1))


def dies_on_rank_1(patch) -> None:
    """In the middle of its fifth answer's line."""
    honest, written = run.append, []

    def append(file, row):
        honest(file, row)
        written.append(row)
        if os.environ.get("RANK") == "1" and len(written) == 5:
            file.truncate(file.tell() - 9)
            os.kill(os.getpid(), signal.SIGKILL)

    patch.setattr(run, "append", append)


def files(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in out.glob("*.json*")}


def evaluations(folder: str) -> list:
    """One by this process; the same by two forks, of which one dies; by two that go on: exit codes, names of the files
    in between, whether all are equal at the end."""
    patch, one, two = pytest.MonkeyPatch(), Path(folder, "eval-one"), Path(folder, "eval-two")
    words = "run --model tiny --benchmark tiny --limit 3 --samples 48 --temperature 1 --max-new-tokens 32 --out"
    code = eval_passk.main([*words.split(), str(one)])
    with patch.context() as dying:
        dies_on_rank_1(dying)
        first, _ = processes(2, [*words.split(), str(two)], Path(folder, "eval-log"), eval_passk.main)
    between = sorted(files(two))
    second, _ = processes(2, [*words.split(), str(two)], Path(folder, "eval-log"), eval_passk.main)
    return [[code, *first, *second], between, files(one) == files(two)]


def both(held_out: str, folder: str) -> None:
    """One run by this process and the same by two forks of it; prints `evaluations`, the exit codes and `compared`."""
    patch, evaluated = pytest.MonkeyPatch(), evaluations(folder)
    for owner, name, value in ((loop, "PROBE", 1), (loop, "SEED_ROUNDS", 2), (distributed, "PIECE", 50_000)):
        patch.setattr(owner, name, value)
    flags, one, two = [*SMALL.split(), "--eval-data", held_out, "--out"], Path(folder, "one"), Path(folder, "two")
    code = train_azr.main([*flags, str(one)])
    no_memory_on_rank_1(patch)
    codes, _ = processes(2, [*flags, str(two)], Path(folder, "log"))
    print(json.dumps([evaluated, code, *codes, compared(one, two) if codes == [0, 0] else None]))


def test_two_processes_are_the_run_of_one(tmp_path, few_held_out):
    # a process of its own: torch forbids a backward pass in a fork of one that has seen a card, if only a pretended one
    command, alone = [sys.executable, __file__, few_held_out, tmp_path], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr
    log, two = (tmp_path / "log").read_text(), tmp_path / "two"
    evaluated, *codes, row = json.loads(done.stdout.splitlines()[-1])
    between = ["config.json", "samples.jsonl", "samples.rank1.jsonl"]
    assert evaluated == [[0, 1, -signal.SIGKILL, 0, 0], between, True], (tmp_path / "eval-log").read_text()
    assert codes == [0, 0, 0], log
    # smaller micro-batches round otherwise; one that is missing would be a tenth of the gradient
    assert row["samples"] and row["gradient_relative"] < 1e-5 and row["metrics_relative"] < 1e-2, (row, log)
    assert json.loads((two / "metrics.jsonl").read_text())["memory/token_budget"] < 160
    assert log.count("out of memory") == 2, log


def test_one_process_alone_sends_nothing():
    ranks = Ranks()
    assert ranks.leads and ranks.exchange("x") == ["x"] and ranks.shared(sorted, [2, 1]) == [1, 2]
    assert ranks.ends_step([], True) and ranks.workers is None
    with pytest.raises(MemoryError):
        ranks.agreed(lambda: (_ for _ in ()).throw(MemoryError()))


def test_a_pretended_card_takes_the_time_of_each_decode_step():
    preset, _ = choose_preset("8gb", "qwen-3b", None)
    plan, card = plan_memory(shape_of("qwen-3b"), preset, 8e9), CARDS["h100"]
    slots = plan.preset.max_batch
    row = [decode_time(plan, card, slots, 1 + 50), decode_time(plan, card, 1, 1 + 100 + 150)]
    # all at once, then one alone for 300 more; of twice as many those that wait take the slots of those that end
    assert sampling_seconds(plan, card, 1, [[100] * (slots - 1) + [400]]) == pytest.approx(
        100 * row[0] + 300 * row[1], rel=1e-3
    )
    assert sampling_seconds(plan, card, 1, [[100] * slots] * 2) == pytest.approx(200 * row[0], rel=1e-3)
    step = Step(plan, "0")
    alone, many = shares(plan, card, step, 1), shares(plan, card, step, 4)
    assert {len(row) for name, row in many.items() if name != "update"} == {4}
    assert sum(many["judge"]) == pytest.approx(alone["judge"][0]) and len(many["update"]) == -(-len(step.batches) // 4)
    assert sum(many["update"]) < sum(alone["update"]) < 4 * sum(many["update"])
    assert max(many["solve"]) < alone["solve"][0] < sum(many["solve"])  # which no four cards make a quarter of


if __name__ == "__main__":
    both(*sys.argv[1:])
