"""Taylor gradients the plain way: the whole model in memory, one backward pass through it."""

from pathlib import Path


def whole_model_gradients(model_dir: Path, windows, names, dtype="auto"):
    """Weight and gradient of the mean next-token loss by parameter name."""
    from loram_cli.modeling.load import load_causal_lm

    model = load_causal_lm(model_dir, dtype=dtype, device="cpu")
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    wanted = {name: parameters[name].requires_grad_(True) for name in names}
    for window in windows:
        ids = window[None]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(windows)
        loss.backward()
    return {name: (p.detach(), p.grad) for name, p in wanted.items()}
