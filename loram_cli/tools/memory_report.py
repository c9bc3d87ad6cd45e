"""Memory report: what base, pruned and quantized models cost, from only their configs."""

import heapq
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from loram_cli.arch.registry import family_for
from loram_cli.arch.spec import Family
from loram_cli.arch.targets import lora_targets
from loram_cli.checkpoint.index import (
    INDEX_NAME,
    SINGLE_NAME,
    checked_config,
    read_config,
    read_json,
)
from loram_cli.checkpoint.low_bit import BITS, CONFIG_KEY, GROUP_SIZE, LowBit
from loram_cli.checkpoint.model import Model
from loram_cli.errors import LoramError, UsageError
from loram_cli.memory.notes import report_notes
from loram_cli.memory.picture import Bar
from loram_cli.memory.presets import load_preset
from loram_cli.memory.setup import TrainingSetup, usual_attention
from loram_cli.memory.training import CARDS_GIB, LARGEST_MICRO_BATCH
from loram_cli.pruning.depth import shorter_config, without_last
from loram_cli.pruning.experts import without_experts
from loram_cli.pruning.lowrank import low_rank_config
from loram_cli.pruning.plan import layer_widths, pruned_config
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.tools.fit_ways import CardAnswer, Question, Way, fitting_ways
from loram_cli.tools.memory_rows import (
    BASE_NAME,
    FitAnswer,
    MemoryRow,
    ModelRow,
    fit_answers,
    model_rows,
)
from loram_cli.tools.specs import MemoryReportSpec
from loram_cli.tools.stream_rows import Speeds, StreamRow, stream_rows
from loram_cli.units import GIB


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The report.

    Attributes:
        source: The base: a path, or ``preset NAME``.
        family: Its family.
        rank: LoRA rank.
        targets: LoRA target modules.
        setup: How the models are trained: micro-batch, length, gradient checkpointing and so on.
        rows: The base first, then every pruned model; each in bf16, then NF4.
        fit_bytes: The memory asked about, or None.
        fits: The smallest ratios that fit it at these settings.
        ways: All ways to train that fit it, fastest first.
        cards: The same of each common card, where they were asked for.
        streams: The base layer by layer, at several batches; each in bf16, then NF4.
        speeds: That the times of ``ways`` and ``streams`` follow from.
        notes: What the figures contain and what not.
    """

    source: str
    family: str
    rank: int
    targets: tuple[str, ...]
    setup: TrainingSetup
    rows: tuple[MemoryRow, ...]
    fit_bytes: int | None
    fits: tuple[FitAnswer, ...]
    ways: tuple[Way, ...]
    cards: tuple[CardAnswer, ...]
    streams: tuple[StreamRow, ...]
    speeds: Speeds
    notes: tuple[str, ...]

    @property
    def settings(self) -> str:
        """The setup in words."""
        setup = self.setup
        words = [f"micro-batch {setup.micro_batch}"]
        if setup.longest:
            real = setup.micro_batch * setup.longest[0]
            words.append(f"{setup.tokens:,} tokens a pass at most ({real:,} padded)")
        else:
            words.append(f"{setup.length} tokens")
        words += [f"{setup.attention} attention", f"{setup.cross_entropy} cross-entropy"]
        if setup.gradient_checkpointing:
            words.append("gradient checkpointing")
        if setup.optimizer != "adamw":
            words.append(setup.optimizer)
        if setup.processes > 1:
            words.append(f"each of {setup.processes} processes (FSDP)")
        return ", ".join(words)

    def bars(self) -> list[Bar]:
        """The rows as bars, part by part."""
        return [*(row.bar() for row in self.rows), *(row.bar() for row in self.streams)]

    def to_mapping(self) -> dict[str, Any]:
        """Plain form for ``--json``."""
        plain = asdict(self)
        return {
            **plain,
            "targets": list(self.targets),
            "setup": {
                **{name: v for name, v in plain["setup"].items() if name != "longest"},
                "targets": list(self.targets),
                "tokens_per_pass": self.setup.tokens,
            },
            "rows": list(plain["rows"]),
            "fits": list(plain["fits"]),
            "ways": [way.to_mapping() for way in self.ways],
            "cards": [card.to_mapping() for card in self.cards],
            "streams": list(plain["streams"]),
            "notes": list(self.notes),
        }


def run(spec: MemoryReportSpec, reporter: Reporter) -> MemoryReport:
    """Work the report out. Weights are read only to count the zeros of a sparse directory.

    Raises:
        LoramError: A config is absent or unsound, or ``pruned`` is not of this base.
        UsageError: Unknown preset or LoRA target, or a ratio or keep flags that do not fit.
    """
    source = f"preset {spec.preset}" if spec.preset is not None else str(spec.model)
    config = _base_config(spec)
    family = _checked_family(config, source)
    base = ModelRow(BASE_NAME, config, head_params=_head_params(spec.model))
    setup = _setup(spec, config, family, reporter)
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
        setup=setup,
        rows=tuple(
            row
            for model in models
            for row in model_rows(family, base, model, setup, spec.fit_bytes)
        ),
        fit_bytes=spec.fit_bytes,
        fits=_fits(spec, family, config, setup),
        ways=_ways(spec, family, base, setup, spec.fit_bytes),
        cards=tuple(
            CardAnswer(card, _ways(spec, family, base, setup, card * GIB))
            for card in (CARDS_GIB if spec.cards else ())
        ),
        streams=_streams(spec, family, base, setup),
        speeds=_speeds(spec),
        notes=tuple(
            report_notes(
                family,
                config,
                spec.strategy,
                ratios,
                counted=any(m.zeros for m in models),
                processes=spec.processes,
            )
        ),
    )


def _setup(
    spec: MemoryReportSpec, config: dict[str, Any], family: Family, reporter: Reporter
) -> TrainingSetup:
    names = {field.name for field in fields(TrainingSetup)} & {field.name for field in fields(spec)}
    values = {name: getattr(spec, name) for name in names}
    if spec.attention == "auto":
        values["attention"] = usual_attention(config)
    if spec.data is not None:
        from loram_cli.training.data.packing import usable_packing

        values["packing"] = usable_packing(spec.packing, family, spec.attention)
        values["longest"] = _longest(spec, reporter)
        values["length"] = values["longest"][0]
    return TrainingSetup(**values)


def _longest(spec: MemoryReportSpec, reporter: Reporter) -> tuple[int, ...]:
    """Tokens of the longest examples, in falling order."""
    from loram_cli.modeling.load import load_tokenizer
    from loram_cli.training.data.documents import load_instructions
    from loram_cli.training.data.tokens import tokenize_examples

    assert spec.data is not None and spec.model is not None
    tokenizer = load_tokenizer(spec.model)
    examples = load_instructions(spec.data, tokenizer=tokenizer, reporter=reporter)
    rows = tokenize_examples(examples, tokenizer, spec.length, reporter)
    lengths = (len(row.input_ids) for row in rows)
    return tuple(heapq.nlargest(LARGEST_MICRO_BATCH, lengths))


def _fits(
    spec: MemoryReportSpec, family: Family, config: dict[str, Any], setup: TrainingSetup
) -> tuple[FitAnswer, ...]:
    # Shapes stay with lowbit, zeros of semi and unst take their place in memory, and a pruned model
    # is not pruned again.
    if spec.fit_bytes is None or spec.chosen_strategy.keep is None:
        return ()
    if config.get("per_layer_config"):
        return ()
    keeps = (spec.keep_first, spec.keep_last)
    return tuple(fit_answers(family, config, setup, keeps, spec.multiple_of, spec.fit_bytes))


def _ways(
    spec: MemoryReportSpec,
    family: Family,
    base: ModelRow,
    setup: TrainingSetup,
    fit_bytes: int | None,
) -> tuple[Way, ...]:
    if fit_bytes is None or setup.processes > 1 or base.config.get("per_layer_config"):
        return ()
    asked = Question(
        family=family,
        config=base.config,
        setup=setup,
        batch=max(spec.batches),
        keeps=(spec.keep_first, spec.keep_last),
        multiple_of=spec.multiple_of,
        fit_bytes=fit_bytes,
        speeds=_speeds(spec),
        head_params=base.head_params,
    )
    return tuple(fitting_ways(asked))


def _streams(
    spec: MemoryReportSpec, family: Family, base: ModelRow, setup: TrainingSetup
) -> tuple[StreamRow, ...]:
    if setup.processes > 1:  # it runs in one
        return ()
    batches = tuple(dict.fromkeys(spec.batches))
    rows = stream_rows(family, base.config, setup, batches, _speeds(spec), base.head_params)
    return tuple(rows)


def _speeds(spec: MemoryReportSpec) -> Speeds:
    return Speeds(
        bus=spec.bus * 1e9,
        disk=spec.disk * 1e9,
        flops=spec.tflops * 1e12,
        start_seconds=spec.layer_ms / 1e3,
    )


def _base_config(spec: MemoryReportSpec) -> dict[str, Any]:
    if spec.preset is not None:
        return load_preset(spec.preset)
    assert spec.model is not None
    return _read_config(spec.model)


def _head_params(model: Path | None) -> int:
    """Of a head that a directory's weights hold beside a tied embedding; 0 without weights."""
    if model is None or not any((model / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)):
        return 0
    return Model.open(model).stored_head_params


