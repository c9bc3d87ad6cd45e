"""Memory report: what base, pruned and quantized models cost, from configs alone."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loram_cli.errors import LoramError, UsageError
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.stages.sparsify import count_zeros

if TYPE_CHECKING:
    from loram_cli.arch.spec import Family

Strategy = Literal["rand", "stru", "semi", "unst"]

# The ratios of Tables 4 and 5; 2:4 knows no other.
_DEFAULT_RATIOS: dict[str, tuple[float, ...]] = {
    "rand": (0.65, 0.75, 0.85, 0.95),
    "stru": (0.65, 0.75, 0.85, 0.95),
    "semi": (0.5,),
    "unst": (0.55,),
}


@dataclass(frozen=True, kw_only=True)
class MemoryReportSpec:
    """What to report on.

    Attributes:
        model: The base's directory, or its ``config.json``.
        preset: Name of an embedded config, in place of ``model``.
        pruned: A pruned or aligned directory of that base, reported as it is.
        ratios: Ratios to work out. Empty: those of the paper, or none where ``pruned`` is given.
        strategy: ``rand`` and ``stru`` narrow the layers, ``semi`` and ``unst`` zero weights.
        keep_first: Layers at the input side that stay whole (``rand`` and ``stru`` alone).
        keep_last: Layers at the output side that stay whole (``rand`` and ``stru`` alone).
        rank: LoRA rank.
        targets: LoRA target modules; empty for every decoder linear and an untied head.
    """

    model: Path | None = None
    preset: str | None = None
    pruned: Path | None = None
    ratios: tuple[float, ...] = ()
    strategy: Strategy = "stru"
    keep_first: int = 4
    keep_last: int = 2
    rank: int = 8
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.model is None) == (self.preset is None):
            raise UsageError(
                "memory-report needs a model directory or a preset, and not both",
                "pass --model DIR, or --preset llama2-70b",
            )
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise UsageError(f"--ratio {ratio} is outside (0, 1)")
            if self.strategy == "semi" and ratio != 0.5:
                raise UsageError(
                    f"--strategy semi with --ratio {ratio}: 2:4 zeroes two of every four weights",
                    "pass --ratio 0.5, or none",
                )
        for name in ("keep_first", "keep_last"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} cannot be negative")
        if self.rank < 1:
            raise UsageError(f"--rank {self.rank} is too low")

    @property
    def effective_ratios(self) -> tuple[float, ...]:
        """The ratios to work out."""
        if self.ratios or self.pruned is not None:
            return self.ratios
        return _DEFAULT_RATIOS[self.strategy]


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One model at one precision.

    Attributes:
        name: ``base``, ``stru 0.65``, or the pruned directory's name.
        precision: Of the frozen weights.
        ratio: The pruning ratio asked for; None for the base and for a directory.
        params: Parameters; for ``semi`` and ``unst`` those that are not zero.
        stored_params: Parameters in memory; zeros of ``semi`` and ``unst`` take their place too.
        removed_share: Share of all the base's parameters that ``params`` lacks.
        paper_params: ``params`` as Tables 4 to 6 count them: under NF4 a quarter.
        paper_reduction: The base's parameters over ``paper_params``.
        paper_weight_bytes: ``paper_params`` at 2 bytes.
        weight_bytes: What the weights take in memory.
        weight_reduction: The base's bf16 bytes over ``weight_bytes``.
        lora_params: Trainable parameters.
        adapter_bytes: LoRA factors in fp32.
        gradient_bytes: Their gradients.
        optimizer_bytes: AdamW's moments.
        training_state_bytes: The last three together.
        training_bytes_without_activations: Weights and training state: a lower bound.
    """

    name: str
    precision: Literal["bf16", "nf4"]
    ratio: float | None
    params: int
    stored_params: int
    removed_share: float
    paper_params: int
    paper_reduction: float
    paper_weight_bytes: int
    weight_bytes: int
    weight_reduction: float
    lora_params: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    training_state_bytes: int
    training_bytes_without_activations: int


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The report.

    Attributes:
        source: The base: a path, or ``preset NAME``.
        family: Its family.
        rank: LoRA rank.
        targets: LoRA target modules.
        rows: The base first, then every pruned model; each in bf16, then NF4.
        notes: What the figures contain and what not.
    """

    source: str
    family: str
    rank: int
    targets: tuple[str, ...]
    rows: tuple[MemoryRow, ...]
    notes: tuple[str, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Plain form for ``--json``."""
        plain = asdict(self)
        return {
            **plain,
            "targets": list(self.targets),
            "rows": list(plain["rows"]),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Model:
    """A model to put on rows: its config, and the zeros in it, by share or as counted."""

    name: str
    config: dict[str, Any]
    ratio: float | None = None
    sparsity: float = 0.0
    zeros: int = 0


def run(spec: MemoryReportSpec, reporter: Reporter) -> MemoryReport:
    """Work the report out. Weights are read only to count the zeros of a sparse directory.

    Raises:
        LoramError: A config is absent or unsound, or ``pruned`` is not of this base.
        UsageError: Unknown preset or LoRA target, or a ratio or keep flags that do not fit.
    """
    from loram_cli.arch.targets import lora_targets
    from loram_cli.memory.notes import report_notes

    source = f"preset {spec.preset}" if spec.preset is not None else str(spec.model)
    config = _base_config(spec)
    family = _checked_family(config, source)
    base = _Model("base", config)
    ratios = spec.effective_ratios
    if config.get("per_layer_config"):
        if spec.ratios:
            raise UsageError(f"{source}: is pruned already", "pass the original base as --model")
        ratios = ()
    models = [base, *_narrowed_or_sparse(spec, family, config, ratios)]
    if spec.pruned is not None:
        models.append(_pruned_directory(spec.pruned, family, config, source, reporter))
    reporter.note(f"read {source}" + (f" and {spec.pruned}" if spec.pruned is not None else ""))
    return MemoryReport(
        source=source,
        family=family.family,
        rank=spec.rank,
        targets=lora_targets(
            family,
            tied_embeddings=family.geometry(config).tied_embeddings,
            targets=spec.targets or None,
        ),
        rows=tuple(row for model in models for row in _rows(spec, family, base, model)),
        notes=tuple(
            report_notes(
                family, config, spec.strategy, ratios, counted=any(m.zeros for m in models)
            )
        ),
    )


def _base_config(spec: MemoryReportSpec) -> dict[str, Any]:
    if spec.preset is not None:
        from loram_cli.memory.presets import load_preset

        return load_preset(spec.preset)
    assert spec.model is not None
    return _read_config(spec.model)


def _read_config(model: Path) -> dict[str, Any]:
    # Imported here alone: the checkpoint floor brings torch, which a preset can do without.
    from loram_cli.checkpoint.index import read_config, read_json

    return read_json(model) if model.is_file() else read_config(model)


def _checked_family(config: dict[str, Any], where: str) -> "Family":
    from loram_cli.arch.registry import family_for

    family = family_for(config, where)
    try:
        shapes = family.tensor_shapes(config)
    except KeyError as error:
        raise LoramError(f"{where}: config.json has no {error.args[0]}") from error
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise LoramError(f"{where}: config.json is not sound ({error})") from error
    for name, shape in shapes.items():
        if not all(type(width) is int and width > 0 for width in shape):
            raise LoramError(
                f"{where}: config.json gives tensor {name} the impossible shape {list(shape)}"
            )
    return family


def _narrowed_or_sparse(
    spec: MemoryReportSpec, family: "Family", config: dict[str, Any], ratios: tuple[float, ...]
) -> Iterator[_Model]:
    from loram_cli.pruning.plan import layer_widths, pruned_config

    geometry = family.geometry(config)
    for ratio in ratios:
        name = f"{spec.strategy} {ratio:g}"
        if spec.strategy in ("semi", "unst"):
            yield _Model(name, config, ratio, sparsity=ratio)
        else:
            widths = layer_widths(geometry, ratio, spec.keep_first, spec.keep_last)
            yield _Model(name, pruned_config(config, geometry, widths), ratio)


def _pruned_directory(
    pruned: Path, family: "Family", base: dict[str, Any], source: str, reporter: Reporter
) -> _Model:
    config = _read_config(pruned)
    mine = _checked_family(config, str(pruned)).geometry(config)
    theirs = family.geometry(base)
    for what, small, full in (
        ("model_type", config["model_type"], base["model_type"]),
        ("hidden_size", mine.hidden_size, theirs.hidden_size),
        ("vocab_size", mine.vocab_size, theirs.vocab_size),
        ("num_hidden_layers", len(mine.layers), len(theirs.layers)),
    ):
        if small != full:
            raise LoramError(
                f"{pruned}: was not pruned from {source}: its {what} is {small}, the base's {full}",
                "pass the base that was pruned as --model",
            )
    zeros = 0
    if (pruned / MANIFEST_NAME).is_file() and Manifest.read(pruned).sparsity:
        zeros = count_zeros(pruned, reporter)
    return _Model(pruned.resolve().name, config, zeros=zeros)


def _rows(
    spec: MemoryReportSpec, family: "Family", base: _Model, model: _Model
) -> Iterator[MemoryRow]:
    from loram_cli.memory import account

    base_params = account.count_params(family, base.config).total
    stored_params = account.count_params(family, model.config).total
    params = account.count_nonzero_params(family, model.config, model.sparsity).total - model.zeros
    lora_params = account.count_lora_params(family, model.config, spec.rank, spec.targets)
    state = account.training_state(lora_params)
    for precision, paper_params, weight_bytes in (
        ("bf16", params, stored_params * account.BF16_BYTES),
        (
            "nf4",
            account.paper_nf4_params(params),
            account.nf4_weight_bytes(family, model.config),
        ),
    ):
        yield MemoryRow(
            name=model.name,
            precision=precision,
            ratio=model.ratio,
            params=params,
            stored_params=stored_params,
            removed_share=account.removed_share(base_params, params),
            paper_params=paper_params,
            paper_reduction=account.reduction(base_params, paper_params),
            paper_weight_bytes=paper_params * account.BF16_BYTES,
            weight_bytes=weight_bytes,
            weight_reduction=base_params * account.BF16_BYTES / weight_bytes,
            lora_params=lora_params,
            adapter_bytes=state.adapter_bytes,
            gradient_bytes=state.gradient_bytes,
            optimizer_bytes=state.optimizer_bytes,
            training_state_bytes=state.total_bytes,
            training_bytes_without_activations=weight_bytes + state.total_bytes,
        )
