"""``loram import``."""

from loram_cli.cli.options import JsonOption, Values, reporter_for
from loram_cli.errors import LoramError
from loram_cli.export.specs import ImportSpec

NAME = "import"
EPILOG = "Example: loram import SmolLM2-135M-Instruct.F16.gguf --out SmolLM2"
SPEC, OPTIONS = ImportSpec, JsonOption


def command(values: Values, options: JsonOption) -> None:
    """Turn a GGUF model into a directory that --model takes, through transformers' reader."""
    from loram_cli.cli.draw.console import print_json, stdout_console
    from loram_cli.export.gguf_import import import_gguf

    file = values["file"]
    if not file.is_file():
        # Before its name makes the output's: a folder such as "." has none.
        raise LoramError(f"{file}: not a GGUF file" if file.exists() else f"{file}: no such file")
    spec = ImportSpec(**{"out": file.with_suffix(""), **values})
    reporter = reporter_for(options.json_output)
    done = import_gguf(spec.file, spec.out, reporter, dtype=spec.dtype, force=spec.force)
    if options.json_output:
        print_json(done.to_mapping())
        return
    console = stdout_console()
    console.print(f"wrote {done.path} ({done.family}, {done.dtype})")
    console.print(f"next: loram prune --model {done.path}")
