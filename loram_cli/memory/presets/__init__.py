"""Configs of published models, so that their memory can be told without their weights.

Each file holds the fields of the model's published ``config.json``, with ``dtype`` and
``rope_parameters`` as transformers 5 spells them. Those of families other than Llama hold what
decides shapes and what is computed, as litgpt's tables (``litgpt/config.py``) quote the published
files. Later ones hold the shapes that the config class of transformers defaults to for its first
published model, or that the model's page states. All of them have the published number of
parameters.
"""

import json
import re
from importlib import resources
from typing import Any

from loram_cli.schema import unknown_name

_SUFFIX = ".json"


def preset_names() -> tuple[str, ...]:
    """Names of all embedded configs, smaller models of a generation first."""
    names = [
        file.name.removesuffix(_SUFFIX)
        for file in resources.files(__name__).iterdir()
        if file.name.endswith(_SUFFIX)
    ]

    def order(name: str) -> tuple[str, float]:
        found = re.fullmatch(r"(.+?)-(\d+(?:\.\d+)?)(x\d+)?b(?:-a\d+b)?", name)
        assert found is not None
        return found[1], float(found[2])

    return tuple(sorted(names, key=order))


def load_preset(name: str, where: str = "--preset") -> dict[str, Any]:
    """The config of a published model.

    Raises:
        UsageError: There is no such preset; names the nearest one.
    """
    if name not in preset_names():
        raise unknown_name("preset", name, preset_names(), where)
    file = resources.files(__name__) / f"{name}{_SUFFIX}"
    return json.loads(file.read_text("utf-8"))
