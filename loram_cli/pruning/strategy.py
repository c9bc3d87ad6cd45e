"""What a pruning strategy says of itself; one file each, and one line in :mod:`.strategies`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loram_cli.arch.spec import LayerGeometry
from loram_cli.pruning.groups import LayerKeep

if TYPE_CHECKING:
    from loram_cli.pruning.scores import LayerScores


@dataclass(frozen=True)
class LayerToPrune:
    """One layer whose groups a strategy chooses among.

    Attributes:
        index: Its place.
        before: Its widths.
        after: How many groups stay.
        scores: Group scores, higher for what matters more; None for a strategy without importances.
        seed: The run's seed.
    """

    index: int
    before: LayerGeometry
    after: LayerGeometry
    scores: "LayerScores | None"
    seed: int


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a small model is made: groups or layers dropped, weights zeroed, factored or rounded.

    Attributes:
        summary: A few words for the help text.
        ratio: Share of groups or weights that goes, unless told; None where none does.
        paper_ratios: Those that a memory report works out unless told.
        importances: How groups or weights may be ranked or rounded, the default first; empty where
            they are not ranked.
        keep: Chooses the groups of a layer that stay; None for a strategy that drops no groups.
        drops_layers: Whole decoder layers go, and the others stay as they are.
        factors_linears: Linears become two factors, and the shapes outside stay whole.
        zeros_in_four: Zeroes so many in every four weights of a row (2:4); 0 for anywhere.
        rounds: Rounds the weights of the decoder linears to few bits; shapes stay.
    """

    summary: str
    ratio: float | None
    paper_ratios: tuple[float, ...]
    importances: tuple[str, ...] = ()
    keep: Callable[[LayerToPrune], LayerKeep] | None = None
    drops_layers: bool = False
    factors_linears: bool = False
    zeros_in_four: int = 0
    rounds: bool = False

    @property
    def zeroes_weights(self) -> bool:
        """Whether single weights become zero, and shapes and memory stay."""
        others = self.drops_layers or self.factors_linears or self.rounds
        return self.keep is None and not others

    @property
    def only_ratio(self) -> float | None:
        """The one ratio that the pattern allows, or None."""
        return self.zeros_in_four / 4 if self.zeros_in_four else None
