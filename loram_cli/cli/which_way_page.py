"""The tables of ``loram_cli/docs/which-way.md``, written from ``memory-report --cards`` itself.

``python -m loram_cli.cli.which_way_page`` (``make docs``) writes them; a test compares.
"""

from pathlib import Path

from loram_cli.cli.draw.memory import CARD_COLUMNS, card_rows, step_said
from loram_cli.reporting import NullReporter
from loram_cli.tools import memory_report
from loram_cli.tools.specs import MemoryReportSpec

PAGE = Path(__file__).resolve().parents[1] / "docs" / "which-way.md"
START, END = "<!-- cards -->", "<!-- /cards -->"
PRESETS = ("llama2-7b", "llama2-13b", "llama3.1-70b")
BATCH = 32


def tables() -> str:
    """A table for each preset, with the command that prints it."""
    parts = []
    for preset in PRESETS:
        spec = MemoryReportSpec(preset=preset, cards=True, batches=(BATCH,))
        result = memory_report.run(spec, NullReporter())
        said = step_said(result)
        lines = [
            f"    loram memory-report --preset {preset} --batch {BATCH} --cards",
            "",
            f"{said[0].upper()}{said[1:]}.",
            "",
            _line(CARD_COLUMNS),
            _line(["---"] * len(CARD_COLUMNS)),
            *map(_line, card_rows(result)),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def page(text: str) -> str:
    """The page with its tables as they are now.

    Args:
        text: The page, with or without them.
    """
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{tables()}\n{END}{rest.partition(END)[2]}"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
