"""Rules of the house: what may import what, how large a room may be, what each file may say."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.import_graph import circles, file_graph, folder_graph, lines_by_folder, report

import loram_cli
from loram_cli.cli.commands.table import COMMANDS, load

ROOT = Path(loram_cli.__file__).parent
# From the roof down: a module may import its own room and those on its own floor or lower.
FLOORS = (
    {"cli", "api"},
    {"pipeline"},
    {"config"},
    {"tools", "serving"},
    {"stages"},
    {"evaluation"},
    {"training"},
    {"modeling"},
    {"pruning", "memory", "demo", "export"},
    {"lora"},
    {"checkpoint"},
    {"runs", "arch"},
    {"errors", "units", "reading", "reporting", "schema", "hub", "quiet", "figures"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LARGEST_SHARE = 0.20
HEAVY = {
    "torch", "transformers", "peft", "trl", "accelerate", "datasets", "lm_eval", "matplotlib",
    "bitsandbytes", "huggingface_hub", "numpy",
}  # fmt: skip
# What every help needs at least: the libraries that draw it.
DRAWING = "import typer, typer.rich_utils, rich.markdown, rich.table"
# Words of ours as well: a plan's ratio for the MLP, the output head.
OWN_WORDS = {"mlp", "lm_head"}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted(ROOT.rglob("*.py")):
        yield file, ast.parse(file.read_text())


def room(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


def test_every_room_has_a_floor():
    rooms = {room(file) for file in file_graph(ROOT)} - {"__init__", "__main__"}
    assert rooms - set(FLOOR) == set()


def test_imports_go_downward_only():
    wrong = [
        f"{file} imports {target}"
        for file, targets in file_graph(ROOT).items()
        for target in sorted(targets)
        # The start of the package and its version belong to no floor.
        if {room(file), room(target)}.isdisjoint({"__init__", "__main__"})
        and FLOOR[room(target)] < FLOOR[room(file)]
    ]
    assert wrong == []


def test_no_file_imports_itself_through_others():
    found = report(file_graph(ROOT))
    assert not found, found


def test_no_folder_imports_itself_through_others():
    found = report(folder_graph(file_graph(ROOT)))
    assert not found, found


def test_a_circle_of_any_kind_is_found(tmp_path: Path):
    package = tmp_path / "house"
    for name, text in {
        "__init__.py": "",
        "low/__init__.py": "",
        "low/a.py": "from house.low import b\n",
        "low/b.py": "def late():\n    from ..high.c import thing\n",
        "high/c.py": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import house.low.a\n"
        ),
        "high/d.py": "from house.high.c import thing\nfrom house import low\n",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    graph = file_graph(package)
    assert graph["high/d.py"] == {"high/c.py", "low/__init__.py"}
    assert circles(graph) == [["high/c.py", "low/a.py", "low/b.py", "high/c.py"]]
    assert "high/c.py -> low/a.py -> low/b.py -> high/c.py" in report(graph)
    assert circles(folder_graph(graph)) == [["high", "low", "high"]]
    (package / "low" / "b.py").write_text("import house.low\n")
    assert report(file_graph(package)) == report(folder_graph(file_graph(package))) == ""


def test_no_room_holds_more_than_its_share():
    rooms = [path for path in [*ROOT.iterdir(), *(ROOT / "stages").iterdir()] if path.is_dir()]
    lines = lines_by_folder(ROOT, rooms)
    most = LARGEST_SHARE * lines_by_folder(ROOT.parent, [ROOT])[ROOT.name]
    assert {name: count for name, count in lines.items() if count > most} == {}


def test_nothing_prints_below_the_cli():
    for file, tree in sources():
        if file.relative_to(ROOT).parts[0] == "cli":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                raise AssertionError(f"{file}:{node.lineno} prints")


def tensor_words() -> set[str]:
    """Parts of the families' tensor names that nothing else is called."""
    names: set[str] = set()
    for file in (ROOT / "arch" / "families").glob("*.json"):
        data = json.loads(file.read_text())
        names |= {module["name"] for module in data["modules"]}
        names |= {data["embedding"], data["lm_head"], *data["layer_norms"], *data["norms"]}
    words = {word for name in names for word in name.split(".")}
    # Plain English words stand for other things as well.
    return {word for word in words if "_" in word} - OWN_WORDS


def test_tensor_names_stand_in_family_files_alone():
    words = tensor_words()
    assert {"q_proj", "gate_up_proj", "embed_tokens", "input_layernorm"} <= words
    found = []
    for file, tree in sources():
        expressions = (node for node in ast.walk(tree) if isinstance(node, ast.Expr))
        docstrings = {id(node.value) for node in expressions}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = words & set(re.findall(r"\w+", node.value))
                named |= set(re.findall(r"model\.(?:layers|norm)\b", node.value))
                named |= set(re.findall(r"\w*_proj\b", node.value))
                if named and id(node) not in docstrings:
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno} {sorted(named)}")
    assert found == []


def cpu_seconds(code: str) -> float:
    """Processor time of a fresh interpreter, which other users of the machine do not stretch."""
    code += "\nimport resource\nused = resource.getrusage(resource.RUSAGE_SELF)\n"
    code += "print('\\n', used.ru_utime + used.ru_stime)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.mark.integration
def test_every_help_comes_at_once_and_without_heavy_libraries():
    """A help takes 0.3 s where drawing libraries alone take half of that to import."""
    least = cpu_seconds(DRAWING)
    for name in ("", *COMMANDS):
        code = (
            "import sys; from loram_cli.cli.app import run_command\n"
            f"assert run_command([*{name.split()!r}, '--help']) == 0\n"
            f"heavy = {HEAVY!r} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        ours = cpu_seconds(code)
        for _ in range(4):  # Again, in case the machine was disturbed.
            if ours <= 3 * least:
                break
            ours, least = min(ours, cpu_seconds(code)), max(least, cpu_seconds(DRAWING))
        assert ours <= 3 * least, f"loram {name} --help: {ours:.2f} s, its libraries {least:.2f} s"


def test_every_help_text_has_an_example():
    for module in map(load, COMMANDS):
        assert module.EPILOG.startswith(f"Example: loram {module.NAME}")


def test_every_family_file_is_complete():
    for file in (ROOT / "arch" / "families").glob("*.json"):
        data = json.loads(file.read_text())
        assert data["family"] == file.stem
        assert {m["name"] for m in data["modules"]}
