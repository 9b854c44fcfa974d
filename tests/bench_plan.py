"""The memory plan against what is used: load, sample, update at small shapes, each in a fresh process.

    python tests/bench_plan.py [--json FILE] [--quick]      # CPU: four shapes, with NF4 and without; a GPU: 3B and 7B

A random checkpoint in bf16 is written for each shape and loaded as train_azr.py loads a model; the prompts of a step
are sampled to their full length, twice (proposals, and several answers to each task), and everything that was sampled
goes through one optimizer step, with the copies that a run keeps to go back to. Memory is the peak of each phase above
what the process held when its libraries were loaded: resident bytes, heap trimmed before each phase, with
MALLOC_MMAP_THRESHOLD_ set so that a freed tensor goes back at once (--plain-malloc: with what glibc keeps of freed
memory, two to three times as much was seen). GPU: bytes that the allocator reserved. The ratio is plan /
measured. Exit code 1: it is off by more than 15 %.

On a GPU: random weights of Qwen2.5's 3B and 7B, NF4, at the 24gb preset, the allocator capped at 24 GiB less the
context; every response has its full length there too, which a real run never sees at once.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from azr.machine import plan
from azr.machine.plan import Preset, Shape
from azr.models import model_path

MB, MOST_OFF, MINUTES = 1e6, 0.15, 20
# What weighs most differs: activations, weights, the vocabulary, the cache.
SHAPES = {
    "wide": Shape(512, 4, 8, 2, 2048, 8_000, False, 64),
    "deep": Shape(192, 12, 6, 2, 768, 4_000, True, 32),
    "vocabulary": Shape(256, 3, 4, 2, 1024, 100_000, True, 64),
    "cache": Shape(256, 8, 4, 4, 704, 8_000, True, 64),
}
SIZES = {
    "wide": dict(prompts_per_mode=2, answers=2, prompt_tokens=96, max_new_tokens=16, max_batch=12, token_budget=512),
    "deep": dict(prompts_per_mode=2, answers=2, prompt_tokens=96, max_new_tokens=32, max_batch=12, token_budget=768),
    "vocabulary": dict(
        prompts_per_mode=2, answers=4, prompt_tokens=64, max_new_tokens=16, max_batch=24, token_budget=512
    ),
    "cache": dict(prompts_per_mode=4, answers=4, prompt_tokens=256, max_new_tokens=16, max_batch=48, token_budget=288),
}


def preset_of(name: str, quantization: str) -> Preset:
    return dataclasses.replace(plan.TINY, name=name, lora_rank=16, quantization=quantization, **SIZES[name])


# ---------------------------------------------------------------- in the child: one case, one JSON line


class Meter:
    """Peaks of the phases above what was there at first, in bytes."""

    def __init__(self, device: str) -> None:
        self.device, self.peaks, self.first = device, {}, 0
        self.start()
        self.first = 0 if device == "cuda" else self.now()

    def now(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def start(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier phase has freed would be used again, or stay resident
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again

    def stop(self, phase: str) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_reserved()
        else:
            status = Path("/proc/self/status").read_text().splitlines()
            peak = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) - self.first
        self.peaks[phase] = max(peak, self.peaks.get(phase, 0))
        self.start()


def case(given: dict) -> dict:
    """Peaks of load, rollout and training for the sizes of a preset."""
    import bitsandbytes  # noqa: F401
    import torch
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    import train_azr
    from azr.policy import backoff
    from azr.policy.policy import LoraSettings, Policy, Sampling
    from azr.tasks import MODES, Sample
    from azr.train import update
    from azr.train.config import Config

    device, preset = given["device"], Preset(**given["preset"])
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, given["cap"] / total))
    torch.ones(64, 64) @ torch.ones(64, 64)
    meter = Meter(device)
    lora = LoraSettings(preset.lora_rank, 2.0 * preset.lora_rank)
    if device == "cuda":
        from random_weights import random_policy

        shape = Shape(**given["shape"])
        policy = random_policy(shape, preset.quantization, device, preset.lora_rank, max_batch=preset.max_batch)
        policy.checkpoint_activations()
    else:
        policy = Policy.load(given["model"], preset.quantization, lora, max_batch=preset.max_batch)
    optimizer, sizes = update.make_optimizer(policy, 1e-5), backoff.Sizes(preset.token_budget)
    meter.stop("load")
    # Adam's moments exist from the first update on: one before sampling, as in every step but the first
    parameters = policy.trainable_parameters()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    kept = update.state_tensors(policy, optimizer)
    meter.start()
    samples, seconds, clock = [], {}, time.process_time()
    count, length = 3 * preset.prompts_per_mode, preset.prompt_tokens
    sampling = Sampling(max_new_tokens=preset.max_new_tokens, stop=())
    for role, n in (("proposer", 1), ("solver", preset.answers)):
        prompts = [[1 + (37 * i + j * (3 + i)) % 400 for j in range(length)] for i in range(count)]
        rows = policy.generate(prompts, n, sampling, [[100 * i + j for j in range(n)] for i in range(count)])
        for i, row in enumerate(rows):
            samples += [
                Sample(role, MODES[i % 3], "", prompts[i], c, "", str(i), advantage=(-1.0) ** k)
                for k, c in enumerate(row)
            ]
    meter.stop("rollout")
    seconds["rollout"], clock = time.process_time() - clock, time.process_time()
    train_azr.optimizer_step(train_azr.State(Config(), policy, optimizer, sizes=sizes), samples)
    now = update.state_tensors(policy, optimizer)  # the copies of the step before are held until these are made
    kept = now if kept else kept
    meter.stop("training")
    seconds["training"] = time.process_time() - clock
    return {"peaks": meter.peaks, "first": meter.first, "token_budget": sizes.token_budget, "cpu_seconds": seconds}


# ---------------------------------------------------------------- the parent


def write_model(shape: Shape, directory: Path) -> None:
    """A random Qwen2 of this shape in bf16, as checkpoints come, with the embedded model's tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32_768,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model_path("tiny")) / name, directory)


