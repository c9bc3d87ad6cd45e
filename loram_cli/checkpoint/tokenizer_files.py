"""What a directory's tokenizer files say, without loading a tokenizer."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loram_cli.checkpoint.json_files import read_json
from loram_cli.errors import LoramError


def check_tokenizer(directory: Path, vocab_size: int) -> None:
    """Refuse a tokenizer that knows tokens beyond the embedding: their text could not be embedded.

    Placeholders of images and the like are left out of account: text-only models lack them, and
    no text turns into them.

    Args:
        directory: Holds the files; one without a tokenizer passes.
        vocab_size: Rows of the embedding.

    Raises:
        LoramError: There is such a token, or a file that is no tokenizer's.
    """
    highest, token, file = max(_tokens(directory), default=(-1, "", directory))
    if highest >= vocab_size:
        raise LoramError(
            f"{file}: token {highest} ({token[:40]!r}) is beyond the model's embedding of "
            f"{vocab_size} tokens",
            f"use the model's own tokenizer files, or resize the embedding and save the model: "
            f"model.resize_token_embeddings({highest + 1})",
        )


def _tokens(directory: Path) -> Iterator[tuple[int, str, Path]]:
    """Id, text and file of each file's highest token."""
    config = _read(directory / "tokenizer_config.json")
    placeholders = set(_placeholders(config))
    for file, found in _vocabularies(directory, config):
        try:
            ids = [(int(i), str(token), file) for token, i in found if token not in placeholders]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise LoramError(
                f"{file}: not a tokenizer ({type(error).__name__}: {error})",
                "copy the base model's tokenizer files into the directory",
            ) from error
        if ids:
            yield max(ids)


def _vocabularies(
    directory: Path, config: Mapping[str, Any]
) -> Iterator[tuple[Path, Iterable[tuple[Any, Any]]]]:
    """Per file its tokens and their ids, read as they are used."""
    whole = directory / "tokenizer.json"
    if whole.is_file():
        yield whole, _of_tokenizer(read_json(whole))
    else:
        vocabulary = directory / "vocab.json"
        yield vocabulary, _read(vocabulary).items()
    added = directory / "added_tokens.json"
    yield added, _read(added).items()
    yield directory / "tokenizer_config.json", _of_decoder(config.get("added_tokens_decoder"))


def _of_decoder(decoder: Any) -> Iterator[tuple[Any, Any]]:
    for i, token in (decoder or {}).items():
        yield token["content"], i


def _of_tokenizer(data: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    vocabulary = data["model"].get("vocab") or {}
    if isinstance(vocabulary, Mapping):
        yield from vocabulary.items()
    else:
        yield from ((str(entry[0]), i) for i, entry in enumerate(vocabulary))
    for token in data.get("added_tokens") or ():
        yield token["content"], token["id"]


def _placeholders(config: Mapping[str, Any]) -> Iterator[str]:
    extra = config.get("extra_special_tokens")
    for key, value in {**config, **(extra if isinstance(extra, Mapping) else {})}.items():
        if key in ("image_token", "audio_token", "video_token") and isinstance(value, str):
            yield value


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
