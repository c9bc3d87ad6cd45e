"""What every stage does around its work: key, staged directory, meter, manifest."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram_cli.checkpoint.json_files import read_json
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.runs.meter import Meter
from loram_cli.runs.processes import is_main_process, process_count
from loram_cli.runs.staging import StagedDirectory, partial_directory, staged_directory
from loram_cli.schema import plain, spec_to_mapping
from loram_cli.stages.core.card import CARD_NAME, model_card
from loram_cli.stages.core.lineage import whole_files
from loram_cli.stages.core.plan import StagePlan, key_of
from loram_cli.stages.core.results import Result, result_of


@dataclass(frozen=True)
class StageResult:
    """What a stage gives back.

    Attributes:
        stage: Its name.
        read: The directory it read.
        wrote: The directory it wrote.
        manifest: The record in it.
        result: What the stage measured.
        fresh: False when the output was already there and whole.
    """

    stage: str
    read: Path
    wrote: Path
    manifest: Manifest
    result: Result
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
        self,
        planned: StagePlan[Any],
        staged: StagedDirectory,
        key: str,
        spec: Any,
        read: Path,
    ) -> None:
        self._planned, self._staged, self._key = planned, staged, key
        self._spec, self._read = spec, read
        self._meter = Meter()
        self.path = staged.path

    @property
    def finished(self) -> StageResult | None:
        """The result, when the same stage with the same key was done before."""
        if self._staged.finished is None:
            return None
        return self._result(self._staged.finished, fresh=False)

    def restart_meter(self) -> None:
        """Measure from here: called once the libraries are imported."""
        self._meter = Meter()

    def commit(
        self,
        result: Result,
        *,
        keep: Mapping[str, Any] | None = None,
        sparsity: Mapping[str, Any] | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> StageResult:
        """Write card and manifest, and move the directory into place.

        Args:
            result: What the stage measured.
            keep: Kept indices; None carries the plan's along.
            sparsity: Of a model whose single weights were zeroed; None carries the plan's along.
            digests: SHA-256 in hex of files that were hashed while they were written.
        """
        planned, results = self._planned, plain(result)
        card = model_card(
            planned.stage, self._spec, planned.base, results, config=_config(self.path)
        )
        if card is not None:
            (self.path / CARD_NAME).write_text(card, "utf-8")
        measured = self._meter.stop()
        base = planned.base
        if planned.stage == "prune":
            base = {**base, "files": whole_files(Path(base["path"]))}
        manifest = Manifest(
            stage=planned.stage,
            key=self._key,
            spec=spec_to_mapping(self._spec),
            inputs=planned.inputs,
            base=base,
            keep=planned.keep if keep is None else keep,
            sparsity=planned.sparsity if sparsity is None else sparsity,
            results=results,
            wall_seconds=measured.wall_seconds,
            peak_memory_bytes=measured.peak_memory_bytes,
            peak_memory_increase_bytes=measured.peak_memory_increase_bytes,
        )
        manifest = self._staged.commit(manifest, digests)
        if process_count() > 1:
            from loram_cli.training.distributed import wait_for_all

            wait_for_all()
        return self._result(manifest, fresh=True)

    def _result(self, manifest: Manifest, *, fresh: bool) -> StageResult:
        stage, final = self._planned.stage, self._staged.final
        return StageResult(stage, self._read, final, manifest, result_of(manifest), fresh)


def _config(directory: Path) -> Mapping[str, Any] | None:
    """The ``config.json`` of a checkpoint; None of an adapter."""
    file = directory / "config.json"
    return read_json(file) if file.is_file() else None


class FollowingRun:
    """The same stage on a process that is not the first: it computes, and writes nothing."""

    def __init__(self, stage: str, out: Path, read: Path) -> None:
        from loram_cli.training.distributed import share

        self._stage, self._out, self._read = stage, out, read
        self.path = partial_directory(out)
        # Waits until the first process has the directory locked and prepared.
        was_finished = share(None)
        self.finished = self._result(fresh=False) if was_finished else None

    def restart_meter(self) -> None:
        """The first process measures."""

    def commit(self, result: Result, **carried: Any) -> StageResult:
        """Wait until the first process has written the output."""
        from loram_cli.training.distributed import wait_for_all

        wait_for_all()
        return self._result(fresh=True)

    def _result(self, *, fresh: bool) -> StageResult:
        manifest = Manifest.read(self._out)
        return StageResult(self._stage, self._read, self._out, manifest, result_of(manifest), fresh)


@contextmanager
def stage_run(
    planned: StagePlan[Any],
    spec: Any,
    read: Path,
    *,
    resumable: bool = False,
    replace: bool = False,
) -> Iterator[StageRun | FollowingRun]:
    """Open a stage's output directory under its key.

    Args:
        planned: The stage's plan; the digests of its inputs enter the key.
        spec: Its settled spec, with ``out`` and ``force``.
        read: The directory to name as read.
        resumable: Whether unfinished work is kept for the next call.
        replace: Replace an output of the same stage that has another key.
    """
    stage = planned.stage
    key = key_of(stage, spec, planned.inputs)
    force = spec.force or (replace and _is_older(spec.out, stage, key))
    if not is_main_process():
        yield FollowingRun(stage, spec.out, read)
        return
    with staged_directory(spec.out, stage, key, force=force, resumable=resumable) as staged:
        if process_count() > 1:
            from loram_cli.training.distributed import share

            share(staged.finished is not None)
        yield StageRun(planned, staged, key, spec, read)


def _is_older(out: Path, stage: str, key: str) -> bool:
    if not (out / MANIFEST_NAME).is_file():
        return False
    manifest = Manifest.read(out)
    return manifest.stage == stage and manifest.key != key
