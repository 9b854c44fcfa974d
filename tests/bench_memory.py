"""Memory and time of scoring and training: how much above what is given, and against the naive forms.

    python tests/bench_memory.py [--json FILE] [--quick]        # scoring on the CPU; on a GPU also training and a step
    python tests/bench_memory.py --tasks FILE.jsonl             # whole step: solve these tasks (default: seed tasks)

Scoring: log-probs of N tokens of a vocabulary of 151,936 and their gradient, `ChunkedLogProb` against (a) log_softmax
and (b) logsumexp over all the logits, which is what most trainers do. Each case runs in a process of its own; memory
is the peak of that process (GPU: of the allocator) above what it held with hidden states and head in place, so the
gradient of the hidden states counts. Time is the median of CPU seconds (GPU: wall) of forward and backward; the ratio
is against (a). The error of the gradient is relative to (a) in fp32 on the same numbers, rounded as ours is.

Training (GPU): Qwen2.5-Coder's shapes, random weights built as NF4 with LoRA of rank 32, the allocator capped at 24 GB:
one 8,192-token micro-batch forward, backward and AdamW; and a whole step at the 24gb preset with every response forced
to a length, since random weights propose nothing valid. Exit code 1: a bound does not hold.
"""

import argparse
import ctypes
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch

VOCABULARY, MIB, GB, CAP = 151_936, 2**20, 1e9, 24e9
MOST_ABOVE = 300 * MIB  # bound of chunked scoring
MOST_TRAINING = {"3B": 8 * GB, "7B": 14 * GB}
MINUTES = 10


# ---------------------------------------------------------------- in the child: one case, one JSON line


