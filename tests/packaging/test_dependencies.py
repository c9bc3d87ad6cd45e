"""What the package imports is what it declares."""

import ast
import sys
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

import loram_cli

ROOT = Path(loram_cli.__file__).parent
PROJECT = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
# Imported where a library of ours that needs it is in use already.
THROUGH_ANOTHER = {
    "jinja2": "transformers",
    "pyarrow": "datasets",
    "evaluate": "lm_eval",
    "mlflow": "mlflow_skinny",
}


def name_of(requirement: str) -> str:
    for end in ">=<~!;[ ":
        requirement = requirement.split(end)[0]
    return requirement.strip().lower().replace("-", "_")


def imported_packages() -> dict[str, str]:
    found = {}
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            else:
                continue
            for name in names:
                found.setdefault(name.split(".")[0], str(file.relative_to(ROOT)))
    return {n: f for n, f in found.items() if n not in (*sys.stdlib_module_names, "loram_cli")}


def test_every_import_is_declared():
    extras = (e for name, e in PROJECT["optional-dependencies"].items() if name != "dev")
    declared = {name_of(line) for line in chain(PROJECT["dependencies"], *extras)}
    owners = metadata.packages_distributions()
    for module, file in imported_packages().items():
        names = {name.lower().replace("-", "_") for name in owners.get(module, [module])}
        through = THROUGH_ANOTHER.get(module)
        assert names & declared or through in declared, f"{file} imports {module}"


def test_every_declared_dependency_is_used():
    owners = metadata.packages_distributions()
    used = {
        name.lower().replace("-", "_") for m in imported_packages() for name in owners.get(m, [m])
    }
    # Used by name only: by torch and transformers, when they place and quantize weights.
    by_name = {"accelerate", "bitsandbytes", "lm_eval"}
    for line in PROJECT["dependencies"]:
        assert name_of(line) in used | by_name, line


def test_optional_backends_are_extras():
    assert {"tensorboard", "wandb", "vllm", "dev"} <= set(PROJECT["optional-dependencies"])
    for extra in ("tensorboard", "wandb", "vllm"):
        (line,) = PROJECT["optional-dependencies"][extra]
        assert name_of(line) == extra
