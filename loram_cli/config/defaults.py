"""From a run directory and a few values to a stage's spec: what the values leave open."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loram_cli.config.recipe import demo_recipe
from loram_cli.errors import LoramError, UsageError
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.runs.processes import process_count
from loram_cli.runs.rundir import DEMO_MODEL, RunDirectory
from loram_cli.schema import spec_from_mapping, unknown_name
from loram_cli.stages.align.stage import AlignSpec
from loram_cli.stages.core.lineage import adapter_values
from loram_cli.stages.evaluate.generate import GenerateSpec
from loram_cli.stages.evaluate.stage import EvalSpec
from loram_cli.stages.prune.stage import PruneSpec
from loram_cli.stages.prune.widths import AMOUNTS
from loram_cli.stages.recover.merge import MergeSpec
from loram_cli.stages.recover.stage import RecoverSpec
from loram_cli.stages.train.objectives import BEYOND_SFT
from loram_cli.stages.train.stage import TrainSpec

Values = Mapping[str, Any]
FULL_LORA = "full-lora"
SPARSE = ("semi", "unst")
# What the demo base's recipe would say of the objectives that it does not use: rates at which a few
# minutes on two cores change something.
_DEMO_OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {
        "data": "demo:preferences",
        "eval_data": "demo:preferences-validation",
        "learning_rate": 5e-4,
    },
    "grpo": {"learning_rate": 5e-4, "batch": 64, "max_completion_length": 80},
}


def model_dir(model: str, *, config_only: bool = False) -> Path:
    """The local directory of the demo base, a path or a hub id.

    Args:
        model: Which.
        config_only: Fetch no weights from the hub.

    Raises:
        LoramError: It cannot be had.
    """
    if model == DEMO_MODEL:
        from importlib import resources

        return Path(str(resources.files("loram_cli.demo") / "base"))
    from loram_cli.checkpoint.sources import resolve_model

    return resolve_model(model, config_only=config_only)


def stage_defaults(model: str, stage: str, values: Values) -> dict[str, Any]:
    """What the demo base's own recipe sets for a stage; empty for any other model.

    Args:
        model: The base model's name.
        stage: The stage.
        values: What is given; what takes the place of a default displaces it, and zeroing single
            weights goes with other defaults.
    """
    if model != DEMO_MODEL:
        return {}
    defaults = dict(demo_recipe().section(stage))
    if stage == "train":
        defaults |= _DEMO_OBJECTIVES.get(values.get("objective", "sft"), {})
    if stage == "prune" and values.get("strategy") in SPARSE:
        # Enough text for SparseGPT's 128 windows, as long as those that the demo base has seen.
        defaults |= {"ratio": 0.5, "calibration": "demo:corpus", "calibration_length": 192}
    if stage == "align" and (process_count() > 1 or _is_sparse(values.get("source"))):
        # Fitting layers in closed form is one process's work, and would fill the zeros.
        defaults.pop("method", None)
    if stage == "prune" and any(name in values for name in AMOUNTS):
        defaults.pop("ratio", None)
    return defaults


def prune_spec(run: RunDirectory, model: str, values: Values) -> PruneSpec:
    """The spec of ``prune``; the base and the place come from the run unless given.

    Raises:
        UsageError: Layers are to be kept whole by a strategy that prunes all of them.
    """
    filled = {**stage_defaults(model, "prune", values), "out": run.output("prune"), **values}
    if filled.get("strategy") in SPARSE:
        for name in ("keep_first", "keep_last"):
            if name in filled:
                raise UsageError(
                    f"--{name.replace('_', '-')} does not go with --strategy {filled['strategy']}",
                    "it zeroes weights in every layer; rand and stru keep layers whole",
                )
    if filled.get("strategy") == "semi":
        filled.setdefault("ratio", 0.5)
    return spec_from_mapping(PruneSpec, {"model": model_dir(model), **filled}, "prune")


def align_spec(run: RunDirectory, model: str, values: Values) -> AlignSpec:
    """The spec of ``align``; it reads what ``prune`` wrote.

    Raises:
        UsageError: No text is given.
        LoramError: Nothing was pruned.
    """
    values = {**values, "source": values.get("source") or run.require("prune")}
    filled = {**stage_defaults(model, "align", values), "out": run.output("align"), **values}
    _require(filled, "data", "align trains on plain text", "pass --data FILE_OR_FOLDER")
    return spec_from_mapping(AlignSpec, filled, "align")


def train_spec(run: RunDirectory, model: str, values: Values) -> TrainSpec:
    """The spec of ``train``; it reads what ``align`` wrote, else what ``prune`` wrote.

    Objectives beyond supervised tuning have outputs of their own, and go on from the supervised
    adapter where the run has one.

    Raises:
        UsageError: No data is given.
    """
    objective = values.get("objective", "sft")
    out = run.output("train")
    if objective != "sft":
        out = run.path / f"{out.name}-{objective}"
    filled = {**stage_defaults(model, "train", values), "out": out, **values}
    if "source" not in filled:
        filled["source"] = trainable(run)
        if objective != "sft" and run.is_done("train"):
            filled.setdefault("from_adapter", run.output("train"))
    if filled.get("from_adapter") is not None:
        filled = {**adapter_values(Path(filled["from_adapter"])), **filled}
    wanted = {"dpo": "preferences", "grpo": "word problems"}.get(objective, "instructions")
    _require(filled, "data", f"train learns from {wanted}", "pass --data FILE.jsonl")
    return spec_from_mapping(TrainSpec, filled, "train")


def full_lora_spec(run: RunDirectory, model: str, values: Values) -> TrainSpec:
    """The same training on the base itself, to compare with."""
    places = {"source": model_dir(model), "out": run.path / FULL_LORA}
    return train_spec(run, model, {**values, **places})


def recover_spec(run: RunDirectory, model: str, values: Values) -> RecoverSpec:
    """The spec of ``recover``; it reads what ``train`` wrote.

    Raises:
        LoramError: Nothing was trained.
    """
    filled = {"model": model_dir(model), "out": run.output("recover"), **values}
    if "adapter" not in filled:
        filled["adapter"] = trained(run)
    return spec_from_mapping(RecoverSpec, filled, "recover")


def merge_spec(run: RunDirectory, model: str, values: Values) -> MergeSpec:
    """The spec of ``recover --merge``'s second half; it reads the recovered adapter."""
    places = {"adapter": run.output("recover"), "out": run.output("merge")}
    return spec_from_mapping(MergeSpec, {"model": model_dir(model), **places, **values}, "merge")