def child(**given) -> dict:
    """The result of one case, from a process of its own; {"failed": reason} if it ends otherwise."""
    environment = os.environ | ({} if given.pop("plain_malloc") else {"MALLOC_MMAP_THRESHOLD_": "65536"})
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(given)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result within {MINUTES} minutes"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, quantization: str, directory: Path | None, device: str, plain_malloc: bool) -> dict:
    """Plan and measurement of one case, by phase, and the ratio of their peaks."""
    if device == "cpu":
        shape, preset, room = SHAPES[name], preset_of(name, quantization), None
    else:
        shape, preset = plan.QWEN25[name], plan.PRESETS["24gb"]
        room = plan.capacity(preset)
    made = plan.plan_memory(shape, preset, room, device)
    row = {"shape": name, "quantization": quantization, "device": device, "plan": made.totals, "parts": made.phases}
    row |= child(
        device=device,
        model=str(directory),
        preset=dataclasses.asdict(made.preset),
        cap=room,
        shape=dataclasses.asdict(shape),
        plain_malloc=plain_malloc,
    )
    if "peaks" in row:
        row["measured"] = max(row["peaks"].values())
        row["ratio"] = made.peak / row["measured"]
    return row


def show(row: dict) -> bool:
    """One line; whether the plan holds."""
    name = f"  {row['shape']:11} {row['quantization']:5}"
    if "failed" in row:
        print(f"{name} failed: {row['failed']}", flush=True)
        return False
    good = abs(row["ratio"] - 1) <= MOST_OFF
    cells = [f"{row['plan'][phase] / MB:7.0f} {row['peaks'][phase] / MB:7.0f}" for phase in row["peaks"]]
    print(f"{name} {'  |'.join(cells)}  |  {row['ratio']:.2f}{'' if good else '  MISSED'}", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--only", choices=list(SHAPES), help="this shape")
    parser.add_argument("--cpu", action="store_true", help="the small shapes, though there is a GPU")
    parser.add_argument("--plain-malloc", action="store_true", help="with what glibc keeps of freed memory")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(case(json.loads(options.child))))
        return 0
    device = "cuda" if plan.free_gpu_bytes() and not options.cpu else "cpu"
    rows = []
    print(
        f"peak MB on {'a GPU' if device == 'cuda' else 'the CPU'}, plan and measured, and plan / measured of the peak"
    )
    print(f"  {'':17} {'load':>15}  |{'rollout':>15}  |{'training':>15}  |  ratio")
    names = (
        ("3B", "7B")
        if device == "cuda"
        else [options.only]
        if options.only
        else list(SHAPES)[: 1 if options.quick else 4]
    )
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            if device == "cpu":
                write_model(SHAPES[name], Path(scratch))
            for quantization in ("nf4",) if device == "cuda" else ("none", "nf4"):
                rows.append(measure(name, quantization, Path(scratch), device, options.plain_malloc))
                show(rows[-1])
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all("ratio" in row and abs(row["ratio"] - 1) <= MOST_OFF for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
