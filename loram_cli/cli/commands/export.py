"""``loram export``."""

from dataclasses import dataclass

from loram_cli.cli.options import BaseOptions, Values, layered, reporter_for, settle
from loram_cli.export.specs import ExportSpec
from loram_cli.schema import setting

NAME = "export"
EPILOG = "Example: loram export --to gguf --merge-into base.Q8_0.gguf --type q8_0"


@dataclass(frozen=True, kw_only=True)
class ExportOptions(BaseOptions):
    """Where it comes from."""

    dry_run: bool = setting(False, switch=True, help="Check everything, print the plan, stop.")


SPEC, OPTIONS = ExportSpec, ExportOptions


def command(values: Values, options: ExportOptions) -> None:
    """Write the recovered adapter as GGUF, for llama.cpp and Ollama: alone, or merged."""
    from loram_cli.cli.draw.console import print_json, stdout_console
    from loram_cli.config.defaults import export_spec
    from loram_cli.export import run
    from loram_cli.units import format_bytes

    reporter = reporter_for(options.json_output)
    place = settle(options, reporter, at_hand=values.get("adapter"))
    spec = export_spec(place, layered(NAME, values))
    done = run.run(spec, reporter, dry_run=options.dry_run)
    if options.json_output:
        print_json({**done.to_mapping(), "dry_run": options.dry_run})
        return
    size = "" if done.num_bytes is None else f", {format_bytes(done.num_bytes)}"
    verb = "would write" if options.dry_run else "wrote"
    console = stdout_console()
    console.print(f"{verb} {done.path} ({done.modules} modules{size})")
    if done.modelfile is None:
        console.print(f"next: llama-server -m BASE.gguf --lora {done.path}")
    else:
        console.print(f"next: ollama create {done.path.stem.lower()} -f {done.modelfile}")
