"""What an output descends from: the base, the model that was trained, an earlier adapter."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from loram_cli.arch.experts import plain_target
from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.oddities import oddities
from loram_cli.errors import LoramError, UsageError
from loram_cli.lora.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter_config, read_shapes
from loram_cli.reporting import Reporter
from loram_cli.runs.digests import file_digest, file_digests
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.training.data.layouts import Layout

# Files beside a model that it does not read: a user may write his own.
REMARKS = ("README.md", "loss.png", "loss.csv", "kept.png")
# The parts of a model's identity that make it another model, in words.
PARTS = {
    "tensors": "tensor names or shapes",
    "weights": "weights",
    "config": "config.json",
    "tokenizer": "tokenizer",
}
# And those that change what it is given, but not what it is.
TEMPLATE = {"chat_template": "chat template", "tokenizer_config": "tokenizer_config.json"}
# Files of an input are hashed before use up to so much together, small ones first: 0.2 s. The
# rest is compared by size, and by ``loram verify``.
_HASHED_BYTES = 256 << 20
_RECORDED_BYTES = 1 << 30


def differences(
    recorded: Mapping[str, Any], identity: Mapping[str, Any], parts: Mapping[str, str] = PARTS
) -> Iterator[str]:
    """The parts in which a model is not the recorded one, in words."""
    for part, said in parts.items():
        if recorded.get(part) != identity[part]:
            yield said


def read_checked(directory: Path) -> Manifest:
    """The manifest of an input, once its files are known to be those that were recorded.

    Raises:
        LoramError: A file is missing or another one; see :data:`_HASHED_BYTES`.
    """
    manifest = Manifest.read(directory)
    hashed_bytes = 0
    for name, record in sorted(manifest.outputs.items(), key=lambda item: item[1]["bytes"]):
        file = directory / name
        if Path(name).name in REMARKS:
            continue
        hashed_bytes += record["bytes"]
        try:
            same = file.stat().st_size == record["bytes"]
        except OSError:
            same = False
        if same and hashed_bytes <= _HASHED_BYTES:
            same = file_digest(file) == f"sha256:{record['sha256']}"
        if not same:
            raise LoramError(
                f"{file}: is missing, or not the file that '{manifest.stage}' wrote",
                f"restore it, or make {directory} once more with --force; 'loram verify' tells all",
            )
    return manifest


def whole_files(directory: Path) -> dict[str, str]:
    """SHA-256 by name of a base's files, for ``verify --full``.

    Empty above 1 GiB: hashing that would take a pruning's own time.
    """
    kinds = (".safetensors", ".json", ".model", ".txt", ".jinja")
    files = [f for f in sorted(directory.iterdir()) if f.suffix in kinds and f.is_file()]
    if sum(file.stat().st_size for file in files) > _RECORDED_BYTES:
        return {}
    return {f.name: digest for f, digest in zip(files, file_digests(files), strict=True)}


def model_record(model: Model) -> dict[str, Any]:
    """The manifest's record of a model that serves as input: its path and digests."""
    return {"path": str(model.directory), **model.identity.to_mapping()}


@dataclass(frozen=True)
class Source:
    """The model to train on, and where it comes from.

    Attributes:
        record: Its own path and digests.
        base: Those of the base that it descends from.
        keep: What was kept of the base in it.
        sparsity: Of a model whose single weights were zeroed.
    """

    record: Mapping[str, Any]
    base: Mapping[str, Any]
    keep: Mapping[str, Any] = field(default_factory=dict)
    sparsity: Mapping[str, Any] = field(default_factory=dict)


def describe_source(model: Model) -> Source:
    """Where the model to train on comes from.

    Nothing has to guard the zeros of a sparse model here: its weights are frozen, and LoRA's
    product is added beside them, not inside the mask.

    Raises:
        LoramError: The directory is another stage's output.
    """
    record = model_record(model)
    if not (model.directory / MANIFEST_NAME).is_file():
        return Source(record, record)
    manifest = read_checked(model.directory)
    if manifest.stage not in ("prune", "align", "merge"):
        raise LoramError(
            f"{model.directory}: was made by '{manifest.stage}', expected a model directory"
        )
    base = record if manifest.stage == "merge" else dict(manifest.base)
    keyed = {**record, "key": manifest.key}
    return Source(keyed, base, dict(manifest.keep), dict(manifest.sparsity))


