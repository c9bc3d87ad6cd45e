"""What ``--dry-run`` prints."""

from collections.abc import Sequence
from typing import Any

from loram_cli.cli.draw.console import print_json, stdout_console
from loram_cli.stages.core.plan import StagePlan
from loram_cli.units import format_bytes, format_params


def show_plans(plans: Sequence[StagePlan], json_output: bool) -> None:
    """Print plans: one JSON object (a list when there are several), or a few lines each."""
    if json_output:
        told = [plan.to_mapping() for plan in plans]
        print_json(told[0] if len(told) == 1 else told)
        return
    console = stdout_console()
    for plan in plans:
        for line in plan_lines(plan):
            console.print(line)


def plan_lines(plan: StagePlan) -> list[str]:
    """A plan in words."""
    if plan.done:
        return [f"{plan.stage}: {plan.writes} is done already; --force would redo it"]
    lines = [f"would {plan.stage}: read {', '.join(plan.reads)}, write {plan.writes}"]
    words = [_figure(name, value) for name, value in plan.figures.items() if value is not None]
    if words:
        lines.append(f"  {', '.join(words)}")
    needed = f"{format_bytes(plan.disk_bytes)} needed at most, " if plan.disk_bytes else ""
    lines.append(f"  disk: {needed}{format_bytes(plan.free_bytes)} free")
    if plan.memory_bytes:
        more = "" if plan.stage == "train" else " and what activations take"
        each = f" in each of {plan.processes} processes" if plan.processes > 1 else ""
        lines.append(f"  memory{each}: {format_bytes(plan.memory_bytes)}{more}")
    return lines


def _figure(name: str, value: Any) -> str:
    if isinstance(value, dict):
        rows = (f"{label} ({format_params(params)})" for label, params in value.items())
        return f"{name}: {', '.join(rows)}"
    if isinstance(value, list):
        return f"{name}: {', '.join(map(str, value))}"
    if name == "params":
        return f"a model of {format_params(int(value))} parameters"
    if name.endswith("_params"):
        return f"{format_params(int(value))} {name.removesuffix('_params')} parameters"
    return f"{value:,} {name.replace('_', ' ')}"
