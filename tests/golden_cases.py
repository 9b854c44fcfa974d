"""What golden.py runs: flags, commands and the lines that go through the filters. Data only."""

from __future__ import annotations

# Comes before the flags of every training case, so that a case can replace a size.
SMALL = (
    "--steps 3 --prompts-per-mode 2 --answers 3 --max-new-tokens 48 --token-budget 1024 --max-batch 64 "
    "--eval-every 0 --eval-data held.jsonl --eval-samples 0"
)
STEP_TOKENS = 200  # response tokens per step, instead of what an arm of results/experiments.py asks for
HELD_OUT = 2  # tasks per mode

# Besides the arms of results/experiments.py. Several spellings: the first one that is not refused is used, so that the
# values survive a flag that gets another name.
OFF = "--off-policy-gamma 0.25 --off-policy-source"
TRAINED = {
    "default": "--eval-samples 2 --eval-every 2",
    "resume": "--eval-samples 2 --eval-every 2",  # two steps, then the third with --resume auto
    "recipe-azr": "--recipe azr",
    "recipe-azr-minibatches": "--recipe azr --minibatches 2",
    "recipe-azr-plain": "--recipe azr --ends-penalty 0 --entropy-control none",
    "recipe-azr-frozen-base": "--recipe azr --proposer frozen-base",
    "recipe-azr-matched": "--recipe azr --proposer no-update-matched",
    "binary": "--ends-penalty 0.5 --solver-reward binary",
    "bonus-strength": ("--entropy-control bonus=0.03", "--entropy-control bonus --entropy-coefficient 0.03"),
    "bonus-default": "--entropy-control bonus",
    "adaptive-default": "--entropy-control adaptive",
    "clip-cov-strength": ("--entropy-control clip-cov=0.1", "--entropy-control clip-cov --control-fraction 0.1"),
    "top-entropy-strength": (
        "--entropy-control top-entropy=0.5 --minibatches 2",
        "--entropy-control top-entropy --control-fraction 0.5 --minibatches 2",
    ),
    "off-policy-luffy": f"{OFF} base --off-policy-weight luffy --minibatches 2",
    "rlvr-tasks": "--algorithm rlvr --data tasks.jsonl",
    "rlvr-off-policy": f"--algorithm rlvr --data tasks.jsonl {OFF} gold.jsonl --off-policy-weight luffy",
    "rlvr-math": "--algorithm rlvr --data math.jsonl",
    "sft-solutions": "--algorithm sft --data gold.jsonl",
    "quantized": "--quantization nf4 --max-new-tokens 24 --steps 2",
    "fp16": "--algorithm sft --data gold.jsonl --dtype fp16 --max-new-tokens 4 --steps 2",
    "bf16-attention-seed": "--dtype bf16 --lora-targets attention --lora-rank 4 --lora-alpha 8 --seed 1 "
    "--max-new-tokens 24 --steps 2",
}

TASK_FILES = {
    "tasks.jsonl": "-m azr.tasks make tiny tasks.jsonl --count 30",
    "gold.jsonl": "-m azr.tasks make tiny gold.jsonl --count 30 --solutions",
    "math.jsonl": "-m azr.tasks make tiny math.jsonl --count 30 --modes math",
}

