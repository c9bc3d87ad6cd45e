"""What every stage does around its work: key, staged directory, meter, manifest."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_cli.errors import LoramError, UsageError
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.runs.meter import Meter
from loram_cli.runs.processes import is_main_process, process_count
from loram_cli.runs.staging import StagedDirectory, partial_directory, staged_directory
from loram_cli.schema import digest_of, spec_to_mapping
from loram_cli.stages.core.card import CARD_NAME, model_card

# Fields that say where things lie or how fast to go, not what comes out.
_NOT_IN_KEY = (
    "model", "source", "adapter", "out", "force", "device", "fsdp", "calibration_memory_bytes",
    "plan", "report_to", "from_adapter",
    # Of eval: the inputs hold the digests of rows and data.
    "rows", "task_data", "batch_size", "weights_memory", "replace",
)  # fmt: skip


@dataclass(frozen=True)
class StageResult:
    """What a stage gives back to the CLI.

    Attributes:
        stage: Its name.
        read: The directory it read.
        wrote: The directory it wrote.
        manifest: The record in it.
        fresh: False when the output was already there and whole.
    """

    stage: str
    read: Path
    wrote: Path
    manifest: Manifest
    fresh: bool

    def to_mapping(self) -> dict[str, Any]:
        """Plain form for ``--json``."""
        return {
            "stage": self.stage,
            "read": str(self.read),
            "wrote": str(self.wrote),
            "fresh": self.fresh,
            "results": dict(self.manifest.results),
            "wall_seconds": self.manifest.wall_seconds,
            "peak_memory_bytes": self.manifest.peak_memory_bytes,
            "peak_memory_increase_bytes": self.manifest.peak_memory_increase_bytes,
        }


class StageRun:
    """A stage under way: write into :attr:`path`, then call :meth:`commit`."""

    def __init__(
        self, name: str, staged: StagedDirectory, record: Mapping[str, Any], read: Path
    ) -> None:
        self._name = name
        self._staged = staged
        self._record = record
        self._read = read
        self._meter = Meter()
        self.path = staged.path

    @property
    def finished(self) -> StageResult | None:
        """The result, when the same stage with the same key was done before."""
        manifest = self._staged.finished
        if manifest is None:
            return None
        return StageResult(self._name, self._read, self._staged.final, manifest, fresh=False)

    def restart_meter(self) -> None:
        """Measure from here: called once the libraries are imported."""
        self._meter = Meter()

    def commit(
        self,
        results: Mapping[str, Any],
        *,
        base: Mapping[str, Any],
        keep: Mapping[str, Any],
        sparsity: Mapping[str, Any] | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> StageResult:
        """Write card and manifest, and move the directory into place.

        Args:
            results: What the stage measured.
            base: Identity of the original base.
            keep: Kept indices.
            sparsity: Of a model whose single weights were zeroed.
            digests: SHA-256 in hex of files that were hashed while they were written.
        """
        card = model_card(self._name, self._record["spec"], base, results)
        if card is not None:
            (self.path / CARD_NAME).write_text(card, "utf-8")
        manifest = Manifest(
            **self._record,
            base=base,
            keep=keep,
            sparsity=sparsity or {},
            results=results,
            **self._meter.stop(),
        )
        manifest = self._staged.commit(manifest, digests)
        if process_count() > 1:
            from loram_cli.training.distributed import wait_for_all

            wait_for_all()
        return StageResult(self._name, self._read, self._staged.final, manifest, fresh=True)


class FollowingRun:
    """The same stage on a process that is not the first: it computes, and writes nothing."""

    def __init__(self, name: str, out: Path, read: Path) -> None:
        from loram_cli.training.distributed import share

        self._name, self._out, self._read = name, out, read
        self.path = partial_directory(out)
        # Waits until the first process has the directory locked and prepared.
        was_finished = share(None)
        self.finished = self._result(fresh=False) if was_finished else None

    def restart_meter(self) -> None:
        """The first process measures."""

    def commit(self, results: Mapping[str, Any], **carried: Any) -> StageResult:
        """Wait until the first process has written the output."""
        from loram_cli.training.distributed import wait_for_all

        wait_for_all()
        return self._result(fresh=True)

    def _result(self, *, fresh: bool) -> StageResult:
        return StageResult(self._name, self._read, self._out, Manifest.read(self._out), fresh)


@contextmanager
def stage_run(
    name: str,
    spec: Any,
    inputs: Mapping[str, Any],
    read: Path,
    *,
    resumable: bool = False,
    replace: bool = False,
) -> Iterator[StageRun | FollowingRun]:
    """Open a stage's output directory under its key.

    Args:
        name: The stage.
        spec: Its spec, with ``out`` and ``force``.
        inputs: Per input a mapping with ``path`` and digests; the digests enter the key.
        read: The directory to name as read.
        resumable: Whether unfinished work is kept for the next call.
        replace: Replace an output of the same stage that has another key.
    """
    plain = spec_to_mapping(spec)
    key = key_of(name, plain, inputs)
    record = {"stage": name, "key": key, "spec": plain, "inputs": inputs}
    force = spec.force or (replace and _is_older(spec.out, name, key))
    if not is_main_process():
        yield FollowingRun(name, spec.out, read)
        return
    with staged_directory(spec.out, name, key, force=force, resumable=resumable) as staged:
        if process_count() > 1:
            from loram_cli.training.distributed import share

            share(staged.finished is not None)
        yield StageRun(name, staged, record, read)


def key_of(stage: str, spec: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Digest of all that decides a stage's output.

    Args:
        stage: Its name.
        spec: The plain spec; what only says where or how fast does not enter.
        inputs: As for :func:`stage_run`; paths do not enter.
    """
    return digest_of(
        {
            "stage": stage,
            "spec": {k: v for k, v in spec.items() if k not in _NOT_IN_KEY},
            "inputs": {
                label: {k: v for k, v in record.items() if k != "path"}
                for label, record in inputs.items()
            },
        }
    )


