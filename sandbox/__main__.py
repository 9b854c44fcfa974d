"""The sandbox from the command line.

    python -m sandbox run [--profile proposal|benchmark] [--workers N] [--allow-weak] < jobs.jsonl > outcomes.jsonl
    python -m sandbox doctor

`run` is a filter: {"code", "inputs": [str, ...]} a line in (and, if wanted, "id", "entry", "cpu_seconds"),
{"outcomes": [...]} a line out, in order, as soon as they are known. A bad line gives {"error", "line"}; then the
exit code is 1. `doctor` tells what protects this machine and tries it; exit code 1 when programs cannot be confined.
"""

import argparse
import json
import os
import select
import sys

from . import BENCHMARK, PROPOSAL, Job, Sandbox, SandboxError

LINE_BYTES = 16_000_000
MAX_WORKERS = 1024
_CHUNK = 256  # lines in work at the same time; fewer when fewer are there


class BadLine(ValueError):
    """The line is no job; the text says why."""


def read_job(line: bytes) -> tuple[Job, dict]:
    """The job of one line and what is to be echoed. Raises BadLine."""
    if len(line) > LINE_BYTES:
        raise BadLine(f"the line is longer than {LINE_BYTES} bytes")
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BadLine(f"not JSON: {error}") from error
    if type(record) is not dict:
        raise BadLine("an object is expected")
    code, inputs, entry, cpu = (record.get(key) for key in ("code", "inputs", "entry", "cpu_seconds"))
    if type(code) is not str:
        raise BadLine('"code" must be a string' if "code" in record else '"code" is missing')
    if type(inputs) is not list or not all(type(text) is str for text in inputs):
        raise BadLine('"inputs" must be a list of strings' if "inputs" in record else '"inputs" is missing')
    if entry is not None and not (type(entry) is str and entry.isidentifier()):
        raise BadLine('"entry" must be the name of a function')
    if cpu is not None and not (type(cpu) in (int, float) and 0.001 <= cpu <= 3600):
        raise BadLine('"cpu_seconds" must be a number from 0.001 to 3600')
    for text in [code, *inputs]:
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise BadLine("a NUL or a lone surrogate in the text")
    return Job(code, tuple(inputs), cpu, entry or "f"), {"id": record["id"]} if "id" in record else {}


def lines_at_hand(stream, limit: int):
    """Lists of up to `limit` lines: waits for one, then takes those that are there already.

    So a caller who writes one line and waits for its answer gets it, and one who writes thousands is answered in bulk.
    """
    buffer, descriptor, ended = b"", stream.fileno(), False
    while not ended or buffer:
        while not ended and (
            b"\n" not in buffer
            or buffer.count(b"\n") < limit
            and len(buffer) < LINE_BYTES
            and select.select([descriptor], [], [], 0)[0]
        ):
            data = os.read(descriptor, 1 << 20)
            ended = not data
            buffer += data
            if len(buffer) > LINE_BYTES and b"\n" not in buffer:
                buffer, ended = _skip_line(descriptor, buffer)
        *lines, buffer = buffer.split(b"\n", limit)
        if ended and len(lines) < limit:
            lines, buffer = lines + ([buffer] if buffer else []), b""
        if lines:
            yield lines


def _skip_line(descriptor, buffer):
    """Forgets all but the first LINE_BYTES + 1 bytes of a line that is too long."""
    head = buffer[: LINE_BYTES + 1]
    while True:
        data = os.read(descriptor, 1 << 20)
        if not data:
            return head, True
        _, newline, rest = data.partition(b"\n")
        if newline:
            return head + newline + rest, False


def run(arguments) -> int:
    """The filter; exit code 1 if a line was bad."""
    profile = {"proposal": PROPOSAL, "benchmark": BENCHMARK}[arguments.profile]
    number, bad = 0, 0
    with Sandbox(arguments.workers, profile, arguments.allow_weak) as sandbox:
        for lines in lines_at_hand(sys.stdin.buffer, _CHUNK):
            answers, jobs = [], []
            for line in lines:
                number += 1
                try:
                    job, echo = read_job(line)
                    jobs.append(job)
                    answers.append(echo)
                except BadLine as error:
                    bad += 1
                    answers.append({"error": str(error), "line": number})
            results = iter(sandbox.run(jobs))  # those of the good lines, in order
            for answer in answers:
                if "error" not in answer:
                    answer["outcomes"] = [_record(outcome) for outcome in next(results)]
                print(json.dumps(answer))
            sys.stdout.flush()
    return 1 if bad else 0


def _record(outcome):
    if outcome.status == "ok":
        return {"status": "ok", "output": outcome.output}
    return {"status": outcome.status, "detail": outcome.detail}


def doctor(arguments) -> int:
    """What protects this machine, each protection tried; exit code 1 if one that matters is missing."""
    with Sandbox(arguments.workers, allow_weak=arguments.allow_weak) as sandbox:
        trials = {
            "a program is answered": (Job("def f(x): return x + 1", ("1",)), "ok", ""),
            "a loop is ended by its CPU time": (Job("def f(x):\n while 1: pass", ("1",), 0.1), "timeout", ""),
            "memory is limited": (Job("def f(x): return [0] * 10 ** 9", ("1",)), "memory", ""),
            "imports come from the list": (Job("import os\ndef f(x): return 1", ("1",)), "forbidden", "import os"),
        }
        results = sandbox.run([job for job, _, _ in trials.values()])
        for name, value in sandbox.state.items():
            print(f"{name:20} {value}")
        fine = not sandbox.state["weak"]
        for (name, (_, status, detail)), [outcome] in zip(trials.items(), results):
            good = outcome.status == status and outcome.detail.startswith(detail)
            fine = fine and good
            print(f"{name:40} {'yes' if good else f'NO: {outcome.status} {outcome.detail}'}")
    return 0 if fine else 1


class Parser(argparse.ArgumentParser):
    """Errors in one line; azr/command.py has more, but this folder needs nothing of azr/."""

    def error(self, message):
        """Prints the line and ends the process with exit code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def workers(text: str) -> int:
    """The number of --workers. argparse's error for what is none."""
    if not (text.isdecimal() and len(text) <= 4 and 1 <= int(text) <= MAX_WORKERS):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MAX_WORKERS:,}, not {text!r}")
    return int(text)


def main() -> int:
    """Exit code 2: the sandbox cannot work here, or bad arguments."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m sandbox", description=__doc__, formatter_class=shape)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, action, text in (
        ("run", run, "jobs in, outcomes out, one JSON object a line"),
        ("doctor", doctor, "what protects us"),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(action=action)
        command.add_argument("--workers", type=workers, help="jobs at a time (default: one a core)")
        command.add_argument("--allow-weak", action="store_true", help="go on without seccomp, with limits alone")
        if name == "run":
            what = "proposal (default): some modules only, no clocks and no chance; benchmark: all of Python"
            command.add_argument("--profile", choices=("proposal", "benchmark"), default="proposal", help=what)
    arguments = parser.parse_args()
    try:
        return arguments.action(arguments)
    except SandboxError as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 2 if arguments.command == "run" else 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has gone: nothing more to say at exit
        return 1


if __name__ == "__main__":
    sys.exit(main())
