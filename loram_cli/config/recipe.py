"""Recipes: the stages of a run in one YAML file, typed."""

import typing
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from loram_cli.errors import UsageError
from loram_cli.schema import spec_from_mapping, unknown_name
from loram_cli.stages.align.stage import AlignSpec
from loram_cli.stages.evaluate.generate import GenerateSpec
from loram_cli.stages.evaluate.stage import EvalSpec
from loram_cli.stages.prune.stage import PruneSpec
from loram_cli.stages.recover.stage import RecoverSpec
from loram_cli.stages.train.stage import TrainSpec

# What the run directory fills in, and a recipe therefore may not set.
_PLACES = frozenset(
    {"model", "source", "adapter", "out", "rows", "prompts", "demo_data", "replace", "force"}
)
SPECS: dict[str, type] = {
    "prune": PruneSpec,
    "align": AlignSpec,
    "train": TrainSpec,
    "recover": RecoverSpec,
    "eval": EvalSpec,
}
# What settings of one's own may hold; a recipe asks nobody.
SETTABLE: dict[str, type] = {**SPECS, "generate": GenerateSpec}


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
        full_lora: Also train the base itself with the values of ``train``.
        recover: Values of ``RecoverSpec``, and ``merge``.
        eval: Values of ``EvalSpec``.
    """

    model: str
    preset: str | None = None
    run: Path | None = None
    prune: dict[str, Any] | None = None
    align: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    full_lora: bool = False
    recover: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None

    def section(self, stage: str) -> dict[str, Any]:
        """The values of one stage; empty when it is absent."""
        return dict(getattr(self, "train" if stage == "full_lora" else stage) or {})

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that run, in order."""
        order = []
        for stage in ("prune", "align", "train", "recover", "eval"):
            if getattr(self, stage) is not None:
                order.append(stage)
            if stage == "train" and self.full_lora:
                order.append("full_lora")
        return tuple(order)


def read_yaml(file: Path, what: str) -> dict[str, Any]:
    """A YAML file's mapping; an empty file is an empty one.

    Args:
        file: The file.
        what: ``recipe`` or ``settings``, to name it in errors.

    Raises:
        UsageError: Not readable, not YAML, or no mapping.
    """
    import yaml

    try:
        data = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: {what} cannot be read ({error})") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = f", line {line + 1}" if line is not None else ""
        raise UsageError(f"{file}{place}: not valid YAML") from error
    if data is None and what != "recipe":
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{file}: a {what} file is a mapping of stages", "see recipes/demo.yaml")
    return data


def setting_types(stage: str) -> dict[str, Any]:
    """Type by name of everything that a recipe or a settings file may set for a stage."""
    hints = typing.get_type_hints(SETTABLE[stage])
    merge = {"merge": bool} if stage == "recover" else {}
    return {name: hint for name, hint in hints.items() if name not in _PLACES} | merge


def load_recipe(file: Path) -> Recipe:
    """Read and check a recipe; nothing is run.

    Raises:
        UsageError: Not readable, not YAML, an unknown key or a wrong type.
    """
    data = read_yaml(file, "recipe")
    recipe = spec_from_mapping(Recipe, data, f"recipe {file.name}")
    for stage in SPECS:
        _check_section(recipe.section(stage), stage, f"recipe {file.name}, stage {stage}")
    return recipe


@cache
def demo_recipe() -> Recipe:
    """The demo base's own recipe, which ships with the package."""
    return load_recipe(Path(str(resources.files("loram_cli.demo") / "recipe.yaml")))


def _check_section(section: dict[str, Any], stage: str, where: str) -> None:
    spec = SPECS[stage]
    known = setting_types(stage)
    for key in section:
        if key not in known:
            raise unknown_name("key", key, known, where)
    values = {key: value for key, value in section.items() if key != "merge"}
    fillers: dict[str, Any] = {"rows": {}, "data": "any"}
    for item in fields(spec):
        if item.name in ("model", "source", "adapter", "out"):
            values[item.name] = Path()
        elif item.name in fillers:
            values.setdefault(item.name, fillers[item.name])
    # Building the spec checks every type and range; the places above are stand-ins.
    spec_from_mapping(spec, values, where)
