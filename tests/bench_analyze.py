"""How fast and in how much memory `analyze.py sparsity` measures a model of 3 billion weights.

    python tests/bench_analyze.py [--json FILE] [--quick] [--shape 3B] [--directory DIR]

Writes random bf16 weights in the true shapes of Qwen2.5 (azr/machine/plan.py) shard by shard, a second checkpoint
that differs by 3e-5 a weight, and a rank-32 adapter; then runs the command itself: seconds, CPU seconds, peak
memory of the process, gigabytes of weights a second. Compared, at the same shape and within one run, with

- the published way: both models loaded, all differences concatenated, |d| <= 1e-5 counted (`published`, below). It
  gives one number, the command gives all of them. Where memory is short it runs at a smaller shape, and says so;
- reading the same files and doing nothing with them;
- bitsandbytes' own CPU quantizer, against azr/weights/nf4.py, on one matrix: ratio of CPU seconds.

The files are in the page cache when they are measured. --quick: the shape of 0.5B with four layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from azr.machine import plan
from azr.weights import nf4
from azr.weights.files import find_tensors

SHARD = 1 << 29  # weights
POOL = 1 << 26  # random numbers that all tensors are cut from: drawing them takes longer than anything measured here
PUBLISHED_BYTES = 12  # a weight: two models, the differences, their absolute values, and what is concatenated

PUBLISHED = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
def load(directory):
    return {k: v for f in sorted(Path(directory).glob("*.safetensors")) for k, v in load_file(f).items()}
base, tuned = load(sys.argv[1]), load(sys.argv[2])
differences = torch.cat([(tuned[name] - base[name]).flatten() for name in base])
print((differences.abs() <= 1e-5).sum().item() / differences.numel())
"""


# ---------------------------------------------------------------- files


