"""The run directory under what really happens to it: kill -9, full disks, torn lines, damaged files."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from azr import runs
from azr.runs import Run, RunError, read_metrics, read_samples
from azr.stop import StopNow

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"model": "tiny", "seed": 3, "steps": 10, "learning_rate": 1e-3, "out": "x"}
INFO = {"base": "tiny", "quantization": "nf4"}


def save_adapter(directory):
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"weights" * 100)


def make_steps(run, last, keep=()):
    """Runs `run` to step `last`, with a checkpoint at each step; what it writes depends on the step only."""
    import torch

    for step in range(run.step + 1, last + 1):
        run.log({"step": step, "train/loss": 1 / step, "train/bad": float("nan")})
        run.log_samples([{"step": step, "role": "solver", "response": "x" * step} for _ in range(3)])
        run.save_checkpoint(
            step, save_adapter, {"w": torch.full((50,), float(step))}, {"step": step}, INFO, keep=step in keep
        )


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def start(code, *arguments, **options):
    """A real child process that can import this module; its first line says that it is ready."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n" + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# ---------------------------------------------------------------- opening


def test_none_takes_an_absent_or_empty_directory_only(tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        with Run.open(out, CONFIG) as run:
            assert run.step == 0 and not run.resumed
        assert json.loads((out / "config.json").read_text()) == {**CONFIG, "out": str(out)}
        with pytest.raises(RunError, match="--resume auto"):
            Run.open(out, CONFIG)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    for resume in ("none", "auto", str(foreign)):
        with pytest.raises(RunError):
            Run.open(foreign, CONFIG, resume)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    checkpoint = tmp_path / "mine" / "checkpoints" / "step_3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "azr.json").write_text("{}")
    with pytest.raises(RunError, match=f"its run is {tmp_path / 'mine'}$"):
        Run.open(checkpoint, CONFIG, str(checkpoint))
    with pytest.raises(RunError, match="cannot be a run directory"):
        Run.open(foreign / "thesis.tex" / "run", CONFIG)
    with pytest.raises(RunError, match="thesis.tex is no directory"):
        Run.open(foreign / "thesis.tex", CONFIG)


def test_auto_without_a_run_starts_afresh_and_says_so(tmp_path, capsys):
    with Run.open(tmp_path / "r", CONFIG, "auto") as run:
        run.log({"step": 1, "x": 1})  # dies before its first checkpoint
    assert "step 0" in capsys.readouterr().err
    with Run.open(tmp_path / "r", {**CONFIG, "seed": 4}, "auto") as run:
        assert run.step == 0
        with pytest.raises(RunError):
            run.load_checkpoint()
    assert "step 0" in capsys.readouterr().err
    assert read_metrics(tmp_path / "r") == []
    with pytest.raises(RunError, match="no run"):
        Run.open(tmp_path / "x", CONFIG, str(tmp_path / "nowhere"))


def test_a_start_killed_in_its_first_instants_is_no_obstacle(tmp_path):
    (tmp_path / "lock").write_text("1")
    (tmp_path / "config.json.tmp-77").write_text("{")
    Run.open(tmp_path, CONFIG, "none").close()
    assert not list(tmp_path.glob("*.tmp-*"))


def test_resume_refuses_other_settings_and_names_them(tmp_path):
    with Run.open(tmp_path, CONFIG) as run:
        make_steps(run, 1)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError) as caught:
        Run.open(tmp_path, {**CONFIG, "learning_rate": 2e-5, "seed": 9, "steps": 99, "new": 1}, "auto")
    message = str(caught.value)
    assert "learning_rate: 0.001 -> 2e-05" in message and "seed: 3 -> 9" in message and "new: (absent) -> 1" in message
    assert "steps" not in message and "\n" not in message
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    with Run.open(tmp_path, {**CONFIG, "steps": 99, "out": "elsewhere"}, "auto") as run:
        assert run.step == 1
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 99


