"""Finds the family of a model config."""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from loram_cli.arch.spec import Family
from loram_cli.errors import LoramError


@cache
def families() -> tuple[Family, ...]:
    """All families that the package knows, one per file in ``arch/families/``."""
    folder = resources.files("loram_cli.arch") / "families"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return tuple(Family.from_data(json.loads(file.read_text("utf-8"))) for file in files)


def family_for(config: Mapping[str, Any], where: str) -> Family:
    """The family whose ``model_type`` the config states.

    Args:
        config: The parsed ``config.json``.
        where: What to name in the error, usually the model's directory.

    Raises:
        LoramError: No family file knows this ``model_type``, or it is a multimodal model.
    """
    model_type = config.get("model_type")
    for family in families():
        if model_type in family.model_types:
            return family
    text_config = config.get("text_config")
    if isinstance(text_config, Mapping):
        text_type = text_config.get("model_type")
        inner = [family for family in families() if text_type in family.model_types]
        if inner:
            raise LoramError(
                f"{where}: model_type '{model_type}' is a multimodal model around a '{text_type}' "
                f"text model; only the text model can be pruned",
                "save only the text model, copy the tokenizer files beside it and pass that: "
                f"import transformers as t; m = t.AutoModelForImageTextToText.from_pretrained("
                f"'{where}'); x = t.{inner[0].architecture}(m.config.text_config); "
                "x.model, x.lm_head = m.model.language_model, m.lm_head; "
                "x.save_pretrained('TEXT')",
            )
    known = ", ".join(name for family in families() for name in family.model_types)
    raise LoramError(
        f"{where}: model_type '{model_type}' is not a known family (known: {known})",
        "a family is one JSON file in loram_cli/arch/families/",
    )
