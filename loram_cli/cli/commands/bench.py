"""``loram bench``."""

from dataclasses import dataclass

from loram_cli.cli.options import JsonOption, Values, reporter_for
from loram_cli.errors import UsageError
from loram_cli.schema import setting
from loram_cli.stages.fit.spec import Quantization
from loram_cli.tools.specs import BenchModel, BenchSpec

NAME = "bench"
EPILOG = "Example: loram bench train --row llama2-13b --row llama2-13b:0.65"


@dataclass(frozen=True, kw_only=True)
class BenchOptions(JsonOption):
    """Other ways to name rows."""

    what: str = setting("train", help="What to measure: train.", argument=True)
    preset: str | None = setting(None, help="Measure this preset at --ratio and --quantize.")
    ratio: float | None = setting(
        None, help="Pruning ratio of --preset.", default_text="0, the base", at_least=0, below=1
    )
    quantize: Quantization | None = setting(None, help="nf4: weights in 4 bits.")
    multiple_of: int | None = setting(
        None, help="Round kept MLP channels up to a multiple.", default_text="1", at_least=1
    )
    paper: bool = setting(
        False, switch=True, help="The rows of the paper's Table 8, and 70B QLoRAM."
    )


SPEC, OPTIONS = BenchSpec, BenchOptions


def command(values: Values, options: BenchOptions) -> None:
    """Take real training steps on random weights of true shapes: peak memory and throughput."""
    from loram_cli.cli.draw.bench import bench_table
    from loram_cli.cli.draw.console import print_json, stdout_console
    from loram_cli.tools import bench

    if options.what != "train":
        raise UsageError(f"bench {options.what}: only 'train' can be measured")
    how = (options.ratio, options.quantize, options.multiple_of)
    if options.preset is None and how != (None, None, None):
        raise UsageError(
            "--ratio, --quantize and --multiple-of are for --preset", "pass --preset NAME, or --row"
        )
    rows = [*values.pop("rows", ()), *(bench.PAPER_ROWS if options.paper else ())]
    if options.preset is not None:
        ratio, multiple = options.ratio or 0.0, options.multiple_of or 1
        rows.append(str(BenchModel(options.preset, ratio, options.quantize, multiple)))
    spec = BenchSpec(rows=tuple(rows), **values)
    result = bench.run(spec, reporter_for(options.json_output))
    if options.json_output:
        print_json(result.to_mapping())
        return
    console = stdout_console()
    console.print(bench_table(result))
    for note in result.notes:
        console.print(note)
