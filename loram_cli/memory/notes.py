"""What the reader of a memory report must know about its figures."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loram_cli.arch.spec import Family
from loram_cli.memory.account import count_nonzero_params, count_params, reduction
from loram_cli.memory.presets import load_preset

_ALWAYS = (
    "training memory is the predicted peak on a GPU: weights, state (LoRA factors and gradients in "
    "fp32, the optimizer's moments), activations, head and loss, and the CUDA context of 636 MiB",
    "activations and loss are of one moment, the peak: loss is 0 where a layer's backward pass "
    "needs more than the cross-entropy",
    "card: the smallest common GPU that holds it with 5% to spare, for the allocator's fragments",
    "NF4 weight memory is what bitsandbytes holds: decoder linears at 4 bits with their block "
    "maxima, all else in bf16; the paper counts a quarter of all parameters at 2 bytes",
    "the adapter is used on the base, whose weights are in the base's rows: 'generate' and 'eval' "
    "read layer by layer what the card does not hold",
)
_STREAMED = (
    "stream: 'train --on full --stream', embedding, head and two decoder layers on the GPU; "
    "offload: with --offload-activations, which 'card' assumes; RAM: copies of all layers",
    "s/step: a floor and no measurement, the slowest of computing, starting kernels, copying from "
    "RAM and (or) reading from the disk; see --tflops, --layer-ms, --bus and --disk",
)


def report_notes(
    family: Family,
    config: Mapping[str, Any],
    strategy: str,
    ratios: Sequence[float],
    *,
    counted: bool = False,
    processes: int = 1,
) -> Iterator[str]:
    """Say what the figures contain, and where they differ from the paper's."""
    yield from _ALWAYS
    if processes == 1:
        yield from _STREAMED
    if processes > 1:
        yield (
            "weights are one process's slices, and what is whole at a time: two decoder layers, "
            "the head, and NF4's block maxima"
        )
    if counted:
        yield (
            "parameters of the pruned directory are its non-zeros, counted in the weights of the "
            "decoder linears; zeros take their place in memory"
        )
    if config.get("per_layer_config"):
        yield (
            "this model is pruned already: pass the original base as --model to see the reduction"
        )
    if strategy == "lowbit":
        yield (
            "lowbit holds the decoder linears as codes with a byte for each group and two for each "
            "row; shapes stay, and weights count the largest linear while it is a floating one"
        )
    if ratios and strategy in ("rand", "stru"):
        yield (
            "the ratio is the share of groups dropped in each pruned layer, "
            "not the share of all parameters removed"
        )
    elif ratios:
        yield (
            f"{strategy} zeroes weights in place: parameters are the non-zeros, "
            "weight memory and LoRA shapes stay the base's"
        )
    if strategy == "semi" and 0.5 in ratios:
        yield from _semi_erratum(family, config)


def _semi_erratum(family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    base_params = count_params(family, config).total
    if base_params != count_params(family, load_preset("llama2-13b")).total:
        return
    ours = count_nonzero_params(family, config, 0.5).total
    printed = count_params(family, load_preset("llama2-7b")).total
    yield (
        f"the paper's Table 4 prints {printed} ({reduction(base_params, printed):.2f}x) for this "
        f"row, which is LLaMA-2-7B's own count; 2:4 of the decoder linears leaves {ours} "
        f"({reduction(base_params, ours):.2f}x, as in its Table 1)"
    )
