"""Records what the commands do, so that moving modules or rewriting the loop can be seen to change nothing.

    python tests/golden.py record                     run every case, write tests/golden.json
    python tests/golden.py check                      run them again: exit 0 equal, 1 something differs, 2 cannot tell
    python tests/golden.py check --only "recipe-*,export"      some cases; * matches
    python tests/golden.py record --only export       record these again, leave the others as they are
    python tests/golden.py list                       the cases, and what each one runs
    python tests/golden.py check --work DIR           keep what the cases write, to compare two of them by hand

A case is a command line, or a few, in a folder of its own. golden.json holds a hash of every part of what it writes:
per step each group of metrics (`time/` and `memory/` aside) and the samples; the adapter; what the instruments write.
So a difference is told by case, step and group. A float counts to its last bit; config.json does not count.

Another processor or another torch rounds differently and then samples other tokens, so `check` refuses a golden.json
that was recorded elsewhere. There, record the old commit first: `git worktree add ../old COMMIT`, and in it
`python tests/golden.py record --golden FILE`; then `check --golden FILE` here.

Left out: what the screen shows while training, plots, help texts, the arms that need a base which is not in the
repository, GPUs, and the content of a checkpoint's state/, which the case `resume` stands for.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import importlib.util
import json
import os
import pickle
import platform
import re
import runpy
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import CompletedProcess

from golden_cases import COMMANDS, FILTERS, HELD_OUT, PRINTED, SMALL, STEP_TOKENS, TASK_FILES, TRAINED

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).with_name("golden.json")
TINY = ROOT / "azr" / "tiny"
# Set before torch is imported. One thread, because a sum over several depends on how many there are.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "COLUMNS": "100",
    "NO_COLOR": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}
# Keys of JSON that differ from one run of the same command to the next, or that name the machine.
UNSTABLE = {
    "time",
    "seconds",
    "elapsed",
    "versions",
    "version",
    "date",
    "created",
    "machine",
    "hostname",
    "device",
    "transformers_version",
    "torch_version",
    "peft_version",
}
Parts = dict[str, str]  # a part of what a case writes, such as "step 2 solver" -> its hash


# ---------------------------------------------------------------- hashing what was written


def digest(value) -> str:
    """48 bits of a hash of bytes, text, or anything that JSON can say (the order of keys does not count)."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:12]


def stable(value):
    """JSON without the keys that are UNSTABLE, or are about time or memory."""
    if isinstance(value, dict):
        return {
            key: stable(item)
            for key, item in value.items()
            if key not in UNSTABLE and not key.startswith(("time/", "memory/"))
        }
    return [stable(item) for item in value] if isinstance(value, list) else value


def text_of(path: Path, folder: Path) -> str:
    """A text file without the paths of this checkout and of the folder that the cases run in."""
    return path.read_text(encoding="utf-8").replace(str(folder), "WORK").replace(str(ROOT), "ROOT")


def tensors(path: Path) -> list:
    """Name, type, shape and hash of each tensor of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    header.pop("__metadata__", None)
    return sorted(
        [name, entry["dtype"], entry["shape"], digest(body[slice(*entry["data_offsets"])])]
        for name, entry in header.items()
    )


def file_parts(path: Path, folder: Path) -> Parts:
    """A file's parts: JSON by its top keys, a page by its headings, everything else whole."""
    if path.suffix == ".safetensors":
        return {path.name: digest(tensors(path))}
    text = text_of(path, folder)
    if path.suffix == ".json":
        value = stable(json.loads(text))
        whole = {path.name: digest(value)}
        return {f"{path.name} {key}": digest(v) for key, v in value.items()} if isinstance(value, dict) else whole
    if path.suffix == ".jsonl":
        return {path.name: digest([stable(json.loads(line)) for line in text.splitlines()])}
    _, *sections = re.split(r"<h2>(.*?)</h2>", re.sub(r'src="data:[^"]*"', "", text))  # the head has a date
    return {
        f"{path.name} {title}": digest(body)
        for title, body in zip(sections[::2], sections[1::2], strict=True)
        if title != "Settings"
    }


