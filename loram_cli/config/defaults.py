"""From a run directory and a few values to a stage's spec: what the values leave open."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_cli.checkpoint.sources import resolve_model
from loram_cli.config.recipe import demo_recipe
from loram_cli.config.rows import FULL_LORA, run_rows
from loram_cli.errors import LoramError, UsageError
from loram_cli.export.specs import ExportSpec
from loram_cli.pruning.strategies import STRATEGIES
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.runs.processes import process_count
from loram_cli.runs.rundir import DEMO_MODEL, RunDirectory, demo_base
from loram_cli.schema import spec_from_mapping
from loram_cli.serving.spec import ChatSpec, ServeSpec
from loram_cli.stages.align.methods.table import METHODS
from loram_cli.stages.align.spec import AlignSpec
from loram_cli.stages.core.lineage import adapter_values
from loram_cli.stages.evaluate.spec import EvalSpec, GenerateSpec
from loram_cli.stages.prune.spec import AMOUNTS, PruneSpec
from loram_cli.stages.recover.spec import MergeSpec, RecoverSpec
from loram_cli.stages.train.objectives.table import OBJECTIVES, beyond_sft
from loram_cli.stages.train.spec import PolishSpec, TrainSpec

Values = Mapping[str, Any]
# Settings of an adapter's training that hold for its polishing as well.
POLISHED_ALIKE = (
    "data", "eval_data", "eval_examples", "exhausted", "max_length", "loss_on", "train_on", "batch",
    "micro_batch", "learning_rate", "dropout", "quantize", "attention", "optimizer", "precision",
    "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """The run directory that a command works in, and the base model that it is about."""

    run: RunDirectory
    model: str


def model_dir(model: str, *, config_only: bool = False, tokenizer_only: bool = False) -> Path:
    """The local directory of the demo base, a path or a hub id.

    Raises:
        LoramError: It is not there.
    """
    if model == DEMO_MODEL:
        return demo_base()
    return resolve_model(model, config_only=config_only, tokenizer_only=tokenizer_only)


def base_of(directory: Path) -> str | None:
    """The base that a directory descends from, by its manifest; a plain model is its own."""
    path = directory
    if (directory / MANIFEST_NAME).is_file():
        recorded = Manifest.read(directory).base.get("path")
        path = Path(str(recorded)) if recorded else directory
    elif not (directory / "config.json").is_file():
        return None
    return DEMO_MODEL if path.resolve() == demo_base().resolve() else str(path)


def stage_defaults(place: Place, stage: str, values: Values) -> dict[str, Any]:
    """What the demo base's own recipe sets for a stage; empty for any other model.

    Polishing continues with the adapter's own settings, on any model.
    """
    if stage == "polish":
        return _as_trained(values.get("from_adapter") or place.run.output("recover"))
    if place.model != DEMO_MODEL:
        return {}
    defaults = demo_recipe().defaults(stage, values)
    source = Path(values.get("source") or place.run.output("prune"))
    if stage == "align" and not _can_run(defaults.get("method", ()), source):
        defaults.pop("method")
    if process_count() > 1 and "batch" in defaults and "batch" not in values:
        # A batch is shared out among the processes.
        defaults["micro_batch"] = max(1, int(defaults["batch"]) // process_count())
    if stage == "prune":
        strategy = STRATEGIES.get(str(values.get("strategy")))
        drops_nothing = strategy is not None and strategy.ratio is None
        if drops_nothing or any(name in values for name in AMOUNTS):
            defaults.pop("ratio", None)
    if stage == "train" and "epochs" in values:
        defaults.pop("steps", None)
    return defaults


def _can_run(methods: Any, source: Path) -> bool:
    """Whether default methods work here: in so many processes, and on a model with zeros."""
    chosen = [METHODS[name] for name in methods]
    if process_count() > 1 and not all(method.several_processes for method in chosen):
        return False
    is_sparse = (source / MANIFEST_NAME).is_file() and bool(Manifest.read(source).sparsity)
    return not (is_sparse and any(method.fills_zeros for method in chosen))


def prune_spec(place: Place, values: Values) -> PruneSpec:
    """The spec of ``prune``; the base and the place come from the run unless given.

    Raises:
        UsageError: Layers are to be kept whole by a strategy that prunes all of them.
    """
    out = place.run.output("prune")
    if values.get("source") is not None:
        out = place.run.path / "lowbit"
    filled = {**stage_defaults(place, "prune", values), "out": out, **values}
    spec = spec_from_mapping(PruneSpec, {"model": model_dir(place.model), **filled}, "prune")
    for name in ("keep_first", "keep_last"):
        if spec.chosen_strategy.keep is None and name in values:
            raise UsageError(
                f"--{name.replace('_', '-')} does not go with --strategy {spec.strategy}",
                f"it {'rounds' if spec.rounds_weights else 'zeroes'} weights in every layer; rand "
                "and stru keep layers whole",
            )
    return spec


def align_spec(place: Place, values: Values) -> AlignSpec:
    """The spec of ``align``; it reads what ``prune`` wrote.

    Raises:
        UsageError: No text is given.
        LoramError: Nothing was pruned.
    """
    values = {**values, "source": values.get("source") or place.run.require("prune")}
    out = place.run.output("align")
    filled = {**stage_defaults(place, "align", values), "out": out, **values}
    _require_data(filled, "align trains on plain text", "pass --data FILE_OR_FOLDER")
    return spec_from_mapping(AlignSpec, filled, "align")


def train_spec(place: Place, values: Values) -> TrainSpec:
    """The spec of ``train``; it reads what ``align`` wrote, else what ``prune`` wrote.

    Objectives beyond supervised tuning have outputs of their own, and resume from the supervised
    adapter where the run has one.

    Raises:
        UsageError: No data is given.
    """
    run = place.run
    name = values.get("objective", "sft")
    objective = OBJECTIVES.get(name)
    follows_sft = objective is not None and objective.follows_sft
    out = run.path / f"{run.output('train').name}-{name}" if follows_sft else run.output("train")
    own = objective.defaults(values) if objective else {}
    filled = {**own, **stage_defaults(place, "train", values), "out": out, **values}
    if "source" not in filled:
        filled["source"] = trainable(run)
        if follows_sft and run.is_done("train"):
            filled.setdefault("from_adapter", run.output("train"))
    if filled.get("from_adapter") is not None:
        filled = {**adapter_values(Path(filled["from_adapter"])), **filled}
    learns_from = objective.learns_from if objective else "data"
    _require_data(filled, f"train learns from {learns_from}", "pass --data FILE.jsonl")
    return spec_from_mapping(TrainSpec, filled, "train")


def full_lora_spec(place: Place, values: Values) -> TrainSpec:
    """The same training on the base itself, to compare with."""
    places = {"source": model_dir(place.model), "out": place.run.path / FULL_LORA}
    return train_spec(place, {**places, **values})


def polish_spec(place: Place, values: Values) -> PolishSpec:
    """The spec of ``polish``: continues the output of ``recover`` on the base itself.

    Raises:
        LoramError: Nothing was recovered.
        UsageError: No data is given, and what the adapter learnt from is not known.
    """
    filled = {
        **stage_defaults(place, "polish", values),
        "out": place.run.output("polish"),
        **values,
    }
    if "epochs" in values:
        filled.setdefault("steps", None)  # in place of its default
    if "from_adapter" not in filled:
        filled["from_adapter"] = place.run.require("recover")
    if "source" not in filled:
        filled["source"] = model_dir(place.model)
    filled = {**adapter_values(Path(filled["from_adapter"])), **filled}
    _require_data(filled, "the adapter has no record of its data", "pass --data FILE.jsonl")
    return spec_from_mapping(PolishSpec, filled, "polish")


def recover_spec(place: Place, values: Values) -> RecoverSpec:
    """The spec of ``recover``; it reads what ``train`` wrote.

    Raises:
        LoramError: Nothing was trained.
    """
    filled = {"model": model_dir(place.model), "out": place.run.output("recover"), **values}
    if "adapter" not in filled:
        filled["adapter"] = trained(place.run)
    return spec_from_mapping(RecoverSpec, filled, "recover")


def merge_spec(place: Place, recover: RecoverSpec) -> MergeSpec | None:
    """The spec of the merge after a recovery; None where none is asked for."""
    if not recover.merge:
        return None
    return MergeSpec(
        adapter=recover.out,
        model=recover.model,
        out=recover.merge_out or place.run.output("merge"),
        max_shard_bytes=recover.max_shard_bytes,
        force=recover.force,
    )


def export_spec(place: Place, values: Values) -> ExportSpec:
    """The spec of ``export``; it reads what ``polish`` wrote, else what ``recover`` wrote.

    Raises:
        LoramError: Nothing was recovered.
    """
    name = "recovered.gguf" if values.get("merge_into") is None else "merged.gguf"
    model = model_dir(place.model, config_only=True)
    filled = {"model": model, "out": place.run.path / name, **values}
    if "adapter" not in filled:
        filled["adapter"] = place.run.require(
            "polish" if place.run.is_done("polish") else "recover"
        )
    return spec_from_mapping(ExportSpec, filled, "export")


def eval_spec(place: Place, values: Values) -> EvalSpec:
    """The spec of ``eval``; its rows are whatever the run has made, unless given."""
    base = model_dir(place.model)
    filled = {
        **stage_defaults(place, "eval", values),
        "model": base,
        "out": place.run.output("eval"),
        "rows": run_rows(place.run, base),
        "demo_data": place.model == DEMO_MODEL and not values.get("task_data"),
        "replace": "out" not in values,
        **values,
    }
    return spec_from_mapping(EvalSpec, filled, "eval")


def generate_spec(place: Place, values: Values) -> GenerateSpec:
    """The spec of ``generate``; its rows must be given."""
    return spec_from_mapping(GenerateSpec, {"model": model_dir(place.model), **values}, "generate")


def chat_spec(place: Place, values: Values) -> ChatSpec:
    """The spec of ``chat``; its rows must be given."""
    return spec_from_mapping(ChatSpec, {"model": model_dir(place.model), **values}, "chat")


def serve_spec(place: Place, values: Values) -> ServeSpec:
    """The spec of ``serve``; its rows must be given."""
    return spec_from_mapping(ServeSpec, {"model": model_dir(place.model), **values}, "serve")


# Every stage's way from values to its spec; ``full_lora`` is a training of the base.
FILL: dict[str, Callable[[Place, Values], Any]] = {
    "prune": prune_spec,
    "align": align_spec,
    "train": train_spec,
    "full_lora": full_lora_spec,
    "recover": recover_spec,
    "polish": polish_spec,
    "eval": eval_spec,
}


def trained(run: RunDirectory) -> Path:
    """The adapter of the run that training ended with: no other one resumes from it.

    Raises:
        LoramError: Nothing was trained.
        UsageError: Several were, and none of them resumes from the others.
    """
    first = run.output("train")
    found = [first, *(run.path / f"{first.name}-{name}" for name in beyond_sft())]
    found = [path for path in found if (path / MANIFEST_NAME).is_file()]
    if not found:
        return run.require("train")
    manifests = {path: Manifest.read(path) for path in found}
    before = {m.inputs.get("adapter", {}).get("key") for m in manifests.values()}
    last = [path for path, manifest in manifests.items() if manifest.key not in before]
    if len(last) > 1:
        raise UsageError(
            f"{run.path}: holds {' and '.join(path.name for path in last)}, and neither resumes "
            "from the other",
            f"pass one: --in {last[-1]}",
        )
    return last[0]


def trainable(run: RunDirectory) -> Path:
    """The aligned model if there is one and it descends from the pruned one, else the pruned.

    Raises:
        LoramError: Nothing was pruned, or the alignment is of an older pruning.
    """
    source = run.require("prune")
    if not run.is_done("align"):
        return source
    pruned, aligned = Manifest.read(source), Manifest.read(run.output("align"))
    if aligned.inputs["source"]["key"] != pruned.key:
        raise LoramError(
            f"{run.output('align')}: was made from an older pruning than {run.output('prune')}",
            "run 'loram align --force', or pass --in to choose",
        )
    return run.output("align")


def _as_trained(adapter: Path) -> dict[str, Any]:
    """The settings of the supervised training that an adapter descends from; empty without one."""
    directory: Path | None = adapter
    while directory is not None and (directory / MANIFEST_NAME).is_file():
        manifest = Manifest.read(directory)
        spec = manifest.spec
        if manifest.stage == "train" and spec.get("objective", "sft") == "sft":
            known = {name: spec.get(name) for name in POLISHED_ALIKE}
            return {name: value for name, value in known.items() if value is not None}
        before = Path(str(manifest.inputs.get("adapter", {}).get("path")))
        # Beside this one, if the run directory was moved.
        places = (before, directory.parent / before.name)
        directory = next((at for at in places if at.is_dir() and at != directory), None)
    return {}


def _require_data(values: Values, why: str, hint: str) -> None:
    if values.get("data") is None:
        raise UsageError(f"--data is missing: {why}", hint)
