"""How to train: the settings, and the objectives that there are."""

from dataclasses import dataclass, replace
from typing import Self

from loram_cli.errors import UsageError
from loram_cli.schema import flag, redefined
from loram_cli.stages.train.objectives.objective import OWN_SETTINGS, Objective
from loram_cli.stages.train.objectives.table import OBJECTIVES
from loram_cli.stages.train.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class TrainSpec(TrainSettings):
    """How to train; the defaults are the paper's."""

    objective: str = redefined(TrainSettings, "objective", choices=lambda: OBJECTIVES)

    @property
    def chosen_objective(self) -> Objective:
        """The objective's own file."""
        return OBJECTIVES[self.objective]

    def settled(self) -> Self:
        """With the objective's own settings where they are not given."""
        known = self.chosen_objective.settings(self)
        open_ones = {name: v for name, v in known.items() if getattr(self, name) is None}
        return replace(self, **open_ones) if open_ones else self

    def check(self) -> None:
        """Refuse settings that do not go together.

        Raises:
            UsageError: A setting that the objective does not have, or values that exclude others.
        """
        super().check()
        known = self.chosen_objective.settings(self)
        for name in OWN_SETTINGS:
            if getattr(self, name) is not None and name not in known:
                having = [key for key, other in OBJECTIVES.items() if name in other.settings(self)]
                raise UsageError(
                    f"{flag(self, name)} does not go with --objective {self.objective}",
                    f"it is for {' and '.join(having)}",
                )
        if all(getattr(self, name) is not None for name in known):
            self.chosen_objective.check(self)
        else:
            self.settled()
        self._check_rewards()
        self._check_fsdp()
        self._check_stream()

    def _check_rewards(self) -> None:
        for given, name in (
            (self.reward, "reward"),
            (self.reward_weights, "reward_weights"),
            (self.allow_code_execution, "allow_code_execution"),
        ):
            if given and self.objective != "grpo":
                raise UsageError(
                    f"{flag(self, name)} does not go with --objective {self.objective}",
                    "it is for grpo",
                )

    def _check_fsdp(self) -> None:
        if not self.fsdp:
            return
        if self.objective != "sft":
            raise UsageError(
                f"--fsdp does not go with --objective {self.objective}",
                "launch without it: every process then holds the model whole",
            )
        if self.from_adapter is not None:
            raise UsageError(
                "--fsdp begins a new adapter, and --from-adapter resumes one",
                "launch without --fsdp: every process then holds the model whole",
            )

    def _check_stream(self) -> None:
        if not self.stream:
            if self.offload_activations:
                raise UsageError(
                    "--offload-activations goes with --stream",
                    "to keep fewer activations, pass --gradient-checkpointing",
                )
            return
        if self.objective != "sft":
            raise UsageError(f"--stream does not go with --objective {self.objective}")
        if self.fsdp:
            raise UsageError(
                "--stream does not go with --fsdp",
                "the first is for one GPU, the other for several",
            )
        if self.cross_entropy != "chunked":
            raise UsageError(
                f"--stream does not go with --cross-entropy {self.cross_entropy}",
                "pass --cross-entropy chunked",
            )
