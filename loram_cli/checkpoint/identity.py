"""Digests that tell one model from another without reading all of it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loram_cli.checkpoint.header import TensorEntry
from loram_cli.checkpoint.index import CheckpointIndex
from loram_cli.checkpoint.json_files import read_json, read_text
from loram_cli.errors import LoramError
from loram_cli.schema import digest_of

# What tools rewrite without changing the model.
_VOLATILE_CONFIG_KEYS = (
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "use_cache",
)
_SAMPLED_WINDOWS = 16
_WINDOW_BYTES = 4096
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class ModelIdentity:
    """Digests of a model directory.

    Attributes:
        config: Over ``config.json`` less what tools rewrite.
        tensors: Over every tensor's name, type and shape.
        weights: Over 16 evenly spaced windows of 4 KiB of every tensor (all of a small one):
            a sample, since hashing all of a 70B model would cost more than pruning it.
        tokenizer: Over the tokenizer's vocabulary files.
        chat_template: Over the chat template, wherever the directory keeps it; ``none`` without.
        tokenizer_config: Over the rest of ``tokenizer_config.json``; ``none`` without.
    """

    config: str
    tensors: str
    weights: str
    tokenizer: str
    chat_template: str
    tokenizer_config: str

    def to_mapping(self) -> dict[str, str]:
        """Plain form for a manifest."""
        return asdict(self)


def identify(index: CheckpointIndex, config: Mapping[str, Any]) -> ModelIdentity:
    """Compute the identity of a model directory; see :attr:`.model.Model.identity`.

    Raises:
        LoramError: A shard ends early or cannot be read.
    """
    lasting = {k: v for k, v in config.items() if k not in _VOLATILE_CONFIG_KEYS}
    # Types under their names in torch: manifests hold digests made of them.
    listing = sorted(
        [name, f"torch.{entry.dtype.torch_name}", list(entry.shape)]
        for name, entry in _all_tensors(index)
    )
    return ModelIdentity(
        digest_of(lasting),
        digest_of(listing),
        _sample_weights(index),
        _tokenizer_digest(index.directory),
        chat_template_digest(index.directory),
        _tokenizer_config_digest(index.directory),
    )


def chat_template_digest(directory: Path) -> str:
    """Digest of the chat template of a model or adapter directory, or ``none``.

    It stands in a file of its own or, as older tokenizers keep it, in ``tokenizer_config.json``.
    """
    file, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    template: object = None
    if file.is_file():
        template = read_text(file)
    elif config.is_file():
        template = read_json(config).get("chat_template")
    return "none" if not template else digest_of(template)


def _all_tensors(index: CheckpointIndex) -> list[tuple[str, TensorEntry]]:
    """Names and places of all tensors, those of other parts than the text model included."""
    return [*index.tensors.items(), *index.others.items()]


def same_sample(first: TensorEntry, second: TensorEntry) -> bool:
    """Whether two tensors are of one type and shape, and equal where they are sampled.

    Raises:
        LoramError: A shard ends early or cannot be read.
    """
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and _sample([first]) == _sample([second])


def _sample_weights(index: CheckpointIndex) -> str:
    return _sample([entry for _, entry in sorted(_all_tensors(index))])


def _sample(entries: Sequence[TensorEntry]) -> str:
    digest = hashlib.sha256()
    # A tensor in parts lies in as many places.
    flat = [
        part
        for entry in entries
        for part in (part for parts in entry.parts or ((entry,),) for part in parts)
    ]
    for entry in flat:
        try:
            # Unbuffered, since the windows lie far apart.
            with entry.file.open("rb", buffering=0) as shard:
                for start, count_bytes in _windows(entry.num_bytes):
                    shard.seek(entry.offset_bytes + start)
                    data = shard.read(count_bytes)
                    if len(data) < count_bytes:
                        raise LoramError(f"{entry.file}: ends inside tensor {entry.name}")
                    digest.update(data)
        except OSError as error:
            raise LoramError(f"{entry.file}: cannot be read ({error.strerror})") from error
    return "sha256:" + digest.hexdigest()


def _windows(num_bytes: int) -> Iterator[tuple[int, int]]:
    """Start and length of each sampled window of a tensor: of a small one, all of it."""
    if num_bytes <= _SAMPLED_WINDOWS * _WINDOW_BYTES:
        yield 0, num_bytes
        return
    for window in range(_SAMPLED_WINDOWS):
        yield (num_bytes - _WINDOW_BYTES) * window // (_SAMPLED_WINDOWS - 1), _WINDOW_BYTES


def _tokenizer_digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        file = directory / name
        if file.is_file():
            digest.update(name.encode() + file.read_bytes())
    return "sha256:" + digest.hexdigest()


def _tokenizer_config_digest(directory: Path) -> str:
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return "none"
    lasting = read_json(file).items()
    left_out = ("chat_template", "name_or_path", *_VOLATILE_CONFIG_KEYS)
    return digest_of({key: value for key, value in lasting if key not in left_out})
