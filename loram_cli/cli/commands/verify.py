"""``loram verify``."""

import typer

from loram_cli.cli.options import JsonOption, Values, reporter_for
from loram_cli.tools.specs import VerifySpec

NAME = "verify"
EPILOG = "Example: loram verify loram-run/recovered"
SPEC, OPTIONS = VerifySpec, JsonOption


def command(values: Values, options: JsonOption) -> None:
    """Check files, shapes and ancestry of a directory against what was recorded.

    Every file of an output is hashed, and added files are listed. Of a base, the quick form
    compares 16 windows of 4 KiB of every tensor, the config and the tokenizer's files; with --full
    every byte, where it was recorded when the base was pruned (up to 1 GiB) or lies in the hub's
    cache. Before a stage uses an input, it makes the same comparison of files up to 256 MiB.
    """
    from loram_cli.cli.draw.console import print_json, stdout_console
    from loram_cli.tools import verify

    report = verify.run(VerifySpec(**values), reporter_for(options.json_output))
    if options.json_output:
        print_json(report.to_mapping())
    else:
        console = stdout_console()
        for note in report.notes:
            console.print(f"note: {note}")
        for problem in report.problems:
            console.print(f"problem: {problem}")
        checked, wrong = len(report.directories), len(report.problems)
        console.print(
            f"{checked} director{'y' if checked == 1 else 'ies'} checked, "
            f"{wrong or 'no'} problem{'' if wrong == 1 else 's'}"
        )
    if report.problems:
        raise typer.Exit(1)
