"""The embedded model: its programs and documents, what is held out of them, its tokenizer, and how it is made.

What the generator computes is compared with what the sandbox gives for the text of the same programs, so that no test
rests on the generator's own tables.
"""

import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from azr.evals.held_out import load_tasks
from azr.models import model_path
from azr.tasks import MODES, Proposal, judge, parse_answer, parse_proposal, validate
from azr.tasks.parse import fences
from azr.tasks.prompts import template_hash
from azr.tiny import documents as recipe
from azr.tiny import make, operations, programs, split
from azr.train.evaluation import statements
from sandbox import Job, Sandbox, literal

TINY = Path(model_path("tiny"))
STAGE = programs.STAGES[programs.LAST]


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as box:
        yield box


@pytest.fixture(scope="module")
def drawn():
    """Programs of the generator's own mixture, with arguments."""
    rng = random.Random(7)
    return [recipe.draw(rng) for _ in range(3000)]


@pytest.fixture(scope="module")
def held_out():
    return load_tasks(TINY / "held_out.jsonl")


def run(sandbox, texts, arguments):
    """One outcome for each program, run on its arguments."""
    return [row[0] for row in sandbox.run([Job(text, (given,)) for text, given in zip(texts, arguments)])]


def given(example):
    return programs.arguments_text(example.arguments)


# ------------------------------------------------------------------------------------------------------------ programs


def test_computed_values_and_traces_are_what_the_programs_compute(sandbox, drawn):
    """Results of 400 programs, and every variable of theirs: returned by a copy of the program, and in the trace."""
    some = drawn[:400]
    texts = [example.program.text for example in some]
    outcomes = run(sandbox, texts, map(given, some))
    assert [outcome.output for outcome in outcomes] == [repr(example.output) for example in some]
    names = [[s.name for s in example.program.statements] for example in some]
    shown = ["{" + ", ".join(f"'{name}': {name}" for name in row) + "}" for row in names]
    copies = [re.sub(r"return \w+$", f"return {all_}", text) for text, all_ in zip(texts, shown)]
    for example, outcome in zip(some, run(sandbox, copies, map(given, some)), strict=True):
        traced = {}
        for step in "".join(example.steps).rstrip(";").split(";"):
            if not step.endswith((" yes", " no")):  # a condition
                traced[step.partition("=")[0]] = literal.parse(step.rpartition("=")[2])
        assert (
            traced
            == literal.parse(outcome.output)
            == {s.name: example.values[s.name] for s in example.program.statements}
        )


def test_every_operation_loop_and_test_is_drawn_for_every_type():
    rng, found = random.Random(4), set()
    for i in range(6000):
        program = programs.random_program(rng, STAGE, 1 + i % 8)
        types = dict(program.parameters) if program else {}
        for s in program.statements if program else ():
            found.add((s.kind, types[s.sources[0]]))
            types[s.name] = s.gives
    wanted = operations.OPERATIONS + operations.LOOPS + operations.TESTS
    assert {(operations.kind_of(entry), entry.takes[0]) for entry in wanted} <= found


def test_programs_and_results_are_diverse(drawn):
    results = Counter(repr(example.output) for example in drawn)
    assert results.most_common(1)[0][1] <= 0.02 * len(drawn) and len(results) >= 100
    assert len({example.program.text for example in drawn}) >= 0.85 * len(drawn)
    assert {kind for e in drawn for kind in e.program.parameters.values()} == set("ils")
    assert Counter(statements(e.program.text) - len(e.program.statements) for e in drawn) == {0: len(drawn)}
    ints = [v for e in drawn for v in [e.output] if isinstance(v, int)]
    assert 0 <= min(ints) and 90 < max(ints) <= 99 and sum(v > 9 for v in ints) > 0.3 * len(ints)


def test_sources_are_seldom_the_newest_variable(drawn):
    newest = sources = 0
    for example in drawn:
        known = list(example.program.parameters)
        for s in example.program.statements:
            newest += s.sources.count(known[-1])
            sources += len(s.sources)
            known.append(s.name)
    assert newest <= 0.4 * sources


