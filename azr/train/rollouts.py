"""Sampling and judging: what the phases of train_azr.py have in common. `s` is its State.

samples = generate(s, "solver", modes, prompts, 8, "3/solve", parse)     # 8 responses to each prompt, in order
samples = judged(s, samples)                                      # with their verdicts; what has none is left out
"""

from __future__ import annotations

import math

from azr.console import pulse
from azr.evals import math_answers
from azr.evals.held_out import sample_seed
from azr.tasks import Parsed, Sample, Task, judge, propose_prompt


def generate(s, role: str, modes: list[str], prompts: list[str], n: int, key: str, parse, names=()) -> list[Sample]:
    """n responses to each prompt as Samples, in order, with what parse(place of the prompt, response) finds in each.

    `key` and the name of the prompt (default: its place) make its seeds and its group.
    """
    names = names or [str(i) for i in range(len(prompts))]
    ids = [s.policy.encode(prompt) for prompt in prompts]
    rows = completions(s, role, ids, [seeds_of(s, key, name, n) for name in names], key, parse)
    samples = [
        Sample(role, modes[i], prompts[i], ids[i], completion, s.policy.decode(completion.ids), f"{key}/{names[i]}")
        for i, row in enumerate(rows)
        for completion in row
    ]
    for k, sample in enumerate(samples):
        sample.entropy = sample.completion.entropy
        sample.parsed = read(sample.completion, parse(k // n, sample.response))
    return samples


def completions(s, role: str, ids: list[list[int]], seeds: list[list[int]], key: str, parse) -> list[list]:
    """A completion of each prompt for each of its seeds: what was sampled ahead, and the others now. While proposals
    are sampled, the engine works ahead (azr/train/ahead.py)."""
    known, ahead = s.ahead.completions if s.ahead else {}, s.ahead if role == "proposer" else None
    rows = [[known.get((tuple(prompt), seed)) for seed in row] for prompt, row in zip(ids, seeds)]
    missing = [i for i, row in enumerate(rows) if None in row]
    # a step's number and phase, or "seed", its round and phase
    title, n = ", ".join(key.split("/")), len(seeds[0]) if seeds else 0
    title = f"step {title}" if title[0].isdigit() else title
    advance = pulse(title, math.ceil(n * len(missing) / s.ranks.world), "responses")

    def ended(i: int, j: int, completion) -> None:
        advance(1, len(completion.ids))
        if ahead and i < len(missing):
            parsed = parse(missing[i], s.policy.decode(completion.ids))
            ahead.proposed(i, completion, read(completion, parsed))
        elif ahead:
            ahead.answered(i - len(missing), j, completion)

    asked = [ids[i] for i in missing]
    further = ahead.expect(asked, advance) if ahead else {}
    with s.policy.using(s.arms.adapter(role, "default")):
        fresh = iter(s.policy.generate(asked, n, s.sampling, [seeds[i] for i in missing], on_finish=ended, **further))
    if ahead:
        ahead.settle()
    return [next(fresh) if None in row else row for row in rows]


def seeds_of(s, key: str, name: str, n: int) -> list[int]:
    """The seeds of the n responses to the prompt of that name."""
    return [sample_seed(s.config.seed, f"{key}/{name}", j) for j in range(n)]


def fitting_prompt(s, mode: str, references: list[Task]) -> str:
    """The proposer's prompt, without the last references if it would be longer than prompt_tokens with them."""
    prompt = propose_prompt(mode, references, s.template)
    while mode != "induction" and references and len(s.policy.encode(prompt)) > s.config.prompt_tokens:
        references = references[:-1]
        prompt = propose_prompt(mode, references, s.template)
    return prompt


def read(completion, parsed: Parsed) -> Parsed:
    """`parsed`, or why there was nothing to parse: a request too long for the KV cache comes back without a token."""
    if completion.finish_reason != "too_long":
        return parsed
    return Parsed(False, None, "too_long", "its prompt and longest response do not fit the KV cache")


def judged(s, samples: list[Sample]) -> list[Sample]:
    """The samples with the verdicts of the sandbox, or of math-verify on mathematical answers. One that no verdict
    could be had for (reason infra: the machine failed, not the model) is left out and counted."""
    code = [sample for sample in samples if sample.mode != "math"]
    maths = [sample for sample in samples if sample.mode == "math"]
    verdicts = judge([(sample.task, sample.parsed.value) for sample in code], s.sandbox)
    for sample, verdict in zip(code, verdicts):
        sample.detail = verdict.detail
    pairs = [(sample.task.answer, math_answers.extract(sample.response)) for sample in maths]
    verdicts = [*verdicts, *(s.ranks.shared(s.grader.grade, pairs) if pairs else [])]
    for sample, verdict in zip(code + maths, verdicts):
        sample.correct = verdict.ok
        sample.reason = verdict.reason if sample.parsed.value is not None else sample.parsed.reason
    s.clock.lap("judge")
    with_verdict = [sample for sample in samples if sample.reason != "infra"]
    s.clock.count("unjudged", len(samples) - len(with_verdict))
    return with_verdict
