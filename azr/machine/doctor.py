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

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
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
from azr.models import model_path

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
    elif sys.platform == "win32":
        findings.blocks.append("Windows has no seccomp for the sandbox: take WSL 2 or Docker")
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
    """What `python -m sandbox doctor` says, in one line."""
    from sandbox import Sandbox, SandboxError
    from sandbox.__main__ import doctor

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            code = doctor(SimpleNamespace(workers=1, allow_weak=False))
        with Sandbox(1) as box:
            state = box.state
    except SandboxError as error:
        why = one_line(str(error).partition(": use ")[0])  # what it advises is for the sandbox alone
        return Findings([("sandbox", why)], [f"{why}: take Linux on x86-64 or aarch64, Docker or WSL 2"])
    text = ", ".join(f"{name} {state[name]}" for name in ("seccomp", "landlock", "uid", "limits"))
    failed = [" ".join(line.split()) for line in printed.getvalue().splitlines() if " NO: " in line]
    if code or failed:
        return Findings([("sandbox", text)], [f"the sandbox fails its trials: {'; '.join(failed) or code}"])
    return Findings([("sandbox", f"{text}; its trials pass")])


# ---------------------------------------------------------------- the packages


def packages(names: list[str]) -> Findings:
    """Versions, and whether each of the packages that the run needs can be imported."""
    missing = [name for name in names if not there(name)]
    broken = imports([name for name in names if name not in missing])
    versions = [f"{name} {version_of(name)}" for name in names if name not in missing]
    findings = Findings([("packages", ", ".join(versions) or "none")])
    for name in missing:
        findings.blocks.append(f"{name} is missing: pip install -r requirements.txt")
    for name, why in broken.items():
        findings.blocks.append(f"{name} cannot be imported ({why}): pip install -r requirements.txt installs it again")
    return findings


def imports(names: list[str]) -> dict[str, str]:
    """{name: why} of the packages that cannot be imported. One child for all; a crash costs it and a new child."""
    broken: dict[str, str] = {}

    def one_by_one(left: list[str]):
        for name in left:
            try:
                importlib.import_module(name)
                if part := PARTS.get(name):
                    getattr(sys.modules[name], part)
                yield [name, None]
            except Exception as error:
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
    """Whether a package is installed, not whether it works."""
    return importlib.util.find_spec(name) is not None


def version_of(name: str) -> str:
    """The installed version; a package without metadata has none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of no known version"


# ---------------------------------------------------------------- the report


def settings(arguments: list[str], parse) -> SimpleNamespace:
    """model, out, attn, quantization, shape (None: not known without its files); a bad flag exits 2.

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
        model=config.model,
        path=path,
        shape=shape,
        tiny=tiny,
        attn=config.attn,
        out=config.out or f"runs/{name}-0",
        quantization=config.quantization or ("none" if tiny else "nf4"),
        allow_cpu=getattr(config, "allow_cpu", False),
    )


def examine(chosen: SimpleNamespace) -> Iterator[Findings]:
    """One check after the other, each as soon as it is known."""
    yield finding(system)
    yield finding(memory)
    yield finding(disk, chosen.out, vital=True)
    yield finding(sandbox, vital=True)
    yield (installed := packages([*NEEDED, *["bitsandbytes"] * (chosen.quantization == "nf4")]))
    if any(block.startswith(("torch ", "numpy ")) for block in installed.blocks):
        yield Findings([("not tried", "GPU, attention and 4-bit kernels: they need torch and numpy")])
    else:
        yield from examine_torch(chosen)


def examine_torch(chosen: SimpleNamespace) -> Iterator[Findings]:
    """GPU, attention, 4-bit kernels."""
    import torch  # noqa: F401 (once, for all children; nothing here may wake CUDA, which does not survive a fork)

    from azr.machine import probes

    shape = chosen.shape
    sizes = (shape.heads, shape.kv_heads, shape.head_dim) if shape else (16, 2, 128)
    yield (card := finding(probes.gpu, vital=True))
    if not chosen.tiny and card.lines[0][1].startswith("none"):
        text = f"without a GPU {chosen.model} is far too slow to train: --model tiny is made for a CPU"
        anyway = f"{text}; --allow-cpu trains all the same"
        yield Findings(slows=[text]) if chosen.allow_cpu else Findings(blocks=[anyway])
    yield finding(probes.attention, chosen.attn, *sizes, vital=True)
    if chosen.quantization == "nf4" and there("bitsandbytes"):
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
    config = settings(arguments, parse)
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
    if not blocks and not config.tiny:
        show("next", f"train_azr.py --model {config.model} --dry-run says whether it fits the memory")
    print("----- to here -----")
    return 1 if blocks else 0