def naive_log_softmax(hidden, weight, target):
    log_p = (hidden.float() @ weight.float().t()).log_softmax(-1)
    return log_p.gather(-1, target[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def naive_logsumexp(hidden, weight, target):
    z = hidden.float() @ weight.float().t()
    log_z = z.logsumexp(-1)
    p = (z - log_z[:, None]).exp()
    return z.gather(-1, target[:, None]).squeeze(-1) - log_z, log_z - (p * z).sum(-1)


def chunked(hidden, weight, target):
    from azr.policy.scoring import ChunkedLogProb

    return ChunkedLogProb.apply(hidden, weight, target)


METHODS = {"log_softmax": naive_log_softmax, "logsumexp": naive_logsumexp, "chunked": chunked}


def scoring_case(case: dict) -> dict:
    device, dtype = torch.device(case["device"]), getattr(torch, case["dtype"])
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(VOCABULARY, case["hidden"], dtype=dtype)
    for rows in weight.split(8192):  # in pieces: the peak must not be that of making the inputs
        rows.copy_(torch.randn(rows.shape, generator=generator) * 0.05)
    target = torch.randint(0, VOCABULARY, (case["tokens"],), generator=generator)
    grad = torch.randn(case["tokens"], generator=generator)
    if case["head"] == "tied":  # the hidden states lie near rows of the table that is the head too
        hidden = weight[torch.randint(0, VOCABULARY, (case["tokens"],), generator=generator)].float() * 20
        hidden = (hidden + torch.randn(hidden.shape, generator=generator)).to(dtype)
    else:
        hidden = torch.randn(case["tokens"], case["hidden"], generator=generator).to(dtype)
    weight, target, grad, hidden = (x.to(device) for x in (weight, target, grad, hidden))

    def run(name):
        leaf = hidden.detach().requires_grad_()
        log_prob, _ = METHODS[name](leaf, weight, target)
        (log_prob * grad).sum().backward()
        return leaf.grad

    tiny = hidden[:1].detach().requires_grad_()  # libraries allocate their work space at the first use
    METHODS[case["method"]](tiny, weight[:64], target[:1] % 64)[0].sum().backward()
    before = _now(device)
    run(case["method"])
    result = {"above": _peak(device) - before, "seconds": []}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for _ in range(case["repeats"]):
        start = clock()
        run(case["method"])
        if device.type == "cuda":
            torch.cuda.synchronize()
        result["seconds"].append(clock() - start)
    if case["method"] == "chunked" and case["compare"]:
        ours, theirs = run("chunked").double(), run("log_softmax").double()
        result["error"] = ((ours - theirs).norm() / theirs.norm()).item()
    return result


def _now(device) -> int:
    """Bytes in use; starts the measurement of a peak."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # glibc: what making the inputs has freed would be used again, uncounted
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak(device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def capped_policy(case: dict):
    """Random weights on the device of the case, under the cap if that is a GPU."""
    from azr.machine.plan import QWEN25, Shape
    from random_weights import random_policy

    small = Shape(64, 2, 4, 2, 128, 1000, True, 16)
    if case["device"] == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / torch.cuda.get_device_properties(0).total_memory))
    policy = random_policy(
        QWEN25.get(case["size"], small),
        "nf4",
        case["device"],
        32,
        tokenizer=case.get("tokenizer"),
        max_batch=case.get("max_batch", 8),
    )
    policy.checkpoint_activations()
    return policy


def training_case(case: dict) -> dict:
    """An optimizer step on one micro-batch of `tokens`: four samples, half of each is the response."""
    policy = capped_policy(case)
    from azr.train.update import make_optimizer

    built, optimizer = _used(case), make_optimizer(policy, 1e-5)
    half = case["tokens"] // 8
    prompts = [[1 + (i * 37 + j) % 400 for j in range(half)] for i in range(4)]
    responses = [[1 + (i * 53 + j) % 400 for j in range(half)] for i in range(4)]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for scored in policy.score(prompts, responses, token_budget=case["tokens"], with_grad=True):
            scored.log_prob.sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if case["device"] == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"built": built, "peak": _used(case), "tokens_per_second": case["tokens"] / statistics.median(seconds)}


def step_case(case: dict) -> dict:
    """Sampling and update of a step at the preset's sizes: proposals, eight answers to each task, one AdamW step."""
    import dataclasses

    import train_azr
    from azr.policy.backoff import Sizes
    from azr.policy.policy import Sampling
    from azr.tasks import MODES, SEED_TASKS, Sample
    from azr.tasks.prompts import propose_prompt, solve_prompt
    from azr.train.config import Config, resolve
    from azr.train.update import make_optimizer

    preset = resolve(Config(model="qwen-3b", preset="24gb", quantization="nf4"))[0]
    preset = dataclasses.replace(preset, **case.get("sizes", {}))
    policy = capped_policy({**case, "max_batch": preset.max_batch})
    optimizer, sizes = make_optimizer(policy, preset.learning_rate), Sizes(preset.token_budget)
    tasks = tasks_of(case["tasks"])[:64] if case["tasks"] else list(SEED_TASKS.values()) * 22
    asked = [
        ("proposer", mode, propose_prompt(mode, [SEED_TASKS["deduction"]], "azr"), 1)
        for mode in MODES
        for _ in range(preset.prompts_per_mode)
        if mode != "induction"
    ]
    asked += [("solver", task.mode, solve_prompt(task, "azr"), preset.answers) for task in tasks[: case["count"]]]
    start, samples, seconds = time.perf_counter(), [], {}
    for role in ("proposer", "solver"):
        mine = [
            (mode, policy.encode(prompt)[: preset.prompt_tokens], n) for who, mode, prompt, n in asked if who == role
        ]
        n = mine[0][2]
        # no end-of-text token and no stop string: every response has the forced length
        sampling = Sampling(max_new_tokens=case["length"], stop=())
        seeds = [[1000 * i + j for j in range(n)] for i in range(len(mine))]
        rows = policy.generate([ids for _, ids, _ in mine], n, sampling, seeds)
        for i, ((mode, ids, _), row) in enumerate(zip(mine, rows)):
            samples += [Sample(role, mode, "", ids, c, "", str(i), advantage=(-1.0) ** k) for k, c in enumerate(row)]
        seconds[role] = time.perf_counter() - start
    metrics = train_azr.optimizer_step(train_azr.State(preset, policy, optimizer, sizes=sizes), samples)
    seconds["update"] = time.perf_counter() - start - sum(seconds.values())
    sampled = sum(len(s.completion.ids) for s in samples)
    return {
        "peak": _used(case),
        "seconds": seconds,
        "samples": len(samples),
        "sampled_tokens": sampled,
        "log_prob_gap": metrics["log_prob_gap"],
        "token_budget": sizes.token_budget,
    }


def tasks_of(path: str) -> list:
    """Tasks as this project writes them, or {"snippet", "input", "output"} as in the published seed files."""
    from azr.evals.held_out import load_tasks
    from azr.tasks import Task

    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if "snippet" not in lines[0]:
        return load_tasks(path)
    return [Task("deduction", row["snippet"], row["input"], row["output"]) for row in lines]


def _used(case: dict) -> int:
    return torch.cuda.max_memory_reserved() if case["device"] == "cuda" else _peak(torch.device("cpu"))


CASES = {"scoring": scoring_case, "training": training_case, "step": step_case}


# ---------------------------------------------------------------- the parent


def child(kind: str, **case) -> dict:
    """The result of one case, from a process of its own; {"failed": reason} if it ends otherwise."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps({"kind": kind, **case})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result within {MINUTES} minutes"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def scoring(device: str, quick: bool) -> tuple[list[dict], bool]:
    hidden, repeats = (512 if quick else 2048) if device == "cpu" else 2048, 1 if quick and device == "cpu" else 3
    tokens, longer = (256, 1024) if device == "cpu" else (1024, 8192)
    rows, ok = [], True
    print(f"scoring, vocabulary {VOCABULARY:,}, hidden {hidden}, on {device}: peak MiB above the inputs, seconds")
    for dtype, head in (("float32", "untied"), ("bfloat16", "tied"), ("bfloat16", "untied")):
        base = {"device": device, "dtype": dtype, "head": head, "hidden": hidden, "repeats": repeats}
        naive = None
        for method, count in (
            ("log_softmax", tokens),
            ("logsumexp", tokens),
            ("chunked", tokens),
            ("chunked", longer),
        ):
            row = {**base, "method": method, "tokens": count}
            row |= child("scoring", **row, compare=count == tokens)
            rows.append(row)
            name = f"  {dtype:9} {head:7} {method:12} {count:5} tokens"
            if "failed" in row:
                ok = False
                print(f"{name} failed: {row['failed']}", flush=True)
                continue
            seconds = statistics.median(row["seconds"])
            naive = naive or seconds
            line = f"{name} {row['above'] / MIB:8.0f} {seconds:8.2f}"
            line += f"   {seconds / naive:.2f}x" if count == tokens else ""
            if method == "chunked":
                good = (
                    row["above"] <= MOST_ABOVE and row.get("error", 0) < 1e-4 and (count > tokens or seconds <= naive)
                )
                ok = ok and good
                line += f"   gradient {row['error']:.1e}" if "error" in row else ""
                line += "" if good else "   MISSED"
            print(line, flush=True)
    return rows, ok


def training(device: str, quick: bool, tasks: str | None, tokenizer: str | None) -> tuple[list[dict], bool]:
    rows, ok = [], True
    real = device == "cuda"
    for size in ("3B", "7B") if real else ("small",):
        case = {"device": device, "size": size, "tokens": 8192 if real else 512, "tokenizer": tokenizer}
        row = {"what": f"{size}, one micro-batch of {case['tokens']} tokens", **child("training", **case)}
        row["bound"] = MOST_TRAINING.get(size)
        rows.append(row)
    sizes = (
        {} if real else {"prompts_per_mode": 2, "answers": 2, "token_budget": 512, "max_batch": 4, "prompt_tokens": 64}
    )
    case = {
        "device": device,
        "size": "3B" if real else "small",
        "tasks": tasks,
        "tokenizer": tokenizer,
        "sizes": sizes,
    }
    case |= {"count": 64 if real else 2, "length": (256 if quick else 1024) if real else 8}
    row = {"what": f"whole step, {case['count']} tasks, responses of {case['length']}", **child("step", **case)}
    rows.append({**row, "bound": CAP if real else None})
    print(f"training, NF4 + LoRA rank 32, {'capped at 24 GB' if real else 'CPU SMOKE TEST, no GPU figure'}: peak GB")
    for row in rows:
        missed = "failed" in row or (row["bound"] and row["peak"] > row["bound"])
        ok = ok and not missed
        shown = row.get("failed") or f"{row['peak'] / GB:.2f}" + (
            f" (bound {row['bound'] / GB:.0f})" if row["bound"] else ""
        )
        more = {k: row[k] for k in ("tokens_per_second", "seconds", "log_prob_gap") if k in row}
        print(
            f"  {row['what']:48} {shown} {json.dumps(more) if more else ''}{'   MISSED' if missed else ''}",
            flush=True,
        )
    return rows, ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--quick", action="store_true", help="smaller cases, one repetition")
    parser.add_argument("--tasks", metavar="FILE", help="tasks of the whole step, JSON lines")
    parser.add_argument("--tokenizer", metavar="DIR", help="a tokenizer for the whole step (default: the embedded one)")
    parser.add_argument("--only", choices=("scoring", "training"))
    parser.add_argument("--cpu", action="store_true", help=argparse.SUPPRESS)  # tiny sizes, to see that training runs
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        case = json.loads(options.child)
        print(json.dumps(CASES[case.pop("kind")](case)))
        return 0
    device, results, ok = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu", {}, True
    if options.only != "training":
        results["scoring"], ok = scoring(device, options.quick)
    if options.only != "scoring" and (device == "cuda" or options.cpu):
        results["training"], good = training(device, options.quick, options.tasks, options.tokenizer)
        ok = ok and good
    elif options.only != "scoring":
        print("training: needs a GPU, left out")
    if options.json:
        gpu = torch.cuda.get_device_name() if device == "cuda" else None
        Path(options.json).write_text(json.dumps({"gpu": gpu, "torch": torch.__version__, **results}, indent=1) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
