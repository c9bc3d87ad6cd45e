"""What ``--dry-run`` prints."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from loram_cli.cli.draw.console import print_json, stdout_console
from loram_cli.cli.draw.widths import prune_line, widths_remarks, widths_table
from loram_cli.stages.core.plan import StagePlan
from loram_cli.stages.core.results import CalibrationFigures, PruneResult
from loram_cli.units import format_bytes, format_params


def show_plans(plans: Sequence[StagePlan[Any]], json_output: bool) -> None:
    """Print plans: ``{"plans": [...]}``, or a few lines each."""
    if json_output:
        print_json({"plans": [plan.to_mapping() for plan in plans]})
        return
    console = stdout_console()
    for plan in plans:
        for line in plan_lines(plan):
            console.print(line)


def plan_lines(plan: StagePlan[Any]) -> Iterator[str | Table]:
    """A plan in words, and what pruning leaves of each layer as a table."""
    if plan.done:
        yield f"{plan.stage}: {plan.writes} is done already; --force would redo it"
        return
    reads = f"read {', '.join(plan.reads)}, " if plan.reads else ""
    ahead = "" if plan.checked else " (by arithmetic: its inputs are still to be made)"
    yield f"would {plan.stage}: {reads}write {plan.writes}{ahead}"
    for line in plan.figures.get("way", ()):
        yield f"  {line}"
    figures = {name: value for name, value in plan.figures.items() if name != "way"}
    words = [_figure(k, v) for k, v in figures.items() if v is not None and v != {}]
    if words:
        yield f"  {', '.join(words)}"
    needed = f"{format_bytes(plan.disk_bytes)} needed at most, " if plan.disk_bytes else ""
    yield f"  disk: {needed}{format_bytes(plan.free_bytes)} free"
    if plan.memory_bytes:
        more = "" if plan.stage == "train" else " and what activations take"
        more = " beside one decoder layer" if plan.stage == "prune" else more
        each = f" in each of {plan.processes} processes" if plan.processes > 1 else ""
        yield f"  memory{each}: {format_bytes(plan.memory_bytes)}{more}"
    result = plan.figures.get("result")
    if isinstance(result, PruneResult):
        yield from _pruned_lines(result)


def _pruned_lines(result: PruneResult) -> Iterator[str | Table]:
    if result.calibration:
        yield f"  {_calibration(result.calibration)}"
    if not result.sparsity and result.bits is None:
        yield widths_table(result)
        yield from widths_remarks(result)


def _calibration(needs: CalibrationFigures) -> str:
    hessians = needs.hessian_memory_bytes
    return (
        f"calibration: {needs.samples} windows of {needs.length} tokens; one decoder layer in "
        f"memory, activations {format_bytes(needs.activation_memory_bytes)} in memory and "
        f"{format_bytes(needs.activation_disk_bytes)} on disk"
        + (f", Hessians {format_bytes(hessians)} at most" if hessians else "")
    )


def _figure(name: str, value: Any) -> str:
    if isinstance(value, PruneResult):
        return f"{format_params(value.base_params)} -> {prune_line(value)}"
    if name == "settings":
        return " ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, Mapping):
        rows = (f"{label} ({format_params(params)})" for label, params in value.items())
        return f"{name}: {', '.join(rows)}"
    if isinstance(value, list):
        return f"{name}: {', '.join(map(str, value))}"
    if name == "params":
        return f"a model of {format_params(int(value))} parameters"
    if name.endswith("_params"):
        of = name.removesuffix("_params").replace("lora", "LoRA")
        return f"{format_params(int(value))} {of} parameters"
    words = name.replace("_", " ")
    counted = any(word.endswith("s") for word in words.split())
    return f"{value:,} {words}" if counted else f"{words} {value:,}"
