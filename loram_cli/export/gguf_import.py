"""A GGUF model as a Hugging Face directory, through transformers' own reader."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguf import MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType

from loram_cli.checkpoint.finite import check_finite
from loram_cli.checkpoint.json_files import read_json
from loram_cli.checkpoint.model import Model
from loram_cli.errors import LoramError, UsageError, reason_of
from loram_cli.export.gguf_file import GgufFile
from loram_cli.export.gguf_merge import gguf_names
from loram_cli.export.gguf_types import is_quantized
from loram_cli.quiet import no_progress_bars, quiet_gguf, quiet_libraries
from loram_cli.reporting import Reporter
from loram_cli.runs.digests import file_records
from loram_cli.runs.output_file import refuse_existing
from loram_cli.runs.staging import whole_directory
from loram_cli.schema import unknown_name

_ROTARY_FACTORS = (
    MODEL_TENSOR.ROPE_FREQS,
    MODEL_TENSOR.ROPE_FACTORS_LONG,
    MODEL_TENSOR.ROPE_FACTORS_SHORT,
)
# Says which files of a directory an import wrote.
RECORD_NAME = "loram-import.json"
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class GgufImport:
    """What was written.

    Attributes:
        path: The directory.
        family: Of the model.
        dtype: Of its weights.
        quantized: Which quantized types the file has, each with its number of tensors.
    """

    path: Path
    family: str
    dtype: str
    quantized: dict[str, int]

    def to_mapping(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "path": str(self.path)}


def import_gguf(
    source: Path, out: Path, reporter: Reporter, *, dtype: str | None = None, force: bool = False
) -> GgufImport:
    """Write a GGUF model's config, weights and tokenizer as transformers does.

    The whole model is held in memory once, in the target's type.

    Args:
        source: The GGUF file.
        out: The directory.
        reporter: Gets a warning where the file is quantized, or its rotary scaling is lost.
        dtype: Of the weights; None for the file's own, and bfloat16 where it is quantized.
        force: Replace an existing directory.

    Raises:
        LoramError: Not a model of a known family, or transformers cannot read it.
        UsageError: An unknown type, or the directory exists.
    """
    if dtype is not None and dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES, "--dtype")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file, expected a directory", "pass another --out")
    refuse_existing(out, force=force, is_ours=_is_imported(out))
    file = GgufFile.open(source)
    gguf_names(file)
    kinds = Counter(t.kind for t in file.tensors.values() if len(t.shape) > 1)
    quantized = {k.name: n for k, n in sorted(kinds.items()) if is_quantized(k)}
    if quantized:
        found = ", ".join(f"{n} of {sum(kinds.values())} in {k}" for k, n in quantized.items())
        reporter.warn(
            f"{source}: weights are quantized ({found}); the imported model keeps that error. "
            "Use the original checkpoint where you can."
        )
    chosen = dtype or dtype_of(kinds)
    with whole_directory(out) as partial:
        _convert(source, partial, chosen)
        made = Model.open(partial)
        if scales_rotation(file) and not _keeps_scaling(made.config):
            reporter.warn(
                f"{source}: scales its rotary frequencies, which transformers' reader leaves out. "
                f"Copy rope_parameters (or rope_scaling) from the original model's config.json."
            )
        record = {"file": str(source), "outputs": file_records(partial)}
        (partial / RECORD_NAME).write_text(json.dumps(record, indent=2), "utf-8")
    return GgufImport(out, made.family.family, chosen, quantized)


def _is_imported(out: Path) -> bool:
    """Whether a directory holds what :func:`import_gguf` wrote, and nothing else."""
    try:
        recorded = {RECORD_NAME, *read_json(out / RECORD_NAME)["outputs"]}
    except (LoramError, KeyError, TypeError):
        return False
    return {path.relative_to(out).as_posix() for path in out.rglob("*")} <= recorded


def dtype_of(kinds: Counter[GGMLQuantizationType]) -> str:
    """The type for weights whose matrices are of these types: their own, else bfloat16."""
    names = {
        GGMLQuantizationType.F16: "float16",
        GGMLQuantizationType.F32: "float32",
        GGMLQuantizationType.BF16: "bfloat16",
    }
    return names.get(kinds.most_common(1)[0][0], "bfloat16") if kinds else "bfloat16"


def scales_rotation(file: GgufFile) -> bool:
    """Whether the model scales its rotary frequencies, as Llama 3.1 does to read longer texts."""
    stated = file.value(f"{file.architecture}.rope.scaling.type", "none")
    factors = (f"{TENSOR_NAMES[tensor]}.weight" for tensor in _ROTARY_FACTORS)
    return stated != "none" or any(name in file.tensors for name in factors)


def _keeps_scaling(config: Mapping[str, Any]) -> bool:
    """Whether a config states another rotary type than the plain one, for any kind of layer."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = [found, *(part for part in found.values() if isinstance(part, Mapping))]
    return any(kind.get("rope_type", "default") != "default" for kind in kinds)


def _convert(source: Path, out: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": source.name}
    try:
        with quiet_libraries(), no_progress_bars(), quiet_gguf():
            tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
            model, told = AutoModelForCausalLM.from_pretrained(
                source.parent,
                output_loading_info=True,
                dtype=getattr(torch, dtype),
                quantization_config=GgufConfig(dequantize=True),
                **where,
            )
    # The reader raises whatever the step that fails raises.
    except Exception as error:
        raise LoramError(
            f"{source}: transformers cannot read it ({reason_of(error)})",
            "take the original checkpoint, or a newer transformers",
        ) from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise LoramError(
            f"{source}: {len(missing)} tensors are missing, such as {missing[0]}",
            "take a whole GGUF file, or the original checkpoint",
        )
    for name, weight in model.named_parameters():
        check_finite(source, name, weight.detach())
    # Its weights are plain now.
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.is_quantized = False
    model.config.dtype = dtype
    with no_progress_bars():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
