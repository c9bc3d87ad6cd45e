"""The language-model loss of a checkpoint, one decoder layer in memory."""

import torch

from loram_cli.memory.setup import chunk_tokens
from loram_cli.modeling.layerwise.states import BoundaryPool
from loram_cli.modeling.layerwise.stream import LayerStream
from loram_cli.modeling.layerwise.walk import embedded
from loram_cli.reporting import Reporter


@torch.no_grad()
def streamed_loss(
    stream: LayerStream, windows: torch.Tensor, pool: BoundaryPool, reporter: Reporter
) -> float:
    """Mean next-token loss over all windows, in nats.

    Args:
        stream: The checkpoint.
        windows: Token ids, shape (samples, length).
        pool: Keeps the hidden states; of shape (samples, length, hidden).
        reporter: Progress.
    """
    with reporter.progress("evaluate", stream.num_layers + 1, "layer") as progress:
        states = embedded(stream, windows, pool.new())
        for i in range(stream.num_layers):
            with stream.layer(i) as layer:
                states.pass_through(layer, progress)
        total = 0.0
        with stream.head() as logits_of:
            for start, hidden in states.batches(progress):
                tokens = hidden[:, :-1].reshape(1, -1, hidden.shape[-1])
                targets = windows[start : start + len(hidden), 1:].to(stream.device).reshape(-1)
                # No longer than a window: a model that learns its positions has no more of them.
                size = min(chunk_tokens(stream.vocab_size), hidden.shape[1] - 1)
                for begin in range(0, tokens.shape[1], size):
                    logits = logits_of(tokens[:, begin : begin + size])[0].float()
                    chunk = targets[begin : begin + size]
                    loss = torch.nn.functional.cross_entropy(logits, chunk, reduction="sum")
                    total += loss.item()
    pool.release(states.boundary)
    return total / windows[:, 1:].numel()
