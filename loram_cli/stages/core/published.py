"""Outputs that somebody published: fetched from the hub, and held against their own record."""

from pathlib import Path

from loram_cli.checkpoint.sources import is_hub_id, resolve_model
from loram_cli.errors import LoramError
from loram_cli.reporting import Reporter
from loram_cli.runs.digests import file_digests
from loram_cli.runs.manifest import MANIFEST_NAME, Manifest
from loram_cli.stages.core.lineage import REMARKS


def local_output(path: Path, reporter: Reporter) -> Path:
    """The directory of an output that is given by path or by hub id.

    Args:
        path: As it was given; one that is there is left as it is.
        reporter: Told what is fetched.

    Raises:
        LoramError: The hub does not have it or cannot be reached, or a file is not the one that
            was recorded.
    """
    name = str(path)
    if not is_hub_id(name):
        return path
    directory = resolve_model(name, remarks=True)
    if (directory / MANIFEST_NAME).is_file():
        _check(name, directory)
        reporter.note(f"{name}: every file is as it was recorded")
    return directory


def _check(name: str, directory: Path) -> None:
    outputs = {
        file: record
        for file, record in Manifest.read(directory).outputs.items()
        if Path(file).name not in REMARKS
    }
    for file in outputs:
        if not (directory / file).is_file():
            raise LoramError(f"{name}: {file} is missing, and was there when it was pushed")
    digests = file_digests([directory / file for file in outputs])
    for (file, record), digest in zip(outputs.items(), digests, strict=True):
        if digest != f"sha256:{record['sha256']}":
            raise LoramError(
                f"{name}: {file} is not the file that was recorded (sha256 differs)",
                f"delete {directory} to fetch it once more, or ask who pushed it",
            )
