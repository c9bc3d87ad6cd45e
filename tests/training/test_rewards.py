"""Reward functions of the user's own: found without running, called by name, told when they fail."""

import json
import os

import pytest

from loram_cli.errors import LoramError, UsageError
from loram_cli.training.rewards import (
    FIELDS,
    check_reward,
    load_reward,
    parse_reward,
    with_fields,
)

GOOD = """
SCALE = 2

def short(completions, **fields):
    return [SCALE / len(text) for text in completions]

def matches(prompts, completions, solution, **fields):
    return [float(a == b) if b else None for a, b in zip(completions, solution)]

def fails(completions, **fields):
    return [1 / 0 for _ in completions]

def counts(completions, **fields):
    return [1.0]

def words(completions, **fields):
    return ["high" for _ in completions]

def nothing(completions, **fields):
    return None
"""


@pytest.fixture
def named(tmp_path):
    (tmp_path / "rewards.py").write_text(GOOD)
    return lambda function: parse_reward(f"{tmp_path}/rewards.py:{function}")


def test_a_function_gets_the_records_fields_and_may_abstain(named):
    records = [{"solution": "ab", "level": 1}, {"solution": None, "level": "two"}]
    reward = with_fields(load_reward(named("matches")))
    texts = [json.dumps(record) for record in records]
    given = {"prompts": ["p", "q"], "answer": ["", ""], FIELDS: texts, "trainer_state": None}
    assert reward(completions=["ab", "cd"], **given) == [1.0, None]
    assert reward.__name__ == "matches"
    assert with_fields(load_reward(named("short")))(completions=["ab", "abcd"]) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("fails", "line 11, ZeroDivisionError"),
        ("counts", "gave 1 values for 2 completions"),
        ("words", "'high' is no finite number"),
        ("nothing", "gave NoneType for 2 completions"),
        ("matches", "missing 1 required positional argument: 'solution'"),
    ],
)
def test_failures_name_the_function_and_the_line(named, function, said):
    with pytest.raises(LoramError, match=said):
        load_reward(named(function))(completions=["a", "b"], prompts=["p", "q"])


def test_a_file_is_checked_without_running_it(tmp_path, named):
    file = tmp_path / "late.py"
    file.write_text("raise RuntimeError('no')\ndef f(): ...\n")
    check_reward(parse_reward(f"{file}:f"))
    with pytest.raises(LoramError, match=r"late.py: line 1, RuntimeError: no"):
        load_reward(parse_reward(f"{file}:f"))
    with pytest.raises(LoramError, match="defines no function 'g'"):
        check_reward(parse_reward(f"{file}:g"))
    check_reward(named("SCALE"))
    with pytest.raises(LoramError, match="'SCALE' is no function"):
        load_reward(named("SCALE"))
    file.write_text("def f(:\n")
    with pytest.raises(LoramError, match=r"late.py, line 1: no Python"):
        check_reward(parse_reward(f"{file}:f"))
    with pytest.raises(LoramError, match="no such file"):
        check_reward(parse_reward("absent.py:f"))


@pytest.mark.parametrize("text", ["rewards.py", "rewards:f", "rewards.py:1f", "other", ""])
def test_other_names_are_refused(text):
    with pytest.raises(UsageError, match=r"expected FILE.py:FUNCTION, or exact"):
        parse_reward(text)


def test_a_hostile_file_ends_in_one_line(tmp_path):
    file = tmp_path / "bad.py"
    name = parse_reward(f"{file}:f")
    os.mkfifo(file)
    with pytest.raises(LoramError, match="is not a regular file"):
        check_reward(name)
    file.unlink()
    file.write_text("(" * 20000)
    with pytest.raises(LoramError, match=r"bad\.py"):
        check_reward(name)
    file.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(LoramError, match="line 2, SystemExit: 0"):
        load_reward(name)
    file.write_text("def f(completions, **fields):\n    return [10**5000 for _ in completions]\n")
    with pytest.raises(LoramError, match="a number of many digits is no finite number"):
        load_reward(name)(completions=["a"])
