import ast
import json
import subprocess
import sys
from pathlib import Path

import loram_cli
from loram_cli.cli.app import MODULES

ROOT = Path(loram_cli.__file__).parent
# From the roof down: a module may import its own floor's package and lower floors only.
FLOORS = (
    {"cli", "api"},
    {"pipeline"},
    {"config"},
    {"tools"},
    {"stages"},
    {"evaluation"},
    {"training"},
    {"modeling"},
    {"pruning", "memory", "demo"},
    {"lora"},
    {"checkpoint"},
    {"runs", "arch"},
    {"errors", "units", "reporting", "schema", "hub", "quiet", "figures"},
)


def floor_of(package: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if package in names)


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {n.split(".")[1] for n in names if n.startswith("loram_cli.")}


def test_imports_go_downward_only():
    wrong = []
    for file in ROOT.rglob("*.py"):
        package = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if package in ("__init__", "__main__"):
            continue
        for target in imported(file):
            if target != package and floor_of(target) < floor_of(package):
                wrong.append(f"{file.relative_to(ROOT)} imports {target}")
    assert not wrong


def test_nothing_prints_below_the_cli():
    for file in ROOT.rglob("*.py"):
        if file.relative_to(ROOT).parts[0] == "cli":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                raise AssertionError(f"{file} prints")


def test_tensor_names_stand_in_family_files_alone():
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                is_doc = "\n" in node.value or "``" in node.value or " " in node.value
                assert is_doc or "_proj" not in node.value, f"{file}: {node.value}"


def test_help_imports_no_torch():
    commands = ["", *(module.NAME for module in MODULES)]
    code = (
        "import sys; from loram_cli.cli.app import run_command\n"
        f"for c in {commands!r}:\n"
        "    assert run_command([*c.split(), '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_help_text_has_an_example():
    for module in MODULES:
        assert module.EPILOG.startswith(f"Example: loram {module.NAME}")


def test_every_family_file_is_complete():
    for file in (ROOT / "arch" / "families").glob("*.json"):
        data = json.loads(file.read_text())
        assert data["family"] == file.stem
        assert {m["name"] for m in data["modules"]}
