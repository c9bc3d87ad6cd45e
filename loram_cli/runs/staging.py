"""Output directories that are either whole or not there."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from loram_cli.errors import LoramError, UsageError
from loram_cli.runs.digests import file_records
from loram_cli.runs.lock import exclusive_lock, refuse_if_held
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest

_KEY_NAME = "loram-key"
# Folders of what an interrupted stage goes on from; they go when the output is whole.
SCRATCH_NAMES = ("checkpoints", "fitted", "methods")


class StagedDirectory:
    """A directory being filled beside its final place.

    Attributes:
        path: Where to write.
        final: Where :meth:`commit` puts it.
        finished: The manifest, if the same stage with the same key is already done.
    """

    def __init__(self, path: Path, final: Path, finished: Manifest | None) -> None:
        self.path = path
        self.final = final
        self.finished = finished
        self.committed = False

    def commit(self, manifest: Manifest, digests: Mapping[str, str] | None = None) -> Manifest:
        """Flush all files, write the manifest, flush again, and move into place.

        What an interrupted stage goes on from is kept until nothing but the move is left to do.

        Args:
            manifest: The record.
            digests: SHA-256 in hex by file name, of files that need not be read again for it.

        Returns:
            The manifest as written: with the digests of the files beside it.
        """
        sync_tree(self.path)
        leave_out = (MANIFEST_NAME, _KEY_NAME, *SCRATCH_NAMES)
        manifest = replace(
            manifest, outputs=file_records(self.path, leave_out=leave_out, known=digests)
        )
        manifest.write(self.path)
        # The key first: nobody shall go on from what is half removed.
        (self.path / _KEY_NAME).unlink(missing_ok=True)
        for name in SCRATCH_NAMES:
            shutil.rmtree(self.path / name, ignore_errors=True)
        sync_tree(self.path)
        retired = _beside(self.final, "old")
        shutil.rmtree(retired, ignore_errors=True)
        if self.final.exists():
            self.final.rename(retired)
        self.path.rename(self.final)
        sync(self.final.parent)
        shutil.rmtree(retired, ignore_errors=True)
        self.committed = True
        return manifest


@contextmanager
def staged_directory(
    final: Path, stage: str, key: str, *, force: bool = False, resumable: bool = False
) -> Iterator[StagedDirectory]:
    """Fill a directory aside and move it into place on commit.

    Args:
        final: The output directory.
        stage: Name of the stage.
        key: Digest of everything that decides the output.
        force: Replace an output made with another key, or redo one with the same.
        resumable: Keep unfinished work of the same key for the next call.

    Raises:
        LoramError: Another process is writing it, or the place cannot be written.
        UsageError: ``final`` exists, is not this stage's output with this key, and not ``force``.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoramError(f"{final.parent}: cannot be created ({error.strerror})") from error
    with exclusive_lock(_beside(final, "lock"), final):
        retired = _beside(final, "old")
        if retired.exists() and not final.exists():
            retired.rename(final)  # killed between the two renames of a commit
        finished = _finished(final, stage, key, force)
        work = partial_directory(final)
        if finished is not None:
            yield StagedDirectory(work, final, finished)
            return
        _prepare(work, key, resumable)
        staged = StagedDirectory(work, final, None)
        try:
            yield staged
        except OSError as error:
            if error.filename is None and error.errno is None:
                raise
            raise LoramError(f"{error.filename or final}: {error.strerror}") from error
        finally:
            if not staged.committed and not (resumable and _holds_work(work)):
                shutil.rmtree(work, ignore_errors=True)


def look_up(final: Path, stage: str, key: str, *, force: bool = False) -> Manifest | None:
    """What :func:`staged_directory` would find; nothing is created.

    Returns:
        The manifest, if the same stage with the same key is already done.

    Raises:
        LoramError: Another process is writing there, or the place cannot be written.
        UsageError: As :func:`staged_directory`.
    """
    refuse_if_held(_beside(final, "lock"), final)
    place = final.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise LoramError(f"{place}: cannot write here")
    return _finished(final, stage, key, force)


def partial_directory(final: Path) -> Path:
    """Where an output is made before it is moved into place."""
    return _beside(final, "partial")


def _finished(final: Path, stage: str, key: str, force: bool) -> Manifest | None:
    if not final.exists() or force:
        return None
    if not (final / MANIFEST_NAME).is_file():
        if final.is_dir() and not any(final.iterdir()):
            return None
        raise UsageError(f"{final}: exists and is not an output of loram", "pass another --out")
    manifest = Manifest.read(final)
    if manifest.stage == stage and manifest.key == key:
        return manifest
    raise UsageError(
        f"{final}: exists and was made by '{manifest.stage}' with other settings or inputs",
        "pass --force to replace it, or another --out",
    )


def _prepare(work: Path, key: str, resumable: bool) -> None:
    key_file = work / _KEY_NAME
    try:
        if not (resumable and key_file.is_file() and key_file.read_text() == key):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            key_file.write_text(key)
    except OSError as error:
        raise LoramError(f"{work}: cannot be written ({error.strerror})") from error


def _holds_work(work: Path) -> bool:
    """Whether anything but our own key was written: a mistake found at once leaves nothing."""
    return any(path.is_file() and path.name != _KEY_NAME for path in work.rglob("*"))


def _beside(final: Path, suffix: str) -> Path:
    return final.parent / f".{final.name}.{suffix}"


def sync_tree(root: Path) -> None:
    """Have every file and folder on the disk."""
    for folder, _, files in os.walk(root):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))


def sync(path: Path) -> None:
    """Have a file, or a folder's list of files, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
