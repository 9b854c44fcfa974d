"""What this machine can do for training, tried and not only asked; text to paste into an issue.

    python train_azr.py --doctor                        the embedded model's needs
    python train_azr.py --doctor --model qwen-3b        another model: its widths, its 4-bit kernels

Says what changes what to do next: GPU and driver against the installed torch, 4-bit kernels, attention, memory, disk,
sandbox. Needs no GPU, no network and none of the packages that it looks at: each check runs in a forked child of its
own, so a package that is missing, broken, crashing or hanging is a line of the report. Exit code 0: training can run
here; 1: it cannot, and the last lines say why.

The text is plain and holds no secrets: the home directory, the user's and the machine's name, tokens and the values
of variables that are called so are replaced. Left out: the memory plan (--dry-run), packages that training does not
need, whether the model can be downloaded (its loading says so), several GPUs.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from azr.isolated import Findings, apart, cores, finding, one_line, read_text, scrub
from azr.models import base_description

NEEDED = ("torch", "numpy", "transformers", "peft", "accelerate", "rich")
PARTS = {"transformers": "AutoModelForCausalLM", "peft": "get_peft_model"}  # loaded when they are asked for
LITTLE_DISK = 2e9  # bytes, below which a warning asks for another place


# ---------------------------------------------------------------- the machine


def system() -> Findings:
    """Operating system and Python; where the sandbox has nothing to confine programs with, training cannot run."""
    text = f"{platform.platform()}, Python {platform.python_version()}, {cores():g} cores"
    findings = Findings([("system", text)])
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever asks may run an older one)
        findings.blocks.append(f"Python {platform.python_version()} is too old: take 3.11 or newer")
    if sys.platform == "darwin":
        findings.blocks.append(
            "macOS has no seccomp for the sandbox, and torch's MPS is not used: take Docker or Linux"
        )
    return findings


def memory() -> Findings:
    """GiB of the machine, available, and of the control group's limit, which a container has."""
    kib = {name: int(number) for name, number in re.findall(r"(\w+):\s+(\d+) kB", read_text("/proc/meminfo"))}
    if "MemTotal" not in kib:
        return Findings([("memory", "unknown")])
    text = f"{kib['MemTotal'] / 2**20:.1f} GiB, {kib.get('MemAvailable', 0) / 2**20:.1f} GiB available"
    with contextlib.suppress(ValueError):
        text += f", control group's limit {int(read_text('/sys/fs/cgroup/memory.max')) / 2**30:.1f} GiB"
    return Findings([("memory", text)])


def disk(out: str) -> Findings:
    """Free space, and whether a file can be written: of the run directory or the first directory above it."""
    where = Path(out).absolute()
    while not where.is_dir():
        where = where.parent
    free = shutil.disk_usage(where).free
    findings = Findings([("disk", f"{free / 1e9:.1f} GB free for the run directory {out}")])
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        findings.blocks.append(f"nothing can be written to {where} ({one_line(error)}): name another place with --out")
    if free < LITTLE_DISK:
        findings.slows.append(f"only {free / 1e9:.1f} GB free for the run: name another place with --out")
    return findings


def sandbox() -> Findings:
    """What `python -m sandbox doctor` says, in one line; what it prints goes nowhere, as all that a child prints."""
    from sandbox import Sandbox, SandboxError
    from sandbox.__main__ import doctor

    try:
        code = doctor(SimpleNamespace(workers=1, allow_weak=False))
        with Sandbox(1) as box:
            text = ", ".join(f"{name} {box.state[name]}" for name in ("seccomp", "landlock", "uid", "limits"))
    except SandboxError as error:
        why = one_line(str(error).partition(": use ")[0])  # what it advises is for the sandbox alone
        return Findings([("sandbox", why)], [f"{why}: take Linux on x86-64 or aarch64, Docker or WSL 2"])
    if code:
        return Findings([("sandbox", text)], ["the sandbox fails a trial: python -m sandbox doctor says which"])
    return Findings([("sandbox", f"{text}; its trials pass")])


# ---------------------------------------------------------------- the packages


def packages(names: list[str]) -> Findings:
    """Versions, and whether each of the packages that the run needs can be imported."""
    there = [name for name in names if importlib.util.find_spec(name)]
    findings = Findings([("packages", ", ".join(f"{name} {version_of(name)}" for name in there) or "none")])
    remedy = "pip install -r requirements.txt"
    findings.blocks += [f"{name} is missing: {remedy}" for name in names if name not in there]
    for name, why in imports(there).items():
        findings.blocks.append(f"{name} cannot be imported ({why}): {remedy} installs it again")
    return findings


