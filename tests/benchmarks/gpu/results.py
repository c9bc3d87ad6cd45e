"""The results file: written anew after every row, so that a run cut short keeps what it has."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["measured", "failed", "skipped", "left out"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a row.

    Attributes:
        name: Of the row.
        label: Of the row.
        status: ``left out`` where the budget had no time for it.
        why: Why there are no figures, or None.
        figures: What it measured.
        seconds: It took, what was left of its process's start included.
        arguments: How it was measured.
    """

    name: str
    label: str
    status: Status
    why: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Results:
    """All rows of a card on a day.

    Attributes:
        card: Its name; ``cpu`` in a rehearsal.
        driver: Its version.
        card_memory: As the driver tells it.
        date: ISO.
        command: That made the last of it.
        versions: Of Python and libraries.
        rows: By name, in order.
    """

    card: str
    driver: str
    card_memory: str
    date: str
    command: str
    versions: dict[str, str]
    rows: dict[str, Outcome] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """``results-CARD-DATE.json``."""
        card = re.sub(r"[^a-z0-9]+", "-", self.card.lower()).strip("-")
        return f"results-{card}-{self.date}.json"

    def write(self, folder: Path) -> Path:
        """Write all of it, the file before being whole until the new one is.

        Args:
            folder: Where it goes.
        """
        file = folder / self.file_name
        part = file.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        part.replace(file)
        return file

    @classmethod
    def read(cls, file: Path) -> "Results":
        """Read what :meth:`write` wrote.

        Args:
            file: The file.
        """
        data = json.loads(file.read_text())
        rows = {name: Outcome(**row) for name, row in data.pop("rows").items()}
        return cls(**data, rows=rows)

    def take_rows_of(self, file: Path) -> None:
        """Keep the rows that an earlier command of the same day has measured on the same card.

        Args:
            file: Of that one; may be absent.
        """
        if file.is_file():
            self.rows = {**Results.read(file).rows, **self.rows}

    def add(self, outcome: Outcome) -> None:
        """Take a row in, at its place; figures are not given up for a later run's lack of them.

        Args:
            outcome: Of the row.
        """
        before = self.rows.get(outcome.name)
        if before is None or before.status != "measured" or outcome.status == "measured":
            self.rows[outcome.name] = outcome
        self.rows = dict(sorted(self.rows.items(), key=lambda row: (row[0][0], int(row[0][1:]))))
