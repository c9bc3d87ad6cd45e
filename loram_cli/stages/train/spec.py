"""How to train: the settings, and the objectives that there are."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from loram_cli.arch.experts import EXPERTS_TARGET
from loram_cli.errors import UsageError
from loram_cli.schema import flag, redefined
from loram_cli.stages.train.objectives.objective import OWN_SETTINGS, Objective
from loram_cli.stages.train.objectives.table import OBJECTIVES
from loram_cli.stages.train.settings import EPOCHS, SFT_RATE, TrainSettings


@dataclass(frozen=True, kw_only=True)
class TrainSpec(TrainSettings):
    """How to train."""

    objective: str = redefined(TrainSettings, "objective", choices=lambda: OBJECTIVES)

    @property
    def chosen_objective(self) -> Objective:
        """The objective's own file."""
        return OBJECTIVES[self.objective]

    def settled(self) -> Self:
        """With the objective's own settings where they are not given."""
        # An objective that names no rate learns at that of supervised tuning.
        known = {"learning_rate": SFT_RATE, **self.chosen_objective.settings(self)}
        if EXPERTS_TARGET in self.targets:
            known = {**known, "dropout": 0.0}
        open_ones = {name: v for name, v in known.items() if getattr(self, name) is None}
        if self.steps is None and self.epochs is None:
            open_ones["epochs"] = EPOCHS
        return replace(self, **open_ones) if open_ones else self

    def steps_for(self, examples: int) -> int:
        """Optimizer steps: those asked for, or as many as the epochs take; a part counts whole."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or EPOCHS) * examples / self.batch))

    def check(self) -> None:
        """Refuse settings that do not go together.

        Raises:
            UsageError: A setting that the objective does not have, or values that exclude others.
        """
        super().check()
        # An objective that names no rate learns at that of supervised tuning.
        known = {"learning_rate": SFT_RATE, **self.chosen_objective.settings(self)}
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
        self._check_length()
        self._check_rewards()
        self._check_fsdp()
        self._check_stream()
        self._check_compile()
        self._check_experts()

    def _check_experts(self) -> None:
        if EXPERTS_TARGET not in self.targets:
            return
        if self.dropout:
            raise UsageError(
                "--targets experts goes without --dropout: factors of experts are added to the "
                "weights",
                "pass --dropout 0",
            )
        for name in ("fsdp", "stream", "quantize"):
            if getattr(self, name):
                raise UsageError(f"--targets experts does not go with {flag(self, name)}")

    def _check_length(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UsageError(
                f"--steps {self.steps} and --epochs {self.epochs:g} both say how long to train",
                "pass one of the two",
            )
        if self.early_stopping is not None and not (self.eval_data or self.eval_examples):
            raise UsageError(
                "--early-stopping needs held-out data, and --eval-examples is 0",
                "hold some out, or pass --eval-data",
            )
        if self.score_recovered and self.objective != "sft":
            raise UsageError(f"--score-recovered does not go with --objective {self.objective}")
        if self.score_recovered and not (self.eval_data or self.eval_examples):
            raise UsageError(
                "--score-recovered needs held-out data, and --eval-examples is 0",
                "hold some out, or pass --eval-data",
            )
        if self.score_recovered and self.fsdp:
            raise UsageError(
                "--score-recovered does not go with --fsdp",
                "recover the checkpoints afterwards: loram recover --checkpoint N",
            )
        if self.packing == "on" and self.objective != "sft":
            raise UsageError(f"--packing on does not go with --objective {self.objective}")

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

    def _check_compile(self) -> None:
        if not self.compile:
            return
        if self.objective != "sft":
            raise UsageError(f"--compile does not go with --objective {self.objective}")
        for name in ("fsdp", "stream"):
            if getattr(self, name):
                raise UsageError(f"--compile does not go with {flag(self, name)}")


@dataclass(frozen=True, kw_only=True)
class PolishSpec(TrainSpec):
    """How to go on training a recovered adapter on the full model itself.

    It is a training like others, and its output is one: only defaults differ.
    """

    source: Path = redefined(TrainSpec, "source", help="Model directory, not the run's base.")
    from_adapter: Path | None = redefined(
        TrainSpec,
        "from_adapter",
        help="The adapter to go on from.",
        default_text="the run's recovered one",
    )
    data: str = redefined(
        TrainSpec, "data", help="Instructions, not those that the adapter learnt from."
    )
    steps: int | None = redefined(TrainSpec, "steps", 10)
    warmup_steps: int | None = redefined(TrainSpec, "warmup_steps", 0, default_text="0")
    batch: int = redefined(TrainSpec, "batch", help="Examples per step.")
    # A step on a model that comes and goes takes long, and a checkpoint little.
    save_steps: int = redefined(TrainSpec, "save_steps", 1)
    stream: bool = redefined(
        TrainSpec,
        "stream",
        True,
        help="Bring the frozen layers one by one, twice a step (the default); --no-stream holds "
        "the full model: the same result.",
    )
    # Supervised only: these are no flags here.
    objective: str = redefined(TrainSpec, "objective", flag="")
    beta: float | None = redefined(TrainSpec, "beta", flag="")
    generations: int | None = redefined(TrainSpec, "generations", flag="")
    max_completion_length: int | None = redefined(TrainSpec, "max_completion_length", flag="")
    temperature: float | None = redefined(TrainSpec, "temperature", flag="")
    reward: tuple[str, ...] = redefined(TrainSpec, "reward", flag="")
    reward_weights: tuple[float, ...] = redefined(TrainSpec, "reward_weights", flag="")
    allow_code_execution: bool = redefined(TrainSpec, "allow_code_execution", flag="")
    fsdp: bool = redefined(TrainSpec, "fsdp", flag="")
    # A few steps do not earn what compiling takes.
    compile: bool = redefined(TrainSpec, "compile", flag="")
    # Its held-out loss is the full model's already.
    score_recovered: bool = redefined(TrainSpec, "score_recovered", flag="")

    def check(self) -> None:
        """Refuse another objective than supervised training.

        Raises:
            UsageError: It is another one.
        """
        if self.objective != "sft":
            raise UsageError(
                f"polish: objective {self.objective} is not supported, sft only",
                "pass it to 'loram train --on full --from-adapter DIR'",
            )
        super().check()
