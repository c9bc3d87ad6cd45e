"""What a stage would do and what it needs: checked and counted before the first tensor is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loram_cli.checkpoint.model import Model
from loram_cli.reporting import Reporter
from loram_cli.runs.manifest import Manifest
from loram_cli.runs.staging import look_up
from loram_cli.schema import spec_to_mapping
from loram_cli.stages.core.lifecycle import check_free_disk, free_disk, key_of

if TYPE_CHECKING:
    from loram_cli.arch.spec import Family
    from loram_cli.checkpoint.index import CheckpointIndex

# A file up to this size is read through for a dry run, to count what is in it.
_COUNTED_BYTES = 64 * 2**20
_TRIED_RECORDS = 16


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What a stage will do.

    Attributes:
        stage: Its name.
        reads: Directories and data that it reads.
        writes: The directory that it makes.
        inputs: Per input its path and digests, for the manifest.
        base: Identity of the original base, carried along.
        keep: Kept indices, carried along.
        sparsity: Of a model whose single weights were zeroed, carried along.
        done: The same output is there already, and nothing will be done.
        disk_bytes: Disk that it needs at most while it runs.
        free_bytes: Disk that is free.
        memory_bytes: Memory that it takes at its peak, by arithmetic; for align without
            activations.
        processes: That work on it together; the memory is that of each.
        figures: What else is known: steps, tokens, parameters.
    """

    stage: str
    reads: tuple[str, ...]
    writes: Path
    inputs: Mapping[str, Any]
    base: Mapping[str, Any] = field(default_factory=dict)
    keep: Mapping[str, Any] = field(default_factory=dict)
    sparsity: Mapping[str, Any] = field(default_factory=dict)
    done: bool = False
    disk_bytes: int = 0
    free_bytes: int = 0
    memory_bytes: int = 0
    processes: int = 1
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def carried(self) -> dict[str, Any]:
        """What the output's manifest takes over from the input's."""
        return {"base": self.base, "keep": self.keep, "sparsity": self.sparsity}

    def to_mapping(self) -> dict[str, Any]:
        """Plain form for ``--json``; digests and kept indices are left to the manifest."""
        return {
            "stage": self.stage,
            "reads": list(self.reads),
            "writes": str(self.writes),
            "done": self.done,
            "disk_bytes": self.disk_bytes,
            "free_bytes": self.free_bytes,
            "memory_bytes": self.memory_bytes,
            "processes": self.processes,
            **self.figures,
        }


def find_finished(stage: str, spec: Any, inputs: Mapping[str, Any]) -> Manifest | None:
    """The manifest of the same stage done before; nothing is created. See :func:`.look_up`."""
    key = key_of(stage, spec_to_mapping(spec), inputs)
    return look_up(spec.out, stage, key, force=spec.force)


def make_plan(
    stage: str, spec: Any, inputs: Mapping[str, Any], *, disk_bytes: int, **known: Any
) -> StagePlan:
    """A plan, once it is known that the output is free to be written and that the disk holds it.

    Args:
        stage: The stage.
        spec: Its spec, with ``out`` and ``force``.
        inputs: As :func:`.common.stage_run` takes them.
        disk_bytes: See :class:`StagePlan`.
        known: More fields of the plan.

    Raises:
        LoramError: No disk, or another process is writing the output.
        UsageError: The output is something else's.
    """
    done = find_finished(stage, spec, inputs) is not None
    if not done:
        check_free_disk(spec.out, disk_bytes)
    return StagePlan(
        stage=stage,
        writes=spec.out,
        inputs=inputs,
        done=done,
        disk_bytes=disk_bytes,
        free_bytes=free_disk(spec.out),
        **known,
    )


def check_model(
    directory: Path | Model, *, tokenizer: bool = True
) -> tuple[Mapping[str, Any], "Family", "CheckpointIndex"]:
    """Check that a directory is a whole model: config, headers, every shape.

    Args:
        directory: The model.
        tokenizer: Whether it needs a tokenizer.

    Returns:
        Its config, family and tensor index.

    Raises:
        LoramError: It is not.
    """
    model = Model.of(directory)
    model.check_whole(tokenizer=tokenizer)
    return model.config, model.family, model.index


def count_examples(source: str, load: Callable[..., Sequence[Any]]) -> int | None:
    """Examples in a source; None where counting would mean reading a lot.

    Args:
        source: A file, a folder, ``demo:NAME`` or a hub id.
        load: Reads a source, with a ``limit``.

    Raises:
        LoramError: It cannot be read; a source that is not counted is tried on its first records.
    """
    whole = _is_small(source)
    examples = load(source, limit=None if whole else _TRIED_RECORDS)
    return len(examples) if whole else None


def count_documents(source: str, reporter: Reporter) -> int | None:
    """Documents in a source of text; as :func:`count_examples`."""
    from loram_cli.training.data.documents import load_text

    return count_examples(source, partial(load_text, reporter=reporter))


def _is_small(source: str) -> bool:
    from loram_cli.training.data.records import DEMO_PREFIX, local_files

    if source.startswith(DEMO_PREFIX):
        return True
    files = local_files(source)
    return files is not None and sum(f.stat().st_size for f in files) <= _COUNTED_BYTES
