"""Part smollm2: a real model end to end, SmolLM2-135M-Instruct from --smollm2 DIR.

DIR is an ordinary model directory, or one that `bench_gpu.py pack --smollm2` made; the latter is converted first.
"""

from __future__ import annotations

import tempfile

import torch

from azr.machine import plan
from azr.policy.policy import LoraSettings, Policy, Sampling
from gpu import parts_train
from gpu.bench import Bench, patched
from gpu.pack import joined
from gpu.parts_correct import gap_figures
from gpu.parts_peers import system

PROMPT, CONTINUED, VOCABULARY = "The capital of France is", "Paris", 49_152


def smollm2(bench: Bench) -> None:
    if bench.smollm2 is None:
        bench.line("smollm2", {}, left_out="no --smollm2 DIR")
        return
    bench.drop()
    held: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        bench.measure("convert", lambda: {"directory": model_in(bench, held, scratch)}, 40, "smollm2")
        bench.measure("greedy text", lambda: text(bench, held, scratch), 10, "smollm2")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 1 if bench.cpu else 3]:
            name = f"greedy parity {str(dtype)[6:]}"
            bench.measure(name, lambda dtype=dtype: parity(bench, held, scratch, dtype), 12, "greedy parity")
        for dtype, quantization, weights in cases(bench):
            name = f"gap {str(dtype)[6:]} {quantization} {weights}"
            case = (dtype, quantization, weights)
            bench.measure(name, lambda case=case: gap(bench, held, scratch, *case), 8, "gap, SmolLM2")
        for name in ("engine", "generate"):
            call = lambda name=name: speed(bench, held, scratch, name)  # noqa: E731
            bench.measure(f"speed of {name}", call, 12, "SmolLM2, tokens/s")
        held.pop("policy", None)
        bench.measure("two steps of training", lambda: training(bench, held, scratch), 60, "train")


def cases(bench: Bench) -> list:
    half, full = [torch.bfloat16, torch.float16], [torch.float32]
    if bench.cpu:
        return [(torch.float32, "none", "stored")]
    found = [(dtype, "none", "stored") for dtype in half + full] + [(dtype, "nf4", "stored") for dtype in half + full]
    return found + [(dtype, "nf4", "bf16") for dtype in half]


def model_in(bench: Bench, held: dict, scratch: str) -> str:
    if "model" not in held:
        held["model"] = joined(bench.smollm2, scratch)
    return held["model"]


def policy_in(bench: Bench, held: dict, scratch: str, dtype, quantization: str = "none"):
    """The model with LoRA whose B is not zero, as after some training."""
    if held.get("key") != (dtype, quantization):
        held.pop("policy", None)
        bench.clear()
        policy = Policy.load(
            model_in(bench, held, scratch), quantization, LoraSettings(32, 64.0), dtype=dtype, device=bench.device
        )
        generator = torch.Generator(policy.device).manual_seed(0)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 1e-3, generator=generator)
        held["policy"], held["key"] = policy, (dtype, quantization)
    return held["policy"]


def task_prompts(policy, count: int) -> list[list[int]]:
    """Token ids of solver's and proposer's prompts of the seed tasks, at most 700 tokens."""
    from azr.tasks import SEED_TASKS
    from azr.tasks.prompts import propose_prompt, solve_prompt

    texts = [solve_prompt(task, "azr") for task in SEED_TASKS.values()]
    texts += [propose_prompt("deduction", [task], "azr") for task in SEED_TASKS.values()]
    texts += [PROMPT, "def fibonacci(n):\n", "Write a haiku about rivers.\n", "1, 1, 2, 3, 5, 8,"]
    return [policy.encode(text)[:700] for text in texts][:count]


def text(bench: Bench, held: dict, scratch: str) -> dict:
    policy = Policy.load(model_in(bench, held, scratch), "none", None, device=bench.device)
    done = policy.generate([policy.encode(PROMPT)], 1, Sampling(temperature=0, max_new_tokens=8, stop=()), [[0]])
    out = policy.decode(done[0][0].ids)
    # the dry mode may be given another model
    return {"text": PROMPT + out, "ok": CONTINUED in out or policy.base.config.vocab_size != VOCABULARY}


def parity(bench: Bench, held: dict, scratch: str, dtype) -> dict:
    """Greedy tokens of the engine beside those of `generate`, each prompt alone, until they part."""
    policy = policy_in(bench, held, scratch, dtype)
    prompts, new = task_prompts(policy, 3 if bench.cpu else 10), 8 if bench.cpu else 64
    ours = policy.generate(prompts, 1, Sampling(temperature=0, max_new_tokens=new, stop=()), [[0]] * len(prompts))
    equal = count = whole = 0
    for prompt, row in zip(prompts, ours):
        ids = torch.tensor([prompt], device=policy.device)
        with torch.no_grad():
            out = policy.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
                pad_token_id=policy.pad_id,
            )
        mine, theirs = row[0].ids, out[0, len(prompt) :].tolist()
        same = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
        equal, count, whole = equal + same, count + len(mine), whole + (mine == theirs)
    exact = dtype == torch.float32
    return {
        "prompts": len(prompts),
        "identical": whole,
        "tokens": count,
        "share before parting": equal / count,
        "ok": whole == len(prompts) or not exact,
    }


def gap(bench: Bench, held: dict, scratch: str, dtype, quantization: str, weights: str) -> dict:
    policy = policy_in(bench, held, scratch, dtype, quantization)
    before, policy.engine.rollout_weights = policy.engine.rollout_weights, weights
    try:
        prompts, tokens, n = (3, 8, 2) if bench.cpu else (10, 256, 16)
        figures = gap_figures(policy, task_prompts(policy, prompts), tokens, n)
    finally:
        policy.engine.rollout_weights = before
    return {"dtype": str(dtype)[6:], "base": quantization, "rollout weights": weights, **figures}


def speed(bench: Bench, held: dict, scratch: str, name: str) -> dict:
    policy = policy_in(bench, held, scratch, torch.float32 if bench.cpu else torch.bfloat16)
    with patched(policy.engine, "eos_ids", frozenset()), patched(policy.engine, "tables", {}):
        return system(bench, name, policy)


def training(bench: Bench, held: dict, scratch: str) -> dict:
    if bench.cpu and plan.shape_of(model_in(bench, held, scratch)).vocabulary == VOCABULARY:
        return {"not run": "three minutes on a CPU"}
    sizes = ["--prompts-per-mode", "2", "--answers", "2", "--max-new-tokens", "8", "--preset", "8gb"]
    if not bench.cpu:
        sizes = ["--prompts-per-mode", "16", "--max-new-tokens", "256", "--preset", "24gb"]
    flags = [
        "--model",
        model_in(bench, held, scratch),
        "--quantization",
        "none",
        "--steps",
        "1" if bench.cpu else "2",
        "--eval-every",
        "0",
        "--eval-samples",
        "0",
        "--out",
        f"{scratch}/run",
        "--eval-data",
        parts_train.held_out(scratch),
        *sizes,
        *parts_train.allow_cpu(bench),
    ]
    return parts_train.run(bench, flags, scratch, real=True)
