"""Finds the family of a model config."""

import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from loram_cli.arch.spec import Family
from loram_cli.errors import LoramError, reason_of

FAMILIES_VARIABLE = "LORAM_FAMILIES"
"""Environment variable with a folder of family files of the user's own, for child processes too."""


def families() -> tuple[Family, ...]:
    """All known families: the user's own, then those of the package, one a file.

    Raises:
        LoramError: The user's folder is absent, or a file in it is no family.
    """
    folder = os.environ.get(FAMILIES_VARIABLE)
    return (_own(folder) if folder else ()) + _packaged()


@cache
def _packaged() -> tuple[Family, ...]:
    folder = resources.files("loram_cli.arch") / "families"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return tuple(Family.from_data(json.loads(file.read_text("utf-8"))) for file in files)


@cache
def _own(folder: str) -> tuple[Family, ...]:
    if not Path(folder).is_dir():
        raise LoramError(f"{FAMILIES_VARIABLE}: {folder} is no folder")
    return tuple(_from_file(file) for file in sorted(Path(folder).glob("*.json")))


def _from_file(file: Path) -> Family:
    try:
        return Family.from_data(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else reason_of(error)
        raise LoramError(
            f"{file}: is no family file ({reason})",
            "'loram inspect MODEL --family' proposes one",
        ) from error


def family_for(config: Mapping[str, Any], where: str) -> Family:
    """The family whose ``model_type`` the config states; the user's own file before the package's.

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
    known = [name for family in families() for name in family.model_types]
    near = get_close_matches(str(model_type), known)
    raise LoramError(
        f"{where}: model_type '{model_type}' is not a known family "
        f"({'nearest: ' + ', '.join(near) if near else f'{len(known)} are known'})",
        f"'loram inspect {where} --family --out families/NAME.json' proposes a family file, and "
        f"{FAMILIES_VARIABLE}=families reads it",
    )
