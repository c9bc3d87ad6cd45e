"""How to align: the settings, and the methods that there are."""

from dataclasses import dataclass

from loram_cli.errors import UsageError
from loram_cli.schema import redefined
from loram_cli.stages.align.methods.table import METHODS
from loram_cli.stages.align.settings import AlignSettings


@dataclass(frozen=True, kw_only=True)
class AlignSpec(AlignSettings):
    """How to align; methods work in the order in which they are named."""

    method: tuple[str, ...] = redefined(AlignSettings, "method", choices=lambda: METHODS)

    def check(self) -> None:
        """Refuse no method, or one that is named twice.

        Raises:
            UsageError: See above; also a batch that does not divide.
        """
        super().check()
        if not self.method or len(set(self.method)) != len(self.method):
            raise UsageError("--method: expected one or more methods, each once")
        if self.trained == "lora" and self.fsdp:
            raise UsageError(
                "--trained lora does not go with --fsdp: factors are merged in one process",
                "pass --trained norms or all",
            )
        if self.trained != "all" and self.train_lm_head:
            raise UsageError(f"--train-lm-head does not go with --trained {self.trained}")
