"""Configs of published models, so that their memory can be told without their weights.

Each file holds the fields of the model's published ``config.json`` that decide shapes and what is
computed, with ``dtype`` and ``rope_parameters`` as transformers 5 spells them, and as ``source``
the model on the hub and the public file in which these values were read.
"""

import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

from loram_cli.schema import unknown_name

_SUFFIX = ".json"


@dataclass(frozen=True)
class PresetSource:
    """Where a preset's values come from.

    Attributes:
        model: The published model, as the hub names it.
        read_in: Address of the public file that quotes its ``config.json``.
    """

    model: str
    read_in: str


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
    config = _read(name, where)
    config.pop("source", None)
    return config


def preset_source(name: str) -> PresetSource:
    """The published model that a preset is of, and where its values were read.

    Raises:
        UsageError: There is no such preset; names the nearest one.
    """
    return PresetSource(**_read(name, "--preset")["source"])


def _read(name: str, where: str) -> dict[str, Any]:
    if name not in preset_names():
        raise unknown_name("preset", name, preset_names(), where)
    file = resources.files(__name__) / f"{name}{_SUFFIX}"
    return dict(json.loads(file.read_text("utf-8")))
