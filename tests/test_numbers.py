"""Every numeric flag of every script and subcommand, from the parsers themselves, with what no flag should take."""

import argparse
import dataclasses
import math
from types import SimpleNamespace

import pytest

import analyze
import eval_passk
import train_azr
from azr.command import Number
from azr.tasks.__main__ import main as tasks
from azr.tiny.make import main as make_tiny
from azr.train.config import Config, flag, resolve
from azr.train.data import check_context
from in_process import run_here
from sandbox.__main__ import main as sandbox

VALUES = ("0", "-1", "nan", "inf", "-inf", "1e30", "9223372036854775808", "many", "")


class Caught(Exception):
    """The parser that a script has just made."""


def parser_of(main, *words) -> argparse.ArgumentParser:
    """What main(words) parses its command line with."""

    def caught(parser, *arguments):
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        with pytest.raises(Caught) as raised:
            main(list(words)) if words else main()
    return raised.value.args[0]


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Command line without flags -> its parser, for all scripts and subcommands."""
    made = [parser_of(train_azr.main, "--seed"), parser_of(train_azr.main, "export"), parser_of(eval_passk.main, "run")]
    made += [parser_of(analyze.main, name) for name in analyze.COMMANDS]
    made += [parser_of(tasks, "judge"), parser_of(tasks, "make"), parser_of(make_tiny), parser_of(sandbox)]
    found = {}
    for parser in made:
        inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        leaves = [leaf for action in inner for leaf in action.choices.values()] or [parser]
        # analyze.py gives a subcommand its flags when it is named: the other ones have none yet
        found |= {leaf.prog: leaf for leaf in leaves if leaf.prog not in found or len(leaf._actions) > 1}
    return found


def is_number(convert) -> bool:
    """Whether a type of argparse makes a number of an argument, or a list of them."""
    return isinstance(convert, Number) or isinstance(convert("1"), int | float | list)


def numeric(parser) -> dict[str, argparse.Action]:
    """Flag -> action, of those that take a number."""
    flags = [action for action in parser._actions if action.option_strings and action.nargs != 0]
    return {
        action.option_strings[-1]: action
        for action in flags
        if is_number(parser._registry_get("type", action.type, action.type))
    }


# What 0 stands for: a seed like any other, "none of these" or "never". All else must be refused.
ZERO = {
    "train_azr.py": "--seed --references --ends-penalty --off-policy-gamma --eval-every --eval-samples",
    "eval_passk.py run": "--temperature --seed",
    "analyze.py forgetting": "--held-out",
    "analyze.py rewards": "--ends-penalty",
    "python -m azr.tasks make tiny": "--seed",
    "python -m azr.tiny.make": "--seed",
}


def test_every_numeric_flag_refuses_what_is_no_number_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = refused = 0
    for prog, parser in parsers().items():
        needed = []
        for action in parser._actions:
            needed += [*action.option_strings[-1:], str(next(iter(action.choices or "x")))] if action.required else []
        for name in numeric(parser):
            flags += 1
            for value in VALUES:
                done = run_here(lambda words: print(parser.parse_args(words)), *needed, f"{name}={value}")
                if done.returncode == 2:
                    refused += 1
                    assert done.stderr.startswith(f"{prog}: argument {name}") and done.stderr.count("\n") == 1
                    assert any(word in done.stderr for word in ("must ", "invalid choice", "expected "))
                else:
                    assert value == "0" and name in ZERO.get(prog, "").split(), (prog, name, value)
    assert flags >= 58 and refused >= 510 and not list(tmp_path.iterdir())


def test_a_file_of_settings_is_refused_like_the_command_line():
    for field in dataclasses.fields(Config):
        number = field.metadata["number"]
        assert (number is not None) == ("int" in field.type or "float" in field.type), field.name
        for value in (0, -1, math.nan, math.inf, 1e30, 2**63) if number else ():
            if value or flag(field.name) not in ZERO["train_azr.py"].split():
                with pytest.raises(ValueError, match=f"^{flag(field.name)} must be a .*, not "):
                    Config(**{field.name: value})


def test_lengths_that_the_context_cannot_hold_and_minibatches_without_samples():
    for settings, words in (
        ({"max_new_tokens": 100_000}, "--max-new-tokens 100000 leaves 0 of the 1024 tokens"),
        ({"max_new_tokens": 512, "prompt_tokens": 513}, "leaves 512 of the 1024"),
        ({"prompts_per_mode": 2, "answers": 2, "minibatches": 19}, "more than the 18 samples"),
        ({"prompts_per_mode": 2, "recipe": "azr", "minibatches": 13}, "more than the 12 samples"),
    ):
        with pytest.raises(ValueError, match=words):
            resolve(Config(**settings))
    config, why = resolve(Config(max_new_tokens=900))
    assert config.prompt_tokens == 124 and "context of 1024 tokens leaves --prompt-tokens 124" in why
    encode = lambda text: range(len(text))  # noqa: E731
    base = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4000))
    s = SimpleNamespace(config=config, template="azr", policy=SimpleNamespace(encode=encode, base=base))
    check_context(s)  # of a model whose context was not known before it was loaded
    base.config.max_position_embeddings = 2000
    with pytest.raises(ValueError, match="--max-new-tokens 900: the model's context of 2000 tokens leaves 117"):
        check_context(s)
