"""Whether the Hugging Face hub can be asked; its libraries need half a minute to find out."""

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_PROBE_SECONDS = 3.0
_OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def unreachable() -> str | None:
    """Why the hub cannot be asked, or None when it can; ends a sentence such as ``x, and ...``."""
    for name in _OFFLINE_SWITCHES:
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} forbids to ask the hub"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return None if _answers(endpoint) else f"the hub ({endpoint}) cannot be reached"


def hub_reachable() -> bool:
    """Whether the hub answers within three seconds, and may be asked at all."""
    return unreachable() is None


@contextmanager
def offline_libraries(offline: bool) -> Iterator[None]:
    """Have the hub's libraries look only in their caches while the block runs."""
    import datasets.config
    import huggingface_hub.constants

    places = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place, value in zip(places, before, strict=True):
        place.HF_HUB_OFFLINE = value or offline
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


@cache
def _answers(endpoint: str) -> bool:
    # In a thread, because looking up a name knows no time limit of ours.
    answers: list[bool] = []
    probe = threading.Thread(target=lambda: answers.append(_ask(endpoint)), daemon=True)
    probe.start()
    probe.join(_PROBE_SECONDS)
    return answers == [True]


def _ask(endpoint: str) -> bool:
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True