OTHERS = {
    int: lambda v: [v + 1, v - 1 if v else 2, v + 7, 0],
    list: lambda v: [v[::-1] + [1], [x + 1 for x in v], [50] + v, v[1:]],
    str: lambda v: [v[::-1] + "a", v[1:] + "h", "hhh" + v],
    tuple: lambda v: [(*v[:-1], 7), (*v[:-1], 8), v[::-1]],
    dict: lambda v: [{**v, next(reversed(v)): 7}, {**v, next(reversed(v)): 8}],
}


def test_results_depend_on_more_than_half_of_the_statements(sandbox, drawn):
    """Another value is put in after a statement, in the program's text: does it give another result?"""
    some = [e for e in drawn if len(e.program.statements) >= 3][:30]
    jobs, places = [], []
    for i, example in enumerate(some):
        rows = [f"    {s.lines}" for s in example.program.statements]
        for j, s in enumerate(example.program.statements[:-1]):
            for other in OTHERS[type(example.values[s.name])](example.values[s.name]):
                head, end = example.program.text.split("\n", 1)[0], f"    return {example.program.statements[-1].name}"
                changed = [head, *rows[: j + 1], f"    {s.name}={other!r}", *rows[j + 1 :], end]
                jobs.append(Job("\n".join(changed), (given(example),), cpu_seconds=0.5))
                places.append((i, j))
    reaching = [{len(e.program.statements) - 1} for e in some]
    for (i, j), (outcome,) in zip(places, sandbox.run(jobs)):
        if outcome.status == "ok" and outcome.output != repr(some[i].output):
            reaching[i].add(j)
    assert all(2 * len(found) > len(e.program.statements) for e, found in zip(some, reaching))


# ----------------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("mode", MODES)
def test_answers_of_the_documents_are_right(sandbox, mode):
    rng, pairs = random.Random(mode), []
    for i in range(150):
        replay = random.Random()
        replay.setstate(rng.getstate())
        prompt, response = recipe.solve_document(mode, rng, STAGE, progress=i / 150)
        task = recipe.draw_task(mode, replay).task  # the document's own first draw
        parsed = parse_answer(mode, response)
        assert parsed.well_formed and prompt.startswith(f"User: solve {mode}")
        pairs.append((task, parsed.value))
    assert all(verdict.ok for verdict in judge(pairs, sandbox))


@pytest.mark.parametrize("mode", MODES)
def test_proposals_of_the_documents_are_mostly_valid(sandbox, mode):
    rng = random.Random(11)
    rows = [recipe.propose_document(mode, rng) for _ in range(150)]
    programs_ = [fences(prompt)[0].text if mode == "induction" else None for prompt, _ in rows]
    parsed = [parse_proposal(mode, response, text) for (_, response), text in zip(rows, programs_)]
    assert all(p.well_formed and isinstance(p.value, Proposal) for p in parsed)
    verdicts = validate([p.value for p in parsed], sandbox, known=None)
    assert 0.85 <= sum(verdict.ok for verdict in verdicts) / len(rows) <= 1


def ranks(values):
    """(n,) ranks, ties at their mean."""
    values = np.asarray(values, float)
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


@pytest.mark.parametrize("mode", MODES)
def test_proposals_of_few_statements(mode):
    """For a warm start: neither a proposal nor what it refers to is larger, and both sizes occur."""
    rng, sizes = random.Random(11), Counter()
    for _ in range(60):
        drawn = recipe.draw_proposal(mode, rng, most=2)
        sizes.update(statements(task.program) for task in [*drawn.references, drawn.task] if task)
    assert set(sizes) - {0} == {1, 2}  # 0: the identity program


def test_difficulty_of_proposals_follows_their_references():
    rng, pairs = random.Random(2), []
    for _ in range(500):
        prompt, response = recipe.propose_document("deduction", rng)
        shown = [statements(block.text) for block in fences(prompt) if block.tag == "python"]
        pairs.append((np.mean(shown), statements(fences(response.partition("<answer>")[2])[0].text)))
    references, proposed = zip(*pairs)
    assert np.corrcoef(ranks(references), ranks(proposed))[0, 1] >= 0.5
    assert max(proposed) == 8 and np.mean(proposed) > np.mean(references)


