"""The ``loram`` command: wiring, and the last word on errors and exit codes."""

import os
import signal
import sys
import time
from typing import Any

import typer

from loram_cli.cli.commands import (
    align,
    bench,
    evaluate,
    export,
    generate,
    import_gguf,
    inspect,
    memory_report,
    prune,
    recover,
    report,
    run,
    train,
    verify,
)
from loram_cli.cli.from_spec import command_of
from loram_cli.errors import LoramError, UsageError, is_out_of_memory
from loram_cli.quiet import quiet_process
from loram_cli.runs.processes import (
    LAUNCHER_SECONDS,
    end_with_launcher,
    is_lost_connection,
    leave_word,
    may_speak,
    process_count,
)

app = typer.Typer(
    name="loram",
    help="Fine-tune a large model on hardware that cannot hold it: train LoRA on a pruned model, "
    "use it on the full one (LoRAM, arXiv 2502.13533).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
MODULES = (
    prune, align, train, recover, evaluate, generate, export, memory_report, bench, run, report,
    verify, inspect, import_gguf,
)  # fmt: skip
_ON_SEVERAL_PROCESSES = (train.NAME, align.NAME)
for module in MODULES:
    app.command(module.NAME, epilog=module.EPILOG)(
        command_of(module.command, module.SPEC, module.OPTIONS)
    )


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
    quiet_process()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end_with_launcher()
    code = run_command(None)
    if code == 0 and process_count() > 1:
        from loram_cli.training.distributed import leave_processes

        leave_processes()
    sys.exit(code)


def run_command(arguments: list[str] | None) -> int:
    """Run one command line.

    Args:
        arguments: The words after ``loram``; None takes those of the process.

    Returns:
        The exit code.
    """
    try:
        _refuse_several_processes(arguments)
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
        if _lacks_memory(error):
            return _fail(
                f"out of memory: {str(error).strip().partition(chr(10))[0]}\nwhat makes it fit: "
                "--quantize nf4; for training --gradient-checkpointing and --micro-batch 1 "
                "('loram memory-report' counts); for eval and generate a lower --weights-memory; "
                "for calibration fewer or shorter windows",
                1,
            )
        if "No space left on device" in str(error):
            return _fail("no space left on the disk\nfree some and run the same command", 1)
        return _fail(
            f"internal: {type(error).__name__}: {str(error).partition(chr(10))[0]}\n"
            "this is a bug in loram; LORAM_DEBUG=1 shows the traceback to report",
            1,
        )


def _lacks_memory(error: Exception) -> bool:
    # The system's calls and the starting of threads say it in their own way.
    told = str(error).lower()
    return is_out_of_memory(error) or "cannot allocate memory" in told or "new thread" in told


def _usage(error: Any) -> int:
    """The line for a parsing error; typer's classes of it are not public."""
    where = getattr(getattr(error, "ctx", None), "command_path", "loram")
    text = error.format_message().strip()
    if not text or "\n" in text:
        error.show()
        return 2
    return _fail(f"{text}\nsee '{where} --help'", error.exit_code)


def _refuse_several_processes(arguments: list[str] | None) -> None:
    """Only the commands that train know how to share their work."""
    words = sys.argv[1:] if arguments is None else arguments
    command = next((word for word in words if not word.startswith("-")), None)
    if process_count() > 1 and command is not None and command not in _ON_SEVERAL_PROCESSES:
        raise UsageError(
            f"'loram {command}' runs as one process, and a launcher started {process_count()}",
            "launch 'loram train' or 'loram align' that way, and everything else without",
        )


def _fail(text: str, code: int) -> int:
    if may_speak(code):
        typer.echo(f"error: {text}", err=True)
        leave_word(text)
    return code
