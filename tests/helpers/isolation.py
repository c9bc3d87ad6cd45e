"""Tests see neither the settings, nor the home, nor the working directory of who starts them."""

import os
from collections.abc import Mapping
from pathlib import Path

LAUNCHER = frozenset({
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
})  # fmt: skip
# Places and switches of libraries, and what several launchers name after themselves.
_LIBRARIES = (
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "WANDB_", "XDG_", "TORCHELASTIC_", "ACCELERATE_",
    "FSDP_",
)  # fmt: skip


def is_ours(name: str) -> bool:
    """Whether a variable is a setting of ``loram``, or says that a launcher started it."""
    return name.startswith("LORAM_") or name in LAUNCHER


def isolated(environ: Mapping[str, str], home: Path, root: Path) -> dict[str, str]:
    """The environment that tests get, and the processes they start.

    Args:
        environ: The environment pytest was started in.
        home: An empty folder that stands in for the home directory.
        root: The checkout; started processes import the package from it.
    """
    kept = {n: v for n, v in environ.items() if not is_ours(n) and not n.startswith(_LIBRARIES)}
    places = {
        "HOME": home,
        "HF_HOME": home / "huggingface",
        "XDG_CACHE_HOME": home / "cache",
        "XDG_CONFIG_HOME": home / "config",
        "XDG_DATA_HOME": home / "data",
        "XDG_STATE_HOME": home / "state",
    }
    path = [str(root), *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **_pip_settings(environ),
        **kept,
        **{name: str(place) for name, place in places.items()},
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
    }


def _pip_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The machine's package index and cache: the slow tests of the wheel install from them."""
    home = Path(environ.get("HOME", "/"))
    config = Path(environ.get("XDG_CONFIG_HOME", home / ".config")) / "pip" / "pip.conf"
    cache = Path(environ.get("XDG_CACHE_HOME", home / ".cache")) / "pip"
    places = {"PIP_CONFIG_FILE": config, "PIP_CACHE_DIR": cache}
    return {name: str(place) for name, place in places.items() if place.exists()}