# ------------------------------------------------------------------------------------------------------------ thoughts


def style_of(response):
    """The style of a deduction's thought, as its text shows it."""
    thought = response.partition("</think>")[0]
    if not thought:
        return "none"
    if re.fullmatch(r"([a-z];)+", thought):
        return "junk"
    if "again " in thought:
        return "check"
    return "full" if re.search(r"=[^;]*=| (yes|no);", thought) else "coarse"


def chi_square(table):
    """Pearson's statistic of a table of counts over what independence of rows and columns would give, and its degrees
    of freedom."""
    table = np.array(table, float)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    return float(((table - expected) ** 2 / expected).sum()), (table.shape[0] - 1) * (table.shape[1] - 1)


def test_styles_have_their_shares_and_depend_on_nothing_that_the_prompt_shows():
    rng, rows = random.Random(5), []
    for _ in range(3000):
        prompt, response = recipe.solve_document("deduction", rng, STAGE, progress=1.0)
        program, arguments = fences(prompt)[0].text, fences(prompt)[1].text
        answer = parse_answer("deduction", response).value
        rows.append((style_of(response), statements(program), arguments.count(","), answer[0] in "0123456789"))
    counts = Counter(row[0] for row in rows)
    for style, share in zip(recipe.STYLES, recipe.LADDER):
        assert abs(counts[style] / len(rows) - share) < 0.025, style
    for column in (1, 2, 3):
        values = [v for v, n in Counter(row[column] for row in rows).items() if n >= 200]
        table = [[sum(r[0] == style and r[column] == v for r in rows) for style in recipe.STYLES] for v in values]
        statistic, freedom = chi_square(table)
        assert freedom >= 4 and statistic < freedom + 3.1 * (2 * freedom) ** 0.5, column  # p = .001, about


def test_traces_come_first_and_the_ladder_later():
    assert recipe.style_weights(0.0) == pytest.approx(recipe.TAUGHT)
    assert recipe.style_weights(1.0) == pytest.approx(recipe.LADDER)
    middle = recipe.style_weights((recipe.TAUGHT_UNTIL + recipe.LADDER_FROM) / 2)
    assert middle == pytest.approx([(a + b) / 2 for a, b in zip(recipe.TAUGHT, recipe.LADDER)])


def test_noise_is_a_step_left_out_of_a_trace(drawn):
    rng, long = random.Random(8), [e for e in drawn if len(e.steps) > 1]
    skipped = 0
    for example in long:
        thought = recipe.deduction_thought("full", example, rng)
        if thought != "".join(example.steps):
            left = ["".join(example.steps[:i] + example.steps[i + 1 :]) for i in range(len(example.steps) - 1)]
            assert thought in left  # one step is missing, never the last, and nothing is altered
            skipped += 1
    assert abs(skipped / len(long) - 0.04) < 0.014  # four standard deviations


def test_an_abduction_is_searched_and_a_search_may_end_in_no():
    rng, given_up = random.Random(9), 0
    for _ in range(400):
        drawn = recipe.draw_task("abduction", rng)
        search = recipe.think(drawn, "full", rng)
        wanted = drawn.task.output
        if search.endswith("no;"):
            given_up += 1
            assert f"=={wanted} yes;" not in search
        else:
            assert search.endswith(f"{wanted}=={wanted} yes;") and f"{drawn.task.input};" in search
    assert abs(given_up / 400 - 0.65 * 0.15) < 0.06  # of the 65 % with a wrong try, four standard deviations


def test_an_induction_is_a_hypothesis_with_checks_or_words_where_these_would_be_long():
    rng, in_words = random.Random(9), 0
    for _ in range(200):
        drawn = recipe.draw_task("induction", rng)
        thought = recipe.think(drawn, "check", rng)
        if thought == f"{drawn.example.program.words};":
            in_words += 1
            continue
        last, (given, output) = thought.rpartition("try ")[2], drawn.task.visible[0]
        assert last.startswith(drawn.example.program.statements[0].lines)
        assert f"{given};" in last and last.endswith(" yes;") and f"{output}=={output} yes;" in last
    assert in_words < 90  # most are checked


