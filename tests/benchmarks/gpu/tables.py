"""The results as Markdown, with the bars that the rows are held against."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from loram_cli.units import parse_bytes

from .results import Outcome, Results
from .rows import DERIVED, GROUPS

GIB, MIB = 2**30, 2**20
MOST_13B_BYTES = 16 * GIB
MOST_70B = "12GiB"
LEAST_SPEEDUP = 1.39
MOST_DEVIATION = 0.05
START, END = "<!-- bench-gpu -->", "<!-- /bench-gpu -->"
CPU_DEMO = Path(__file__).with_name("demo_cpu.json")
# Rows of the front page.
HEADLINE = ("b2", "b4", "b6", "b8", "b9", "c1", "c3")
_BASE = "13B LoRA"
_SCORES = (
    ("gsm8k strict", "gsm8k exact_match,strict-match"),
    ("gsm8k flexible", "gsm8k exact_match,flexible-extract"),
    ("perplexity", "perplexity perplexity"),
)


def markdown(results: Results) -> str:
    """All groups that have a row, each as a table.

    Args:
        results: So far.
    """
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    parts = [
        f"{results.card} ({results.card_memory}), driver {results.driver}, {results.date}; "
        f"{versions}. Made by `{results.command}`."
    ]
    for letter, title in GROUPS.items():
        rows = [row for row in results.rows.values() if row.name[0] == letter]
        if letter == DERIVED:
            rows = _trainings(results)
        table = _TABLES[letter](rows) if rows else ""
        if table:
            parts.append(f"{letter}) {title}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def headline(results: Results) -> str:
    """What the front page says: the training rows that a reader chooses between.

    Args:
        results: Of a whole run.
    """

    def cells(row: Outcome) -> list[str]:
        figures = row.figures
        return [
            _amount(figures["predicted_bytes"]),
            _amount(figures["measured_bytes"]),
            f"{_tokens_per_second(row):.0f}",
        ]

    rows = [row for row in _trainings(results) if row.status == "measured"]
    chosen = [row for row in rows if row.name in HEADLINE] or rows
    return (
        f"Training steps on one {results.card}, {results.date}, by `make bench-gpu` "
        "([all of it](loram_cli/docs/memory.md)); 4 x 512 tokens a step, of 70B 1 x 512 in NF4; "
        "x64 is `prune --multiple-of 64`, and compiled `train --compile`:\n\n"
        + _table(chosen, ["predicted peak", "measured", "tokens/s"], cells)
        + "\n"
    )


def write_between(file: Path, text: str) -> bool:
    """Put text between a page's markers; False where the page has none.

    Args:
        file: A Markdown page.
        text: What stands there from now on.
    """
    page = file.read_text("utf-8")
    if START not in page or END not in page:
        return False
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    file.write_text(f"{before}{START}\n{text.strip()}\n{END}{after}", "utf-8")
    return True


def bars(row: Outcome, base: Outcome | None = None) -> list[tuple[str, bool]]:
    """What a training row is held against, and whether it holds.

    Args:
        row: Of b or c, measured.
        base: LoRA on the whole 13B in the same setting, where that was measured.
    """
    found = []
    peak_bytes = row.figures["measured_bytes"]
    saving = row.figures["gradient_checkpointing"]
    if row.name[0] == "b" and "LoRAM" in row.label:
        if saving:
            found.append(("at most 16 GiB", peak_bytes <= MOST_13B_BYTES))
        if base is not None:
            ratio = row.figures["samples_per_second"] / base.figures["samples_per_second"]
            found.append((f"1.39x of LoRA, has {ratio:.2f}x", ratio >= LEAST_SPEEDUP))
    elif row.name[0] == "c":
        memory = row.arguments.get("memory", MOST_70B)
        found.append((f"at most {memory}", peak_bytes <= parse_bytes(memory)))
    return found


def _trainings(results: Results) -> list[Outcome]:
    return [row for row in results.rows.values() if row.name[0] in "bc"]


def _training_table(rows: Sequence[Outcome]) -> str:
    def cells(row: Outcome) -> list[str]:
        figures = row.figures
        kept = bars(row, _base_of(row, rows))
        return [
            _amount(figures["measured_bytes"]),
            f"{figures['samples_per_second']:.2f}",
            f"{_tokens_per_second(row):.0f}",
            "; ".join(f"{bar}: {_word(met)}" for bar, met in kept) or "-",
        ]

    return _table(rows, ["peak", "samples/s", "tokens/s", "bars"], cells)


def _base_of(row: Outcome, rows: Iterable[Outcome]) -> Outcome | None:
    same = [
        other
        for other in rows
        if other.status == "measured"
        and other.name[0] == row.name[0]
        and other.label.split(",")[0] == _BASE
        and other.figures["gradient_checkpointing"] == row.figures["gradient_checkpointing"]
        and other.arguments.get("compile") == row.arguments.get("compile")
    ]
    return same[0] if same else None


def _tokens_per_second(row: Outcome) -> float:
    return row.figures["samples_per_second"] * row.arguments["length"]


def _deviation_table(rows: Sequence[Outcome]) -> str:
    def cells(row: Outcome) -> list[str]:
        figures = row.figures
        off = figures["deviation"]
        known = off is not None
        return [
            _amount(figures["predicted_bytes"]),
            _amount(figures["measured_bytes"]),
            f"{off:+.1%}" if known else "-",
            _word(abs(off) <= MOST_DEVIATION) if known else "not on a CPU",
        ]

    measured = [row for row in rows if row.status == "measured"]
    headers = ["predicted", "measured", "off by", f"within {MOST_DEVIATION:.0%}"]
    return _table(measured, headers, cells) if measured else ""


def _demo_table(rows: Sequence[Outcome]) -> str:
    def cells(row: Outcome) -> list[str]:
        figures = row.figures
        scores = figures["scores"].get("recovered", {})
        told = [_score(scores.get(key), name) for name, key in _SCORES]
        return [*told, f"{figures['training_seconds']:.1f} s", _amount(figures["training_bytes"])]

    if CPU_DEMO.is_file():
        cpu = json.loads(CPU_DEMO.read_text())
        label = f"demo, fp32 on the CPU ({cpu['date']})"
        rows = [
            *rows,
            Outcome(name="a", label=label, status="measured", figures=cpu["figures"]),
        ]
    headers = [*(name for name, _ in _SCORES), "training", "memory"]
    return _table(rows, headers, cells)


def _offload_table(rows: Sequence[Outcome]) -> str:
    whole = next((r for r in rows if r.figures.get("way") == "whole"), None)

    def cells(row: Outcome) -> list[str]:
        figures = row.figures
        same = "-"
        if whole is not None:
            own, other = figures["logits_sum"], whole.figures["logits_sum"]
            same = "the same" if own == other else f"off by {abs(own / other - 1):.0e}"
        return [
            str(figures["layers_that_stay"]),
            f"{figures['first_pass_seconds']:.2f} s",
            f"{figures['scored_tokens_per_second']:.0f}",
            f"{figures['generated_tokens_per_second']:.1f}",
            _amount(figures.get("peak_bytes")),
            same,
        ]

    headers = [
        "layers that stay", "first pass", "scored tokens/s", "generated tokens/s", "peak",
        "logits",
    ]  # fmt: skip
    return _table(rows, headers, cells)


def _peer_table(rows: Sequence[Outcome]) -> str:
    def cells(row: Outcome) -> list[str]:
        figures = row.figures
        return [_amount(figures["measured_bytes"]), f"{figures['samples_per_second']:.2f}"]

    return _table(rows, ["peak", "samples/s"], cells)


def _prune_table(rows: Sequence[Outcome]) -> str:
    def cells(row: Outcome) -> list[str]:
        figures = row.figures
        return [
            str(figures["layers"]),
            f"{figures['seconds_per_layer']:.2f} s",
            _amount(figures.get("peak_bytes")),
        ]

    return _table(rows, ["layers", "a layer", "peak"], cells)


def _stream_table(rows: Sequence[Outcome]) -> str:
    def cells(row: Outcome) -> list[str]:
        figures = row.figures
        decides = "the bus" if figures["bus_decides"] else "computing"
        return [
            _amount(figures.get("streamed_peak_bytes")),
            f"{figures['bus_bytes_per_second'] / 1e9:.1f} GB/s",
            f"{figures['floor_seconds']:.3g} s ({decides})",
            f"{figures['streamed_step_seconds']:.3g} s",
            f"{figures['over_floor']:.2f}",
            f"{figures['full_step_seconds']:.3g} s",
            f"{figures['full_tokens_per_second']:.0f}",
        ]

    headers = [
        "peak", "bus", "floor", "step", "of the floor", "step of all layers", "tokens/s then",
    ]  # fmt: skip
    return _table(rows, headers, cells)


_TABLES: dict[str, Callable[[Sequence[Outcome]], str]] = {
    "a": _demo_table,
    "b": _training_table,
    "c": _training_table,
    "d": _deviation_table,
    "e": _offload_table,
    "f": _peer_table,
    "g": _prune_table,
    "h": _stream_table,
}


def _table(
    rows: Sequence[Outcome], headers: list[str], cells: Callable[[Outcome], list[str]]
) -> str:
    lines = [_line(["row", "", *headers]), _line(["---"] * (len(headers) + 2))]
    for row in rows:
        if row.status == "measured":
            lines.append(_line([row.name, _title(row), *cells(row)]))
        else:
            why = f"{row.status}: {row.why}"
            lines.append(_line([row.name, row.label, why, *["-"] * (len(headers) - 1)]))
    return "\n".join(lines)


def _title(row: Outcome) -> str:
    # The ratio of what memory-report named is known only afterwards.
    named = f" ({row.figures['label']})" if "memory" in row.arguments else ""
    return row.label + named


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _amount(count_bytes: float | None) -> str:
    if count_bytes is None:
        return "-"
    unit, name = (GIB, "GiB") if count_bytes >= GIB else (MIB, "MiB")
    return f"{count_bytes / unit:.2f} {name}"


def _score(value: Any, name: str) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if name == "perplexity" else f"{value:.1%}"


def _word(met: bool) -> str:
    return "met" if met else "missed"
