"""The ``loram`` command: wiring, and the last word on errors and exit codes."""

import contextlib
import io
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import typer

from loram_cli.cli.commands.table import CommandGroup
from loram_cli.errors import LoramError, UsageError, is_out_of_memory, one_line
from loram_cli.quiet import quiet_process
from loram_cli.runs.processes import (
    LAUNCHER_SECONDS,
    end_with_launcher,
    is_lost_connection,
    leave_word,
    may_speak,
    process_count,
)
from loram_cli.runs.staging import existing_parent

app = typer.Typer(
    name="loram",
    cls=CommandGroup,
    help="Fine-tune a large model on hardware that cannot hold it: train LoRA on a pruned model, "
    "use it on the full one (LoRAM, arXiv 2502.13533).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_ON_SEVERAL_PROCESSES = ("train", "align")
# Characters of an error that are shown of one line; lists of known names are shorter.
_LINE = 1200
# Enough for the pauses between the operations of a small model.
_SPINS = "10000"


def _version(wanted: bool) -> None:
    if wanted:
        from loram_cli.runs.manifest import library_versions

        for name, version in library_versions().items():
            typer.echo(f"{name} {version}")
        raise typer.Exit


@app.callback()
def callback(
    version: bool = typer.Option(
        False,
        "--version",
        callback=_version,
        is_eager=True,
        help="Show the versions of loram and its libraries.",
    ),
) -> None:
    """Hold the options of ``loram`` itself."""


def main() -> None:
    """Run the command line and exit with 0, 1 (failure), 2 (usage), 130 (Ctrl-C) or 143."""
    _open_streams()
    quiet_process()
    bound_spinning()
    _keep_kernels_out_of_tmp()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    code = run_command(None)
    if code == 0 and _is_one_of_several():
        from loram_cli.training.distributed import leave_processes

        leave_processes()
    sys.exit(_flushed(code))


def bound_spinning() -> None:
    """Have threads that wait for each other sleep soon; read when torch is loaded.

    GNU's OpenMP lets them spin for milliseconds. Beside another busy process that stops training
    all but altogether. Fewer spins share better and cost more alone: on two cores 1000 took 1.4 to
    1.5 times as long alone and 3 times beside, 10000 0.8 to 1.1 and 5 to 7, torch's own 1 and 6 to
    22 (``tests/benchmarks/spinning.py``). What the user has set stays.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def run_command(arguments: list[str] | None) -> int:
    """Run one command line.

    Returns:
        The exit code.
    """
    try:
        if arguments is None:
            end_with_launcher()
        _check_surroundings(arguments)
        outcome = typer.main.get_command(app).main(
            args=arguments, prog_name="loram", standalone_mode=False
        )
        if outcome == 130:  # typer's form of Ctrl-C
            raise KeyboardInterrupt
        return outcome if isinstance(outcome, int) else 0
    except LoramError as error:
        return _fail(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted; the same command resumes where this one stopped", 130)
    except Exception as error:
        if hasattr(error, "format_message"):
            return _usage(error)
        if is_lost_connection(error):
            time.sleep(LAUNCHER_SECONDS)  # for the launcher, which ends this one
            return _fail("another process of this command has ended; it says why above", 1)
        if os.environ.get("LORAM_DEBUG"):
            raise
        variable = _misread_variable(error)
        if variable is not None:
            reason = one_line(str(error).strip().partition("\n")[0])
            return _fail(
                f"the environment variable {variable}: a library cannot use its value ({reason})\n"
                f"correct it, or unset {variable}",
                2,
            )
        return _fail(_told(error), 1)


def _misread_variable(error: Exception) -> str | None:
    """The environment variable that a library failed to read, such as a timeout that is no number.

    An error that names a variable is about it; one raised while a library is imported is about a
    variable whose value it quotes.
    """
    text = str(error)
    own = str(Path(__file__).parents[1])
    importing = any(
        frame.f_code.co_name == "<module>" and not frame.f_code.co_filename.startswith(own)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    for name, value in os.environ.items():
        if re.fullmatch(r"[A-Z]+(_[A-Z0-9]+)+", name) and re.search(rf"\b{name}\b", text):
            return name
        if importing and value and isinstance(error, ValueError) and repr(value) in text:
            return name
    return None


def _told(error: Exception) -> str:
    """What went wrong outside of loram's own checks, and what to do."""
    reason = one_line(str(error).strip().partition("\n")[0])
    if is_out_of_memory(error):
        return (
            f"out of memory{': ' if reason else ''}{reason}\nwhat makes it fit: "
            "--quantize nf4; for training --gradient-checkpointing and --micro-batch 1 "
            "('loram memory-report' counts); for eval and generate a lower --weights-memory; "
            "for calibration fewer or shorter windows"
        )
    if "No space left on device" in str(error):
        return "no space left on the disk\nfree some and run the same command"
    if isinstance(error, BrokenPipeError):
        return "the program that reads this output has ended"
    if isinstance(error, OSError) and error.strerror:
        where = f"{one_line(str(error.filename))}: " if error.filename else ""
        return f"{where}{error.strerror}\ncheck the path, and your rights to it"
    return (
        f"internal: {type(error).__name__}: {reason}\n"
        "this is a bug in loram; LORAM_DEBUG=1 shows the traceback to report"
    )


def _open_streams() -> None:
    """Have all three standard streams open, and let none of them fail at a character."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file to be opened would get what is printed.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
        getattr(sys, name).reconfigure(errors="replace")
    # Not where a program that calls this has read from it before.
    with contextlib.suppress(io.UnsupportedOperation):
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")


def _keep_kernels_out_of_tmp() -> None:
    """Have torch keep what it compiles in the user's cache: it makes a folder even for nothing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or f"{os.environ.get('HOME', '')}/.cache")
    with contextlib.suppress(UsageError):  # a link that leads nowhere
        if cache.is_absolute() and os.access(existing_parent(cache / "any"), os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "torchinductor"))


def _flushed(code: int) -> int:
    """The exit code, once what was printed is out; a reader that is gone has it already."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return code or 1
    return code


def _is_one_of_several() -> bool:
    try:
        return process_count() > 1
    except UsageError:
        return False


def _usage(error: Any) -> int:
    """The line for a parsing error; typer's classes of it are not public."""
    where = getattr(getattr(error, "ctx", None), "command_path", "loram")
    text = error.format_message().strip()
    if not text or "\n" in text:
        error.show()
        return 2
    return _fail(f"{text}\nsee '{where} --help'", error.exit_code)


def _check_surroundings(arguments: list[str] | None) -> None:
    """Refuse a working directory that is gone, and several processes where one does the work."""
    try:
        os.getcwd()  # noqa: PTH109 - pathlib does the same
    except FileNotFoundError:
        raise LoramError("the working directory is gone", "change to another one") from None
    words = sys.argv[1:] if arguments is None else arguments
    command = next((word for word in words if not word.startswith("-")), None)
    if process_count() > 1 and command is not None and command not in _ON_SEVERAL_PROCESSES:
        raise UsageError(
            f"'loram {command}' runs as one process, and a launcher started {process_count()}",
            "launch 'loram train' or 'loram align' that way, and everything else without",
        )


def _shortened(line: str) -> str:
    """A line without the middle of what somebody has passed by the page."""
    return line if len(line) <= _LINE else f"{line[: _LINE // 2]} ... {line[-_LINE // 4 :]}"


def _fail(text: str, code: int) -> int:
    text = "\n".join(map(_shortened, text.split("\n")))
    if may_speak(code):
        typer.echo(f"error: {text}", err=True)
        leave_word(text)
    return code
