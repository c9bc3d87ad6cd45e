"""Settings from the environment and from a file in the working directory.

What decides, the strongest first: a flag, ``LORAM_<STAGE>_<SETTING>``, the recipe of ``loram run``,
the file (``LORAM_CONFIG``, else ``loram.yaml``, else ``[tool.loram]`` in ``pyproject.toml``), and
last the defaults of the demo's recipe or of the spec. File and recipe have the same sections.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loram_cli.config.recipe import SETTABLE, SHARED, SPECS, Recipe, read_yaml, setting_types
from loram_cli.errors import UsageError
from loram_cli.reading import YAML_BYTES, read_text
from loram_cli.schema import convert, from_text, unknown_name

FILE_NAME = "loram.yaml"
_PREFIX = "LORAM_"
# Known to the commands themselves.
_OTHERS = ("LORAM_RUN", "LORAM_MODEL", "LORAM_CONFIG", "LORAM_DEBUG")
# Without a stage in their name, for every stage that has them.
_SHARED = ("seed", "device")

Sections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What file and environment set; typed, and checked for unknown names.

    Attributes:
        run: Run directory.
        model: Base model.
        file: Values per stage from the file.
        environment: Values per stage from the environment.
        sources: The file and variables that anything came from, to tell the user.
    """

    run: Path | None = None
    model: str | None = None
    file: Sections = field(default_factory=dict)
    environment: Sections = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    def section(self, stage: str) -> dict[str, Any]:
        """Values of a stage: the environment's before the file's."""
        return {**self.file.get(stage, {}), **self.environment.get(stage, {})}

    def over(self, recipe: Recipe) -> Recipe:
        """The recipe with the file below and the environment above; no stage is added."""
        merged: dict[str, Any] = {
            stage: {
                **self.file.get(stage, {}),
                **recipe.section(stage),
                **self.environment.get(stage, {}),
            }
            for stage in SPECS
            if getattr(recipe, stage) is not None
        }
        then = [
            {
                **_of_the_machine(self.file.get("train", {})),
                **values,
                **_of_the_machine(self.environment.get("train", {})),
            }
            for values in recipe.then
        ]
        return replace(recipe, **merged, then=tuple(then))


def _of_the_machine(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of training that hold for every objective: not the data, nor what is learnt."""
    return {name: value for name, value in values.items() if name in (*SHARED, "micro_batch")}


def load_settings(folder: Path, environ: Mapping[str, str]) -> Settings:
    """Read the file of a folder, if there is one, and the environment.

    Raises:
        UsageError: An unknown key or variable, a wrong type, or a file that cannot be read.
    """
    environment, variables = _from_environment(environ)
    where, data = _file_data(folder, environ.get("LORAM_CONFIG"))
    sections: dict[str, dict[str, Any]] = {}
    for key, value in data.items():
        if key in SETTABLE:
            sections[key] = _section(value, key, f"{where}, {key}")
        elif key not in ("run", "model"):
            raise unknown_name("key", str(key), ["run", "model", *SETTABLE], where)
    run = convert(Path | None, data.get("run"), f"{where}: run")
    model = convert(str | None, data.get("model"), f"{where}: model")
    sources = ((where,) if data else ()) + variables
    return Settings(run, model, sections, environment, sources)


def _section(data: Any, stage: str, where: str) -> dict[str, Any]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise UsageError(f"{where}: expected a mapping of settings")
    known = setting_types(stage)
    for key in data:
        if key not in known:
            raise unknown_name("key", str(key), known, where)
    return {key: convert(known[key], value, f"{where}: {key}") for key, value in data.items()}


def _file_data(folder: Path, named: str | None) -> tuple[str, Mapping[str, Any]]:
    if named:
        return named, read_yaml(Path(named), "settings")
    if (folder / FILE_NAME).exists():
        return FILE_NAME, read_yaml(folder / FILE_NAME, "settings")
    project = folder / "pyproject.toml"
    if not project.is_file():
        return "", {}
    try:
        data = tomllib.loads(read_text(project, most_bytes=YAML_BYTES))
    except (UsageError, ValueError, RecursionError):
        # Not our file, and whether it is sound is for others to say.
        return "", {}
    tools = data.get("tool")
    table = tools.get("loram", {}) if isinstance(tools, dict) else {}
    if not isinstance(table, dict):
        raise UsageError("pyproject.toml: expected [tool.loram] to be a table")
    return "pyproject.toml [tool.loram]", table


def _from_environment(environ: Mapping[str, str]) -> tuple[Sections, tuple[str, ...]]:
    known: dict[str, list[tuple[str, str]]] = {}
    for name in _SHARED:
        stages = [stage for stage in SETTABLE if name in setting_types(stage)]
        known[_PREFIX + name.upper()] = [(stage, name) for stage in stages]
    for stage in SETTABLE:
        for name in setting_types(stage):
            known[f"{_PREFIX}{stage.upper()}_{name.upper()}"] = [(stage, name)]
    sections: dict[str, dict[str, Any]] = {}
    # In the order of `known`: a variable that names its stage comes after, and wins.
    used = [variable for variable in known if variable in environ]
    for variable in used:
        for stage, name in known[variable]:
            hint = setting_types(stage)[name]
            value = convert(hint, from_text(hint, environ[variable]), variable)
            sections.setdefault(stage, {})[name] = value
    for variable in environ:
        if variable.startswith(_PREFIX) and variable not in (*known, *_OTHERS):
            raise unknown_name("variable", variable, [*_OTHERS, *known], "environment")
    return sections, tuple(used)
