"""A model by local path or hub id, as a local directory."""

import shutil
from pathlib import Path

from loram_cli.errors import LoramError, reason_of
from loram_cli.hub import unreachable
from loram_cli.reading import home_expanded

# Weights in safetensors only: a pickle is never fetched, so it can never be loaded.
_PATTERNS = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
# Of a model or an adapter; transformers, PEFT and vLLM read it there as well.
TEMPLATE_FILE = "chat_template.jinja"
_REMARKS = ("*.md", "*.png", "*.csv")
# What travels with the weights from a base to whatever is made of it.
_COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE_FILE,
    "generation_config.json",
)
# What images and other inputs of a multimodal model are prepared by.
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def is_hub_id(name: str) -> bool:
    """Whether a name is OWNER/NAME on the hub, and no local directory."""
    path = home_expanded(name)
    local = path.exists() or path.is_absolute() or name.startswith((".", "~"))
    return not local and name.count("/") == 1


def resolve_model(
    model: str,
    *,
    config_only: bool = False,
    tokenizer_only: bool = False,
    remarks: bool = False,
) -> Path:
    """The local directory of a model given by path or hub id.

    Args:
        model: The path or id.
        config_only: Fetch ``config.json`` alone from the hub, and no weights.
        tokenizer_only: Fetch only that and the tokenizer's files.
        remarks: Fetch the model card, pictures and curves too, which no model reads.

    Raises:
        LoramError: No such directory, and the hub does not have it or cannot be reached.
    """
    path = home_expanded(model)
    if path.is_dir():
        return path
    if not is_hub_id(model):
        raise LoramError(
            f"{model}: no such directory", "--model takes a local directory or a hub id"
        )
    from huggingface_hub import snapshot_download

    patterns = [*_PATTERNS, *(_REMARKS if remarks else ())]
    if config_only or tokenizer_only:
        patterns = ["config.json", *(_COMPANION_FILES if tokenizer_only else ())]
    silence = unreachable()
    try:
        found = snapshot_download(
            model,
            allow_patterns=patterns,
            local_files_only=silence is not None,
        )
    except Exception as error:
        # The hub library raises a different class for each way to fail; all mean the same here.
        reason = reason_of(error)
        if silence is not None:
            part = "only in part" if "incomplete" in reason else "not"
            raise LoramError(
                f"{model}: not a local directory, {part} in the hub's cache, and {silence}",
                "check the id and the network, or download it and pass the path",
            ) from error
        raise LoramError(
            f"{model}: not a local directory, and the hub did not give it ({reason})",
            "check the id, or download it and pass the path",
        ) from error
    return Path(found)


def hub_id(path: Path) -> str | None:
    """The hub id of a directory in the hub's cache, or None for any other directory."""
    for part, below in zip(path.parts, path.parts[1:], strict=False):
        if part.startswith("models--") and below == "snapshots":
            return part.removeprefix("models--").replace("--", "/", 1)
    return None


def require_tokenizer(directory: Path) -> None:
    """Check that a base has a tokenizer, before any long work.

    Raises:
        LoramError: It has none.
    """
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise LoramError(
            f"{directory}: no tokenizer ({', '.join(_TOKENIZER_FILES)} are all absent)",
            "copy the base model's tokenizer files into the directory",
        )


def copy_companions(source: Path, target: Path, *, processors: bool = False) -> None:
    """Copy tokenizer and generation files that belong to the weights.

    Args:
        source: The model's directory.
        target: Where they go.
        processors: Whether those of a multimodal model's other inputs go along.
    """
    for name in (*_COMPANION_FILES, *(_PROCESSOR_FILES if processors else ())):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def copy_template(adapter: Path, target: Path) -> None:
    """Copy the chat template that an adapter was trained by, where it has one of its own."""
    if (adapter / TEMPLATE_FILE).is_file():
        shutil.copyfile(adapter / TEMPLATE_FILE, target / TEMPLATE_FILE)