# ------------------------------------------------------------------------------------------------------------ held out


def probed(sandbox, texts, kinds):
    """What each program, of parameters of these types, gives for the fixed inputs; None where it fails."""
    jobs = [Job(text, tuple(map(programs.arguments_text, split.probe_inputs(k)))) for text, k in zip(texts, kinds)]
    return [(k, *(o.output for o in row)) for k, row in zip(kinds, sandbox.run(jobs))]


def kinds_of(task):
    """The types of a task's arguments: "il" for an int and a list."""
    values, _ = literal.parse_args(task.input or task.visible[0][0])
    return "".join({int: "i", list: "l", str: "s"}[type(v)] for v in values)


def test_nothing_held_out_is_drawn(held_out, drawn):
    """No skeleton and no behaviour of the held-out tasks in 3,000 draws, nor in the programs that documents show."""
    skeletons = {split.skeleton(task.program) for task in held_out}
    assert all(split.held_out(task.program) for task in held_out)
    assert not any(split.held_out(example.program.text) for example in drawn)
    known = split.known_behaviours()[1]
    assert len(known) == len(held_out) and not any(split.behaviour(example.program) in known for example in drawn)
    texts = [block.text for prompt, _ in recipe.documents(3, 1000) for block in fences(prompt) if block.tag == "python"]
    assert len(texts) > 750 and not skeletons & {split.skeleton(text) for text in texts}
    rng = random.Random(6)
    some = [programs.random_program(rng, STAGE, 1 + i % 8) for i in range(3000)]
    assert 0.02 < np.mean([split.held_out(p.text) for p in some if p]) < 0.07  # one skeleton in 25


def test_behaviours_are_those_of_the_texts(sandbox, held_out, drawn):
    """The same without the generator's tables: short programs, where two are soonest alike, are run in the sandbox.
    Programs with `while` are left out, since they need not end."""
    ours = [e for e in drawn if len(e.program.statements) <= 2 and "while" not in e.program.text][:250]
    kinds = ["".join(e.program.parameters.values()) for e in ours]
    training = probed(sandbox, [e.program.text for e in ours], kinds)
    for example, (types, *results) in zip(ours[:80], training):
        computed = [example.program.output(arguments, None) for arguments in split.probe_inputs(types)]
        assert [None if v is None else repr(v) for v in computed] == results
    short = [t for t in held_out if statements(t.program) <= 2 and "while" not in t.program][::2]
    kept = probed(sandbox, [t.program for t in short], list(map(kinds_of, short)))
    assert len(set(kept)) == len(kept) > 200 and not set(kept) & set(training)


def test_the_held_out_file(held_out, monkeypatch):
    assert len(held_out) == 2100 and len({(t.program, kinds_of(t)) for t in held_out}) == 2100
    for i, (mode, difficulty) in enumerate((m, d) for m in MODES for d in recipe.DIFFICULTIES):
        block = held_out[100 * i : 100 * i + 100]
        assert {task.mode for task in block} == {mode}
        assert {statements(task.program) for task in block} == ({7, 8} if difficulty == 7 else {difficulty})
    monkeypatch.setattr(recipe, "DIFFICULTIES", (1,))  # all of them take half a minute
    assert [found.task for found in recipe.held_out_draws.__wrapped__()][:100] == held_out[:100]
    skill = load_tasks(TINY / "skill.jsonl")
    assert len(skill) == 200 and skill == recipe.held_out_skill(200)
    rng = random.Random(1)
    assert not {t.question for t in skill} & {recipe.skill_task(rng).question for _ in range(5000)}


# ----------------------------------------------------------------------------------------------- the model's own files


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def test_the_base_was_trained_on_these_prompts():
    base = json.loads((TINY / "base.json").read_text())
    assert base["template_hash"] == template_hash("tiny"), (
        "the prompts changed: build a new base (python -m azr.tiny.make)"
    )
    assert sum(path.stat().st_size for path in TINY.glob("*") if path.is_file()) < 8e6


