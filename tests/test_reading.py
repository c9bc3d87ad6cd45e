"""The one reader of users' YAML and JSON."""

import os
import time
from io import StringIO
from pathlib import Path

import pytest

from loram_cli.errors import UsageError
from loram_cli.reading import home_expanded, read_json, read_scalar, read_stdin, read_yaml

BOMB = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{x}: &{x} [{', '.join([f'*{y}'] * 9)}]\n" for x, y in zip("bcdefgh", "abcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases expand past 1 MiB"),
        ("a: &a {b: *a}\n", "aliases expand past 1 MiB"),
        ("a: &a {x: 1}\nb: {<<: *a}\nc: [1, *a, *a]\n", None),
        ("[" * 100_000, "nested too deep"),
        ("a: [1,\nb: }\n", "line 2: not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: 2020-99-99", "not valid YAML"),
        ("a: {b: 1}\nc: [{d: 1,\n d: 2}]\n", "line 3: 'd' stands twice"),
        ("a: 1\na: 1\n", "line 2: 'a' stands twice"),
        ("steps: 010\n", "line 1: 010 is another number in YAML than it looks"),
        ("a: 1\nb: [2, 1:30]\n", "line 2: 1:30 is another number"),
        ("a: b\n" * 300_000, "larger than 1 MiB"),
        ("", None),
    ],
)
def test_yaml_is_bounded(text, message, tmp_path: Path):
    file = tmp_path / "file.yaml"
    file.write_text(text)
    started = time.process_time()
    if message is None:
        assert read_yaml(file) == (
            {"a": {"x": 1}, "b": {"x": 1}, "c": [1, {"x": 1}, {"x": 1}]} if text else None
        )
    else:
        with pytest.raises(UsageError, match=message) as caught:
            read_yaml(file)
        assert str(file) in caught.value.message
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff{}", "not UTF-8"),
        (b"{", "not valid JSON"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_json_is_bounded(data, message, tmp_path: Path):
    (tmp_path / "file.json").write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_json(tmp_path / "file.json")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_only_regular_files_are_read(make, tmp_path: Path):
    make(tmp_path / "file")
    for read in (read_yaml, read_json):
        with pytest.raises(UsageError, match="not a regular file"):
            read(tmp_path / "file")
    with pytest.raises(UsageError, match="No such file"):
        read_json(tmp_path / "gone")
    with pytest.raises(UsageError, match="File name too long"):
        read_json(tmp_path / ("a" * 300))


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("010", 10), ("-1e-5", "-1e-5"), ("0.5", 0.5), ("true", True), ("", None),
     ("[[1]]", "[[1]]"), ("9" * 5000, "9" * 5000), ("*a", "*a")],
)  # fmt: skip
def test_a_scalar_is_read_and_nothing_else(text, value):
    assert read_scalar(text) == value


def test_what_is_piped_in_has_an_end():
    assert read_stdin(StringIO("a\nb\n")) == "a\nb\n"
    assert read_stdin(StringIO("a\nb\n"), line=True) == "a\n"
    for line in (True, False):
        with pytest.raises(UsageError, match="standard input: more than 4 Mi characters"):
            read_stdin(StringIO("a" * ((4 << 20) + 1)), line=line)


def test_a_user_that_is_not_there_leaves_a_name_as_it_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert home_expanded("~/x") == Path("/home/me/x")
    assert home_expanded("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")