def _is_older(out: Path, name: str, key: str) -> bool:
    if not (out / MANIFEST_NAME).is_file():
        return False
    manifest = Manifest.read(out)
    return manifest.stage == name and manifest.key != key


def check_out_of_tree(out: Path, *inputs: Path) -> None:
    """Refuse an output inside, above or equal to an input.

    Raises:
        UsageError: The output would overwrite an input.
    """
    for directory in inputs:
        mine, theirs = out.resolve(), directory.resolve()
        if mine == theirs or mine in theirs.parents or theirs in mine.parents:
            raise UsageError(f"--out {out} and the input {directory} overlap", "pass another --out")


def check_free_disk(out: Path, needed_bytes: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        LoramError: Less is free than needed.
    """
    from loram_cli.units import format_bytes

    free_bytes = free_disk(out)
    if free_bytes < needed_bytes:
        raise LoramError(
            f"{out}: {format_bytes(needed_bytes)} needed, {format_bytes(free_bytes)} free",
            "free some space, or pass --out on another disk",
        )


def free_disk(out: Path) -> int:
    """Bytes that are free where an output goes."""
    import shutil

    place = out.parent
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def settle_amount(spec: Any, name: str, parse: Callable[[str], int]) -> None:
    """Turn an amount that is written with a unit into a number.

    Args:
        spec: Just built; changed in place.
        name: The field, whose flag is of the same name.
        parse: Reads the text.

    Raises:
        UsageError: The text is no amount.
    """
    value = getattr(spec, name)
    if isinstance(value, str):
        try:
            object.__setattr__(spec, name, parse(value))
        except UsageError as error:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag}: {error.message}", error.hint) from error


def check_positive(spec: Any, *names: str) -> None:
    """Refuse numbers that must be above zero and are not.

    Raises:
        UsageError: One is not.
    """
    for name in names:
        if getattr(spec, name) <= 0:
            raise UsageError(f"--{name.replace('_', '-')} must be above 0")
