"""A finished adapter on a model in memory, for inference."""

from pathlib import Path
from typing import Any


def attach_adapter(model: Any, adapter_dir: Path) -> Any:
    """Load a PEFT adapter directory onto a model.

    Args:
        model: The model that the adapter's shapes fit.
        adapter_dir: Written by ``train`` or ``recover``.
    """
    import peft

    return peft.PeftModel.from_pretrained(model, adapter_dir).eval()
