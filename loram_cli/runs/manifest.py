"""``loram.json``: what an output directory is, what it came from and how. Written last."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from loram_cli import __version__
from loram_cli.errors import LoramError, UsageError
from loram_cli.reading import read_json
from loram_cli.schema import digest_of
from loram_cli.units import whole_number

MANIFEST_NAME = "loram.json"
SCHEMA_VERSION = 1
_LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "safetensors",
    "tokenizers",
    "datasets",
    "bitsandbytes",
    "lm_eval",
    "huggingface_hub",
)


@cache
def library_versions() -> dict[str, str]:
    """Versions of the tool, Python and the libraries that decide results."""
    from importlib import metadata  # takes a tenth of a --help

    versions = {"loram": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record of one stage's output.

    Attributes:
        stage: Which stage made the directory.
        key: Digest of spec and inputs; the same key means the same output.
        spec: The stage's spec.
        inputs: Per input its path and digests.
        base: Identity of the original base model, carried from stage to stage.
        keep: Per pruned layer the kept indices (``key_value_heads``, ``intermediate``), and under
            ``layers`` the layers that are left (``kept``) where whole layers went; carried
            along so that an adapter directory is enough to recover from.
        outputs: ``bytes`` and ``sha256`` of every file beside this record, for ``loram verify``.
        sparsity: Of a model whose single weights were zeroed (``semi``, ``unst``): strategy, share
            and count of zeros, and where the mask is to be found; carried along too.
        results: What the stage measured.
        wall_seconds: Time the stage took, since it was last resumed.
        peak_memory_bytes: Highest memory while it ran (device memory on a GPU, else resident).
        peak_memory_increase_bytes: The same, less what was in use when the stage began.
    """

    stage: str
    key: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, Any]
    base: Mapping[str, Any]
    keep: Mapping[str, Mapping[str, list[int]]] = field(default_factory=dict)
    outputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sparsity: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0
    peak_memory_increase_bytes: int = 0
    versions: Mapping[str, str] = field(default_factory=library_versions)
    schema_version: int = SCHEMA_VERSION

    def write(self, directory: Path) -> None:
        """Write the manifest into a directory whose other files are complete.

        It closes with a digest of itself, so that a record edited by hand can be detected.
        """
        (directory / MANIFEST_NAME).write_text(sealed(asdict(self)), "utf-8")

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read and check a directory's manifest.

        Raises:
            LoramError: There is none, it is not a manifest of this schema, or it was edited.
        """
        file = directory / MANIFEST_NAME
        try:
            if not file.exists():
                raise LoramError(
                    f"{directory}: no finished output here ({MANIFEST_NAME} is absent)"
                )
            data = read_json(file)
            if data["schema_version"] != SCHEMA_VERSION:
                raise LoramError(
                    f"{file}: schema {data['schema_version']}, this version reads {SCHEMA_VERSION}"
                )
            digest = data.pop("digest", None)
            if digest != digest_of(data):
                wrong = "is missing" if digest is None else "does not match"
                raise LoramError(
                    f"{file}: was changed after it was written (its digest {wrong})",
                    "run the stage again with --force, or restore the file",
                )
            _check_types(data)
            return cls(**data)
        except UsageError as error:
            raise LoramError(f"{file}: not a manifest ({error.message})") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoramError(f"{file}: not a manifest ({type(error).__name__}: {error})") from error


def sealed(data: Mapping[str, Any]) -> str:
    """A record as text, closed with a digest of itself."""
    plain = json.loads(json.dumps({k: v for k, v in data.items() if k != "digest"}))
    return json.dumps({**plain, "digest": digest_of(plain)}, indent=1, sort_keys=True) + "\n"


def claims(directory: Path) -> Mapping[str, Any] | None:
    """The files that a directory's manifest lists, damaged or not; None where there is none."""
    try:
        data = read_json(directory / MANIFEST_NAME)
        return dict(data["outputs"]) if "schema_version" in data and data["stage"] else None
    except (LoramError, KeyError, TypeError, ValueError):
        return None


def _check_types(data: dict[str, Any]) -> None:
    """Refuse a record whose parts are of other kinds than a stage would have written."""
    for name in ("stage", "key"):
        if not isinstance(data[name], str):
            raise TypeError(f"{name} is no text")
    for name in ("spec", "inputs", "base", "keep", "outputs", "results"):
        if not isinstance(data.get(name, {}), dict):
            raise TypeError(f"{name} is no mapping")
    for name in ("inputs", "keep", "outputs"):
        for label, record in data.get(name, {}).items():
            if not isinstance(record, dict):
                raise TypeError(f"{name} {label} is no mapping")
    for name, record in data.get("outputs", {}).items():
        if type(record.get("bytes")) is not int or not isinstance(record.get("sha256"), str):
            raise TypeError(f"outputs {name} has no bytes and sha256")
    for layer, kept in data.get("keep", {}).items():
        # Under "layers" stand those that are left, where whole layers went.
        if whole_number(layer) is None and layer != "layers":
            raise ValueError(f"keep has no layer {layer}")
        for name, indices in kept.items():
            whole = isinstance(indices, list) and all(type(i) is int and i >= 0 for i in indices)
            if not whole or any(a >= b for a, b in pairwise(indices)):
                raise ValueError(f"keep of layer {layer}: {name} is no rising list of indices")
