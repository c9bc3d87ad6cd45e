"""What an evaluation found: scores, what rows cost to train, answers."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from loram_cli.evaluation.requests import TaskScore


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """What an adapter cost to train.

    Attributes:
        trained_on_params: Parameters of the model that it was trained on.
        lora_params: Trained parameters.
        layout: Of the data that it learnt from.
        peak_memory_bytes: Highest memory while it was trained.
        peak_memory_increase_bytes: The same, less what was in use when training began.
        wall_seconds: Time of the training.
    """

    trained_on_params: int | None = None
    lora_params: int | None = None
    layout: str | None = None
    peak_memory_bytes: int = 0
    peak_memory_increase_bytes: int = 0
    wall_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """A model's scores.

    Attributes:
        scores: Of all tasks.
        training: What it cost to train; None for a model that was not trained here.
        chat: Whether lm-eval's tasks were asked as messages, by its chat template.
    """

    scores: tuple[TaskScore, ...] = ()
    training: TrainingCost | None = None
    chat: bool = False

    def find(self, task: str, metric: str) -> TaskScore | None:
        """The score of a task by a metric, or None."""
        return next((s for s in self.scores if (s.task, s.metric) == (task, metric)), None)


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Several models on the same tasks, in the order of the comparison.

    Attributes:
        bundled: Whether any documents are a bundled sample, and no benchmark.
        quantize: ``nf4`` where weights were held in 4 bits.
        rows: By name.
    """

    bundled: bool = False
    quantize: str | None = None
    rows: Mapping[str, RowResult] = field(default_factory=dict)

    def scores(self) -> Iterator[TaskScore]:
        """Every score of every row."""
        for row in self.rows.values():
            yield from row.scores


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a row wrote.

    Attributes:
        row: Its name.
        prompt: As it was asked for.
        rendered: What the model was given.
        text: What it wrote.
    """

    row: str
    prompt: str
    rendered: str
    text: str

    def to_mapping(self) -> dict[str, str]:
        """Plain form for ``--json``."""
        return asdict(self)
