"""What a method of alignment says of itself, and what it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loram_cli.checkpoint.model import Model
from loram_cli.reporting import Reporter
from loram_cli.stages.align.settings import AlignSettings
from loram_cli.stages.core.results import MethodResult

if TYPE_CHECKING:
    from loram_cli.training.data.tokens import TokenRow


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """One method's work.

    Attributes:
        spec: How to align.
        method: The method's name.
        source: The model to read.
        out: The directory to write into.
        base: The full model; None where no method needs it.
        device: Where this process works.
        pruned_layers: Indices of the layers that are narrower than the base's.
        sparse: Whether pruning zeroed single weights, which must stay zero.
        train_rows: Packed text.
        eval_rows: Packed text held out.
    """

    spec: AlignSettings
    method: str
    source: Model
    out: Path
    base: Model | None
    device: str
    pruned_layers: tuple[int, ...]
    sparse: bool
    train_rows: "list[TokenRow]"
    eval_rows: "list[TokenRow]"

    @property
    def full_model(self) -> Model:
        """The full model, of a method that needs it."""
        assert self.base is not None
        return self.base


@dataclass(frozen=True)
class Needs:
    """What a method takes at most, activations aside."""

    disk_bytes: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of alignment.

    Attributes:
        act: Reads a model directory and writes another.
        needs: What it takes, from the spec, the pruned model and the full one.
        uses_base: Whether it reads the full model.
        fills_zeros: Whether it would fill the zeros of a sparse model.
        fits_layers: Whether it fits narrowed layers, one by one, to the full model's.
        several_processes: Whether processes can share its work.
        takes_steps: Whether it trains by optimizer steps.
    """

    act: Callable[[Alignment, Reporter], MethodResult]
    needs: Callable[[AlignSettings, Model, Model | None], Needs]
    uses_base: bool = False
    fills_zeros: bool = False
    fits_layers: bool = False
    several_processes: bool = False
    takes_steps: bool = True
