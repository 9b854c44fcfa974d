"""The strict reader, the tolerant reader and the atomic writer on files that are torn, zipped, foreign or damaged."""

import gzip
import json
import os

import pytest

from azr.jsonl import read_object, replacing, strict_lines, tolerant_lines, write_json_atomic, write_jsonl_atomic


class Refusal(ValueError):
    """What a caller wants to be raised."""


def test_strict_lines_name_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": "\\u00e9"}')  # a last line without its end is whole if it is JSON
    assert list(strict_lines(path)) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 4", {"a": "é"})]
    for text, said in (
        ('{"a": 1}\n{"a": 2, "to', "line 2: not a JSON line .*; the line was cut off in its writing$"),
        ('{"a": 1\n{"a": 2}\n', r"line 1: not a JSON line \([^;]*\)$"),
        ("[1]\n", "line 1: expected a JSON object, found list$"),
        ("[" * 100_000 + "\n", "line 1: not a JSON line"),
    ):
        path.write_text(text)
        with pytest.raises(Refusal, match=f"rows.jsonl, {said}") as caught:
            list(strict_lines(path, Refusal))
        assert "\n" not in str(caught.value)
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(ValueError, match="line 1: not a JSON line"):
        list(strict_lines(path))


def test_strict_lines_unpack_what_is_gzipped_and_refuse_half_of_it(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % i for i in range(5000)))
    path.write_bytes(whole)
    assert sum(row["a"] for _, row in strict_lines(path)) == sum(range(5000))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="rows.jsonl.gz: cannot be read"):
        list(strict_lines(path))
    with pytest.raises(ValueError, match="absent: cannot be read .No such file"):
        list(strict_lines(tmp_path / "absent"))


def test_tolerant_lines_note_each_kind_of_damage_once(tmp_path):
    path, notes = tmp_path / "metrics.jsonl", []
    path.write_text('{"step": 1}\n{"st\n\n7\n{"step": 2}\n{"step": 3, "x')
    assert list(tolerant_lines(path, notes)) == [{"step": 1}, {"step": 2}]
    assert len(notes) == 2 and "last line is torn" in notes[0]
    assert "2 line(s) are no JSON objects, the first is line 2" in notes[1]
    path.write_text('{"step": 1}\n\n')
    notes.clear()
    assert list(tolerant_lines(path, notes)) == [{"step": 1}] and notes == []


def test_an_object_that_is_none_raises_what_the_caller_wants(tmp_path):
    path = tmp_path / "azr.json"
    for content, said in ((b"{", "cannot be read"), (b"\xff", "cannot be read"), (b"[]", "found list")):
        path.write_bytes(content)
        with pytest.raises(Refusal, match=f"azr.json: .*{said}"):
            read_object(path, Refusal)
    with pytest.raises(ValueError, match="No such file"):
        read_object(tmp_path / "absent.json")


def test_writing_keeps_the_old_file_when_it_cannot_write(tmp_path):
    path = tmp_path / "result.json"
    write_json_atomic(path, {"a": float("nan"), "path": tmp_path, "set": {2, 1}})
    old = read_object(path)
    assert old == {"a": None, "path": str(tmp_path), "set": [1, 2]}
    with pytest.raises(TypeError, match="result.json"):
        write_json_atomic(path, {"a": object()})
    with pytest.raises(TypeError):
        write_jsonl_atomic(path, ({"a": item} for item in (1, object())))
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(OSError):
        write_json_atomic(tmp_path / "absent" / "x.json", {})
    assert os.listdir(tmp_path) == ["result.json"] and read_object(path) == old


def test_rows_are_written_one_a_line(tmp_path):
    write_jsonl_atomic(tmp_path / "rows.jsonl", ({"n": n, "text": "lone \udc80"} for n in range(2)))
    lines = (tmp_path / "rows.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["n"] for line in lines] == [0, 1] and all(line.isascii() for line in lines)
