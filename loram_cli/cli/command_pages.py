"""The pages of ``loram_cli/docs/commands``, written from the commands themselves.

``python -m loram_cli.cli.command_pages`` (``make docs``) writes them; a test compares.
"""

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

from loram_cli.cli.commands.table import COMMANDS, build, load

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "commands"


def command_page(module: ModuleType) -> str:
    """A command's page: what it does, its options, an example."""
    parameters: list[Any] = list(build(module.NAME).params)
    text = inspect.cleandoc(module.command.__doc__ or "")
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    switches = [p for p in parameters if p.param_type_name == "option"]
    words = " ".join([f"loram {module.NAME}", *(p.name.upper() for p in arguments), "[OPTIONS]"])
    lines = [f"# loram {module.NAME}", "", text, "", f"    {words}", ""]
    if arguments:
        lines += ["| argument | |", "| --- | --- |"]
        lines += [f"| `{p.name.upper()}` | {_cell(p.help)} |" for p in arguments]
        lines.append("")
    lines += ["| option | |", "| --- | --- |"]
    lines += [f"| {_names(p)} | {_cell(p.help)}{_variable(p)} |" for p in switches]
    example = module.EPILOG.removeprefix("Example: ")
    lines += ["| `--help`, `-h` | Show this and stop. |", "", "Example:", "", f"    {example}", ""]
    return "\n".join(lines)


def index_page() -> str:
    """The list of all commands."""
    lines = ["# Commands", "", "| command | |", "| --- | --- |"]
    lines += [f"| [{name}]({name}.md) | {_cell(said)} |" for name, (_, said) in COMMANDS.items()]
    return "\n".join([*lines, ""])


def pages() -> dict[str, str]:
    """Every page by its file name."""
    return {
        "README.md": index_page(),
        **{f"{name}.md": command_page(load(name)) for name in COMMANDS},
    }


def write(folder: Path) -> None:
    """Write all pages, and remove those of commands that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for file in folder.glob("*.md"):
        if file.name not in wanted:
            file.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, "utf-8")


def _names(parameter: Any) -> str:
    names = [*parameter.opts, *parameter.secondary_opts]
    value = "" if parameter.is_flag else f" {_value_name(parameter)}"
    return ", ".join(f"`{name}{value}`" for name in names)


def _value_name(parameter: Any) -> str:
    kind = parameter.type_descriptor.annotation
    return parameter.metavar or {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _variable(parameter: Any) -> str:
    return f" Also by `{parameter.envvar}`." if parameter.envvar else ""


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


if __name__ == "__main__":
    write(FOLDER)
