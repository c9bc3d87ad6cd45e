"""What an evaluation needs, checked before the first model is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING

from loram_cli.errors import LoramError
from loram_cli.runs.staging import look_up
from loram_cli.stages.core.lifecycle import free_disk
from loram_cli.stages.core.plan import StagePlan
from loram_cli.stages.evaluate.models import check_row, model_bytes

if TYPE_CHECKING:
    from loram_cli.stages.evaluate.stage import EvalSpec


def plan_eval(spec: "EvalSpec") -> StagePlan:
    """Check every row's model and adapter and every file of data.

    The memory is that of the largest row's weights; rows are scored one after another. Of a model
    that takes more than there is, layers are read anew at every pass.

    Raises:
        LoramError: A model is not whole, an adapter is not one, or a file of data is empty.
        UsageError: The output is something else's.
    """
    from loram_cli.checkpoint.sources import require_tokenizer

    look_up(spec.out, "eval", "", force=True)
    require_tokenizer(spec.model)
    memory_bytes, params = 0, {}
    for label, parts in spec.rows.items():
        index = check_row(parts)
        params[label] = index.num_params
        memory_bytes = max(memory_bytes, model_bytes(spec, parts[0], index))
    for name, file in spec.task_data.items():
        _check_readable(f"--task-data {name}", file)
    return StagePlan(
        stage="eval",
        reads=tuple(dict.fromkeys(str(part) for parts in spec.rows.values() for part in parts)),
        writes=spec.out,
        inputs={},
        free_bytes=free_disk(spec.out),
        memory_bytes=memory_bytes,
        figures={"rows": params, "tasks": list(spec.tasks), "limit": spec.limit},
    )


def _check_readable(flag: str, file: Path) -> None:
    try:
        with file.open("rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise LoramError(f"{flag}: {file} cannot be read ({error.strerror})") from error
    if empty:
        raise LoramError(f"{flag}: {file} is empty")
