"""A recovered adapter added to a GGUF model: a new file, written tensor by tensor."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, Keys

from loram_cli.errors import LoramError
from loram_cli.export.gguf_adapter import check_fit
from loram_cli.export.gguf_file import (
    GgufFile,
    GgufTensor,
    PlannedTensor,
    padding,
    write_header,
)
from loram_cli.export.gguf_names import (
    EMBEDDING,
    HEAD,
    GgufNames,
    LayerHeads,
    family_for_gguf,
)
from loram_cli.export.gguf_types import (
    FILE_TYPES,
    check_block,
    check_writable,
    decode,
    encode,
    is_quantized,
    type_named,
)
from loram_cli.lora.adapter import LoraAdapter, LoraPair
from loram_cli.lora.scatter import add_update
from loram_cli.reading import read_text
from loram_cli.reporting import Reporter
from loram_cli.runs.output_file import refuse_existing, whole_file
from loram_cli.units import MIB

MODELFILE_SUFFIX = ".Modelfile"
# Below it a user should know: an update that is smaller than a type's step is rounded away.
_LEAST_SHARE = 0.95


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor of the base.

    Attributes:
        source: The base's tensor.
        planned: The new file's.
        module: The adapter's module that is added, or None: its bytes are copied.
    """

    source: GgufTensor
    planned: PlannedTensor
    module: str | None = None


@dataclass(frozen=True)
class Merged:
    """What a merge wrote.

    Attributes:
        modelfile: Ollama's Modelfile.
        kept_share: How much of the update is in the new file: ``<W' - W, U> / <U, U>`` over all
            touched weights, ``W'`` as stored and ``U`` the update. 1 where types are fine enough
            or round at random; less where an update is smaller than the steps of a type that
            the base is stored in already, so that rounding gives the old weight back.
    """

    modelfile: Path
    kept_share: float


@dataclass(frozen=True)
class MergePlan:
    """What a merge will write.

    Attributes:
        base: The GGUF file that is read.
        kind: The type that was asked for; None for each tensor's own.
        changes: Every tensor of the new file, in its order.
        names: Of the model.
    """

    base: GgufFile
    kind: GGMLQuantizationType | None
    changes: tuple[Change, ...]
    names: GgufNames

    @property
    def num_bytes(self) -> int:
        """Bytes of the new file's tensors."""
        return sum(change.planned.num_bytes for change in self.changes)

    @property
    def touched(self) -> int:
        """How many tensors get an update."""
        return sum(change.module is not None for change in self.changes)


def plan_merge(
    adapter: LoraAdapter, base: Path, out: Path, *, kind: str | None = None, force: bool = False
) -> MergePlan:
    """Check everything that can be known before a weight is read.

    Args:
        adapter: A recovered adapter.
        base: The GGUF file of the adapter's base.
        out: The new file.
        kind: The touched tensors' type, such as ``q8_0``; None keeps each one's own.
        force: Replace an existing file.

    Raises:
        LoramError: The adapter was made for another model, or a tensor's type cannot be written.
        UsageError: An unknown type, a type whose blocks do not fit, or the file exists.
    """
    wanted = None if kind is None else type_named(kind)
    file = GgufFile.open(base)
    if out.exists() and out.samefile(base):
        raise LoramError(f"{out}: is the base itself", "pass another --out")
    ours = _has_modelfile(out)
    refuse_existing(out, force=force, is_ours=ours)
    # A Modelfile alone is left of a merge that was killed between the two.
    refuse_existing(modelfile_path(out), force=force or not out.exists(), is_ours=ours)
    if file.value("split.count", 1) > 1:
        raise LoramError(
            f"{base}: is one part of {file.value('split.count')}",
            "join them first: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf",
        )
    names = gguf_names(file)
    targets = _targets(adapter, file, names)
    changes = []
    for name, (source, module) in targets.items():
        own = source.kind
        new = own if module is None or wanted is None else wanted
        if module is not None:
            where = f"{base}: tensor {name}"
            check_fit(module, adapter.pairs[module], source.shape, where)
            check_writable(where, own, new)
            check_block(where, source.shape[-1], new)
        changes.append(Change(source, PlannedTensor(name, new, source.shape), module))
    return MergePlan(file, wanted, tuple(changes), names)


def merge(
    adapter: LoraAdapter, plan: MergePlan, out: Path, reporter: Reporter, *, force: bool = False
) -> Merged:
    """Write the base with the adapter added, and a Modelfile for Ollama beside it.

    Tensors that the adapter does not touch, the metadata, the tokenizer and the chat template are
    copied byte by byte, but for ``general.file_type`` where a type was asked for.

    Args:
        adapter: As planned.
        plan: From :func:`plan_merge`.
        out: The new file.
        reporter: Gets progress, and a warning where rounding takes much of the update away.
        force: Replace an existing file.

    Raises:
        LoramError: NaN weights, values that the type cannot hold, or a full disk.
        UsageError: The file exists.
    """
    stored = update = 0.0
    with (
        whole_file(out, replace=force) as file,
        reporter.progress("merge", plan.num_bytes / MIB, "MiB") as progress,
    ):
        entries, metadata = _metadata(plan)
        planned = [change.planned for change in plan.changes]
        alignment = plan.base.alignment
        write_header(file, plan.base.version, metadata, entries, planned, alignment)
        for change in plan.changes:
            if change.module is None:
                plan.base.copy_bytes(change.source, file)
            else:
                pair = plan.names.reordered(change.module, adapter.pairs[change.module])
                scaling = adapter.scaling(change.module)
                products = _write_updated(file, plan.base, change, pair, scaling)
                stored, update = stored + products[0], update + products[1]
            file.write(bytes(padding(change.planned.num_bytes, alignment)))
            progress.advance(change.planned.num_bytes / MIB)
        # Before the file has its name: it says later on that the file is ours.
        modelfile = modelfile_path(out)
        with whole_file(modelfile, replace=True) as beside:
            beside.write(modelfile_text(out, plan.base).encode())
    share = stored / update if update else 1.0
    if share < _LEAST_SHARE:
        kinds = sorted({c.planned.kind.name for c in plan.changes if c.module is not None})
        reporter.warn(
            f"{out}: only {share:.0%} of the update is left after rounding to {', '.join(kinds)}. "
            "Pass --type f16 or q8_0, or merge into an F16 file and quantize after it."
        )
    return Merged(modelfile, share)