def check_base(manifest: Manifest, model: Model, output: Path) -> dict[str, Any]:
    """Compare an output with its record, and the base at hand with the one that it descends from.

    Returns:
        The base's record, for the next manifest.

    Raises:
        LoramError: A file of the output is another one, or the base's widths, weights or
            tokenizer are.
    """
    read_checked(output)
    record = model_record(model)
    for said in differences(manifest.base, record):
        raise LoramError(
            f"{output}: was made from another base: {said} differ from {model.directory}",
            f"pass the base that was pruned, formerly at {manifest.base.get('path')}",
        )
    files = manifest.base.get("files")
    return {**record, "files": files} if files else record


def adapter_record(directory: Path, manifest: Manifest) -> dict[str, str]:
    """The manifest's record of an adapter that serves as input."""
    return {
        "path": str(directory),
        "key": manifest.key,
        "weights": file_digest(directory / WEIGHTS_NAME),
    }


def fits_base(manifest: Manifest) -> bool:
    """Whether an adapter was trained on the base itself, and so needs no recovery."""
    source = manifest.inputs.get("source", {})
    return manifest.stage == "train" and source.get("path") == manifest.base.get("path")


def adapter_values(adapter: Path) -> dict[str, int | bool]:
    """Rank, alpha and kind of scaling of an adapter, under their names in the spec.

    Raises:
        LoramError: It is no plain LoRA adapter, or its alpha is no whole number.
    """
    config = read_adapter_config(adapter)
    known: dict[str, Any] = {"rank": config.get("r"), "alpha": config.get("lora_alpha")}
    for name, value in known.items():
        if type(value) is not int:
            raise LoramError(
                f"{adapter / CONFIG_NAME}: {name} is {value!r}, expected a whole number"
            )
    return {**known, "rslora": bool(config.get("use_rslora"))}


def adapter_targets(adapter: Path) -> tuple[str, ...]:
    """Names of the modules that have factors in an adapter."""
    return tuple(sorted({plain_target(name) for name in read_shapes(adapter)}))


def check_start(
    adapter: Path, source: Source, values: Mapping[str, Any], targets: tuple[str, ...]
) -> dict[str, str]:
    """Refuse to resume from an adapter of another model, other widths or another shape.

    Returns:
        The adapter's record for the manifest.

    Raises:
        LoramError: It was trained on another model, or is another stage's output.
        UsageError: Its rank, alpha or targets are not those asked for.
    """
    manifest = read_checked(adapter)
    if manifest.stage not in ("train", "recover"):
        raise LoramError(
            f"{adapter}: was made by '{manifest.stage}', expected an output of 'train' or 'recover'"
        )
    recovered = manifest.stage == "recover"
    trained_on = manifest.base if recovered else manifest.inputs.get("source", {})
    here = source.record["path"]
    for said in differences(trained_on, source.record):
        raise LoramError(
            f"{adapter}: was trained on another model: {said} differ from {here}",
            f"pass --in {trained_on.get('path')}, or train that adapter anew",
        )
    # A recovered adapter fits the base, and what was pruned may learn there as well.
    if not recovered and manifest.keep != source.keep:
        raise LoramError(f"{adapter}: its keep indices are not those of {here}")
    for name, value in adapter_values(adapter).items():
        if values[name] != value:
            raise UsageError(
                f"--{name} {values[name]} is not that of {adapter} ({value})",
                f"an adapter keeps its {name}: pass {value}, or leave it out",
            )
    if set(targets) != set(adapter_targets(adapter)):
        raise UsageError(
            f"--targets are not those of {adapter} ({', '.join(adapter_targets(adapter))})",
            "an adapter keeps its modules: leave --targets out",
        )
    return adapter_record(adapter, manifest)


def trained_layout(directory: Path | None) -> Layout | None:
    """The layout of the data that an adapter or a merged model learnt from, by its manifest."""
    if directory is None or not (directory / MANIFEST_NAME).is_file():
        return None
    results = Manifest.read(directory).results
    layout = results.get("layout") or (results.get("training") or {}).get("layout")
    return layout if layout in get_args(Layout) else None


def warn_of_oddities(model: Model, reporter: Reporter) -> None:
    """Tell what is odd about a base; about what loram made of one, it was told when it was made."""
    if not (model.directory / MANIFEST_NAME).is_file():
        for line in oddities(model):
            reporter.warn(line)


def warn_of_other_template(
    trained: Mapping[str, Any], base: Mapping[str, Any], reporter: Reporter
) -> None:
    """Warn when the model that was trained and the base render conversations differently.

    It is no error: a base without a template may well be given one before training. But whoever
    serves the recovered adapter must then use that template, and not the base's.
    """
    mine, theirs = trained.get("chat_template"), base.get("chat_template")
    if mine is None or theirs is None or mine == theirs:
        return
    reporter.warn(
        f"the chat template of {trained.get('path')} is not that of the base {base.get('path')}: "
        "serve the adapter with the template that it was trained with"
    )
