"""Samples a benchmark: N answers a problem from a base, or from a base and its unmerged adapter, into a directory.

    settings, lines = settings_of(options, benchmark)     # quantization, dtype, template as the adapter's azr.json says
    for rows, info in run_each([(settings, out)], benchmark, ranks):      # goes on where an interrupted run stopped

Files: config.json (what decides the answers), samples.jsonl (a line a sample), then graded.jsonl and result.json
by azr/evals/score.py. A sample's seed follows from (seed, problem, sample) alone, so --samples can be raised later and
only the missing ones are made. Answers are made in cells of SAMPLES_PER_CELL samples of some problems, always the same
cells in the same order, and written as they end: an interrupted run makes the cell it was in again and writes what is
missing of it. The finished file is in order, so it comes out as without the interruption. Several temperatures have a
directory each, OUT/T0.8 and so on, and the model is loaded once for all.

Of several processes (`Ranks` of azr/train/distributed.py) each takes the next cell that none has begun, so that an
answer has the company that it has in one process, and is the same to the last bit. They write beside samples.jsonl,
into samples.rank1.jsonl and so on; rank 0 joins the files, at the end or when a later call finds them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from azr.console import bar, say, warn
from azr.evals import benchmarks
from azr.evals.benchmarks import Benchmark
from azr.evals.frontier import temperatures_in
from azr.evals.held_out import sample_seed
from azr.evals.score import Alone, Row, file_of, files_of, locked, read_samples
from azr.jsonl import read_object, write_json_atomic, write_jsonl_atomic
from azr.machine import plan
from azr.models import base_description, model_path
from azr.policy.opening import Opening, agree, check_template, origin

SAMPLES_PER_CELL = 16
TOKENS_PER_CALL = 1 << 20  # a cell's answers times their longest length, about: what a kill can cost
MAX_NEW_TOKENS = 4_096
MATCH_ANSWERS, MATCH_STEPS, MATCH_CLOSE, HOTTEST = 256, 8, 0.01, 4.0


@dataclass(frozen=True)
class Settings:
    """Everything that decides the answers."""

    opening: Opening
    template: str
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    match_entropy: bool
    max_batch: int | None


# ---------------------------------------------------------------- settings


def settings_of(options, benchmark: Benchmark) -> tuple[Settings, list[str]]:
    """The settings and the lines that say where they come from. ValueError: a flag that contradicts the adapter."""
    opening = agree(options.model, options.adapter, options.quantization, options.dtype, options.template)
    described = base_description(opening.model)
    template = opening.template or (described["template"] if described else "azr")
    if benchmark.kind != "code" and template in benchmarks.TEMPLATES:
        check_template(opening, template, benchmarks.template_hash(benchmark, template))
    if options.match_entropy and not opening.adapter:
        raise ValueError("--match-entropy raises a tuned model's temperature to its base's entropy: it needs --adapter")
    if options.match_entropy and not options.temperature > 0:
        raise ValueError("--match-entropy needs a --temperature above 0")
    longest = options.max_new_tokens or (plan.TINY.max_new_tokens if described else MAX_NEW_TOKENS)
    lines = [*opening.notes, f"template {template}: {origin(options.template, opening.record.get('template'))}"]
    return Settings(
        opening,
        template,
        options.samples,
        options.temperature,
        options.top_p,
        longest,
        options.seed,
        options.match_entropy,
        plan.TINY.max_batch if described else slots(opening, longest, lines),
    ), lines


def slots(opening: Opening, longest: int, lines: list[str]) -> int | None:
    """Sequences decoded at once that the memory plan allows; None (the engine's default) for an unknown shape."""
    try:
        free = plan.free_gpu_bytes()
        preset = dataclasses.replace(
            plan.choose_preset("auto", opening.model, free)[0],
            max_new_tokens=longest,
            quantization=opening.quantization,
            dtype="fp32" if opening.dtype == "float32" else "auto",
        )
        size = plan.plan_memory(plan.shape_of(opening.model), preset, plan.capacity(preset, free)).preset.max_batch
    except plan.PlanError as error:
        lines.append(f"slots: the engine's default ({error})")
        return None
    lines.append(f"slots {size}: what the memory plan allows")
    return size


def default_out(settings: Settings, benchmark: Benchmark, several: bool) -> Path:
    """RUN/eval/CHECKPOINT-BENCHMARK-TEMPLATE for an adapter of a run, else runs/eval-MODEL[-ADAPTER]-BENCHMARK-...

    several: of several temperatures, which have a directory of their own.
    """
    tail = f"{benchmark.name}-{settings.template}" + ("-matched" if settings.match_entropy else "")
    tail += f"-seed{settings.seed}" if settings.seed else ""
    tail += "-temperatures" if several else ""
    if settings.opening.adapter:
        adapter = settings.opening.adapter.absolute()
        if adapter.parent.name == "checkpoints":
            return adapter.parent.parent / "eval" / f"{adapter.name}-{tail}"
        tail = f"{adapter.name}-{tail}"
    model = settings.opening.model
    name = re.sub(r"[^\w.-]+", "-", Path(model).name if Path(model).is_dir() else model)
    return Path("runs") / f"eval-{name}-{tail}"


def parts_of(settings: Settings, temperatures: list[float], out: Path) -> list[tuple[Settings, Path]]:
    """(settings, directory) of each temperature: `out` itself for one, else OUT/T0.8 and so on, where greedy takes one
    answer a problem. ValueError if `out` holds the other kind."""
    if len(temperatures) == 1:
        if there := temperatures_in(out):
            raise ValueError(f"{out}: holds the results of {len(there)} temperatures; give another --out")
        return [(settings, out)]
    if (out / "samples.jsonl").exists():
        raise ValueError(f"{out}: holds the samples of one temperature; give another --out")
    return [
        (dataclasses.replace(settings, temperature=t, samples=settings.samples if t else 1), out / f"T{t:g}")
        for t in temperatures
    ]


def describe(settings: Settings, policy, benchmark: Benchmark) -> dict:
    """What config.json and result.json say about where the answers come from."""
    decoding = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        "stop": list(benchmarks.stop_strings(benchmark, settings.template)),
    }
    if settings.match_entropy:
        decoding["match_entropy"] = True
    part = {"part": benchmark.part} if benchmark.part else {}
    # The embedded model by its name: where the repository lies makes no difference.
    opening = settings.opening
    name = "tiny" if opening.model == model_path("tiny") else opening.model
    return {
        "benchmark": benchmark.name,
        "benchmark_file_hash": benchmark.file_hash,
        **part,
        "model": name,
        "adapter": str(opening.adapter) if opening.adapter else None,
        "base_model": name,
        "revision": policy.info["revision"],
        "quantization": policy.info["quantization"],
        "dtype": policy.info["dtype"],
        "template": settings.template,
        "template_hash": benchmarks.template_hash(benchmark, settings.template, policy.tokenizer),
        "decoding": decoding,
    }


