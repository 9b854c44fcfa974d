"""bench_gpu.py in its dry mode: every step runs, failures and deaths leave the others; packing, tables."""

import gc
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import bench_gpu
from azr import tasks
from azr.train import ahead
from gpu import pack, parts_train, tables

TINY = HERE.parent / "azr" / "tiny"  # in the place of SmolLM2
PARTS = list(bench_gpu.PARTS)


def run(tmp_path, *flags: str) -> tuple[int, list[dict], str]:
    file = tmp_path / "lines.jsonl"
    command = [sys.executable, str(HERE / "bench_gpu.py"), "--cpu", "--json", str(file), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return done.returncode, rows, done.stdout + done.stderr


# Each part works in one of the two runs. In the second, `build`, which is one measurement, ends the process.
@pytest.mark.parametrize("bad, dies", [(PARTS[0::2], ""), (PARTS[1::2], "build")])
def test_every_step_runs_whatever_fails_or_dies_beside_it(tmp_path, bad, dies):
    pytest.importorskip("bitsandbytes")
    fails = [part for part in bad if part != dies]
    code, rows, shown = run(tmp_path, "--smollm2", str(TINY), "--fail", *fails, *(["--die", dies] if dies else []))
    assert code == 1, shown
    assert list(dict.fromkeys(row["part"] for row in rows)) == PARTS
    assert len({(row["part"], row["name"]) for row in rows}) == len(rows), "measured again after the process died"
    for row in rows:
        assert "left_out" not in row, row
        if row["part"] == dies:
            assert row["error"] == "the process ended with 9", row
        elif row["part"] in fails:
            assert not row["ok"] and row["error"].startswith("Injected: ") and row["traceback"], row
        else:
            assert row["ok"] and row["figures"] and row["seconds"] >= 0, (row, shown[-3000:])
    text = tables.tables([tmp_path / "lines.jsonl"])
    assert all(f"| {row['name']} |" in text for row in rows if row["figures"])


def test_what_does_not_fit_the_time_is_left_out(tmp_path, monkeypatch, capsys):
    """In this process, as `--run` and `--until` are what the one that watches gives to the one that measures."""
    import transformers

    monkeypatch.setattr(bench_gpu, "HEAVY", ())  # nothing is measured
    verbosity, file = transformers.logging.get_verbosity(), tmp_path / "lines.jsonl"
    flags = ["--cpu", "--json", str(file), "--only", "hardware", "train", "--run", "1", "--until", "0"]
    try:
        assert bench_gpu.main(flags) == 0
    finally:
        gc.unfreeze()
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["hardware", "train"] and all("left_out" in row for row in rows)
    assert capsys.readouterr().out.count("s are left") == 2


def test_where_the_sandbox_refuses_the_stand_ins_take_what_the_real_functions_take():
    def names(function) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(parts_train.made_up_validate) == names(tasks.validate)
    assert names(parts_train.made_up_judge) == names(tasks.judge)
    assert issubclass(parts_train.NoSandbox, ahead.RememberingSandbox)  # or no phases would overlap


def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, str(HERE / "bench_gpu.py"), "--json", str(tmp_path / "x.jsonl")],
        capture_output=True,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2 and "no CUDA device here" in done.stderr


def test_bad_flags_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        bench_gpu.main(["--smollm2", str(tmp_path / "none")])
    assert ended.value.code == 2 and "no such directory" in capsys.readouterr().err
    assert bench_gpu.main(["tables", str(tmp_path / "none.jsonl")]) == 2
    assert "holds no measurement" in capsys.readouterr().err


# ---------------------------------------------------------------- packing


def test_what_is_packed_imports_elsewhere(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if not Path(bitsandbytes.__file__).with_name(pack.LIBRARIES[0]).is_file():
        pytest.skip("the installed bitsandbytes has no library for CUDA 13.0")
    lines = pack.pack(tmp_path / "there", with_model=False)
    assert sum(float(line.split()[0]) for line in lines) < 8
    code = "import bitsandbytes, importlib.metadata as m; print(bitsandbytes.__file__, m.version('bitsandbytes'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / "there")
    assert done.stdout.split() == [str(tmp_path / "there/bitsandbytes/__init__.py"), bitsandbytes.__version__]


def test_a_split_model_is_made_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "PART", 10)
    monkeypatch.setattr(pack, "convert", lambda directory, out: (directory / pack.MODEL).read_bytes())
    (tmp_path / "model.gguf").write_bytes(bytes(range(105)))
    pack.split(tmp_path / "model.gguf", tmp_path)
    (tmp_path / "scratch").mkdir()
    assert len(list(tmp_path.glob("smollm2.gguf.*"))) == 11
    assert pack.joined(tmp_path, tmp_path / "scratch") == bytes(range(105))
    assert pack.joined(TINY, tmp_path) == str(TINY)
    with pytest.raises(pack.PackError, match="bench_gpu.py pack"):
        pack.joined(tmp_path / "scratch", tmp_path)


# ---------------------------------------------------------------- tables


def row(name: str, ok: bool = True, part: str = "decode", **more) -> str:
    fields = {"run": "1", "part": part, "name": name, "table": part, "ok": ok, "seconds": 1.5, "figures": {}}
    return json.dumps(fields | more)


def test_tables_of_a_small_file(tmp_path):
    file = tmp_path / "h100-2026-01-01.jsonl"
    lines = [
        row("stored, 16 rows", False, error="OutOfMemoryError: no"),
        row("bf16, 16 rows", left_out="no time"),
        row("stored, 16 rows", figures={"rows": 16, "ms a step": 7.25}),
        row("kernels", figures={"steps": 8, "kernels": [{"kernel": "gemm|x", "us": 3.0}]}),
        row("8k tokens", part="update", figures={"planned GB": 10.0, "measured GB": 8.0}),
        row("products", part="micro", figures={"each": [{"rows": 8, "us": 2.0}, {"rows": 16, "us": 3.0}]}),
        row("not right", False, part="gap"),
        '{"cut off',
    ]
    file.write_text("\n".join(lines))
    text = tables.tables([file])
    assert "| stored, 16 rows | 16 | 7.25 |" in text and "OutOfMemoryError" not in text  # the later one counts
    assert "| decode | bf16, 16 rows | no time |" in text and "| gap | not right | not right |" in text
    assert "| gemm/x | 3 |" in text and "| products | 16 | 3 |" in text
    assert "| update | 8k tokens | 10 | 8 | 1.25 |" in text
    assert "6 measurements in 9 s: 4 hold, 1 failed, 1 left out." in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.START}\nold\n{tables.END}\nafter\n")
    assert bench_gpu.main(["tables", str(file), "--into", str(page)]) == 0
    assert page.read_text() == f"before\n{tables.START}\n\n{text}\n\n{tables.END}\nafter\n"


def test_the_page_is_what_the_files_say():
    page = HERE.parent / "docs" / "gpu.md"
    files = sorted((HERE.parent / "results" / "gpu").glob("*.jsonl"))
    if files:
        assert page.read_text(encoding="utf-8") == tables.filled(page.read_text(encoding="utf-8"), files)
    else:
        assert tables.START in page.read_text(encoding="utf-8")
