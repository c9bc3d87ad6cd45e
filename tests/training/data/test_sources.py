import json
from collections import Counter

import pytest

from loram_cli.errors import UsageError
from loram_cli.training.data.documents import load_instructions, load_text, source_layout
from loram_cli.training.data.sources import Source, data_files, mix, parse_sources


@pytest.mark.parametrize(
    ("data", "sources"),
    [
        ("a.jsonl:0.5,b.jsonl:0.25", [("a.jsonl", 0.5), ("b.jsonl", 0.25)]),
        ("a.jsonl, b.jsonl", [("a.jsonl", None), ("b.jsonl", None)]),
        ("demo:train", [("demo:train", None)]),
        ("demo:train:.5,demo:test:2", [("demo:train", 0.5), ("demo:test", 2.0)]),
        ("owner/name:config", [("owner/name:config", None)]),
        ("owner/name:main@train:0.75", [("owner/name:main@train", 0.75)]),
        ("owner/name@train[:100]", [("owner/name@train[:100]", None)]),
        ("owner/name:20220301.en", [("owner/name:20220301.en", None)]),
        ("C:\\data\\a.jsonl", [("C:\\data\\a.jsonl", None)]),
        ("C:\\data\\a.jsonl:0.5", [("C:\\data\\a.jsonl", 0.5)]),
    ],
)
def test_a_weight_is_a_decimal_number_after_the_last_colon(data, sources):
    assert parse_sources(data) == tuple(Source(*source) for source in sources)


def test_a_file_of_exactly_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "c.txt:0.5"):
        (tmp_path / name).write_text("x")
        assert parse_sources(name) == (Source(name),)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("a.jsonl:0.5,b.jsonl", "'b.jsonl' has no weight"),
        ("a.jsonl:0,b.jsonl:1", "the weight must be from 1e-06 to 1e"),
        (f"a.jsonl:{'9' * 308},b.jsonl:{'9' * 308}", "the weight must be from"),
        ("a.jsonl,,b.jsonl", "expected a name"),
        ("", "expected a name"),
    ],
)
def test_settings_that_cannot_be_meant(data, said):
    with pytest.raises(UsageError, match=said):
        parse_sources(data)


def test_a_weight_that_is_no_decimal_number_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match=r"a\.txt:1e-3': expected a name, or NAME:WEIGHT"):
        parse_sources(f"{tmp_path}/a.txt:1e-3")


def test_stopping_takes_exact_shares_and_repeats_nothing():
    parts = [[f"a{i}" for i in range(100)], [f"b{i}" for i in range(30)], ["c0"] * 40]
    mixed = mix(parts, [0.5, 0.25, 0.25], seed=3)
    assert Counter(item[0] for item in mixed) == {"a": 60, "b": 30, "c": 30}
    first = [item for item in mixed if item[0] == "a"]
    assert len(set(first)) == 60 and first == sorted(first, key=parts[0].index)
    assert mixed == mix(parts, [2, 1, 1], seed=3)
    assert mixed != mix(parts, [2, 1, 1], seed=4)


def test_repeating_uses_every_source_whole():
    parts = [[f"a{i}" for i in range(100)], [f"b{i}" for i in range(30)]]
    mixed = mix(parts, [1, 1], exhausted="repeat")
    assert Counter(item[0] for item in mixed) == {"a": 100, "b": 100}
    assert set(mixed) == {*parts[0], *parts[1]}
    assert set(Counter(item for item in mixed if item[0] == "b").values()) == {3, 4}


def test_weights_that_leave_nothing_or_repeat_without_end_are_refused():
    with pytest.raises(UsageError, match="source 2 gets no example"):
        mix([[1] * 10, [2] * 10], [1, 0.001])
    with pytest.raises(UsageError, match="source 2 would be repeated"):
        mix([[1] * 10, [2]], [1e-5, 1], exhausted="repeat")


@pytest.fixture
def two(tmp_path):
    for name, count in (("a", 40), ("b", 10)):
        rows = [{"prompt": f"{name}{i} ", "completion": "x"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{tmp_path}/a.jsonl:0.5,{tmp_path}/b.jsonl:0.5"


def test_instructions_and_documents_are_mixed(two, tmp_path):
    assert Counter(e.prompt[0] for e in load_instructions(two)) == {"a": 10, "b": 10}
    assert Counter(text[0] for text in load_text(two, exhausted="repeat")) == {"a": 40, "b": 40}
    assert len(load_instructions(two, limit=6)) == 6
    unweighted = two.replace(":0.5", "")
    assert [e.prompt[0] for e in load_instructions(unweighted)] == ["a"] * 40 + ["b"] * 10
    assert data_files(two) == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert data_files("owner/name:0.5,demo:train:1") is None
    assert source_layout(two) == "prompt"