# ---------------------------------------------------------------- sampling


def run_each(
    parts: list[tuple[Settings, Path]], benchmark: Benchmark, ranks: Alone
) -> Iterator[tuple[list[Row], dict]]:
    """Makes what is missing; yields (samples, what describes them) for each (settings, directory), which differ in
    temperature and number of samples only. ValueError, before the first answer is sampled, for what can't be.

    The model is loaded once, and all directories are checked before.
    """
    from azr.policy.policy import Policy, Sampling

    with contextlib.ExitStack() as locks:
        for _, out in parts if ranks.leads else ():
            locks.enter_context(locked(out))
        first = parts[0][0]
        slots = {"max_batch": first.max_batch} if first.max_batch else {}
        policy = Policy.open(first.opening, **slots)
        policy.model.eval()
        prompts = encoded(policy, benchmark, first)
        described = [describe(settings, policy, benchmark) for settings, _ in parts]
        stored = [check_same(info, out) for info, (_, out) in zip(described, parts)]
        if len(parts) > 1:
            for t, place in temperatures_in(parts[0][1].parent).items():
                check_same(describe(dataclasses.replace(first, temperature=t), policy, benchmark), place)
        for (settings, out), info, old in zip(parts, described, stored):
            if len(parts) > 1:
                say(f"temperature {settings.temperature:g}, samples a problem: {settings.samples}")
            sampling = Sampling(
                settings.temperature,
                settings.top_p,
                0,
                settings.max_new_tokens,
                benchmarks.stop_strings(benchmark, settings.template),
            )
            if settings.match_entropy:
                matched = old.get("matched")
                if ranks.leads and not matched:
                    matched = match_entropy(policy, prompts, sampling, settings.seed)
                matched = ranks.exchange(matched)[0]
                info["decoding"]["temperature"] = matched["temperature"]
                info["matched"] = matched
                sampling = dataclasses.replace(sampling, temperature=matched["temperature"])
            if ranks.leads:
                write_json_atomic(out / "config.json", info)
            yield sample(policy, prompts, sampling, settings, benchmark, out, ranks), info


