"""Digests that tell one model from another without reading all of it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from loram_cli.checkpoint.index import CheckpointIndex, read_config
from loram_cli.checkpoint.reader import TensorReader
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
    """

    config: str
    tensors: str
    weights: str
    tokenizer: str
    chat_template: str

    def to_mapping(self) -> dict[str, str]:
        """Plain form for a manifest."""
        return asdict(self)


def identify(directory: Path) -> ModelIdentity:
    """Compute the identity of a model directory.

    Raises:
        LoramError: The directory is not a sound safetensors checkpoint.
    """
    index = CheckpointIndex.open(directory)
    config = {k: v for k, v in read_config(directory).items() if k not in _VOLATILE_CONFIG_KEYS}
    listing = sorted([n, str(e.dtype), list(e.shape)] for n, e in index.tensors.items())
    return ModelIdentity(
        digest_of(config),
        digest_of(listing),
        _sample_weights(index),
        _tokenizer_digest(directory),
        chat_template_digest(directory),
    )


def chat_template_digest(directory: Path) -> str:
    """Digest of the chat template of a model or adapter directory, or ``none``.

    It stands in a file of its own or, as older tokenizers keep it, in ``tokenizer_config.json``.
    """
    file, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    template: object = None
    try:
        if file.is_file():
            template = file.read_text("utf-8")
        elif config.is_file():
            template = json.loads(config.read_text("utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError) as error:
        raise LoramError(f"{directory}: the chat template cannot be read ({error})") from error
    return "none" if not template else digest_of(template)


def _sample_weights(index: CheckpointIndex) -> str:
    digest = hashlib.sha256()
    with TensorReader(index) as reader:
        for name in sorted(index.tensors):
            entry = index.tensors[name]
            if entry.num_bytes <= _SAMPLED_WINDOWS * _WINDOW_BYTES:
                digest.update(reader.read_bytes(entry, 0, entry.num_bytes))
                continue
            last = entry.num_bytes - _WINDOW_BYTES
            for window in range(_SAMPLED_WINDOWS):
                start = last * window // (_SAMPLED_WINDOWS - 1)
                digest.update(reader.read_bytes(entry, start, _WINDOW_BYTES))
    return "sha256:" + digest.hexdigest()


def _tokenizer_digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        file = directory / name
        if file.is_file():
            digest.update(name.encode() + file.read_bytes())
    return "sha256:" + digest.hexdigest()
