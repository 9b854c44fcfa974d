"""What a run is measured on, and that the programs of these tasks are refused as proposals."""

import functools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import train_azr
from azr.evals import benchmarks
from azr.evals.held_out import load_tasks
from azr.models import model_path
from azr.policy.policy import LoraSettings, Policy, Sampling
from azr.policy.sampling import Completion
from azr.tasks import MODES, SEED_TASKS, Buffers, Sample, Task, parse_answer, parse_proposal
from azr.tasks.program import skeleton
from azr.tasks.prompts import fence
from azr.train import evaluation, loop
from azr.train.arms import Arms
from azr.train.config import Config, resolve
from azr.train.evaluation import Evaluation, evenly, statements
from azr.train.metrics import step_metrics
from azr.train.rollouts import judged
from sandbox import Sandbox

TINY = Path(model_path("tiny"))
PROGRAMS = ["def f(x):\n    p=x+3\n    return p", "def f(x, y):\n    p=x*y\n    return p"]


@pytest.fixture(scope="module")
def held_out():
    return load_tasks(TINY / "held_out.jsonl")


def made(config, directory) -> Evaluation:
    directory.mkdir(exist_ok=True)
    return Evaluation(config, None, None, "tiny", None, directory)


def filled() -> Buffers:
    """Buffers as after a seed stage: 70 tasks a mode about programs of their own."""
    buffers = Buffers()
    for i in range(70):
        program = f"def f(x):\n    p=x+{i}\n    return [p, {i}]"
        for mode in ("deduction", "abduction"):
            buffers.add(Task(mode, program, "1", f"[{1 + i}, {i}]"), 0)
        pairs = tuple((str(j), f"[{j + i}, {i}]") for j in range(10))
        buffers.add(Task("induction", program, message="m", visible=pairs[:5], hidden=pairs[5:]), 0)
    return buffers


def test_skeletons_know_structure_and_nothing_else():
    same = [
        "def f(a):\n    p=a+3\n    return p",
        "def f(x): # add\n  q = x+70\n\n  return q",
        "def f(x):\n    'adds'\n    y=x+0.5e3\n    return y",
    ]
    assert len(set(map(skeleton, same))) == 1
    others = [
        f"def f({names}):\n    p={value}\n    return p"
        for names, value in (("a", "a-3"), ("a", "3+a"), ("a, b", "a+3"), ("a", "a+'c'"), ("a", "a+a"))
    ]
    assert len(set(map(skeleton, others + same))) == 6
    texts = ["def f(a):\n    return a+'c'", 'def f(b):\n    return b + "it"', "def f(a):\n    return a+r'\\d'"]
    assert len(set(map(skeleton, texts))) == 1


def test_the_embedded_model_is_measured_on_a_part_of_its_file(held_out, tmp_path):
    greedy = evenly(held_out, 20)
    counts = Counter((task.mode, statements(task.program)) for task in greedy)
    assert len(greedy) == 360 and set(counts.values()) == {20} and len(counts) == 18
    sampled, place = evenly(greedy, 5), {task.hash: i for i, task in enumerate(held_out)}
    assert len(sampled) == 90 and all(place[task.hash] % 20 == 0 for task in sampled)
    assert evenly(held_out[:7], 20) == held_out[:7]
    own = made(resolve(Config())[0], tmp_path)
    assert own.own and own.refused == {skeleton(task.program) for task in held_out}  # all, not the part
    own.freeze(filled())
    assert own.tasks() == greedy


def test_many_answers_are_for_a_part_of_that_part(held_out, tmp_path):
    config, policy = resolve(Config(eval_samples=2))[0], Policy.load(str(TINY), "none", max_batch=512)
    with Sandbox(1) as sandbox:
        short = Sampling(1.0, max_new_tokens=24)
        own = Evaluation(config, policy, sandbox, "tiny", short, tmp_path)
        own.freeze(Buffers())
        base = own.pass_at_k_samples("base")
        greedy = own.greedy_answers("base")
        accuracy = own.greedy()["held_out/all/accuracy"]
    assert [row.hash for row in base.tasks] == [task.hash for task in evenly(held_out, 5)]
    assert base.settings["samples"] == 2 and own.pass_at_k_samples("base") == base  # read, not made again
    own.sandbox = None
    assert own.greedy_answers("base") == greedy and len(greedy.tasks) == 360 and greedy.settings["samples"] == 1
    assert greedy.pass_at_k(1).mean == accuracy > 0.05 and greedy.settings["sampling"]["temperature"] == 0
    assert not own.has("greedy_step_80")
    own.config = replace(config, eval_every=0)
    assert own.greedy_answers("base") is None


