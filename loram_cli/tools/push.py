"""Push: upload an output to the hub, under a name that was checked before the long work."""

import json
import tempfile
from pathlib import Path
from typing import Any

from loram_cli.checkpoint.sources import hub_id
from loram_cli.errors import LoramError, UsageError
from loram_cli.hub import unreachable
from loram_cli.reporting import Reporter
from loram_cli.runs.digests import file_records
from loram_cli.runs.manifest import MANIFEST_NAME, sealed
from loram_cli.stages.core.card import CARD_NAME


def check_push(repository: str) -> None:
    """See that the name is one, and that the hub lets us in.

    Raises:
        UsageError: Not of the form OWNER/NAME.
        LoramError: No token, or the hub cannot be reached.
    """
    from huggingface_hub.errors import HFValidationError

    # Public by its documentation, and in no list of exports.
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"--push {repository}: expected OWNER/NAME") from error
    if repository.count("/") != 1:
        raise UsageError(f"--push {repository}: expected OWNER/NAME")
    offline = unreachable()
    if offline is not None:
        raise LoramError(f"--push {repository}: {offline}", "push again where there is a network")
    try:
        _api().whoami()
    except Exception as error:
        raise _refused(repository, error) from error


def push(directory: Path, repository: str, reporter: Reporter) -> str:
    """Upload a finished output, as a private repository unless it exists already.

    Local paths are left out of the manifest's copy on the hub, and the model card names the
    repository in place of the directory.

    Returns:
        The address.

    Raises:
        LoramError: The hub refuses, or cannot be reached; the output stays where it is.
    """
    api = _api()
    try:
        url = str(api.create_repo(repository, private=True, exist_ok=True))
        with reporter.progress(f"push to {repository}", None, "file"):
            api.upload_folder(
                repo_id=repository,
                folder_path=str(directory),
                ignore_patterns=[MANIFEST_NAME, CARD_NAME],
            )
            with tempfile.TemporaryDirectory() as folder:
                for file in _public_files(directory, repository, Path(folder)):
                    api.upload_file(
                        repo_id=repository, path_or_fileobj=str(file), path_in_repo=file.name
                    )
    except Exception as error:
        raise _refused(repository, error, directory) from error
    reporter.note(f"pushed to {url}")
    return url


def public_manifest(directory: Path, card: Path | None = None) -> str:
    """The manifest with every local path cut to its last part, or to the hub id.

    Args:
        directory: The output.
        card: The model card that goes with it, if it is another one than the output's.
    """
    data = _without_paths(json.loads((directory / MANIFEST_NAME).read_text("utf-8")))
    if card is not None:
        data["outputs"] |= file_records(card.parent, leave_out=(MANIFEST_NAME,))
    return sealed(data)


def _public_files(directory: Path, repository: str, folder: Path) -> list[Path]:
    """Card and manifest as they are published; the manifest last, since it marks a whole output."""
    card, record = folder / CARD_NAME, folder / MANIFEST_NAME
    has_card = (directory / CARD_NAME).is_file()
    if has_card:
        text = (directory / CARD_NAME).read_text("utf-8")
        card.write_text(text.replace(f"./{directory.name}", repository), "utf-8")
    record.write_text(public_manifest(directory, card if has_card else None), "utf-8")
    return [card, record] if has_card else [record]


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~", "./", "../")):
        parts = (Path(part) for part in value.split(" + "))
        return " + ".join(hub_id(part) or part.name for part in parts)
    return value


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _refused(repository: str, error: Exception, kept: Path | None = None) -> LoramError:
    # The hub library raises a different class for each way to fail; the first line tells which.
    lines = str(error).strip().splitlines()
    reason = lines[0][:160] if lines else repr(error)
    where = f"; the output stays at {kept}" if kept else ""
    return LoramError(
        f"--push {repository}: the hub cannot be used ({reason}){where}",
        "log in with 'hf auth login' or set HF_TOKEN, and check the network",
    )