def modelfile_path(out: Path) -> Path:
    """Where the Modelfile of a GGUF file goes."""
    return out.with_suffix(MODELFILE_SUFFIX)


def _has_modelfile(out: Path) -> bool:
    """Whether the Modelfile beside a GGUF file is ours: a merged file's metadata are the base's."""
    try:
        lines = read_text(modelfile_path(out), most_bytes=MIB).splitlines()
    except LoramError:
        return False
    return lines[:1] == [_modelfile_head(out)]


def _modelfile_head(out: Path) -> str:
    name = out.stem.lower()
    return f"# ollama create {name} -f {modelfile_path(out).name} && ollama run {name}"


def modelfile_text(out: Path, base: GgufFile) -> str:
    """An Ollama Modelfile for the merged model.

    Ollama finds tokenizer, stop tokens and chat template in the GGUF file.

    Args:
        out: The merged file, beside which the Modelfile lies.
        base: The file whose metadata it has.
    """
    lines = [_modelfile_head(out), f"FROM ./{out.name}"]
    if "tokenizer.chat_template" not in base.fields:
        lines += ["# The file has no chat template: the prompt is completed as it is.",
                  'TEMPLATE """{{ .Prompt }}"""']  # fmt: skip
    return "\n".join(lines) + "\n"


def gguf_names(file: GgufFile) -> GgufNames:
    """The names of a GGUF model's tensors.

    Raises:
        LoramError: An adapter or an unknown architecture, or metadata that makes no sense.
    """
    kind = file.value(Keys.General.TYPE, "model")
    if kind != "model":
        raise LoramError(f"{file.path}: holds a {kind}, expected a model")
    family = family_for_gguf(file.architecture, str(file.path))
    layers = file.hyperparameter("block_count")
    query = file.hyperparameter("attention.head_count")
    key_value = file.hyperparameter("attention.head_count_kv", query)
    heads = zip(_each(file, query, layers), _each(file, key_value, layers), strict=True)
    return GgufNames(family, tuple(LayerHeads(q, kv) for q, kv in heads))


def _each(file: GgufFile, value: object, layers: int) -> tuple[int, ...]:
    """A number for each layer, from one number or one per layer."""
    numbers = value if isinstance(value, tuple) else (value,) * layers
    counts = tuple(n for n in numbers if isinstance(n, int) and n > 0)
    if not len(counts) == len(numbers) == layers:
        raise LoramError(f"{file.path}: its metadata states head counts {value}")
    return counts


def _targets(
    adapter: LoraAdapter, file: GgufFile, names: GgufNames
) -> dict[str, tuple[GgufTensor, str | None]]:
    """Every tensor of the new file: the base's tensor, and the module that changes it."""
    targets: dict[str, tuple[GgufTensor, str | None]] = {
        name: (tensor, None) for name, tensor in file.tensors.items()
    }
    for module in adapter.pairs:
        name = names.tensor(module)
        source = file.tensors.get(name)
        if source is None and name == HEAD:
            # A tied head that the adapter changes becomes a tensor of its own.
            source = file.tensors.get(EMBEDDING)
        if source is None:
            raise LoramError(
                f"adapter module {module}: {file.path} has no tensor {name}",
                "pass the GGUF of the base that was pruned",
            )
        targets[name] = (source, module)
    return targets


def _metadata(plan: MergePlan) -> tuple[int, bytes]:
    """The new file's number of metadata entries, and these encoded."""
    base, metadata = plan.base, bytearray(plan.base.metadata())
    entries = len(base.fields)
    if plan.kind is None:
        return entries, bytes(metadata)
    file_type = base.fields.get(Keys.General.FILE_TYPE)
    if file_type is not None and file_type.kind is GGUFValueType.UINT32:
        at = file_type.offset_bytes - (base.metadata_end - len(metadata))
        struct.pack_into("<I", metadata, at, FILE_TYPES[plan.kind])
    version = Keys.General.QUANTIZATION_VERSION
    if is_quantized(plan.kind) and version not in base.fields:
        key = version.encode()
        metadata += struct.pack("<Q", len(key)) + key
        metadata += struct.pack("<II", GGUFValueType.UINT32, GGML_QUANT_VERSION)
        entries += 1
    return entries, bytes(metadata)


def _write_updated(
    out: BinaryIO, base: GgufFile, change: Change, pair: LoraPair, scaling: float
) -> tuple[float, float]:
    """Write ``W' = W + U``, ``U = scaling * B @ A``, some rows at a time.

    Returns:
        ``<W' - W, U>``, ``W'`` as stored, and ``<U, U>``.
    """
    stored = update = 0.0
    where = f"{base.path}: tensor {change.source.name}"
    for start, raw in base.read_rows(change.source):
        old = decode(raw, change.source.kind)
        new = old.clone()
        add_update(new, start, pair, scaling)
        coded = encode(new, change.planned.kind, where)
        out.write(coded.tobytes())
        wanted = new - old
        got = decode(coded, change.planned.kind) - old
        stored += torch.dot(got.flatten(), wanted.flatten()).item()
        update += torch.dot(wanted.flatten(), wanted.flatten()).item()
    return stored, update
