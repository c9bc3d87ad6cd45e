import os
from pathlib import Path

import pytest

from loram_cli.checkpoint.json_files import read_json
from loram_cli.errors import LoramError
from loram_cli.reading import JSON_BYTES


def test_an_object_is_read(tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text('{"a": [1, 2.5, "\u00e9"], "time_step_limit": [0.0, Infinity]}')
    assert read_json(file) == {"a": [1, 2.5, "\u00e9"], "time_step_limit": [0.0, float("inf")]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON"),
        ('{"a": {"b": [NaN]}}', "b is nan, expected a finite number"),
        ('{"a": 1e999}', "a is inf, expected a finite number"),
        ('{"a": "\\ud800"}', "a has half a character"),
        ('{"\\ud800": 1}', "a key has half a character"),
    ],
)
def test_what_is_unsound_is_named(text, message, tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(LoramError, match=message):
        read_json(file)


def test_only_regular_files_of_some_size_are_read(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for file in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(LoramError, match="is not a regular file"):
            read_json(file)
    with pytest.raises(LoramError, match="no such file"):
        read_json(tmp_path / "absent")
    (tmp_path / "latin").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(LoramError, match="not UTF-8"):
        read_json(tmp_path / "latin")
    os.truncate(tmp_path / "latin", JSON_BYTES + 1)
    with pytest.raises(LoramError, match="larger than 256 MiB") as refused:
        read_json(tmp_path / "latin")
    # A model's file is no flag's value.
    assert refused.value.exit_code == 1