def run_parts(run: Path, folder: Path) -> Parts:
    """What a run directory holds that the same command must repeat."""
    parts: Parts = {}
    for line in text_of(run / "metrics.jsonl", folder).splitlines():
        row = stable(json.loads(line))
        step, groups = row.pop("step"), {}
        for name, value in row.items():
            groups.setdefault(name.partition("/")[0], {})[name] = value
        parts |= {f"step {step} {group}": digest(values) for group, values in groups.items()}
    samples: dict[int, list] = {}
    for line in text_of(run / "samples.jsonl", folder).splitlines():
        row = json.loads(line)
        samples.setdefault(row["step"], []).append(row)
    parts |= {f"step {step} samples": digest(rows) for step, rows in samples.items()}
    for path in sorted([run / "probe.jsonl", *(run / "eval").glob("*.json*")]):
        parts |= file_parts(path, folder)
    *_, last = sorted(run.glob("checkpoints/step_*"))
    return parts | {f"{last.name} adapter": digest(tensors(last / "adapter_model.safetensors"))}


# ---------------------------------------------------------------- running commands


def run(command: str, folder: Path, stdin: str = "") -> CompletedProcess:
    """SCRIPT.py ... or -m MODULE ..., without quotes, in `folder`; in a fork, so that torch is imported once only."""
    streams = [folder / f"std{name}.log" for name in ("in", "out", "err")]
    streams[0].write_text(stdin, encoding="utf-8")
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for number, path in enumerate(streams):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if number else 0)), number)
            os.chdir(folder)
            # torch makes its pool anew after a fork, but not safely in the several threads that load a model.
            sys.modules["torch"].set_num_threads(1)
            code = become(command.split())
        finally:  # whatever happens, the child does not go on with the cases
            if sys.exc_info()[0]:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out, err = (path.read_text(encoding="utf-8") for path in streams[1:])
    with open(folder / "commands.log", "a", encoding="utf-8") as log:
        log.write(f"$ {command}\n{out}{err}[exit code {code}]\n")
    return CompletedProcess(command, code, out, err)


def become(words: list[str]) -> int:
    """Runs the command as if it had been typed; its exit code."""
    sys.argv = words[1:] if words[0] == "-m" else [str(ROOT / words[0]), *words[1:]]
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    return 0


def remember_untrained(folder: Path) -> None:
    """What an untrained adapter samples is a function of the call, and most cases ask for the same: once is enough.

    With every B at zero the policy is its base, with the adapter on or off. Later steps sample for themselves.
    """
    from azr.policy import LoraSettings, Policy

    generate = Policy.generate
    Policy.load(str(TINY), "none", LoraSettings())  # for the imports that it makes: seconds in every fork

    def remembered(self, prompt_ids, n, sampling, seeds, *more, on_finish=None, **named):
        seeds = [list(row) for row in seeds]
        trained = any(p.any() for name, p in self.model.named_parameters() if "lora_B" in name)
        if trained or more or named:  # named: prompts may come while it runs, which depend on more than the call
            return generate(self, prompt_ids, n, sampling, seeds, *more, on_finish=on_finish, **named)
        path = folder / digest(repr((self.info, prompt_ids, n, sampling, seeds)).encode())
        if not path.exists():
            path.write_bytes(pickle.dumps(generate(self, prompt_ids, n, sampling, seeds)))
        rows = pickle.loads(path.read_bytes())
        for i, row in enumerate(rows):
            for j, completion in enumerate(row if on_finish else ()):
                on_finish(i, j, completion)
        return rows

    Policy.generate = remembered


# ---------------------------------------------------------------- the cases