def tensors(shape: plan.Shape) -> dict[str, tuple[int, ...]]:
    """Names and sizes of a Qwen2.5 checkpoint."""
    found = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden), "model.norm.weight": (shape.hidden,)}
    if not shape.tied:
        found["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        for name, (inputs, outputs) in shape.linears.items():
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            found[f"model.layers.{layer}.{block}.{name}.weight"] = (outputs, inputs)
            if name[0] in "qkv":
                found[f"model.layers.{layer}.{block}.{name}.bias"] = (outputs,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{norm}.weight"] = (shape.hidden,)
    return {name: size for name, size in found.items() if not ("down" in name and name.endswith("bias"))}


def cut(pool: torch.Tensor, size: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random numbers of that size from the pool, from another place for another seed."""
    n, start = torch.Size(size).numel(), seed * 7919 * 64 % (len(pool) // 2)
    if n > len(pool) - start:  # an embedding: as often as it takes
        return pool.repeat(-(-n // len(pool)))[:n].view(size)
    return pool[start : start + n].view(size)


def write(directory: Path, shape: plan.Shape, update: float) -> None:
    """A checkpoint of sigma 0.02, shard by shard; `update`: RMS of what is added to it."""
    from safetensors.torch import save_file

    directory.mkdir()
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    weights, changes, shard, where, held = (0.02 * pool).bfloat16(), update * pool.flip(0), {}, {}, 0
    names = tensors(shape)
    for seed, (name, size) in enumerate(names.items()):
        shard[name] = cut(weights, size, seed)
        if update:
            shard[name] = (shard[name].float() + cut(changes, size, seed + 1)).bfloat16()
        shard[name] = shard[name].clone()  # cut from the pool, and shared memory is not written
        held += shard[name].numel()
        if held >= SHARD or name == list(names)[-1]:
            file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
            save_file(shard, directory / file)
            where |= dict.fromkeys(shard, file)
            shard, held = {}, 0
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (directory / "config.json").write_text(json.dumps({"tie_word_embeddings": shape.tied}))


def write_adapter(directory: Path, shape: plan.Shape, rank: int, rms: float) -> None:
    from safetensors.torch import save_file

    directory.mkdir()
    found, generator = {}, torch.Generator().manual_seed(1)
    for name, size in tensors(shape).items():
        if len(size) == 2 and ".layers." in name:
            prefix = "base_model.model." + name.removesuffix(".weight")
            found[f"{prefix}.lora_A.weight"] = torch.randn(rank, size[1], generator=generator) / rank**0.5
            found[f"{prefix}.lora_B.weight"] = torch.randn(size[0], rank, generator=generator) * rms / 2
    save_file(found, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}))
    info = {"quantization": "nf4", "block_size": 64, "double_quant": True, "dtype": "bfloat16"}
    (directory / "azr.json").write_text(json.dumps(info))


# ---------------------------------------------------------------- measurements


def timed(command: list[str]) -> dict:
    """Seconds, CPU seconds and peak memory (bytes) of a process and all that it waited for."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{output}")
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "output": output,
    }


def analyse(arguments: list, report: Path) -> dict:
    found = timed([sys.executable, str(ROOT / "analyze.py"), "sparsity", *map(str, arguments), "--json", str(report)])
    del found["output"]
    return {**found, "report": json.loads(report.read_text())["adapted"]}


def read_only(directories: list[Path]) -> float:
    """Seconds to read every file once."""
    buffer, start = bytearray(1 << 24), time.perf_counter()
    for file in sorted({entry.file for directory in directories for entry in find_tensors(directory).values()}):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def quantizer_ratio(repeats: int = 3) -> float:
    """CPU seconds of bitsandbytes over those of azr/weights/nf4.py for one matrix; the codes must be equal."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends a kernel package that is not needed
    import bitsandbytes.functional as bnb

    torch.set_num_threads(1)
    weight, ratios = torch.randn(4096, 2048).bfloat16(), []
    for _ in range(repeats):
        start = time.process_time()
        packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        middle = time.process_time()
        stored = nf4.quantize(weight)
        ratios.append((middle - start) / (time.process_time() - middle))
    assert torch.equal(bnb.dequantize_4bit(packed, state).view(-1), stored.dequantize(torch.bfloat16))
    return statistics.median(ratios)


def available_bytes() -> int:
    text = Path("/proc/meminfo").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))


def apart(task, *arguments) -> None:
    """In a process of its own: a child's peak memory starts from that of the process that starts it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(task, *arguments).result()


def pair_files(directory: Path, shape: plan.Shape) -> tuple[Path, Path]:
    need, free = 2 * 2 * shape.parameters + 1e9, shutil.disk_usage(directory).free
    if need > 0.9 * free:
        sys.exit(f"{directory} has {free / 1e9:.0f} GB free, {need / 1e9:.0f} GB are needed: --directory or --quick")
    base, tuned = directory / f"base-{shape.hidden}", directory / f"tuned-{shape.hidden}"
    for target, update in ((base, 0.0), (tuned, 3e-5)):
        if not target.is_dir():
            apart(write, target, shape, update)
    return base, tuned


def published(directory: Path, shapes: list[tuple[str, plan.Shape]]) -> dict:
    """The published way and the command, on the largest shape that takes at most half of the free memory."""
    fitting = [(name, s) for name, s in shapes if PUBLISHED_BYTES * s.parameters < available_bytes() / 2]
    if not fitting:
        return {"skipped": f"not even {shapes[-1][0]} fits into half of the free memory"}
    name, shape = fitting[0]
    base, tuned = pair_files(directory, shape)
    theirs = timed([sys.executable, "-c", PUBLISHED, str(base), str(tuned)])
    ours = analyse(["--base", base, "--tuned", tuned], directory / "published.json")
    return {
        "shape": name,
        "seconds": theirs["seconds"],
        "cpu_seconds": theirs["cpu_seconds"],
        "peak_bytes": theirs["peak_bytes"],
        "bytes_a_weight": theirs["peak_bytes"] / shape.parameters,
        "sparsity": float(theirs["output"].split()[-1]),
        "ours": ours,
        "memory_ratio": theirs["peak_bytes"] / ours["peak_bytes"],
        "time_ratio": theirs["seconds"] / ours["seconds"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--shape", choices=list(plan.QWEN25), default="3B")
    parser.add_argument("--directory", type=Path, help="where the weights are written (default: a temporary directory)")
    args = parser.parse_args()
    small = dataclasses.replace(plan.QWEN25["0.5B"], layers=4)
    name, shape = ("0.5B, 4 layers", small) if args.quick else (args.shape, plan.QWEN25[args.shape])
    if args.directory:
        args.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.directory) as temporary:
        results = bench(Path(temporary), name, shape, args.quick)
    show(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def bench(directory: Path, name: str, shape: plan.Shape, quick: bool) -> dict:
    base, tuned = pair_files(directory, shape)
    apart(write_adapter, directory / "adapter", shape, 32, 3e-5)
    pair = analyse(["--base", base, "--tuned", tuned], directory / "pair.json")
    adapter = analyse(["--base", base, "--adapter", directory / "adapter"], directory / "adapter.json")
    smaller = [] if quick else [(n, plan.QWEN25[n]) for n in ("1.5B", "0.5B")]
    return {
        "shape": name,
        "parameters": shape.parameters,
        "cores": len(os.sched_getaffinity(0)),
        "pair": pair,
        "pair_gb_a_second": 4 * shape.parameters / 1e9 / pair["seconds"],
        "read_only_gb_a_second": 4 * shape.parameters / 1e9 / read_only([base, tuned]),
        "adapter_on_nf4": adapter,
        "published": published(directory, [(name, shape), *smaller]),
        "quantizer_ratio": quantizer_ratio(),
    }


def show(results: dict) -> None:
    print(f"{results['shape']}: {results['parameters'] / 1e9:.2f} billion weights, {results['cores']} cores")
    for name, words in (("pair", "two bf16 checkpoints"), ("adapter_on_nf4", "rank-32 adapter on NF4")):
        r = results[name]
        print(
            f"  {words:24}{r['seconds']:8.1f} s {r['cpu_seconds']:8.1f} CPU s {r['peak_bytes'] / 1e9:7.2f} GB", end=""
        )
        print(f"   U1 {r['report']['U1_rms']:.2e}  S1 {r['report']['S1']:.3f}  S2 {r['report']['S2']:.3f}")
    print(
        f"  a pair: {results['pair_gb_a_second']:.2f} GB/s; reading only: {results['read_only_gb_a_second']:.2f} GB/s"
    )
    if "skipped" in (theirs := results["published"]):
        print(f"  the published way: {theirs['skipped']}")
    else:
        ours = theirs["ours"]
        print(f"  the published way at {theirs['shape']}:")
        for words, r in (("models and differences", theirs), ("this one", ours)):
            print(f"    {words:22}{r['seconds']:8.1f} s {r['cpu_seconds']:8.1f} CPU s {r['peak_bytes'] / 1e9:7.2f} GB")
        print(f"    ratios: memory {theirs['memory_ratio']:.1f}, time {theirs['time_ratio']:.2f}")
    print(f"  NF4 codes: {results['quantizer_ratio']:.1f} times faster than bitsandbytes on the CPU, equal")


if __name__ == "__main__":
    sys.exit(main())
