"""A wrong command line is one line on stderr and exit code 2, in every script."""

import sys

import pytest

import analyze
import eval_passk
from azr.command import Parser
from azr.machine import doctor
from azr.tasks.__main__ import main as tasks
from azr.train import config
from azr.weights import export


def make_tiny(arguments):
    from azr.tiny import make

    sys.argv = ["make.py", *arguments]
    make.main()


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (
            analyze.main,
            ["health", "runs/x", "--limts"],
            "analyze.py: unrecognized arguments: --limts (did you mean --limits?)",
        ),
        (analyze.main, ["helth"], "argument COMMAND: invalid choice"),
        (
            analyze.main,
            ["sparsity", "--base", "tiny"],
            "analyze.py sparsity: one of the arguments --adapter --tuned is req",
        ),
        (
            eval_passk.main,
            ["run", "--benchmark", "tiny", "--sample", "x"],
            "argument --samples: must be a whole number",
        ),
        (eval_passk.main, ["compare", "a"], "eval_passk.py compare: the following arguments are required"),
        (export.main, ["runs/x", "--uot", "y"], "train_azr.py export: the following arguments are required: --out"),
        (tasks, ["judge", "--worker"], "python -m azr.tasks: argument --workers: expected one argument"),
        (
            make_tiny,
            ["--hiden", "3"],
            "python -m azr.tiny.make: unrecognized arguments: --hiden 3 (did you mean --hidden?)",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, monkeypatch, main, arguments, said):
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as done:
        main(arguments)
    err = capsys.readouterr().err
    assert done.value.code == 2 and said in err and err.count("\n") == 1, err


def test_a_missing_package_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "NEEDED", ("json", "no_such_package"))
    with pytest.raises(SystemExit) as done:
        config.check_early(["--steps", "3"], "")
    err = capsys.readouterr().err
    assert done.value.code == 2 and err.count("\n") == 1
    assert "not installed here: no_such_package; pip install -r requirements.txt" in err


def test_what_cannot_be_measured_is_one_line(capsys, tmp_path):
    for command in (["dynamics", "nowhere"], ["forgetting", "nowhere"], ["entropy", "--data", "nowhere"]):
        assert analyze.main(command) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"analyze.py {command[0]}: nowhere: no such") and err.count("\n") == 1, err


def test_other_trainers_names_for_a_flag_are_understood(capsys):
    parser = Parser(prog="x")
    parser.add_argument("--learning-rate")
    parser.add_argument("--answers")
    for typed, meant in (
        ("--lr", "--learning-rate"),
        ("--num_generations", "--answers"),
        ("--group-size=3", "--answers"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args([typed])
        assert f"did you mean {meant}?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--load-in-4bit"])  # no flag of this parser is meant
    assert "mean" not in capsys.readouterr().err
