"""Is a proposal a task? It runs, it is deterministic, its values are short literals, it is not trivial, it is new.
The last two are asked of the text, and then of what the program does on inputs that its author did not choose.

    with Sandbox() as sandbox:
        [verdict] = validate([Proposal("deduction", "def f(x):\n    return x * 2 + 1", ("3",))], sandbox)
    verdict.ok, verdict.reason, verdict.task.output         # True, "ok", "7"

Imports the other files of this folder and the sandbox.
"""

from __future__ import annotations

from dataclasses import replace

from azr.tasks.behaviour import CPU_SECONDS, observe
from azr.tasks.duplicates import duplicate_key, instance_key, program_key
from azr.tasks.messages import expressions, leak, shows
from azr.tasks.program import MAX_SOURCE, bare, read_program, skeleton
from azr.tasks.task import INDUCTION_INPUTS, VISIBLE, Proposal, Task, Verdict, bad_characters
from sandbox import Job, Outcome, Sandbox, literal

MIN_OUTPUTS = 3  # distinct outputs of an induction task: with fewer, a constant or a test is a good guess
MIN_HIDDEN = 2  # distinct ones among the hidden pairs, which decide
# Characters: what a prompt shows in full, and of a program what is read.
MAX_PROGRAM, MAX_INPUT, MAX_MESSAGE, MAX_OUTPUT = MAX_SOURCE, 1_000, 2_000, 400


def validate(
    proposals: list[Proposal],
    sandbox: Sandbox,
    known: set[str] | None = frozenset(),
    max_output_chars: int = MAX_OUTPUT,
    exempt: set[str] = frozenset(),
    held_out: frozenset[str] = frozenset(),
) -> list[Verdict]:
    """A verdict for each proposal, in order; a valid one carries its task. Raises SandboxError, nothing on a proposal.

    known: `Buffers.keys()`, the keys of tasks that exist already; a proposal repeated in the list is a duplicate of the
    first valid one. None: every proposal for itself, no duplicates.
    exempt: programs that an induction proposal may be about although they are trivial: {SEED_PROGRAM} in the seed
    stage, where nothing else could be given to the proposer.
    held_out: skeletons (azr.tasks.program) of programs that measure and must not be trained on.
    max_output_chars: of each output's text.
    """
    verdicts: list[Verdict | None] = [None] * len(proposals)
    first, repeats, runs = {}, [], []  # runs: (position, proposal with canonical inputs)
    for i, proposal in enumerate(proposals):
        checked = _check_text(proposal)
        if isinstance(checked, Verdict):
            verdicts[i] = checked
            continue
        if held_out and skeleton(checked.program) in held_out:
            verdicts[i] = Verdict(False, "held_out", "but for names and constants it is a program of a held-out task")
            continue
        # Duplicates are not run: a model that has lost its variety proposes little else.
        key = duplicate_key(checked) if known is not None else i
        if key in (known or ()):
            verdicts[i] = Verdict(False, "duplicate", "the task exists already, names and layout aside")
        elif key in first:
            repeats.append((i, first[key]))
        else:
            first[key] = i
            runs.append((i, checked))
    jobs = [Job(proposal.program, proposal.inputs, stop_at_failure=True) for _, proposal in runs]
    for (i, proposal), outcomes in zip(runs, sandbox.validate(jobs) if jobs else []):
        verdicts[i] = _conclude(proposal, outcomes, max_output_chars, exempt)
    _try_messages(verdicts, [i for i, _ in runs if verdicts[i].ok], sandbox)
    _look_at_behaviour(verdicts, [i for i, _ in runs if verdicts[i].ok], sandbox, known, exempt)
    # A repeat of a refused proposal is refused for the same reason: it is no duplicate of anything that exists.
    for i, original in repeats:
        same = Verdict(False, "duplicate", "the same task was proposed before in this batch, names and layout aside")
        verdicts[i] = same if verdicts[original].ok else verdicts[original]
    return verdicts


def _try_messages(verdicts: list, valid: list[int], sandbox: Sandbox) -> None:
    """Refuses induction tasks whose message shows the pairs, or holds an expression that is right for all of them."""
    tries = []
    for i in valid:
        task = verdicts[i].task
        pairs = task.visible + task.hidden
        if task.mode != "induction":
            continue
        if shows(task.message, pairs):
            verdicts[i] = Verdict(False, "message_has_code", "the message shows the pairs")
        else:
            tries += [(i, program, pairs) for program in expressions(task.program, task.message)]
    # With little time: what takes longer gives nothing away, and four of them would cost more than the proposal.
    jobs = [
        Job(program, tuple(given for given, _ in pairs), CPU_SECONDS, stop_at_failure=True)
        for _, program, pairs in tries
    ]
    for (i, program, pairs), outcomes in zip(tries, sandbox.run(jobs) if jobs else []):
        if [outcome.output for outcome in outcomes] == [output for _, output in pairs]:
            text = program.rpartition("return ")[2]
            verdicts[i] = Verdict(False, "message_has_code", f"the message gives away {text[:80]}")


