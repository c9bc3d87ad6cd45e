"""What was left out, changed or not used while data was read: counted, and told once."""

from dataclasses import dataclass, field

from loram_cli.errors import LoramError
from loram_cli.reporting import Reporter


class UnusableRecord(LoramError):
    """A record with nothing to learn in it; the file's others may do."""

    def __init__(self, where: str, reason: str, hint: str | None = None) -> None:
        self.where, self.reason = where, reason
        super().__init__(f"{where}: {reason}", hint)


@dataclass
class Count:
    """How often something happened.

    Attributes:
        number: Records, or messages.
        first: The place of the first.
        last: The place of the last, which is not counted again.
    """

    number: int
    first: str
    last: str = ""


@dataclass
class Tally:
    """Counts by what happened.

    Attributes:
        left_out: Records that teach nothing, by the reason.
        changed: What was read differently from how it stands there, such as a number as text.
        unused: Fields that nothing was done with.
    """

    left_out: dict[str, Count] = field(default_factory=dict)
    changed: dict[str, Count] = field(default_factory=dict)
    unused: dict[str, Count] = field(default_factory=dict)

    def leave_out(self, record: UnusableRecord) -> None:
        """Count a record that teaches nothing."""
        _add(self.left_out, record.reason, record.where)

    def change(self, what: str, where: str) -> None:
        """Count something that was read differently."""
        _add(self.changed, what, where)

    def leave_unused(self, name: str, where: str) -> None:
        """Count a field that nothing was done with."""
        _add(self.unused, name, where)

    def lines(self) -> list[str]:
        """One line for each kind of thing that happened."""
        lines = [
            f"{count.number} left out: {reason} (the first: {count.first})"
            for reason, count in self.left_out.items()
        ]
        lines += [
            f"{what} ({count.number} times, the first: {count.first})"
            for what, count in self.changed.items()
        ]
        if self.unused:
            names = ", ".join(f"{name} ({count.number})" for name, count in self.unused.items())
            lines.append(f"fields not used, and in how many records: {names}")
        return lines

    def tell(self, source: str, reporter: Reporter) -> None:
        """Warn of everything that was counted."""
        for line in self.lines():
            reporter.warn(f"{source}: {line}")

    def nothing_left(self, source: str, what: str, hint: str) -> LoramError:
        """The error where no record is left: what was wrong with the first."""
        if not self.left_out:
            return LoramError(f"{source}: no {what} in it", hint)
        reason, count = next(iter(self.left_out.items()))
        total = sum(c.number for c in self.left_out.values())
        return LoramError(
            f"{source}: no {what} in it, {total} left out; {count.first}: {reason}", hint
        )


def _add(counts: dict[str, Count], key: str, where: str) -> None:
    known = counts.setdefault(key, Count(0, where))
    if known.last != where:
        known.number += 1
        known.last = where
