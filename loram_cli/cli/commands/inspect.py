"""``loram inspect``."""

from dataclasses import dataclass
from pathlib import Path

from loram_cli.cli.options import JsonOption, Values
from loram_cli.errors import UsageError
from loram_cli.schema import setting

NAME = "inspect"
EPILOG = "Example: loram inspect loram-run/pruned"


@dataclass(frozen=True, kw_only=True)
class InspectOptions(JsonOption):
    """What to look at."""

    directory: Path = setting(
        help="An output, a run directory, a model or an adapter.", argument=True
    )
    family: bool = setting(
        False,
        switch=True,
        help="Propose a family file for the architecture of a model (directory or config.json).",
    )
    out: Path | None = setting(None, help="With --family: the file to write it to.")


SPEC, OPTIONS = None, InspectOptions


def command(values: Values, options: InspectOptions) -> None:
    """Show what a directory is: stage, base, widths per layer, spec and results."""
    from loram_cli.cli.draw.console import print_json, stdout_console
    from loram_cli.cli.draw.inspection import lines
    from loram_cli.tools.inspect import inspect

    if options.family:
        _propose(options)
        return
    if options.out is not None:
        raise UsageError("--out goes with --family")
    console = stdout_console()
    found = inspect(options.directory)
    if options.json_output:
        print_json(found.to_mapping())
        return
    for line in lines(found):
        console.print(line)


def _propose(options: InspectOptions) -> None:
    from loram_cli.arch.registry import FAMILIES_VARIABLE
    from loram_cli.checkpoint.json_files import read_json
    from loram_cli.cli.draw.console import ConsoleReporter, print_json, stdout_console
    from loram_cli.modeling.propose import propose_family, render_family

    file = options.directory
    data, remarks = propose_family(read_json(file if file.is_file() else file / "config.json"))
    if options.out is not None:
        _write(options.out, render_family(data))
    if options.json_output:
        print_json({"family": data, "remarks": remarks})
        return
    # Remarks go to stderr, so that "> FILE" is the file.
    reporter = ConsoleReporter()
    if options.out is None:
        stdout_console().print(render_family(data))
    else:
        stdout_console().print(f"wrote {options.out}")
        reporter.note(f"{FAMILIES_VARIABLE}={options.out.parent} lets every command read it")
    for remark in remarks:
        reporter.warn(f"check: {remark}")


def _write(file: Path, text: str) -> None:
    if file.exists():
        raise UsageError(f"{file} is there already", "name another file, or remove it")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