def encoded(policy, benchmark: Benchmark, settings: Settings) -> dict[str, list[int]]:
    """task_id -> prompt ids. ValueError if a prompt and its longest answer exceed the model's context."""
    context = getattr(policy.base.config, "max_position_embeddings", None)
    prompts = {}
    for item in benchmark.items:
        ids = policy.encode(benchmarks.prompt(item, settings.template, policy.tokenizer))
        if context and len(ids) + settings.max_new_tokens > context:
            raise ValueError(
                f"the prompt of {item.task_id} has {len(ids)} tokens, which with --max-new-tokens "
                f"{settings.max_new_tokens} exceeds the model's context of {context}; lower it"
            )
        prompts[item.task_id] = ids
    return prompts


def sample(policy, prompts: dict, sampling, settings: Settings, benchmark: Benchmark, out: Path, ranks) -> list[Row]:
    """Makes the samples that `out` lacks, each written as it ends; returns the first n of every problem.

    prompts: task_id -> prompt ids. ValueError if the file that is there has a bad line.
    """
    path, n = out / "samples.jsonl", settings.samples
    rows = ranks.exchange(joined(path, benchmark) if ranks.leads else None)[0]
    if extra := sum(sample >= n for _, sample in rows):
        warn(f"{path} has {extra} samples beyond --samples {n}: they stay, and are not looked at")
    todo, done, made = n * len(prompts), sum(sample < n for _, sample in rows), {}
    parts = [(names, missing_of(rows, names, each)) for names, each in cells(list(prompts), n, sampling.max_new_tokens)]
    parts = [(names, missing) for names, missing in parts if missing]
    with bar(f"sampling {todo} answers") as advance, open(file_of(path, ranks.rank), "ab") as file:
        advance(done, todo)
        while (turn := ranks.add(f"{out} cells", 1) - 1) < len(parts):
            names, missing = parts[turn]

            def keep(i: int, j: int, completion) -> None:
                name, j = names[i], missing[j]
                if (name, j) in rows or (name, j) in made:
                    return
                text = _text(policy, completion, sampling, settings)
                row = Row(name, j, text, "completion", len(completion.ids), completion.finish_reason)
                append(file, row)
                made[name, j] = row
                advance(done + ranks.add(f"{out} answers", 1), todo)

            seeds = [[sample_seed(settings.seed, name, j) for j in missing] for name in names]
            policy.generate([prompts[name] for name in names], len(missing), sampling, seeds, on_finish=keep)
            os.fsync(file.fileno())
        for part in ranks.exchange(made):
            rows |= part
    if ranks.leads:
        last = max([n, *(j + 1 for _, j in rows)])
        in_order(path, rows, list(prompts), last, sampling.max_new_tokens, ranks.world > 1)
    return [row for row in rows.values() if row.sample < n]


def missing_of(rows: dict, names: list[str], samples: range) -> list[int]:
    """Samples of a cell to make: those that no problem has, or, where an interruption left gaps, all of them, since an
    answer is the same to the last bit only in the same company."""
    counts = {j: sum((name, j) in rows for name in names) for j in samples}
    if all(count == len(names) for count in counts.values()):
        return []
    ragged = any(0 < count < len(names) for count in counts.values())
    return [j for j in samples if ragged or not counts[j]]


def in_order(path: Path, rows: dict, names: list[str], n: int, longest: int, lacks: bool) -> None:
    """Rewrites the file in the order of the cells, if it has another (they finish in any) or lacks what lies beside."""
    sequence = [
        rows[name, j]
        for part, samples in cells(names, n, longest)
        for name in part
        for j in samples
        if (name, j) in rows
    ]
    if lacks or sequence != list(rows.values()):
        write_jsonl_atomic(path, map(sample_line, sequence))
    for other in files_of(path)[1:]:
        other.unlink()


