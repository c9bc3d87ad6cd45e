"""What a directory's tokenizer files say, without loading a tokenizer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loram_cli.checkpoint.json_files import read_json
from loram_cli.errors import LoramError

SPECIAL_KEYS = (
    "bos_token", "cls_token", "eos_token", "mask_token", "pad_token", "sep_token", "unk_token",
)  # fmt: skip


def check_tokenizer(directory: Path, vocab_size: int) -> None:
    """Refuse a tokenizer that knows tokens beyond the embedding: their text could not be embedded.

    Placeholders of images and the like are left out of account: text-only models lack them, and
    no text turns into them. A special token that no vocabulary has gets the next id in
    transformers.

    Args:
        directory: Holds the files; one without a tokenizer passes.
        vocab_size: Rows of the embedding.

    Raises:
        LoramError: There is such a token, or a file that is no tokenizer's.
    """
    config = _read(directory / "tokenizer_config.json")
    found = list(_vocabularies(directory, config))
    placeholders = set(_placeholders(config))
    highest, token, file = max(
        (
            (i, token, file)
            for file, tokens in found
            for token, i in tokens.items()
            if token not in placeholders
        ),
        default=(-1, "", directory),
    )
    known = placeholders.union(*(tokens for _, tokens in found))
    more = _new_specials(directory, config, known) if 0 <= highest < vocab_size else []
    last = highest + len(more)
    if last >= vocab_size:
        if more:
            highest, (file, token) = vocab_size, more[vocab_size - highest - 1]
        raise LoramError(
            f"{file}: token {highest} ({token[:40]!r}) is beyond the model's embedding of "
            f"{vocab_size} tokens",
            f"use the model's own tokenizer files, or resize the embedding and save the model: "
            f"model.resize_token_embeddings({last + 1})",
        )


@contextmanager
def encoding(tokenizer: Any) -> Iterator[None]:
    """Blame the tokenizer for a text that it cannot encode: one without an unknown token, say.

    Args:
        tokenizer: Loaded; knows its directory.

    Raises:
        LoramError: It failed.
    """
    try:
        yield
    except BaseException as error:
        # Of tokenizers' own, which are of no class of their own, and panics of Rust.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        where = getattr(tokenizer, "name_or_path", None) or "the tokenizer"
        reason = " ".join(str(error).split())[:160]
        raise LoramError(
            f"{where}: its tokenizer cannot encode a text ({reason})",
            "check its tokenizer.json and special tokens against those of the model's origin",
        ) from error


def _vocabularies(
    directory: Path, config: Mapping[str, Any]
) -> Iterator[tuple[Path, dict[str, int]]]:
    """Per file its tokens and their ids."""
    whole, vocabulary = directory / "tokenizer.json", directory / "vocab.json"
    if whole.is_file():
        yield whole, _ids(whole, _of_tokenizer, read_json(whole))
    else:
        yield vocabulary, _ids(vocabulary, dict.items, _read(vocabulary))
    added = directory / "added_tokens.json"
    yield added, _ids(added, dict.items, _read(added))
    decoder = config.get("added_tokens_decoder")
    settings = directory / "tokenizer_config.json"
    yield settings, _ids(settings, _of_decoder, decoder)


def _ids(
    file: Path, tokens_of: Callable[[Any], Iterable[tuple[Any, Any]]], data: Any
) -> dict[str, int]:
    """The tokens of a file and their ids; of a token that stands twice, the higher one."""
    ids: dict[str, int] = {}
    try:
        for token, i in tokens_of(data):
            ids[str(token)] = max(int(i), ids.get(str(token), -1))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise LoramError(
            f"{file}: not a tokenizer ({type(error).__name__}: {error})",
            "copy the base model's tokenizer files into the directory",
        ) from error
    return ids


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
    yield from _set_around(data.get("post_processor") or {})


def _set_around(processor: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Tokens that a post-processor sets before and behind every text, by ids of its own."""
    for part in processor.get("processors") or ():
        yield from _set_around(part)
    for name, told in (processor.get("special_tokens") or {}).items():
        yield from ((name, i) for i in told["ids"])
    for key in ("cls", "sep"):
        if processor.get(key) is not None:
            yield tuple(processor[key])


def _new_specials(
    directory: Path, config: Mapping[str, Any], known: Set[str]
) -> list[tuple[Path, str]]:
    """Special tokens that no vocabulary has, each with the file that names it."""
    if not (directory / "tokenizer.json").is_file():
        return []  # nothing here reads the other kinds whole
    named = dict.fromkeys(_specials(config), directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        # The older file, which counts without the newer key only.
        older = directory / "special_tokens_map.json"
        named.update(dict.fromkeys(_specials(_read(older)), older))
    return [(file, token) for token, file in named.items() if token not in known]


def _specials(data: Mapping[str, Any]) -> Iterator[str]:
    values = [value for key, value in data.items() if key in SPECIAL_KEYS]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = data.get(key)
        values += more.values() if isinstance(more, Mapping) else more or ()
    for value in values:
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str) and text:
            yield text


def _placeholders(config: Mapping[str, Any]) -> Iterator[str]:
    extra = config.get("extra_special_tokens")
    for key, value in {**config, **(extra if isinstance(extra, Mapping) else {})}.items():
        if key in ("image_token", "audio_token", "video_token") and isinstance(value, str):
            yield value


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