def test_a_file_is_taken_whole_and_stays_as_it_was(held_out, tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(task.to_json()) + "\n" for task in held_out[690:710]))
    given = made(resolve(Config(eval_data=str(file)))[0], tmp_path / "run")
    assert not given.own and given.refused == {skeleton(task.program) for task in held_out[690:710]}
    given.freeze(filled())
    assert given.tasks() == held_out[690:710]
    file.unlink()  # a run that goes on needs it no more
    again = made(given.config, tmp_path / "run")
    again.freeze(filled())
    assert again.refused == given.refused and again.tasks() == held_out[690:710]


@pytest.mark.parametrize("at_hand", [True, False])
def test_what_the_seed_stage_made_is_not_refused(at_hand, tmp_path, monkeypatch):
    """Another model: CRUXEval, where it can be had, and tasks that were proposed before they were frozen."""
    file = tmp_path / "cruxeval.jsonl"
    inputs = zip(PROGRAMS, ("1", "1, 2"))
    rows = [{"id": text[:10], "code": text, "input": given, "output": "4"} for text, given in inputs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) if at_hand else "{}\n")
    monkeypatch.setattr(
        evaluation, "cruxeval_tasks", functools.partial(benchmarks.cruxeval_tasks, name=f"cruxeval-o={file}")
    )
    other = made(Config(model="other", eval_data=None), tmp_path / "run")
    assert other.refused == (set(map(skeleton, PROGRAMS)) if at_hand else set())
    other.freeze(buffers := filled())
    modes = Counter(task.mode for task in other.tasks())
    assert modes == ({"deduction": 2, "abduction": 2, "induction": 64} if at_hand else dict.fromkeys(MODES, 64))
    drawn = [task for task in other.tasks() if task.program not in PROGRAMS]
    assert all(task in [known for known, _ in buffers.tasks(task.mode)] for task in drawn)
    again = made(other.config, tmp_path / "run")
    assert again.refused == other.refused and not again.refused & {skeleton(task.program) for task in drawn}


def test_a_proposal_of_a_held_out_program_is_refused_and_punished(held_out, tmp_path):
    """In the loop: three proposals of held-out programs with other constants and names, one of another program."""
    config = resolve(Config(answers=2))[0]
    policy = Policy.load(str(TINY), "none", LoraSettings(2, 4.0))
    free = "def f(x):\n    p=x+3\n    q=p-x\n    return [q, p, x]"
    by_mode = {mode: next(t for t in held_out if t.mode == mode and statements(t.program) == 2) for mode in MODES}
    rows = [
        ("deduction", by_mode["deduction"].program.replace("p", "other"), by_mode["deduction"].input),
        ("abduction", by_mode["abduction"].program, by_mode["abduction"].input),
        ("induction", by_mode["induction"].program, ""),
        ("deduction", free, "2"),
    ]
    samples = []
    for i, (mode, program, given) in enumerate(rows):
        text = fence("python", program) + fence("input", given)
        if mode == "induction":
            pairs = by_mode[mode].visible + by_mode[mode].hidden
            text = "".join(fence("input", pair[0]) for pair in pairs) + fence("message", "a rule")
        response = f"</think><answer>{text}</answer>"
        ids = policy.encode(response)
        sample = Sample("proposer", mode, "", [1], Completion(ids, [-0.5] * len(ids), "stop"), response, str(i))
        sample.parsed, sample.entropy = parse_proposal(mode, response, program), [0.1] * len(ids)
        samples.append(sample)
    with Sandbox(1) as sandbox:
        state = loop.make_state(train_azr.State, config, policy, sandbox, tmp_path, Arms())
        train_azr.validate_all(state, samples)
        assert [s.reason for s in samples] == ["held_out"] * 3 + ["ok"] and [s for s in samples if s.task] == samples[
            3:
        ]
        answers = judged(state, [answer(samples[3].task, text) for text in ("[3, 5, 2]", "0")])
        train_azr.set_rewards(state, samples, answers, answers)
    assert [s.reward for s in samples[:3]] == [-1] * 3 and samples[3].reward == 0.5
    shown = step_metrics(samples, answers, samples + answers, 2)
    assert shown["proposer/deduction/held_out_rate"] == 0.5 and shown["proposer/induction/held_out_rate"] == 1
    assert shown["proposer/abduction/refused/held_out"] == 1 and not math.isnan(shown["proposer/deduction/reward"])
    assert all(skeleton(task.program) not in state.evaluation.refused for task in SEED_TASKS.values())


def answer(task, text):
    """An answer of the solver, parsed and not yet judged."""
    response = f"</think><answer>{fence('output', text)}</answer>"
    sample = Sample("solver", task.mode, "", [1], Completion([1, 2], [-0.5] * 2, "stop"), response, "a")
    sample.task, sample.parsed, sample.entropy = task, parse_answer(task.mode, response), [0.1] * 2
    return sample