def test_a_run_is_held_by_one_process(tmp_path):
    child = start(
        """
        from test_runs import *
        run = Run.open(Path(sys.argv[1]), CONFIG)
        print("ready", flush=True)
        sys.stdin.read()
        """,
        tmp_path,
        stdin=subprocess.PIPE,
    )
    assert child.stdout.readline() == "ready\n", child.stderr.read()
    with pytest.raises(RunError, match=f"process {child.pid} "):
        Run.open(tmp_path, CONFIG, "auto")
    child.kill()
    child.communicate()
    Run.open(tmp_path, CONFIG, "auto").close()  # the kernel freed it


# ---------------------------------------------------------------- logs


def test_log_lines(tmp_path):
    import numpy
    import torch

    with Run.open(tmp_path, CONFIG) as run:
        run.log({"b": float("inf"), "step": 1, "a": numpy.float32(0.5), "n": torch.tensor(2.0), "histogram": (1, 2)})
        run.log_samples([{"step": 1, "response": "lone \udc80 and é", "reward": {"total": float("nan")}}])
        with pytest.raises(TypeError, match="'a'"):
            run.log({"step": 1, "a": object()})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "b": null, "a": 0.5, "n": 2.0, "histogram": [1, 2]}\n'
    samples = list(read_samples(tmp_path))
    assert samples == [{"step": 1, "response": "lone \udc80 and é", "reward": {"total": None}}]


def test_readers_of_logs_leave_out_what_is_damaged_and_say_so_once(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "tr')
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert capsys.readouterr().err.count("metrics.jsonl: the last line is torn") == 1
    path.write_text('{"step": 1}\n{"step": 2, "tr\n[7]\n{"step": 3}\n')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 3}]
    err = capsys.readouterr().err
    assert "metrics.jsonl: 2 line(s) are no JSON objects, the first is line 2" in err and err.count("\n") == 1
    path.write_text('{"step": 1}\n{"mode": "deduction"}\n')  # lines of another file
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert "metrics.jsonl: 1 line(s) have no step" in capsys.readouterr().err
    with pytest.raises(RunError, match="samples.jsonl"):
        list(read_samples(tmp_path))


def test_resume_cuts_the_logs_byte_exactly(tmp_path):
    with Run.open(tmp_path, CONFIG) as run:
        make_steps(run, 2)
        expected = [(tmp_path / name).read_bytes() for name in runs.LOGS]
        run.log({"step": 3, "train/loss": 1.0})
        run.log_samples([{"step": 3}])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 1')  # torn where it reads like an older step
    with Run.open(tmp_path, CONFIG, "auto") as run:
        assert run.step == 2 and run.resumed
    assert [(tmp_path / name).read_bytes() for name in runs.LOGS] == expected


def test_what_is_damaged_before_the_checkpoint_costs_no_other_line(tmp_path):
    with Run.open(tmp_path, CONFIG) as run:
        make_steps(run, 3)
    path = tmp_path / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([lines[0], b"\0" * 20 + b"\n", *lines[2:]])
    path.write_bytes(damaged + b'{"step": 4, "newer": true}\n')
    with Run.open(tmp_path, CONFIG, "auto") as run:
        assert run.step == 3
    assert path.read_bytes() == damaged and len(list(read_samples(tmp_path))) == len(lines) - 1


# ---------------------------------------------------------------- checkpoints


def test_pruning_keeps_two_states_and_the_adapters_of_eval_steps(tmp_path):
    with Run.open(tmp_path, CONFIG) as run:
        make_steps(run, 6, keep=(2, 5))
    assert names(tmp_path) == ["step_2", "step_5", "step_6"]
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "step_2").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "azr.json",
        "keep",
    ]
    assert json.loads((tmp_path / "checkpoints" / "step_2" / "azr.json").read_text()) == INFO
    assert (tmp_path / "checkpoints" / "step_5" / "state" / "state.json").exists()


def test_a_kept_checkpoint_is_kept_from_its_first_instant(tmp_path, monkeypatch):
    def rename_and_die(source, target):
        os.replace(source, target)
        raise StopNow("killed")

    with Run.open(tmp_path, CONFIG) as run:
        monkeypatch.setattr(runs.os, "rename", rename_and_die)
        with pytest.raises(StopNow):
            run.save_checkpoint(1, save_adapter, {}, {}, INFO, keep=True)
        monkeypatch.undo()
    with Run.open(tmp_path, CONFIG, "auto") as run:
        make_steps(run, 4)
    assert names(tmp_path) == ["step_1", "step_3", "step_4"]


