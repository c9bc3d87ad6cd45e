"""Multimodal models around a text model: what of them the text model is.

``wrappers.json`` names, for each ``model_type``, the module that the text model's own ``model`` is
inside it. Everything before the recovered adapter sees only the text model, under the names that
it has by itself.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

_ROOT = "model."
# What the wrapper's config decides for the text model, where it says so.
_TOP = ("tie_word_embeddings", "quantization_config", "compression_config")
# And what it says where the text model's own does not.
_FALLBACK = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "pad_token_id")
# Beginnings of published names; transformers maps them to the module's on loading.
_STORED = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head."}


@dataclass(frozen=True)
class Wrapper:
    """A multimodal model's names for its text model.

    Attributes:
        model_type: Of the whole model.
        text: The module that holds the decoder layers' stack, such as ``model.language_model``.
    """

    model_type: str
    text: str

    def text_tensor(self, stored: str) -> str | None:
        """The text model's own name of a tensor in a checkpoint; None for another part's."""
        names = {f"{self.text}.": _ROOT, **_STORED}
        for beginning, own in names.items():
            if stored.startswith(beginning):
                return own + stored.removeprefix(beginning)
        return stored if stored.startswith("lm_head.") else None

    def module(self, own: str) -> str:
        """The whole model's name of one of the text model's modules."""
        return f"{self.text}.{own.removeprefix(_ROOT)}" if own.startswith(_ROOT) else own

    def text_module(self, name: str) -> str:
        """The text model's own name of a module; one of another part keeps its name."""
        beginning = f"{self.text}."
        return _ROOT + name.removeprefix(beginning) if name.startswith(beginning) else name

    @property
    def renames(self) -> dict[str, str]:
        """Patterns of names in a checkpoint, and what they are in the text model."""
        names = {f"{self.text}.": _ROOT, **_STORED}
        return {"^" + old.replace(".", r"\."): new for old, new in names.items()}


@cache
def _table() -> dict[str, str]:
    text = (resources.files("loram_cli.arch") / "wrappers.json").read_text("utf-8")
    return dict(json.loads(text))


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """The wrapper that a ``config.json`` is of; None for any other model."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not isinstance(config.get("text_config"), Mapping):
        return None
    text = _table().get(model_type)
    return None if text is None else Wrapper(model_type, text)


def text_view(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's config, as it would be by itself; any other config as it is.

    Args:
        config: The parsed ``config.json``.
    """
    if wrapper_of(config) is None:
        return dict(config)
    text = dict(config["text_config"])
    text |= {key: config[key] for key in _TOP if config.get(key) is not None}
    missing = (key for key in _FALLBACK if text.get(key) is None)
    return text | {key: config[key] for key in missing if config.get(key) is not None}