def _read_config(model: Path) -> dict[str, Any]:
    if model.is_file():
        return checked_config(read_json(model), str(model))
    return read_config(model)


def _checked_family(config: dict[str, Any], where: str) -> Family:
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
    spec: MemoryReportSpec, family: Family, config: dict[str, Any], ratios: tuple[float, ...]
) -> Iterator[ModelRow]:
    geometry, head_params = family.geometry(config), _head_params(spec.model)
    for ratio in spec.experts_ratios:
        after = without_experts(geometry.layers, ratio, family.family)
        small = pruned_config(config, geometry, after)
        yield ModelRow(f"experts {ratio:g}", small, ratio, head_params=head_params)
    if spec.chosen_strategy.rounds and spec.pruned is None:
        for bits in reversed(BITS):
            rounded = {**config, CONFIG_KEY: LowBit(bits, GROUP_SIZE).to_mapping()}
            yield ModelRow("lowbit", rounded, head_params=head_params)
    for ratio in ratios:
        name = f"{spec.strategy} {ratio:g}"
        if spec.chosen_strategy.zeroes_weights:
            yield ModelRow(name, config, ratio, sparsity=ratio, head_params=head_params)
        elif spec.chosen_strategy.factors_linears:
            small = low_rank_config(family, config, ratio, spec.keep_first, spec.keep_last)
            yield ModelRow(name, small, ratio, head_params=head_params)
        elif spec.chosen_strategy.drops_layers:
            # Layers of a kind are alike, and memory does not ask which of them go.
            kept = without_last(len(geometry.layers), ratio, spec.keep_first, spec.keep_last)
            small = shorter_config(family, config, kept)
            yield ModelRow(name, small, ratio, head_params=head_params)
        else:
            widths = layer_widths(
                geometry, ratio, spec.keep_first, spec.keep_last, spec.multiple_of
            )
            small = pruned_config(config, geometry, widths)
            yield ModelRow(name, small, ratio, head_params=head_params)


def _pruned_directory(
    pruned: Path, family: Family, base: dict[str, Any], source: str, reporter: Reporter
) -> ModelRow:
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
        from loram_cli.stages.prune.sparse import count_zeros

        zeros = count_zeros(Model.open(pruned), reporter)
    return ModelRow(pruned.resolve().name, config, zeros=zeros, head_params=_head_params(pruned))