def test_a_step_saved_twice_is_the_same_checkpoint_and_can_still_become_kept(tmp_path):
    with Run.open(tmp_path, CONFIG) as run:
        make_steps(run, 1)
        path = run.save_checkpoint(1, save_adapter, {}, {}, INFO, keep=True)
        assert run.load_checkpoint()[1] == {"step": 1}
        make_steps(run, 4)
        assert (path / "adapter_model.safetensors").exists() and not (path / "state").exists()


def test_tensors_and_state_come_back_exactly(tmp_path):
    import torch

    flat = torch.randn(64, generator=torch.Generator().manual_seed(0))
    tensors = {
        "a": flat[:32].view(4, 8).t(),
        "b": flat[16:],
        "bf16": flat.bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "leaf": flat.clone().requires_grad_(),
    }
    state = {"elapsed": 0.1 + 0.2, "baseline": float("nan"), "limit": float("-inf"), "text": "\udc80é", "list": [None]}
    with Run.open(tmp_path, CONFIG) as run:
        run.save_checkpoint(1, save_adapter, tensors, state, INFO)
    with Run.open(tmp_path, CONFIG, "auto") as run:
        loaded, again, path = run.load_checkpoint()
    assert path == tmp_path / "checkpoints" / "step_1" and loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor.detach()), name
    assert repr(again) == repr(state)


@pytest.mark.parametrize(
    "name, damage",
    [
        ("state/tensors.safetensors", lambda data: data[:-10]),
        ("state/state.json", lambda data: data.replace(b"2", b"3")),
        ("adapter_model.safetensors", lambda data: data[:50] + b"!" + data[51:]),
        ("state/checksums.json", lambda data: b"{"),
    ],
)
def test_a_broken_checkpoint_is_named_and_the_one_before_used(tmp_path, capsys, name, damage):
    with Run.open(tmp_path, CONFIG) as run:
        make_steps(run, 2)
    expected = (tmp_path / "metrics.jsonl").read_bytes()
    path = tmp_path / "checkpoints" / "step_2" / name
    path.write_bytes(damage(path.read_bytes()))
    with Run.open(tmp_path, CONFIG, "auto") as run:
        assert run.step == 1 and run.load_checkpoint()[1] == {"step": 1}
        error = capsys.readouterr().err
        assert "broken" in error and "step_2" in error and ("checksums" if "checksums" in name else name) in error
        make_steps(run, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == expected
    assert names(tmp_path) == ["step_1", "step_2", "step_2.broken"]


def test_only_broken_checkpoints_is_a_refusal_that_changes_nothing(tmp_path):
    with Run.open(tmp_path, CONFIG) as run:
        make_steps(run, 2)
    for path in tmp_path.glob("checkpoints/*/state/state.json"):
        path.write_text("{}")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="step_2: state/state.json .*step_1: "):
        Run.open(tmp_path, CONFIG, "auto")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and names(tmp_path) == ["step_1", "step_2"]


def test_an_error_or_a_stop_inside_the_write_leaves_the_older_checkpoint(tmp_path):
    def fail(directory):
        save_adapter(directory)
        raise problem

    with Run.open(tmp_path, CONFIG) as run:
        make_steps(run, 1)
        for problem in (OSError(28, "No space left on device"), StopNow("SIGTERM"), KeyError("x")):
            expected = RunError if isinstance(problem, OSError) else type(problem)
            with pytest.raises(expected) as caught:
                run.save_checkpoint(2, fail, {}, {}, INFO)
            if expected is RunError:
                assert "No space" in str(caught.value) and "step_1" in str(caught.value)
            assert names(tmp_path) == ["step_1"] and run.step == 1
        make_steps(run, 2)
        assert names(tmp_path) == ["step_1", "step_2"]