def cells(names: list[str], n: int, longest: int) -> Iterator[tuple[list[str], range]]:
    """Yields (problems, samples) in the order in which they are made: the first samples of all problems come first."""
    answers = max(64, min(2048, TOKENS_PER_CALL // longest))
    width = max(1, answers // SAMPLES_PER_CELL)
    for first in range(0, n, SAMPLES_PER_CELL):
        for start in range(0, len(names), width):
            yield names[start : start + width], range(first, min(n, first + SAMPLES_PER_CELL))


def _text(policy, completion, sampling, settings: Settings) -> str:
    """The response; of the plain template without the stop string, which is no part of the answer."""
    text = policy.decode(completion.ids)
    if completion.finish_reason == "stop" and settings.template == "plain":
        ends = [text.find(stop) for stop in sampling.stop if stop in text]
        text = text[: min(ends)] if ends else text
    return text


# ---------------------------------------------------------------- the directory


def joined(path: Path, benchmark: Benchmark) -> dict[tuple[str, int], Row]:
    """The samples in the file, which is made if there is none, and in those beside it; all in the one afterwards."""
    path.touch()
    rows, parts = {}, files_of(path)
    for part in parts:  # a sample may be in two of them, after a kill between the joining and the unlinking
        repair(part)
        if part.stat().st_size:
            rows |= {(row.task_id, row.sample): row for row in read_samples(part, benchmark)}
    if parts[1:]:
        write_jsonl_atomic(path, map(sample_line, rows.values()))
    for part in parts[1:]:
        part.unlink()
    return rows


def repair(path: Path) -> None:
    """Cuts off a last line without its end, which a kill in the middle of a write leaves."""
    data = path.read_bytes()
    keep = data.rfind(b"\n") + 1
    if keep < len(data):
        warn(f"{path}: the last line was cut off in its writing; it is made again")
        os.truncate(path, keep)


def sample_line(row: Row) -> dict:
    """What samples.jsonl says of a sample."""
    return {
        "task_id": row.task_id,
        "sample": row.sample,
        "completion": row.text,
        "tokens": row.tokens,
        "finish_reason": row.finish_reason,
    }


def append(file, row: Row) -> None:
    """Writes one sample as a line of ASCII, at once, so that a kill costs no sample that ended before."""
    file.write((json.dumps(sample_line(row)) + "\n").encode("ascii"))
    file.flush()


def check_same(info: dict, out: Path) -> dict:
    """What config.json says, {} if there is none. ValueError if it says that the samples were made in another way."""
    path, samples = out / "config.json", out / "samples.jsonl"
    if not path.is_file():
        if any(file.is_file() and file.stat().st_size for file in files_of(samples)):
            raise ValueError(f"{out}: has samples, but no config.json that says what made them; give another --out")
        return {}
    stored = read_object(path)
    if "benchmark" not in stored:
        raise ValueError(f"{out}: holds something else (its config.json names no benchmark); give another --out")
    old, new = flat(stored), flat(info)
    if changed := [f"{key} {old.get(key)} -> {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]:
        raise ValueError(
            f"{out}: holds samples made in another way ({'; '.join(changed)}); repeat the old settings, or "
            "give another --out"
        )
    return stored


def flat(info: dict) -> dict:
    """The settings with decoding's at the top level, to compare two of them. Instead of a matched temperature, which
    follows from the rest and is known only later, the base's."""
    matched = {"temperature": info["matched"]["base_temperature"]} if "matched" in info else {}
    return {
        key: value
        for key, value in (info | info.get("decoding", {}) | matched).items()
        if key not in ("decoding", "matched")
    }


# ---------------------------------------------------------------- equal entropy


def match_entropy(policy, prompts: dict, sampling, seed: int) -> dict:
    """The temperature at which the tuned model's token entropy equals its base's at sampling.temperature.

    Each entropy is the mean over response tokens, in nats, of the whole distribution at that temperature (before
    top-p), on answers sampled at it: MATCH_ANSWERS of them, the same prompts and seeds each time. Bisection, up to
    HOTTEST. Yue et al., arXiv 2504.13837, find that this closes a part of the gap at large k.
    """
    names = list(prompts)[:: max(1, len(prompts) // MATCH_ANSWERS)][:MATCH_ANSWERS]
    n = max(1, MATCH_ANSWERS // len(names))
    ids, start = [prompts[name] for name in names], sampling.temperature
    seeds = [[sample_seed(seed, f"match-entropy/{name}", j) for j in range(n)] for name in names]

    def entropy(temperature: float) -> float:
        rows = policy.generate(ids, n, dataclasses.replace(sampling, temperature=temperature), seeds)
        values = [value for row in rows for completion in row for value in completion.entropy]
        return sum(values) / len(values)

    with bar("matching the base's entropy") as advance:
        with policy.disable_adapter():
            target = entropy(start)
        low = high = temperature = start
        tuned = entropy(start)
        while tuned < target and high < HOTTEST:
            low, high = high, min(HOTTEST, 1.5 * high)
            temperature, tuned = high, entropy(high)
        for step in range(MATCH_STEPS if tuned > target and high > start else 0):
            if abs(tuned - target) <= MATCH_CLOSE * target:
                break
            temperature = (low + high) / 2
            tuned = entropy(temperature)
            low, high = (temperature, high) if tuned < target else (low, temperature)
            advance(step + 1, MATCH_STEPS)
    if tuned < (1 - 5 * MATCH_CLOSE) * target:
        warn(f"even at temperature {temperature:.2f} the tuned model's entropy is below the base's")
    if temperature == start:
        warn("the tuned model's entropy is not below the base's: its temperature stays")
    return {
        "temperature": round(temperature, 4),
        "base_temperature": start,
        "base_entropy": target,
        "entropy": tuned,
        "answers": n * len(names),
    }