# {run} is a copy of the run of the case `default`. What is listed after a command is hashed: JSON by its top keys,
# JSON lines whole, a page by its headings, a folder by its files.
EVAL = "--benchmark tiny=held.jsonl --samples 4 --k 1,2 --max-new-tokens 48 --temperature 1 --top-p 1"
BASE, TUNED = (f"eval_passk.py run {of} {EVAL} --out" for of in ("--model tiny", "--adapter {run}"))
LAST = "{run}/checkpoints/step_3"
COMMANDS = {
    "analyze-sparsity": (["analyze.py sparsity --base tiny --adapter {run} --json out.json"], ["out.json"]),
    "analyze-spectral": (
        [f"analyze.py sparsity --base tiny --adapter {LAST} --spectral --json out.json"],
        ["out.json"],
    ),
    "analyze-entropy": (["analyze.py entropy --run {run} --json out.json"], ["out.json"]),
    "analyze-entropy-data": (
        [f"analyze.py entropy --model tiny --adapter {LAST} --data {{run}}/probe.jsonl --limit 24 --json out.json"],
        ["out.json"],
    ),
    "analyze-dynamics": (["analyze.py dynamics {run} --windows 3 --json out.json"], ["out.json"]),
    "analyze-difficulty": (["analyze.py difficulty {run} --questions 6 --answers 2 --json out.json"], ["out.json"]),
    "analyze-forgetting": (["analyze.py forgetting {run} --held-out 6 --probe 4 --json out.json"], ["out.json"]),
    "analyze-rewards": (["analyze.py rewards --json out.json"], ["out.json"]),
    "analyze-health": (["analyze.py health {run}"], []),
    "analyze-report": (["analyze.py report {run}"], ["{run}/report.html"]),
    "eval-run": ([f"{BASE} base"], ["base"]),
    "eval-run-adapter": ([f"{TUNED} tuned"], ["tuned"]),
    "eval-score": (
        [f"{BASE} base", "eval_passk.py score base/samples.jsonl --benchmark tiny=held.jsonl --k 1,2 --out again"],
        ["again"],
    ),
    "eval-compare": (
        [f"{BASE} base", f"{TUNED} tuned", "eval_passk.py compare base tuned --k 1,2 --out compared"],
        ["compared"],
    ),
    "export": (["train_azr.py export {run} --out merged --verify-samples 1"], ["merged"]),
}
PRINTED = "analyze-health"  # the case whose output on the screen is its result

LOOP = "def f(x):\n    while True:\n        pass"
INDUCTION = {"mode": "induction", "program": "def f(x):\n    return x * x % 7", "message": "squares"}
PAIRS = [[str(i), str(i * i % 7)] for i in range(10)]
VALUE = {"program": "def f(x):\n    return [abs(x), 1.0]", "input": "-3", "output": "[3, 1.0]"}
FILTERS = {  # lines that are right or wrong in many ways
    "-m sandbox run": [
        {"id": 1, "code": "def f(x, y=2):\n    return {y: (x, {3, 1})}", "inputs": ["1", "'k', 1.5", "float('nan')"]},
        {"id": 2, "code": "import os\ndef f(x):\n    return 1", "inputs": ["1"]},
        {"code": LOOP, "inputs": ["1"], "cpu_seconds": 0.2},
        {"code": "def f(x):\n    return len([0] * 10 ** 9)", "inputs": ["1"]},
        {"code": "def f(x)\n    return x", "inputs": ["1"]},
        {"code": "def f(x):\n    return [lambda: x, 1 / x, f(x), list(range(x))][x]", "inputs": ["0", "1"]},
        {"code": "def f(x): return x"},
    ],
    "-m azr.tasks validate": [
        {"mode": "deduction", "program": "def f(x):  # doubles\n    return x * 2", "input": "[1, 2]"},
        {"mode": "abduction", "program": "def f(s, n):\n    return s[n:] + s[:n]", "input": "'hello', 2"},
        {"mode": "deduction", "program": "def f(x):\n    return x", "input": "5"},
        {"mode": "deduction", "program": "def f(x):\n    return id(x)", "input": "'a'"},
        {"mode": "deduction", "program": "def f(x):\n    return 1 / x", "input": "0"},
        {"mode": "deduction", "program": "def f(x):\n    return x + 1", "input": "__import__('os')"},
        {**INDUCTION, "inputs": [pair[0] for pair in PAIRS]},
        {**INDUCTION, "inputs": ["1"] * 10},
        {"mode": "unknown", "program": ""},
    ],
    "-m azr.tasks judge": [
        *({"mode": "deduction", **VALUE, "answer": answer} for answer in ("[3, 1.0]", "[3,1]", "(3, 1)", "f()")),
        *({"mode": "abduction", **VALUE, "answer": answer} for answer in ("-3", "3", "2", "'a'", "exit()")),
        *(
            {**INDUCTION, "visible": PAIRS[:5], "hidden": PAIRS[5:], "answer": answer}
            for answer in ("def f(x):\n    return x ** 2 % 7", "def f(x):\n    return x + x", "x")
        ),
    ],
}