def eval_spec(
    run: RunDirectory,
    model: str,
    values: Values,
    *,
    choose: Sequence[str] | None = None,
    more: Mapping[str, tuple[Path, ...]] | None = None,
) -> EvalSpec:
    """The spec of ``eval``; its rows are whatever the run has made.

    Args:
        run: The run directory.
        model: The base model.
        values: Fields of the spec.
        choose: Names of the rows to keep, in their order; None keeps all.
        more: Rows of the user's own.

    Raises:
        UsageError: A chosen row does not exist.
    """
    base = model_dir(model)
    rows = _chosen({**eval_rows(run, base), **(more or {})}, choose, more)
    filled = {
        **stage_defaults(model, "eval", values),
        "out": run.output("eval"),
        "rows": rows,
        "demo_data": model == DEMO_MODEL and not values.get("task_data"),
        "replace": "out" not in values,
        **values,
    }
    return spec_from_mapping(EvalSpec, {"model": base, **filled}, "eval")


def generate_spec(
    run: RunDirectory,
    model: str,
    values: Values,
    *,
    choose: Sequence[str] | None = None,
    more: Mapping[str, tuple[Path, ...]] | None = None,
) -> GenerateSpec:
    """The spec of ``generate``: the recovered model unless told, or the base before there is one.

    Args:
        run: The run directory.
        model: The base model.
        values: Fields of the spec.
        choose: Names of the rows to ask.
        more: Rows of the user's own, which are asked alone unless others are named.

    Raises:
        UsageError: A chosen row does not exist.
    """
    base = model_dir(model)
    rows = eval_rows(run, base)
    if choose is None:
        choose = () if more else ("recovered" if "recovered" in rows else "base",)
    rows = _chosen({**rows, **(more or {})}, choose, more)
    return spec_from_mapping(GenerateSpec, {"model": base, "rows": rows, **values}, "generate")


def _chosen(
    rows: dict[str, tuple[Path, ...]],
    choose: Sequence[str] | None,
    more: Mapping[str, tuple[Path, ...]] | None,
) -> dict[str, tuple[Path, ...]]:
    for name in choose or ():
        if name not in rows:
            raise unknown_name("row", name, rows, "--rows")
    if choose is None:
        return rows
    return {name: rows[name] for name in dict.fromkeys([*choose, *(more or {})])}


def eval_rows(run: RunDirectory, base: Path) -> dict[str, tuple[Path, ...]]:
    """Rows of a comparison: base, pruned as it is, recovered, merged, and full LoRA."""
    rows: dict[str, tuple[Path, ...]] = {"base": (base,)}
    if run.is_done("prune"):
        rows["pruned"] = (run.output("prune"),)
    if run.is_done("recover"):
        rows["recovered"] = (base, run.output("recover"))
    if run.is_done("merge"):
        rows["merged"] = (run.output("merge"),)
    if (run.path / FULL_LORA / MANIFEST_NAME).is_file():
        rows[FULL_LORA] = (base, run.path / FULL_LORA)
    return rows


def trained(run: RunDirectory) -> Path:
    """The adapter of the run that training ended with: no other one goes on from it.

    Raises:
        LoramError: Nothing was trained.
        UsageError: Several were, and none of them goes on from the others.
    """
    first = run.output("train")
    found = [first, *(run.path / f"{first.name}-{name}" for name in BEYOND_SFT)]
    found = [path for path in found if (path / MANIFEST_NAME).is_file()]
    if not found:
        return run.require("train")
    manifests = {path: Manifest.read(path) for path in found}
    before = {m.inputs.get("adapter", {}).get("key") for m in manifests.values()}
    last = [path for path, manifest in manifests.items() if manifest.key not in before]
    if len(last) > 1:
        raise UsageError(
            f"{run.path}: holds {' and '.join(path.name for path in last)}, and neither goes on "
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


def _is_sparse(source: Any) -> bool:
    """Whether single weights of a model were zeroed; what is no such model is told of later."""
    if source is None or not (Path(source) / MANIFEST_NAME).is_file():
        return False
    return bool(Manifest.read(Path(source)).sparsity)


def _require(values: Values, key: str, why: str, hint: str) -> None:
    if values.get(key) is None:
        raise UsageError(f"--{key} is missing: {why}", hint)
