"""Which file of a package imports which, from the source, and the circles in that."""

import ast
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

Graph = Mapping[str, set[str]]


def file_graph(root: Path) -> dict[str, set[str]]:
    """Imports between the files of a package, by path from its root.

    Imports in functions and below ``TYPE_CHECKING`` count like all others. A package's own
    ``__init__`` counts where a name is taken from it, and not for being passed through.
    """
    modules = {_module_name(root, file): file for file in root.rglob("*.py")}
    label = {name: file.relative_to(root).as_posix() for name, file in modules.items()}
    return {
        label[name]: {label[target] for target in _imports(name, file, modules) if target != name}
        for name, file in modules.items()
    }


def _module_name(root: Path, file: Path) -> str:
    parts = (root.name, *file.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(name: str, file: Path, modules: Mapping[str, Path]) -> set[str]:
    found = set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {_longest(alias.name, modules) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = package.split(".")
                stem = parents[: len(parents) - node.level + 1]
                source = ".".join([*stem, *filter(None, [source])])
            found |= {_longest(f"{source}.{alias.name}", modules) for alias in node.names}
    return found - {None}


def _longest(name: str, modules: Mapping[str, Path]) -> str | None:
    """The module that a dotted name lies in, if it is one of ours."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def circles(graph: Graph) -> list[list[str]]:
    """One shortest circle of every strongly connected part (Tarjan's algorithm), as a closed path."""
    return [_shortest_circle(graph, part) for part in _strong_parts(graph)]


def _strong_parts(graph: Graph) -> list[set[str]]:
    count = itertools.count()
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    parts: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = next(count)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                parts.append(set(stack[at:]))
            del stack[at:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return parts


def _shortest_circle(graph: Graph, part: set[str]) -> list[str]:
    return min((_way_back(graph, part, start) for start in sorted(part)), key=len)


def _way_back(graph: Graph, part: set[str], start: str) -> list[str]:
    """The shortest way from a node of a strongly connected part to itself."""
    paths, seen = [[start]], {start}
    while True:
        longer = []
        for path in paths:
            for target in sorted(graph[path[-1]] & part):
                if target == start:
                    return [*path, start]
                if target not in seen:
                    seen.add(target)
                    longer.append([*path, target])
        paths = longer


def report(graph: Graph) -> str:
    """The circles of a graph, for a test's message; empty where there are none."""
    parts = _strong_parts(graph)
    lines = []
    for part in parts:
        lines.append(f"{len(part)} in circles: {', '.join(sorted(part))}")
        lines.append("  such as " + " -> ".join(_shortest_circle(graph, part)))
    return "\n".join(lines)


def folder_graph(graph: Graph) -> dict[str, set[str]]:
    """Imports between folders; files of the root stand for themselves.

    A folder and one inside it may import each other: the files' own circles are another matter.
    """
    result: dict[str, set[str]] = {}
    for name, targets in graph.items():
        mine = result.setdefault(_folder(name), set())
        mine |= {
            _folder(target) for target in targets if not _nested(_folder(target), _folder(name))
        }
    return result


def _folder(file: str) -> str:
    return file.rpartition("/")[0] or file


def _nested(one: str, other: str) -> bool:
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def lines_by_folder(root: Path, folders: Iterable[Path]) -> dict[str, int]:
    """Lines of Python below each folder."""
    return {
        folder.relative_to(root).as_posix(): sum(
            len(file.read_text().splitlines()) for file in folder.rglob("*.py")
        )
        for folder in folders
    }
