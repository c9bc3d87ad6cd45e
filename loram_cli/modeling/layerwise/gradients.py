"""Gradients of the language-model loss for Taylor importance, one decoder layer in memory.

Forward layer by layer, keeping the hidden states at layer boundaries; then backward layer by
layer, each one run again from its boundary. The result is that of a backward pass through the
whole model, at the price of one more forward pass and of reading the weights twice.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from loram_cli.errors import LoramError
from loram_cli.memory.setup import chunk_tokens
from loram_cli.modeling.layerwise.states import BoundaryPool
from loram_cli.modeling.layerwise.stream import DecoderLayer, LayerStream
from loram_cli.modeling.layerwise.walk import HiddenStates, embedded
from loram_cli.reporting import Progress, Reporter

Watch = Callable[[int, DecoderLayer], AbstractContextManager[object]]
"""Stands around the forward and backward passes of a layer, by its index."""


def boundaries_kept(num_layers: int, first: int) -> int:
    """How many layer boundaries :func:`layer_gradients` keeps, from the first wanted layer on."""
    return num_layers - first + 1


def layer_gradients(
    stream: LayerStream,
    windows: torch.Tensor,
    layers: range,
    modules: Sequence[str],
    pool: BoundaryPool,
    reporter: Reporter,
    watch: Watch | None = None,
) -> Iterator[tuple[int, dict[str, tuple[torch.Tensor, torch.Tensor]]]]:
    """Gradients of the mean next-token loss over all windows, layer by layer.

    Args:
        stream: The base.
        windows: Token ids, shape (samples, length).
        layers: The layers to give gradients of.
        modules: Names of linear modules inside a layer, such as those of the family; a layer of
            another kind lacks some.
        pool: Keeps the hidden states; of shape (samples, length, hidden).
        reporter: Progress.
        watch: What looks on at the wanted layers; gradients then reach the first one's input too.

    Yields:
        From the last wanted layer to the first: its index, and weight and gradient by module
        name, both of the weight's shape; the gradient is summed in fp32. The mapping is emptied
        when the next one is asked for.

    Raises:
        LoramError: The loss is not finite.
    """
    backward_layers = range(stream.num_layers - 1, layers.start - 1, -1)
    total = stream.num_layers + 1 + len(backward_layers)
    with reporter.progress("calibrate", total, "layer") as progress:
        kept, last = _forward(stream, windows, layers, pool, progress)
        # From here on ``last`` holds the loss's gradient at the boundary under way.
        loss = _head_backward(stream, windows, last, progress)
        progress.detail(f"loss {loss:.3f}")
        for i in backward_layers:
            looks = watch if watch is not None and i in layers else None
            with stream.layer(i) as layer, looks(i, layer) if looks else nullcontext():
                wanted = layer.present(modules) if i in layers else ()
                sums = _gradient_sums(layer, wanted)
                into = i > layers.start or looks is not None
                for start, hidden in kept[i].batches(progress):
                    if not into and not wanted:
                        continue  # a first layer of a kind that is not ranked
                    hidden.requires_grad_(into)
                    torch.autograd.backward(layer(hidden), last.read(start))
                    if hidden.grad is not None:
                        last.boundary.write(start, hidden.grad)
                pool.release(kept.pop(i).boundary)
                if wanted:
                    found = {n: (_weight(layer, n).detach(), sums.pop(n)) for n in wanted}
                    yield i, found
                    # The caller may still hold the mapping while the next layer is read.
                    found.clear()
        pool.release(last.boundary)


def _forward(
    stream: LayerStream,
    windows: torch.Tensor,
    layers: range,
    pool: BoundaryPool,
    progress: Progress,
) -> tuple[dict[int, HiddenStates], HiddenStates]:
    """Hidden states before every layer from the first wanted one on, and after the last one."""
    current = embedded(stream, windows, pool.new())
    kept: dict[int, HiddenStates] = {}
    for i in range(stream.num_layers):
        into = None
        if i >= layers.start:
            kept[i], into = current, pool.new()
        with stream.layer(i) as layer:
            current = current.pass_through(layer, progress, into=into)
    return kept, current


def _head_backward(
    stream: LayerStream, windows: torch.Tensor, last: HiddenStates, progress: Progress
) -> float:
    """Replace the last hidden states by the loss's gradient; the loss, in nats per token.

    The vocabulary is wide: logits are made, and differentiated, for a chunk of tokens at a time.
    """
    chunk = chunk_tokens(stream.vocab_size)
    count = windows[:, 1:].numel()
    total = 0.0
    with stream.head() as logits_of:
        for start, hidden in last.batches(progress):
            targets = windows[start : start + len(hidden), 1:].to(stream.device).reshape(-1)
            # The last token of a window predicts nothing.
            tokens = hidden[:, :-1].reshape(1, -1, hidden.shape[-1])
            gradient = torch.zeros_like(tokens)
            for begin in range(0, tokens.shape[1], chunk):
                part = tokens[:, begin : begin + chunk].clone().requires_grad_(True)
                logits = logits_of(part)[0].float()
                loss = torch.nn.functional.cross_entropy(
                    logits, targets[begin : begin + chunk], reduction="sum"
                )
                total += loss.item()
                (loss / count).backward()
                assert part.grad is not None
                gradient[:, begin : begin + chunk] = part.grad
            padded = torch.zeros_like(hidden)
            padded[:, :-1] = gradient.reshape(hidden.shape[0], -1, hidden.shape[-1])
            last.boundary.write(start, padded)
    mean = total / count
    if not math.isfinite(mean):
        raise LoramError("the base model's loss on the calibration text is not finite")
    return mean


def _gradient_sums(layer: DecoderLayer, modules: Sequence[str]) -> dict[str, torch.Tensor]:
    """Tensors to which each backward pass adds the weights' gradients, in fp32."""
    sums = {}
    for name in modules:
        weight = _weight(layer, name).requires_grad_(True)
        total = sums[name] = torch.zeros_like(weight, dtype=torch.float32)

        def add(parameter: torch.Tensor, total: torch.Tensor = total) -> None:
            assert parameter.grad is not None
            total.add_(parameter.grad)
            parameter.grad = None

        weight.register_post_accumulate_grad_hook(add)
    return sums


def _weight(layer: DecoderLayer, module: str) -> torch.Tensor:
    return layer.module.get_submodule(module).weight
