"""A reporter that keeps what it is warned of."""

from loram_cli.reporting import NullReporter


class Listening(NullReporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, line: str) -> None:
        self.warnings.append(line)
