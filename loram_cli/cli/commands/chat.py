"""``loram chat``."""

import contextlib
import sys
from typing import TYPE_CHECKING

from loram_cli.cli.commands.generate import TalkOptions, with_rows
from loram_cli.cli.options import Values, layered, reporter_for
from loram_cli.errors import LoramError
from loram_cli.reading import read_stdin
from loram_cli.reporting import Reporter
from loram_cli.serving.spec import ChatSpec

if TYPE_CHECKING:
    from loram_cli.serving.conversation import Conversation

NAME = "chat"
EPILOG = "Example: loram chat --rows recovered,base"
SPEC, OPTIONS = ChatSpec, TalkOptions


def command(values: Values, options: TalkOptions) -> None:
    """Talk to the models in the terminal, turn by turn; /row NAME has another one answer.

    /rows lists them, /again asks the last message anew, /clear forgets what was said, /exit or
    Ctrl-D ends. Ctrl-C ends an answer. Lines that are piped in are messages.
    """
    from loram_cli.cli.draw.console import print_json
    from loram_cli.config.defaults import chat_spec
    from loram_cli.config.rows import served_rows
    from loram_cli.serving.conversation import HELP, Conversation
    from loram_cli.serving.engine import ServingEngine, opened_rows

    reporter = reporter_for(options.json_output)
    spec = chat_spec(*with_rows(options, layered(NAME, values), reporter, served_rows))
    with opened_rows(spec, reporter) as rows:
        conversation = Conversation(ServingEngine(rows), spec, next(iter(rows)))
        reporter.note(f"{conversation.row} answers (of {', '.join(rows)}); {HELP}")
        _talk(conversation, reporter, quiet=options.json_output)
    if options.json_output:
        print_json({"row": conversation.row, "messages": conversation.turns})


def _talk(conversation: "Conversation", reporter: Reporter, *, quiet: bool) -> None:
    while True:
        line = _read(f"{conversation.row}> ")
        if line is None or line in ("/exit", "/quit"):
            return
        try:
            if line.startswith("/"):
                line = _steer(conversation, line, reporter)
            if line:
                _ask(conversation, line, quiet=quiet)
        except KeyboardInterrupt:
            _write("\n", quiet=quiet)
            reporter.note("answer ended; it is not remembered")
        except LoramError as error:
            # A wrong word does not end a conversation.
            reporter.warn(str(error))


def _ask(conversation: "Conversation", line: str, *, quiet: bool) -> None:
    conversation.say(line, lambda piece: _write(piece, quiet=quiet))
    _write("\n", quiet=quiet)


def _steer(conversation: "Conversation", line: str, reporter: Reporter) -> str:
    """Do what a line with a slash says; the message to ask, if any."""
    from loram_cli.serving.conversation import HELP

    word, _, rest = line.partition(" ")
    if word == "/row" and rest.strip():
        conversation.switch(rest.strip())
        reporter.note(f"{conversation.row} answers")
    elif word == "/rows" or word == "/row":
        names = [f"{n} (answers)" if n == conversation.row else n for n in conversation.engine.rows]
        reporter.note(", ".join(names))
    elif word == "/again":
        return conversation.take_back()
    elif word == "/clear":
        conversation.clear()
        reporter.note("forgotten")
    else:
        reporter.note(HELP)
    return ""


def _read(prompt: str) -> str | None:
    """The next message; None at the end. A terminal gets a prompt and the usual keys."""
    if sys.stdin is None or not sys.stdin.isatty():
        line = "" if sys.stdin is None else read_stdin(sys.stdin, line=True)
        return line.strip() if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then knows arrows and history
    try:
        return input(prompt).strip()
    except EOFError:
        sys.stdout.write("\n")
        return None


def _write(text: str, *, quiet: bool) -> None:
    if not quiet:
        sys.stdout.write(text)
        sys.stdout.flush()
