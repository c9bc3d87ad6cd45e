import gzip
import json
import os
import re
import subprocess
import sys

import pytest

from loram_cli.errors import LoramError
from loram_cli.training.data import files, json_text
from loram_cli.training.data.documents import load_instructions, load_text


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.parquet"])
def test_a_pipe_or_a_device_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for load in (load_instructions, load_text):
        with pytest.raises(LoramError, match="not a regular file"):
            load(str(tmp_path / name))
        with pytest.raises(LoramError, match="/dev/zero: not a regular file"):
            load("/dev/zero")


def test_names_that_no_file_can_have(tmp_path):
    with pytest.raises(LoramError, match="no such file or folder"):
        load_instructions("x" * 5000 + ".jsonl")
    with pytest.raises(LoramError, match="no such file or folder"):
        load_instructions("~nobody-of-that-name/a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_a_line_of_a_gigabyte_is_one_error_in_bounded_memory(tmp_path, name):
    path = tmp_path / name
    beginning = b"prompt,completion\na,b\n" if ".csv" in name else b'{"text": "a"}\n{"text": "'
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(beginning + b"x" * (files.LONGEST_RECORD + 9), 1))
    else:
        path.write_bytes(beginning)
        # A hole in the file takes no disk, and no time to write.
        os.truncate(path, 1 << 30)
    code = (
        "import sys\n"
        "from loram_cli.errors import LoramError\n"
        "from loram_cli.runs.meter import Meter\n"
        "from loram_cli.training.data.documents import load_instructions\n"
        # Not ru_maxrss, which a child inherits from the process that starts it.
        "meter = Meter()\n"
        "try:\n    load_instructions(sys.argv[1])\n"
        "except LoramError as error:\n    print(error.message)\n"
        "print(meter.stop().peak_memory_bytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    said, peak = done.stdout.splitlines()
    assert re.search(r"line [23](: longer than 128 MiB|: one JSON value|: broken JSON)", said)
    assert int(peak) < 900 << 20


def test_values_longer_than_a_record_may_be(tmp_path, monkeypatch):
    for module in (files, json_text):
        monkeypatch.setattr(module, "LONGEST_RECORD", 1000)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "x" * 3_000_000}]))
    with pytest.raises(LoramError, match="line 1: one JSON value of more than"):
        load_instructions(str(tmp_path / "a.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "x" * 2000}))
    with pytest.raises(LoramError, match=r"a\.jsonl, line 2: longer than"):
        load_instructions(str(tmp_path / "a.jsonl"))


def test_text_is_cut_alike_whatever_the_pieces_it_is_read_in(tmp_path, monkeypatch):
    parts = ["one\r\n\r\nstill one", "x" * 45_000, "two  \n \n \n", "<|endoftext|>", "é\n" * 15_000]
    text = "\n\n\n\t\n".join(parts)
    (tmp_path / "a.txt").write_text(text, "utf-8", newline="")
    whole = load_text(str(tmp_path / "a.txt"))
    assert "".join(whole).count("x") == 45_000 and len(whole) == 7
    for size in (7, 1000, 20_001):
        monkeypatch.setattr(files, "_PIECE", size)
        assert load_text(str(tmp_path / "a.txt")) == whole


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", 5)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\nth\xc3\xa9\xff")
    with pytest.raises(LoramError, match=r"line 3: not UTF-8 \(byte 0xff\)"):
        load_text(str(tmp_path / "a.txt"))


def test_the_limit_of_a_table_cell_is_put_back(tmp_path):
    import csv

    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "x" * (before + 1) + "\n")
    assert len(load_text(str(tmp_path / "a.csv"))[0]) == before + 1
    assert csv.field_size_limit() == before


def test_a_small_file_that_unpacks_to_a_large_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_TEXT", 2 << 20)
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(bytes(2 << 20), 1))
    assert len(files.read_text_file(path)) == 2 << 20
    path.write_bytes(gzip.compress(bytes(50 << 20), 1))
    with pytest.raises(LoramError, match="holds more than 2 Mi characters"):
        files.read_text_file(path)