class Work:
    """A folder for the cases, with what they share: task files, and the run that the instruments look at."""

    def __init__(self, folder: Path, arms: dict[str, tuple], to_nf4: Callable[[Path, Path], None]):
        """arms: name -> (model, spellings of the flags); to_nf4(model, out) writes the base of the arm nf4."""
        self.dir, self.arms = folder, arms
        held_out: dict[str, list[str]] = {}
        for line in (TINY / "held_out.jsonl").read_text(encoding="utf-8").splitlines(keepends=True):
            held_out.setdefault(json.loads(line)["mode"], []).append(line)
        chosen = "".join(line for lines in held_out.values() for line in lines[:HELD_OUT])
        self.shared = dict.fromkeys(TASK_FILES, self.make_tasks) | {
            "held.jsonl": lambda out: out.write_text(chosen),
            "tiny-nf4": lambda out: to_nf4(TINY, out),
        }

    def make_tasks(self, out: Path) -> None:
        if (done := run(TASK_FILES[out.name], self.dir)).returncode:
            raise RuntimeError(f"{done.args}: {done.stderr.strip()}")

    def folder(self, name: str, commands: str) -> Path:
        """A case's own folder, with links to the shared files that its commands name."""
        here = self.dir / name
        here.mkdir()
        for file, make in self.shared.items():
            if file in commands:
                if not (self.dir / file).exists():
                    make(self.dir / file)
                (here / file).symlink_to(self.dir / file)
        return here

    def train(self, name: str) -> tuple[CompletedProcess, Path]:
        """A training case, unless it has been run already; how it ended and its run directory."""
        model, spellings = self.arms[name]
        here = self.dir / name
        if here.exists():
            return CompletedProcess("", 0), here / "run"
        self.folder(name, f"{model} {SMALL} {spellings}")
        for flags in spellings:
            shutil.rmtree(here / "run", ignore_errors=True)
            command = f"train_azr.py --model {model} {SMALL} {flags} --out run"
            if name == "resume":
                run(f"{command} --steps 2", here)
                command += " --resume auto"
            done = run(command, here)
            if done.returncode != 2:
                break
        return done, here / "run"

    def trained(self, name: str) -> Parts:
        done, run_dir = self.train(name)
        return ended(done) | (run_parts(run_dir, self.dir) if done.returncode == 0 else {})

    def measured(self, name: str) -> Parts:
        """The commands of an instrument, on a copy of the run of `default`."""
        commands, written = COMMANDS[name]
        here = self.folder(name, f"{' '.join(commands)} held.jsonl")
        if any("{run}" in command for command in commands):
            shutil.copytree(self.train("default")[1], here / "a-run")
        for command in commands:
            done = run(command.format(run="a-run"), here)
        parts = ended(done)
        if name == PRINTED:
            parts["output"] = digest(done.stdout)
        for path in (here / name.format(run="a-run") for name in written):
            for file in sorted(path.glob("*.json*")) + sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
                parts |= file_parts(file, self.dir) if file.exists() else {file.name: "is missing"}
        return parts

    def filtered(self, name: str) -> Parts:
        """The three filters, on lines that are right or wrong in many ways, the last of which is no JSON."""
        parts: Parts = {}
        for command, lines in FILTERS.items():
            done = run(command, self.dir, "".join(json.dumps(line) + "\n" for line in lines) + "no JSON\n")
            parts[f"{command}: exit"] = str(done.returncode)
            for number, line in enumerate(done.stdout.splitlines(), 1):
                parts[f"{command}: line {number}"] = digest(json.loads(line))
        return parts

    def task_files(self, name: str) -> Parts:
        self.folder(name, " ".join(TASK_FILES))
        return {file: digest((self.dir / file).read_bytes()) for file in TASK_FILES}

    def cases(self) -> dict[str, tuple[Callable[[str], Parts], str]]:
        """name -> (function, what it runs)."""
        cases = {
            name: (self.trained, f"train_azr.py --model {model} {flags[0]}")
            for name, (model, flags) in self.arms.items()
        }
        cases |= {name: (self.measured, "; ".join(commands)) for name, (commands, _) in COMMANDS.items()}
        cases["filters"] = self.filtered, ", ".join(FILTERS)
        cases["task-files"] = self.task_files, "; ".join(TASK_FILES.values())
        return cases


def ended(done: CompletedProcess) -> Parts:
    """The exit code; of a failure in words, so that golden.json shows it."""
    last = (done.stderr or "").strip().splitlines()[-1:] if done.returncode else []
    return {"exit": " ".join([str(done.returncode), *last])}


def read_arms() -> tuple[dict[str, tuple], Callable]:
    """The training cases, name -> (model, spellings), with the arms of results/experiments.py; its rounding to NF4."""
    place = importlib.util.spec_from_file_location("experiments", ROOT / "results" / "experiments.py")
    experiments = importlib.util.module_from_spec(place)
    sys.modules["experiments"] = experiments  # where its dataclass looks itself up
    place.loader.exec_module(experiments)
    arms = {name: ("tiny", (flags,) if isinstance(flags, str) else flags) for name, flags in TRAINED.items()}
    for name, arm in experiments.ARMS.items():
        files = [Path(flag).name for flag in arm.flags.split() if flag.endswith(".jsonl")]
        # neither a base that has to be trained first nor files that differ in their content alone
        if arm.script == "train_azr.py" and not arm.model.endswith("half") and set(files) <= set(TASK_FILES):
            flags = re.sub(r"(--step-tokens) \d+", rf"\1 {STEP_TOKENS}", arm.flags.replace("{runs}/", ""))
            arms[name] = arm.model.replace("{runs}", "."), (flags,)
    return arms, experiments.round_to_nf4


# ---------------------------------------------------------------- the script