def test_tokenizer_gives_the_ids_the_model_was_trained_with(tokenizer):
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    check = json.loads((TINY / "tokenizer_check.json").read_text())
    assert tokenizer(check["text"], add_special_tokens=False)["input_ids"] == check["ids"]
    for prompt, response in recipe.documents(5, 200):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response, prompt + response)]
        assert ids[0] + ids[1] == ids[2] == raw.encode(prompt + response, add_special_tokens=False).ids
        assert tokenizer.decode(ids[2]) == prompt + response


def test_digits_and_letters_of_values_are_single_tokens(tokenizer):
    assert len(tokenizer("[10, 2]", add_special_tokens=False)["input_ids"]) == 6  # [ 1 0 ', ' 2 ]
    assert len(tokenizer("'abcde'", add_special_tokens=False)["input_ids"]) == 7


# ------------------------------------------------------------------------------------------------------------ the make


REAL_WORK = make.work


def small(setattr_):
    """Small batches, and what takes time and has tests of its own left out."""
    setattr_(make, "CHUNK", 25)
    setattr_(make, "BATCH_TOKENS", 1500)
    setattr_(make, "losses_by_style", lambda *_: {})


def small_work(*args):
    """What a process of its own does: it has imported `make` afresh."""
    small(setattr)
    REAL_WORK(*args)


def test_make_goes_on_where_it_was_stopped_and_workers_change_nothing(tmp_path, monkeypatch):
    """Stopped after its first chunk and started again, and with one process or two, the weights are the same bytes."""
    small(monkeypatch.setattr)
    monkeypatch.setattr(make, "work", small_work)
    monkeypatch.setattr(make, "write_held_out", lambda out: None)
    monkeypatch.setattr(make, "build", lambda out: shutil.copy(TINY / "tokenizer.json", out))
    monkeypatch.setattr(make.torch.cuda, "is_available", lambda: False)

    def made(name, workers):
        flags = ["--hidden", 32, "--layers", 1, "--tokens", 10_000, "--workers", workers]
        flags += ["--out", tmp_path / name, "--work", tmp_path / f"work-{name}"]
        monkeypatch.setattr("sys.argv", ["make", *map(str, flags)])
        make.main()
        base = json.loads((tmp_path / name / "base.json").read_text())
        del base["seconds"]
        return (tmp_path / name / "model.safetensors").read_bytes(), base

    undisturbed = made("a", 1)
    assert undisturbed[1]["chunk"] > 2 and undisturbed[1]["tokens"] >= 10_000
    with monkeypatch.context() as stopped:
        save = make.save_work
        stopped.setattr(make, "save_work", lambda *a: (save(*a), stop_now()))
        with pytest.raises(KeyboardInterrupt):
            made("b", 1)
    assert not (tmp_path / "b" / "model.safetensors").exists() and (tmp_path / "work-b" / "work.pt").exists()
    assert made("b", 1) == undisturbed
    assert made("c", 2) == undisturbed


def stop_now():
    raise KeyboardInterrupt


def test_make_writes_what_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(split, "BEHAVIOURS", tmp_path / "held_out_behaviours.json")
    monkeypatch.setattr(recipe, "DIFFICULTIES", (1, 7))
    monkeypatch.setattr(recipe, "TASKS", 4)
    monkeypatch.setattr(recipe, "held_out_draws", recipe.held_out_draws.__wrapped__)  # what is cached is whole
    split.known_behaviours.cache_clear()
    try:
        make.write_held_out(tmp_path)
        tasks = load_tasks(tmp_path / "held_out.jsonl")
        assert [task.mode for task in tasks] == [mode for mode in MODES for _ in range(8)]
        assert [statements(task.program) in (1, 7, 8) for task in tasks] == [True] * 24
        known = split.known_behaviours()
        assert len(known[1]) == 24 and all(split.twin(found.example.program) for found in recipe.held_out_draws())
        assert len(load_tasks(tmp_path / "skill.jsonl")) == 200
    finally:
        split.known_behaviours.cache_clear()
