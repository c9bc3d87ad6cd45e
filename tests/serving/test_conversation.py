"""The conversation in the terminal: by piped lines, and in a real terminal."""

import io
import json
import os
import pty
import select
import sys
import time

import pytest

from loram_cli.cli.app import run_command
from loram_cli.errors import LoramError, UsageError
from loram_cli.serving.conversation import Conversation
from loram_cli.serving.engine import ServingEngine
from loram_cli.serving.spec import ChatSpec

pytestmark = pytest.mark.integration
FIRST, SECOND = "What is 2 plus 1?", "What is 3 plus 1?"


@pytest.fixture
def conversation(rows, spec_of):
    return Conversation(ServingEngine(rows), spec_of(ChatSpec, system="Count."), "recovered")


def test_turns_are_remembered_taken_back_and_cleared(conversation):
    heard: list[str] = []
    answer = conversation.say(FIRST, heard.append)
    assert "".join(heard) == answer
    assert [turn["role"] for turn in conversation.turns] == ["system", "user", "assistant"]
    conversation.say(SECOND, heard.append)
    assert len(conversation.turns) == 5
    assert conversation.take_back() == SECOND
    assert len(conversation.turns) == 3
    conversation.clear()
    assert conversation.turns == [{"role": "system", "content": "Count."}]
    with pytest.raises(LoramError, match="nothing was said yet"):
        conversation.take_back()


def test_an_earlier_turn_changes_what_is_asked(conversation):
    row = conversation.engine.rows["recovered"]
    conversation.say(FIRST, lambda piece: None)
    ids = row.chat_ids([*conversation.turns, {"role": "user", "content": SECOND}])
    text = row.tokenizer.decode(ids)
    assert FIRST in text and text.index(FIRST) < text.index(SECOND)


def test_rows_are_switched_by_name(conversation):
    conversation.switch("base")
    assert conversation.row == "base"
    with pytest.raises(UsageError, match="unknown row 'nobody'"):
        conversation.switch("nobody")


def test_an_ended_answer_is_not_remembered(conversation):
    def end(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.say(FIRST, end)
    assert len(conversation.turns) == 1
    assert conversation.say(FIRST, lambda piece: None)


@pytest.fixture
def command(base, finished_run):
    words = ["chat", "--run", finished_run, "--model", base, "--max-new-tokens", 8]
    return [*map(str, words), "--device", "cpu"]


def test_piped_lines_are_messages_and_words_that_steer(command, monkeypatch, capsys):
    lines = [FIRST, "/row base", "/again", "/row nobody", "/rows", "/what", "/again", "/exit", "no"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert run_command([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["row"] == "base"
    assert [turn["role"] for turn in told["messages"]] == ["user", "assistant"]
    assert told["messages"][0]["content"] == FIRST
    assert "unknown row 'nobody'" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{FIRST}\n"))
    assert run_command([*command, "--rows", "base", "--layout", "question"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == told["messages"][1]["content"]
    assert "base answers" in err


def read_until(handle: int, text: str, seconds: float = 120) -> str:
    """What a terminal shows until a text is there."""
    shown, until = "", time.monotonic() + seconds
    while text not in shown:
        assert time.monotonic() < until, shown
        if select.select([handle], [], [], 1)[0]:
            try:
                shown += os.read(handle, 4096).decode(errors="replace")
            except OSError:  # The other end is gone.
                break
    return shown


@pytest.mark.slow
def test_in_a_terminal_it_prompts_answers_and_ends_with_control_d(command):
    child, handle = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-m", "loram_cli", *command])
    try:
        read_until(handle, "recovered> ")
        os.write(handle, FIRST.encode() + b"\n")
        shown = read_until(handle, "recovered> ")
        assert FIRST in shown
        os.write(handle, b"/row base\n")
        assert "base answers" in read_until(handle, "base> ")
        os.write(handle, b"/again\n")
        read_until(handle, "base> ")
        os.write(handle, b"\x04")
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        child = 0
    finally:
        os.close(handle)
        if child:
            os.kill(child, 9)
            os.waitpid(child, 0)
