"""Sampling and judging: what the phases of train_azr.py have in common. `s` is its State.

samples = generate(s, "solver", modes, prompts, 8, "3/solve")     # 8 responses to each prompt, in order
samples = judged(s, samples)                                      # with their verdicts; what has none is left out
"""

from __future__ import annotations

import math

from azr.console import pulse
from azr.evals import math_answers
from azr.evals.held_out import sample_seed
from azr.tasks import Parsed, Sample, Task, judge, propose_prompt


def generate(s, role: str, modes: list[str], prompts: list[str], n: int, key: str) -> list[Sample]:
    """n responses to each prompt as Samples, in order; `key` and the place of the prompt make their seeds and group."""
    ids = [s.policy.encode(prompt) for prompt in prompts]
    seeds = [[sample_seed(s.config.seed, f"{key}/{i}", j) for j in range(n)] for i in range(len(ids))]
    title = ", ".join(key.split("/"))  # a step's number and phase, or "seed", its round and phase
    share = math.ceil(n * len(ids) / s.ranks.world)
    advance = pulse(f"step {title}" if title[0].isdigit() else title, share, "responses")
    with s.policy.using(s.arms.adapter(role, "default")):
        completions = s.policy.generate(
            ids, n, s.sampling, seeds, on_finish=lambda i, j, completion: advance(1, len(completion.ids))
        )
    return [
        Sample(role, modes[i], prompts[i], ids[i], completion, s.policy.decode(completion.ids), f"{key}/{i}")
        for i, row in enumerate(completions)
        for completion in row
    ]


def fitting_prompt(s, mode: str, references: list[Task]) -> str:
    """The proposer's prompt, without the last references if it would be longer than prompt_tokens with them."""
    prompt = propose_prompt(mode, references, s.template)
    while mode != "induction" and references and len(s.policy.encode(prompt)) > s.config.prompt_tokens:
        references = references[:-1]
        prompt = propose_prompt(mode, references, s.template)
    return prompt


def read(sample: Sample, parsed: Parsed) -> Parsed:
    """`parsed`, or why there was nothing to parse: a request too long for the KV cache comes back without a token."""
    if sample.completion.finish_reason != "too_long":
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
