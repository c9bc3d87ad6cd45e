"""Output directories that are either whole or not there."""

import itertools
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from loram_cli.errors import LoramError, UsageError
from loram_cli.runs.digests import file_records
from loram_cli.runs.lock import exclusive_lock, refuse_if_held
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest, claims

_KEY_NAME = "loram-key"
# Folders that an interrupted stage resumes from; they go when the output is whole.
SCRATCH_NAMES = ("checkpoints", "fitted", "methods")
# And one that stays in it: the answers of an evaluation.
ANSWERS_NAME = "responses"


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

        What an interrupted stage resumes from is kept until nothing but the move is left to do.
        An output that is replaced stands aside until then.

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
        _share_mode(self.path)
        # The key first: nobody shall resume from what is half removed.
        (self.path / _KEY_NAME).unlink(missing_ok=True)
        for name in SCRATCH_NAMES:
            shutil.rmtree(self.path / name, ignore_errors=True)
        _move_into_place(self.path, self.final)
        self.committed = True
        return manifest


@contextmanager
def staged_directory(
    final: Path, stage: str, key: str, *, force: bool = False, resumable: bool = False
) -> Iterator[StagedDirectory]:
    """Fill a directory aside and move it into place on commit.

    Args:
        final: The output directory; a symbolic link is followed.
        stage: Name of the stage.
        key: Digest of everything that decides the output.
        force: Replace an output made with another key, or redo one with the same; what loram did
            not write is never replaced.
        resumable: Keep unfinished work of the same key for the next call.

    Raises:
        LoramError: Another process is writing it, or the place cannot be written.
        UsageError: ``final`` exists, and is not this stage's output with this key (without
            ``force``) or no output of loram at all.
    """
    final = followed(final)
    with _parents(final), exclusive_lock(_beside(final, "lock"), final):
        _put_back(final)
        finished = _finished(final, stage, key, force)
        work = partial_directory(final)
        shutil.rmtree(_beside(final, "old"), ignore_errors=True)  # killed after the last rename
        if finished is not None:
            if not resumable or _key_of(work) in (key, None):
                shutil.rmtree(work, ignore_errors=True)  # killed while doing it once more
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


@contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """Fill a directory aside and move it into place at the end: an output without a manifest.

    What stands there is replaced, and stays until then.

    Args:
        final: The output directory; a symbolic link is followed.

    Yields:
        Where to write; it is not there yet.

    Raises:
        LoramError: Another process is writing it, or the place cannot be written.
        UsageError: Something that no killed run left stands beside it.
    """
    final = followed(final)
    with _parents(final), exclusive_lock(_beside(final, "lock"), final):
        _put_back(final)
        work = partial_directory(final)
        if work.is_symlink():
            raise UsageError(f"{work}: is a symbolic link where the output is made", "remove it")
        shutil.rmtree(work, ignore_errors=True)
        try:
            yield work
            _share_mode(work)
            _move_into_place(work, final)
        except OSError as error:
            raise LoramError(
                f"{final}: cannot write ({error.strerror or error})",
                "free some space, or pass another --out",
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _put_back(final: Path) -> None:
    """Undo half a move into place: a kill between the two renames left the old output aside."""
    retired = _beside(final, "old")
    if retired.is_symlink() or (retired.exists() and not retired.is_dir()):
        raise UsageError(f"{retired}: stands where an old output is put aside", "move it")
    if retired.exists() and not final.exists():
        retired.rename(final)


def _move_into_place(work: Path, final: Path) -> None:
    """Give a finished directory its name; one that has it stands aside until then."""
    sync_tree(work)
    retired = _beside(final, "old")
    shutil.rmtree(retired, ignore_errors=True)
    if final.exists():
        final.rename(retired)
    work.rename(final)
    sync(final.parent)
    shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def _parents(final: Path) -> Iterator[None]:
    """Have the folders above an output; those made for it go again where nothing got into them."""
    made = list(itertools.takewhile(lambda folder: not folder.exists(), final.parents))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoramError(f"{final.parent}: cannot be created ({error.strerror})") from error
    try:
        yield
    except BaseException:
        for folder in made:
            try:
                folder.rmdir()
            except OSError:
                break  # not empty: the run's state, what a stage resumes from, or another's
        raise


def look_up(final: Path, stage: str, key: str, *, force: bool = False) -> Manifest | None:
    """What :func:`staged_directory` would find; nothing is created.

    Returns:
        The manifest, if the same stage with the same key is already done.

    Raises:
        LoramError: Another process is writing there, or the place cannot be written.
        UsageError: As :func:`staged_directory`.
    """
    final = followed(final)
    refuse_if_held(_beside(final, "lock"), final)
    place = existing_parent(final)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise LoramError(f"{place}: cannot write here")
    return _finished(final, stage, key, force)


def partial_directory(final: Path) -> Path:
    """Where an output is made before it is moved into place."""
    return _beside(followed(final), "partial")


def followed(final: Path) -> Path:
    """Where an output really goes: what a symbolic link in its place points to."""
    return resolved(final) if final.is_symlink() else final


def resolved(path: Path) -> Path:
    """A path without symbolic links, of the folders above it as well.

    Raises:
        UsageError: One of them leads to itself.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "a symbolic link that leads to itself"
        raise UsageError(f"{path}: {reason}", "pass another path") from error


def existing_parent(final: Path) -> Path:
    """The nearest folder above an output that is there already.

    Raises:
        UsageError: A symbolic link above it leads nowhere, or to itself.
    """
    place = followed(final).parent
    while not place.exists():
        if place.is_symlink():
            raise UsageError(f"{place}: a symbolic link that leads nowhere", "pass another path")
        place = place.parent
    return place


def _finished(final: Path, stage: str, key: str, force: bool) -> Manifest | None:
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return None
    _refuse_foreign(final)
    if force:
        return None
    manifest = Manifest.read(final)
    if manifest.stage == stage and manifest.key == key:
        return manifest
    raise UsageError(
        f"{final}: exists and was made by '{manifest.stage}' with other settings or inputs",
        "pass --force to replace it, or another --out",
    )


def _refuse_foreign(final: Path) -> None:
    """Refuse to replace what loram did not write, or a folder that somebody else uses as well."""
    recorded = claims(final)
    if recorded is None:
        raise UsageError(
            f"{final}: exists and is not an output of loram",
            "pass another --out; --force replaces loram's own outputs only",
        )
    # Outputs from before files were recorded list none.
    known = {MANIFEST_NAME, *recorded}
    files = (path for path in sorted(final.rglob("*")) if recorded and not path.is_dir())
    for path in files:
        name = path.relative_to(final).as_posix()
        if name not in known and name.partition("/")[0] not in SCRATCH_NAMES:
            raise UsageError(
                f"{path}: was not written by loram, and {final} is to be replaced",
                "move it elsewhere, or pass another --out",
            )


def _key_of(work: Path) -> str | None:
    try:
        return (work / _KEY_NAME).read_text()
    except (OSError, ValueError):
        return None


def _prepare(work: Path, key: str, resumable: bool) -> None:
    try:
        if not (resumable and _key_of(work) == key):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            (work / _KEY_NAME).write_text(key)
    except OSError as error:
        raise LoramError(f"{work}: cannot be written ({error.strerror})") from error


def _holds_work(work: Path) -> bool:
    """Whether there is anything to resume from: what failed before that leaves nothing."""
    folders = (work / name for name in (*SCRATCH_NAMES, ANSWERS_NAME))
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    # Of which run checkpoints are is told before there is one.
    return any(path.relative_to(work).as_posix() != "checkpoints/run.json" for path in files)


def _share_mode(root: Path) -> None:
    """Give every file the mode that the umask gives; safetensors makes its own private."""
    probe = root / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


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
