"""What ``loram data`` is asked: in a file of its own, since it knows the settings of train."""

from dataclasses import dataclass
from typing import Literal

from loram_cli.errors import UsageError
from loram_cli.schema import Spec, flag, redefined, setting
from loram_cli.stages.train.settings import TrainSettings
from loram_cli.stages.train.spec import TrainSpec
from loram_cli.training.choices import Exhausted


@dataclass(frozen=True, kw_only=True)
class DataSpec(Spec):
    """Which data to look at, and as which training would read it."""

    data: str = setting(
        help="What training would be given as --data: a file, a folder, a data set id, or several "
        "with weights.",
        argument=True,
    )
    objective: str = redefined(TrainSpec, "objective")
    max_length: int = redefined(TrainSettings, "max_length")
    loss_on: Literal["answer", "all"] = redefined(TrainSettings, "loss_on")
    train_on: Literal["all", "last"] = redefined(TrainSettings, "train_on")
    chat_template: str | None = redefined(TrainSettings, "chat_template")
    reward: tuple[str, ...] = redefined(TrainSettings, "reward")
    exhausted: Exhausted = redefined(TrainSettings, "exhausted")
    seed: int = redefined(TrainSettings, "seed")
    rows: int = setting(3, flag="-n", help="Rows to show.", at_least=0)
    limit: int | None = setting(
        None, help="Read the first records only.", default_text="all, as training does", at_least=1
    )

    def check(self) -> None:
        """Refuse what training would.

        Raises:
            UsageError: Rewards for an objective that has none.
        """
        if self.reward and self.objective != "grpo":
            raise UsageError(
                f"{flag(self, 'reward')} does not go with --objective {self.objective}",
                "it is for grpo",
            )
