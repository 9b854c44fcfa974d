"""What this machine can do for training, tried and not only asked; text to paste into an issue.

    python train_azr.py --doctor                        the embedded model's needs
    python train_azr.py --doctor --model qwen-3b        another model: its widths, its cache, its 4-bit kernels

Needs no GPU, no network and none of the packages that it looks at: each check runs in a forked child of its own, so a
package that is missing, broken, crashing or hanging is a line of the report. Attention and 4-bit kernels are run on
small tensors and compared with float64. Exit code 0: training can run here; 1: it cannot, and the last lines say why.

The text is plain and holds no secrets: the home directory, the user's and the machine's name, tokens and the values
of variables that are called so are replaced. Left out: the memory plan (--dry-run), nvcc (not needed), several GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from azr.models import model_path
from azr.isolated import Findings, apart, cores, finding, one_line, output_of, read_text, scrub

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = ("torch", "flash_attn", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "matplotlib",
           "rich", "math_verify")  # fmt: skip
OPTIONAL = {"math_verify": "only mathematical tasks need it", "triton": "SDPA does its work",
            "flash_attn": "never needed"}  # fmt: skip
PARTS = {"transformers": "AutoModelForCausalLM", "peft": "get_peft_model"}  # loaded when they are asked for
ROUNDS = 300_000  # of `loop`
LOOP_SECONDS = 0.015  # CPU time of `loop` there, where the sandbox's limits were chosen (AMD EPYC, Python 3.11)
HUB_SECONDS = 3


# ------------------------------------------------------------------------------------------------------ the machine


def system() -> Findings:
    os_name = platform.platform()
    with contextlib.suppress(OSError, AttributeError):
        os_name = f"{platform.freedesktop_os_release()['PRETTY_NAME']}, kernel {platform.release()}"
    found = Findings([("system", f"{os_name}, {platform.machine()}{_container()}")])
    found.lines.append(("python", f"{platform.python_version()} ({platform.python_implementation()})"))
    commit = output_of("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    found.lines.append(("code", f"commit {commit.strip()}" if commit else "no git"))
    if sys.version_info < (3, 11):
        found.blocks.append(f"Python {platform.python_version()} is too old: take 3.11 or newer")
    if sys.platform == "darwin":
        found.blocks.append("macOS has no seccomp for the sandbox, and torch's MPS is not used: take Docker or Linux")
    elif sys.platform == "win32":
        found.blocks.append("Windows has no seccomp for the sandbox: take WSL 2 or Docker")
    return found


def _container() -> str:
    signs = {"Docker": Path("/.dockerenv").exists(), "Podman": Path("/run/.containerenv").exists(),
             "Kubernetes": "KUBERNETES_SERVICE_HOST" in os.environ, "WSL": "microsoft" in platform.release().lower(),
             "Colab": "COLAB_RELEASE_TAG" in os.environ, "Kaggle": "KAGGLE_KERNEL_RUN_TYPE" in os.environ,
             "RunPod": "RUNPOD_POD_ID" in os.environ, "Slurm": "SLURM_JOB_ID" in os.environ}  # fmt: skip
    return "".join(f", {name}" for name, there in signs.items() if there)


def cpu() -> Findings:
    names = re.findall(r"model name\s*: (.*)", read_text("/proc/cpuinfo"))
    text = f"{names[0] if names else platform.processor() or 'unknown'}, {cores():g} cores"
    found = Findings()
    if hasattr(os, "getloadavg"):
        text += f", load {os.getloadavg()[0]:.1f}"
        if os.getloadavg()[0] > 1.5 * cores() + 1:
            found.slows.append(f"other programs use this CPU (load {os.getloadavg()[0]:.1f} on {cores():g} cores)")
    seconds = min(_loop_seconds() for _ in range(5))
    speed = LOOP_SECONDS / seconds
    found.lines = [("cpu", text), (
        "python speed", f"{1000 * seconds:.0f} ms of CPU time for {ROUNDS:,} rounds of a loop, {speed:.2f} times as "
        f"fast as the reference ({1000 * LOOP_SECONDS:.0f} ms)")]  # fmt: skip
    if speed < 0.5:
        found.slows.append(
            f"Python is {1 / speed:.1f} times slower here than where the sandbox's CPU-time limits were chosen: more "
            "programs end as 'timeout'; do not compare such a run with one from a faster machine"
        )
    return found


def loop(n):
    x = 0
    for i in range(n):
        x = (x * 31 + i) % 1000003
    return x


def _loop_seconds() -> float:
    start = time.process_time()
    loop(ROUNDS)
    return time.process_time() - start


def memory() -> Findings:
    kib = {name: int(number) for name, number in re.findall(r"(\w+):\s+(\d+) kB", read_text("/proc/meminfo"))}
    if "MemTotal" not in kib:
        return Findings([("memory", "unknown")])
    text = f"{kib['MemTotal'] / 2**20:.1f} GiB, {kib.get('MemAvailable', 0) / 2**20:.1f} GiB available"
    with contextlib.suppress(ValueError):
        text += f", control group's limit {int(read_text('/sys/fs/cgroup/memory.max')) / 2**30:.1f} GiB"
    return Findings([("memory", text)])


def disk(out: str) -> Findings:
    """Free space, and whether a file can be written: of the run directory or the first directory above it."""
    found = Findings()
    where = Path(out).absolute()
    while not where.is_dir():
        where = where.parent
    free = shutil.disk_usage(where).free / 1e9
    found.lines.append(("disk", f"{free:.1f} GB free for the run directory {out}"))
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        found.blocks.append(f"nothing can be written to {where} ({one_line(error)}): name another place with --out")
    if free < 2:
        found.slows.append(
            f"only {free:.1f} GB free for the run: keep an eye on it, or name another place with --out"
        )
    return found


# ------------------------------------------------------------------------------------------------------- the packages


def packages(quantization: str) -> Findings:
    """Versions against the pins, and whether each package can be imported."""
    found, pins, other = Findings(), pins_of("requirements.txt"), pins_of("requirements-gpu.txt")
    differing: list[str] = []
    broken = imports([name for name in IMPORTS if there(name)])
    for name in IMPORTS:
        version, why = version_of(name), broken.get(name)
        wanted = pins.get(_plain(name)) or other.get(_plain(name))
        text = version or "no version known"
        if wanted and version:
            same = version.split("+")[0] in (wanted, other.get(_plain(name)))
            text += ", as pinned" if same else f", pinned: {wanted}"
            differing += [] if same else [name]
        if not there(name):
            text = "not installed" + (f" ({OPTIONAL[name]})" if name in OPTIONAL else f"; wanted: {wanted}")
        elif why:
            text += f", broken: {why}"
        found.lines.append((name.replace("_", "-"), text))
        needed = name not in OPTIONAL and (name != "bitsandbytes" or quantization == "nf4")
        if needed and not there(name):
            found.blocks.append(f"{name} is missing: pip install -r requirements.txt")
        elif needed and why:
            found.blocks.append(
                f"{name} cannot be imported ({why}): install it again, pip install -r requirements.txt"
            )
        elif why and name == "flash_attn" and "ended by" in why:
            found.blocks.append(f"flash-attn crashes when it is imported ({why}): pip uninstall flash-attn")
        elif why:
            found.slows.append(
                f"{name.replace('_', '-')} is installed but broken; {OPTIONAL.get(name, 'not used here')}"
            )
    if differing:
        found.slows.append(f"other versions than those of requirements.txt: {', '.join(differing)}")
    return found


def imports(names: list[str]) -> dict[str, str]:
    """Why a package cannot be imported, for those that cannot. One child for all; a crash costs it and a new child."""
    broken: dict[str, str] = {}

    def one_by_one(left: list[str]):
        for name in left:
            try:
                importlib.import_module(name)
                if part := PARTS.get(name):
                    getattr(sys.modules[name], part)
                yield [name, None]
            except Exception as error:
                if name == "flash_attn":
                    sys.modules[name] = None  # as loading.py does, or those behind it would fail with it
                yield [name, one_line(error)]

    while names:
        done, died = apart(lambda: one_by_one(names), seconds=600)
        broken |= {name: why for name, why in done if why}
        names = names[len(done) :]
        if died and names:
            broken[names[0]], names = died, names[1:]
        elif died is None:
            break
    return broken


def there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(_plain(name))
    except importlib.metadata.PackageNotFoundError:
        return None


def pins_of(file: str) -> dict[str, str]:
    """name: version of every `name==version` line; empty if there is no such file."""
    return {
        _plain(name): pin for name, pin in re.findall(r"^([\w-]+)==([^\s;#]+)", read_text(str(ROOT / file)), re.M)
    }


# ---------------------------------------------------------------------------------------------- sandbox, model and hub


def sandbox() -> Findings:
    """What `python -m sandbox doctor` says, in few lines, and the speed of a loop inside."""
    from sandbox import Job, Sandbox, SandboxError
    from sandbox.__main__ import doctor as trials

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            code = trials(SimpleNamespace(workers=1, allow_weak=False))
        with Sandbox(1) as box:
            [[outcome]] = box.run([Job(inspect.getsource(loop), (str(ROUNDS),), 60.0, "loop")])
            state = box.state
    except SandboxError as error:
        why = one_line(str(error).partition(": use ")[0])  # what it advises is for the sandbox alone
        return Findings([("sandbox", why)], [f"{why}: take Linux on x86-64 or aarch64, Docker or WSL 2"])
    found = Findings(
        [("sandbox", ", ".join(f"{name} {state[name]}" for name in ("seccomp", "landlock", "uid", "limits")))]
    )
    failed = [" ".join(line.split()) for line in said.getvalue().splitlines() if " NO: " in line]
    if code or failed or outcome.status != "ok":
        found.blocks.append(f"the sandbox fails its trials: {'; '.join(failed) or outcome.status}")
    else:
        seconds = 1000 * state["children_cpu_seconds"]
        found.lines.append(("", f"its trials pass; the loop above takes {seconds:.0f} ms of CPU time in it"))
    return found


def hub(model: str, weights: float | None) -> Findings:
    """Whether the model is in the cache, whether the hub answers, and whether there is room for what is missing.

    model: a hub id, or a directory (then only the state of the hub is told); weights: bytes to download, if known.
    """
    from huggingface_hub import constants, get_token

    found = Findings()
    token = get_token() is not None
    off = constants.HF_HUB_OFFLINE
    local = Path(model).is_dir() or model.count("/") != 1
    answer = "not asked, HF_HUB_OFFLINE is set" if off else _ask(constants.ENDPOINT, None if local else model, token)
    found.lines.append(("hub", f"{constants.ENDPOINT}: {answer}; {'a' if token else 'no'} token is set"))
    cache = Path(constants.HF_HUB_CACHE)
    room = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.is_dir())).free
    found.lines.append(("hub cache", f"{cache}, {room / 1e9:.1f} GB free"))
    if Path(model).is_dir():
        found.lines.append(("model", f"{'embedded' if model.startswith(str(ROOT)) else model}, a directory"))
        return found
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        found.blocks.append(f"there is no directory {model}, and it is no hub id (OWNER/NAME)")
        return found
    missing = _missing_files(model, cache)
    found.lines.append(("model", f"{model}: " + (f"not in the cache ({missing})" if missing else "in the cache")))
    if missing and (off or not answer.startswith("answers")):
        found.blocks.append(f"{model} is not in the cache, and the hub: {answer}. Download it elsewhere, "
                            "or give a directory with --model")  # fmt: skip
    elif missing and weights and room < 1.05 * weights:
        found.blocks.append(f"{model} needs {weights / 1e9:.1f} GB, {room / 1e9:.1f} GB are free in the hub cache: "
                            "set HF_HOME to another disk")  # fmt: skip
    return found


def _ask(endpoint: str, model: str | None, token: bool) -> str:
    """What the hub says to a HEAD request; the token is never sent. token: whether there is one."""
    url = f"{endpoint}/{model}/resolve/main/config.json" if model else endpoint
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "train_azr-doctor"})
    start = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            return f"answers in {time.monotonic() - start:.1f} s"
    except urllib.error.HTTPError as error:
        if error.code in (401, 403) and token:
            return f"answers; {model} is gated or does not exist (status {error.code} without the token)"
        if error.code in (401, 403, 404) and model:
            return f"says {error.code} to {model} (a wrong name, or a gated model that needs a token)"
        return f"answers, with status {error.code}"
    except (OSError, ValueError) as error:  # URLError is an OSError; so is a timeout
        return f"no answer, {one_line(getattr(error, 'reason', error))}"


def _missing_files(model: str, cache: Path) -> str | None:
    """Which file of a hub model is not in the cache, the first of them; None if all are there."""
    from huggingface_hub import try_to_load_from_cache

    def cached(name):
        path = try_to_load_from_cache(model, name, cache_dir=cache)
        return path if isinstance(path, str) else None

    if not cached("config.json"):
        return "no config.json"
    if not (cached("tokenizer.json") or cached("tokenizer_config.json")):
        return "no tokenizer.json"
    if cached("model.safetensors"):
        return None
    index = cached("model.safetensors.index.json")
    names = (
        sorted(set(json.loads(Path(index).read_text())["weight_map"].values())) if index else ["model.safetensors"]
    )
    return next((f"no {name}" for name in names if not cached(name)), None)


# ---------------------------------------------------------------------------------------------------------- the report


def settings(arguments: list[str], parse) -> SimpleNamespace:
    """model, out, attn, quantization and what is known of the model's shape; a bad flag exits 2.

    Should the settings not be importable here (no fcntl on Windows), the few flags that matter are read alone.
    """
    try:
        config = parse(arguments)
    except Exception:  # whatever is broken shows in the checks
        parser = argparse.ArgumentParser(prog="train_azr.py", allow_abbrev=False)
        for flag, default in (("--model", "tiny"), ("--out", None), ("--attn", "auto"), ("--quantization", None)):
            parser.add_argument(flag, default=default)
        config = parser.parse_known_args(arguments)[0]
    from azr.machine import plan  # needs the standard library only

    path = model_path(config.model)
    tiny = (Path(path) / "base.json").is_file()
    try:
        shape = plan.shape_of(config.model)
    except (plan.PlanError, OSError):
        shape = None
    name = Path(config.model.rstrip("/")).name
    return SimpleNamespace(
        model=config.model, path=path, shape=shape, tiny=tiny, attn=config.attn, out=config.out or f"runs/{name}-0",
        quantization=config.quantization or ("none" if tiny else "nf4"), allow_cpu=getattr(config, "allow_cpu", False),
    )  # fmt: skip


def examine(chosen: SimpleNamespace) -> Iterator[Findings]:
    """One check after the other, each as soon as it is known."""
    yield finding(system)
    yield finding(cpu)
    yield finding(memory)
    yield finding(disk, chosen.out, vital=True)
    yield finding(sandbox, vital=True)
    yield (found := packages(chosen.quantization))
    weights = 2 * chosen.shape.parameters if chosen.shape else None
    yield finding(hub, chosen.path, weights, seconds=60) if there("huggingface_hub") else Findings()
    if any(block.startswith(("torch ", "numpy ")) for block in found.blocks):
        yield Findings([("not tried", "GPU, attention, 4-bit kernels and threads: they need torch and numpy")])
    else:
        yield from examine_torch(chosen)


def examine_torch(chosen: SimpleNamespace) -> Iterator[Findings]:
    import torch  # noqa: F401 (once, for all children; nothing here may wake CUDA, which does not survive a fork)

    from azr.machine import probes
    from azr.policy.attention import BACKENDS

    shape = chosen.shape
    sizes = (shape.heads, shape.kv_heads, shape.head_dim) if shape else (16, 2, 128)
    yield (card := finding(probes.gpu, vital=True))
    if not chosen.tiny and card.lines[0][1].startswith("none"):
        text = f"without a GPU {chosen.model} is far too slow to train: --model tiny is made for a CPU"
        anyway = f"{text}; --allow-cpu trains all the same"
        yield Findings(slows=[text]) if chosen.allow_cpu else Findings(blocks=[anyway])
    works = {}
    for backend in (*BACKENDS, "page"):
        yield (found := finding(probes.attention, backend, *sizes))
        works[backend] = any(text.startswith("runs") for _, text in found.lines)
    if not any(works.values()):
        yield Findings(blocks=["no attention works that sampling could use"])
    elif not works.get(chosen.attn, True):
        yield Findings(blocks=[f"--attn {chosen.attn} was asked for and does not work; take --attn auto"])
    yield finding(probes.training_attention, *sizes, vital=True)
    if there("bitsandbytes"):
        widths = sorted({inputs for inputs, _ in shape.linears.values()}) if shape else []
        four_bit = chosen.quantization == "nf4"
        yield finding(probes.four_bit, widths, four_bit, vital=four_bit)
    yield finding(probes.threads)


def show(label: str, text: str) -> None:
    lines = textwrap.wrap(scrub(text), 79 - 17, break_long_words=False, break_on_hyphens=False) or [""]
    for line in lines:
        print(f"{label:17}{line}", flush=True)
        label = ""


def main(arguments: list[str], parse) -> int:
    """Prints the report; 1 if training cannot run here. parse(arguments) -> the settings of a run."""
    chosen = settings(arguments, parse)
    print("----- from here on it can be pasted into an issue: no names, no tokens -----", flush=True)
    show("command", f"train_azr.py {' '.join(arguments)}")
    blocks, slows = [], []
    for found in examine(chosen):
        for label, text in found.lines:
            show(label, text)
        blocks += found.blocks
        slows += found.slows
    print()
    show("verdict", f"training --model {chosen.model} {'WILL NOT WORK here' if blocks else 'will work here'}")
    for text in blocks:
        show("because", text)
    for text in slows:
        show("but", text)
    if not blocks and not chosen.tiny:
        show("next", f"train_azr.py --model {chosen.model} --dry-run says whether it fits the memory")
    print("----- to here -----")
    return 1 if blocks else 0
