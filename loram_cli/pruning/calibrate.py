"""Calibration windows: equal runs of tokens cut from text."""

from collections.abc import Iterable
from typing import Any

import torch

from loram_cli.checkpoint.tokenizer_files import encoding
from loram_cli.errors import LoramError


def calibration_windows(
    texts: Iterable[str], tokenizer: Any, samples: int, length: int, seed: int
) -> torch.Tensor:
    """Draw windows of consecutive tokens, without overlap.

    Returns:
        Token ids, shape (samples, length).

    Raises:
        LoramError: The text is too short.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = list(texts)
    ids: list[int] = []
    # Four times the need leaves a real choice without tokenizing a whole corpus.
    for i in torch.randperm(len(texts), generator=generator).tolist():
        with encoding(tokenizer):
            ids.extend(tokenizer(texts[i], verbose=False)["input_ids"])
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if len(ids) >= 4 * samples * length:
            break
    available = len(ids) // length
    if available < samples:
        raise LoramError(
            f"calibration text has {len(ids)} tokens: {available} windows of {length}, "
            f"expected {samples}",
            "pass more text, or lower --calibration-samples or --calibration-length",
        )
    windows = torch.tensor(ids[: available * length]).reshape(available, length)
    return windows[torch.randperm(available, generator=generator)[:samples]]
