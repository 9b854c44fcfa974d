"""The three modes of self-play: tasks, reading responses, validating proposals, judging answers, buffers.

    deduction   program and input are given, the output is asked
    abduction   program and output are given, an input is asked (any that gives the output)
    induction   five input/output pairs and a message are given, a program is asked; judged on five hidden pairs

    from azr.tasks import Task, validate, judge        the rest is in the files of this folder
    python -m azr.tasks validate < proposals.jsonl      one verdict a line, in order
    python -m azr.tasks judge < answers.jsonl

Nothing a model wrote is evaluated in this process: values are read by `sandbox.literal`, programs run in the sandbox,
and an expected answer never enters a process that runs model-written code. Equality is Python's == on the values,
with NaN equal to NaN and floats equal within a relative 1e-9.

Left out: rewards and advantages (train_azr.py), mathematics and public benchmarks (azr/evals/benchmarks.py), torch.
"""

HOME = {
    "buffers": ("Buffers",),
    "duplicates": ("duplicate_key",),
    "judging": ("judge",),
    "parse": ("parse_answer", "parse_proposal"),
    "prompts": ("STOP", "propose_prompt", "solve_prompt", "template_hash"),
    "task": (
        "FIELDS",
        "INDUCTION_INPUTS",
        "MODES",
        "SEED_PROGRAM",
        "SEED_TASKS",
        "VISIBLE",
        "Parsed",
        "Proposal",
        "Sample",
        "Task",
        "Verdict",
    ),
    "validation": ("validate",),
}
__all__ = [name for names in HOME.values() for name in names]


def __getattr__(name: str):
    """The names above, each imported when it is asked for: a caller that needs a constant does not load the judge."""
    import importlib

    home = next((module for module, names in HOME.items() if name in names), None)
    if home is None:
        raise AttributeError(f"azr.tasks has no {name}")
    return getattr(importlib.import_module(f"azr.tasks.{home}"), name)
