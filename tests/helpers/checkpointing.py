"""Gradient checkpointing by the name that this transformers has for it."""


def enable_checkpointing(model) -> None:
    """As the Trainer does; the name is of transformers 5.23 and later, or the one before."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
