"""``loram memory-report``."""

from dataclasses import dataclass
from pathlib import Path

from loram_cli.cli.options import RunOptions, Values, reporter_for, settle
from loram_cli.schema import setting
from loram_cli.tools.specs import MemoryReportSpec

NAME = "memory-report"
EPILOG = "Example: loram memory-report --preset llama2-70b --ratio 0.85 --fit 24GiB"


@dataclass(frozen=True, kw_only=True)
class ReportOptions(RunOptions):
    """Of which model, and a picture."""

    model: str | None = setting(
        None,
        env="LORAM_MODEL",
        help="Base model: a directory, a config.json or a hub id (only its config is fetched). "
        "Else the run's, or the demo base.",
    )
    plot: Path | None = setting(None, help="Also draw the bars into this PNG file.")


SPEC, OPTIONS = MemoryReportSpec, ReportOptions


def command(values: Values, options: ReportOptions) -> None:
    """Tell what training base, pruned and NF4 models takes, without loading any."""
    from loram_cli.cli.draw.console import print_json
    from loram_cli.cli.draw.memory import show_report
    from loram_cli.config.defaults import model_dir
    from loram_cli.tools import memory_report

    reporter = reporter_for(options.json_output)
    if "preset" not in values:
        place = settle(options, reporter)
        named = Path(place.model)
        values["model"] = named if named.is_file() else model_dir(place.model, config_only=True)
        if place.run.is_done("prune") and "ratios" not in values and options.model is None:
            values["pruned"] = place.run.output("prune")
    elif options.model is not None:
        values["model"] = Path(options.model)
    result = memory_report.run(MemoryReportSpec(**values), reporter)
    if options.plot is not None:
        from loram_cli.memory.picture import draw_bars

        draw_bars(
            result.bars(), options.plot, f"{result.source}: training memory\n{result.settings}"
        )
        reporter.note(f"wrote {options.plot}")
    if options.json_output:
        print_json(result.to_mapping())
        return
    show_report(result)
