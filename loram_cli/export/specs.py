"""What to export and to import."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loram_cli.schema import Spec, setting

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
Dtype = Literal["bfloat16", "float16", "float32"]
FORCE_HELP = "Replace an existing output."


@dataclass(frozen=True, kw_only=True)
class ExportSpec(Spec):
    """A recovered adapter, and the format that it goes into."""

    adapter: Path = setting(help="Recovered adapter, not the run's.", flag="--in", place=True)
    model: Path = setting(help="The original base.", flag="", place=True)
    out: Path = setting(
        help="The file to write.", place=True, default_text="recovered.gguf or merged.gguf in --run"
    )
    to: Literal["gguf"] = setting("gguf", help="Format.")
    merge_into: Path | None = setting(
        None,
        help="The base as a GGUF file: write a new one with the adapter added.",
        place=True,
    )
    type: GgufType | None = setting(
        None,
        help="Of the weights that are written: f32, f16 or bf16; merged also q8_0, q5_1, q5_0, "
        "q4_1 or q4_0.",
        default_text="f32; merged each tensor's own",
    )
    force: bool = setting(False, help=FORCE_HELP, place=True, switch=True)


@dataclass(frozen=True, kw_only=True)
class ImportSpec(Spec):
    """A GGUF file, and the directory that it becomes."""

    file: Path = setting(help="The GGUF file.", argument=True, place=True)
    out: Path = setting(
        help="The directory to write.", place=True, default_text="the file's name without .gguf"
    )
    dtype: Dtype | None = setting(
        None,
        help="Of the weights: bfloat16, float16 or float32.",
        default_text="the file's, bfloat16 where it is quantized",
    )
    force: bool = setting(False, help=FORCE_HELP, place=True, switch=True)
