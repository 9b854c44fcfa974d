"""All checks that need a GPU, in one call and one table, in less than ten minutes on one card.

    python tests/bench_gpu.py [--data DIR] [--json FILE]        # exit code 0: all hold, 1: one does not, 2: no GPU

Nothing is downloaded. What is checked, each in a process of its own with a time limit:
    attention   the Triton kernel against a plain softmax in float64, the tests that need a card among it
    scoring     chunked log-probs in bf16: memory, time against the naive forms, gradient (bench_memory.py)
    training    3B and 7B in NF4 + LoRA under 24 GB: a micro-batch, a whole step (bench_memory.py)
    gap         mean |log p of the sampler - log p of the trainer|, bf16 and NF4, 3B shape: below 0.01 nats
    tiny        three steps of train_azr.py on the embedded model
    3B          two steps of train_azr.py on random weights of the 3B shape in NF4: it runs, it is finite, it resumes
    rollout     tokens a second against `generate` and against the hardware (bench_rollout.py)
DIR may hold qwen2.5-tokenizer/ (else the embedded tokenizer is used) and azr_seeds/*.jsonl (else the three seed tasks).
Programs run in the sandbox only where `python -m sandbox doctor` agrees. Elsewhere none is run: its verdict is
drawn from its hash, and the table says so; the speed and gradients of the GPU do not depend on what is right.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT, HERE = Path(__file__).resolve().parents[1], Path(__file__).resolve()
sys.path[:0] = [str(ROOT), str(HERE.parent)]
BUDGET = 570  # seconds for everything
MOST_GAP = 0.01  # nats


# ---------------------------------------------------------------- checks that run here, each in a child


def gap(options) -> dict:
    """Sampler against trainer on the same tokens, for a bf16 and an NF4 base."""
    from azr.update import make_optimizer

    found = {}
    for quantization in ("none", "nf4"):
        policy = policy_of(options, quantization)
        make_optimizer(policy, 1e-5)
        prompts = [[1 + (i * 31 + j * 7) % 400 for j in range(40 + 20 * i)] for i in range(8)]
        count = 8 if options.cpu else 256
        rows = policy.generate(prompts, 4, forced(count), [range(4 * i, 4 * i + 4) for i in range(8)])
        pairs = [(prompt, c) for prompt, row in zip(prompts, rows) for c in row]
        scored, _ = policy.score_lists([p for p, _ in pairs], [c.ids for _, c in pairs])
        gaps = [abs(a - b) for (_, c), row in zip(pairs, scored) for a, b in zip(c.log_probs, row)]
        found[quantization] = {"mean": sum(gaps) / len(gaps), "max": max(gaps), "tokens": len(gaps)}
        del policy
    return {**found, "ok": all(value["mean"] < MOST_GAP for value in found.values())}


def forced(count: int):
    from azr.rollout import Sampling

    return Sampling(max_new_tokens=count, stop=())


def policy_of(options, quantization: str, **engine_options):
    from azr.plan import QWEN25, Shape
    from random_weights import random_policy

    shape = Shape(64, 2, 4, 2, 128, 1000, True, 16) if options.cpu else QWEN25["3B"]
    device, tokenizer = ("cpu" if options.cpu else "cuda"), tokenizer_of(options.data)
    tokenizer = None if options.cpu else tokenizer
    return random_policy(shape, quantization, device, 32, tokenizer=tokenizer, **engine_options)


def tiny(options) -> dict:
    """train_azr.py as it is."""
    return training(options, ["--steps", "3", "--prompts-per-mode", "8"])


def random_3b(options) -> dict:
    """train_azr.py with random weights in place of the download; then once more, resumed."""
    flags = ["--model", "qwen-3b", "--quantization", "nf4", "--eval-every", "0", "--prompts-per-mode", "2"]
    flags += ["--answers", "4", "--max-new-tokens", "128" if not options.cpu else "8", "--save-every", "1"]
    return training(options, [*flags, "--steps", "1"], [*flags, "--steps", "2", "--resume", "auto"])


def training(options, *runs: list[str]) -> dict:
    import tempfile

    import train_azr
    from azr.rollout import Policy

    if "--model" in runs[0]:

        class RandomWeights(Policy):
            @classmethod
            def load(cls, name, quantization, lora, **more):
                return policy_of(options, quantization, **trimmed(more))

        train_azr.Policy = RandomWeights
        train_azr.SEED_ROUNDS, train_azr.PROBE = 1, 2
    why = sandbox_refuses()
    if why:
        train_azr.Sandbox, train_azr.validate, train_azr.judge = NoSandbox, made_up_validate, made_up_judge
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        for flags in runs:
            code = train_azr.main(
                ["--out", f"{out}/run", "--eval-samples", "0", "--eval-data", held_out(out), *flags]
            )
            if code:
                return {"ok": False, "code": code}
        rows = [json.loads(line) for line in Path(out, "run/metrics.jsonl").read_text().splitlines()]
    return {
        "steps": len(rows), "gap": max(row["train/log_prob_gap"] for row in rows),
        "seconds a step": [row["time/step"] for row in rows], "all": round(time.perf_counter() - start, 1),
        "verdicts": "sandbox" if not why else f"made up, {why}",
        "ok": all(row["train/skipped"] == 0 and row["train/log_prob_gap"] < MOST_GAP for row in rows),
    }  # fmt: skip


def trimmed(options: dict) -> dict:
    return {name: value for name, value in options.items() if name in ("max_batch", "attn", "rollout_weights")}


def held_out(directory: str) -> str:
    """A few tasks, so that no hub is asked."""
    from azr.plan import model_path

    lines = Path(model_path("tiny"), "held_out.jsonl").read_text().splitlines()[:4]
    path = Path(directory, "tasks.jsonl")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


# ---------------------------------------------------------------- where programs cannot be confined


def sandbox_refuses() -> str | None:
    """Why programs must not be run here; None where the doctor agrees."""
    done = subprocess.run(
        [sys.executable, "-m", "sandbox", "doctor"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    lines = (done.stderr or done.stdout).strip().splitlines()
    return (
        None if done.returncode == 0 else f"the sandbox's doctor refuses ({lines[-1] if lines else done.returncode})"
    )


class NoSandbox:
    """In the place of the sandbox: runs nothing."""

    state = {"workers": 0}

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass


def coin(*parts) -> bool:
    return hashlib.sha256(repr(parts).encode()).digest()[0] < 128


def made_up_validate(proposals, sandbox, known, exempt=frozenset()) -> list:
    """Half of the proposals are valid, by their hash; what a program returns is not known, so it is None."""
    from azr.tasks import Task, Verdict

    verdicts = []
    for p in proposals:
        valid = p.mode != "induction" and coin(p.program, p.inputs)
        task = Task(p.mode, p.program, p.inputs[0], "None") if valid else None
        verdicts.append(Verdict(valid, "ok" if valid else "made_up", task=task))
    return verdicts


def made_up_judge(pairs, sandbox) -> list:
    from azr.tasks import Verdict

    return [Verdict(coin(task.hash, answer), "ok" if coin(task.hash, answer) else "wrong") for task, answer in pairs]


# ---------------------------------------------------------------- checks of other files


def attention(options) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_paged_attention.py", "tests/test_scoring.py"]


def memory(options, part: str) -> list[str]:
    command = [sys.executable, str(HERE.with_name("bench_memory.py")), "--quick", "--only", part]
    seeds = sorted(Path(options.data, "azr_seeds").glob("*.jsonl")) if options.data else []
    command += ["--tasks", str(seeds[0])] if seeds else []
    command += ["--tokenizer", tokenizer_of(options.data)] if tokenizer_of(options.data) and not options.cpu else []
    return command + (["--cpu"] if options.cpu else [])


def rollout(options) -> list[str]:
    return [sys.executable, str(HERE.with_name("bench_rollout.py")), "--quick"]


def tokenizer_of(data: str | None) -> str | None:
    path = Path(data, "qwen2.5-tokenizer") if data else None
    return str(path) if path and path.is_dir() else None


CHECKS = {  # name: (what, most seconds); a function that returns a command, or runs in a child of this file
    "attention": (attention, 90),
    "scoring": (lambda options: memory(options, "scoring"), 90),
    "gap": (gap, 90),
    "tiny": (tiny, 90),
    "3B": (random_3b, 120),
    "training": (lambda options: memory(options, "training"), 180),
    "rollout": (rollout, 240),
}
HERE_IN_A_CHILD = {"gap", "tiny", "3B"}


def check(name: str, options, limit: float) -> dict:
    """{"ok", "seconds", "shown"}: what the check printed, or why it failed."""
    what, start = CHECKS[name][0], time.perf_counter()
    if name in HERE_IN_A_CHILD:
        command = [sys.executable, str(HERE), "--child", name] + (["--cpu"] if options.cpu else [])
        command += ["--data", options.data] if options.data else []
    else:
        command = what(options)
    # a session of its own, so that a check that takes too long leaves no process on the card
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True,
                               env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})  # fmt: skip
    try:
        shown, errors = process.communicate(timeout=limit)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        shown, errors = process.communicate()
        code, errors = None, f"stopped after {limit:.0f} s"
    seconds = round(time.perf_counter() - start, 1)
    last = (errors.strip().splitlines() or ["no message"])[-1]
    result = {"ok": code == 0, "seconds": seconds, "shown": shown.strip() or last}
    if name in HERE_IN_A_CHILD and code == 0:
        result["figures"] = json.loads(shown.splitlines()[-1])
        result |= {"ok": result["figures"]["ok"], "shown": json.dumps(result["figures"])}
    elif code != 0:
        result["shown"] = f"{shown.strip()}\n{last}".strip()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="qwen2.5-tokenizer/ and azr_seeds/, if at hand")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--only", choices=CHECKS, nargs="*", help="some of the checks")
    parser.add_argument("--cpu", action="store_true", help=argparse.SUPPRESS)  # tiny sizes, to see that the parts fit
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data and not Path(options.data).is_dir():
        print(f"bench_gpu.py: --data {options.data}: no such directory", file=sys.stderr)
        return 2
    if options.child:
        print(json.dumps(CHECKS[options.child][0](options)))
        return 0
    import torch
    import transformers

    if not torch.cuda.is_available() and not options.cpu:
        print("bench_gpu.py: no CUDA device here, nothing was measured", file=sys.stderr)
        return 2
    where = "CPU SMOKE TEST with tiny sizes: not one figure here is of a GPU" if options.cpu else (
        f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    )
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}")
    start, results = time.monotonic(), {}
    for name in options.only or CHECKS:
        left = BUDGET - (time.monotonic() - start)
        if left < 5:
            results[name] = {"ok": False, "seconds": 0, "shown": "left out: the ten minutes are over"}
        else:
            results[name] = check(name, options, min(left, CHECKS[name][1] * (4 if options.cpu else 1)))
        result = results[name]
        print(f"{name:10} {'ok    ' if result['ok'] else 'FAILED'} {result['seconds']:6.1f} s", flush=True)
        print("".join(f"    {line}\n" for line in result["shown"].splitlines()[-40:]), end="", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps({"where": where, "checks": results}, indent=1) + "\n")
    failed = [name for name, result in results.items() if not result["ok"]]
    print(f"{len(results) - len(failed)} of {len(results)} hold" + (f"; not: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
