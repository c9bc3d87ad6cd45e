"""The table of objectives: each one is a file and a line here."""

from loram_cli.stages.train.objectives import dpo, grpo, kto, orpo, sft
from loram_cli.stages.train.objectives.objective import Objective

OBJECTIVES: dict[str, Objective] = {
    "sft": sft.OBJECTIVE,
    "dpo": dpo.OBJECTIVE,
    "orpo": orpo.OBJECTIVE,
    "kto": kto.OBJECTIVE,
    "grpo": grpo.OBJECTIVE,
}


def beyond_sft() -> tuple[str, ...]:
    """Those that resume from supervised tuning, in the order in which a run would have them."""
    return tuple(name for name, objective in OBJECTIVES.items() if objective.follows_sft)
