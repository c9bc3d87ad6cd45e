"""Chat templates along the way from base to adapter: a silent change is told of."""

from collections.abc import Mapping
from typing import Any

from loram_cli.reporting import Reporter


def warn_of_other_template(
    trained: Mapping[str, Any], base: Mapping[str, Any], reporter: Reporter
) -> None:
    """Warn when the model that was trained and the base render conversations differently.

    It is no error: a base without a template may well be given one before training. But whoever
    serves the recovered adapter must then use that template, and not the base's.

    Args:
        trained: Identity of the model that is or was trained, with ``path`` and ``chat_template``.
        base: Identity of the original base.
        reporter: Told.
    """
    mine, theirs = trained.get("chat_template"), base.get("chat_template")
    if mine is None or theirs is None or mine == theirs:
        return
    reporter.warn(
        f"the chat template of {trained.get('path')} is not that of the base {base.get('path')}: "
        "serve the adapter with the template that it was trained with"
    )
