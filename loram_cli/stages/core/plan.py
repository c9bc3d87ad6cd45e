"""What a stage will do and what it needs: checked and counted before the first tensor is read."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from loram_cli.errors import LoramError, UsageError
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.runs.staging import existing_parent, look_up, resolved
from loram_cli.schema import Spec, digest_of, plain, settings_of, spec_to_mapping
from loram_cli.stages.core.data_digests import data_records
from loram_cli.training.data.sources import data_files
from loram_cli.units import format_bytes

W = TypeVar("W")

# Of an input's record: where it lies, and what ``verify --full`` compares.
_OUT_OF_KEY = ("path", "files")

# A file up to this size is read through for a dry run, to count what is in it.
_COUNTED_BYTES = 64 * 2**20
# Records of a larger file that a dry run tries.
TRIED_RECORDS = 16


@dataclass(frozen=True, kw_only=True)
class StagePlan(Generic[W]):
    """What a stage will do; every stage has the same kind of plan.

    Attributes:
        stage: Its name.
        reads: Directories and data that it reads.
        writes: The directory that it makes.
        work: What the stage has worked out and will use: opened models, widths.
        inputs: Per input its path and digests, for the manifest.
        base: Identity of the original base, carried along.
        keep: Kept indices, carried along.
        sparsity: Of a model whose single weights were zeroed, carried along.
        done: The same output is there already, and nothing will be done.
        checked: Whether the inputs were there to be checked; else the plan is by arithmetic.
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
    work: W
    inputs: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    keep: Mapping[str, Any] = field(default_factory=dict)
    sparsity: Mapping[str, Any] = field(default_factory=dict)
    done: bool = False
    checked: bool = True
    disk_bytes: int = 0
    free_bytes: int = 0
    memory_bytes: int = 0
    processes: int = 1
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        """Plain form for ``--json``; digests and kept indices are left to the manifest."""
        return {
            "stage": self.stage,
            "reads": list(self.reads),
            "writes": str(self.writes),
            "done": self.done,
            "checked": self.checked,
            "disk_bytes": self.disk_bytes,
            "free_bytes": self.free_bytes,
            "memory_bytes": self.memory_bytes,
            "processes": self.processes,
            "figures": plain(self.figures),
        }


def key_of(stage: str, spec: Spec, inputs: Mapping[str, Any]) -> str:
    """Digest of all that decides a stage's output."""
    return recorded_key(stage, type(spec), spec_to_mapping(spec), inputs)


def recorded_key(
    stage: str, spec: type[Spec], values: Mapping[str, Any], inputs: Mapping[str, Any]
) -> str:
    """As :func:`key_of`, from the plain values that a manifest holds."""
    entering = {
        field.name: values[field.name]
        for field, told in settings_of(spec)
        if field.name in values
        and (told.in_key is True or (told.in_key and values[field.name] != plain(field.default)))
    }
    return digest_of(
        {
            "stage": stage,
            "spec": entering,
            "inputs": {
                label: {k: v for k, v in record.items() if k not in _OUT_OF_KEY}
                for label, record in inputs.items()
            },
        }
    )


def make_plan(
    stage: str,
    spec: Any,
    inputs: Mapping[str, Any],
    work: W,
    *,
    disk_bytes: int,
    reads: Sequence[object],
    **known: Any,
) -> StagePlan[W]:
    """A plan, once it is known that the output is free to be written and that the disk holds it.

    Digests of the data that the spec names join the inputs.

    Raises:
        LoramError: No disk, or another process is writing the output.
        UsageError: The output is something else's.
    """
    inputs = {**inputs, **data_records(spec)}
    done = find_finished(stage, spec, inputs) is not None
    if not done:
        check_free_disk(spec.out, disk_bytes)
    return StagePlan(
        stage=stage,
        writes=spec.out,
        reads=tuple(map(str, reads)),
        work=work,
        inputs=inputs,
        done=done,
        disk_bytes=disk_bytes,
        free_bytes=free_disk(spec.out),
        **known,
    )


def find_finished(stage: str, spec: Any, inputs: Mapping[str, Any]) -> Manifest | None:
    """The manifest of the same stage done before; nothing is created. See :func:`.look_up`."""
    return look_up(spec.out, stage, key_of(stage, spec, inputs), force=spec.force)


def is_done(stage: str, spec: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether the very same output is there, without regard to what else may be in its place."""
    if spec.force or not (spec.out / MANIFEST_NAME).is_file():
        return False
    manifest = Manifest.read(spec.out)
    return manifest.stage == stage and manifest.key == key_of(stage, spec, inputs)


def check_out_of_tree(out: Path, *inputs: Path) -> None:
    """Refuse an output inside, above or equal to an input.

    Raises:
        UsageError: The output would overwrite an input.
    """
    for directory in inputs:
        mine, theirs = resolved(out), resolved(directory)
        if mine == theirs or mine in theirs.parents or theirs in mine.parents:
            raise UsageError(f"--out {out} and the input {directory} overlap", "pass another --out")


def check_free_disk(out: Path, needed_bytes: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        LoramError: Less is free than needed.
    """
    free_bytes = free_disk(out)
    if free_bytes < needed_bytes:
        raise LoramError(
            f"{out}: {format_bytes(needed_bytes)} needed, {format_bytes(free_bytes)} free",
            "free some space, or pass --out on another disk",
        )


def free_disk(out: Path) -> int:
    """Bytes that are free where an output goes."""
    return shutil.disk_usage(existing_parent(out)).free


def reads_quickly(source: str) -> bool:
    """Whether a dry run reads a data source through; a hub data set it does not."""
    files = data_files(source)
    return files is not None and sum(f.stat().st_size for f in files) <= _COUNTED_BYTES