def test_full_disk_by_file_size_limit(tmp_path):
    """Every file over 4 KB fails to be written, in a real process: the adapter, the tensors, or a log line."""
    child = start(
        """
        import resource, torch
        from test_runs import *
        run = Run.open(Path(sys.argv[1]), CONFIG)
        make_steps(run, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        big = lambda directory: (directory / "adapter_model.safetensors").write_bytes(bytes(9999))
        for attempt in (lambda: run.save_checkpoint(3, big, {}, {}, INFO),
                        lambda: run.save_checkpoint(3, save_adapter, {"w": torch.zeros(9999)}, {}, INFO),
                        lambda: run.save_checkpoint(3, save_adapter, {}, {"buffer": "x" * 9999}, INFO),
                        lambda: run.log({"step": 3, "text": "x" * 9999})):
            try:
                attempt()
            except RunError as error:
                print(error)
        """,
        tmp_path,
    )
    output, error = child.communicate(timeout=120)
    lines = output.splitlines()
    assert len(lines) == 4 and all(str(tmp_path / "checkpoints" / "step_2") in line for line in lines), output + error
    assert names(tmp_path) == ["step_1", "step_2"]
    with Run.open(tmp_path, CONFIG, "auto") as run:
        assert run.step == 2
        make_steps(run, 3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_full_disk_on_a_small_file_system(tmp_path):
    import torch

    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        with Run.open(tmp_path / "run", CONFIG) as run:
            make_steps(run, 1)
            with pytest.raises(RunError, match="step_1"):
                run.save_checkpoint(2, save_adapter, {"w": torch.zeros(500_000)}, {}, INFO)
            assert names(tmp_path / "run") == ["step_1"]
            make_steps(run, 3)
            with pytest.raises(RunError, match="metrics.jsonl failed.*step_3"):
                while True:
                    run.log({"step": 4, "text": "x" * 999})
        with Run.open(tmp_path / "run", CONFIG, "auto") as run:  # cutting the log makes room again
            make_steps(run, 4)
        assert len(read_metrics(tmp_path / "run")) == 4
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_kill_9_at_random_moments(tmp_path):
    """Grandchildren work on one run and are killed, 15 times; the files equal those of an undisturbed run."""
    child = start(
        """
        import os, random, signal, time, torch
        from test_runs import *
        torch.set_num_threads(1)
        killed, undisturbed = Path(sys.argv[1]) / "killed", Path(sys.argv[1]) / "undisturbed"
        def work(last):
            with Run.open(killed, CONFIG, "auto") as run:
                if run.step:
                    tensors, state, path = run.load_checkpoint()
                    assert torch.equal(tensors["w"], torch.full((50,), float(run.step))) and state == {"step": run.step}
                make_steps(run, last, keep=range(0, 10_000, 7))
        dice = random.Random(1)
        for _ in range(15):
            pid = os.fork()
            if not pid:
                work(10_000)
                os._exit(0)
            time.sleep(dice.uniform(0.02, 0.4))     # the moment is the test
            os.kill(pid, signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "a resumed run failed"
        last = runs.newest_intact(killed)[0].name.removeprefix("step_")
        work(int(last) + 1)
        make_steps(Run.open(undisturbed, CONFIG), int(last) + 1, keep=range(0, 10_000, 7))
        for name in runs.LOGS:
            assert (killed / name).read_bytes() == (undisturbed / name).read_bytes(), name
        assert names(killed) == names(undisturbed)
        print(int(last) + 1)
        """,
        tmp_path,
    )
    output, error = child.communicate(timeout=200)
    assert child.returncode == 0 and int(output) > 4, error


# ---------------------------------------------------------------- environment


def test_environment_keeps_earlier_ones_and_tells_changes(tmp_path, capsys):
    with Run.open(tmp_path, CONFIG) as run:
        first = run.environment(sandbox={"namespaces": True})
        assert first["sandbox"] == {"namespaces": True} and first["versions"]["python"].startswith("3.")
        path = tmp_path / "environment.json"
        path.write_text(path.read_text().replace(f'"torch": "{first["versions"]["torch"]}"', '"torch": "1.0"'))
        capsys.readouterr()
        run.environment(), run.environment()
    assert "torch 1.0 -> " in capsys.readouterr().err
    assert [old["versions"]["torch"] for old in json.loads(path.read_text())["previous"]] == [
        "1.0",
        first["versions"]["torch"],
    ]


def test_readers_do_not_import_torch():
    child = start("import azr.runs; print('torch' in sys.modules)")
    assert child.communicate()[0] == "False\n"