def this_machine() -> dict[str, str]:
    """What the last bit of a float can depend on."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(re.findall(r"^(vendor_id|cpu family|model|model name|flags)\s*: (.*)$", text, re.MULTILINE))
    machine = {"flags": digest(sorted(fields.pop("flags", "").split()))}
    machine["cpu"] = " ".join(fields.values()) or platform.processor()
    for name in ("torch", "transformers", "peft", "safetensors", "numpy", "bitsandbytes"):
        with contextlib.suppress(PackageNotFoundError):
            machine[name] = version(name)
    return machine | {"python": platform.python_version()}


def make(name: str, function: Callable[[str], Parts]) -> Parts:
    """Runs one case; one that breaks gives its error instead of ending everything. Says what it cost."""
    before = sum(os.times()[:4])
    try:
        parts = function(name)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        parts = {"exit": f"broken: {type(error).__name__}: {error}"}
    note = "" if parts.get("exit", "0") == "0" else f"  exit {parts['exit'][:150]}"
    print(f"{name:26s}{sum(os.times()[:4]) - before:6.1f} s{note}", file=sys.stderr, flush=True)
    return parts


def differences(stored: dict[str, Parts], made: dict[str, Parts]) -> Iterator[tuple[str, str]]:
    """(case, what differs in words)."""
    for name, parts in made.items():
        if name not in stored:
            yield name, "is not in the golden file; record it"
            continue
        for part in [*parts, *(part for part in stored[name] if part not in parts)]:
            old, new = stored[name].get(part), parts.get(part)
            if old != new:
                words = "is new" if old is None else "is gone" if new is None else "differs"
                yield name, f"{part} {words}" + (f": {new}" if part == "exit" else "")


def not_resumed(made: dict[str, Parts]) -> list[str]:
    """What the case `resume` has otherwise than the uninterrupted run."""
    if not {"default", "resume"} <= made.keys():
        return []
    return [part for part, value in made["default"].items() if made["resume"].get(part) != value]


def chosen(cases: dict[str, tuple], only: str | None) -> list[str]:
    """The names that --only matches. ValueError for a pattern that matches none."""
    names: set[str] = set()
    for pattern in (only or "*").split(","):
        matching = fnmatch.filter(cases, pattern)
        if not matching:
            raise ValueError(f"--only {pattern}: there is no such case; see python tests/golden.py list")
        names.update(matching)
    return [name for name in cases if name in names]


def load(path: Path, command: str, only: str | None) -> dict[str, Parts]:
    """The cases of the golden file that count here. ValueError if it is missing or was recorded elsewhere."""
    if command != "check" and not (command == "record" and only and path.exists()):
        return {}
    if not path.exists():
        raise ValueError(f"{path} does not exist; python tests/golden.py record")
    golden, here = json.loads(path.read_text(encoding="utf-8")), this_machine()
    if other := {key: value for key, value in golden["machine"].items() if here.get(key) != value}:
        raise ValueError(f"{path} was recorded elsewhere ({other}; here {here}), where rounding may differ; see --help")
    return golden["cases"]


def save(path: Path, cases: dict[str, Parts]) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({"machine": this_machine(), "cases": cases}, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


def main(arguments: list[str]) -> int:
    """Returns the exit code: see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "check", "list"))
    parser.add_argument("--only", metavar="NAME,...", help="these cases; * matches")
    parser.add_argument("--work", type=Path, metavar="DIR", help="a new directory for what the cases write; it stays")
    parser.add_argument("--golden", type=Path, default=GOLDEN, metavar="FILE", help="instead of tests/golden.json")
    given = parser.parse_args(arguments)
    os.environ.update(ENVIRONMENT)
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as aside:
        work = Work((given.work or Path(aside, "work")).resolve(), *read_arms())
        cases = work.cases()
        try:
            names, stored = chosen(cases, given.only), load(given.golden, given.command, given.only)
            if given.command == "list":
                print(*(f"{name:26s}{cases[name][1]}" for name in names), sep="\n")
                return 0
            work.dir.mkdir(parents=True)
        except (ValueError, OSError) as error:
            print(f"golden.py: {error}", file=sys.stderr)
            return 2
        remember_untrained(Path(aside))
        made = {name: make(name, cases[name][0]) for name in names}
    if unequal := not_resumed(made):
        print(f"resume: differs from the uninterrupted run: {', '.join(unequal)}")
    if given.command == "record":
        known = stored | made
        save(given.golden, {name: known[name] for name in cases if name in known})
        print(f"{given.golden}: {len(made)} cases recorded")
        return 1 if unequal else 0
    different = list(differences(stored, made))
    print("".join(f"{name}: {words}\n" for name, words in different), end="")
    print(f"{len(made) - len({name for name, _ in different})} of {len(made)} cases are equal")
    return 1 if different or unequal else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