def _look_at_behaviour(verdicts: list, valid: list[int], sandbox: Sandbox, known, exempt: set[str]) -> None:
    """Refuses, among the valid, what is trivial or exists already by what its program does; marks the other tasks."""
    tasks, taken = [verdicts[i].task for i in valid], set()
    for i, task, behaviour in zip(valid, tasks, observe(tasks, sandbox)):
        if behaviour.trivial and not (task.mode == "induction" and task.program in exempt):
            verdicts[i] = Verdict(False, "trivial", behaviour.trivial)
            continue
        task = replace(task, behaviour=behaviour.key, chance=behaviour.chance)
        verdicts[i] = replace(verdicts[i], task=task)
        if known is None:
            continue
        instance = instance_key(task)
        if instance in known or instance in taken:
            verdicts[i] = Verdict(False, "duplicate", "a task exists whose program does the same, with the same input")
        elif program_key(task) in known:
            verdicts[i] = Verdict(False, "duplicate", "as many tasks as are allowed have a program that does the same")
        taken.add(instance)


def _check_text(proposal: Proposal) -> Verdict | Proposal:
    """What the text alone tells: a refusal, or the proposal with canonical inputs, without comments and docstrings
    (they may tell the answer, and two programs that differ in them alone are one)."""
    texts = (proposal.program, proposal.message or "", *proposal.inputs)
    fault = next(filter(None, map(bad_characters, texts)), "")
    if fault:
        return Verdict(False, "syntax", f"the text holds {fault}")
    if proposal.mode == "induction" and len(proposal.inputs) != INDUCTION_INPUTS:
        return Verdict(False, "wrong_count", f"{len(proposal.inputs)} inputs instead of {INDUCTION_INPUTS}")
    limits = [("program", proposal.program, MAX_PROGRAM), ("message", proposal.message or "", MAX_MESSAGE)]
    for name, text, limit in limits + [("input", text, MAX_INPUT) for text in proposal.inputs]:
        if len(text) > limit:
            return Verdict(False, "too_large", f"the {name} has {len(text)} characters; at most {limit} are allowed")
    if not read_program(proposal.program).has_entry:
        return Verdict(False, "no_entry", "there is no top-level function named f")
    try:
        inputs = tuple(literal.canon_args(*literal.parse_args(text)) for text in proposal.inputs)
    except literal.LiteralError as error:
        return not_literal(error, "input")
    if proposal.mode == "induction":
        if len(set(inputs)) < len(inputs):
            return Verdict(False, "inputs_not_distinct", f"{len(set(inputs))} of {len(inputs)} inputs are distinct")
        leaked = leak(proposal.program, proposal.message or "")
        if leaked:
            return Verdict(False, "message_has_code", f"the message gives away {leaked[:80]}")
    return replace(proposal, program=bare(proposal.program), inputs=inputs)


def _conclude(proposal: Proposal, outcomes: list[Outcome], max_output_chars: int, exempt: set[str]) -> Verdict:
    """The verdict on a proposal that ran."""
    for outcome in outcomes:
        if outcome.status != "ok":
            return Verdict(False, outcome.status, outcome.detail)
    # Checked after the run, so that what is broken and trivial counts as broken.
    outputs = [outcome.output for outcome in outcomes]
    trivial = read_program(proposal.program).trivial
    if trivial and not (proposal.mode == "induction" and proposal.program in exempt):
        return Verdict(False, "trivial", trivial)
    if "None" in outputs:
        return Verdict(False, "none_output", "f returned None")
    longest = max(map(len, outputs))
    if longest > max_output_chars:
        return Verdict(False, "too_large", f"an output has {longest} characters; at most {max_output_chars} are shown")
    if proposal.mode != "induction":
        task = Task(proposal.mode, proposal.program, proposal.inputs[0], outputs[0])
        return Verdict(True, "ok", task=task)
    distinct = len(set(outputs))
    if distinct < MIN_OUTPUTS:
        return Verdict(False, "outputs_not_diverse", f"{distinct} distinct outputs; at least {MIN_OUTPUTS} are needed")
    if len(set(outputs[VISIBLE:])) < MIN_HIDDEN:
        return Verdict(False, "outputs_not_diverse", "the hidden outputs are all the same; a constant would be right")
    pairs = tuple(zip(proposal.inputs, outputs))
    task = Task(
        proposal.mode, proposal.program, message=proposal.message or "", visible=pairs[:VISIBLE], hidden=pairs[VISIBLE:]
    )
    return Verdict(True, "ok", task=task)


def not_literal(error: literal.LiteralError, what: str) -> Verdict:
    """The refusal of a text that is no literal, or a literal that is too large. what: "input" or "answer"."""
    return Verdict(False, "too_large" if isinstance(error, literal.TooLarge) else "not_literal", f"{what}: {error}")