def imports(names: list[str]) -> dict[str, str]:
    """{name: why} of the packages that cannot be imported. One child for all; a crash costs it and a new child."""
    broken: dict[str, str] = {}

    def one_by_one():
        for name in names:
            try:
                importlib.import_module(name)
                if part := PARTS.get(name):
                    getattr(sys.modules[name], part)
                yield name, None
            except Exception as error:
                yield name, one_line(error)

    while names:
        done, died = apart(one_by_one, seconds=600)
        broken |= {name: why for name, why in done if why}
        names = names[len(done) :]
        if died and names:
            broken[names[0]], names = died, names[1:]
    return broken


def version_of(name: str) -> str:
    """The installed version; a package without metadata has none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of no known version"


# ---------------------------------------------------------------- the report


def examine(config) -> Iterator[Findings]:
    """One check after the other, each as soon as it is known; `config` has the settings of a run."""
    tiny = base_description(config.model) is not None
    four_bit = (config.quantization or ("none" if tiny or config.train == "full" else "nf4")) == "nf4"
    yield finding(system)
    yield finding(memory)
    yield finding(disk, config.out or "runs", vital=True)
    yield finding(sandbox, vital=True)
    yield (installed := packages([*NEEDED, *["bitsandbytes"] * four_bit]))
    if any(block.startswith(("torch ", "numpy ")) for block in installed.blocks):
        yield Findings([("not tried", "GPU, attention and 4-bit kernels: they need torch and numpy")])
        return
    import torch  # noqa: F401 (once, for all children; nothing here may wake CUDA, which does not survive a fork)

    from azr.machine import plan, probes

    shape = None  # of a model that is not known without its files
    with contextlib.suppress(plan.PlanError, OSError):
        shape = plan.shape_of(config.model)
    yield (card := finding(probes.gpu, vital=True))
    if not tiny and card.lines[0][1].startswith("none"):
        text = f"without a GPU {config.model} is far too slow to train: --model tiny is made for a CPU"
        anyway = f"{text}; --allow-cpu trains all the same"
        yield Findings(slows=[text]) if config.allow_cpu else Findings(blocks=[anyway])
    sizes = (shape.heads, shape.kv_heads, shape.head_dim) if shape else (16, 2, 128)
    yield finding(probes.attention, config.attn, *sizes, vital=True)
    if four_bit and importlib.util.find_spec("bitsandbytes"):
        widths = sorted({inputs for inputs, _ in shape.linears.values()}) if shape else [256]
        yield finding(probes.four_bit, widths, vital=True)


def show(label: str, text: str) -> None:
    """A line of the report, without secrets; continued lines are indented to the text."""
    lines = textwrap.wrap(scrub(text), 79 - 17, break_long_words=False, break_on_hyphens=False) or [""]
    for line in lines:
        print(f"{label:17}{line}", flush=True)
        label = ""


def main(arguments: list[str], parse) -> int:
    """Prints the report; 1 if training cannot run here. parse(arguments) -> the settings of a run."""
    if sys.platform == "win32":  # which has no fork either, so nothing can be tried
        print("Windows has no seccomp for the sandbox: take WSL 2 or Docker")
        return 1
    config = parse(arguments)
    try:
        return report(config, arguments)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain at its exit
        return 1


def report(config, arguments: list[str]) -> int:
    """Prints what `examine` finds, and the verdict; 1 if training cannot run here."""
    print("----- from here on it can be pasted into an issue: no names, no tokens -----", flush=True)
    show("command", f"train_azr.py {' '.join(arguments)}")
    blocks, slows = [], []
    for findings in examine(config):
        for label, text in findings.lines:
            show(label, text)
        blocks += findings.blocks
        slows += findings.slows
    print()
    show("verdict", f"training --model {config.model} {'WILL NOT WORK here' if blocks else 'will work here'}")
    for text in blocks:
        show("because", text)
    for text in slows:
        show("but", text)
    if not blocks and base_description(config.model) is None:
        show("next", f"train_azr.py --model {config.model} --dry-run says whether it fits the memory")
    print("----- to here -----")
    return 1 if blocks else 0
