"""Recipes: the stages of a run in one YAML file, typed."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from loram_cli import reading
from loram_cli.errors import UsageError
from loram_cli.pruning.strategies import DEFAULT, STRATEGIES
from loram_cli.schema import (
    Spec,
    hints_of,
    setting_of,
    settings_of,
    spec_from_mapping,
    unknown_name,
)
from loram_cli.serving.spec import ChatSpec, ServeSpec
from loram_cli.stages.evaluate.spec import GenerateSpec
from loram_cli.stages.prune.spec import CALIBRATED
from loram_cli.stages.specs import SPECS as STAGE_SPECS
from loram_cli.stages.train.objectives.table import beyond_sft

# The stages of a recipe, in order; a merge is a setting of recover.
SPECS: dict[str, type[Spec]] = {k: v for k, v in STAGE_SPECS.items() if k != "merge"}
# What settings of one's own may hold; a recipe asks nobody.
SETTABLE: dict[str, type[Spec]] = {
    **SPECS, "generate": GenerateSpec, "chat": ChatSpec, "serve": ServeSpec
}  # fmt: skip
FULL_LORA = "full_lora"
# Settings of a training that hold for those that follow it in a recipe.
SHARED = (
    "quantize", "gradient_checkpointing", "max_length", "attention", "precision", "optimizer",
    "cross_entropy", "device", "report_to",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Other defaults of a stage where some settings have certain values.

    Attributes:
        stage: The stage.
        when: Values by setting; a list is any of them.
        values: The defaults then.
    """

    stage: str
    when: dict[str, Any]
    values: dict[str, Any]

    def applies(self, stage: str, given: Mapping[str, Any]) -> bool:
        """Whether what is given has the values that this is about."""
        return stage == self.stage and all(
            given.get(name) in (value if isinstance(value, list) else [value])
            for name, value in self.when.items()
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which stages run, and how. A stage that is absent is skipped.

    Attributes:
        model: Base model: a path, a hub id, or ``demo``.
        preset: Embedded config with the base's shapes, for a dry run without weights.
        run: Run directory; ``--run`` overrides it.
        prune: Values of ``PruneSpec``.
        align: Values of ``AlignSpec``.
        train: Values of ``TrainSpec``.
        then: Further trainings, each of another objective and from the adapter before it; what
            concerns the model itself (:data:`SHARED`) holds as in ``train`` unless told.
        full_lora: Also train the base itself with the values of ``train``.
        recover: Values of ``RecoverSpec``.
        polish: Values of ``PolishSpec``; what is absent is as in ``train``.
        eval: Values of ``EvalSpec``.
        variants: Other defaults for bare commands, where the recipe is that of a base of ours.
    """

    model: str
    preset: str | None = None
    run: Path | None = None
    prune: dict[str, Any] | None = None
    align: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    then: tuple[dict[str, Any], ...] = ()
    full_lora: bool = False
    recover: dict[str, Any] | None = None
    polish: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None
    variants: tuple[dict[str, Any], ...] = field(default=())

    def section(self, stage: str) -> dict[str, Any]:
        """The values of one stage; empty when it is absent."""
        if stage in self.further:
            own = self.then[self.further.index(stage)]
            return {k: v for k, v in (self.train or {}).items() if k in SHARED} | own
        return dict(getattr(self, "train" if stage == FULL_LORA else stage) or {})

    def filled(self, stage: str) -> dict[str, Any]:
        """The values of one stage, on the training data where it names no text of its own."""
        return on_training_data(stage, self.section(stage), self.section("train"))

    def defaults(self, stage: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The values of one stage as defaults of a bare command."""
        values = self.section(stage)
        for variant in self.variants:
            known = spec_from_mapping(Variant, variant, "recipe, variants")
            if known.applies(stage, given):
                values |= known.values
        return values

    @property
    def further(self) -> tuple[str, ...]:
        """Names of the trainings after the first: ``train-dpo``."""
        return tuple(f"train-{values.get('objective')}" for values in self.then)

    def check(self, where: str) -> None:
        """Refuse further trainings that cannot follow.

        Raises:
            UsageError: There is no first one, two have the same objective, or full LoRA is to be
                compared with all of them.
        """
        if not self.then:
            return
        if self.train is None:
            raise UsageError(f"{where}: 'then' continues 'train', which is missing")
        named = [self.train.get("objective", "sft"), *(v.get("objective") for v in self.then)]
        for values in self.then:
            if values.get("objective") not in beyond_sft():
                raise unknown_name(
                    "objective", str(values.get("objective")), beyond_sft(), f"{where}, then"
                )
        if len(set(named)) < len(named):
            raise UsageError(f"{where}: two trainings of the same objective, {', '.join(named)}")
        if self.full_lora:
            raise UsageError(
                f"{where}: full_lora repeats 'train' alone, and does not go with 'then'",
                "leave full_lora out, or compare each training in a recipe of its own",
            )

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that run, in order."""
        order = []
        for stage in SPECS:
            if getattr(self, stage) is not None:
                order.append(stage)
            if stage == "train":
                order += self.further
            if stage == "train" and self.full_lora:
                order.append(FULL_LORA)
        return tuple(order)


def on_training_data(
    stage: str, values: Mapping[str, Any], training: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of a stage, with the training data as its text where it needs one and has none.

    Text of the kind that will be trained on brings the small model far closer to the base, there
    where it counts, than general text does (``docs/gain.md``).

    Args:
        stage: The stage.
        values: Of that stage.
        training: Values of ``train``.
    """
    data = training.get("data")
    # Preferences and questions without their answers are no text.
    if data is None or training.get("objective", "sft") != "sft":
        return dict(values)
    if stage == "align":
        return {"data": data, **values}
    if stage == "prune" and ranks_on_text(values):
        return {"calibration": data, **values}
    return dict(values)


def ranks_on_text(values: Mapping[str, Any]) -> bool:
    """Whether values of ``prune`` are those of a pruning that needs text."""
    strategy = STRATEGIES.get(values.get("strategy") or DEFAULT)
    ways = strategy.importances if strategy is not None else ()
    return values.get("importance", next(iter(ways), None)) in CALIBRATED


def read_yaml(file: Path, what: str) -> dict[str, Any]:
    """A YAML file's mapping; an empty file is an empty one.

    Raises:
        UsageError: Not readable, not YAML, or no mapping.
    """
    data = reading.read_yaml(file)
    if data is None and what != "recipe":
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{file}: a {what} file is a mapping of stages", "see recipes/demo.yaml")
    return data


@cache
def setting_types(stage: str) -> dict[str, Any]:
    """Type by name of everything that a recipe or a settings file may set for a stage."""
    hints = hints_of(SETTABLE[stage])
    return {
        item.name: hints[item.name] for item, told in settings_of(SETTABLE[stage]) if not told.place
    }


def load_recipe(file: Path) -> Recipe:
    """Read and check a recipe; nothing is run.

    Raises:
        UsageError: Not readable, not YAML, an unknown key or a wrong type.
    """
    data = read_yaml(file, "recipe")
    recipe = spec_from_mapping(Recipe, data, f"recipe {file.name}")
    for stage in SPECS:
        if getattr(recipe, stage) is not None:
            _check_section(recipe.filled(stage), stage, f"recipe {file.name}, stage {stage}")
    recipe.check(f"recipe {file.name}")
    for stage in recipe.further:
        _check_section(recipe.section(stage), "train", f"recipe {file.name}, stage {stage}")
    return recipe


@cache
def demo_recipe() -> Recipe:
    """The demo base's own recipe, which ships with the package."""
    return load_recipe(Path(str(resources.files("loram_cli.demo") / "recipe.yaml")))


def _check_section(section: Mapping[str, Any], stage: str, where: str) -> None:
    known = setting_types(stage)
    for key in section:
        if key not in known:
            raise unknown_name("key", key, known, where)
    checked_by_stand_ins(SPECS[stage], section, where)


def checked_by_stand_ins(cls: type[Spec], values: Mapping[str, Any], where: str) -> Spec:
    """A spec whose places are stand-ins: building it checks every type and range.

    Raises:
        UsageError: A wrong type, or settings that do not go together.
    """
    stand_ins: dict[Any, Any] = {Path: Path(), str: "any"}
    filled = dict(values)
    for item in fields(cls):
        is_open = item.default is MISSING and item.default_factory is MISSING
        if is_open and (setting_of(item).place or item.name == "data"):
            filled.setdefault(item.name, stand_ins.get(hints_of(cls)[item.name], {}))
    return spec_from_mapping(cls, filled, where)
